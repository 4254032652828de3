//! The client's decider: what callers ask for, what nodes send and the passing of time come in, as method calls with the
//! clock as an argument; what is to be done about it comes out, as [`Action`]s. Pure state: no I/O, no lock, no clock.
//!
//! | what happens | method | what may come of it |
//! |---|---|---|
//! | a caller submits, cancels or aborts a task | `submit`, `cancel`, `abort` | `Send`, `Tell`, `Complete` |
//! | a caller has taken ends of tasks | `taken` | `Acknowledge` |
//! | a caller answers a note | `answer_note`, `answer_request` | `Tell`, `Answer` |
//! | nodes are added, are on their way, greet | `add_node`, `expect`, `begin`, `greeted`, `give_up` | `Complete` |
//! | a node sends frames | `received` (`arrivals.rs`) | all of them |
//! | a node's connection is lost, it comes back, it is lost | `away`, `back`, `lost` (`absence.rs`) | all of them |
//! | a heartbeat is due; a tick has passed | `beat` (`arrivals.rs`), `tick` | `Tell`, `Acknowledge`, `Complete` |
//! | the pool is closed | `close` | `Goodbye`, `Complete` |
//!
//! The actions are appended to a buffer of the caller, who carries them out in this order and keeps the buffer: a task on
//! its way through costs no allocation here. Every submitted task has exactly one `Complete`, but for a task whose
//! `cancel` returned that it was dropped.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::client::activity::Activity;
use crate::client::blobs::{self, NodeBlobs};
use crate::client::completions::QUEUE_SHIFT;
use crate::client::liveness::{Liveness, Request};
use crate::client::node::{LAST_TASK_DONE, Node, NodeRecord, NodeState, Session, node_of_sender};
use crate::client::wakeups::Wakeups;
use crate::queue::{Cancelled, PeerId, Queue};
use crate::timing::Timing;
use crate::wire::{AgentHello, Attempt, ClientHello, Control, Message, Outcome};

/// Most slots of a node whose user asked for one slot per core: the node tells its number of cores itself.
const MAX_CORES: usize = 8192;

/// What is to be done. Frames for a node leave when its sender is woken.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this task to the node.
    Send(PeerId, Message),
    /// Send the node these bytes as the blob of this number.
    SendBlob(PeerId, u64, Bytes),
    /// Send the node what a note asked for.
    Answer(PeerId, Message),
    /// Tell the node to forget the blobs of these numbers.
    Forget(PeerId, Vec<u64>),
    /// Send this control frame to the node.
    Tell(PeerId, Control),
    /// Acknowledge this result to the node: it may forget the result.
    Acknowledge(PeerId, Attempt),
    /// Say goodbye to the node, for this reason, and drop what was not sent yet.
    Goodbye(PeerId, &'static str),
    /// Wake the node's sender.
    Wake(PeerId),
    /// Hand the end of this task to the caller. If a node is named, [`Dispatch::taken`] is to be called when the caller has
    /// taken it.
    Complete(Option<PeerId>, Message),
    /// Hand what a task told or asked this process to the caller, who answers the sender of this number with
    /// [`Dispatch::answer_note`] or [`Dispatch::answer_request`].
    Note(u64, Message),
    /// Hand what a worker of the node wrote to a stream to the caller.
    Print(PeerId, u64, Bytes),
    /// Wake the threads that wait for a node's state, or for the answer to a cancel.
    Notify,
}

/// See the module's text.
#[derive(Debug)]
pub struct Dispatch {
    pub(super) queue: Queue,
    /// The nodes by their numbers. A node is added by [`Dispatch::add_node`] and never removed.
    pub(super) nodes: Vec<NodeRecord>,
    /// The pool was closed: each task that is submitted ends at once. Set by [`Dispatch::close`].
    pub(super) closing: bool,
    /// Nodes that are on their way and not added yet. Set by [`Dispatch::expect`].
    expected: usize,
    /// Attempts that a task has at most.
    pub(super) attempts: u16,
    pub(super) timing: Timing,
    /// Results that came late or twice, so far.
    pub(super) stale: u64,
    /// Tasks whose caller waits in `cancel` for the node's answer, each with whether the task was dropped.
    pub(super) pending_cancels: HashMap<u64, bool>,
    pub(super) wakeups: Wakeups,
    /// The number of the last transfer of a blob to a node.
    pub(super) last_blob: u64,
    pub(super) activity: Activity,
}

