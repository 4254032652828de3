//! The agent: one per pool and node. It runs no user code, so nothing that user code does can stop its heartbeat.
//!
//! It starts the workers, hands tasks out and results back, keeps each result until the client has acknowledged it,
//! and ends with everything that it started when the client says goodbye, is gone, or has let its lease run out.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::Notify;

use crate::error::{AgentError, SessionError};
use crate::frame::{Attempt, Body, Control, Event, Message, Tag};
use crate::queue::{Cancelled, PeerId, Queue};
use crate::session::{
    AgentHello, ClientHello, HEARTBEAT, Link, SUSPECT, Source, WorkerHello, WorkerSpec, hello, lock, read_hello,
};

/// Bytes of results that may be on their way or unacknowledged at once: the client's credit.
const CREDIT: usize = 64 * 1024 * 1024;
/// Bytes of results beyond the credit at which the agent stops reading from its workers.
const BACKLOG: usize = 256 * 1024 * 1024;
/// How often leases and idle workers are looked at.
const TICK: Duration = Duration::from_millis(200);
/// Workers that may die before they are ready, one after another, before the node is given up.
const FALSE_STARTS: usize = 3;
/// Bound on the client's hello, and on the last words to it.
const GREETING: Duration = Duration::from_secs(20);
const LAST_WORDS: Duration = Duration::from_secs(1);
/// What limits the threads of the numeric libraries, which each take all cores by themselves.
const THREAD_VARIABLES: [&str; 6] = [
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
];

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
}

struct WorkerPeer {
    link: Arc<Link>,
    pid: u32,
    ready: bool,
}

#[derive(Default)]
struct State {
    queue: Queue,
    workers: HashMap<PeerId, WorkerPeer>,
    started: PeerId,
    announced: bool,
    false_starts: usize,
    /// Sent and not acknowledged, for the credit and for whoever comes back after a lost connection.
    kept: HashMap<Attempt, Message>,
    kept_bytes: usize,
    /// Beyond the credit.
    backlog: VecDeque<Message>,
    backlog_bytes: usize,
    /// Cancelled before they arrived: control frames overtake messages. One that had ended is forgotten with its
    /// acknowledgement.
    early: HashSet<Attempt>,
    /// Recalled by the client, not by us.
    recalled: HashSet<Attempt>,
    lease: Option<Instant>,
    /// Why this is to end.
    ending: Option<String>,
    /// The workers were killed for good.
    over: bool,
}

