//! The agent's decider, with a client that sends anything and worker processes that send and do anything.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use skyward_lite::error::FrameError;
use skyward_lite::node::actions::{Action, Exit, Input};
use skyward_lite::node::blob_files::{BlobFiles, Progress};
use skyward_lite::node::state::{Settings, State};
use skyward_lite::timing::NOTE_CREDIT;
use skyward_lite::wire::{Attempt, Body, ClientHello, Control, Event, Message, Outcome, hello, read_hello};

use super::forge::{self, Known, Stream};
use super::script::Script;
use crate::support::client_hello;

const MAX_MESSAGE: usize = 1 << 20;
/// Worker processes, and tasks at once in each, whatever the client asks for.
const MAX_WORKERS: usize = 4;
/// What an honest client sends: heartbeats, tasks, acknowledgements, questions, aborts, answers, blobs.
const CLIENT_KINDS: &[u8] = &[3, 6, 7, 8, 11, 11, 11, 11, 13, 17, 18, 18, 19, 27];
/// What an honest worker sends: results, notes, answers about tasks.
const WORKER_KINDS: &[u8] = &[9, 10, 12, 12, 12, 16];

struct Process {
    stream: Stream,
    tasks: Vec<Attempt>,
    /// What it was asked about its tasks.
    asked: Vec<Attempt>,
    is_killed: bool,
}

struct World {
    state: State,
    now: Instant,
    begun: Instant,
    /// How long the machine was suspended.
    slept: Duration,
    files: BlobFiles,
    client: Stream,
    processes: BTreeMap<usize, Process>,
    /// How often a task of each number arrived, and how often one ended.
    arrived: HashMap<u64, usize>,
    ended: HashMap<u64, usize>,
    unacknowledged: Vec<Attempt>,
    /// The memory of the notes that the client was sent and has not answered, by number.
    notes: HashMap<u64, usize>,
    /// The blobs that were complete and were not dropped.
    blobs: BTreeSet<u64>,
    /// The numbers of the client's last task and of its last blob, and how much of each blob it has sent: of 16 bytes.
    last_task: u64,
    last_blob: u64,
    sending: BTreeMap<u64, u64>,
    failing: usize,
    is_over: bool,
}

/// Let a script happen.
///
/// # Panics
/// If the decider breaks a promise.
pub fn run(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let client = Stream::new(MAX_MESSAGE, &mut script);
    let settings = Settings {
        node: "n".to_owned(),
        processes: 1,
        slots: 1,
        cores: 2,
        task_timeout: None,
        generation: 0,
        unwind: script.rarely(2),
    };
    let now = Instant::now();
    let mut world = World {
        state: State::new(settings, now, Duration::from_secs(60)),
        now,
        begun: now,
        slept: Duration::ZERO,
        files: BlobFiles::default(),
        client,
        processes: BTreeMap::new(),
        arrived: HashMap::new(),
        ended: HashMap::new(),
        unacknowledged: Vec::new(),
        notes: HashMap::new(),
        blobs: BTreeSet::new(),
        last_task: 0,
        last_blob: 0,
        sending: BTreeMap::new(),
        failing: 0,
        is_over: false,
    };
    if !script.breaks(32) {
        let asked = client_hello(1 + script.below(MAX_WORKERS), script.rarely(2));
        world.client.control(&hello(&asked).unwrap(), &mut script);
    }
    while !script.is_over() && !world.is_over {
        world.step(&mut script);
    }
    world.handle(Input::KillAll);
    for worker in world.processes.keys().copied().collect::<Vec<_>>() {
        assert!(world.processes[&worker].is_killed, "a worker survives its agent");
        world.exit(worker, false);
    }
    assert!(world.processes.is_empty(), "a worker was started after the end");
}

impl World {
    fn handle(&mut self, input: Input<'_>) {
        let mut actions = Vec::new();
        self.state.handle(input, self.now, &mut actions);
        assert!(self.state.is_consistent(), "{:?}", self.state);
        self.obey(actions);
    }