impl Dispatch {
    /// Return the state of a pool without nodes and tasks. A task has at most `attempts` attempts.
    #[must_use]
    pub fn new(attempts: u16, timing: Timing) -> Self {
        Self {
            queue: Queue::default(),
            nodes: Vec::new(),
            closing: false,
            expected: 0,
            attempts: attempts.max(1),
            timing,
            stale: 0,
            pending_cancels: HashMap::new(),
            wakeups: Wakeups::default(),
            last_blob: 0,
            activity: Activity::default(),
        }
    }

    /// Add a node that is to be connected to, and return its number. Queued tasks wait for it from now on. `may_return`: when it
    /// is lost, it will be begun anew, or given up by [`Dispatch::give_up`].
    pub fn add_node(&mut self, name: String, may_return: bool, now: Instant) -> PeerId {
        let state = if self.closing { NodeState::Closed } else { NodeState::Connecting };
        self.nodes.push(NodeRecord::new(name, state, may_return, now));
        self.activity.add_node(now);
        self.nodes.len() - 1
    }

    /// Set how many further nodes are on their way. With 0, tasks fail that no node can ever run.
    pub fn expect(&mut self, count: usize, now: Instant, out: &mut Vec<Action>) {
        self.expected = count;
        self.fail_stranded(now, out);
    }

    /// Note what a node and this client told of themselves. Return the interval at which [`Dispatch::beat`] is to be
    /// called.
    pub fn greeted(&mut self, id: PeerId, client: &ClientHello, agent: AgentHello, now: Instant) -> Duration {
        let life = Liveness::new(self.timing, Duration::from_millis(client.lease_ms));
        let interval = life.interval();
        if let Some(record) = self.nodes.get_mut(id) {
            record.max_slots = client.worker.concurrency.unwrap_or(agent.cores.min(MAX_CORES)).max(1);
            record.blobs = NodeBlobs::new(blobs::budget(client.worker.cache_bytes, agent.memory));
            record.node.hello = Some(Arc::new(agent));
            record.session = Some(Session {
                life,
                since: now,
                lease_ms: client.lease_ms,
                stamp: 0,
                heard: now,
                has_task_timeout: client.worker.task_timeout_ms.is_some(),
            });
        }
        interval
    }

