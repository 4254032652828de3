//! The worker process's side of a session: three threads that never need the GIL.
//!
//! A reader fills the queue of tasks, a writer sends results, a watchdog ends the whole process group when the agent
//! is gone or the lease is over. The threads that run user code take from the queue with [`Worker::next`] and hand
//! in with [`Worker::finish`]. A thread that finishes takes its next task without anybody's help; an idle one is
//! woken only when more tasks wait than the running ones get to.

use std::cell::Cell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::error::SessionError;
use crate::node::process_group::{Group, PAUSE, Survivors};
use crate::node::slot_table::SlotTable;
use crate::timing::{Timing, WORKER_BACKLOG};
use crate::wire::{Attempt, Body, Control, Decoder, Event, Message, Outcome};
use crate::wire::{HEARTBEAT, NOTE_CREDIT, Outbox, WorkerHello, hello, lock, read_hello};

/// Bytes of results that wait to be sent before a finishing thread has to wait itself.
const BACKLOG: usize = WORKER_BACKLOG;
/// How long the result of a short task may wait for the next one's while more tasks are queued.
const LINGER: Duration = Duration::from_micros(300);
/// Nanoseconds up to which a task is short in that sense.
const SHORT: u64 = 200_000;
/// Results that are sent without waiting for more; more of them while many tasks wait.
const TOGETHER: usize = 4;
/// How long tasks may wait for a running thread before an idle one is woken.
const SPELL: Duration = Duration::from_micros(200);
/// Bytes per read of the agent's socket.
const READ: usize = 256 * 1024;
/// How often the watchdog looks at the clock.
const WATCH: Duration = Duration::from_millis(500);
/// How long a worker that was told to end may take: for the plugins' contexts, threads that are no daemons, `atexit`
/// callbacks and finalizers, all together.
pub const UNWIND: Duration = Timing::DEFAULT.worker_exit;

#[derive(Debug)]
struct Tasks {
    queue: VecDeque<Message>,
    /// What runs, and in which slot.
    running: HashMap<u64, usize>,
    /// Cancelled before they arrived: control frames overtake messages.
    early: HashSet<u64>,
    /// No task is to be taken any more.
    over: bool,
    idle: usize,
    /// Tasks taken since the reader looked, and when the last one was.
    taken: usize,
    taken_at: Instant,
}

impl Tasks {
    fn take(&mut self, slot: usize) -> Option<Message> {
        if self.over {
            return None;
        }
        let task = self.queue.pop_front()?;
        self.running.insert(task.id.task, slot);
        self.taken += 1;
        self.taken_at = Instant::now();
        Some(task)
    }
}

#[derive(Debug, Default)]
struct Results {
    outbox: Outbox,
    /// What is in the outbox must not wait for more.
    urgent: bool,
    /// How much was put into the outbox since it was empty.
    together: usize,
}

/// The notes that are not answered yet.
#[derive(Debug, Default)]
struct Notes {
    numbers: u64,
    /// Where the answers come out.
    awaited: HashMap<u64, SyncSender<Bytes>>,
    /// Beyond the credit.
    waiting: VecDeque<Message>,
    /// The memory that each takes that was sent, and the sum of it.
    sent: HashMap<u64, usize>,
    bytes: usize,
}

impl Notes {
    /// Take those for which there is credit, to be sent. One note may always be on its way.
    fn take(&mut self) -> Vec<Message> {
        let mut notes = Vec::new();
        while let Some(cost) = self.waiting.front().map(Message::cost)
            && (self.bytes == 0 || self.bytes.saturating_add(cost) <= NOTE_CREDIT)
            && let Some(note) = self.waiting.pop_front()
        {
            self.bytes += cost;
            self.sent.insert(note.id.task, cost);
            notes.push(note);
        }
        notes
    }
}

