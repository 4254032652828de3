//! What the client knows of a node. Pure state: no I/O, no clock.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::client::blobs::NodeBlobs;
use crate::client::liveness::Liveness;
use crate::error::FrameError;
use crate::queue::PeerId;
use crate::timing::NOTE_CREDIT;
use crate::wire::{AgentHello, Message};

/// Why a node is left, and how the reason of its loss begins, that will soon be gone and has no task: nothing is lost with it.
pub const LAST_TASK_DONE: &str = "it has done its last task";

/// Where a node stands. It moves down this list, but for a node that comes back: from `Reconnecting` to `Ready` or `Draining`,
/// and from `Lost` to `Connecting`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeState {
    /// It was added to the pool, and its workers do not take tasks yet.
    Connecting,
    Ready,
    /// The connection to the node was lost, and why. Its tasks stay its own until it is back, or its lease is over.
    Reconnecting(String),
    /// The node announced that it will soon be gone, and why: it ends the tasks that it runs, and is sent no further task
    /// but those that are for this node alone.
    Draining(String),
    /// The node never was, or is no longer, usable, and why.
    Lost(String),
    /// The pool was closed, and the session with the node has ended, if there was one.
    Closed,
}

impl NodeState {
    /// The state's name, as `Node.state` has it in Python.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Ready => "ready",
            Self::Reconnecting(_) => "reconnecting",
            Self::Draining(_) => "draining",
            Self::Lost(_) => "lost",
            Self::Closed => "closed",
        }
    }

    /// Return whether the node is lost.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost(_))
    }

    /// Return whether the node is, or may become, usable.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !matches!(self, Self::Lost(_) | Self::Closed)
    }
}

/// What callers of [`crate::client::pool::Pool::nodes`] are told of a node.
#[derive(Debug, Clone)]
pub struct Node {
    pub name: String,
    pub state: NodeState,
    /// Tasks that the node runs at once; 0 until its workers take tasks.
    pub slots: usize,
    /// Smallest recent round-trip time of a heartbeat; [`Duration::MAX`] until the first one was answered.
    pub rtt: Duration,
    /// What the agent told of itself, once it has greeted.
    pub hello: Option<Arc<AgentHello>>,
    /// When it came into this state.
    pub since: Instant,
    /// Whether the node is lost and may come back: see `Dispatch::begin`.
    pub returns: bool,
}

/// A node's record in the decider, which owns it and alone changes it.
#[derive(Debug)]
pub(super) struct NodeRecord {
    pub node: Node,
    /// Slots that the node may offer at most: as many as the user asked for, or its cores. Set when the agent greets.
    pub max_slots: usize,
    /// Whether a session with the node was begun. The session then tells the end of the node, and nobody else does.
    pub has_begun: bool,
    /// Whether the node is brought up again when it is lost. Set when the node is added, unset by `Dispatch::give_up`.
    pub may_return: bool,
    /// Whether its workers took tasks at any time, also in earlier sessions.
    pub was_ready: bool,
    /// When the node was lost, until it is ready again.
    pub lost_since: Option<Instant>,
    /// How often it was lost, which is the number of its present session.
    pub session_number: u32,
    /// When the node announced that it will soon be gone.
    pub draining_since: Option<Instant>,
    /// Why the node will soon be gone, while it is reconnecting.
    pub draining: Option<String>,
    /// When it was said goodbye to, because it will soon be gone and has done its last task.
    pub dismissed_since: Option<Instant>,
    /// From the agent's greeting to the end of the connection.
    pub session: Option<Session>,
    pub notes: NoteCredit,
    /// The blobs that the node has. Empty until it greets, and again when its session has ended.
    pub blobs: NodeBlobs,
}

impl NodeRecord {
    pub fn new(name: String, state: NodeState, may_return: bool, now: Instant) -> Self {
        Self {
            node: Node { name, state, slots: 0, rtt: Duration::MAX, hello: None, since: now, returns: false },
            max_slots: 0,
            has_begun: false,
            may_return,
            was_ready: false,
            lost_since: None,
            session_number: 0,
            draining_since: None,
            draining: None,
            dismissed_since: None,
            session: None,
            notes: NoteCredit::default(),
            blobs: NodeBlobs::default(),
        }
    }

