//! The client's side: the nodes' sessions, one queue in front of them, finished tasks behind.
//!
//! All I/O runs on one thread of its own. Callers' threads only append to the queue and take from the list of
//! finished tasks; what they append is assigned to a node at once, on their thread.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::net::UnixStream;
use tokio::runtime;
use tokio::sync::Notify;

use crate::client::liveness::{Ask, Liveness, may_end};
use crate::error::{FrameError, NodeError, SessionError, SshError};
use crate::node::stdio::STDERR;
use crate::queue::{Cancelled, PeerId, Queue};
use crate::text;
use crate::timing::Timing;
use crate::transport::connection::Connection;
use crate::transport::output::{CommandOutput, shown};
use crate::transport::ssh::{self, Target};
use crate::wire::flood::{Flood, Piece};
use crate::wire::{
    AgentHello, CREDIT, ClientHello, EventReader, FrameSender, LEAST_MESSAGE, LEFT_OUT, NOTE_CREDIT, Outbox,
    PEER_TIMEOUT, hello, lock, read_hello,
};
use crate::wire::{Attempt, Body, Control, Event, Message, Offer, Outcome};

/// How often idle nodes are looked at while nothing else happens.
const TICK: Duration = Timing::DEFAULT.tick;
/// Tasks that the thread which settles finished ones may submit before the sender is woken, at most. Waking it for each
/// costs more than the rest of the way; the thread comes back when it has settled what it took.
const CORK: usize = 32;
/// The share of all unfinished tasks that may wait so: while it is small, the ends of the line work side by side.
const CORK_SHARE: usize = 5;
/// Pause between two such submits after which the sender is woken all the same: whatever comes between is slow.
const CORK_PAUSE: Duration = Duration::from_micros(200);
/// Bound on saying goodbye to a node, which may have something to undo first.
const LAST_WORDS: Duration = Timing::DEFAULT.client_goodbye;
/// Bound on whatever the runtime still does after that.
const SHUTDOWN: Duration = Timing::DEFAULT.runtime_shutdown;
/// How long a draining node is taken for one that others will replace: as long as nodes have to start. After that, tasks
/// that wait for any node do not wait for it.
const REPLACEMENT_TIMEOUT: Duration = Timing::DEFAULT.replacement;
/// Slots that a node may offer at most that was asked for one per core.
const MAX_CORES: usize = 8192;
/// Bound on finding out why an agent did not start.
const AGAIN: Duration = Duration::from_secs(10);

/// A task's number says in its high bits, from this one on, to which lane its end goes. Ends are taken lane by lane, so
/// that what a thread does with those of one holds up no other.
pub const QUEUE_SHIFT: u32 = 40;
/// Completion queues that can be open beside queue 0: the numbers that fit into a task's number. Each has a thread of its
/// own, so there are always unused ones.
const MAX_QUEUES: u64 = u64::MAX >> QUEUE_SHIFT;

/// Where a node stands. It only ever moves down this list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeState {
    Connecting,
    Ready,
    /// It will soon be gone, and why: it ends what it runs and takes nothing more but what is for it alone.
    Draining(String),
    /// It never was or is no longer usable, and why.
    Lost(String),
    /// It was left on purpose.
    Closed,
}

impl NodeState {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Ready => "ready",
            Self::Draining(_) => "draining",
            Self::Lost(_) => "lost",
            Self::Closed => "closed",
        }
    }
}

/// What is known of a node.
#[derive(Debug, Clone)]
pub struct Node {
    pub name: String,
    pub state: NodeState,
    pub slots: usize,
    /// Smallest recent round-trip time of a heartbeat.
    pub rtt: Duration,
    pub hello: Option<AgentHello>,
    /// Slots that it may offer at most: what was asked for, or its cores.
    asked: usize,
    link: Arc<FrameSender>,
    /// A session with it was begun.
    begun: bool,
    /// When it said that it will soon be gone.
    drained: Option<Instant>,
}

/// Where a node's SSH server is.
#[derive(Debug)]
pub enum Endpoint {
    /// At the other end of this socket: an embedded server, or a proxy command.
    Socket(StdUnixStream),
    /// At this host name or address and port.
    Address(String, u16),
}

/// How to open a session with a node that is connected to.
pub struct NodeSpec {
    pub connection: Arc<Connection>,
    /// What to run there: it speaks our protocol over its standard input and output.
    pub command: String,
    pub hello: ClientHello,
    /// Bound on everything until its workers take tasks.
    pub ready_timeout: Duration,
}

#[derive(Debug)]
struct State {
    queue: Queue,
    nodes: Vec<Node>,
    closing: bool,
    /// Nodes that are asked for and not yet added.
    expected: usize,
    stale: u64,
    /// Tasks of which somebody waits to hear whether they could be cancelled, and if so.
    awaited: HashMap<u64, bool>,
    /// Nodes whose sender is to be woken.
    staged: BTreeSet<PeerId>,
    corked: usize,
    /// The thread that takes from each lane, and when it did or submitted something last.
    settlers: HashMap<u64, (ThreadId, Instant)>,
    attempts: u16,
    timing: Timing,
    /// Of the nodes that have a session.
    lives: HashMap<PeerId, Liveness>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// A node changed its state, or a task that is awaited its own.
    changed: Condvar,
    finished: Mutex<Finished>,
    output: Mutex<Output>,
    some_output: Condvar,
    notes: Mutex<Notes>,
    some_notes: Condvar,
    close: Notify,
    max_message: usize,
}

#[derive(Debug, Default)]
struct Finished {
    lanes: HashMap<u64, CompletionQueue>,
    /// The number of the completion queue that was opened last.
    opened: u64,
    closed: bool,
}

