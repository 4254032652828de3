//! The client's decider and honest nodes, in random orders: recalls, cancels, aborts, crashes, drains, late answers and
//! lost nodes. Every task has exactly one end, and no node is lost for what it did.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proptest::prelude::*;
use skyward_lite::client::dispatch::{Action, Dispatch};
use skyward_lite::error::{NodeError, SessionError};
use skyward_lite::queue::{Cancelled, PeerId};
use skyward_lite::timing::Timing;
use skyward_lite::wire::{Attempt, BlobPart, Body, Content, Control, Event, Message, Outcome};

#[path = "support/hello.rs"]
mod support;
use support::{agent_hello, client_hello};

const TIMING: Timing = Timing {
    heartbeat: Duration::from_secs(2),
    answer: Duration::from_secs(20),
    drain: Duration::from_secs(600),
    ..Timing::DEFAULT
};
/// Heartbeats within which an honest agent has the answer of its worker: fewer than are in the bound on an answer.
const PATIENCE: u64 = 5;
/// Attempts that a task has.
const ATTEMPTS: u16 = 3;
/// Nodes that are there at once, at most.
const NODES: usize = 4;
/// Bytes of shared data that a node keeps, and of each blob.
const BUDGET: u64 = 1000;
const BLOB: usize = 400;

/// An honest agent with the way to it and back: control frames keep their order, and overtake tasks.
#[derive(Default)]
struct Agent {
    told: VecDeque<Control>,
    arriving: VecDeque<Attempt>,
    said: VecDeque<Event>,
    waiting: Vec<Attempt>,
    running: Vec<Attempt>,
    cancelled_in_advance: HashSet<Attempt>,
    /// Tasks about which the agent asked the worker that has them, and in which heartbeat: the worker answers once.
    owed: BTreeMap<(u64, u16), u64>,
    dropped: HashSet<Attempt>,
    aborted: HashSet<Attempt>,
    /// Results that the client has not acknowledged.
    unacknowledged: Vec<Attempt>,
    beats: u64,
    notes: u64,
    /// It told the client that it will soon be gone.
    is_draining: bool,
    /// The client has heard of it.
    was_heard: bool,
    /// The tasks that the client takes for being here.
    held: HashSet<Attempt>,
    /// The blobs that it was sent and not told to forget, by number, and their contents.
    blobs: BTreeMap<u64, Bytes>,
    /// The blobs that each task names which it was sent.
    named: HashMap<Attempt, Vec<u64>>,
}

fn key(id: Attempt) -> (u64, u16) {
    (id.task, id.attempt)
}

fn message(id: Attempt, code: u8) -> Message {
    Message { id, code, ..Message::default() }
}

/// The blobs of a task: of two tasks in three, one or two of nine contents.
fn blobs(task: u64) -> Vec<BlobPart> {
    let contents: &[u64] = match task % 3 {
        0 => &[],
        1 => &[task % 4],
        _ => &[task % 4, 4 + task % 5],
    };
    let part = |(place, id): (u16, &u64)| {
        let content = Content { id: *id, bytes: Bytes::from(vec![u8::try_from(*id).unwrap(); BLOB]) };
        BlobPart { place, number: 0, fresh: false, content: Some(Arc::new(content)) }
    };
    (1..).zip(contents).map(part).collect()
}

impl Agent {
    fn end(&mut self, id: Attempt, code: Outcome) {
        self.waiting.retain(|one| *one != id);
        self.running.retain(|one| *one != id);
        self.owed.remove(&key(id));
        self.unacknowledged.push(id);
        self.said.push_back(Event::Message(Body::Result, message(id, code as u8)));
    }

    fn say(&mut self, control: Control) {
        self.said.push_back(Event::Control(control));
    }

