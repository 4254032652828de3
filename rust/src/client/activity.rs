//! What the nodes of a pool have done so far: counters, and a record of each ended attempt at a task. Pure state.
//!
//! The records are for reports of a run. The newest [`MAX_RECORDS`] are kept; the counters count all.

use std::collections::VecDeque;
use std::time::Instant;

use crate::queue::PeerId;
use crate::wire::{Message, Outcome};

/// Records that are kept: 14 MB of them.
pub const MAX_RECORDS: usize = 1 << 18;

/// Bytes of a record that is packed.
pub const RECORD_BYTES: usize = 48;

/// An attempt at a task that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// When it began, in nanoseconds since [`Activity::begun`]: when its end arrived here, less the time that it ran.
    pub start: u64,
    /// How long it ran, in nanoseconds. 0 where nobody knows.
    pub nanos: u64,
    /// Bytes of its payload, and of its result's.
    pub sent: u64,
    pub received: u64,
    /// How many calls have ended in it.
    pub calls: u32,
    /// The number of its function's name.
    pub name: u32,
    /// The slot that ran it: see [`crate::wire::slot_number`].
    pub slot: u32,
    pub node: u16,
    pub outcome: u8,
}

impl Record {
    /// Append the record to `out`, as `_core.pyi` describes it.
    pub fn put(&self, out: &mut Vec<u8>) {
        for number in [self.start, self.nanos, self.sent, self.received] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        for number in [self.calls, self.name, self.slot] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.node.to_le_bytes());
        out.extend_from_slice(&[self.outcome, 0]);
    }
}

/// Calls of one node, or of all.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Calls that have ended with a value or an exception, or were ended.
    pub done: u64,
    /// Those of them without a value.
    pub failed: u64,
    /// Calls that ran on a node when it was lost, and run again.
    pub rerun: u64,
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Activity {
    /// When the first node was added.
    begun: Option<Instant>,
    nodes: Vec<Counts>,
    total: Counts,
    /// Bytes of all tasks and blobs that were sent, and of all results: before compression. What is sent to several nodes, or
    /// again, counts each time.
    pub payload_sent: u64,
    pub payload_received: u64,
    records: VecDeque<Record>,
    /// How many records there were in all.
    recorded: u64,
}

impl Activity {
    /// Count for another node from now on.
    pub fn add_node(&mut self, now: Instant) {
        self.begun.get_or_insert(now);
        self.nodes.push(Counts::default());
    }

    /// Return the counters of a node.
    #[must_use]
    pub fn of_node(&self, id: PeerId) -> Counts {
        self.nodes.get(id).copied().unwrap_or_default()
    }

    /// Return the counters of all nodes, and of tasks that no node could take.
    #[must_use]
    pub fn total(&self) -> Counts {
        self.total
    }

    /// Return the nanoseconds since the first node was added.
    #[must_use]
    pub fn nanos(&self, now: Instant) -> u64 {
        let since = self.begun.map_or_else(Default::default, |begun| now.saturating_duration_since(begun));
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }

    /// Note that `node` has ended an attempt at `task` with `result`.
    pub fn ended(&mut self, node: PeerId, task: &Message, result: &Message, now: Instant) {
        let received = result.size() as u64;
        self.payload_received += received;
        let Some(outcome) = result.outcome().filter(|outcome| *outcome != Outcome::Cancelled) else { return };
        // A node's number of calls is its word only.
        let all = task.calls.max(1);
        let ended = result.calls.min(all);
        let (calls, failed) = match outcome {
            Outcome::Partial => (ended, 0),
            Outcome::Returned => (ended.max(1), 0),
            Outcome::Raised => (ended.max(1), 1),
            // Nobody knows which of them had returned, and the values of those are lost as well.
            _ => (all, all),
        };
        self.count(Some(node), u64::from(calls), u64::from(failed));
        let end = self.nanos(now);
        let nanos = result.nanos.min(end);
        let (name, slot, sent) = (task.name, result.slot, task.load() as u64);
        let node = u16::try_from(node).unwrap_or(u16::MAX);
        let record =
            Record { start: end - nanos, nanos, sent, received, calls, name, slot, node, outcome: result.code };
        if self.records.len() == MAX_RECORDS {
            self.records.pop_front();
        }
        self.records.push_back(record);
        self.recorded += 1;
    }

    /// Note that tasks of so many calls have ended without a value that no node has ended.
    pub fn failed(&mut self, calls: u64) {
        self.count(None, calls, calls);
    }

    /// Note that a task of so many calls ran on a node that was lost, and runs again.
    pub fn rerun(&mut self, node: PeerId, calls: u32) {
        let calls = u64::from(calls.max(1));
        self.total.rerun += calls;
        if let Some(counts) = self.nodes.get_mut(node) {
            counts.rerun += calls;
        }
    }

    fn count(&mut self, node: Option<PeerId>, done: u64, failed: u64) {
        for counts in [node.and_then(|node| self.nodes.get_mut(node)), Some(&mut self.total)].into_iter().flatten() {
            counts.done += done;
            counts.failed += failed;
        }
    }

    /// Return the number of the first record from number `after` on that is kept, and all from it on.
    #[must_use]
    pub fn records(&self, after: u64) -> (u64, impl ExactSizeIterator<Item = &Record>) {
        let oldest = self.recorded - self.records.len() as u64;
        let first = after.clamp(oldest, self.recorded);
        let skipped = usize::try_from(first - oldest).unwrap_or(usize::MAX);
        (first, self.records.iter().skip(skipped))
    }
}
