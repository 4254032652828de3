//! The client's decider, with callers who do anything in any order and nodes that send anything.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use skyward_lite::client::dispatch::{Action, Dispatch};
use skyward_lite::error::{FrameError, NodeError, SessionError};
use skyward_lite::queue::{Cancelled, PeerId};
use skyward_lite::timing::{NOTE_CREDIT, Timing};
use skyward_lite::wire::{AgentHello, Attempt, BlobPart, Content, Control, Event, Message, Outcome, hello, read_hello};

use super::forge::{self, Known, Stream};
use super::script::Script;
use crate::support::{agent_hello, client_hello};

const ATTEMPTS: u16 = 3;
const MAX_MESSAGE: usize = 1 << 20;
const MAX_NODES: usize = 6;
/// A run has no more tasks than this: each step looks at all of them.
const MAX_TASKS: u64 = 256;
const SLOTS: usize = 4;
/// Ready, pulses, results, notes, answers about tasks, output, notices, lost blobs.
const KINDS: &[u8] = &[2, 4, 4, 9, 10, 12, 12, 12, 12, 14, 15, 16, 16, 21, 3];

struct Node {
    stream: Stream,
    is_alive: bool,
    /// Its connection is cut, and the session may go on.
    is_away: bool,
    /// The heartbeats that it has not answered.
    beats: VecDeque<u64>,
    /// The sender and the memory of each of its notes that was not answered, by number.
    notes: HashMap<u64, (u64, usize)>,
    /// The tasks that it was sent, and those that it was asked about.
    sent: Vec<Attempt>,
    asked: HashSet<Attempt>,
}

struct World {
    dispatch: Dispatch,
    now: Instant,
    out: Vec<Action>,
    nodes: Vec<Node>,
    tasks: u64,
    /// The tasks that are for one node.
    pinned: BTreeSet<u64>,
    /// The tasks that have ended, each once.
    ended: BTreeSet<u64>,
    /// To which node each task was sent last.
    places: HashMap<Attempt, PeerId>,
    /// Results that the callers have not taken.
    untaken: Vec<(PeerId, Attempt)>,
    /// Tasks whose caller waits in `cancel`.
    cancelling: BTreeSet<u64>,
    /// The numbers of all transfers of blobs.
    blobs: HashSet<u64>,
    is_closed: bool,
}

/// Let a script happen.
///
/// # Panics
/// If the decider breaks a promise.
pub fn run(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let mut world = World {
        dispatch: Dispatch::new(ATTEMPTS, Timing { heartbeat: Duration::from_millis(50), ..Timing::DEFAULT }),
        now: Instant::now(),
        out: Vec::new(),
        nodes: Vec::new(),
        tasks: 0,
        pinned: BTreeSet::new(),
        ended: BTreeSet::new(),
        places: HashMap::new(),
        untaken: Vec::new(),
        cancelling: BTreeSet::new(),
        blobs: HashSet::new(),
        is_closed: false,
    };
    while !script.is_over() {
        world.step(&mut script);
    }
    world.close();
    world.cancelling.clone().into_iter().for_each(|task| world.stop_waiting(task));
    assert_eq!(world.ended.len() as u64, world.tasks, "a task has no end");
}

impl Node {
    fn new(script: &mut Script<'_>) -> Self {
        Self {
            stream: Stream::new(MAX_MESSAGE, script),
            is_alive: false,
            is_away: false,
            beats: VecDeque::new(),
            notes: HashMap::new(),
            sent: Vec::new(),
            asked: HashSet::new(),
        }
    }
}

impl World {
    /// Carry out what the decider wants, and look at it.
    fn act(&mut self) {
        for action in std::mem::take(&mut self.out) {
            match action {
                Action::Send(node, task) => {
                    assert!(self.nodes[node].is_alive && self.nodes[node].stream.greeted, "a task for a lost node");
                    assert!(!self.ended.contains(&task.id.task) && task.id.attempt < ATTEMPTS);
                    let waits = !self.nodes[node].is_away || self.pinned.contains(&task.id.task);
                    assert!(waits, "a node that is away was sent a task");
                    self.places.insert(task.id, node);
                    self.nodes[node].sent.push(task.id);
                }
                Action::SendBlob(_, number, _) => assert!(self.blobs.insert(number), "a transfer's number came twice"),
                Action::Tell(node, Control::Heartbeat { nonce, .. }) => self.nodes[node].beats.push_back(nonce),
                Action::Tell(node, Control::Recall(id) | Control::Cancel(id) | Control::Abort(id)) => {
                    self.nodes[node].asked.insert(id);
                }
                Action::Complete(from, end) => {
                    assert!(self.ended.insert(end.id.task), "task {} ended twice", end.id.task);
                    if let Some(node) = from {
                        assert_eq!(self.places.get(&end.id), Some(&node), "a node ended what it did not have");
                        self.untaken.push((node, end.id));
                    }
                }
                Action::Note(sender, note) => {
                    let notes = &mut self.nodes[usize::try_from(sender & u64::from(u32::MAX)).unwrap()].notes;
                    assert!(notes.insert(note.id.task, (sender, note.cost())).is_none());
                    let bytes: usize = notes.values().map(|(_, cost)| *cost).sum();
                    assert!(notes.len() == 1 || bytes <= NOTE_CREDIT, "more notes than credit");
                }
                Action::Tell(..)
                | Action::Answer(..)
                | Action::Forget(..)
                | Action::Acknowledge(..)
                | Action::Goodbye(..)
                | Action::Wake(_)
                | Action::Print(..)
                | Action::Notify => {}
            }
        }
        assert!(self.dispatch.is_consistent(), "{:?}", self.dispatch);
    }