    /// Return all nodes that were added, in that order.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().map(|record| &record.node)
    }

    /// Return the node of this number.
    #[must_use]
    pub fn node(&self, id: PeerId) -> Option<&Node> {
        self.nodes.get(id).map(|record| &record.node)
    }

    /// Return the number of tasks that have not ended, and of results that came late or twice.
    #[must_use]
    pub fn counts(&self) -> (usize, u64) {
        (self.queue.len(), self.stale)
    }

    /// Return what the nodes have done so far.
    #[must_use]
    pub fn activity(&self) -> &Activity {
        &self.activity
    }

    /// Return how many calls have not ended.
    #[must_use]
    pub fn pending_calls(&self) -> u64 {
        self.queue.calls()
    }

    /// Return whether a task's node has reported that the task runs.
    #[must_use]
    pub fn is_running(&self, task: u64) -> bool {
        self.queue.is_running(task)
    }

    /// Return how many tasks a node runs, how many wait there, and the bytes of large data that it keeps. A node with more
    /// tasks than slots runs as many as it has slots.
    #[must_use]
    pub fn load(&self, id: PeerId) -> (usize, usize, u64) {
        let held = self.queue.count_held(id);
        let Some(record) = self.nodes.get(id) else { return (0, held, 0) };
        let running = held.min(record.node.slots);
        (running, held - running, record.blobs.size())
    }

    /// Append a task to the queue, or send it to this one node.
    pub fn submit(
        &mut self,
        task: Message,
        node: Option<PeerId>,
        caller: ThreadId,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        let (id, calls) = (task.id, u64::from(task.calls));
        let refused = match node {
            Some(node) if !self.closing => match self.queue.push_to(node, task) {
                Some(task) => {
                    self.send_task(node, task, out);
                    None
                }
                None => {
                    Some(self.nodes.get(node).map_or_else(|| format!("there is no node {node}"), NodeRecord::why_not))
                }
            },
            _ => match self.no_eligible_node(now) {
                None => {
                    self.queue.push(task);
                    self.assign(now, out);
                    None
                }
                why => why,
            },
        };
        if let Some(why) = refused {
            self.activity.failed(calls);
            out.push(Action::Complete(None, Message::text(id, Outcome::NodeLost, why)));
        } else if !self.wakeups.may_batch(id.task >> QUEUE_SHIFT, caller, self.queue.len(), now) {
            self.wake(out);
        }
        debug_assert!(self.is_consistent());
    }

    /// Drop a task that has not started. If a node holds the task, the node is asked; with `wait` its answer is kept for
    /// [`Dispatch::cancel_answer`]. A task that was dropped at once has no `Complete`.
    pub fn cancel(&mut self, task: u64, wait: bool, out: &mut Vec<Action>) -> Cancelled {
        let cancelled = self.queue.cancel(task);
        if let Cancelled::Held(node) = cancelled {
            self.ask_about(node, Request::Cancel, task, out);
            if wait {
                self.pending_cancels.insert(task, false);
            }
        }
        debug_assert!(self.is_consistent());
        cancelled
    }

    /// Return whether the answer to a cancel is still to come.
    #[must_use]
    pub fn is_cancel_pending(&self, task: u64) -> bool {
        self.pending_cancels.get(&task) == Some(&false) && self.queue.attempt(task).is_some()
    }

    /// Stop waiting for the answer to a cancel. Return whether the task was dropped.
    pub fn cancel_answer(&mut self, task: u64) -> bool {
        self.pending_cancels.remove(&task) == Some(true)
    }

    /// Drop a task, or end it if it is running. However it ends, it has a `Complete`.
    pub fn abort(&mut self, task: u64, out: &mut Vec<Action>) {
        match self.queue.cancel(task) {
            Cancelled::Dropped => {
                out.push(Action::Complete(None, Message::cancelled(Attempt { task, attempt: 0 })));
            }
            Cancelled::Held(node) => self.ask_about(node, Request::Abort, task, out),
            Cancelled::Unknown => {}
        }
        debug_assert!(self.is_consistent());
    }

    /// Note that this thread takes a queue's tasks, and acknowledge the results that it took when senders are woken next.
    pub fn taken(
        &mut self,
        queue: u64,
        caller: ThreadId,
        results: impl IntoIterator<Item = (PeerId, Attempt)>,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        self.wakeups.taken(queue, caller, now);
        self.acknowledge(results, out);
    }

    /// Forget which thread takes a queue's tasks.
    pub fn close_queue(&mut self, queue: u64) {
        self.wakeups.close_queue(queue);
    }

    /// Answer a note's sender: the note was taken, or `error` is why it was not.
    pub fn answer_note(&mut self, sender: u64, note: u64, error: Bytes, out: &mut Vec<Action>) {
        if let Some((from, record)) = node_of_sender(&mut self.nodes, sender) {
            record.notes.give_back(note);
            out.extend([Action::Tell(from, Control::NoteAnswer { note, error }), Action::Wake(from)]);
        }
    }

    /// Answer the sender of a note that asks for something, with what it asked for.
    pub fn answer_request(&mut self, sender: u64, note: u64, content: Bytes, out: &mut Vec<Action>) {
        if let Some((from, record)) = node_of_sender(&mut self.nodes, sender) {
            record.notes.give_back(note);
            let answer = Message { id: Attempt { task: note, attempt: 0 }, parts: vec![content], ..Message::default() };
            out.extend([Action::Answer(from, answer), Action::Wake(from)]);
        }
    }

    /// Do what becomes due while nothing happens: acknowledge `stuck` results, which no thread has taken for a while, ask
    /// draining nodes again for their tasks and leave those that have none, and fail tasks that waited too long for a node's
    /// replacement.
    pub fn tick(&mut self, stuck: impl IntoIterator<Item = (PeerId, Attempt)>, now: Instant, out: &mut Vec<Action>) {
        self.acknowledge(stuck, out);
        for id in 0..self.nodes.len() {
            let Some(record) = self.nodes.get_mut(id) else { continue };
            if !matches!(record.node.state, NodeState::Draining(_)) {
                continue;
            }
            if self.queue.held(id).next().is_some() {
                // A task that was on its way to the node when it was asked for was not found there.
                let tasks = self.queue.recall_all(id);
                self.recall(id, tasks, out);
            } else if record.dismissed_since.is_none() {
                // Its machine may be the one that its successor waits for.
                record.dismissed_since = Some(now);
                // No task is for it from now on, and none is lost.
                self.queue.remove_peer(id);
                out.extend([Action::Goodbye(id, LAST_TASK_DONE), Action::Wake(id)]);
            }
        }
        self.assign(now, out);
        self.forget_blobs(out);
        self.wake(out);
        self.fail_stranded(now, out);
        debug_assert!(self.is_consistent());
    }

    /// Say goodbye to all nodes. Tasks that have not ended are cancelled.
    pub fn close(&mut self, now: Instant, out: &mut Vec<Action>) {
        self.closing = true;
        for (id, record) in self.nodes.iter_mut().enumerate() {
            out.extend([Action::Goodbye(id, "the pool was closed"), Action::Wake(id)]);
            if record.node.state == NodeState::Connecting && !record.has_begun {
                record.set_state(NodeState::Closed, now);
            }
        }
        out.extend(self.queue.take_all().into_iter().map(|id| Action::Complete(None, Message::cancelled(id))));
        debug_assert!(self.is_consistent());
    }

    /// Return why no task can ever run but on a node that the task is for alone; `None` if one can.
    ///
    /// A node that announced its departure is probably being replaced, and a lost one may return. Tasks that any node may run stay
    /// queued for [`Timing::replacement`] after that; then they fail, unless another node is there.
    fn no_eligible_node(&self, now: Instant) -> Option<String> {
        if self.closing {
            return Some("the pool is closed".to_owned());
        }
        if self.expected > 0 {
            return None;
        }
        let mut reasons = Vec::new();
        for NodeRecord { node, draining_since, lost_since, .. } in &self.nodes {
            let is_replaced = |since: Instant| now.saturating_duration_since(since) < self.timing.replacement;
            match &node.state {
                NodeState::Connecting | NodeState::Ready | NodeState::Reconnecting(_) => return None,
                NodeState::Lost(_) if node.returns && lost_since.is_some_and(is_replaced) => return None,
                NodeState::Draining(_) if draining_since.is_some_and(is_replaced) => return None,
                NodeState::Draining(why) => reasons.push(format!("{} takes no more tasks: {why}", node.name)),
                NodeState::Lost(why) => reasons.push(format!("{}: {why}", node.name)),
                NodeState::Closed => {}
            }
        }
        (!self.nodes.is_empty()).then(|| format!("no node is left ({})", reasons.join("; ")))
    }

    /// End the queued tasks, if no node will ever take them.
    pub(super) fn fail_stranded(&mut self, now: Instant, out: &mut Vec<Action>) {
        // The text is shared: there may be a million tasks.
        let Some(why) = self.no_eligible_node(now).map(Bytes::from) else { return };
        let before = self.queue.calls();
        out.extend(self.queue.take_waiting().into_iter().map(|id| {
            let end = Message::text(id, Outcome::NodeLost, String::new());
            Action::Complete(None, Message { parts: vec![why.clone()], ..end })
        }));
        self.activity.failed(before - self.queue.calls());
    }

    /// Return whether every task is in exactly one place, and each record agrees with the others. Takes time in proportion
    /// to the number of tasks: for tests and debug builds.
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        let mut held = 0;
        let nodes_agree = self.nodes.iter().enumerate().all(|(id, record)| {
            let before = held;
            held += self.queue.held(id).count();
            self.queue.held(id).all(|attempt| self.queue.holds(id, attempt)) && record.is_consistent(held - before)
        });
        nodes_agree
            && self.queue.waiting() + held == self.queue.len()
            && self.wakeups.is_consistent(self.nodes.len())
            && (!self.closing || self.queue.is_empty())
    }
}
