//! The worker processes themselves: started, followed from their first byte to their exit status, and ended with all that
//! they have started. What is to become of them is decided in `state.rs`.
//!
//! What a worker writes to its standard output and standard error goes to the client by way of `stdio.rs`.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::info;

use crate::error::{AgentError, FrameError, SessionError};
use crate::locks::lock;
use crate::node::actions::Exit;
use crate::node::descriptors::{DescriptorReader, DescriptorWriter, Outgoing};
use crate::node::exit::{OomCounter, describe_exit, describe_stderr};
use crate::node::handover::Handover;
use crate::node::limits::restore_open_files;
use crate::node::memory_file::SharedFile;
use crate::node::process_group::{Adopted, Group, PAUSE, Survivors};
use crate::node::slot_table::SlotTable;
use crate::node::stdio::{self, forward};
use crate::queue::PeerId;
use crate::timing::{LEAST_MESSAGE, PEER_TIMEOUT, Timing};
use crate::wire::{Attempt, Body, Control, Event, Message, Offer, WorkerHello};
use crate::wire::{EventReader, FrameSender, STDERR, STDOUT, hello};

/// How long the exit status of a worker is awaited that was killed, and the rest of what it had sent.
pub const EXIT_TIMEOUT: Duration = Timing::DEFAULT.worker_kill;
/// The directory in the agent's own one in which its workers run: see `node/directories.py`.
const WORK_DIRECTORY: &str = "work";
/// How long output is awaited after the worker's end: a process outside of its group may hold the pipe.
const LAST_OUTPUT_TIMEOUT: Duration = Duration::from_millis(200);
/// Variables that limit the threads of the numeric libraries, which each take all cores by themselves.
const THREAD_VARIABLES: [&str; 7] = [
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
];

/// The part that hears what the worker processes send, and that they ended: the agent.
pub trait Observer: Send + Sync + 'static {
    /// Return whether a worker's message is to be stored, now that its first chunk is here.
    fn admit(&self, worker: PeerId, offer: &Offer) -> Result<bool, FrameError>;
    /// Take what a worker sent, and empty the buffer.
    fn on_events(self: &Arc<Self>, worker: PeerId, events: &mut Vec<Event>);
    /// Return whether the workers are not to be read from for now.
    fn is_full(&self) -> bool;
    /// Return what is notified when the workers are to be read from again.
    fn backlog_drained(&self) -> &Notify;
    /// Note that a worker's process has ended. All that it had sent went to `on_events` before.
    fn on_exit(self: &Arc<Self>, worker: PeerId, status: io::Result<ExitStatus>, unreadable: Option<&FrameError>);
}

/// One worker process.
struct Process {
    pid: u32,
    group: Group,
    link: Arc<FrameSender>,
    /// The descriptors that are to be sent to it.
    descriptors: Arc<Outgoing<SharedFile>>,
    table: SlotTable,
    /// The end of its standard error, written by the task that forwards it.
    stderr_tail: Arc<Mutex<Vec<u8>>>,
}

/// All worker processes that live, and how others are started.
pub struct Supervisor {
    /// The program that a worker is, and its arguments.
    program: Vec<String>,
    /// What each worker is greeted with.
    greeting: WorkerHello,
    /// Threads of a numeric library in one worker: the cores, divided among the tasks.
    threads: String,
    /// Where the workers' output goes.
    client: Arc<FrameSender>,
    processes: HashMap<PeerId, Process>,
    pub adopted: Adopted,
    oom: OomCounter,
}

impl Supervisor {
    /// `threads`: how many threads each numeric library of a worker may use.
    pub fn new(program: Vec<String>, greeting: WorkerHello, threads: usize, client: Arc<FrameSender>) -> Self {
        let threads = threads.to_string();
        Self {
            program,
            greeting,
            threads,
            client,
            processes: HashMap::new(),
            adopted: Adopted::default(),
            oom: OomCounter::new(),
        }
    }

    /// Return the command that starts a worker, whose end of the socket this is.
    fn command(&self, socket: StdUnixStream) -> Result<Command, AgentError> {
        let (program, arguments) =
            self.program.split_first().ok_or_else(|| AgentError::Refused("no worker command".to_owned()))?;
        let unlimited = THREAD_VARIABLES.iter().filter(|variable| std::env::var_os(variable).is_none());
        let mut command = Command::new(program);
        command
            .args(arguments)
            .envs(unlimited.map(|variable| (*variable, &self.threads)))
            .envs(&self.greeting.work.env)
            .stdin(Stdio::from(OwnedFd::from(socket)))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A group of its own: it can be ended with all that it started, and Ctrl-C at a terminal is not its.
            .process_group(0);
        let directory = Path::new(&self.greeting.directory).join(WORK_DIRECTORY);
        // It may have been removed by hand.
        if !self.greeting.directory.is_empty() && directory.is_dir() {
            command.current_dir(directory);
        }
        Ok(command)
    }

