//! The agent's decider: what happens goes in as [`Input`]s, what is to be done comes out as [`Action`]s.
//!
//! It has no socket, no lock, no process and no clock of its own, so each rule of the node is tested as a table
//! (`rust/tests/state.rs`). `tasks.rs` follows the tasks, `results.rs` their ends until the client has taken them, and
//! `workers.rs` the worker processes; this file tells each of them of the inputs that concern it, and passes on
//! what one of them finds out and another one needs.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::error::FrameError;
use crate::node::actions::{Action, Input};
use crate::node::tasks::Tasks;
pub use crate::node::workers::TICK;
use crate::node::workers::{ABORT_GRACE, Role, Workers};
use crate::queue::PeerId;
use crate::timing::AGENT_BACKLOG;
use crate::wire::{Attempt, Body, Control, Event, Message, Offer, Outcome};

/// The client is told that a task runs when the task has run for so long at a tick.
const REPORTED_AGE: Duration = Duration::from_millis(50);

/// What the decider knows from the client's hello. It never changes.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What the client calls this node.
    pub node: String,
    /// Worker processes, and tasks at once in each.
    pub processes: usize,
    pub slots: usize,
    /// The node's cores.
    pub cores: usize,
    /// How long one task may run.
    pub task_timeout: Option<Duration>,
    /// The generation of the client's modules when the session began.
    pub generation: u32,
    /// Plugins have set something up in the workers: all of them are asked to end, so that they can undo it.
    pub unwind: bool,
}

/// See the module's text.
#[derive(Debug)]
pub struct State {
    pub(super) settings: Settings,
    pub(super) tasks: Tasks,
    pub(super) workers: Workers,
    /// When the session began, from which on the agent's time counts that its heartbeats tell.
    begun: Instant,
    /// How long the machine was suspended since. Set with each tick.
    slept: Duration,
    /// The agent ends so long after the session's begin. The client's heartbeats put it off.
    lease: Duration,
    /// The client was told that all workers are ready.
    announced: bool,
    /// The tasks of which the client was told that they run, as long as they do.
    reported: HashSet<Attempt>,
    /// The client was told that this node will soon be gone.
    draining: bool,
    /// [`Action::Stop`] was returned.
    stopping: bool,
}

impl State {
    #[must_use]
    pub fn new(settings: Settings, begun: Instant, lease: Duration) -> Self {
        Self {
            begun,
            workers: Workers::new(settings.slots, settings.cores),
            tasks: Tasks::new(settings.generation),
            settings,
            slept: Duration::ZERO,
            lease,
            announced: false,
            reported: HashSet::new(),
            draining: false,
            stopping: false,
        }
    }

    /// Append what is to be done, now that `input` has happened, to `out`.
    pub fn handle(&mut self, input: Input<'_>, now: Instant, out: &mut Vec<Action>) {
        match input {
            Input::Begin => (0..self.settings.processes).for_each(|_| self.workers.start(Role::Regular, out)),
            Input::Client(events) => events.drain(..).for_each(|event| self.on_client(event, now, out)),
            Input::Worker(worker, events) => {
                self.workers.heard(worker);
                events.drain(..).for_each(|event| self.on_worker(worker, event, now, out));
            }
            Input::NotStarted(worker, why) => {
                if self.workers.not_started(worker, now) {
                    self.stop(why, out);
                }
            }
            Input::Exited(worker, exit) => self.on_exit(worker, &exit, now, out),
            Input::Tick { orphaned, slept, running } => {
                self.slept = slept;
                self.on_tick(orphaned, running, now, out);
            }
            Input::BlobComplete(number) => self.tasks.blob_is_complete(number),
            Input::BlobFailed(number, why) => {
                let failed = self.tasks.blob_failed(number, &format!("node {}: {why}", self.settings.node), out);
                self.stop_if_broken(failed, out);
            }
            Input::Drain(why) => {
                if !std::mem::replace(&mut self.draining, true) {
                    out.push(Action::Reply(Control::Drain(Bytes::from(why))));
                }
                // Nothing else is decided: this may come from a thread that cannot start a worker.
                return;
            }
            Input::Dismiss => return self.dismiss(out),
            Input::KillAll => {
                self.workers.finish();
                out.extend(self.workers.iter().map(|(worker, _)| Action::Kill(worker)));
                return;
            }
        }
        self.distribute(now, out);
        debug_assert!(self.is_consistent(), "{self:?}");
    }

