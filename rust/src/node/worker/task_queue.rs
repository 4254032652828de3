//! The tasks that wait in a worker process, and the threads that take them.
//!
//! A thread that ends a task takes its next one without anybody's help; an idle thread is woken only when more tasks wait
//! than the running threads get to.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::locks::{lock, wait_timeout_while};
use crate::node::worker::blobs::Task;
use crate::wire::Attempt;

/// How long tasks may wait for a running thread before an idle one is woken.
const WAKE_DELAY: Duration = Duration::from_micros(200);

#[derive(Debug)]
struct Tasks {
    waiting: VecDeque<Task>,
    /// The tasks that run, by their numbers, and the slot of each.
    running: HashMap<u64, usize>,
    /// Tasks that were cancelled before they arrived, because control frames overtake messages.
    cancelled_in_advance: HashSet<u64>,
    /// Set by [`TaskQueue::close`]: no task is to be taken any more.
    closed: bool,
    /// Threads that wait for a task.
    idle: usize,
    /// Tasks that were taken since [`TaskQueue::wake_idle`] was called last.
    taken: usize,
    /// When a task was taken last.
    taken_at: Instant,
}

impl Tasks {
    fn take(&mut self, slot: usize) -> Option<Task> {
        if self.closed {
            return None;
        }
        let task = self.waiting.pop_front()?;
        self.running.insert(task.id().task, slot);
        self.taken += 1;
        self.taken_at = Instant::now();
        Some(task)
    }

    fn take_out(&mut self, task: u64) -> bool {
        let at = self.waiting.iter().rposition(|waiting| waiting.id().task == task);
        at.and_then(|at| self.waiting.remove(at)).is_some()
    }
}

/// What [`TaskQueue::cancel`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// The task waited, and is gone.
    Waiting,
    Running,
    /// The task has not arrived; it will be dropped when it does. Or it has ended.
    Nothing,
}

/// See the module's text.
#[derive(Debug)]
pub struct TaskQueue {
    /// Threads that take tasks.
    threads: usize,
    tasks: Mutex<Tasks>,
    /// Notified once for each idle thread that is to look for a task, and for all by [`TaskQueue::close`].
    task_ready: Condvar,
}

impl TaskQueue {
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let tasks = Tasks {
            waiting: VecDeque::new(),
            running: HashMap::new(),
            cancelled_in_advance: HashSet::new(),
            closed: false,
            idle: 0,
            taken: 0,
            taken_at: Instant::now(),
        };
        Self { threads, tasks: Mutex::new(tasks), task_ready: Condvar::new() }
    }

    /// Append a task that has arrived. Returns false if it was cancelled before: it is not run then.
    pub fn push(&self, task: Task) -> bool {
        let mut tasks = lock(&self.tasks);
        if tasks.cancelled_in_advance.remove(&task.id().task) {
            return false;
        }
        tasks.waiting.push_back(task);
        // A thread that takes short tasks one after another will take this one too. If there is none, or the running tasks
        // are longer, an idle thread is woken.
        let nobody = tasks.idle == self.threads || tasks.taken_at.elapsed() > WAKE_DELAY;
        if tasks.waiting.len() == 1 && tasks.idle > 0 && nobody {
            self.task_ready.notify_one();
        }
        true
    }

    /// Return the next task for this slot's thread, if one waits.
    #[must_use]
    pub fn try_take(&self, slot: usize) -> Option<Task> {
        lock(&self.tasks).take(slot)
    }

    /// Return the next task for this slot's thread, waiting at most `bound`.
    #[must_use]
    pub fn take(&self, slot: usize, bound: Duration) -> Option<Task> {
        let mut tasks = lock(&self.tasks);
        if tasks.waiting.is_empty() {
            tasks.idle += 1;
            tasks = wait_timeout_while(&self.task_ready, tasks, bound, |t| t.waiting.is_empty() && !t.closed);
            tasks.idle -= 1;
        }
        tasks.take(slot)
    }

    /// Return the slot in which a task runs.
    #[must_use]
    pub fn slot(&self, task: u64) -> Option<usize> {
        lock(&self.tasks).running.get(&task).copied()
    }

    /// End a running task. Returns its slot, and how many tasks wait; nothing if it has ended before.
    #[must_use]
    pub fn end(&self, task: u64) -> Option<(usize, usize)> {
        let mut tasks = lock(&self.tasks);
        let slot = tasks.running.remove(&task)?;
        Some((slot, tasks.waiting.len()))
    }

    /// Drop a task if it waits, or when it arrives.
    pub fn cancel(&self, id: Attempt) -> Found {
        let mut tasks = lock(&self.tasks);
        if tasks.take_out(id.task) {
            Found::Waiting
        } else if tasks.running.contains_key(&id.task) {
            Found::Running
        } else {
            tasks.cancelled_in_advance.insert(id.task);
            Found::Nothing
        }
    }

    /// Drop a task if it waits; returns whether it did.
    pub fn recall(&self, id: Attempt) -> bool {
        lock(&self.tasks).take_out(id.task)
    }

    /// Wake idle threads while tasks wait that the running ones do not get to. Called before each wait for the agent;
    /// returns how long that wait may be.
    ///
    /// Waking a thread for every task would have all threads fight for the GIL over tasks that one of them could run in
    /// less time; waking none would leave tasks behind long ones. So: if no task was taken since the last call, all threads
    /// that are needed are woken; if fewer were taken than wait now, `boost` of them, twice as many at each call.
    ///
    /// For example: 8 tasks wait and 3 threads are idle. If none was taken since the last call, all 3 are woken. If 5 were
    /// taken, one is woken, and at the next calls 2, then 3, as long as more tasks wait than were taken. If 10 were taken,
    /// the running threads are fast enough, and none is woken.
    pub fn wake_idle(&self, boost: &mut usize) -> Option<Duration> {
        let mut tasks = lock(&self.tasks);
        let waiting = tasks.waiting.len();
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
            self.task_ready.notify_one();
        }
        Some(WAKE_DELAY)
    }

    /// Hand out no task from now on.
    pub fn close(&self) {
        lock(&self.tasks).closed = true;
        self.task_ready.notify_all();
    }

    #[must_use]
    pub fn is_closed(&self) -> bool {
        lock(&self.tasks).closed
    }
}