    /// Carry actions out, and look at them.
    fn obey(&mut self, actions: Vec<Action>) {
        let mut failed = Vec::new();
        for action in actions {
            match action {
                Action::Start(worker) if self.failing > 0 => {
                    self.failing -= 1;
                    failed.push(worker);
                }
                Action::Start(worker) => {
                    let stream = Stream::new(MAX_MESSAGE, &mut Script::new(&[]));
                    let process = Process { stream, tasks: Vec::new(), asked: Vec::new(), is_killed: false };
                    assert!(self.processes.insert(worker, process).is_none(), "a worker was started twice");
                }
                Action::Kill(worker) => {
                    self.processes.get_mut(&worker).expect("nobody to kill").is_killed = true;
                }
                Action::Assign(worker, task) => {
                    let process = self.processes.get_mut(&worker).expect("nobody to run it");
                    assert!(process.stream.greeted, "a task for a worker that is not ready");
                    process.tasks.push(task.id);
                }
                Action::Pass(worker, number) => {
                    assert!(self.processes.contains_key(&worker), "nobody to have it");
                    assert!(self.files.get(number).is_some(), "a blob is passed that is not here");
                }
                Action::DropBlob(number) => self.files.forget(number),
                Action::Deliver(Body::Result, result) => {
                    self.unacknowledged.push(result.id);
                    self.end(result.id.task);
                }
                Action::Deliver(Body::Note, note) => {
                    assert!(self.notes.insert(note.id.task, note.cost()).is_none(), "a note's number came twice");
                    let bytes: usize = self.notes.values().sum();
                    assert!(self.notes.len() == 1 || bytes <= NOTE_CREDIT, "more notes than credit");
                }
                Action::Reply(Control::GivenBack(id)) => self.end(id.task),
                Action::Stop(why) => {
                    assert!(!why.is_empty());
                    self.is_over = true;
                }
                Action::Tell(worker, Control::Recall(id) | Control::Cancel(id)) => {
                    self.processes.get_mut(&worker).expect("nobody to ask").asked.push(id);
                }
                Action::Answer(..)
                | Action::Deliver(..)
                | Action::Reply(_)
                | Action::Tell(..)
                | Action::ReadWorkers => {}
            }
        }
        for worker in failed {
            self.handle(Input::NotStarted(worker, "no".to_owned()));
        }
    }

    /// Return the agent's time, as its heartbeats tell it.
    fn clock(&self) -> u64 {
        u64::try_from((self.now.saturating_duration_since(self.begun) + self.slept).as_micros()).unwrap_or(u64::MAX)
    }

    fn end(&mut self, task: u64) {
        let ended = self.ended.entry(task).or_default();
        *ended += 1;
        assert!(Some(&*ended) <= self.arrived.get(&task), "task {task} ended more often than it came");
    }

    /// Let what the client sent arrive, as `agent.rs` does.
    fn deliver(&mut self, script: &mut Script<'_>) {
        self.client.arrive(script);
        while !self.is_over {
            match self.receive() {
                Ok(true) => {}
                Ok(false) => return,
                Err(()) => self.is_over = true,
            }
        }
    }

    fn receive(&mut self) -> Result<bool, ()> {
        let events = self.client.read(&mut |offer| match offer.body {
            Body::Task => Ok(true),
            _ => Err(FrameError::BadSequence("a result or a note from a client")),
        });
        let mut events = events.map_err(drop)?;
        if events.is_empty() {
            return Ok(false);
        }
        if !self.client.greeted {
            let Some(Event::Control(Control::Hello(body))) = events.pop() else { return Err(()) };
            let client: ClientHello = read_hello(&body).map_err(drop)?;
            self.client.greeted = true;
            self.begun = self.now;
            self.greeted(&client);
            return Ok(true);
        }
        let mut others = Vec::new();
        for event in events {
            match event {
                Event::Chunk(chunk) => {
                    self.handle(Input::Client(&mut others));
                    match self.files.take(&chunk).map_err(drop)? {
                        Progress::Partly => {}
                        Progress::Complete => self.handle(Input::BlobComplete(chunk.number)),
                        Progress::Failed(why) => self.handle(Input::BlobFailed(chunk.number, why)),
                    }
                }
                event => {
                    if let Event::Message(Body::Task, Message { id, .. }) | Event::NoMemory(Body::Task, id, _) = &event
                    {
                        *self.arrived.entry(id.task).or_default() += 1;
                    }
                    if let Event::Control(Control::NoteAnswer { note, .. })
                    | Event::Message(Body::Answer, Message { id: Attempt { task: note, .. }, .. })
                    | Event::NoMemory(Body::Answer, Attempt { task: note, .. }, _) = &event
                    {
                        self.notes.remove(note);
                    }
                    others.push(event);
                    // One by one: after a stop nothing more is handled.
                    self.handle(Input::Client(&mut others));
                }
            }
            if self.is_over {
                break;
            }
        }
        Ok(true)
    }

