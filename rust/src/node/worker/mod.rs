//! The worker process's side of a session: three threads that never need the GIL.
//!
//! A reader fills the queue of tasks, a writer sends results, a watchdog ends the whole process group when the agent
//! is gone or the lease is over. The threads that run user code take from the queue with [`Worker::next`] and hand
//! in with [`Worker::finish`].
//!
//! | file | what it promises |
//! |---|---|
//! | `task_queue.rs` | tasks that wait, and which threads take them |
//! | `result_sender.rs` | results that travel together, and answers that never wait |
//! | `notes.rs` | what tasks tell the client while they run |
//! | `socket_reader.rs` | events from the agent's socket |
//! | `blobs.rs` | the data that tasks share, mapped for each of them |

pub mod blobs;
mod notes;
mod result_sender;
mod socket_reader;
mod task_queue;

use std::cell::Cell;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;

use self::blobs::{BlobTable, Task};
pub use self::notes::NoteAnswer;
use self::notes::Notes;
pub use self::result_sender::Answer;
use self::result_sender::{ResultSender, Unsent};
use self::socket_reader::SocketReader;
use self::task_queue::{Found, TaskQueue};
use crate::error::SessionError;
use crate::node::lease::Lease;
use crate::node::process_group::{Group, PAUSE, Survivors};
use crate::node::slot_table::SlotTable;
use crate::timing::{HEARTBEAT, Timing};
use crate::wire::{Attempt, Body, Control, Event, Message, Outbox, Outcome, WorkerHello, hello, read_hello};

/// How often the watchdog looks at the clock, at least.
const WATCHDOG_PERIOD: Duration = Duration::from_millis(500);
/// How long a worker that was told to end may take: for the plugins' contexts, threads that are no daemons, `atexit`
/// callbacks and finalizers, all together.
const EXIT_LEASE: Duration = Timing::DEFAULT.worker_exit;