    /// Return whether a worker's message is to be stored, now that its first chunk is here. A task can write to the socket
    /// of its worker, so a result counts only from the worker that holds the task.
    ///
    /// # Errors
    /// [`FrameError::BadSequence`] for a task, which no worker sends.
    pub fn admit(&self, worker: PeerId, offer: &Offer) -> Result<bool, FrameError> {
        match offer.body {
            Body::Task | Body::Answer => Err(FrameError::BadSequence("a task or an answer from a worker")),
            Body::Result => Ok(self.tasks.queue.holds(worker, offer.id)),
            Body::Note => Ok(offer.unfinished == 0 || offer.unfinished.saturating_add(offer.size) <= AGENT_BACKLOG),
        }
    }

    /// Return whether so many bytes wait for the client's credit that the workers are not to be read from.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.tasks.results.is_full()
    }

    /// Return whether all workers are to end: then no task is blamed for a worker's end, and nobody asks how it ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.workers.is_over()
    }

    /// Return the generation of the workers that are started now.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.tasks.generation()
    }

    /// Return how many tasks have not ended, and how many results wait for the client's credit.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.tasks.len(), self.tasks.results.backlog())
    }

    /// Return the agent's time since the session's begin, which goes on while the machine is suspended.
    fn clock(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.begun) + self.slept
    }

    /// Return how long the lease goes on; nothing if it is over.
    #[must_use]
    pub fn lease_left(&self, now: Instant) -> Duration {
        self.lease.saturating_sub(self.clock(now))
    }

    pub(super) fn stop(&mut self, why: String, out: &mut Vec<Action>) {
        if !std::mem::replace(&mut self.stopping, true) {
            out.push(Action::Stop(why));
        }
    }

    /// End the cancelled tasks that came back, give crash suspects their processes, then send waiting tasks to workers with
    /// room, start fresh workers if only tasks of another generation wait, and ask for tasks back that idle workers could
    /// run.
    fn distribute(&mut self, now: Instant, out: &mut Vec<Action>) {
        self.tasks.end_cancelled(out);
        self.workers.isolate_suspects(&mut self.tasks, now, out);
        self.tasks.assign_all(out);
        if self.workers.may_be_renewed() {
            if self.tasks.change_generation() {
                self.workers.renew(&mut self.tasks, now, out);
            }
            self.tasks.assign_all(out);
        }
        self.workers.end_outdated(&self.tasks, self.settings.unwind, now, out);
        while let Some((worker, id)) = self.tasks.queue.steal(now) {
            out.push(Action::Tell(worker, Control::Recall(id)));
        }
    }

    fn on_client(&mut self, event: Event, now: Instant, out: &mut Vec<Action>) {
        match event {
            Event::Message(Body::Task, task) => {
                let arrived = self.tasks.arrive(task, out);
                self.stop_if_broken(arrived, out);
            }
            Event::NoMemory(Body::Task, id, size) => {
                let text = format!("node {}: no memory for a task of {size} bytes in its agent", self.settings.node);
                self.tasks.results.deliver(Message::text(id, Outcome::Crashed, text), out);
            }
            Event::Message(Body::Answer, mut answer) => {
                if let Some((worker, note)) = self.tasks.results.answer_note(answer.id.task, out) {
                    answer.id.task = note;
                    out.push(Action::Answer(worker, answer));
                }
            }
            Event::NoMemory(Body::Answer, note, size) => {
                let text = format!("node {}: no memory for an answer of {size} bytes", self.settings.node);
                self.on_client_control(Control::NoteAnswer { note: note.task, error: text.into() }, now, out);
            }
            Event::Control(control) => self.on_client_control(control, now, out),
            Event::Message(..) | Event::Chunk(_) | Event::Skipped(..) | Event::NoMemory(..) => {}
        }
    }

    fn on_client_control(&mut self, control: Control, now: Instant, out: &mut Vec<Action>) {
        match control {
            Control::Heartbeat { nonce, lease_ms, echo } => {
                // From the agent's own heartbeat on, that the client has heard last: so the client, which counts from the
                // moment on when it heard that, does not take the lease for over before the agent does.
                let clock = self.clock(now);
                let heard = Duration::from_micros(echo).min(clock);
                self.lease = self.lease.max(heard.saturating_add(Duration::from_millis(lease_ms)));
                out.push(Action::Reply(Control::Pulse { nonce }));
                let lease_ms = u64::try_from(self.lease_left(now).as_millis()).unwrap_or(u64::MAX);
                let heartbeat = Control::Heartbeat { nonce, lease_ms, echo: 0 };
                out.extend(self.workers.iter().map(|(worker, _)| Action::Tell(worker, heartbeat.clone())));
            }
            Control::Acknowledge(ids) => self.tasks.acknowledge(&ids, out),
            Control::Cancel(id) => {
                let cancelled = self.tasks.cancel(id, out);
                self.stop_if_broken(cancelled, out);
            }
            Control::Abort(id) => {
                let aborted = self.tasks.abort(id, now + ABORT_GRACE, out);
                self.stop_if_broken(aborted, out);
            }
            Control::Recall(id) => self.tasks.recall(id, out),
            Control::Forget(blobs) => self.tasks.forget(&blobs, out),
            Control::NoteAnswer { note, error } => {
                if let Some((worker, note)) = self.tasks.results.answer_note(note, out) {
                    out.push(Action::Tell(worker, Control::NoteAnswer { note, error }));
                }
            }
            Control::Goodbye(_) => self.stop("goodbye".to_owned(), out),
            _ => {}
        }
    }

    fn stop_if_broken(&mut self, handled: Result<(), String>, out: &mut Vec<Action>) {
        if let Err(why) = handled {
            self.stop(why, out);
        }
    }

    fn on_worker(&mut self, worker: PeerId, event: Event, now: Instant, out: &mut Vec<Action>) {
        match event {
            Event::Message(Body::Result, result) => self.on_result(worker, result, now, out),
            // The result is not owed any more, but the task has ended.
            Event::Skipped(Body::Result, task) => self.on_result(worker, Message::cancelled(task), now, out),
            Event::NoMemory(Body::Result, task, size) => {
                let text = format!(
                    "node {}: the task has ended, but the agent has no memory for its result of {size} bytes",
                    self.settings.node
                );
                self.on_result(worker, Message::text(task, Outcome::Crashed, text), now, out);
            }
            Event::Message(Body::Note, note) => self.tasks.results.deliver_note(worker, note, out),
            Event::Skipped(Body::Note, note) | Event::NoMemory(Body::Note, note, _) => {
                let error = Bytes::from_static(b"the node has no memory for so many messages at once");
                out.push(Action::Tell(worker, Control::NoteAnswer { note: note.task, error }));
            }
            Event::Control(Control::Hello(_)) => {
                let complete = self.workers.is_ready(worker, &mut self.tasks, now);
                if complete && !std::mem::replace(&mut self.announced, true) {
                    self.workers.want_spare(now);
                    out.push(Action::Reply(Control::Ready { slots: self.tasks.queue.slots() as u64 }));
                }
            }
            Event::Control(Control::GivenBack(task)) => self.tasks.given_back(worker, task, out),
            Event::Control(Control::RecallRefused(task)) => self.tasks.refused(worker, task, out),
            Event::Control(_) | Event::Message(..) | Event::Chunk(_) | Event::Skipped(..) | Event::NoMemory(..) => {}
        }
    }

    fn on_result(&mut self, worker: PeerId, result: Message, now: Instant, out: &mut Vec<Action>) {
        self.workers.ended_a_task(worker);
        self.tasks.ended(worker, result, now, out);
    }

    fn on_tick(
        &mut self,
        orphaned: bool,
        running: &dyn Fn(PeerId) -> Vec<(Attempt, Duration)>,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        if self.lease_left(now).is_zero() {
            self.stop("the lease is over: nothing was heard from the client".to_owned(), out);
        }
        if orphaned {
            self.stop("the process that started the agent is gone".to_owned(), out);
        }
        self.tasks.answer_if_full(out);
        // First: the spare for a worker that is replaced now starts with the next tick, not beside the replacement.
        self.workers.start_spare(now, out);
        let running = self.running(running);
        self.report_running(&running, out);
        if let Some(limit) = self.settings.task_timeout {
            self.end_late_tasks(limit, &running, now, out);
        }
        self.workers.end_overdue(&mut self.tasks, now, out);
        self.workers.retire_surplus(now);
        self.workers.kill_lost(&self.tasks, now, out);
    }

    /// Return which tasks run, each with its worker and for how long it does.
    fn running(&self, running: &dyn Fn(PeerId) -> Vec<(Attempt, Duration)>) -> Vec<(PeerId, Attempt, Duration)> {
        let busy = self.workers.iter().filter(|(_, worker)| worker.ready && worker.role != Role::Spare);
        busy.flat_map(|(worker, _)| running(worker).into_iter().map(move |(id, age)| (worker, id, age))).collect()
    }

    /// Tell the client which tasks run that it was not told of. Short tasks have ended before.
    fn report_running(&mut self, running: &[(PeerId, Attempt, Duration)], out: &mut Vec<Action>) {
        let queue = &self.tasks.queue;
        let is_long =
            |&&(worker, id, age): &&(PeerId, Attempt, Duration)| age >= REPORTED_AGE && queue.holds(worker, id);
        let long: HashSet<_> = running.iter().filter(is_long).map(|(_, id, _)| *id).collect();
        let fresh: Vec<_> = long.difference(&self.reported).copied().collect();
        self.reported = long;
        if !fresh.is_empty() {
            out.push(Action::Reply(Control::Running(fresh)));
        }
    }

    fn end_late_tasks(
        &mut self,
        limit: Duration,
        running: &[(PeerId, Attempt, Duration)],
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        for &(worker, id, age) in running.iter().filter(|(.., age)| *age > limit) {
            let text = format!(
                "node {}: the task ran for {:.1} s, longer than Worker(task_timeout={}), and was ended",
                self.settings.node,
                age.as_secs_f64(),
                limit.as_secs_f64()
            );
            let nanos = u64::try_from(age.as_nanos()).unwrap_or(u64::MAX);
            let end = Message { nanos, ..Message::text(id, Outcome::TimedOut, text) };
            if !self.tasks.time_out(worker, end, now, out) && !self.tasks.is_aborting(id) {
                // The task's result is here, but its thread does not come back for the tasks that wait there.
                self.workers.retire(worker, &mut self.tasks, now, out);
            }
        }
    }

    /// Ask workers to end as interpreters do: `atexit` callbacks and finalizers run, and the text that open files hold back
    /// is written.
    ///
    /// A worker that has not run a task has nothing to write, and a worker that holds a task does not come to its end in
    /// time: both are killed at once. Where a plugin has set something up in the workers, all of them are asked.
    fn dismiss(&mut self, out: &mut Vec<Action>) {
        self.workers.finish();
        for (id, worker) in self.workers.iter() {
            let idle = self.tasks.queue.held(id).next().is_none();
            out.push(if self.settings.unwind || (idle && worker.has_something_to_write()) {
                Action::Tell(id, Control::Goodbye(Bytes::new()))
            } else {
                Action::Kill(id)
            });
        }
    }

    /// Return whether every part of the state agrees with the others, and each task is in exactly one place. Slow: for tests.
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        self.workers.is_over() || self.workers.is_consistent(&self.tasks)
    }
}
