//! The agent: one per pool and node. It runs no user code, so nothing that user code does can stop its heartbeat.
//!
//! It hands tasks out and results back, keeps each result until the client has acknowledged it, and ends with
//! everything that it started when the client says goodbye, is gone, or has let its lease run out. What it does with
//! its worker processes is in `crew.rs`.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::process::Pid;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{UnixStream, unix::pipe};
use tokio::sync::Notify;
use tracing::{info, warn};

use crate::error::{AgentError, FrameError, SessionError};
use crate::node::supervisor::{GRACE, KillDeadline, Workers};
use crate::queue::{Cancelled, PeerId, Queue};
use crate::timing::{AGENT_BACKLOG, Timing};
use crate::wire::{
    AgentHello, CREDIT, ClientHello, EventReader, FrameSender, HEARTBEAT, LEAST_MESSAGE, NOTE_CREDIT, WorkerSpec,
    hello, lock, read_hello,
};
use crate::wire::{Attempt, Body, Control, Event, MAX_REASON, Message, Offer, Outcome};

/// Tasks that a client may have here at once, and cancelled ones that have not arrived. It sends as many as the slots and
/// the prefetch, which is at most 65,536, and those that are for this node alone.
const MAX_TASKS: usize = 1 << 20;
/// Bytes of results and notes beyond the credit at which the agent stops reading from its workers.
pub(crate) const BACKLOG: usize = AGENT_BACKLOG;
/// How often leases and idle workers are looked at.
pub(crate) const TICK: Duration = Timing::DEFAULT.tick;
/// A note's number has that of its worker in the bits from this one on while it is on its way between us and the client:
/// the answer finds its way back, and none to the process that took the worker's place.
const NOTE_SHIFT: u32 = 40;
/// Bound on the client's hello, and on the last words to it.
const GREETING: Duration = Timing::DEFAULT.hello;
pub(crate) const LAST_WORDS: Duration = Timing::DEFAULT.agent_goodbye;

/// The agent that this process is, while it serves its client.
static SERVING: Mutex<Weak<Agent>> = Mutex::new(Weak::new());

/// What an agent must be told that it cannot find out.
#[derive(Debug, Clone)]
pub struct AgentSpec {
    /// The command that starts a worker; its standard input is the socket to us.
    pub worker: Vec<String>,
    /// The version of our package.
    pub version: String,
    /// The node's Python, "3.11".
    pub python: String,
    /// Names this life of the agent.
    pub epoch: String,
    /// The node's distributions: normalized name → version.
    pub packages: BTreeMap<String, String>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) queue: Queue,
    pub(crate) crew: Workers,
    announced: bool,
    /// Sent and not acknowledged, for the credit and for whoever comes back after a lost connection.
    kept: HashMap<Attempt, Message>,
    kept_bytes: usize,
    /// Beyond the credit.
    backlog: VecDeque<Message>,
    backlog_bytes: usize,
    /// The notes that were sent and are not answered, by number, with the memory that each takes, and the sum of it.
    notes: HashMap<u64, usize>,
    notes_bytes: usize,
    /// Beyond their credit.
    notes_backlog: VecDeque<Message>,
    notes_backlog_bytes: usize,
    /// Cancelled before they arrived: control frames overtake messages. One that had ended is forgotten with its
    /// acknowledgement.
    early: HashSet<Attempt>,
    /// Recalled or cancelled by the client, not by us: it is to hear if they are kept.
    pub(crate) asked: HashSet<Attempt>,
    lease: Option<Instant>,
    /// The client was told that this node will soon be gone.
    drained: bool,
    /// Why this is to end.
    ending: Option<String>,
}

pub(crate) struct Agent {
    pub(crate) spec: AgentSpec,
    pub(crate) node: String,
    pub(crate) work: WorkerSpec,
    pub(crate) lease_ms: u64,
    pub(crate) cores: usize,
    pub(crate) link: Arc<FrameSender>,
    pub(crate) state: Mutex<State>,
    pub(crate) relief: Notify,
    end: Notify,
}

/// A descriptor that somebody handed us to read from: a socket or a pipe, as the SSH server has it.
///
/// # Errors
/// If it is neither.
pub fn reader(fd: OwnedFd) -> io::Result<Box<dyn AsyncRead + Unpin + Send>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(if is_socket(&fd)? {
        Box::new(UnixStream::from_std(fd.into())?)
    } else {
        Box::new(pipe::Receiver::from_owned_fd(fd)?)
    })
}