    /// Read a control frame. `near`: a task that waits is at the agent, not in a worker.
    fn hear(&mut self, near: bool) {
        match self.told.pop_front() {
            Some(Control::Heartbeat { nonce, .. }) => {
                self.beats += 1;
                self.say(Control::Pulse { nonce });
                let late = |since: &u64| since + PATIENCE < self.beats;
                let late: Vec<_> = self.owed.iter().filter(|(_, since)| late(since)).map(|(id, _)| *id).collect();
                for (task, attempt) in late {
                    self.answer(Attempt { task, attempt });
                }
                let aborting: Vec<_> = self.aborted.iter().filter(|id| self.running.contains(id)).copied().collect();
                for id in aborting {
                    self.end(id, Outcome::Cancelled);
                }
            }
            Some(Control::Recall(id)) => {
                let waits = self.waiting.contains(&id);
                if waits && near {
                    self.waiting.retain(|one| *one != id);
                    self.owed.remove(&key(id));
                    self.say(Control::GivenBack(id));
                } else if waits || self.running.contains(&id) {
                    self.owed.insert(key(id), self.beats);
                } else {
                    self.say(Control::RecallRefused(id));
                }
            }
            Some(Control::Cancel(id)) => self.drop_task(id, near, false),
            Some(Control::Abort(id)) => self.drop_task(id, near, true),
            _ => {}
        }
    }

    fn drop_task(&mut self, id: Attempt, near: bool, abort: bool) {
        let waits = self.waiting.contains(&id);
        if waits && near {
            self.end(id, Outcome::Cancelled);
        } else if waits || self.running.contains(&id) {
            self.dropped.insert(id);
            if abort {
                self.aborted.insert(id);
            }
            if !abort || waits {
                self.owed.insert(key(id), self.beats);
            }
        } else {
            self.cancelled_in_advance.insert(id);
        }
    }

    /// The worker that has a task answers.
    fn answer(&mut self, id: Attempt) {
        if self.owed.remove(&key(id)).is_none() {
            return;
        }
        if self.running.contains(&id) {
            if !self.aborted.contains(&id) {
                self.dropped.remove(&id);
            }
            self.say(Control::RecallRefused(id));
        } else if self.dropped.contains(&id) {
            self.end(id, Outcome::Cancelled);
        } else {
            self.waiting.retain(|one| *one != id);
            self.say(Control::GivenBack(id));
        }
    }

    fn arrive(&mut self) {
        let Some(id) = self.arriving.pop_front() else { return };
        if self.cancelled_in_advance.remove(&id) {
            self.end(id, Outcome::Cancelled);
        } else {
            self.waiting.push(id);
        }
    }
}

/// The decider, the nodes that it has, and what is to be true of its actions.
struct Client {
    dispatch: Dispatch,
    out: Vec<Action>,
    agents: BTreeMap<PeerId, Agent>,
    now: Instant,
    tasks: u64,
    /// The tasks that have ended.
    ended: BTreeSet<u64>,
    pinned: BTreeSet<u64>,
    /// Of each task: the nodes that were lost with it without having announced it.
    losses: BTreeMap<u64, u16>,
    /// Tasks whose caller waits in `cancel`.
    cancelling: BTreeSet<u64>,
    /// Results that the caller has not taken yet.
    untaken: Vec<(PeerId, Attempt)>,
    notes: Vec<(u64, u64)>,
    /// Nodes for which there are frames, and which were not woken since.
    asleep: BTreeSet<PeerId>,
    /// The numbers of all transfers of blobs.
    blobs: HashSet<u64>,
}

impl Client {
    fn new(now: Instant) -> Self {
        Self {
            dispatch: Dispatch::new(ATTEMPTS, TIMING),
            out: Vec::new(),
            agents: BTreeMap::new(),
            now,
            tasks: 0,
            ended: BTreeSet::new(),
            pinned: BTreeSet::new(),
            losses: BTreeMap::new(),
            cancelling: BTreeSet::new(),
            untaken: Vec::new(),
            notes: Vec::new(),
            asleep: BTreeSet::new(),
            blobs: HashSet::new(),
        }
    }