    /// Change the node's state.
    pub fn set_state(&mut self, state: NodeState, now: Instant) {
        self.node.returns = self.node.returns && matches!(state, NodeState::Lost(_));
        self.node.state = state;
        self.node.since = now;
    }

    /// Return why the node takes no task: it is lost, or not ready.
    pub fn why_not(&self) -> String {
        match &self.node.state {
            NodeState::Lost(why) => format!("node {} was lost: {why}", self.node.name),
            NodeState::Draining(why) => format!("node {} takes no more tasks: {why}", self.node.name),
            _ => format!("node {} is not ready", self.node.name),
        }
    }

    /// Return whether the record agrees with itself, and with the number of tasks that the node holds.
    pub fn is_consistent(&self, held: usize) -> bool {
        let may_hold = self.node.slots > 0 && self.node.state.is_alive();
        self.notes.is_consistent()
            && self.blobs.is_consistent()
            && self.node.slots <= self.max_slots
            && (may_hold || held == 0)
    }
}

/// Bits of a note's sender that are its node's number. The others are those of [`NodeRecord::session_number`].
const NODE_BITS: u32 = 32;

/// Return the number that names a node's present session as the sender of a note.
pub(super) fn note_sender(id: PeerId, session_number: u32) -> u64 {
    u64::from(session_number) << NODE_BITS | id as u64
}

/// Return the node of a note's sender, if the session in which the note came is its present one.
pub(super) fn node_of_sender(nodes: &mut [NodeRecord], sender: u64) -> Option<(PeerId, &mut NodeRecord)> {
    let id = usize::try_from(sender & ((1 << NODE_BITS) - 1)).ok()?;
    let record = nodes.get_mut(id)?;
    (u64::from(record.session_number) == sender >> NODE_BITS).then_some((id, record))
}

/// What is agreed on in a node's session, and what the node owes in it.
#[derive(Debug)]
pub(super) struct Session {
    pub life: Liveness,
    /// When the agent greeted. Heartbeats are numbered by the microseconds since.
    pub since: Instant,
    pub lease_ms: u64,
    /// The agent's time in its last heartbeat; 0 before the first. From then on its lease counts.
    pub stamp: u64,
    /// When that heartbeat came, or the greeting.
    pub heard: Instant,
    /// Whether the node ends tasks that run for too long.
    pub has_task_timeout: bool,
}

/// Return the session with this node, if there is one.
pub(super) fn session(nodes: &mut [NodeRecord], id: PeerId) -> Option<&mut Session> {
    nodes.get_mut(id)?.session.as_mut()
}

/// The notes of one node that this process has not answered yet. A node keeps those back that are beyond its credit; one
/// note alone may be larger.
#[derive(Debug, Default)]
pub(super) struct NoteCredit {
    /// The memory, in bytes, that each unanswered note takes, by the note's number.
    costs: HashMap<u64, usize>,
    /// The sum of `costs`.
    used: usize,
}

impl NoteCredit {
    /// Check that the node may send a note that takes `cost` bytes beside `unfinished` bytes of notes that have arrived in
    /// part.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] if the node has not so much credit.
    pub fn check(&self, unfinished: usize, cost: usize) -> Result<(), FrameError> {
        let before = self.used.saturating_add(unfinished);
        let len = before.saturating_add(cost);
        if before == 0 || len <= NOTE_CREDIT {
            return Ok(());
        }
        Err(FrameError::TooLong { what: "notes without an answer", len, cap: NOTE_CREDIT })
    }

    /// Count a note that has arrived as unanswered.
    ///
    /// # Errors
    /// As [`NoteCredit::check`]; [`FrameError::BadSequence`] if a note of this number is not answered yet.
    pub fn take(&mut self, note: &Message) -> Result<(), FrameError> {
        let cost = note.cost();
        self.check(0, cost)?;
        if self.costs.contains_key(&note.id.task) {
            return Err(FrameError::BadSequence("two notes of the same number"));
        }
        self.costs.insert(note.id.task, cost);
        self.used += cost;
        Ok(())
    }

    /// Return the credit of a note that is answered.
    pub fn give_back(&mut self, note: u64) {
        self.used -= self.costs.remove(&note).unwrap_or_default();
    }

    /// Return whether the credit in use is what the unanswered notes take.
    pub fn is_consistent(&self) -> bool {
        self.used == self.costs.values().sum::<usize>()
    }
}