/// As [`reader`], to write to.
///
/// # Errors
/// If it is neither.
pub fn writer(fd: OwnedFd) -> io::Result<Box<dyn AsyncWrite + Unpin + Send>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(if is_socket(&fd)? {
        Box::new(UnixStream::from_std(fd.into())?)
    } else {
        Box::new(pipe::Sender::from_owned_fd(fd)?)
    })
}

fn is_socket(fd: &OwnedFd) -> io::Result<bool> {
    let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
    Ok(kind == rustix::fs::FileType::Socket)
}

/// Serve one client on a stream until it is done with us, then end everything that was started.
///
/// # Errors
/// [`AgentError::Refused`] if the client's Python does not fit; [`AgentError::Session`] if it was lost.
pub async fn run<R, W>(from: R, to: W, spec: AgentSpec) -> Result<(), AgentError>
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let link = Arc::new(FrameSender::default());
    let mut writer = tokio::spawn({
        let link = Arc::clone(&link);
        // No bound on a write: a client that takes nothing is waited for until its lease ends.
        async move { link.run(to, None).await }
    });
    let mut source = EventReader::new(from, usize::MAX);
    let mut events = Vec::new();
    let greeting = tokio::time::timeout(GREETING, source.greeting(&mut events)).await;
    let body = greeting.map_err(|_| SessionError::NotReady(GREETING.as_secs()))??;
    let client: ClientHello = read_hello(&body)?;
    source.set_max_message(client.worker.max_payload.max(LEAST_MESSAGE));
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let differences = differences(&client, &spec);
    let why = if client.python != spec.python {
        Some(format!(
            "the client runs Python {}, this node Python {}: functions pickled by one do not run in the other",
            client.python, spec.python
        ))
    } else if client.strict && !differences.is_empty() {
        Some(format!("its environment is not the client's, and strict_env=True: {}", differences.join("; ")))
    } else {
        None
    };
    if let Some(why) = why {
        link.send(|o| o.close(&why));
        farewell(&mut source, &mut writer).await;
        return Err(AgentError::Refused(why));
    }
    let answer = hello(&AgentHello {
        version: spec.version.clone(),
        python: spec.python.clone(),
        epoch: spec.epoch.clone(),
        cores,
        pid: std::process::id(),
        differences,
    })?;
    link.send(|o| o.control(answer));
    info!(node = %client.node, lease_ms = client.lease_ms, "hello of the client");
    let agent = Arc::new(Agent {
        spec,
        node: client.node,
        work: client.worker,
        lease_ms: client.lease_ms,
        cores,
        link,
        state: Mutex::new(State { queue: Queue::local(), ..State::default() }),
        relief: Notify::new(),
        end: Notify::new(),
    });
    lock(&agent.state).lease = Some(Instant::now() + Duration::from_millis(client.lease_ms));
    if let Err(why) = agent.start_crew() {
        agent.end(&mut lock(&agent.state), why.to_string());
    }
    let _serving = Serving::new(&agent);
    let parent = rustix::process::getppid();
    let mut tick = tokio::time::interval(TICK);
    // Silence is counted in ticks: after a stop of our own, one of them says enough.
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    let ended = loop {
        agent.on_client(&mut events);
        let ending = lock(&agent.state).ending.take();
        if let Some(why) = ending {
            info!(%why, "goodbye");
            agent.dismiss().await;
            agent.end_crew().await;
            agent.link.send(|o| o.close(&why));
            farewell(&mut source, &mut writer).await;
            break Ok(());
        }
        tokio::select! {
            read = source.read_admitted(&mut events, admit_task) => if let Err(e) = read {
                warn!(why = %e, "the client is lost");
                // The client learns the reason if it can still read.
                agent.link.send(|o| o.close(&e.to_string()));
                farewell(&mut source, &mut writer).await;
                break Err(e.into());
            },
            sent = &mut writer => break match sent {
                Ok(Err(e)) => Err(e.into()),
                _ => Ok(()),
            },
            () = agent.end.notified() => {}
            _ = tick.tick() => agent.on_tick(parent),
            // The client's own may wait behind what it uploads: we live all the same.
            _ = heartbeat.tick() => agent.link.send(|o| o.control(Control::Heartbeat { nonce: 0, lease_ms: 0 })),
        }
    };
    agent.end_crew().await;
    ended
}

/// Tell the client of this process's agent that the node will soon be gone, and why (at most [`MAX_REASON`] bytes of it):
/// what is not running here goes elsewhere. Only the first call counts. False if no client is being served.
#[must_use]
pub fn drain(reason: &str) -> bool {
    let Some(agent) = lock(&SERVING).upgrade() else { return false };
    let mut reason = reason.to_owned();
    while reason.len() > MAX_REASON {
        reason.pop();
    }
    if !std::mem::replace(&mut lock(&agent.state).drained, true) {
        info!(%reason, "drain");
        agent.link.send(|o| o.control(Control::Drain(Bytes::from(reason))));
    }
    true
}