#[derive(Debug, Default)]
struct CompletionQueue {
    /// With the node to thank for each result, so that its bytes count as credit again once the caller took it.
    messages: Vec<(Option<PeerId>, Message)>,
    some: Arc<Condvar>,
    /// Whoever waits is to look up.
    woken: bool,
    /// Something was there at the last tick and was not taken since.
    stuck: bool,
    /// Whoever takes was told that there will be no more.
    over: bool,
}

/// What a worker wrote: the node's name, the number of the stream as `output.rs` makes it, and the text.
pub type Lines = (String, u64, Bytes);

#[derive(Debug, Default)]
struct Output {
    waiting: Flood<(String, u64)>,
    closed: bool,
}

/// What tasks told this process and nobody has taken yet, with the node that each came from. A node keeps those back that
/// are beyond its credit.
#[derive(Debug, Default)]
struct Notes {
    waiting: Vec<(PeerId, Message)>,
    /// Of each node the notes that are not answered yet, by number, with the memory that each takes, and the sum of it.
    unanswered: HashMap<PeerId, (HashMap<u64, usize>, usize)>,
    closed: bool,
}

impl Notes {
    /// Whether a node may send a note that takes so much memory, beside those that are not complete.
    fn has_credit(&self, from: PeerId, unfinished: usize, cost: usize) -> Result<(), FrameError> {
        let sum = self.unanswered.get(&from).map_or(0, |(_, sum)| *sum).saturating_add(unfinished);
        let len = sum.saturating_add(cost);
        if sum == 0 || len <= NOTE_CREDIT {
            return Ok(());
        }
        Err(FrameError::TooLong { what: "notes without an answer", len, cap: NOTE_CREDIT })
    }

    fn add(&mut self, from: PeerId, note: Message) -> Result<(), FrameError> {
        let cost = note.cost();
        self.has_credit(from, 0, cost)?;
        let (costs, sum) = self.unanswered.entry(from).or_default();
        if costs.insert(note.id.task, cost).is_some() {
            return Err(FrameError::BadSequence("two notes of the same number"));
        }
        *sum += cost;
        self.waiting.push((from, note));
        Ok(())
    }

    fn answered(&mut self, from: PeerId, note: u64) {
        if let Some((costs, sum)) = self.unanswered.get_mut(&from) {
            *sum -= costs.remove(&note).unwrap_or_default();
        }
    }
}

/// The nodes of one pool.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    runtime: runtime::Handle,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// The process that has the thread: a forked child has not.
    owner: u32,
}

impl Pool {
    /// A pool without nodes, and with lane 0. A task runs at most `attempts` times; results over `max_message` bytes are refused.
    ///
    /// # Errors
    /// When the I/O thread cannot be started.
    pub fn new(attempts: u16, max_message: usize) -> io::Result<Self> {
        Self::with_timing(attempts, max_message, Timing::default())
    }