    /// Carry out what the decider wants.
    fn act(&mut self) {
        let mut left = Vec::new();
        for action in std::mem::take(&mut self.out) {
            match action {
                Action::Send(node, task) => {
                    self.asleep.insert(node);
                    let losses = self.losses.get(&task.id.task).copied().unwrap_or_default();
                    assert_eq!(task.id.attempt, losses, "an attempt was counted that no node was lost with");
                    let agent = self.agents.get_mut(&node).expect("a lost node was sent a task");
                    assert!(!agent.was_heard || self.pinned.contains(&task.id.task), "a draining node was sent a task");
                    agent.arriving.push_back(task.id);
                    for blob in &task.blobs {
                        let sent = agent.blobs.get(&blob.number).expect("a task overtook the decision on its blob");
                        assert_eq!(*sent, blob.content.as_ref().unwrap().bytes);
                    }
                    agent.named.insert(task.id, task.blobs.iter().map(|blob| blob.number).collect());
                    assert!(agent.held.insert(task.id), "a node was sent a task twice");
                }
                Action::SendBlob(node, number, bytes) => {
                    assert!(self.blobs.insert(number), "the number of a transfer was used twice");
                    let agent = self.agents.get_mut(&node).expect("a lost node was sent a blob");
                    assert!(agent.blobs.values().all(|there| *there != bytes), "a node was sent what it has");
                    agent.blobs.insert(number, bytes);
                }
                Action::Forget(node, numbers) => {
                    self.asleep.insert(node);
                    let agent = self.agents.get_mut(&node).expect("a lost node was told to forget a blob");
                    for number in numbers {
                        assert!(agent.blobs.remove(&number).is_some(), "a blob was forgotten twice");
                        let is_named = |task| agent.named.get(task).is_some_and(|named| named.contains(&number));
                        assert!(!agent.held.iter().any(is_named), "a blob was forgotten that a task names");
                    }
                }
                Action::Tell(node, control) => {
                    self.asleep.insert(node);
                    if let Some(agent) = self.agents.get_mut(&node) {
                        agent.told.push_back(control);
                    }
                }
                Action::Answer(node, answer) => {
                    self.asleep.insert(node);
                    let control = Control::NoteAnswer { note: answer.id.task, error: bytes::Bytes::new() };
                    self.agents.get_mut(&node).expect("a lost node was answered").told.push_back(control);
                }
                Action::Acknowledge(node, id) => {
                    self.asleep.insert(node);
                    if let Some(agent) = self.agents.get_mut(&node) {
                        let result = agent.unacknowledged.iter().position(|one| *one == id);
                        agent.unacknowledged.remove(result.expect("a result was acknowledged twice"));
                    }
                }
                Action::Goodbye(node, _) => {
                    // A node that is lost, or that is left because it drains and has no task.
                    if let Some(agent) = self.agents.get(&node) {
                        assert!(agent.was_heard && agent.held.is_empty(), "a node was left with tasks");
                        left.push(node);
                    }
                }
                Action::Wake(node) => drop(self.asleep.remove(&node)),
                Action::Complete(from, end) => {
                    let task = end.id.task;
                    assert!(self.ended.insert(task), "task {task} ended twice");
                    self.untaken.extend(from.map(|node| (node, end.id)));
                    let losses = self.losses.get(&task).copied().unwrap_or_default();
                    let to_blame = losses >= ATTEMPTS || self.pinned.contains(&task) || self.agents.is_empty();
                    assert!(end.code != Outcome::NodeLost as u8 || to_blame, "task {task} paid for another's loss");
                }
                Action::Note(from, note) => self.notes.push((from, note.id.task)),
                Action::Print(..) | Action::Notify => {}
            }
        }
        assert!(self.dispatch.is_consistent(), "{:?}", self.dispatch);
        for node in left {
            self.lose(node);
        }
    }

    fn add(&mut self, slots: usize) {
        let node = self.dispatch.add_node("n".to_owned(), false, self.now);
        assert!(self.dispatch.begin(node, self.now));
        let mut hello = client_hello(slots, true);
        hello.worker.cache_bytes = Some(BUDGET);
        self.dispatch.greeted(node, &hello, agent_hello(), self.now);
        self.agents.insert(node, Agent::default());
        let mut ready = vec![Event::Control(Control::Ready { slots: slots as u64 })];
        self.dispatch.received(node, &mut ready, self.now, &mut self.out).unwrap();
        self.act();
    }