/// Lets [`drain`] find the agent for as long as this lives.
struct Serving;

impl Serving {
    fn new(agent: &Arc<Agent>) -> Self {
        *lock(&SERVING) = Arc::downgrade(agent);
        Self
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        *lock(&SERVING) = Weak::new();
    }
}

/// What the client has and this node has not, or in another version.
fn differences(client: &ClientHello, spec: &AgentSpec) -> Vec<String> {
    let differs = |(name, wanted): (&String, &String)| match spec.packages.get(name) {
        None => Some(format!("{name} {wanted} is missing")),
        Some(found) if found != wanted => Some(format!("{name} is {found}, not {wanted}")),
        Some(_) => None,
    };
    client.packages.iter().filter_map(differs).collect()
}

/// Whether a client's message is to be stored, now that its first chunk is here.
fn admit_task(offer: &Offer) -> Result<bool, FrameError> {
    if offer.body == Body::Task { Ok(true) } else { Err(FrameError::BadSequence("a result or a note from a client")) }
}

/// Let the goodbye reach the client: it closes its end when it has read it.
async fn farewell<R: AsyncRead + Unpin>(
    source: &mut EventReader<R>,
    writer: &mut tokio::task::JoinHandle<Result<(), SessionError>>,
) {
    let both = async {
        drop(writer.await);
        while source.read_admitted(&mut Vec::new(), |_| Ok(false)).await.is_ok() {}
    };
    drop(tokio::time::timeout(LAST_WORDS, both).await);
}

impl Agent {
    /// Processes, and tasks at once in each.
    pub(crate) fn shape(&self) -> (usize, usize) {
        let n = self.work.concurrency.unwrap_or(self.cores).max(1);
        if self.work.processes { (n, 1) } else { (1, n) }
    }

    pub(crate) fn end(&self, state: &mut State, why: String) {
        state.ending.get_or_insert(why);
        self.end.notify_one();
    }

    /// Tell the client of cancelled tasks that ended in the queue, then send and steal.
    pub(crate) fn pump(self: &Arc<Self>, state: &mut State) {
        for id in state.queue.take_cancelled() {
            state.asked.remove(&id);
            self.deliver(state, Message::cancelled(id));
        }
        self.run_suspects(state);
        state.pump();
    }

    fn on_tick(self: &Arc<Self>, parent: Option<Pid>) {
        let mut state = lock(&self.state);
        if state.lease.is_some_and(|l| l <= Instant::now()) {
            self.end(&mut state, "the lease is over: nothing was heard from the client".to_owned());
        }
        if rustix::process::getppid() != parent {
            self.end(&mut state, "the process that started the agent is gone".to_owned());
        }
        if state.is_full() {
            // The workers' answers may be minutes away.
            for id in std::mem::take(&mut state.asked) {
                self.keep(&mut state, id);
            }
        }
        self.look_after_crew(&mut state);
        self.pump(&mut state);
    }