    /// As [`Pool::new`], with other bounds on what nodes answer.
    ///
    /// # Errors
    /// As [`Pool::new`].
    pub fn with_timing(attempts: u16, max_message: usize, timing: Timing) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                queue: Queue::default(),
                nodes: Vec::new(),
                closing: false,
                expected: 0,
                stale: 0,
                awaited: HashMap::new(),
                staged: BTreeSet::new(),
                corked: 0,
                settlers: HashMap::new(),
                attempts: attempts.max(1),
                timing,
                lives: HashMap::new(),
            }),
            changed: Condvar::new(),
            finished: Mutex::default(),
            output: Mutex::default(),
            some_output: Condvar::new(),
            notes: Mutex::default(),
            some_notes: Condvar::new(),
            close: Notify::new(),
            max_message,
        });
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        lock(&shared.finished).lanes.insert(0, CompletionQueue::default());
        let handle = runtime.handle().clone();
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("skyward-io".to_owned()).spawn(move || {
            runtime.block_on(for_thread.housekeeping());
            runtime.shutdown_timeout(SHUTDOWN);
        })?;
        Ok(Self { shared, runtime: handle, thread: Mutex::new(Some(thread)), owner: std::process::id() })
    }

    /// Count a node in, which is to be connected to. Its fate is told by [`Pool::nodes`]. At any time, also after all
    /// others were lost: what waits then waits for this one.
    pub fn add_node(&self, name: String) -> PeerId {
        let mut state = lock(&self.shared.state);
        let (id, closing) = (state.nodes.len(), state.closing);
        state.nodes.push(Node {
            name,
            state: if closing { NodeState::Closed } else { NodeState::Connecting },
            slots: 0,
            rtt: Duration::MAX,
            hello: None,
            asked: 0,
            link: Arc::default(),
            begun: false,
            drained: None,
        });
        id
    }

    /// Say how many nodes are asked for and not yet added. While there are any, tasks wait for them when no node is left;
    /// with the last one that does not come they end at once, as they would have without it.
    pub fn expect(&self, count: usize) {
        let mut state = lock(&self.shared.state);
        state.expected = count;
        let ended = state.end_if_hopeless();
        drop(state);
        self.shared.finish(ended);
    }

    /// Open a connection. Waits for it, within the target's bound.
    ///
    /// # Errors
    /// [`NodeError::Ssh`], and [`NodeError::Closed`] if the pool is closed meanwhile.
    pub fn connect(&self, endpoint: Endpoint, target: Target) -> Result<Connection, NodeError> {
        self.wait(async move {
            let connection = match endpoint {
                Endpoint::Socket(socket) => {
                    socket.set_nonblocking(true).map_err(SshError::Io)?;
                    let socket = UnixStream::from_std(socket).map_err(SshError::Io)?;
                    ssh::connect(socket, &target).await?
                }
                Endpoint::Address(host, port) => ssh::connect_tcp(&host, port, &target).await?,
            };
            Ok(Connection::Ssh(connection))
        })
    }

    /// Run a command to its end. Waits for it, at most for `bound`.
    ///
    /// # Errors
    /// As [`Pool::connect`].
    pub fn run(
        &self,
        connection: Arc<Connection>,
        command: String,
        input: Bytes,
        bound: Duration,
    ) -> Result<CommandOutput, NodeError> {
        self.wait(async move {
            let ended = tokio::time::timeout(bound, connection.run(&command, input)).await;
            Ok(ended.map_err(|_| SshError::Command { command, seconds: bound.as_secs() })??)
        })
    }

    /// Do something on the I/O thread, and wait for it. It has a bound of its own.
    fn wait<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, NodeError>> + Send + 'static,
    ) -> Result<T, NodeError> {
        let (done, waiting) = std::sync::mpsc::sync_channel(1);
        self.runtime.spawn(async move { drop(done.send(work.await)) });
        // Without a runtime what was spawned is dropped, and its sender with it.
        waiting.recv().unwrap_or(Err(NodeError::Closed))
    }

    /// Open a session with a node that was counted in.
    pub fn start_node(&self, id: PeerId, spec: NodeSpec) {
        let link = match lock(&self.shared.state).nodes.get_mut(id) {
            Some(node) if node.state == NodeState::Connecting => {
                node.begun = true;
                Arc::clone(&node.link)
            }
            _ => return,
        };
        let shared = Arc::clone(&self.shared);
        self.runtime.spawn(async move {
            let end = shared.serve(id, spec, link).await;
            shared.node_ended(id, end);
        });
    }

    /// Give a node up that was counted in, and say why.
    pub fn fail_node(&self, id: PeerId, why: String) {
        self.shared.node_ended(id, Err(NodeError::Other(why)));
    }

    /// All nodes that were added, in that order.
    #[must_use]
    pub fn nodes(&self) -> Vec<Node> {
        lock(&self.shared.state).nodes.clone()
    }

    /// Wait until a node is no longer in the state whose name it had in `seen`, at most for `bound`.
    pub fn wait_for_change(&self, seen: &[impl AsRef<str>], bound: Duration) {
        let state = lock(&self.shared.state);
        let same = |s: &mut State| s.nodes.iter().map(|n| n.state.name()).eq(seen.iter().map(AsRef::as_ref));
        drop(self.shared.changed.wait_timeout_while(state, bound, same));
    }

    /// Append a task, or send it to this one node. It ends with exactly one message out of [`Pool::finished`] of its lane,
    /// which is open; false if that has already said that no more will come. Never waits.
    pub fn submit(&self, message: Message, node: Option<PeerId>) -> bool {
        let mut state = lock(&self.shared.state);
        let id = message.id;
        let why = match node {
            Some(node) if !state.closing => match state.queue.push_to(node, message) {
                Some(message) => {
                    state.stage(node, |o| o.message(Body::Task, message));
                    None
                }
                None => Some(state.why_not(node)),
            },
            _ => match state.hopeless() {
                None => {
                    state.queue.push(message);
                    state.pump();
                    None
                }
                why => why,
            },
        };
        if let Some(why) = why {
            drop(state);
            return self.shared.finish([(None, Message::text(id, Outcome::NodeLost, why))]);
        }
        if !state.may_cork(id.task >> QUEUE_SHIFT) {
            state.flush();
        }
        true
    }

    /// Drop a task that has not started, wherever it waits. True if so: that is its end, and nothing more is told of it.
    /// Waits for the answer of the node that has it, at most for `bound`; after that it may still end as cancelled.
    pub fn cancel(&self, task: u64, bound: Duration) -> bool {
        let mut state = lock(&self.shared.state);
        match state.queue.cancel(task) {
            Cancelled::Dropped => return true,
            Cancelled::Unknown => return false,
            Cancelled::Held(node) => {
                let Some(id) = state.queue.attempt(task) else { return false };
                state.ask(node, Ask::Cancel, id);
                state.flush();
            }
        }
        if bound.is_zero() {
            return false;
        }
        state.awaited.insert(task, false);
        let open = |s: &mut State| s.awaited.get(&task) == Some(&false) && s.queue.attempt(task).is_some();
        let (mut state, _) =
            self.shared.changed.wait_timeout_while(state, bound, open).unwrap_or_else(PoisonError::into_inner);
        state.awaited.remove(&task) == Some(true)
    }

    /// Drop a task, or end it if it is running. Its end comes out of [`Pool::finished`], whatever it is.
    pub fn abort(&self, task: u64) {
        let mut state = lock(&self.shared.state);
        match state.queue.cancel(task) {
            Cancelled::Dropped => {
                drop(state);
                self.shared.finish([(None, Message::cancelled(Attempt { task, attempt: 0 }))]);
            }
            Cancelled::Held(node) => {
                if let Some(id) = state.queue.attempt(task) {
                    state.ask(node, Ask::Abort, id);
                    state.flush();
                }
            }
            Cancelled::Unknown => {}
        }
    }

    /// What tasks wrote since the last call, waiting up to `bound` for it; `None` once the pool is closed.
    #[must_use]
    pub fn output(&self, bound: Duration) -> Option<Vec<Lines>> {
        let output = lock(&self.shared.output);
        let (mut output, _) = self
            .shared
            .some_output
            .wait_timeout_while(output, bound, |o| o.waiting.is_empty() && !o.closed)
            .unwrap_or_else(PoisonError::into_inner);
        if output.closed && output.waiting.is_empty() {
            return None;
        }
        let lines =
            std::iter::from_fn(|| output.waiting.pop()).map(|Piece { from: (node, stream), text, left_out }| {
                if left_out == 0 {
                    (node, stream, text)
                } else {
                    // The node's word, not a worker's.
                    let text = format!("… {left_out} bytes of output are left out here\n");
                    (node, STDERR, Bytes::from(text))
                }
            });
        Some(lines.collect())
    }

    /// What tasks told this process since the last call, each with its node, waiting up to `bound` for it; `None` once the
    /// pool is closed. Each is to be answered with [`Pool::answer_note`].
    #[must_use]
    pub fn notes(&self, bound: Duration) -> Option<Vec<(PeerId, Message)>> {
        let notes = lock(&self.shared.notes);
        let (mut notes, _) = self
            .shared
            .some_notes
            .wait_timeout_while(notes, bound, |n| n.waiting.is_empty() && !n.closed)
            .unwrap_or_else(PoisonError::into_inner);
        // What still waits when the pool is closed has no sender left that could hear an answer.
        (!notes.closed).then(|| std::mem::take(&mut notes.waiting))
    }

    /// Tell the sender of a note that it was taken, or why it was not. Nobody hears it if the node is lost.
    pub fn answer_note(&self, from: PeerId, note: u64, error: Bytes) {
        lock(&self.shared.notes).answered(from, note);
        if let Some(node) = lock(&self.shared.state).nodes.get(from) {
            node.link.send(|o| o.control(Control::NoteAnswer { note, error }));
        }
    }

    /// Let a task that was never submitted come out of [`Pool::finished`], with nothing in it; false as for `submit`.
    pub fn end(&self, id: Attempt) -> bool {
        self.shared.finish([(None, Message { id, code: Outcome::Returned as u8, nanos: 0, parts: Vec::new() })])
    }

    /// Open a completion queue and return its number. The numbers of its tasks are from `(number << QUEUE_SHIFT) + 1` on.
    #[must_use]
    pub fn open_queue(&self) -> u64 {
        let mut finished = lock(&self.shared.finished);
        loop {
            finished.opened = finished.opened % MAX_QUEUES + 1;
            let number = finished.opened;
            if let Entry::Vacant(unused) = finished.lanes.entry(number) {
                unused.insert(CompletionQueue::default());
                return number;
            }
        }
    }

    /// Let go of a lane all of whose tasks have ended.
    pub fn close_queue(&self, lane: u64) {
        lock(&self.shared.finished).lanes.remove(&lane);
        lock(&self.shared.state).settlers.remove(&lane);
    }

    /// Let whoever waits for a lane's tasks return, with none if there is none.
    pub fn wake(&self, lane: u64) {
        if let Some(lane) = lock(&self.shared.finished).lanes.get_mut(&lane) {
            lane.woken = true;
            lane.some.notify_one();
        }
    }

    /// The tasks of a lane that ended since the last call, waiting up to `bound` for one; `None` once the pool is closed.
    #[must_use]
    pub fn finished(&self, lane: u64, bound: Duration) -> Option<Vec<Message>> {
        lock(&self.shared.state).flush();
        let finished = lock(&self.shared.finished);
        let some = Arc::clone(&finished.lanes.get(&lane)?.some);
        let none = |f: &mut Finished| {
            !f.closed && f.lanes.get(&lane).is_some_and(|lane| lane.messages.is_empty() && !lane.woken)
        };
        let (mut finished, _) = some.wait_timeout_while(finished, bound, none).unwrap_or_else(PoisonError::into_inner);
        let closed = finished.closed;
        let ended = finished.lanes.get_mut(&lane)?;
        ended.woken = false;
        ended.stuck = false;
        if ended.messages.is_empty() {
            ended.over = closed;
            return (!closed).then(Vec::new);
        }
        let messages = std::mem::take(&mut ended.messages);
        drop(finished);
        let mut state = lock(&self.shared.state);
        state.settlers.insert(lane, (std::thread::current().id(), Instant::now()));
        state.acknowledge(messages.iter().filter_map(|(from, message)| Some(((*from)?, message.id))));
        drop(state);
        Some(messages.into_iter().map(|(_, message)| message).collect())
    }

    /// Tasks that have not ended, and answers that came late or twice.
    #[must_use]
    pub fn counts(&self) -> (usize, u64) {
        let state = lock(&self.shared.state);
        (state.queue.len(), state.stale)
    }

    /// Return whether this process was forked from the one that opened the pool: it has no I/O thread, and any lock may be
    /// held for ever.
    #[must_use]
    pub fn is_forked(&self) -> bool {
        self.owner != std::process::id()
    }

    /// Leave all nodes. Tasks that have not ended are cancelled. Waits at most a few seconds; idempotent.
    pub fn close(&self) {
        if self.is_forked() {
            return;
        }
        let mut state = lock(&self.shared.state);
        state.closing = true;
        for node in &mut state.nodes {
            node.link.send(|o| o.close("the pool was closed"));
            if node.state == NodeState::Connecting && !node.begun {
                node.state = NodeState::Closed;
            }
        }
        let left = state.queue.drain();
        // Under the lock: whoever closes at the same time must not come between.
        self.shared.finish(left.into_iter().map(|id| (None, Message::cancelled(id))));
        drop(state);
        self.shared.close.notify_one();
        if let Some(thread) = lock(&self.thread).take() {
            drop(thread.join());
        }
        {
            let mut finished = lock(&self.shared.finished);
            finished.closed = true;
            finished.lanes.values().for_each(|lane| lane.some.notify_all());
        }
        lock(&self.shared.output).closed = true;
        self.shared.some_output.notify_all();
        lock(&self.shared.notes).closed = true;
        self.shared.some_notes.notify_all();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close();
    }
}