    fn submit(&mut self, node: Option<PeerId>) {
        let id = Attempt { task: self.tasks, attempt: 0 };
        self.tasks += 1;
        if node.is_some() {
            self.pinned.insert(id.task);
        }
        let caller = std::thread::current().id();
        let task = Message { blobs: blobs(id.task), ..message(id, 0) };
        self.dispatch.submit(task, node, caller, self.now, &mut self.out);
        self.act();
    }

    /// Let the next events of a node arrive.
    fn receive(&mut self, node: PeerId, count: usize) -> Result<(), SessionError> {
        let agent = self.agents.get_mut(&node).unwrap();
        let count = count.min(agent.said.len());
        let mut events: Vec<_> = agent.said.drain(..count).collect();
        for event in &events {
            match event {
                Event::Message(Body::Result, result) => drop(agent.held.remove(&result.id)),
                Event::Control(Control::GivenBack(id)) => drop(agent.held.remove(id)),
                Event::Control(Control::Drain(_)) => agent.was_heard = true,
                _ => {}
            }
        }
        self.dispatch.received(node, &mut events, self.now, &mut self.out)?;
        self.act();
        Ok(())
    }

    fn beat(&mut self, node: PeerId) -> Result<(), SessionError> {
        let uploading = !self.agents[&node].arriving.is_empty();
        self.dispatch.beat(node, uploading, 0, self.now, &mut self.out)?;
        self.act();
        Ok(())
    }

    fn cancel(&mut self, task: u64, wait: bool) {
        match self.dispatch.cancel(task, wait, &mut self.out) {
            Cancelled::Dropped => assert!(self.ended.insert(task)),
            Cancelled::Held(_) if wait => drop(self.cancelling.insert(task)),
            Cancelled::Held(_) | Cancelled::Unknown => {}
        }
        self.act();
    }

    /// The caller stops waiting for the answer to its cancel.
    fn stop_waiting(&mut self) {
        if let Some(task) = self.cancelling.pop_first()
            && self.dispatch.cancel_answer(task)
        {
            assert!(self.ended.insert(task), "task {task} was dropped after its end");
        }
    }

    fn take(&mut self) {
        let caller = std::thread::current().id();
        let results = std::mem::take(&mut self.untaken);
        self.dispatch.taken(0, caller, results, self.now, &mut self.out);
        self.act();
    }

    fn answer_notes(&mut self) {
        for (node, note) in std::mem::take(&mut self.notes) {
            self.dispatch.answer_note(node, note, bytes::Bytes::new(), &mut self.out);
        }
        self.act();
    }

    fn tick(&mut self) {
        self.dispatch.tick([], self.now, &mut self.out);
        self.act();
        assert!(self.asleep.is_empty(), "frames wait for a sender that sleeps");
    }

    fn lose(&mut self, node: PeerId) {
        let agent = self.agents.remove(&node).unwrap();
        // A loss that was announced is not held against the tasks.
        for id in agent.held.iter().filter(|_| !agent.was_heard) {
            *self.losses.entry(id.task).or_default() += 1;
        }
        let end = Err(NodeError::Session(SessionError::Silent(10)));
        self.dispatch.lost(node, end, self.now, &mut self.out);
        self.act();
    }

    /// Let everything that is on its way arrive, and what it leads to.
    fn deliver_all(&mut self) -> Result<(), SessionError> {
        for _ in 0..100_000 {
            if self.dispatch.counts().0 == 0 {
                return Ok(());
            }
            self.tick();
            for node in self.agents.keys().copied().collect::<Vec<_>>() {
                self.beat(node)?;
                let agent = self.agents.get_mut(&node).unwrap();
                while !agent.told.is_empty() {
                    agent.hear(false);
                }
                while !agent.arriving.is_empty() {
                    agent.arrive();
                }
                let waiting = std::mem::take(&mut agent.waiting);
                agent.running.extend(waiting);
                if let Some(&id) = agent.running.first() {
                    agent.end(id, Outcome::Returned);
                }
                self.receive(node, usize::MAX)?;
            }
        }
        Err(SessionError::Unasked("never ended its tasks"))
    }

