//! The part of the decider for nodes that are away: their connection is lost, they come back, or they are lost. See
//! `dispatch.rs`.
//!
//! A node whose connection is lost keeps its tasks: its agent goes on with them, and they must not run a second time. They are
//! given to others when the agent is known to be gone, or its lease is over. The lease ends at the agent `lease` after it sent
//! the last heartbeat that this client has heard, so here no earlier than `lease` after it was heard.

use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::client::blobs::NodeBlobs;
use crate::client::dispatch::{Action, Dispatch};
use crate::client::node::{LAST_TASK_DONE, NodeRecord, NodeState, NoteCredit};
use crate::error::{NodeError, SessionError};
use crate::queue::PeerId;
use crate::wire::{Message, Outcome};

impl Dispatch {
    /// Note that a session with a node begins, which ends with [`Dispatch::lost`]. Return false if the node was given up.
    pub fn begin(&mut self, id: PeerId, now: Instant) -> bool {
        let closing = self.closing;
        let Some(record) = self.nodes.get_mut(id) else { return false };
        let comes_back = matches!(record.node.state, NodeState::Lost(_)) && record.may_return && !closing;
        if comes_back {
            let fresh = NodeRecord::new(record.node.name.clone(), NodeState::Connecting, true, now);
            let (session_number, lost_since) = (record.session_number, record.lost_since);
            *record = NodeRecord { session_number, was_ready: record.was_ready, lost_since, ..fresh };
        }
        let begins = comes_back || record.node.state == NodeState::Connecting;
        record.has_begun |= begins;
        begins
    }

    /// Return the number of a node's present session, which is the next one if the node is lost.
    #[must_use]
    pub fn session_number(&self, id: PeerId) -> u32 {
        self.nodes.get(id).map_or(0, |record| record.session_number)
    }

    /// Note that a lost node will not come back.
    pub fn give_up(&mut self, id: PeerId, now: Instant, out: &mut Vec<Action>) {
        if let Some(record) = self.nodes.get_mut(id) {
            record.may_return = false;
            record.node.returns = false;
        }
        self.fail_stranded(now, out);
    }

    /// Note that the connection to a node is lost, and why. The session may go on over another one.
    pub fn away(&mut self, id: PeerId, why: &SessionError, now: Instant, out: &mut Vec<Action>) {
        let Some(record) = self.nodes.get_mut(id) else { return };
        record.draining = match &record.node.state {
            NodeState::Draining(why) => Some(why.clone()),
            _ => None,
        };
        record.set_state(NodeState::Reconnecting(why.to_string()), now);
        self.queue.pause_peer(id, true);
        out.push(Action::Notify);
        debug_assert!(self.is_consistent());
    }

    /// Note that the session with a node goes on.
    pub fn back(&mut self, id: PeerId, now: Instant, out: &mut Vec<Action>) {
        let Some(record) = self.nodes.get_mut(id) else { return };
        let state = match record.draining.take() {
            Some(why) => NodeState::Draining(why),
            None if record.node.slots > 0 => NodeState::Ready,
            None => NodeState::Connecting,
        };
        record.set_state(state, now);
        self.queue.pause_peer(id, false);
        self.assign(now, out);
        self.wake(out);
        out.push(Action::Notify);
        debug_assert!(self.is_consistent());
    }

    /// Return until when a node's agent may go on without this client, and for how many seconds nothing was heard from it.
    #[must_use]
    pub fn lease(&self, id: PeerId, now: Instant) -> (Instant, u64) {
        let Some(session) = self.nodes.get(id).and_then(|record| record.session.as_ref()) else { return (now, 0) };
        let lease = Duration::from_millis(session.lease_ms) + self.timing.lease_grace;
        (session.heard + lease, now.saturating_duration_since(session.heard).as_secs())
    }

    /// Take a node out whose session has ended, or which was given up before. Its tasks go to other nodes, or end.
    pub fn lost(&mut self, id: PeerId, end: Result<(), NodeError>, now: Instant, out: &mut Vec<Action>) {
        let closing = self.closing;
        let Some(record) = self.nodes.get_mut(id) else { return };
        record.session = None;
        record.session_number += 1;
        // The answers to its notes would not be heard.
        record.notes = NoteCredit::default();
        record.blobs = NodeBlobs::default();
        let notice = match &record.node.state {
            NodeState::Draining(why) => Some(why.clone()),
            _ => record.draining.take(),
        };
        let is_cut = end.as_ref().is_err_and(NodeError::is_cut);
        let state = match (end, &notice) {
            (Ok(()), _) => NodeState::Closed,
            (Err(_), _) if closing => NodeState::Closed,
            (Err(_), Some(notice)) if record.dismissed_since.is_some() => {
                NodeState::Lost(format!("{LAST_TASK_DONE}: {notice}"))
            }
            (Err(e), None) => NodeState::Lost(e.to_string()),
            (Err(e), Some(notice)) => NodeState::Lost(format!("{e} (it was draining: {notice})")),
        };
        record.set_state(state, now);
        record.node.returns = record.may_return && record.node.state.is_lost() && (record.was_ready || is_cut);
        record.lost_since.get_or_insert(now);
        let why = if let NodeState::Lost(why) = &record.node.state { why } else { "closed" };
        // The text is shared by all tasks that end of it.
        let why = Bytes::from(format!("node {} was lost: {why}", record.node.name));
        // A node runs the tasks first that it was sent first.
        let slots = record.node.slots;
        self.send(id, Action::Goodbye(id, "the node was lost"), out);
        for (place, task) in self.queue.remove_peer(id).into_iter().enumerate().rev() {
            let calls = self.queue.calls_of(task);
            // A loss that was announced is not held against the task.
            let again = if notice.is_some() { self.queue.requeue(task) } else { self.queue.retry(task, self.attempts) };
            if again && place < slots {
                self.activity.rerun(id, calls);
            } else if !again && let Some(message) = self.queue.remove(task) {
                self.activity.failed(u64::from(calls));
                let end = Message::text(message.id, Outcome::NodeLost, String::new());
                out.push(Action::Complete(None, Message { parts: vec![why.clone()], ..end }));
            }
        }
        self.fail_stranded(now, out);
        self.complete_cancelled(out);
        self.assign(now, out);
        self.wake(out);
        out.push(Action::Notify);
        debug_assert!(self.is_consistent());
    }
}