thread_local! {
    /// The task that this thread took last; 0 for a thread that takes none.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

#[derive(Debug)]
struct Shared {
    /// Threads that take tasks.
    threads: usize,
    /// Tasks have a time limit.
    timed: bool,
    tasks: Mutex<Tasks>,
    task_ready: Condvar,
    results: Mutex<Results>,
    result_ready: Condvar,
    result_sent: Condvar,
    lease: Mutex<Instant>,
    notes: Mutex<Notes>,
    table: SlotTable,
}

/// The runtime of one worker process.
#[derive(Debug, Clone)]
pub struct Worker {
    shared: Arc<Shared>,
}

/// End this process group, children and grandchildren included. There is nobody left to report to.
fn end_group() -> ! {
    let group = Group::own();
    group.kill_escaped();
    let begun = Instant::now();
    while group.sweep() == Survivors::Others {
        if begun.elapsed() >= Survivors::Others.bound() {
            group.kill();
        }
        thread::sleep(PAUSE);
    }
    group.end_with_trackers()
}

/// Say why this process ends, for the error that names its death. Where the agent is gone nobody reads it.
fn say(result: Result<(), SessionError>) {
    if let Err(SessionError::Io(error)) = result {
        let _ =
            writeln!(std::io::stderr(), "this worker lost the connection to its agent, did a task close it? {error}");
    }
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
        let table = SlotTable::receive(&socket)?;
        let mut inlet =
            Inlet { socket: socket.try_clone()?, decoder: Decoder::new(usize::MAX), scratch: vec![0; READ] };
        let greeting = inlet.next(|| None)?;
        let Event::Control(Control::Hello(body)) = greeting else {
            return Err(SessionError::BadHello(format!("the agent began with {greeting:?}")));
        };
        let setup: WorkerHello = read_hello(&body)?;
        let shared = Arc::new(Shared {
            threads: setup.slots,
            timed: setup.work.task_timeout_ms.is_some(),
            tasks: Mutex::new(Tasks {
                queue: VecDeque::new(),
                running: HashMap::new(),
                early: HashSet::new(),
                over: false,
                idle: 0,
                taken: 0,
                taken_at: Instant::now(),
            }),
            task_ready: Condvar::new(),
            results: Mutex::default(),
            result_ready: Condvar::new(),
            result_sent: Condvar::new(),
            lease: Mutex::new(Instant::now() + Duration::from_millis(setup.lease_ms)),
            notes: Mutex::default(),
            table,
        });
        let worker = Self { shared };
        let (reader, writer, watchdog) = (worker.clone(), worker.clone(), worker.clone());
        let spawn = |name: &str| thread::Builder::new().name(name.to_owned());
        spawn("skyward-reader").spawn(move || {
            let _end = EndGroup;
            say(reader.read(inlet));
        })?;
        spawn("skyward-writer").spawn(move || {
            let _end = EndGroup;
            say(writer.write(socket));
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
        self.answer(|outbox| outbox.control(control));
        Ok(())
    }

    /// The next task if there is one, without waiting, for the thread of this slot.
    #[must_use]
    pub fn try_next(&self, slot: usize) -> Option<Message> {
        let task = lock(&self.shared.tasks).take(slot)?;
        self.begin(slot, task.id);
        Some(task)
    }

    /// The next task for the thread of this slot, waiting at most `bound`.
    #[must_use]
    pub fn next(&self, slot: usize, bound: Duration) -> Option<Message> {
        self.shared.table.set(slot, None);
        let mut tasks = lock(&self.shared.tasks);
        if tasks.queue.is_empty() {
            tasks.idle += 1;
            (tasks, _) = self
                .shared
                .task_ready
                .wait_timeout_while(tasks, bound, |t| t.queue.is_empty() && !t.over)
                .unwrap_or_else(PoisonError::into_inner);
            tasks.idle -= 1;
        }
        let task = tasks.take(slot)?;
        drop(tasks);
        self.begin(slot, task.id);
        Some(task)
    }

    fn begin(&self, slot: usize, id: Attempt) {
        self.shared.table.set(slot, Some(id));
        CURRENT.set(id.task);
    }

    /// The task that the calling thread took last; 0 if it takes none.
    #[must_use]
    pub fn current() -> u64 {
        CURRENT.get()
    }

    /// Send a note to the client. Its number, to be forgotten with [`Worker::forget_note`], and where its answer comes
    /// out: nothing if it was taken, else why it was not.
    #[must_use]
    pub fn send_note(&self, parts: Vec<Bytes>) -> (u64, Receiver<Bytes>) {
        let (answered, answer) = sync_channel(1);
        let number = {
            let mut notes = lock(&self.shared.notes);
            notes.numbers += 1;
            let number = notes.numbers;
            notes.awaited.insert(number, answered);
            notes.waiting.push_back(Message { id: Attempt { task: number, attempt: 0 }, code: 0, nanos: 0, parts });
            number
        };
        self.send_notes();
        (number, answer)
    }

    /// Send the notes for which there is credit: the agent takes only so many at once.
    fn send_notes(&self) {
        let notes = lock(&self.shared.notes).take();
        if !notes.is_empty() {
            self.answer(|outbox| notes.into_iter().for_each(|note| outbox.message(Body::Note, note)));
        }
    }

    /// Wait no more for the answer to a note, which is not sent if it was not.
    pub fn forget_note(&self, number: u64) {
        let mut notes = lock(&self.shared.notes);
        notes.awaited.remove(&number);
        notes.waiting.retain(|note| note.id.task != number);
    }

    /// Let the time of what this slot runs begin anew: it goes on to the next call of a batch.
    pub fn restart(&self, slot: usize) {
        self.shared.table.restart(slot);
    }

    /// Let the time of what this slot runs count no more until it begins anew: it waits for another task.
    pub fn pause(&self, slot: usize) {
        self.shared.table.stop(slot);
    }

    /// Kill what this process's tasks have started and what has moved to a group of its own, and wait for the resource
    /// trackers there. After the end of this process nobody could find them any more; what is in the group is found by
    /// the agent.
    pub fn end_escaped() {
        let group = Group::own();
        group.kill_escaped();
        group.end_outside();
    }

    /// Whether no task will come any more: undo the setup and end, within [`UNWIND`].
    #[must_use]
    pub fn over(&self) -> bool {
        lock(&self.shared.tasks).over
    }

    /// Hand in a result, once. Waits while more than 64 MiB of earlier ones are unsent.
    pub fn finish(&self, message: Message) {
        // Whether the agent takes results in time is not this task's doing.
        if let Some(&slot) = lock(&self.shared.tasks).running.get(&message.id.task) {
            self.shared.table.stop(slot);
        }
        let mut results = lock(&self.shared.results);
        while results.outbox.bytes() > BACKLOG {
            results = self.shared.result_sent.wait(results).unwrap_or_else(PoisonError::into_inner);
        }
        self.hand_in(results, message);
    }

    /// Hand in a result, or give it back where [`Worker::finish`] would wait.
    #[must_use]
    pub fn try_finish(&self, message: Message) -> Option<Message> {
        let results = lock(&self.shared.results);
        if results.outbox.bytes() > BACKLOG {
            return Some(message);
        }
        self.hand_in(results, message);
        None
    }

    fn hand_in(&self, results: MutexGuard<'_, Results>, message: Message) {
        let waiting = {
            let mut tasks = lock(&self.shared.tasks);
            let Some(slot) = tasks.running.remove(&message.id.task) else {
                // It was handed in before.
                return;
            };
            if self.shared.timed {
                // What clears up behind a task, such as a result's `__del__`, has as long as the task had.
                self.shared.table.restart(slot);
            }
            tasks.queue.len()
        };
        // While short tasks follow one another, their results travel together.
        let urgent = waiting == 0 || message.nanos > SHORT || results.together + 1 >= TOGETHER.max(waiting / 4);
        self.report(results, urgent, |outbox| outbox.message(Body::Result, message));
    }

    /// Add to what is sent. The writer sends at once what is urgent, anything else after [`LINGER`] at the latest.
    fn report(&self, mut results: MutexGuard<'_, Results>, urgent: bool, add: impl FnOnce(&mut Outbox)) {
        let wake = results.outbox.is_empty() || (urgent && !results.urgent);
        add(&mut results.outbox);
        results.together += 1;
        results.urgent |= urgent;
        drop(results);
        if wake {
            self.shared.result_ready.notify_one();
        }
    }

    fn answer(&self, add: impl FnOnce(&mut Outbox)) {
        self.report(lock(&self.shared.results), true, add);
    }

    fn read(&self, mut inlet: Inlet) -> Result<(), SessionError> {
        let mut boost = 1;
        loop {
            match inlet.next(|| self.wake_idle(&mut boost))? {
                Event::Message(Body::Task, task) => {
                    let mut tasks = lock(&self.shared.tasks);
                    if tasks.early.remove(&task.id.task) {
                        drop(tasks);
                        self.answer(|outbox| outbox.message(Body::Result, Message::cancelled(task.id)));
                        continue;
                    }
                    tasks.queue.push_back(task);
                    // A thread that takes short tasks one after another will take this one too. If there is none,
                    // or the running tasks are longer, an idle one is woken.
                    let nobody = tasks.idle == self.shared.threads || tasks.taken_at.elapsed() > SPELL;
                    if tasks.queue.len() == 1 && tasks.idle > 0 && nobody {
                        self.shared.task_ready.notify_one();
                    }
                }
                Event::NoMemory(Body::Task, id, size) => {
                    let text = format!("a worker process has no memory for a task of {size} bytes");
                    self.answer(|outbox| outbox.message(Body::Result, Message::text(id, Outcome::Crashed, text)));
                }
                Event::Control(Control::Heartbeat { lease_ms, .. }) => {
                    *lock(&self.shared.lease) = Instant::now() + Duration::from_millis(lease_ms);
                }
                Event::Control(Control::Cancel(id)) => {
                    if self.unqueue(id.task) {
                        self.answer(|outbox| outbox.message(Body::Result, Message::cancelled(id)));
                    } else {
                        let mut tasks = lock(&self.shared.tasks);
                        if tasks.running.contains_key(&id.task) {
                            drop(tasks);
                            self.answer(|outbox| outbox.control(Control::RecallRefused(id)));
                        } else {
                            tasks.early.insert(id.task);
                        }
                    }
                }
                Event::Control(Control::Recall(id)) => {
                    let answer =
                        if self.unqueue(id.task) { Control::GivenBack(id) } else { Control::RecallRefused(id) };
                    self.answer(|outbox| outbox.control(answer));
                }
                Event::Control(Control::NoteAnswer { note, error }) => {
                    let mut notes = lock(&self.shared.notes);
                    notes.bytes -= notes.sent.remove(&note).unwrap_or_default();
                    if let Some(answered) = notes.awaited.remove(&note) {
                        drop(answered.try_send(error));
                    }
                    drop(notes);
                    self.send_notes();
                }
                Event::Control(Control::Goodbye(_)) => {
                    *lock(&self.shared.lease) = Instant::now() + UNWIND;
                    lock(&self.shared.tasks).over = true;
                    self.shared.task_ready.notify_all();
                }
                Event::Control(_) | Event::Message(..) | Event::Skipped(..) | Event::NoMemory(..) => {}
            }
        }
    }

    /// Wake idle threads while tasks wait that the running ones do not get to. Called before each wait for the agent;
    /// gives how long that wait may be.
    ///
    /// Waking a thread for every task would have all threads fight for the GIL over tasks that one of them could run
    /// in less time; waking none would leave tasks behind long ones. So: if none was taken since the last look, all
    /// that are needed; if fewer were taken than wait now, some, twice as many at each look.
    fn wake_idle(&self, boost: &mut usize) -> Option<Duration> {
        let mut tasks = lock(&self.shared.tasks);
        let waiting = tasks.queue.len();
        let taken = std::mem::take(&mut tasks.taken);
        if waiting == 0 || tasks.idle == 0 {
            *boost = 1;
            return None;
        }
        let wanted = if taken == 0 {
            waiting
        } else if taken < waiting {
            let now = *boost;
            *boost = now.saturating_mul(2);
            now
        } else {
            0
        };
        for _ in 0..wanted.min(waiting).min(tasks.idle) {
            self.shared.task_ready.notify_one();
        }
        Some(SPELL)
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
                let results = self
                    .shared
                    .result_ready
                    .wait_while(results, |r| r.outbox.is_empty())
                    .unwrap_or_else(PoisonError::into_inner);
                let (mut results, _) = self
                    .shared
                    .result_ready
                    .wait_timeout_while(results, LINGER, |r| !r.urgent)
                    .unwrap_or_else(PoisonError::into_inner);
                results.outbox.fill(&mut out)?;
                if results.outbox.is_empty() {
                    results.urgent = false;
                    results.together = 0;
                } else {
                    // More than a block: there is nothing to wait for.
                    results.urgent = true;
                }
                if results.outbox.bytes() <= BACKLOG {
                    self.shared.result_sent.notify_all();
                }
            }
            socket.write_all(&out)?;
        }
    }

    fn watch(&self) {
        let mut said = Instant::now();
        loop {
            if said.elapsed() >= HEARTBEAT {
                said = Instant::now();
                self.answer(|outbox| outbox.control(Control::Heartbeat { nonce: 0, lease_ms: 0 }));
            }
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
    /// Wait for the next event. Before each wait `look` is asked; while it gives a duration, it is asked again after
    /// that time.
    fn next(&mut self, mut look: impl FnMut() -> Option<Duration>) -> Result<Event, SessionError> {
        loop {
            if let Some(event) = self.decoder.next()? {
                return Ok(event);
            }
            while let Some(bound) = look() {
                let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
                let bound = Timespec::try_from(bound).ok();
                match poll(&mut fds, bound.as_ref()) {
                    Ok(0) | Err(Errno::INTR) => {}
                    Ok(_) => break,
                    Err(e) => return Err(SessionError::Io(e.into())),
                }
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