    fn on_client(self: &Arc<Self>, events: &mut Vec<Event>) {
        if events.is_empty() {
            return;
        }
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        for event in events.drain(..) {
            match event {
                Event::Message(Body::Task, task) => {
                    if state.early.remove(&task.id) {
                        self.deliver(state, Message::cancelled(task.id));
                    } else if state.queue.len() + state.kept.len() + state.backlog.len() >= MAX_TASKS {
                        self.end(state, format!("the client sent more than {MAX_TASKS} tasks at once"));
                    } else if state.queue.attempt(task.id.task).is_none() {
                        state.queue.push(task);
                    }
                }
                Event::NoMemory(Body::Task, id, size) => {
                    let text = format!("node {}: no memory for a task of {size} bytes in its agent", self.node);
                    self.deliver(state, Message::text(id, Outcome::Crashed, text));
                }
                Event::Control(Control::Heartbeat { nonce, lease_ms }) => {
                    state.lease = Some(Instant::now() + Duration::from_millis(lease_ms));
                    self.link.send(|o| o.control(Control::Pulse { nonce }));
                    state.crew.tell_all(&Control::Heartbeat { nonce, lease_ms });
                }
                Event::Control(Control::Acknowledge(ids)) => {
                    for id in ids {
                        state.early.remove(&id);
                        if let Some(message) = state.kept.remove(&id) {
                            state.kept_bytes -= message.cost();
                        }
                    }
                    self.send_backlog(state);
                }
                Event::Control(Control::Cancel(id)) => {
                    if let Some(worker) = self.drop_task(state, id) {
                        self.ask(state, worker, Control::Cancel(id), id);
                    }
                }
                Event::Control(Control::Abort(id)) => {
                    if let Some(worker) = self.drop_task(state, id) {
                        state.crew.doomed.insert(id, KillDeadline { worker, by: Instant::now() + GRACE });
                        state.crew.tell(worker, Control::Cancel(id));
                    }
                }
                Event::Control(Control::Recall(id)) => match state.queue.give_up(id.task) {
                    Cancelled::Dropped => self.link.send(|o| o.control(Control::GivenBack(id))),
                    Cancelled::Held(worker) => self.ask(state, worker, Control::Recall(id), id),
                    Cancelled::Unknown => self.link.send(|o| o.control(Control::RecallRefused(id))),
                },
                Event::Control(Control::NoteAnswer { note, error }) => {
                    state.notes_bytes -= state.notes.remove(&note).unwrap_or_default();
                    self.send_notes(state);
                    let number = note & ((1 << NOTE_SHIFT) - 1);
                    if let Ok(worker) = PeerId::try_from(note >> NOTE_SHIFT) {
                        state.crew.tell(worker, Control::NoteAnswer { note: number, error });
                    }
                }
                Event::Control(Control::Goodbye(_)) => {
                    state.ending.get_or_insert_with(|| "goodbye".to_owned());
                }
                Event::Control(_) | Event::Message(..) | Event::Skipped(..) | Event::NoMemory(..) => {}
            }
        }
        self.pump(state);
    }

    /// Drop a task that waits here; otherwise the worker that holds it.
    fn drop_task(&self, state: &mut State, id: Attempt) -> Option<PeerId> {
        match state.queue.cancel(id.task) {
            Cancelled::Dropped => self.deliver(state, Message::cancelled(id)),
            Cancelled::Held(worker) => return Some(worker),
            Cancelled::Unknown if state.early.len() >= MAX_TASKS => {
                self.end(state, format!("the client cancelled more than {MAX_TASKS} tasks that are not here"));
            }
            Cancelled::Unknown => {
                state.early.insert(id);
            }
        }
        None
    }

    /// Ask a worker about a task for the client. While workers are not read from their answers would come too late.
    fn ask(&self, state: &mut State, worker: PeerId, question: Control, id: Attempt) {
        if state.is_full() {
            self.keep(state, id);
        } else {
            state.asked.insert(id);
            state.crew.tell(worker, question);
        }
    }

    /// Tell the client that a task is kept, which a worker holds.
    fn keep(&self, state: &mut State, id: Attempt) {
        if !state.crew.doomed.contains_key(&id) {
            state.queue.uncancel(id.task);
        }
        self.link.send(|o| o.control(Control::RecallRefused(id)));
    }

    /// Whether a worker's message is to be stored, now that its first chunk is here. A task can write to the socket of its
    /// worker.
    pub(crate) fn admit(&self, worker: PeerId, offer: &Offer) -> Result<bool, FrameError> {
        match offer.body {
            Body::Task => Err(FrameError::BadSequence("a task from a worker")),
            Body::Result => Ok(lock(&self.state).queue.holds(worker, offer.id)),
            Body::Note => Ok(offer.unfinished == 0 || offer.unfinished.saturating_add(offer.size) <= BACKLOG),
        }
    }