    fn add(&mut self, script: &mut Script<'_>) {
        if self.nodes.len() < MAX_NODES {
            let id = self.dispatch.add_node("n".to_owned(), script.rarely(2), self.now);
            self.nodes.push(Node::new(script));
            self.begin(id, script);
        }
    }

    /// Begin a session with a node, if it has none and may have one.
    fn begin(&mut self, id: PeerId, script: &mut Script<'_>) {
        if !self.nodes[id].is_alive && self.dispatch.begin(id, self.now) {
            self.nodes[id] = Node { is_alive: true, ..Node::new(script) };
            if !script.breaks(8) {
                self.nodes[id].stream.control(&hello(&agent_hello()).unwrap(), script);
                self.nodes[id].stream.control(&Control::Ready { slots: 1 + (script.below(SLOTS)) as u64 }, script);
                self.deliver(id, script);
            }
        }
    }

    fn submit(&mut self, script: &mut Script<'_>) {
        if self.tasks < MAX_TASKS {
            let id = Attempt { task: self.tasks, attempt: 0 };
            self.tasks += 1;
            let node = script.rarely(8).then(|| script.below(self.nodes.len() + 1));
            self.pinned.extend(node.map(|_| id.task));
            let part = |(place, content): (u16, u64)| {
                let bytes = Bytes::from(vec![0; 1 << (content % 16)]);
                let content = Arc::new(Content { id: content, bytes });
                BlobPart { place, number: 0, fresh: false, content: Some(content) }
            };
            let blobs =
                (0..script.below(6).saturating_sub(3)).map(|_| u64::from(script.byte() % 16)).collect::<Vec<_>>();
            let blobs = (0..).zip(blobs).map(part).collect();
            let task = Message { id, nanos: u64::from(script.byte() % 4) << 30, blobs, ..Message::default() };
            self.dispatch.submit(task, node, std::thread::current().id(), self.now, &mut self.out);
            self.act();
        }
    }

    /// Let what a node sent arrive.
    fn deliver(&mut self, id: PeerId, script: &mut Script<'_>) {
        if !self.nodes[id].is_alive || self.nodes[id].is_away {
            return;
        }
        self.nodes[id].stream.arrive(script);
        let end = loop {
            match self.receive(id) {
                Ok(true) => {}
                Ok(false) => return,
                Err(why) => break why,
            }
        };
        assert!(!end.to_string().is_empty());
        self.lose(id, end);
    }

    /// Handle the next events of a node. Return false if more bytes are needed.
    fn receive(&mut self, id: PeerId) -> Result<bool, SessionError> {
        let Self { dispatch, nodes, .. } = self;
        let stream = &mut nodes[id].stream;
        let mut events = if stream.greeted {
            stream.read(&mut |offer| dispatch.admit(id, offer))?
        } else {
            stream.read(&mut |_| Err(FrameError::BadSequence("a message before the hello")))?
        };
        if events.is_empty() {
            return Ok(false);
        }
        if !stream.greeted {
            let Some(Event::Control(Control::Hello(body))) = events.pop() else {
                return Err(SessionError::BadHello("none".to_owned()));
            };
            let agent: AgentHello = read_hello(&body)?;
            stream.greeted = true;
            let mut hello = client_hello(SLOTS, true);
            hello.worker.cache_bytes = Some(1 << 17);
            dispatch.greeted(id, &hello, agent, self.now);
            return Ok(true);
        }
        for event in &events {
            if let Event::Control(Control::Pulse { .. }) = event {
                nodes[id].beats.pop_front();
            }
        }
        // A decision costs no more memory than the events and the tasks that it is about.
        let most = 64 + 8 * events.len() + 8 * usize::try_from(self.tasks).unwrap_or_default();
        let end = dispatch.received(id, &mut events, self.now, &mut self.out);
        assert!(self.out.len() <= most, "{} actions", self.out.len());
        self.act();
        end.map(|()| true)
    }

    fn lose(&mut self, id: PeerId, why: SessionError) {
        let node = &mut self.nodes[id];
        if std::mem::replace(&mut node.is_alive, false) {
            node.is_away = false;
            node.notes.clear();
            self.dispatch.lost(id, Err(NodeError::Session(why)), self.now, &mut self.out);
            self.act();
        }
    }