    /// Do one thing that may happen. `pick` chooses among the nodes, the tasks and the variants.
    fn step(&mut self, step: u8, pick: usize) -> Result<(), SessionError> {
        let Some(&node) = self.agents.keys().nth(pick % self.agents.len().max(1)) else {
            self.add(1 + pick % 3);
            return Ok(());
        };
        let task = (pick as u64) % self.tasks.max(1);
        let agent = self.agents.get_mut(&node).unwrap();
        match step {
            0..=2 => (0..=pick % 6).for_each(|_| self.submit(None)),
            3 => self.submit(Some(node)),
            4 | 5 => self.tick(),
            6..=9 => agent.hear(pick.is_multiple_of(3)),
            10..=12 => agent.arrive(),
            13..=15 => {
                let task = agent.waiting.pop();
                agent.running.extend(task);
            }
            16 | 17 => {
                if let Some(&id) = agent.running.get(pick % agent.running.len().max(1)) {
                    let aborted = agent.aborted.contains(&id);
                    let ended = if pick.is_multiple_of(4) { Outcome::Crashed } else { Outcome::Returned };
                    agent.end(id, if aborted { Outcome::Cancelled } else { ended });
                }
            }
            18 | 19 => {
                if let Some(&(task, attempt)) = agent.owed.keys().nth(pick % agent.owed.len().max(1)) {
                    agent.answer(Attempt { task, attempt });
                }
            }
            20..=24 => self.receive(node, 1 + pick % 3)?,
            25 => self.beat(node)?,
            26 => self.cancel(task, false),
            27 => self.cancel(task, true),
            28 => {
                self.dispatch.abort(task, &mut self.out);
                self.act();
            }
            29 => {
                if pick.is_multiple_of(8) && !agent.is_draining {
                    agent.is_draining = true;
                    agent.say(Control::Drain("soon".into()));
                }
            }
            30 => {
                if self.agents.len() < NODES {
                    self.add(1 + pick % 3);
                }
            }
            31 => {
                if pick.is_multiple_of(4) {
                    self.lose(node);
                }
            }
            // A result whose acknowledgement was lost with a connection comes once more.
            32 => {
                if let Some(&id) = agent.unacknowledged.first() {
                    agent.unacknowledged.push(id);
                    agent.said.push_back(Event::Message(Body::Result, message(id, Outcome::Returned as u8)));
                }
            }
            33 => {
                agent.notes += 1;
                let told = message(Attempt { task: agent.notes, attempt: 0 }, 0);
                agent.said.push_back(Event::Message(Body::Note, told));
            }
            34 => self.take(),
            35 => self.answer_notes(),
            _ => self.stop_waiting(),
        }
        Ok(())
    }
}

/// How many cases there are; the environment can ask for more.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(300)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    /// After each step every task is in exactly one place; each ends once, and only what was lost with it is held against
    /// it; each result is acknowledged; and no node is lost for what it did or did not do.
    #[test]
    fn every_task_ends_once_and_honest_nodes_are_not_accused(
        steps in prop::collection::vec((0_u8..37, any::<u8>()), 0..400)
    ) {
        let mut client = Client::new(Instant::now());
        client.add(2);
        for (step, pick) in steps {
            client.now += Duration::from_millis(1);
            let accused = client.step(step, usize::from(pick)).err();
            prop_assert!(accused.is_none(), "an honest node was lost: {}", accused.unwrap());
        }
        client.add(2);
        let accused = client.deliver_all().err();
        prop_assert!(accused.is_none(), "an honest node was lost: {}", accused.unwrap());
        while !client.cancelling.is_empty() {
            client.stop_waiting();
        }
        prop_assert_eq!(client.ended.len() as u64, client.tasks);
        client.take();
        for node in client.agents.keys().copied().collect::<Vec<_>>() {
            client.receive(node, usize::MAX).unwrap();
        }
        client.take();
        client.answer_notes();
        client.tick();
        for agent in client.agents.values() {
            prop_assert!(agent.unacknowledged.is_empty(), "{:?} were not acknowledged", agent.unacknowledged);
        }
    }
}
