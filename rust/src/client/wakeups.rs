//! When the senders of the nodes are woken: at once, or for several tasks together. Pure state: no I/O, no clock.

use std::collections::{BTreeSet, HashMap};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use crate::queue::PeerId;

/// Submitted tasks after which senders are woken at the latest, when wake-ups are batched. A wake-up costs more than the
/// rest of a small task's way to the node.
pub const MAX_BATCHED: usize = 32;
/// At most one in so many unfinished tasks may wait in a batch, so that the nodes are never idle while the caller goes on
/// submitting.
pub const BATCH_SHARE: usize = 5;
/// Pause between two submits of a batch after which the senders are woken all the same: the caller does something slow.
pub const MAX_BATCH_PAUSE: Duration = Duration::from_micros(200);

/// See the module's text.
#[derive(Debug, Default)]
pub struct Wakeups {
    /// Nodes for which there are frames, and whose sender was not woken since.
    due: BTreeSet<PeerId>,
    /// Tasks that threads submitted to the queues that they take from, since senders were woken last.
    batched: usize,
    /// Of each completion queue: the thread that takes its tasks, and when it last took or submitted one.
    takers: HashMap<u64, (ThreadId, Instant)>,
}

impl Wakeups {
    /// Note that there is a frame for a node.
    pub fn add(&mut self, node: PeerId) {
        self.due.insert(node);
    }

    /// Return the nodes whose senders are to be woken now, each once.
    pub fn take(&mut self) -> impl Iterator<Item = PeerId> {
        self.batched = 0;
        std::iter::from_fn(|| self.due.pop_first())
    }

    /// Note that this thread takes a queue's ended tasks.
    pub fn taken(&mut self, queue: u64, by: ThreadId, now: Instant) {
        self.takers.insert(queue, (by, now));
    }

    /// Forget which thread takes a queue's tasks.
    pub fn close_queue(&mut self, queue: u64) {
        self.takers.remove(&queue);
    }

    /// Return whether the task of this queue that `caller` has just submitted may wait for the tasks that `caller` submits
    /// next, so that one wake-up sends them all (as with `TCP_CORK`). Only the thread that takes the queue's ended tasks is
    /// trusted with that: when it has handled the tasks that it took it comes back for more, and then the senders are woken.
    ///
    /// Example: 100 tasks are `unfinished`, and the thread submits a new one for each that it took, microseconds apart. The
    /// senders are woken with every 20th of them (one fifth of 100), and once more when the thread comes back.
    pub fn may_batch(&mut self, queue: u64, caller: ThreadId, unfinished: usize, now: Instant) -> bool {
        let Some((taker, last)) = self.takers.get_mut(&queue) else { return false };
        if *taker != caller {
            return false;
        }
        let pause = now.saturating_duration_since(*last);
        *last = now;
        self.batched += 1;
        self.batched < (unfinished / BATCH_SHARE).min(MAX_BATCHED) && pause < MAX_BATCH_PAUSE
    }

    /// Return whether the batch is not too large, and each node that is to be woken is one of the first `nodes`.
    #[must_use]
    pub fn is_consistent(&self, nodes: usize) -> bool {
        self.batched < MAX_BATCHED && self.due.iter().all(|id| *id < nodes)
    }
}