    fn greeted(&mut self, client: &ClientHello) {
        let tasks = client.worker.concurrency.unwrap_or(2).clamp(1, MAX_WORKERS);
        let (processes, slots) = if client.worker.processes { (tasks, 1) } else { (1, tasks) };
        let settings = Settings {
            node: client.node.clone(),
            processes,
            slots,
            cores: 2,
            task_timeout: client.worker.task_timeout_ms.map(Duration::from_millis),
            generation: client.generation,
            unwind: client.worker.unwind,
        };
        self.state = State::new(settings, self.now, Duration::from_millis(client.lease_ms));
        self.handle(Input::Begin);
    }

    /// Let what a worker sent arrive, as `supervisor.rs` does: a worker whose bytes cannot be read is ended.
    fn report(&mut self, worker: usize, script: &mut Script<'_>) {
        let Some(process) = self.processes.get_mut(&worker) else { return };
        process.stream.arrive(script);
        loop {
            if self.state.is_full() {
                return;
            }
            let (state, processes) = (&self.state, &mut self.processes);
            let Some(process) = processes.get_mut(&worker) else { return };
            match process.stream.read(&mut |offer| state.admit(worker, offer)) {
                Ok(events) if events.is_empty() => return,
                Ok(mut events) => {
                    if let [Event::Control(Control::Hello(_))] = events[..] {
                        process.stream.greeted = true;
                    }
                    // The supervisor waits for a hello first, and has none of its own.
                    if process.stream.greeted {
                        self.handle(Input::Worker(worker, &mut events));
                    }
                }
                Err(_) => return self.exit(worker, true),
            }
        }
    }

    fn exit(&mut self, worker: usize, unreadable: bool) {
        let Some(process) = self.processes.remove(&worker) else { return };
        let running = process.tasks.iter().rev().take(MAX_WORKERS).map(|id| (*id, Duration::from_secs(1))).collect();
        let unreadable = unreadable.then(|| "nonsense".to_owned());
        self.handle(Input::Exited(worker, Exit { how: "ended".to_owned(), running, unreadable, ..Exit::default() }));
    }

    /// Return frames of an honest client.
    fn honest(&mut self, script: &mut Script<'_>) -> Vec<u8> {
        let task = Attempt { task: self.last_task.saturating_sub(script.below(8) as u64), attempt: 0 };
        match script.byte() % 16 {
            0..5 => {
                self.last_task += 1;
                let known: Vec<_> = self.sending.keys().copied().collect();
                let mut named: Vec<_> =
                    (0..script.below(6).saturating_sub(3)).filter_map(|_| script.pick(&known)).collect();
                if script.rarely(6) {
                    self.last_blob += 1;
                    self.sending.insert(self.last_blob, 0);
                    named.push(self.last_blob);
                }
                let generation = u32::from(script.rarely(4));
                forge::task(Attempt { task: self.last_task, attempt: 0 }, generation, &named)
            }
            5..8 => {
                let begun = self.sending.iter_mut().filter(|(_, sent)| **sent < 16);
                begun
                    .take(1 + script.below(3))
                    .flat_map(|(number, sent)| {
                        *sent += 8;
                        forge::chunk(*number, *sent - 8, 16, b"12345678")
                    })
                    .collect()
            }
            8 => forge::controls([Control::Heartbeat { nonce: 1, lease_ms: 60_000, echo: self.clock() }]),
            9 | 10 => forge::controls([Control::Acknowledge(std::mem::take(&mut self.unacknowledged))]),
            11 => forge::controls([Control::Recall(task)]),
            12 => forge::controls([Control::Cancel(task)]),
            13 => forge::controls([Control::Abort(task)]),
            14 => {
                let blob = self.sending.pop_first().map(|(number, _)| number);
                forge::controls(blob.map(|number| Control::Forget(vec![number])))
            }
            15 if script.rarely(2) => self.notes.keys().next().map(|note| forge::answer(*note)).unwrap_or_default(),
            _ => {
                let answer = |note: &u64| Control::NoteAnswer { note: *note, error: "".into() };
                forge::controls(self.notes.keys().take(2).map(answer).collect::<Vec<_>>())
            }
        }
    }