impl State {
    /// Why no task can ever run but on a node that it is for alone, if that is so.
    fn hopeless(&self) -> Option<String> {
        if self.closing {
            return Some("the pool is closed".to_owned());
        }
        if self.expected > 0 {
            return None;
        }
        let mut reasons = Vec::new();
        for node in &self.nodes {
            match &node.state {
                NodeState::Connecting | NodeState::Ready => return None,
                NodeState::Draining(_) if node.drained.is_some_and(|since| since.elapsed() < REPLACEMENT_TIMEOUT) => {
                    return None;
                }
                NodeState::Draining(why) => reasons.push(format!("{} takes no more tasks: {why}", node.name)),
                NodeState::Lost(why) => reasons.push(format!("{}: {why}", node.name)),
                NodeState::Closed => {}
            }
        }
        (!self.nodes.is_empty()).then(|| format!("no node is left ({})", reasons.join("; ")))
    }

    /// The ends of what waits, if no node will ever take it.
    fn end_if_hopeless(&mut self) -> Vec<(Option<PeerId>, Message)> {
        // The text is shared: there may be a million tasks.
        let Some(why) = self.hopeless().map(Bytes::from) else { return Vec::new() };
        let end =
            |id| (None, Message { parts: vec![why.clone()], ..Message::text(id, Outcome::NodeLost, String::new()) });
        self.queue.take_waiting().into_iter().map(end).collect()
    }

