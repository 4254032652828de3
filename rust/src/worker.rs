//! The worker process's side of a session: three threads that never need the GIL.
//!
//! A reader fills the queue of tasks, a writer sends results, a watchdog ends the whole process group when the agent
//! is gone or the lease is over. The threads that run user code take from the queue with [`Worker::next`] and hand
//! in with [`Worker::finish`]. A thread that finishes takes its next task without anybody's help; an idle one is
//! woken only when there is something to take, one at a time, each waking the next.

use std::collections::{HashSet, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::SessionError;
use crate::frame::{Body, Control, Decoder, Event, Message};
use crate::session::{Outbox, WorkerHello, hello, lock, read_hello};

/// Bytes of results that wait to be sent before a finishing thread has to wait itself.
const BACKLOG: usize = 64 * 1024 * 1024;
/// Bytes per read of the agent's socket.
const READ: usize = 256 * 1024;
/// How often the watchdog looks at the clock.
const WATCH: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
struct Tasks {
    queue: VecDeque<Message>,
    /// Cancelled, but not in the queue: they have not arrived (control frames overtake messages), or are running and
    /// leave this set when they finish.
    early: HashSet<u64>,
    idle: usize,
}

#[derive(Debug)]
struct Shared {
    tasks: Mutex<Tasks>,
    task_ready: Condvar,
    results: Mutex<Outbox>,
    result_ready: Condvar,
    result_sent: Condvar,
    lease: Mutex<Instant>,
}

/// The runtime of one worker process.
#[derive(Debug, Clone)]
pub struct Worker {
    shared: Arc<Shared>,
}

/// End this process group, children and grandchildren included. There is nobody left to report to.
fn end_group() -> ! {
    let _ = rustix::process::kill_current_process_group(rustix::process::Signal::KILL);
    std::process::exit(1);
}

impl Worker {
    /// Greet the agent on `socket` and start the three threads. This process must lead its own process group, which
    /// is killed when the agent ends.
    ///
    /// # Errors
    /// [`SessionError`] if the agent is not there or does not speak our protocol.
    pub fn start(socket: UnixStream) -> Result<(Self, WorkerHello), SessionError> {
        let mut inlet =
            Inlet { socket: socket.try_clone()?, decoder: Decoder::new(usize::MAX), scratch: vec![0; READ] };
        let greeting = inlet.next()?;
        let Event::Control(Control::Hello(body)) = greeting else {
            return Err(SessionError::BadHello(format!("the agent began with {greeting:?}")));
        };
        let setup: WorkerHello = read_hello(&body)?;
        let shared = Arc::new(Shared {
            tasks: Mutex::default(),
            task_ready: Condvar::new(),
            results: Mutex::default(),
            result_ready: Condvar::new(),
            result_sent: Condvar::new(),
            lease: Mutex::new(Instant::now() + Duration::from_millis(setup.lease_ms)),
        });
        let worker = Self { shared };
        let (reader, writer, watchdog) = (worker.clone(), worker.clone(), worker.clone());
        let spawn = |name: &str| thread::Builder::new().name(name.to_owned());
        spawn("skyward-reader").spawn(move || {
            drop(reader.read(inlet));
            end_group();
        })?;
        spawn("skyward-writer").spawn(move || {
            drop(writer.write(socket));
            end_group();
        })?;
        spawn("skyward-watchdog").spawn(move || watchdog.watch())?;
        Ok((worker, setup))
    }

    /// Tell the agent that the process takes tasks now.
    ///
    /// # Errors
    /// [`SessionError::BadHello`] never in practice: the hello is a constant.
    pub fn ready(&self) -> Result<(), SessionError> {
        let control = hello(&std::process::id())?;
        lock(&self.shared.results).control(control);
        self.shared.result_ready.notify_one();
        Ok(())
    }

    /// The next task if there is one, without waiting.
    #[must_use]
    pub fn try_next(&self) -> Option<Message> {
        let mut tasks = lock(&self.shared.tasks);
        let task = tasks.queue.pop_front()?;
        self.wake_another(&tasks);
        Some(task)
    }

    /// The next task, waiting at most `bound`.
    #[must_use]
    pub fn next(&self, bound: Duration) -> Option<Message> {
        let mut tasks = lock(&self.shared.tasks);
        tasks.idle += 1;
        let (mut tasks, _) = self
            .shared
            .task_ready
            .wait_timeout_while(tasks, bound, |t| t.queue.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        tasks.idle -= 1;
        let task = tasks.queue.pop_front()?;
        self.wake_another(&tasks);
        Some(task)
    }

    fn wake_another(&self, tasks: &Tasks) {
        if tasks.idle > 0 && !tasks.queue.is_empty() {
            self.shared.task_ready.notify_one();
        }
    }

    /// Hand in a result. Waits while more than 64 MiB of earlier ones are unsent.
    pub fn finish(&self, message: Message) {
        lock(&self.shared.tasks).early.remove(&message.id.task);
        let mut results = lock(&self.shared.results);
        while results.bytes() > BACKLOG {
            results = self.shared.result_sent.wait(results).unwrap_or_else(PoisonError::into_inner);
        }
        self.report(results, message);
    }

    fn report(&self, mut results: MutexGuard<'_, Outbox>, message: Message) {
        let quiet = results.is_empty();
        results.message(Body::Result, message);
        drop(results);
        if quiet {
            self.shared.result_ready.notify_one();
        }
    }

    /// Whether [`Worker::finish`] would return at once.
    #[must_use]
    pub fn has_room(&self) -> bool {
        lock(&self.shared.results).bytes() <= BACKLOG
    }

    fn read(&self, mut inlet: Inlet) -> Result<(), SessionError> {
        loop {
            match inlet.next()? {
                Event::Message(Body::Task, task) => {
                    let mut tasks = lock(&self.shared.tasks);
                    if tasks.early.remove(&task.id.task) {
                        drop(tasks);
                        self.report(lock(&self.shared.results), Message::cancelled(task.id));
                        continue;
                    }
                    tasks.queue.push_back(task);
                    // One is enough: whoever takes a task wakes the next while there are more.
                    if tasks.queue.len() == 1 && tasks.idle > 0 {
                        self.shared.task_ready.notify_one();
                    }
                }
                Event::Control(Control::Heartbeat { lease_ms, .. }) => {
                    *lock(&self.shared.lease) = Instant::now() + Duration::from_millis(lease_ms);
                }
                Event::Control(Control::Cancel(id)) => {
                    if self.unqueue(id.task) {
                        self.report(lock(&self.shared.results), Message::cancelled(id));
                    } else {
                        lock(&self.shared.tasks).early.insert(id.task);
                    }
                }
                Event::Control(Control::Recall(id)) => {
                    let answer = if self.unqueue(id.task) { Control::Returned(id) } else { Control::Kept(id) };
                    lock(&self.shared.results).control(answer);
                    self.shared.result_ready.notify_one();
                }
                Event::Control(Control::Goodbye(_)) => return Ok(()),
                Event::Control(_) | Event::Message(..) => {}
            }
        }
    }

    fn unqueue(&self, task: u64) -> bool {
        let mut tasks = lock(&self.shared.tasks);
        let at = tasks.queue.iter().rposition(|m| m.id.task == task);
        at.and_then(|at| tasks.queue.remove(at)).is_some()
    }

    fn write(&self, mut socket: UnixStream) -> Result<(), SessionError> {
        let mut out = Vec::new();
        loop {
            out.clear();
            {
                let results = lock(&self.shared.results);
                let mut results = self
                    .shared
                    .result_ready
                    .wait_while(results, |r| r.is_empty())
                    .unwrap_or_else(PoisonError::into_inner);
                results.fill(&mut out)?;
                if results.bytes() <= BACKLOG {
                    self.shared.result_sent.notify_all();
                }
            }
            socket.write_all(&out)?;
        }
    }

    fn watch(&self) {
        loop {
            let left = lock(&self.shared.lease).saturating_duration_since(Instant::now());
            if left.is_zero() {
                end_group();
            }
            thread::sleep(left.min(WATCH));
        }
    }
}

struct Inlet {
    socket: UnixStream,
    decoder: Decoder,
    scratch: Vec<u8>,
}

impl Inlet {
    /// Wait for the next event.
    fn next(&mut self) -> Result<Event, SessionError> {
        loop {
            if let Some(event) = self.decoder.next()? {
                return Ok(event);
            }
            match self.socket.read(&mut self.scratch) {
                Ok(0) => return Err(SessionError::Ended(String::new())),
                Ok(n) => self.decoder.buffer().extend_from_slice(self.scratch.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}
