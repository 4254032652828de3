//! Whether a node that lives also helps: what it owes the client, and for how long. Pure state: no I/O, no clock.
//!
//! Time is counted in heartbeats that the node has answered. Control frames keep their order, so a node that answers a
//! heartbeat has read what it was asked before; and while this process is stopped, or what it sends waits behind an
//! upload, no time passes for the node. Its answers may wait for minutes behind results that a slow link takes in: while
//! those arrive, the answer to a heartbeat is not overdue.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::error::SessionError;
use crate::queue::{PeerId, Queue};
use crate::timing::Timing;
use crate::wire::{Attempt, Message, Outcome};

/// Bytes of results per heartbeat from which on a node is busy arriving: 8 KB/s, below which no link is of use.
const PROGRESS: u64 = 16 * 1024;

/// Heartbeats that a node may send between two of ours. While this process is stopped those of a day may gather.
const HEARTBEATS: u32 = 1 << 16;

/// What a node can be asked about a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ask {
    Recall,
    Cancel,
    Abort,
}

impl Ask {
    fn name(self) -> &'static str {
        match self {
            Self::Recall => "to give a task back",
            Self::Cancel => "to drop a task",
            Self::Abort => "to end a task",
        }
    }
}

/// The place in the order of arriving of the oldest task that a node holds, and how long one of its tasks may run at most
/// (zero: for ever).
pub type Oldest = (u64, Duration);

/// See the module's text. One for each session with a node.
#[derive(Debug)]
pub struct Liveness {
    timing: Timing,
    every: Duration,
    /// Bound on the answer to a heartbeat.
    pulse: Duration,
    /// How long its workers took to start.
    start: Duration,
    /// Heartbeats that were sent.
    sent: u64,
    /// Those of them without an answer: their numbers, the oldest first.
    unanswered: VecDeque<u64>,
    /// Without an answer, and after which heartbeat it was asked.
    asked: HashMap<(u64, Ask), (Attempt, u64)>,
    /// Answers that may still come, also to what is no more of interest.
    answers: u64,
    heartbeats: u32,
    /// The oldest task when it was last looked at, and the heartbeat since which the node ended none.
    oldest: Option<(u64, u64)>,
    /// The heartbeat after which it said that it will soon be gone.
    drained: Option<u64>,
    results: u64,
    /// The heartbeat at which results were last seen to arrive.
    arrived: u64,
}

impl Liveness {
    /// Of a node with this lease, which it has renewed with each heartbeat.
    #[must_use]
    pub fn new(timing: Timing, lease: Duration) -> Self {
        Self {
            timing,
            // Several to a lease: one that is late ends nothing.
            every: timing.heartbeat.min(lease / 4).max(Duration::from_millis(1)),
            // A user who asks for a long lease has a link on which a heartbeat may take long. Twice: the heartbeat may
            // wait behind an upload, and its answer behind results.
            pulse: timing.answer.max(lease.min(timing.drain)).saturating_mul(2),
            start: Duration::ZERO,
            sent: 0,
            unanswered: VecDeque::new(),
            asked: HashMap::new(),
            answers: 0,
            heartbeats: 0,
            oldest: None,
            drained: None,
            results: 0,
            arrived: 0,
        }
    }

    /// The pause between two heartbeats.
    #[must_use]
    pub fn every(&self) -> Duration {
        self.every
    }

    /// Its workers have started.
    pub fn ready(&mut self) {
        self.start = self.every.saturating_mul(u32::try_from(self.sent).unwrap_or(u32::MAX));
    }

    /// It sent the result of a task that it does not hold, of so many bytes: that is no progress.
    pub fn stale(&mut self, bytes: usize) {
        self.results = self.results.saturating_add(bytes as u64);
    }

    /// A heartbeat of this number is sent.
    pub fn beat(&mut self, nonce: u64) {
        self.sent += 1;
        self.heartbeats = 0;
        self.unanswered.push_back(nonce);
    }

    /// A heartbeat was answered; false if it was not the next one to be.
    #[must_use]
    pub fn pulse(&mut self, nonce: u64) -> bool {
        let next = self.unanswered.front() == Some(&nonce);
        if next {
            self.unanswered.pop_front();
        }
        next
    }

    /// The node is asked this.
    pub fn ask(&mut self, ask: Ask, id: Attempt) {
        self.answers += 1;
        self.asked.insert((id.task, ask), (id, self.sent));
    }

    /// It answers a question, whichever; false if there was none.
    #[must_use]
    pub fn answer(&mut self) -> bool {
        let left = self.answers.checked_sub(1);
        self.answers = left.unwrap_or(0);
        left.is_some()
    }

    /// It sends a heartbeat of its own; false if it floods us with them.
    #[must_use]
    pub fn heartbeat(&mut self) -> bool {
        self.heartbeats += 1;
        self.heartbeats <= HEARTBEATS
    }

    /// It says that it keeps the task, which is running; whether the task will go on to its own end.
    pub fn kept(&mut self, id: Attempt) -> bool {
        self.asked.remove(&(id.task, Ask::Recall));
        self.asked.remove(&(id.task, Ask::Cancel));
        !self.asked.contains_key(&(id.task, Ask::Abort))
    }