    /// Stage the wish to have these back. The last one first: as they come back, each goes ahead of those before it.
    fn recall(&mut self, node: PeerId, tasks: Vec<Attempt>) {
        for id in tasks.into_iter().rev() {
            self.ask(node, Ask::Recall, id);
        }
    }

    /// Stage a question about a task, whose answer is due from now on; [`State::flush`] must follow.
    fn ask(&mut self, node: PeerId, ask: Ask, id: Attempt) {
        if let Some(life) = self.lives.get_mut(&node) {
            life.ask(ask, id);
        }
        self.stage(node, |o| {
            o.control(match ask {
                Ask::Recall => Control::Recall(id),
                Ask::Cancel => Control::Cancel(id),
                Ask::Abort => Control::Abort(id),
            });
        });
    }

    /// A node answers a heartbeat; they are numbered by the microseconds of its session, of which it is now this one.
    fn pulse(&mut self, id: PeerId, nonce: u64, now: Duration) -> Result<(), SessionError> {
        self.expects(id, |life| life.pulse(nonce), "answered a heartbeat that it was not sent")?;
        let rtt = now.saturating_sub(Duration::from_micros(nonce));
        if let Some(node) = self.nodes.get_mut(id) {
            // The least of all, let rise slowly: a heartbeat behind a burst says nothing of the network.
            node.rtt = rtt.min(node.rtt.saturating_mul(2));
            self.queue.set_rtt(id, node.rtt);
        }
        Ok(())
    }

    /// A node sends something that it may not always send.
    fn expects(
        &mut self,
        node: PeerId,
        right: impl Fn(&mut Liveness) -> bool,
        what: &'static str,
    ) -> Result<(), SessionError> {
        let wrong = self.lives.get_mut(&node).is_some_and(|life| !right(life));
        if wrong { Err(SessionError::Unasked(what)) } else { Ok(()) }
    }

    /// A node gives a task back.
    fn returned(&mut self, node: PeerId, id: Attempt) -> Result<(), SessionError> {
        let Some(life) = self.lives.get_mut(&node) else { return Ok(()) };
        life.returned(&mut self.queue, node, id)
    }

    /// A node keeps a task.
    fn kept(&mut self, node: PeerId, id: Attempt) -> Result<(), SessionError> {
        let Some(life) = self.lives.get_mut(&node) else { return Ok(()) };
        if life.keeps(&mut self.queue, node, id)? {
            self.awaited.remove(&id.task);
        }
        Ok(())
    }

    /// Ask draining nodes again for what they have not ended: a task that was still on its way when it was asked for was
    /// not found there.
    fn recall_again(&mut self) {
        for id in 0..self.nodes.len() {
            if self.nodes.get(id).is_some_and(|n| matches!(n.state, NodeState::Draining(_))) {
                let tasks = self.queue.recall_all(id);
                self.recall(id, tasks);
            }
        }
    }

    /// Tell whoever waits for it that a task was dropped; false if nobody does.
    fn was_awaited(&mut self, id: Attempt) -> bool {
        self.awaited.get_mut(&id.task).is_some_and(|dropped| {
            *dropped = true;
            true
        })
    }

    /// The ends of cancelled tasks that came back unstarted, but for those that somebody waits for.
    fn take_cancelled(&mut self) -> Vec<(Option<PeerId>, Message)> {
        let mut ids = self.queue.take_cancelled();
        ids.retain(|id| !self.was_awaited(*id));
        ids.into_iter().map(|id| (None, Message::cancelled(id))).collect()
    }

    /// Why a node takes no task.
    fn why_not(&self, node: PeerId) -> String {
        match self.nodes.get(node) {
            Some(Node { name, state: NodeState::Lost(why), .. }) => format!("node {name} was lost: {why}"),
            Some(Node { name, .. }) => format!("node {name} is not ready"),
            None => format!("there is no node {node}"),
        }
    }

    /// The end of a task for whose result there is no memory here.
    fn no_memory(&self, node: PeerId, task: Attempt, size: usize) -> Message {
        let name = self.nodes.get(node).map_or("", |n| &n.name);
        let text = format!(
            "node {name}: the task has ended, but this process has no memory for its result of {size} bytes: free memory, \
             raise the limit (ulimit -v), or return less"
        );
        Message::text(task, Outcome::Crashed, text)
    }

