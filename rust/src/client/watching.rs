//! How a pool stands and what it has done: for callers that show it, or wait for a change.

use std::time::{Duration, Instant};

use crate::client::activity::{Counts, RECORD_BYTES};
use crate::client::io::State;
use crate::client::node::Node;
use crate::client::pool::Pool;
use crate::locks::lock;
use crate::queue::PeerId;

/// How a node stands, and what it has done.
#[derive(Debug, Clone)]
pub struct NodeReport {
    pub node: Node,
    /// Tasks that run there, and those that wait there.
    pub running: usize,
    pub queued: usize,
    pub counts: Counts,
    /// Bytes of its sessions: see [`Pool::traffic`].
    pub sent: u64,
    pub received: u64,
    /// Bytes of large data that it keeps.
    pub cached: u64,
}

/// What all nodes have done.
#[derive(Debug, Clone, Copy)]
pub struct Totals {
    /// Calls that have not ended.
    pub pending: u64,
    pub counts: Counts,
    pub payload_sent: u64,
    pub payload_received: u64,
    /// Since the first node was added.
    pub nanos: u64,
}

impl Pool {
    /// Return all nodes that were added, in that order.
    #[must_use]
    pub fn nodes(&self) -> Vec<Node> {
        lock(&self.shared.state).dispatch.nodes().cloned().collect()
    }

    /// Return the node of this number.
    #[must_use]
    pub fn node(&self, id: PeerId) -> Option<Node> {
        lock(&self.shared.state).dispatch.node(id).cloned()
    }

    /// Wait until a node is no longer in the state whose name it had in `seen`, at most for `bound`.
    pub fn wait_for_change(&self, seen: &[impl AsRef<str>], bound: Duration) {
        let state = lock(&self.shared.state);
        let same = |s: &mut State| s.dispatch.nodes().map(|n| n.state.name()).eq(seen.iter().map(AsRef::as_ref));
        drop(self.shared.changed.wait_timeout_while(state, bound, same));
    }

    /// Return the number of tasks that have not ended, and of results that came late or twice.
    #[must_use]
    pub fn counts(&self) -> (usize, u64) {
        lock(&self.shared.state).dispatch.counts()
    }

    /// Return, for each node in the order of their numbers, the bytes that were written to its session's stream and those
    /// that were read from it. SSH's own bytes, such as its encryption's, are not among them.
    #[must_use]
    pub fn traffic(&self) -> Vec<(u64, u64)> {
        lock(&self.shared.state).senders.iter().map(|sender| sender.traffic()).collect()
    }

    /// Return how each node stands and what it has done, in the order in which they were added.
    #[must_use]
    pub fn report(&self) -> Vec<NodeReport> {
        let state = lock(&self.shared.state);
        let nodes = state.dispatch.nodes().zip(&state.senders).enumerate();
        let reports = nodes.map(|(id, (node, sender))| {
            let (running, queued, cached) = state.dispatch.load(id);
            let (sent, received) = sender.traffic();
            let counts = state.dispatch.activity().of_node(id);
            NodeReport { node: node.clone(), running, queued, counts, sent, received, cached }
        });
        reports.collect()
    }

    /// Return what all nodes have done.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let state = lock(&self.shared.state);
        let activity = state.dispatch.activity();
        Totals {
            pending: state.dispatch.pending_calls(),
            counts: activity.total(),
            payload_sent: activity.payload_sent,
            payload_received: activity.payload_received,
            nanos: activity.nanos(Instant::now()),
        }
    }

    /// Return whether a task's node has reported that the task runs.
    #[must_use]
    pub fn is_running(&self, task: u64) -> bool {
        lock(&self.shared.state).dispatch.is_running(task)
    }

    /// Return the number of the first record from number `after` on that is kept, and all from it on, each as
    /// [`Record::put`](crate::client::activity::Record::put) writes it.
    #[must_use]
    pub fn records(&self, after: u64) -> (u64, Vec<u8>) {
        let state = lock(&self.shared.state);
        let (first, records) = state.dispatch.activity().records(after);
        let mut packed = Vec::with_capacity(records.len() * RECORD_BYTES);
        records.for_each(|record| record.put(&mut packed));
        (first, packed)
    }
}
