//! Whether a node that lives is also of use: what the node owes the client, and for how long. Pure state: no I/O, no
//! clock.
//!
//! Time is counted in heartbeats that the node has answered. Control frames keep their order, so a node that answers a
//! heartbeat has read every request that was sent before it; and while this process is stopped, or while its frames wait
//! behind an upload, no time passes for the node. The node's answers may wait for minutes behind results that a slow link
//! takes in: while results arrive, the answer to a heartbeat is not overdue.
//!
//! Example: a heartbeat is sent every 2 s, and an answer may take 60 s. A node that is asked for a task back after
//! heartbeat 10 is lost if it has answered heartbeat 40 and not the request.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::error::SessionError;
use crate::queue::{PeerId, Queue};
use crate::timing::Timing;
use crate::wire::{Attempt, Message, Outcome};

/// Bytes of results between two heartbeats from which on results count as arriving: 8 KB/s at the default interval. A
/// slower link is of no use.
const MIN_ARRIVING_BYTES: u64 = 16 * 1024;

/// Heartbeats that a node may send between two of ours. While this process is stopped, the heartbeats of a day may gather:
/// 43,200 at the default interval.
const MAX_HEARTBEATS: u32 = 1 << 16;

/// A request about a task, which the node has to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Request {
    /// Give the task back if it has not started.
    Recall,
    /// Drop the task if it has not started.
    Cancel,
    /// Drop the task, or end it if it is running.
    Abort,
}

impl Request {
    /// What the node was asked, for [`SessionError::NoAnswer`].
    fn name(self) -> &'static str {
        match self {
            Self::Recall => "to give a task back",
            Self::Cancel => "to drop a task",
            Self::Abort => "to end a task",
        }
    }
}

/// The oldest task that a node holds, by its place in the order of sending, and how long one of the node's tasks may run
/// (zero: for ever).
pub type Oldest = (u64, Duration);

/// What one node owes in its session. See the file's text.
#[derive(Debug)]
pub struct Liveness {
    timing: Timing,
    /// Interval between two heartbeats.
    interval: Duration,
    /// Bound on the answer to a heartbeat.
    pulse_bound: Duration,
    /// How long the node's workers took to start.
    start_time: Duration,
    /// Heartbeats that were sent.
    sent: u64,
    /// The numbers of the heartbeats that were not answered yet, the oldest first.
    unanswered: VecDeque<u64>,
    /// The requests that were not answered yet, with the attempt that each is about, and the heartbeat after which it was
    /// sent.
    open: HashMap<(u64, Request), (Attempt, u64)>,
    /// Answers that may still come: one for each request, also for requests whose answer is of no interest any more.
    max_answers: u64,
    /// Heartbeats that the node sent since this client sent its last one.
    received: u32,
    /// The oldest task when [`Liveness::check`] last looked at it, and the heartbeat since which the node ended no task.
    oldest: Option<(u64, u64)>,
    /// The heartbeat after which the node announced that it will soon be gone.
    draining_since: Option<u64>,
    /// Bytes of results that had arrived at the last heartbeat, and bytes of stale results since.
    results: u64,
    /// The heartbeat at which results were last seen to arrive.
    arrived: u64,
}

impl Liveness {
    /// Return the state of a node that owes nothing, and whose lease each heartbeat renews.
    #[must_use]
    pub fn new(timing: Timing, lease: Duration) -> Self {
        Self {
            timing,
            // Four heartbeats to a lease: one that is late does not end it.
            interval: timing.heartbeat.min(lease / 4).max(Duration::from_millis(1)),
            // A user who asks for a long lease has a link on which a heartbeat may take long. Twice: the heartbeat may
            // wait behind an upload, and its answer behind results.
            pulse_bound: timing.answer.max(lease.min(timing.drain)).saturating_mul(2),
            start_time: Duration::ZERO,
            sent: 0,
            unanswered: VecDeque::new(),
            open: HashMap::new(),
            max_answers: 0,
            received: 0,
            oldest: None,
            draining_since: None,
            results: 0,
            arrived: 0,
        }
    }