    pub(crate) fn on_worker(self: &Arc<Self>, id: PeerId, events: &mut Vec<Event>) {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let now = Instant::now();
        state.crew.heard(id);
        for event in events.drain(..) {
            match event {
                Event::Message(Body::Result, result) => self.on_result(state, id, result, now),
                // It is not owed any more, but it ends the task.
                Event::Skipped(Body::Result, task) => self.on_result(state, id, Message::cancelled(task), now),
                Event::NoMemory(Body::Result, task, size) => {
                    let text = format!(
                        "node {}: the task has ended, but the agent has no memory for its result of {size} bytes",
                        self.node
                    );
                    self.on_result(state, id, Message::text(task, Outcome::Crashed, text), now);
                }
                Event::Message(Body::Note, mut note) => {
                    note.id.task = note_number(id, note.id.task);
                    state.notes_backlog_bytes += note.cost();
                    state.notes_backlog.push_back(note);
                    self.send_notes(state);
                }
                Event::Skipped(Body::Note, note) | Event::NoMemory(Body::Note, note, _) => {
                    let error = Bytes::from_static(b"the node has no memory for so many messages at once");
                    state.crew.tell(id, Control::NoteAnswer { note: note.task, error });
                }
                // Only the first one counts.
                Event::Control(Control::Hello(_)) if !state.crew.was_ready(id) => {
                    if let Some(slots) = state.crew.is_ready(id, self.shape().1) {
                        state.queue.add_peer(id, slots, now);
                    }
                    if !state.announced && state.crew.complete() {
                        state.announced = true;
                        state.crew.want_spare_later();
                        let slots = state.queue.slots() as u64;
                        self.link.send(|o| o.control(Control::Ready { slots }));
                    }
                }
                Event::Control(Control::GivenBack(task)) => {
                    // It never began: the worker need not be ended for it.
                    if !state.queue.holds(id, task) {
                        continue;
                    }
                    state.crew.doomed.remove(&task);
                    // What was also to be dropped ends here.
                    if state.asked.remove(&task) && !state.queue.is_to_drop(id, task) {
                        state.queue.remove(task.task);
                        self.link.send(|o| o.control(Control::GivenBack(task)));
                    } else {
                        state.queue.returned(id, task);
                    }
                }
                Event::Control(Control::RecallRefused(task)) => {
                    state.queue.kept(id, task);
                    if state.queue.holds(id, task) && state.asked.remove(&task) {
                        self.keep(state, task);
                    }
                }
                Event::Control(_) | Event::Message(..) | Event::Skipped(..) | Event::NoMemory(..) => {}
            }
        }
        self.pump(state);
    }

    /// A worker has ended a task; its result goes to the client unless the task has ended otherwise before.
    fn on_result(&self, state: &mut State, worker: PeerId, result: Message, now: Instant) {
        if state.crew.doomed.get(&result.id).is_some_and(|doom| doom.worker == worker) {
            state.crew.doomed.remove(&result.id);
        }
        state.crew.was_useful(worker);
        if state.queue.done(worker, result.id, now) {
            state.asked.remove(&result.id);
            self.deliver(state, result);
        }
    }

    /// Send the notes for which there is credit. One note may always be on its way.
    fn send_notes(&self, state: &mut State) {
        while let Some(note) = state.notes_backlog.pop_front() {
            let cost = note.cost();
            if state.notes_bytes > 0 && state.notes_bytes.saturating_add(cost) > NOTE_CREDIT {
                state.notes_backlog.push_front(note);
                break;
            }
            state.notes_backlog_bytes -= cost;
            // A task that writes to its worker's socket can use a number twice: the client takes each once.
            if let Entry::Vacant(new) = state.notes.entry(note.id.task) {
                new.insert(cost);
                state.notes_bytes += cost;
                self.link.send(|o| o.message(Body::Note, note));
            }
        }
        if !state.is_full() {
            self.relief.notify_waiters();
        }
    }

    /// Send a result, or keep it back until there is credit. One result may always be on its way.
    pub(crate) fn deliver(&self, state: &mut State, result: Message) {
        if state.backlog.is_empty() && state.has_credit(result.cost()) {
            self.send_result(state, result);
        } else {
            state.backlog_bytes += result.cost();
            state.backlog.push_back(result);
        }
    }

    fn send_result(&self, state: &mut State, result: Message) {
        state.kept_bytes += result.cost();
        if let Some(before) = state.kept.insert(result.id, result.clone()) {
            state.kept_bytes -= before.cost();
        }
        self.link.send(|o| o.message(Body::Result, result));
    }

    fn send_backlog(&self, state: &mut State) {
        while let Some(result) = state.backlog.pop_front() {
            if !state.has_credit(result.cost()) {
                state.backlog.push_front(result);
                break;
            }
            state.backlog_bytes -= result.cost();
            self.send_result(state, result);
        }
        if !state.is_full() {
            self.relief.notify_waiters();
        }
    }
}

/// The number that a worker's note has between us and the client.
fn note_number(worker: PeerId, note: u64) -> u64 {
    (worker as u64) << NOTE_SHIFT | (note & ((1 << NOTE_SHIFT) - 1))
}

impl State {
    /// Whether so much waits for credit that workers are not read from.
    pub(crate) fn is_full(&self) -> bool {
        self.backlog_bytes + self.notes_backlog_bytes > BACKLOG
    }

    fn has_credit(&self, cost: usize) -> bool {
        self.kept_bytes == 0 || self.kept_bytes.saturating_add(cost) <= CREDIT
    }

    /// Send waiting tasks to workers with room, or ask some back for idle ones.
    fn pump(&mut self) {
        while let Some((worker, task)) = self.queue.assign() {
            self.crew.send(worker, task);
        }
        let now = Instant::now();
        while let Some((worker, id)) = self.queue.steal(now) {
            self.crew.tell(worker, Control::Recall(id));
        }
    }
}