    /// Cut the connection to a node, or let the session go on.
    fn cut(&mut self, id: PeerId) {
        let node = &mut self.nodes[id];
        if !node.is_alive || !node.stream.greeted {
            return;
        }
        node.is_away = !node.is_away;
        if node.is_away {
            self.dispatch.away(id, &SessionError::Silent(10), self.now, &mut self.out);
        } else {
            self.dispatch.back(id, self.now, &mut self.out);
        }
        self.act();
    }

    fn stop_waiting(&mut self, task: u64) {
        if self.cancelling.remove(&task) && self.dispatch.cancel_answer(task) {
            assert!(self.ended.insert(task), "task {task} was dropped after its end");
        }
    }

    fn close(&mut self) {
        self.is_closed = true;
        self.dispatch.close(self.now, &mut self.out);
        self.act();
    }

    fn forge(&mut self, id: PeerId, script: &mut Script<'_>) {
        let node = &mut self.nodes[id];
        let recent = node.sent.len().saturating_sub(16);
        let numbers = node.beats.iter().take(1).copied().chain([1, 2, 3, 4]).collect();
        let known = Known { ids: node.sent[recent..].to_vec(), numbers, kinds: KINDS };
        let raw = forge::frames(&known, script);
        node.stream.send(&raw, script);
    }

    /// A node does what an honest one does: it ends a task that it has.
    fn end_a_task(&mut self, id: PeerId, script: &mut Script<'_>) {
        let node = &mut self.nodes[id];
        let Some(task) = script.pick(&node.sent[node.sent.len().saturating_sub(16)..]) else { return };
        let raw = match script.byte() % 8 {
            0 => forge::result(task, Outcome::Crashed, script.below(64)),
            1 => forge::result(task, Outcome::Cancelled, 0),
            // An answer, if one is owed.
            2 if node.asked.contains(&task) => forge::controls([Control::GivenBack(task)]),
            3 if node.asked.contains(&task) => forge::controls([Control::RecallRefused(task)]),
            4 => forge::controls(node.beats.front().map(|nonce| Control::Pulse { nonce: *nonce })),
            _ => forge::result(task, Outcome::Returned, script.below(64)),
        };
        node.stream.send(&raw, script);
    }

    fn step(&mut self, script: &mut Script<'_>) {
        let step = script.byte();
        if self.nodes.is_empty() {
            self.add(script);
            return;
        }
        let id = script.below(self.nodes.len());
        let task = script.below(usize::try_from(self.tasks).unwrap_or_default()) as u64;
        match step % 32 {
            0..6 => self.submit(script),
            6..12 if script.breaks(2) => {
                self.forge(id, script);
                self.deliver(id, script);
            }
            6..16 => {
                self.end_a_task(id, script);
                self.deliver(id, script);
            }
            17 => self.deliver(id, script),
            18 if script.rarely(2) => self.add(script),
            18 => self.begin(id, script),
            19 => {
                let wait = script.rarely(2);
                match self.dispatch.cancel(task, wait, &mut self.out) {
                    Cancelled::Dropped => assert!(self.ended.insert(task)),
                    Cancelled::Held(_) if wait => drop(self.cancelling.insert(task)),
                    Cancelled::Held(_) | Cancelled::Unknown => {}
                }
                self.act();
            }
            20 if script.rarely(2) => self.stop_waiting(task),
            20 | 16 => self.cut(id),
            21 => {
                self.dispatch.abort(task, &mut self.out);
                self.act();
            }
            22 | 23 => {
                let taken = std::mem::take(&mut self.untaken);
                self.dispatch.taken(0, std::thread::current().id(), taken, self.now, &mut self.out);
                self.act();
            }
            24 => {
                let known = self.nodes[id].notes.iter().next().map(|(note, (sender, _))| (*note, *sender));
                let (note, sender) = known.unwrap_or((u64::from(script.byte()), script.u64()));
                self.nodes[id].notes.remove(&note);
                if script.rarely(2) {
                    self.dispatch.answer_request(sender, note, Bytes::new(), &mut self.out);
                } else {
                    self.dispatch.answer_note(sender, note, Bytes::new(), &mut self.out);
                }
                self.act();
            }
            25 => {
                self.dispatch.tick([], self.now, &mut self.out);
                self.act();
            }
            26 | 27 => {
                if self.nodes[id].is_alive
                    && !self.nodes[id].is_away
                    && let Err(why) = self.dispatch.beat(id, script.rarely(8), 0, self.now, &mut self.out)
                {
                    self.lose(id, why);
                }
                self.act();
            }
            28 if script.rarely(4) => {
                self.dispatch.give_up(id, self.now, &mut self.out);
                self.act();
            }
            28 => {
                self.dispatch.expect(script.below(3), self.now, &mut self.out);
                self.act();
            }
            29 if script.breaks(16) => self.close(),
            30 if script.rarely(4) => self.lose(id, SessionError::Silent(10)),
            _ => self.now += Duration::from_millis(u64::from(script.byte()) << (script.byte() % 6)),
        }
    }
}