    fn stage(&mut self, node: PeerId, add: impl FnOnce(&mut Outbox)) {
        if let Some(peer) = self.nodes.get(node) {
            peer.link.stage(add);
            self.staged.insert(node);
        }
    }

    /// Stage what can be sent now; [`State::flush`] must follow.
    fn pump(&mut self) {
        while let Some((node, message)) = self.queue.assign() {
            self.stage(node, |o| o.message(Body::Task, message));
        }
        if self.nodes.len() > 1 {
            let now = Instant::now();
            while let Some((node, id)) = self.queue.steal(now) {
                self.ask(node, Ask::Recall, id);
            }
        }
    }

    /// Wake the senders of what was staged.
    fn flush(&mut self) {
        self.corked = 0;
        while let Some(node) = self.staged.pop_first() {
            if let Some(node) = self.nodes.get(node) {
                node.link.flush();
            }
        }
    }

    /// Thank nodes for results; [`State::flush`] must follow.
    fn acknowledge(&mut self, taken: impl IntoIterator<Item = (PeerId, Attempt)>) {
        for (node, id) in taken {
            self.stage(node, |o| o.acknowledge([id]));
        }
    }

    /// Whether what the calling thread just submitted may wait for what it submits next: it takes from that lane.
    fn may_cork(&mut self, lane: u64) -> bool {
        let Some((settler, last)) = self.settlers.get_mut(&lane) else { return false };
        if *settler != std::thread::current().id() {
            return false;
        }
        let now = Instant::now();
        let pause = now.saturating_duration_since(*last);
        *last = now;
        self.corked += 1;
        let most = (self.queue.len() / CORK_SHARE).min(CORK);
        self.corked < most && pause < CORK_PAUSE
    }
}

