//! Completion queues: the ends of tasks, until the caller's threads have taken them.
//!
//! Each queue is emptied by a thread of its own, so that what a thread does with the ends of one queue's tasks holds up no
//! other queue: futures share queue 0, and each call of `Parallel` opens its own.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::locks::{lock, wait_timeout_while};
use crate::queue::PeerId;
use crate::wire::{Attempt, Message};

/// A task's number has in the bits from this one on the number of the completion queue that its end goes to.
pub const QUEUE_SHIFT: u32 = 40;
/// Completion queues that can be open beside queue 0: as many as the bits above [`QUEUE_SHIFT`] can count. Each has a
/// thread of its own, so there is always an unused number.
const MAX_QUEUES: u64 = u64::MAX >> QUEUE_SHIFT;

/// The end of a task, with the node that is to have its result acknowledged when the caller has taken it: until then the
/// result's bytes count against the node's credit.
pub type Ended = (Option<PeerId>, Message);

/// See the module's text.
#[derive(Debug)]
pub struct Completions {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    queues: HashMap<u64, CompletionQueue>,
    /// The number of the queue that was opened last.
    last_opened: u64,
    /// The pool is closed: no further task ends.
    closed: bool,
}

#[derive(Debug, Default)]
struct CompletionQueue {
    ended: Vec<Ended>,
    /// Notified when `ended` gets its first entry, when `woken` is set, and when the pool is closed.
    filled: Arc<Condvar>,
    /// Set by [`Completions::wake`]: the thread that waits returns, though no task has ended.
    woken: bool,
    /// At the last tick `ended` had entries, of which none was taken since.
    is_stuck: bool,
    /// The thread that takes was told that no further task will end.
    is_over: bool,
}

impl Default for Completions {
    /// Open queue 0.
    fn default() -> Self {
        let queues = HashMap::from([(0, CompletionQueue::default())]);
        Self { inner: Mutex::new(Inner { queues, ..Inner::default() }) }
    }
}

impl Completions {
    /// Open a queue and return its number.
    pub fn open(&self) -> u64 {
        let mut inner = lock(&self.inner);
        loop {
            inner.last_opened = inner.last_opened % MAX_QUEUES + 1;
            let number = inner.last_opened;
            if let Entry::Vacant(unused) = inner.queues.entry(number) {
                unused.insert(CompletionQueue::default());
                return number;
            }
        }
    }

    /// Forget a queue all of whose tasks have been taken.
    pub fn close(&self, queue: u64) {
        lock(&self.inner).queues.remove(&queue);
    }

    /// Wake the thread that waits for a queue's tasks: it returns, with none if none has ended.
    pub fn wake(&self, queue: u64) {
        if let Some(queue) = lock(&self.inner).queues.get_mut(&queue) {
            queue.woken = true;
            queue.filled.notify_one();
        }
    }

    /// Append the ends of tasks to their queues. Return false if one of them will never be taken.
    pub fn add(&self, ended: impl IntoIterator<Item = Ended>) -> bool {
        let mut inner = lock(&self.inner);
        let mut all = true;
        for end in ended {
            match inner.queues.get_mut(&(end.1.id.task >> QUEUE_SHIFT)) {
                Some(queue) if !queue.is_over => {
                    if queue.ended.is_empty() {
                        queue.filled.notify_one();
                    }
                    queue.ended.push(end);
                }
                _ => all = false,
            }
        }
        all
    }

    /// Take the tasks of a queue that have ended, waiting up to `bound` for one. Return `None` if the queue is not open, or
    /// the pool is closed and every task was taken.
    pub fn take(&self, queue: u64, bound: Duration) -> Option<Vec<Ended>> {
        let inner = lock(&self.inner);
        let filled = Arc::clone(&inner.queues.get(&queue)?.filled);
        let is_empty = |inner: &mut Inner| {
            !inner.closed && inner.queues.get(&queue).is_some_and(|q| q.ended.is_empty() && !q.woken)
        };
        let mut inner = wait_timeout_while(&filled, inner, bound, is_empty);
        let closed = inner.closed;
        let queue = inner.queues.get_mut(&queue)?;
        queue.woken = false;
        queue.is_stuck = false;
        queue.is_over = closed && queue.ended.is_empty();
        (!queue.is_over).then(|| std::mem::take(&mut queue.ended))
    }

    /// Return the results that no thread has taken since the last call or longer, each once. They are to be acknowledged
    /// as if they had been taken: otherwise they could use up a node's credit while their thread waits for a result of
    /// another queue.
    pub fn take_stuck(&self) -> Vec<(PeerId, Attempt)> {
        let mut stuck = Vec::new();
        for queue in lock(&self.inner).queues.values_mut() {
            if std::mem::replace(&mut queue.is_stuck, !queue.ended.is_empty()) {
                stuck.extend(queue.ended.iter_mut().filter_map(|(from, message)| Some((from.take()?, message.id))));
            }
        }
        stuck
    }

    /// Mark the pool as closed: no further task ends, and every thread that takes returns when its queue is empty.
    pub fn finish(&self) {
        let mut inner = lock(&self.inner);
        inner.closed = true;
        inner.queues.values().for_each(|queue| queue.filled.notify_all());
    }
}