    /// Start a worker of this generation, which may go on for `lease` if it hears nothing, and whose observer hears what
    /// becomes of it.
    pub fn start<O: Observer>(
        &mut self,
        id: PeerId,
        lease: Duration,
        generation: u32,
        observer: Arc<O>,
    ) -> Result<(), AgentError> {
        let (ours, theirs) = StdUnixStream::pair().map_err(AgentError::Spawn)?;
        let table = SlotTable::new().map_err(AgentError::Spawn)?;
        table.send(&ours).map_err(AgentError::Spawn)?;
        ours.set_nonblocking(true).map_err(AgentError::Spawn)?;
        let socket = UnixStream::from_std(ours).map_err(AgentError::Spawn)?;
        let mut child = self.command(theirs)?.spawn().map_err(AgentError::Spawn)?;
        let pid = child.id().unwrap_or_default();
        restore_open_files(pid);
        let group = Group::of(pid);
        let link = Arc::new(FrameSender::default());
        let descriptors = Arc::<Outgoing<SharedFile>>::default();
        self.greeting.generation = generation;
        self.greeting.number = u32::try_from(id).unwrap_or(u32::MAX);
        let greeting = hello(&self.greeting)?;
        link.send(|o| o.control(greeting));
        // The hello has a whole lease, of which a part may be over.
        let lease_ms = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
        link.send(|o| o.control(Control::Heartbeat { nonce: 0, lease_ms, echo: 0 }));
        let stderr_tail = Arc::<Mutex<Vec<u8>>>::default();
        let mut forwarding = JoinSet::new();
        if let Some(stdout) = child.stdout.take() {
            forwarding.spawn(forward(stdout, stdio::stream(id, STDOUT), Arc::clone(&self.client), None));
        }
        if let Some(stderr) = child.stderr.take() {
            let tail = Some(Arc::clone(&stderr_tail));
            forwarding.spawn(forward(stderr, stdio::stream(id, STDERR), Arc::clone(&self.client), tail));
        }
        info!(worker = id, pid, "worker started");
        let started = Started {
            id,
            child,
            group,
            socket,
            link: Arc::clone(&link),
            descriptors: Arc::clone(&descriptors),
            forwarding,
            max_message: self.greeting.work.max_payload.max(LEAST_MESSAGE),
        };
        self.processes.insert(id, Process { pid, group, link, descriptors, table, stderr_tail });
        tokio::spawn(started.follow(observer));
        Ok(())
    }

    /// Send a worker a task.
    pub fn assign(&self, worker: PeerId, task: Message) {
        if let Some(process) = self.processes.get(&worker) {
            process.link.send(|o| o.message(Body::Task, task));
        }
    }

    /// Send a worker what a note of its asked for.
    pub fn answer(&self, worker: PeerId, answer: Message) {
        if let Some(process) = self.processes.get(&worker) {
            process.link.send(|o| o.message(Body::Answer, answer));
        }
    }

    /// Send a worker the descriptor of a blob, ahead of all tasks that were not sent yet.
    pub fn pass(&self, worker: PeerId, number: u64, file: &Arc<SharedFile>) {
        if let Some(process) = self.processes.get(&worker) {
            process.descriptors.push(Arc::clone(file));
            let size = file.size() as u64;
            process.link.send(|o| o.control(Control::Descriptor { number, size }));
        }
    }

    /// Send a worker a control frame.
    pub fn tell(&self, worker: PeerId, control: Control) {
        if let Some(process) = self.processes.get(&worker) {
            process.link.send(|o| o.control(control));
        }
    }

    /// Kill a worker. All that it has started follows it, see [`Started::follow`].
    pub fn kill(&self, worker: PeerId) {
        if let Some(process) = self.processes.get(&worker) {
            process.group.kill_leader();
        }
    }

    /// Kill all that is left of all workers, without waiting for it.
    pub fn kill_groups(&self) {
        self.processes.values().for_each(|process| process.group.kill());
        Adopted::end_all();
    }

    /// Return whether no process is left.
    pub fn is_empty(&self) -> bool {
        self.processes.is_empty()
    }