struct Agent {
    spec: AgentSpec,
    work: WorkerSpec,
    lease_ms: u64,
    cores: usize,
    link: Arc<Link>,
    state: Mutex<State>,
    relief: Notify,
    end: Notify,
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
    let link = Arc::new(Link::default());
    let mut writer = tokio::spawn({
        let link = Arc::clone(&link);
        // No bound on a write: a client that takes nothing is waited for until its lease ends.
        async move { link.run(to, None).await }
    });
    let mut source = Source::new(from, usize::MAX);
    let mut events = Vec::new();
    let greeting = tokio::time::timeout(GREETING, source.greeting(&mut events)).await;
    let body = greeting.map_err(|_| SessionError::NotReady(GREETING.as_secs()))??;
    let client: ClientHello = read_hello(&body)?;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    if client.python != spec.python {
        let why = format!(
            "the client runs Python {}, this node Python {}: functions pickled by one do not run in the other",
            client.python, spec.python
        );
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
    })?;
    link.send(|o| o.control(answer));
    let agent = Arc::new(Agent {
        spec,
        work: client.worker,
        lease_ms: client.lease_ms,
        cores,
        link,
        state: Mutex::default(),
        relief: Notify::new(),
        end: Notify::new(),
    });
    lock(&agent.state).lease = Some(Instant::now() + Duration::from_millis(client.lease_ms));
    for _ in 0..agent.shape().0 {
        agent.start_worker()?;
    }
    let parent = rustix::process::getppid();
    let mut tick = tokio::time::interval(TICK);
    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    let ended = loop {
        agent.on_client(&mut events);
        let ending = lock(&agent.state).ending.take();
        if let Some(why) = ending {
            agent.kill_workers();
            agent.link.send(|o| o.close(&why));
            farewell(&mut source, &mut writer).await;
            break Ok(());
        }
        tokio::select! {
            read = source.read(&mut events) => if let Err(e) = read { break Err(e.into()); },
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
    agent.kill_workers();
    agent.reap_workers().await;
    ended
}

/// Let the goodbye reach the client: it closes its end when it has read it.
async fn farewell<R: AsyncRead + Unpin>(
    source: &mut Source<R>,
    writer: &mut tokio::task::JoinHandle<Result<(), SessionError>>,
) {
    let both = async {
        drop(writer.await);
        while source.read(&mut Vec::new()).await.is_ok() {}
    };
    drop(tokio::time::timeout(LAST_WORDS, both).await);
}

impl Agent {
    /// Processes, and tasks at once in each.
    fn shape(&self) -> (usize, usize) {
        let n = self.work.concurrency.unwrap_or(self.cores).max(1);
        if self.work.processes { (n, 1) } else { (1, n) }
    }

    fn end(&self, why: String) {
        lock(&self.state).ending.get_or_insert(why);
        self.end.notify_one();
    }

    /// Tell the client of cancelled tasks that ended in the queue, then send and steal.
    fn pump(&self, state: &mut State) {
        for id in state.queue.take_cancelled() {
            state.recalled.remove(&id);
            self.deliver(state, Message::cancelled(id));
        }
        state.pump();
    }

    fn on_tick(&self, parent: Option<Pid>) {
        let over = lock(&self.state).lease.is_some_and(|l| l <= Instant::now());
        if over {
            self.end("the lease is over: nothing was heard from the client".to_owned());
        }
        if rustix::process::getppid() != parent {
            self.end("the process that started the agent is gone".to_owned());
        }
        self.pump(&mut lock(&self.state));
    }

    fn on_client(&self, events: &mut Vec<Event>) {
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
                    } else {
                        state.queue.push(task);
                    }
                }
                Event::Control(Control::Heartbeat { nonce, lease_ms }) => {
                    state.lease = Some(Instant::now() + Duration::from_millis(lease_ms));
                    self.link.send(|o| o.control(Control::Pulse { nonce }));
                    for worker in state.workers.values() {
                        worker.link.send(|o| o.control(Control::Heartbeat { nonce, lease_ms }));
                    }
                }
                Event::Control(Control::Acknowledge(ids)) => {
                    for id in ids {
                        state.early.remove(&id);
                        if let Some(message) = state.kept.remove(&id) {
                            state.kept_bytes -= message.size();
                        }
                    }
                    self.send_backlog(state);
                }
                Event::Control(Control::Cancel(id)) => match state.queue.cancel(id.task) {
                    Cancelled::Dropped => {
                        self.deliver(state, Message::cancelled(id));
                    }
                    Cancelled::Held(worker) => state.tell(worker, Control::Cancel(id)),
                    Cancelled::Unknown => {
                        state.early.insert(id);
                    }
                },
                Event::Control(Control::Recall(id)) => match state.queue.give_up(id.task) {
                    Cancelled::Dropped => self.link.send(|o| o.control(Control::Returned(id))),
                    Cancelled::Held(worker) => {
                        state.recalled.insert(id);
                        state.tell(worker, Control::Recall(id));
                    }
                    Cancelled::Unknown => self.link.send(|o| o.control(Control::Kept(id))),
                },
                Event::Control(Control::Goodbye(_)) => {
                    state.ending.get_or_insert_with(|| "goodbye".to_owned());
                }
                Event::Control(_) | Event::Message(..) => {}
            }
        }
        self.pump(state);
    }

    fn on_worker(&self, id: PeerId, events: &mut Vec<Event>) {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let now = Instant::now();
        for event in events.drain(..) {
            match event {
                Event::Message(Body::Result, result) => {
                    if state.queue.done(id, result.id, now) {
                        state.recalled.remove(&result.id);
                        self.deliver(state, result);
                    }
                }
                Event::Control(Control::Hello(_)) => {
                    state.false_starts = 0;
                    state.queue.add_peer(id, self.shape().1, now);
                    if let Some(worker) = state.workers.get_mut(&id) {
                        worker.ready = true;
                    }
                    if !state.announced && state.workers.values().all(|w| w.ready) {
                        state.announced = true;
                        let slots = state.queue.slots() as u64;
                        self.link.send(|o| o.control(Control::Ready { slots }));
                    }
                }
                Event::Control(Control::Returned(task)) => {
                    if state.recalled.remove(&task) {
                        if state.queue.holds(id, task) {
                            state.queue.remove(task.task);
                            self.link.send(|o| o.control(Control::Returned(task)));
                        }
                    } else {
                        state.queue.returned(id, task);
                    }
                }
                Event::Control(Control::Kept(task)) => {
                    state.queue.kept(id, task);
                    if state.recalled.remove(&task) {
                        self.link.send(|o| o.control(Control::Kept(task)));
                    }
                }
                Event::Control(_) | Event::Message(..) => {}
            }
        }
        self.pump(state);
    }

    /// Send a result, or keep it back until there is credit. One result may always be on its way.
    fn deliver(&self, state: &mut State, result: Message) {
        if state.backlog.is_empty() && state.has_credit(result.size()) {
            self.send_result(state, result);
        } else {
            state.backlog_bytes += result.size();
            state.backlog.push_back(result);
        }
    }

    fn send_result(&self, state: &mut State, result: Message) {
        state.kept_bytes += result.size();
        state.kept.insert(result.id, result.clone());
        self.link.send(|o| o.message(Body::Result, result));
    }

    fn send_backlog(&self, state: &mut State) {
        while let Some(result) = state.backlog.pop_front() {
            if !state.has_credit(result.size()) {
                state.backlog.push_front(result);
                break;
            }
            state.backlog_bytes -= result.size();
            self.send_result(state, result);
        }
        if state.backlog_bytes <= BACKLOG {
            self.relief.notify_waiters();
        }
    }

    // ------------------------------------------------------------------------------------------------ workers

    fn start_worker(self: &Arc<Self>) -> Result<(), AgentError> {
        let (ours, theirs) = StdUnixStream::pair().map_err(AgentError::Spawn)?;
        ours.set_nonblocking(true).map_err(AgentError::Spawn)?;
        let ours = UnixStream::from_std(ours).map_err(AgentError::Spawn)?;
        let (program, arguments) =
            self.spec.worker.split_first().ok_or_else(|| AgentError::Refused("no worker command".to_owned()))?;
        let slots = self.shape().1;
        let threads = (self.cores / self.work.concurrency.unwrap_or(self.cores).max(1)).max(1).to_string();
        let child = Command::new(program)
            .args(arguments)
            .envs(THREAD_VARIABLES.iter().filter(|v| std::env::var_os(v).is_none()).map(|v| (*v, &threads)))
            .envs(&self.work.env)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            // A group of its own: it can be ended with all that it started, and Ctrl-C at a terminal is not its.
            .process_group(0)
            .spawn()
            .map_err(AgentError::Spawn)?;
        let link = Arc::new(Link::default());
        let setup = hello(&WorkerHello {
            slots,
            processes: self.work.processes,
            lease_ms: self.lease_ms,
            sys_path: self.work.sys_path.clone(),
            preload: self.work.preload.clone(),
            max_payload: self.work.max_payload,
        })?;
        link.send(|o| o.control(setup));
        let pid = child.id().unwrap_or_default();
        let id = {
            let mut state = lock(&self.state);
            state.started += 1;
            let id = state.started;
            state.workers.insert(id, WorkerPeer { link: Arc::clone(&link), pid, ready: false });
            id
        };
        tokio::spawn(Arc::clone(self).tend(id, child, ours, link));
        Ok(())
    }

    /// Follow one worker from its first byte to its exit status.
    async fn tend(self: Arc<Self>, id: PeerId, mut child: Child, socket: UnixStream, link: Arc<Link>) {
        let pid = child.id().unwrap_or_default();
        let (from, to) = socket.into_split();
        let reading = async {
            let mut source = Source::new(from, usize::MAX);
            let mut events = Vec::new();
            while source.read(&mut events).await.is_ok() {
                self.on_worker(id, &mut events);
                while lock(&self.state).backlog_bytes > BACKLOG {
                    // The tick is for a relief between the look and the wait.
                    drop(tokio::time::timeout(TICK, self.relief.notified()).await);
                }
            }
        };
        tokio::pin!(reading);
        let mut all_read = false;
        let early = tokio::select! {
            () = &mut reading => {
                all_read = true;
                None
            }
            // A write that fails or blocks for too long: the process is dead or stopped.
            _ = link.run(to, Some(SUSPECT)) => None,
            // Its end of the socket may live on in a process that a task forked.
            status = child.wait() => Some(status),
        };
        // With the group the last copies of that end are closed; what it still sent can be read to the end.
        kill_group(pid);
        if !all_read {
            drop(tokio::time::timeout(LAST_WORDS, reading).await);
        }
        let status = match early {
            Some(status) => Ok(status),
            None => tokio::time::timeout(LAST_WORDS, child.wait()).await,
        };
        self.worker_ended(id, pid, status.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())));
    }

    fn worker_ended(self: &Arc<Self>, id: PeerId, pid: u32, status: io::Result<ExitStatus>) {
        let how = describe(status);
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let Some(worker) = state.workers.remove(&id) else { return };
        if state.over {
            return;
        }
        // The first tasks of a worker's order, as many as it has slots, may have been running; what came later waits
        // in its queue and runs elsewhere.
        let slots = self.shape().1;
        for (place, task) in state.queue.remove_peer(id).into_iter().enumerate().rev() {
            if place >= slots {
                state.queue.requeue(task);
            } else if let Some(message) = state.queue.remove(task) {
                state.recalled.remove(&message.id);
                let text = format!("worker process {pid} {how}");
                self.deliver(state, Message::text(message.id, Tag::Crashed, text));
            }
        }
        if !worker.ready {
            state.false_starts += 1;
        }
        let hopeless = state.false_starts >= FALSE_STARTS;
        drop(guard);
        if hopeless {
            self.end(format!("{FALSE_STARTS} workers in a row ended before they were ready; the last one {how}"));
        } else if let Err(e) = self.start_worker() {
            self.end(e.to_string());
        }
        self.pump(&mut lock(&self.state));
    }

    /// Kill all workers and what they started; no new ones are started from now on.
    fn kill_workers(&self) {
        let mut state = lock(&self.state);
        state.over = true;
        for worker in state.workers.values() {
            kill_group(worker.pid);
        }
    }

    /// Wait until the killed workers have been waited for, so that none is left as a zombie.
    async fn reap_workers(&self) {
        let gone = async {
            while !lock(&self.state).workers.is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        drop(tokio::time::timeout(LAST_WORDS, gone).await);
    }
}