    /// It gives a task back.
    ///
    /// # Errors
    /// [`SessionError::Unasked`] if it was not asked for it.
    pub fn returned(&mut self, queue: &mut Queue, node: PeerId, id: Attempt) -> Result<(), SessionError> {
        let asked = queue.is_asked_back(node, id) || !queue.holds(node, id);
        if !(self.answer() && asked) {
            return Err(SessionError::Unasked("gave a task back"));
        }
        queue.returned(node, id);
        Ok(())
    }

    /// It keeps a task, which is running there. Whether that goes on to its own end; of what another node holds it knows
    /// nothing.
    ///
    /// # Errors
    /// [`SessionError::Unasked`] if it was asked nothing.
    pub fn keeps(&mut self, queue: &mut Queue, node: PeerId, id: Attempt) -> Result<bool, SessionError> {
        if !self.answer() {
            return Err(SessionError::Unasked("said that it keeps a task"));
        }
        if !queue.holds(node, id) {
            return Ok(false);
        }
        queue.kept(node, id);
        let goes_on = self.kept(id);
        if goes_on {
            queue.uncancel(id.task);
        }
        Ok(goes_on)
    }

    /// It ended a task.
    pub fn helped(&mut self) {
        self.oldest = None;
    }

    /// It says that it will soon be gone; false if it has said so.
    #[must_use]
    pub fn drains(&mut self) -> bool {
        self.drained.replace(self.sent).is_none()
    }

    /// Look at what the node owes, before each heartbeat. `uploading`: whether tasks are on their way to it; `results`: the
    /// bytes of results that ever came; `owes` says whether an answer still matters.
    ///
    /// # Errors
    /// What the node did not do in time.
    pub fn check(
        &mut self,
        oldest: Option<Oldest>,
        uploading: bool,
        results: u64,
        owes: impl Fn(Attempt, Ask) -> bool,
    ) -> Result<(), SessionError> {
        let arriving = results >= self.results.saturating_add(PROGRESS);
        if arriving {
            self.arrived = self.sent;
        }
        let (waiting, quiet) = (self.unanswered.len() as u64, self.sent - self.arrived);
        if waiting.min(quiet) >= self.beats(self.pulse) {
            return Err(SessionError::Unanswered(self.pulse.as_secs()));
        }
        let busy = uploading || arriving;
        self.results = results;
        let (sent, answered) = (self.sent, self.sent.saturating_sub(waiting));
        let in_time = self.beats(self.timing.answer);
        let mut late = None;
        self.asked.retain(|&(_, ask), (id, since)| {
            // An agent that has too many results to send does not hear its workers. And the answer to a cancel or an abort
            // may come when the task has arrived.
            if arriving || (uploading && ask != Ask::Recall) {
                *since = sent;
            }
            let open = owes(*id, ask);
            if open && answered >= *since + in_time {
                late = Some(ask);
            }
            open
        });
        if let Some(ask) = late {
            return Err(SessionError::NoAnswer { asked: ask.name(), seconds: self.timing.answer.as_secs() });
        }
        let Some((number, limit)) = oldest else {
            self.oldest = None;
            return Ok(());
        };
        if self.drained.is_some_and(|since| answered >= since + self.beats(self.timing.drain)) {
            return Err(SessionError::StillThere(self.timing.drain.as_secs()));
        }
        match self.oldest {
            Some((same, since)) if same == number && !busy && !limit.is_zero() => {
                // Twice: the node counts from when the task began, and not while it waits for an import; a task whose
                // process died of another one begins anew, when another process has started.
                let bound = limit.saturating_add(self.start).saturating_mul(2).saturating_add(self.timing.answer);
                if answered >= since + self.beats(bound) {
                    return Err(SessionError::NoResult { seconds: bound.as_secs(), limit: limit.as_secs_f64() });
                }
            }
            _ => self.oldest = Some((number, sent)),
        }
        Ok(())
    }

    /// The heartbeats that are sent in a time.
    fn beats(&self, time: Duration) -> u64 {
        u64::try_from(time.as_millis().div_ceil(self.every.as_millis().max(1))).unwrap_or(u64::MAX).max(1)
    }
}

/// Look at how a node says that a task ended.
///
/// # Errors
/// [`SessionError::Unasked`] if it may not say so.
pub fn may_end(queue: &Queue, node: PeerId, result: &Message, timed: bool) -> Result<(), SessionError> {
    let wrong = match result.code {
        code if code == Outcome::Cancelled as u8 && !queue.is_droppable(result.id.task) => "dropped a task",
        code if code == Outcome::NodeLost as u8 => "said of a task that its node is lost",
        code if code == Outcome::TimedOut as u8 && !timed => "ended a task for its time, which has no limit",
        _ => return Ok(()),
    };
    // What it does not hold is stale, whatever it says.
    if queue.holds(node, result.id) { Err(SessionError::Unasked(wrong)) } else { Ok(()) }
}