thread_local! {
    /// The task that this thread took last; 0 for a thread that takes none.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

#[derive(Debug)]
struct Shared {
    /// Tasks have a time limit.
    timed: bool,
    tasks: TaskQueue,
    results: ResultSender,
    notes: Notes,
    /// The watchdog ends this process when it is over. Each heartbeat of the agent sets it anew.
    lease: Lease,
    /// What each slot runs, for the agent to read.
    table: SlotTable,
}

/// The runtime of one worker process.
#[derive(Debug, Clone)]
pub struct Worker {
    shared: Arc<Shared>,
}

/// End this process and all that its tasks have started. There is no peer left to report to.
fn end_group() -> ! {
    let group = Group::own();
    let begun = Instant::now();
    while group.sweep() == Survivors::Others {
        if begun.elapsed() >= Survivors::Others.bound() {
            group.kill();
        }
        thread::sleep(PAUSE);
    }
    group.end_with_trackers()
}

/// Write to standard error why this process ends, for the error that names its death. If the agent is gone, nobody reads
/// it.
fn explain(result: Result<(), SessionError>) {
    let text = match result {
        Err(SessionError::Io(error)) => {
            format!("this worker lost the connection to its agent, did a task close it? {error}")
        }
        Err(SessionError::Frame(error)) => format!("this worker cannot go on: {error}"),
        _ => return,
    };
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Ends the process group with the thread that holds it, however that ends.
struct EndGroup;

impl Drop for EndGroup {
    fn drop(&mut self) {
        end_group();
    }
}

impl Worker {
    /// Greet the agent on `socket` and start the three threads. This process must lead its own process group, which
    /// is killed when the agent ends.
    ///
    /// # Errors
    /// [`SessionError`] if the agent is not there or does not speak our protocol.
    pub fn start(socket: UnixStream) -> Result<(Self, WorkerHello), SessionError> {
        // Where memory runs out, tasks are to be ended before the agent.
        #[cfg(target_os = "linux")]
        drop(std::fs::write("/proc/self/oom_score_adj", "500"));
        // A worker that is stopped when its agent ends goes on, and its watchdog ends it.
        #[cfg(target_os = "linux")]
        let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::CONT));
        let table = SlotTable::receive(&socket)?;
        let mut reader = SocketReader::new(socket.try_clone()?);
        let greeting = reader.next(|| None)?;
        let Event::Control(Control::Hello(body)) = greeting else {
            return Err(SessionError::BadHello(format!("the agent began with {greeting:?}")));
        };
        let setup: WorkerHello = read_hello(&body)?;
        let shared = Arc::new(Shared {
            timed: setup.work.task_timeout_ms.is_some(),
            tasks: TaskQueue::new(setup.slots),
            results: ResultSender::default(),
            notes: Notes::default(),
            lease: Lease::new(Duration::from_millis(setup.lease_ms)),
            table,
        });
        let worker = Self { shared };
        let (reading, writing, watchdog) = (worker.clone(), worker.clone(), worker.clone());
        let spawn = |name: &str| thread::Builder::new().name(name.to_owned());
        spawn("skyward-reader").spawn(move || {
            let _end = EndGroup;
            explain(reading.read(reader));
        })?;
        spawn("skyward-writer").spawn(move || {
            let _end = EndGroup;
            explain(writing.shared.results.write(&socket));
        })?;
        spawn("skyward-watchdog").spawn(move || watchdog.watch())?;
        Ok((worker, setup))
    }

    /// Send the agent the hello, which says that the process takes tasks now.
    ///
    /// # Errors
    /// [`SessionError::BadHello`] never in practice: the hello is a constant.
    pub fn ready(&self) -> Result<(), SessionError> {
        let control = hello(&std::process::id())?;
        self.shared.results.send_now(|outbox| outbox.control(control));
        Ok(())
    }

    /// Return the next task for the thread of this slot if there is one, without waiting.
    #[must_use]
    pub fn try_next(&self, slot: usize) -> Option<Task> {
        let task = self.shared.tasks.try_take(slot)?;
        self.begin(slot, task.id());
        Some(task)
    }

    /// Return the next task for the thread of this slot, waiting at most `bound`.
    #[must_use]
    pub fn next(&self, slot: usize, bound: Duration) -> Option<Task> {
        self.shared.table.set(slot, None);
        let task = self.shared.tasks.take(slot, bound)?;
        self.begin(slot, task.id());
        Some(task)
    }

    fn begin(&self, slot: usize, id: Attempt) {
        self.shared.table.set(slot, Some(id));
        CURRENT.set(id.task);
    }

    /// Return the task that the calling thread took last; 0 if it takes none.
    #[must_use]
    pub fn current() -> u64 {
        CURRENT.get()
    }

    /// Send a note to the client, which tells or asks it something ([`TELLS`](crate::wire::TELLS), [`ASKS`](crate::wire::ASKS)).
    /// Returns its number, to be forgotten with [`Worker::forget_note`], and where its answer comes out.
    #[must_use]
    pub fn send_note(&self, code: u8, parts: Vec<Bytes>) -> (u64, Receiver<NoteAnswer>) {
        let note = self.shared.notes.add(code, parts);
        self.send_notes(self.shared.notes.take());
        note
    }

    fn send_notes(&self, notes: Vec<Message>) {
        if !notes.is_empty() {
            let add = |outbox: &mut Outbox| notes.into_iter().for_each(|note| outbox.message(Body::Note, note));
            self.shared.results.send_now(add);
        }
    }

    /// Wait no more for the answer to a note, which is not sent if it was not.
    pub fn forget_note(&self, number: u64) {
        self.shared.notes.forget(number);
    }

    /// Count the time of the task in this slot from now on: the task goes on to the next call of a batch.
    pub fn restart(&self, slot: usize) {
        self.shared.table.restart(slot);
    }

    /// Count the time of the task in this slot no more until [`Worker::restart`]: the task waits for another task.
    pub fn pause(&self, slot: usize) {
        self.shared.table.stop(slot);
    }

    /// Return whether no task will come any more: undo the setup and end, within [`Timing::worker_exit`].
    #[must_use]
    pub fn over(&self) -> bool {
        self.shared.tasks.is_closed()
    }

    /// Hand in a result, once. Waits while more than 64 MiB of earlier ones are unsent.
    pub fn finish(&self, answer: impl Into<Answer>) {
        let answer = answer.into();
        // Whether the agent takes results in time is not this task's doing.
        if let Some(slot) = self.shared.tasks.slot(answer.message.id.task) {
            self.shared.table.stop(slot);
        }
        self.hand_in(self.shared.results.room(), answer);
    }

    /// Hand in a result, or return it where [`Worker::finish`] would wait.
    #[must_use]
    pub fn try_finish(&self, answer: Answer) -> Option<Answer> {
        match self.shared.results.try_room() {
            Some(room) => {
                self.hand_in(room, answer);
                None
            }
            None => Some(answer),
        }
    }

    fn hand_in(&self, room: MutexGuard<'_, Unsent>, answer: Answer) {
        // A task that was handed in before has ended.
        let Some((slot, waiting)) = self.shared.tasks.end(answer.message.id.task) else { return };
        if self.shared.timed {
            // What clears up behind a task, such as a result's `__del__`, has as long as the task had.
            self.shared.table.restart(slot);
        }
        self.shared.results.send_result(room, answer, waiting);
    }

    /// Send the agent the end of a task that no thread of this process has run.
    fn end_unrun(&self, result: Message) {
        self.shared.results.send_now(|outbox| outbox.message(Body::Result, result));
    }

    fn answer(&self, answer: Control) {
        self.shared.results.send_now(|outbox| outbox.control(answer));
    }

    fn read(&self, mut reader: SocketReader) -> Result<(), SessionError> {
        let mut boost = 1;
        let mut blobs = BlobTable::default();
        loop {
            match reader.next(|| self.shared.tasks.wake_idle(&mut boost))? {
                Event::Message(Body::Task, task) => {
                    let id = task.id;
                    match blobs.find(task)?.map(|task| self.shared.tasks.push(task)) {
                        Some(true) => {}
                        Some(false) => self.end_unrun(Message::cancelled(id)),
                        None => {
                            let text = "data that this task needs did not come to its worker process".to_owned();
                            self.end_unrun(Message::text(id, Outcome::Crashed, text));
                        }
                    }
                }
                Event::NoMemory(Body::Task, id, size) => {
                    let text = format!("a worker process has no memory for a task of {size} bytes");
                    self.end_unrun(Message::text(id, Outcome::Crashed, text));
                }
                Event::Message(Body::Answer, answer) => {
                    let content = answer.parts.into_iter().next().unwrap_or_default();
                    self.send_notes(self.shared.notes.answer(answer.id.task, Ok(content)));
                }
                Event::NoMemory(Body::Answer, note, size) => {
                    let text = format!("a worker process has no memory for an answer of {size} bytes");
                    self.send_notes(self.shared.notes.answer(note.task, Err(text.into())));
                }
                Event::Control(Control::Descriptor { number, size }) => {
                    blobs.add(number, size, reader.descriptor()?)?;
                }
                Event::Control(Control::Forget(numbers)) => blobs.forget(&numbers),
                Event::Control(control) => self.on_control(control),
                Event::Message(..) | Event::Chunk(_) | Event::Skipped(..) | Event::NoMemory(..) => {}
            }
        }
    }

    fn on_control(&self, control: Control) {
        match control {
            Control::Heartbeat { lease_ms, .. } => {
                self.shared.lease.renew(Duration::from_millis(lease_ms));
            }
            Control::Cancel(id) => match self.shared.tasks.cancel(id) {
                Found::Waiting => self.end_unrun(Message::cancelled(id)),
                Found::Running => self.answer(Control::RecallRefused(id)),
                Found::Nothing => {}
            },
            Control::Recall(id) => {
                let waited = self.shared.tasks.recall(id);
                self.answer(if waited { Control::GivenBack(id) } else { Control::RecallRefused(id) });
            }
            Control::Received { bytes } => self.shared.results.taken(bytes),
            Control::NoteAnswer { note, error } => {
                let answer = if error.is_empty() { Ok(error) } else { Err(error) };
                self.send_notes(self.shared.notes.answer(note, answer));
            }
            Control::Goodbye(_) => {
                self.shared.lease.renew(EXIT_LEASE);
                self.shared.tasks.close();
            }
            _ => {}
        }
    }

    /// Send the agent heartbeats, and end the process group when the lease is over.
    fn watch(&self) {
        let mut told = Instant::now();
        loop {
            if told.elapsed() >= HEARTBEAT {
                told = Instant::now();
                self.answer(Control::Heartbeat { nonce: 0, lease_ms: 0, echo: 0 });
            }
            let left = self.shared.lease.left();
            if left.is_zero() {
                end_group();
            }
            thread::sleep(left.min(WATCHDOG_PERIOD));
        }
    }
}
