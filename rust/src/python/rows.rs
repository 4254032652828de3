//! How a pool stands, as dicts of Python.

use std::time::{Duration, Instant, SystemTime};

use pyo3::prelude::*;

use crate::client::activity::Counts;
use crate::client::node::NodeState;
use crate::client::watching::{NodeReport, Totals};

/// A row of `Core.nodes`: a dict, whose keys are the fields of the public `Node`.
#[derive(IntoPyObject)]
pub(super) struct NodeRow {
    name: String,
    state: &'static str,
    reason: String,
    slots: usize,
    rtt: Option<f64>,
    pid: Option<u32>,
    since: f64,
    running: usize,
    queued: usize,
    done: u64,
    failed: u64,
    rerun: u64,
    bytes_sent: u64,
    bytes_received: u64,
    cached_bytes: u64,
}

impl From<NodeReport> for NodeRow {
    fn from(report: NodeReport) -> Self {
        let NodeReport { node, running, queued, counts, sent, received, cached } = report;
        let Counts { done, failed, rerun } = counts;
        let state = node.state.name();
        let reason = match node.state {
            NodeState::Reconnecting(why) | NodeState::Draining(why) | NodeState::Lost(why) => why,
            NodeState::Connecting | NodeState::Ready | NodeState::Closed => String::new(),
        };
        let rtt = (node.rtt != Duration::MAX).then_some(node.rtt.as_secs_f64());
        let since = unix_time(node.since);
        let pid = node.hello.map(|h| h.pid);
        let (name, slots) = (node.name, node.slots);
        Self {
            name,
            state,
            reason,
            slots,
            rtt,
            pid,
            since,
            running,
            queued,
            done,
            failed,
            rerun,
            bytes_sent: sent,
            bytes_received: received,
            cached_bytes: cached,
        }
    }
}

/// The stub's `Totals`, a dict.
#[derive(IntoPyObject)]
pub(super) struct TotalsRow {
    pending: u64,
    done: u64,
    failed: u64,
    rerun: u64,
    payload_sent: u64,
    payload_received: u64,
    seconds: f64,
}

impl From<Totals> for TotalsRow {
    fn from(totals: Totals) -> Self {
        let Totals { pending, counts, payload_sent, payload_received, nanos } = totals;
        let Counts { done, failed, rerun } = counts;
        let seconds = Duration::from_nanos(nanos).as_secs_f64();
        Self { pending, done, failed, rerun, payload_sent, payload_received, seconds }
    }
}

/// Return a moment as the seconds since 1970, by the clock as it is now.
fn unix_time(moment: Instant) -> f64 {
    let at = SystemTime::now() - moment.elapsed();
    at.duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