    /// Return the interval between two heartbeats.
    #[must_use]
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// Note that the node's workers have started.
    pub fn ready(&mut self) {
        self.start_time = self.interval.saturating_mul(u32::try_from(self.sent).unwrap_or(u32::MAX));
    }

    /// Note that the node sent a result of so many bytes of a task that it does not hold: that is no progress.
    pub fn stale(&mut self, bytes: usize) {
        self.results = self.results.saturating_add(bytes as u64);
    }

    /// Note that a heartbeat of this number is sent.
    pub fn beat(&mut self, nonce: u64) {
        self.sent += 1;
        self.received = 0;
        self.unanswered.push_back(nonce);
    }

    /// Note that the node answered a heartbeat. Return false if it was not the next one to be answered.
    #[must_use]
    pub fn pulse(&mut self, nonce: u64) -> bool {
        let is_next = self.unanswered.front() == Some(&nonce);
        if is_next {
            self.unanswered.pop_front();
        }
        is_next
    }

    /// Note that the node is sent a request.
    pub fn ask(&mut self, request: Request, id: Attempt) {
        self.max_answers += 1;
        self.open.insert((id.task, request), (id, self.sent));
    }

    /// Note that the node answered a request, whichever. Return false if there was none.
    #[must_use]
    pub fn answer(&mut self) -> bool {
        let left = self.max_answers.checked_sub(1);
        self.max_answers = left.unwrap_or(0);
        left.is_some()
    }

    /// Note that the node sent a heartbeat of its own. Return false if it floods this client with them.
    #[must_use]
    pub fn heartbeat(&mut self) -> bool {
        self.received += 1;
        self.received <= MAX_HEARTBEATS
    }

    /// Note that the node refused a recall, and with it a cancel: the task is running. Return whether the task will go on
    /// to its own end, and is not being aborted.
    pub fn recall_refused(&mut self, id: Attempt) -> bool {
        self.open.remove(&(id.task, Request::Recall));
        self.open.remove(&(id.task, Request::Cancel));
        !self.open.contains_key(&(id.task, Request::Abort))
    }

    /// Put a task back into the queue that the node gave back.
    ///
    /// # Errors
    /// [`SessionError::Unasked`] if the node was not asked for the task.
    pub fn on_given_back(&mut self, queue: &mut Queue, node: PeerId, id: Attempt) -> Result<(), SessionError> {
        let may_give_back = queue.is_asked_back(node, id) || !queue.holds(node, id);
        if !(self.answer() && may_give_back) {
            return Err(SessionError::Unasked("gave a task back"));
        }
        queue.given_back(node, id);
        Ok(())
    }

    /// Note in the queue that the node refused to give a task back or to drop it, because the task is running there. Return
    /// whether the task will go on to its own end; false for a task that this node does not hold.
    ///
    /// # Errors
    /// [`SessionError::Unasked`] if the node was asked nothing.
    pub fn on_recall_refused(&mut self, queue: &mut Queue, node: PeerId, id: Attempt) -> Result<bool, SessionError> {
        if !self.answer() {
            return Err(SessionError::Unasked("said that it keeps a task"));
        }
        if !queue.holds(node, id) {
            return Ok(false);
        }
        queue.recall_refused(node, id);
        let goes_on = self.recall_refused(id);
        if goes_on {
            queue.uncancel(id.task);
        }
        Ok(goes_on)
    }

    /// Note that the node ended a task.
    pub fn helped(&mut self) {
        self.oldest = None;
    }

    /// Note that the node announced that it will soon be gone. Return false if it had announced it before.
    #[must_use]
    pub fn drains(&mut self) -> bool {
        self.draining_since.replace(self.sent).is_none()
    }