impl Shared {
    async fn housekeeping(self: &Arc<Self>) {
        let mut tick = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                () = self.close.notified() => break,
                _ = tick.tick() => {
                    let stuck = self.stuck();
                    let mut state = lock(&self.state);
                    state.acknowledge(stuck);
                    state.recall_again();
                    state.pump();
                    state.flush();
                    // A node may drain for longer than one can hope.
                    let ended = state.end_if_hopeless();
                    drop(state);
                    self.finish(ended);
                }
            }
        }
        // The nodes' tasks end by themselves when their goodbye is sent.
        let until = Instant::now() + LAST_WORDS;
        let busy = |n: &Node| matches!(n.state, NodeState::Connecting | NodeState::Ready | NodeState::Draining(_));
        while lock(&self.state).nodes.iter().any(busy) && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// One node, from the first byte to the last.
    async fn serve(&self, id: PeerId, spec: NodeSpec, link: Arc<FrameSender>) -> Result<(), NodeError> {
        let bound = spec.ready_timeout;
        let by = Instant::now() + bound;
        let stream = tokio::time::timeout(bound, spec.connection.exec(&spec.command)).await;
        let stream = stream.map_err(|_| SessionError::NotReady(bound.as_secs()))??;
        let (from, to) = tokio::io::split(stream);
        let greeting = hello(&spec.hello)?;
        link.send(|o| o.control(greeting));
        let sending = link.run(to, Some(PEER_TIMEOUT));
        tokio::pin!(sending);
        let mut source = EventReader::new(from, self.max_message.max(LEAST_MESSAGE));
        let mut events = Vec::new();
        let body = tokio::select! {
            body = source.greeting(&mut events) => match body {
                Ok(body) => body,
                Err(why) => return Err(why_not_started(&spec, why).await),
            },
            sent = &mut sending => return Ok(sent?),
            () = tokio::time::sleep(bound) => return Err(SessionError::NotReady(bound.as_secs()).into()),
        };
        {
            let mut state = lock(&self.state);
            if let Some(node) = state.nodes.get_mut(id) {
                let hello: AgentHello = read_hello(&body)?;
                node.asked = spec.hello.worker.concurrency.unwrap_or(hello.cores.min(MAX_CORES)).max(1);
                node.hello = Some(hello);
            }
        }
        let started = Instant::now();
        let timed = spec.hello.worker.task_timeout_ms.is_some();
        let every = {
            let mut state = lock(&self.state);
            let life = Liveness::new(state.timing, Duration::from_millis(spec.hello.lease_ms));
            let every = life.every();
            state.lives.insert(id, life);
            every
        };
        let mut heartbeat = tokio::time::interval(every);
        // Silence is counted in heartbeats, not by the clock: a client that was stopped itself hears first what came
        // meanwhile.
        let mut silent = Duration::ZERO;
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut said_goodbye = false;
        loop {
            self.on_node(id, &link, &mut events, started, timed)?;
            tokio::select! {
                read = source.read_admitted(&mut events, |offer| self.admit(id, offer)) => {
                    if let Err(why) = read {
                        // Results that came before the nonsense count.
                        self.on_node(id, &link, &mut events, started, timed)?;
                        return Err(why.into());
                    }
                    silent = Duration::ZERO;
                }
                // Not the end: what tasks wrote is still to come, and then the node's own goodbye.
                sent = &mut sending, if !said_goodbye => {
                    sent?;
                    said_goodbye = true;
                }
                _ = heartbeat.tick() => {
                    if silent > PEER_TIMEOUT {
                        return Err(SessionError::Silent(PEER_TIMEOUT.as_secs()).into());
                    }
                    silent += every;
                    let unready = lock(&self.state).nodes.get(id).is_some_and(|n| n.slots == 0);
                    if unready && Instant::now() > by {
                        return Err(SessionError::NotReady(bound.as_secs()).into());
                    }
                    let nonce = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
                    self.beat(id, &link, source.results(), Control::Heartbeat { nonce, lease_ms: spec.hello.lease_ms })?;
                }
            }
        }
    }

    /// Whether a message of a node is to be stored, now that its first chunk is here: only results that it owes are.
    fn admit(&self, from: PeerId, offer: &Offer) -> Result<bool, FrameError> {
        let len = offer.unfinished.saturating_add(offer.size);
        match offer.body {
            Body::Task => Err(FrameError::BadSequence("a task from a node")),
            Body::Note => lock(&self.notes).has_credit(from, offer.unfinished, offer.size).map(|()| true),
            // Late or doubled: counted and acknowledged at its end.
            Body::Result if !lock(&self.state).queue.holds(from, offer.id) => Ok(false),
            Body::Result if offer.unfinished > 0 && len > CREDIT => {
                Err(FrameError::TooLong { what: "unfinished results", len, cap: CREDIT })
            }
            Body::Result => Ok(true),
        }
    }

    /// Send the next heartbeat to a node that did in time what it was to do.
    fn beat(&self, id: PeerId, link: &FrameSender, results: u64, heartbeat: Control) -> Result<(), SessionError> {
        let mut guard = lock(&self.state);
        let State { lives, queue, .. } = &mut *guard;
        if let (Some(life), Control::Heartbeat { nonce, .. }) = (lives.get_mut(&id), &heartbeat) {
            let oldest = queue.oldest(id).map(|(number, nanos)| (number, Duration::from_nanos(nanos)));
            life.check(oldest, link.is_busy(), results, |attempt, ask| match ask {
                Ask::Recall => queue.is_asked_back(id, attempt),
                Ask::Cancel | Ask::Abort => queue.is_to_drop(id, attempt),
            })?;
            life.beat(*nonce);
        }
        // Under the lock: what is asked from now on comes after it.
        link.send(|o| o.control(heartbeat));
        Ok(())
    }

    fn on_node(
        &self,
        id: PeerId,
        link: &FrameSender,
        events: &mut Vec<Event>,
        started: Instant,
        timed: bool,
    ) -> Result<(), SessionError> {
        if events.is_empty() {
            return Ok(());
        }
        let mut done = Vec::new();
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let now = Instant::now();
        let awaited = !state.awaited.is_empty();
        // What came before a frame that ends the session counts.
        let mut end = Ok(());
        let mut helped = false;
        for event in events.drain(..) {
            if end.is_err() {
                break;
            }
            match event {
                Event::Message(Body::Result, result) => {
                    if let Err(why) = may_end(&state.queue, id, &result, timed) {
                        end = Err(why);
                        continue;
                    }
                    // A machine that shuts down ends its workers, perhaps before its agent: no fault of the task's.
                    let doomed = || matches!(state.nodes.get(id).map(|n| &n.state), Some(NodeState::Draining(_)));
                    if result.code == Outcome::Crashed as u8 && doomed() && state.queue.returned(id, result.id) {
                        link.send(|o| o.acknowledge([result.id]));
                    } else if state.queue.done(id, result.id, now) {
                        helped = true;
                        if result.code == Outcome::Cancelled as u8 && state.was_awaited(result.id) {
                            link.send(|o| o.acknowledge([result.id]));
                        } else {
                            done.push((Some(id), result));
                        }
                    } else {
                        state.stale += 1;
                        if let Some(life) = state.lives.get_mut(&id) {
                            life.stale(result.cost());
                        }
                        link.send(|o| o.acknowledge([result.id]));
                    }
                }
                Event::NoMemory(Body::Result, result, size) if state.queue.done(id, result, now) => {
                    helped = true;
                    done.push((Some(id), state.no_memory(id, result, size)));
                }
                Event::Skipped(Body::Result, result) | Event::NoMemory(Body::Result, result, _) => {
                    state.stale += 1;
                    link.send(|o| o.acknowledge([result]));
                }
                Event::Message(Body::Note, note) => {
                    end = lock(&self.notes).add(id, note).map_err(SessionError::from);
                    self.some_notes.notify_one();
                }
                Event::NoMemory(Body::Note, note, size) => {
                    let error = Bytes::from(format!("the client has no memory for a message of {size} bytes"));
                    link.send(|o| o.control(Control::NoteAnswer { note: note.task, error }));
                }
                Event::Control(Control::GivenBack(task)) => end = state.returned(id, task),
                Event::Control(Control::RecallRefused(task)) => end = state.kept(id, task),
                Event::Control(Control::Output { stream, text }) => {
                    if let Some(node) = state.nodes.get(id) {
                        self.print(&node.name, stream, text);
                    }
                }
                Event::Control(Control::Pulse { nonce }) => end = state.pulse(id, nonce, now - started),
                Event::Control(Control::Ready { slots }) => end = self.on_ready(state, id, slots, now),
                Event::Control(Control::Drain(why)) => {
                    end = state.expects(id, Liveness::drains, "said twice that it will soon be gone");
                    if let Some(node) = state.nodes.get_mut(id)
                        && matches!(node.state, NodeState::Connecting | NodeState::Ready)
                    {
                        node.state = NodeState::Draining(text::lines(why, text::LIMIT));
                        node.drained = Some(now);
                        let tasks = state.queue.close_peer(id);
                        state.recall(id, tasks);
                        self.changed.notify_all();
                    }
                }
                Event::Control(Control::Goodbye(why)) => {
                    end = Err(SessionError::Goodbye(text::lines(why, text::LIMIT)));
                }
                Event::Control(Control::Heartbeat { .. }) => {
                    end = state.expects(id, Liveness::heartbeat, "sent more heartbeats than it has time for");
                }
                Event::Skipped(..) | Event::NoMemory(..) => {}
                Event::Control(_) | Event::Message(..) => end = Err(SessionError::Unasked("sent what a client sends")),
            }
        }
        if helped && let Some(life) = state.lives.get_mut(&id) {
            life.helped();
        }
        done.extend(state.take_cancelled());
        state.pump();
        state.flush();
        if awaited {
            self.changed.notify_all();
        }
        drop(guard);
        self.finish(done);
        end
    }

    /// A node offers slots: as many as were asked for, or fewer if its workers could not all be started. One that offers
    /// none or more is broken, and its count could be anything.
    fn on_ready(&self, state: &mut State, id: PeerId, offered: u64, now: Instant) -> Result<(), SessionError> {
        let Some(node) = state.nodes.get_mut(id) else { return Ok(()) };
        let asked = node.asked;
        let slots = usize::try_from(offered).unwrap_or(usize::MAX);
        if !(1..=asked).contains(&slots) {
            return Err(SessionError::Slots { offered, asked });
        }
        if node.slots > 0 {
            return Err(SessionError::Unasked("became ready twice"));
        }
        if matches!(node.state, NodeState::Connecting | NodeState::Draining(_)) {
            node.slots = slots;
            state.lives.entry(id).and_modify(Liveness::ready);
            state.queue.add_peer(id, slots, now);
            if node.state == NodeState::Connecting {
                node.state = NodeState::Ready;
            } else {
                state.queue.close_peer(id);
            }
            self.changed.notify_all();
        }
        Ok(())
    }

    fn print(&self, node: &str, stream: u64, text: Bytes) {
        let from = (node.to_owned(), stream);
        let piece = if stream == LEFT_OUT {
            let number = str::from_utf8(&text).ok().and_then(|text| text.parse().ok());
            Piece { from, text: Bytes::new(), left_out: number.unwrap_or_default() }
        } else {
            Piece { from, text, left_out: 0 }
        };
        let mut output = lock(&self.output);
        let was_empty = output.waiting.is_empty();
        output.waiting.push(piece);
        // Whoever takes it waits only if there was none; and a flood of empty pieces wakes nobody.
        if was_empty && !output.waiting.is_empty() {
            self.some_output.notify_one();
        }
    }

    fn node_ended(&self, id: PeerId, end: Result<(), NodeError>) {
        // Nobody is left to hear the answers.
        lock(&self.notes).unanswered.remove(&id);
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let Some(node) = state.nodes.get_mut(id) else { return };
        let name = node.name.clone();
        state.lives.remove(&id);
        // What was not sent is not kept.
        node.link.send(|o| o.close("the node was lost"));
        let notice = if let NodeState::Draining(why) = &node.state { Some(why.clone()) } else { None };
        node.state = match (end, &notice) {
            (Ok(()), _) => NodeState::Closed,
            (Err(_), _) if state.closing => NodeState::Closed,
            (Err(e), None) => NodeState::Lost(e.to_string()),
            (Err(e), Some(notice)) => NodeState::Lost(format!("{e} (it was draining: {notice})")),
        };
        let why = if let NodeState::Lost(why) = &node.state { why } else { "closed" };
        // Shared by all its tasks.
        let why = Bytes::from(format!("node {name} was lost: {why}"));
        let mut lost = Vec::new();
        for task in state.queue.remove_peer(id).into_iter().rev() {
            // A loss that was announced is not held against the task.
            let again =
                if notice.is_some() { state.queue.requeue(task) } else { state.queue.retry(task, state.attempts) };
            if !again && let Some(message) = state.queue.remove(task) {
                let end = Message::text(message.id, Outcome::NodeLost, String::new());
                lost.push((None, Message { parts: vec![why.clone()], ..end }));
            }
        }
        lost.extend(state.end_if_hopeless());
        lost.extend(state.take_cancelled());
        state.pump();
        state.flush();
        self.changed.notify_all();
        drop(guard);
        self.finish(lost);
    }

    /// Hand out ends of tasks. False if nobody will take one of them any more.
    fn finish(&self, messages: impl IntoIterator<Item = (Option<PeerId>, Message)>) -> bool {
        let mut finished = lock(&self.finished);
        let mut all = true;
        for message in messages {
            match finished.lanes.get_mut(&(message.1.id.task >> QUEUE_SHIFT)) {
                Some(lane) if !lane.over => {
                    if lane.messages.is_empty() {
                        lane.some.notify_one();
                    }
                    lane.messages.push(message);
                }
                _ => all = false,
            }
        }
        all
    }

    /// The results that nobody took for a tick or more. Were they not thanked for, the nodes' credit could be used up by
    /// a lane whose thread waits for a result of another.
    fn stuck(&self) -> Vec<(PeerId, Attempt)> {
        let mut stuck = Vec::new();
        for lane in lock(&self.finished).lanes.values_mut() {
            if std::mem::replace(&mut lane.stuck, !lane.messages.is_empty()) {
                stuck.extend(lane.messages.iter_mut().filter_map(|(from, message)| Some((from.take()?, message.id))));
            }
        }
        stuck
    }
}

/// Say why an agent ended before it said a word. Its standard error is not followed, so it is started once more, without
/// anything to read: what kept it from starting does so again.
async fn why_not_started(spec: &NodeSpec, why: SessionError) -> NodeError {
    if !matches!(why, SessionError::Ended(_)) {
        return why.into();
    }
    match tokio::time::timeout(AGAIN, spec.connection.run(&spec.command, Bytes::new())).await {
        Ok(Ok(output)) if output.status.is_some_and(|status| status != 0) && !output.stderr.is_empty() => {
            let (status, agent) = (output.status.unwrap_or_default(), shown(&spec.command));
            let printed = text::lines(output.stderr.trim_ascii(), text::LIMIT);
            NodeError::Other(format!(
                "{why}. Its agent does not start: `{agent}` ended with status {status}: {printed}"
            ))
        }
        _ => why.into(),
    }
}