impl State {
    fn has_credit(&self, size: usize) -> bool {
        self.kept_bytes == 0 || self.kept_bytes.saturating_add(size) <= CREDIT
    }

    /// Send waiting tasks to workers with room, or ask some back for idle ones.
    fn pump(&mut self) {
        while let Some((worker, task)) = self.queue.assign() {
            if let Some(worker) = self.workers.get(&worker) {
                worker.link.send(|o| o.message(Body::Task, task));
            }
        }
        let now = Instant::now();
        while let Some((worker, id)) = self.queue.steal(now) {
            self.tell(worker, Control::Recall(id));
        }
    }

    fn tell(&self, worker: PeerId, control: Control) {
        if let Some(worker) = self.workers.get(&worker) {
            worker.link.send(|o| o.control(control));
        }
    }
}

fn kill_group(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().filter(|p| *p > 1).and_then(Pid::from_raw) {
        // Gone already: fine.
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

fn describe(status: io::Result<ExitStatus>) -> String {
    match status.map(|s| (s.signal(), s.code())) {
        Ok((Some(signal), _)) => format!("was killed by signal {signal}{}", name(signal)),
        Ok((None, Some(code))) => format!("exited with status {code}"),
        Ok((None, None)) => "ended".to_owned(),
        Err(e) => format!("ended, its exit status is unknown: {e}"),
    }
}

fn name(signal: i32) -> &'static str {
    match signal {
        4 => " (SIGILL)",
        6 => " (SIGABRT)",
        7 => " (SIGBUS)",
        8 => " (SIGFPE)",
        9 => " (SIGKILL; the kernel's out-of-memory killer uses it too)",
        11 => " (SIGSEGV)",
        15 => " (SIGTERM)",
        _ => "",
    }
}