    fn step(&mut self, script: &mut Script<'_>) {
        let step = script.byte();
        let workers: Vec<_> = self.processes.keys().copied().collect();
        let worker = script.pick(&workers).unwrap_or_default();
        match step % 24 {
            6 | 7 if script.breaks(2) => {
                let ids = (0..16).map(|task| Attempt { task, attempt: 0 }).chain(self.unacknowledged.iter().copied());
                let numbers = (1..8).chain(self.notes.keys().copied()).chain([30_000]).collect();
                let raw = forge::frames(&Known { ids: ids.collect(), numbers, kinds: CLIENT_KINDS }, script);
                self.client.send(&raw, script);
                self.deliver(script);
            }
            0..8 => {
                let raw = self.honest(script);
                self.client.send(&raw, script);
                self.deliver(script);
            }
            8 => self.deliver(script),
            9..12 => {
                if let Some(process) = self.processes.get_mut(&worker).filter(|process| !process.stream.greeted) {
                    let mut raw = Vec::new();
                    Control::Hello("{}".into()).put(&mut raw).unwrap();
                    process.stream.send(&raw, script);
                    self.report(worker, script);
                }
            }
            12..15 if script.breaks(2) => {
                if let Some(process) = self.processes.get_mut(&worker).filter(|process| process.stream.greeted) {
                    let ids = process.tasks[process.tasks.len().saturating_sub(16)..].to_vec();
                    let raw = forge::frames(&Known { ids, numbers: (1..8).collect(), kinds: WORKER_KINDS }, script);
                    process.stream.send(&raw, script);
                    self.report(worker, script);
                }
            }
            12..18 => {
                // What an honest worker does.
                if let Some(process) = self.processes.get_mut(&worker).filter(|process| process.stream.greeted) {
                    let asked = process.asked.pop().filter(|id| process.tasks.contains(id));
                    let task = asked.or_else(|| script.pick(&process.tasks)).unwrap_or_default();
                    let raw = match script.byte() % 4 {
                        0 if asked.is_some() => forge::controls([Control::RecallRefused(task)]),
                        outcome => {
                            process.tasks.retain(|id| *id != task);
                            match outcome {
                                1 if asked.is_some() => forge::controls([Control::GivenBack(task)]),
                                _ => forge::result(task, Outcome::Returned, script.below(64)),
                            }
                        }
                    };
                    process.stream.send(&raw, script);
                    self.report(worker, script);
                }
            }
            18 if script.rarely(4) => self.exit(worker, script.rarely(4)),
            19 if script.breaks(16) => self.failing = script.below(3),
            20 if script.rarely(32) => self.handle(Input::Drain("soon".to_owned())),
            21 if script.rarely(32) => self.handle(Input::Dismiss),
            _ => {
                let scale = if script.breaks(8) { 9 } else { 3 };
                self.now += Duration::from_millis(u64::from(script.byte()) << script.below(scale));
                if script.rarely(32) {
                    self.slept += Duration::from_millis(u64::from(script.byte()) << script.below(scale));
                }
                let now = self.now;
                let running: BTreeMap<usize, Vec<_>> = self
                    .processes
                    .iter()
                    .map(|(id, process)| {
                        (*id, process.tasks.iter().take(2).map(|id| (*id, Duration::from_secs(3))).collect())
                    })
                    .collect();
                let mut actions = Vec::new();
                let running = |worker| running.get(&worker).cloned().unwrap_or_default();
                self.state.handle(
                    Input::Tick { orphaned: false, slept: self.slept, running: &running },
                    now,
                    &mut actions,
                );
                assert!(self.state.is_consistent(), "{:?}", self.state);
                self.obey(actions);
                let killed = self.processes.iter().filter(|(_, process)| process.is_killed).map(|(id, _)| *id);
                killed.collect::<Vec<_>>().into_iter().for_each(|worker| self.exit(worker, false));
            }
        }
    }
}