    /// Check what the node owes; called before each heartbeat. `uploading`: whether tasks are on their way to the node;
    /// `results`: the bytes of results that ever came from it; `is_owed` tells whether the answer to a request still
    /// matters.
    ///
    /// # Errors
    /// What the node did not do in time.
    pub fn check(
        &mut self,
        oldest: Option<Oldest>,
        uploading: bool,
        results: u64,
        is_owed: impl Fn(Attempt, Request) -> bool,
    ) -> Result<(), SessionError> {
        let arriving = results >= self.results.saturating_add(MIN_ARRIVING_BYTES);
        if arriving {
            self.arrived = self.sent;
        }
        self.results = results;
        let (waiting, quiet) = (self.unanswered.len() as u64, self.sent - self.arrived);
        if waiting.min(quiet) >= self.beats(self.pulse_bound) {
            return Err(SessionError::Unanswered(self.pulse_bound.as_secs()));
        }
        let answered = self.sent.saturating_sub(waiting);
        self.check_requests(answered, arriving, uploading, is_owed)?;
        let Some(oldest) = oldest else {
            self.oldest = None;
            return Ok(());
        };
        if self.draining_since.is_some_and(|since| answered >= since + self.beats(self.timing.drain)) {
            return Err(SessionError::StillThere(self.timing.drain.as_secs()));
        }
        self.check_progress(oldest, answered, uploading || arriving)
    }

    /// Check that no request is unanswered for too long, and forget those whose answer does not matter any more.
    fn check_requests(
        &mut self,
        answered: u64,
        arriving: bool,
        uploading: bool,
        is_owed: impl Fn(Attempt, Request) -> bool,
    ) -> Result<(), SessionError> {
        let (sent, in_time) = (self.sent, self.beats(self.timing.answer));
        let mut late = None;
        self.open.retain(|&(_, request), (id, since)| {
            // An agent that has too many results to send does not read from its workers. And the answer to a cancel or an
            // abort may come only when the task has arrived.
            if arriving || (uploading && request != Request::Recall) {
                *since = sent;
            }
            let owed = is_owed(*id, request);
            if owed && answered >= *since + in_time {
                late = Some(request);
            }
            owed
        });
        match late {
            Some(request) => {
                Err(SessionError::NoAnswer { asked: request.name(), seconds: self.timing.answer.as_secs() })
            }
            None => Ok(()),
        }
    }

    /// Check that the node ended a task within the time that its oldest task may take.
    ///
    /// Example: a task may run 100 s, the workers took 10 s to start, and an answer may take 60 s. The node is lost if it
    /// ends no task for 2 × (100 + 10) + 60 = 280 s while it has a task and the link is not busy.
    fn check_progress(&mut self, (number, limit): Oldest, answered: u64, busy: bool) -> Result<(), SessionError> {
        match self.oldest {
            Some((same, since)) if same == number && !busy && !limit.is_zero() => {
                // Twice: the node counts from the task's begin, and not while the task waits for an import; a task whose
                // process died of another task begins anew, when another process has started.
                let bound = limit.saturating_add(self.start_time).saturating_mul(2).saturating_add(self.timing.answer);
                if answered >= since + self.beats(bound) {
                    return Err(SessionError::NoResult { seconds: bound.as_secs(), limit: limit.as_secs_f64() });
                }
            }
            _ => self.oldest = Some((number, self.sent)),
        }
        Ok(())
    }

    /// Return the number of heartbeats that are sent in a time, at least 1.
    fn beats(&self, time: Duration) -> u64 {
        u64::try_from(time.as_millis().div_ceil(self.interval.as_millis().max(1))).unwrap_or(u64::MAX).max(1)
    }
}

/// Check the outcome that a node tells of a task. `has_task_timeout`: whether the node ends tasks that run for too long.
///
/// # Errors
/// [`SessionError::Unasked`] if the node may not tell that outcome.
pub fn check_outcome(
    queue: &Queue,
    node: PeerId,
    result: &Message,
    has_task_timeout: bool,
) -> Result<(), SessionError> {
    let wrong = match Outcome::of(result.code) {
        Some(Outcome::Cancelled) if !queue.is_droppable(result.id.task) => "dropped a task",
        Some(Outcome::NodeLost) => "said of a task that its node is lost",
        Some(Outcome::TimedOut) if !has_task_timeout => "ended a task for its time, which has no limit",
        _ => return Ok(()),
    };
    // The result of a task that the node does not hold is stale, whatever its outcome.
    if queue.holds(node, result.id) { Err(SessionError::Unasked(wrong)) } else { Ok(()) }
}