    /// Return which tasks a worker runs, and for how long.
    pub fn running(&self, worker: PeerId) -> Vec<(Attempt, Duration)> {
        self.processes.get(&worker).map(|process| process.table.running(self.greeting.slots)).unwrap_or_default()
    }

    /// Forget a process that has ended. Returns how it ended, if `is_asked`; else nothing is looked up.
    pub fn remove(
        &mut self,
        worker: PeerId,
        is_asked: bool,
        status: io::Result<ExitStatus>,
        unreadable: Option<&FrameError>,
    ) -> Exit {
        self.adopted.hurry();
        let Some(process) = self.processes.remove(&worker).filter(|_| is_asked) else { return Exit::default() };
        Exit {
            pid: process.pid,
            // A process that was ended for what it sent did not die for want of memory: the kernel's kill was another one's.
            how: if unreadable.is_none() { describe_exit(status, &mut self.oom) } else { String::new() },
            stderr_tail: describe_stderr(&lock(&process.stderr_tail)),
            unreadable: unreadable.map(ToString::to_string),
            running: process.table.running(self.greeting.slots),
        }
    }
}

/// A process that was just started, with all that belongs to it.
struct Started {
    id: PeerId,
    child: Child,
    group: Group,
    socket: UnixStream,
    link: Arc<FrameSender>,
    descriptors: Arc<Outgoing<SharedFile>>,
    /// Send its output on.
    forwarding: JoinSet<()>,
    /// Bytes of the largest message that it may send.
    max_message: usize,
}

impl Started {
    /// Follow one worker from its first byte to its exit status.
    async fn follow<O: Observer>(mut self, observer: Arc<O>) {
        let (from, to) = self.socket.into_split();
        let from = DescriptorReader::new(from);
        let handover = Handover::new(from.received(), self.max_message);
        let to = DescriptorWriter::new(to, self.descriptors);
        let reading = read(self.id, EventReader::new(from, self.max_message), handover, &self.link, &observer);
        tokio::pin!(reading);
        let mut all_read = false;
        let mut unreadable = None;
        let exited = tokio::select! {
            end = &mut reading => {
                all_read = true;
                unreadable = end;
                None
            }
            // A write that fails or blocks for too long: the process is dead or stopped.
            _ = self.link.run(to, Some(PEER_TIMEOUT)) => None,
            // Its end of the socket may live on in a process that a task forked.
            status = self.child.wait() => Some(status),
        };
        let status = if let Some(status) = exited {
            status
        } else {
            self.group.kill_leader();
            let ended = tokio::time::timeout(EXIT_TIMEOUT, self.child.wait()).await;
            ended.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        };
        // With the group the last copies of that end are closed; what it still sent can be read to the end.
        end_group(&self.group).await;
        if !all_read {
            drop(tokio::time::timeout(EXIT_TIMEOUT, reading).await);
        }
        let written = async { while self.forwarding.join_next().await.is_some() {} };
        drop(tokio::time::timeout(LAST_OUTPUT_TIMEOUT, written).await);
        info!(worker = self.id, ?status, "worker ended");
        observer.on_exit(self.id, status, unreadable.as_ref());
    }
}

/// Hand on what a worker sends until it ends. Returns what came instead of our protocol, if that is why it ends.
async fn read<O: Observer>(
    id: PeerId,
    mut reader: EventReader<DescriptorReader>,
    mut handover: Handover,
    link: &FrameSender,
    observer: &Arc<O>,
) -> Option<FrameError> {
    let mut events = Vec::new();
    loop {
        let mut read = reader.read_admitted(&mut events, |offer| observer.admit(id, offer)).await;
        let before = handover.bytes;
        if let Err(unreadable) = handover.resolve(&mut events) {
            read = Err(SessionError::Frame(unreadable));
        }
        if handover.bytes > before {
            link.send(|o| o.received(handover.bytes));
        }
        match read {
            Err(SessionError::Frame(unreadable)) => {
                // Results that came before count, and their tasks are not blamed.
                observer.on_events(id, &mut events);
                return Some(unreadable);
            }
            Err(_) => return None,
            Ok(()) => observer.on_events(id, &mut events),
        }
        while observer.is_full() {
            // From here on no notice is missed. One that came before shows at the second look.
            let drained = observer.backlog_drained().notified();
            if observer.is_full() {
                drained.await;
            }
        }
    }
}

/// End what a worker has started, now that it has ended.
async fn end_group(group: &Group) {
    let begun = Instant::now();
    loop {
        let left = group.sweep();
        if left == Survivors::Nothing {
            return;
        }
        if begun.elapsed() >= left.bound() {
            group.kill();
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}
