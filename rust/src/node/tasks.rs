//! The client's tasks on this node, from their arrival until their results are acknowledged; and what the client asked for
//! about them.
//!
//! A task is in exactly one place at any time:
//!
//! ```text
//! client ── task ──▶ waiting ──▶ held by a worker ──▶ its result, in `results.rs`, until the client has taken it
//!                       ▲            │      ▲
//!                       └─ gave back ┤      │ isolated, one at a time
//!                          or died   └─ crash suspect: its worker died while it ran together with others
//! ```
//!
//! A task that names blobs which have not arrived in full waits in `blobs.rs` before all this, and then, if it is of another
//! generation than the workers, in `generations.rs`.

use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

use crate::node::actions::Action;
use crate::node::blobs::Blobs;
use crate::node::generations::OtherGenerations;
use crate::node::results::Results;
use crate::queue::{Cancelled, PeerId, Queue};
use crate::wire::{Attempt, Control, Message, Outcome};

/// Tasks that a client may have here at once, and cancelled ones that have not arrived. It sends as many as the slots and
/// the prefetch, which is at most 65,536, and those that are for this node alone.
const MAX_TASKS: usize = 1 << 20;

/// How a task ends that names a blob which is not here any more.
const FORGOTTEN: &str = "the client told the node to forget data that this task needs";

/// A running task that must end.
#[derive(Debug)]
struct KillDeadline {
    worker: PeerId,
    /// When its worker is to be ended by force. Set once: when the abort arrives, or when the task's time is up.
    by: Instant,
}

/// See the module's text.
#[derive(Debug)]
pub struct Tasks {
    /// The tasks that have not ended, but for those that wait for blobs or for workers of their generation.
    pub queue: Queue,
    /// The generation of the workers. Set anew by [`Tasks::change_generation`].
    pub(super) generation: u32,
    /// Tasks of other generations, and those that arrived behind them.
    pub(super) others: OtherGenerations,
    /// The blobs that are here, and the tasks that wait for some.
    pub blobs: Blobs,
    /// The ends of tasks, on their way to the client.
    pub results: Results,
    /// Tasks that were cancelled before they arrived, because control frames overtake messages. Such a task ends when it
    /// arrives. If it had ended before, its number is forgotten with the acknowledgement of its result.
    cancelled_in_advance: HashSet<Attempt>,
    /// Tasks that the client recalled or cancelled while a worker held them, until that worker has answered: the client is
    /// to hear if the task goes on.
    owed_answers: HashSet<Attempt>,
    /// Aborted and late tasks that still run, until they or their worker end.
    aborting: BTreeMap<Attempt, KillDeadline>,
}

impl Tasks {
    /// Return the state of a node without tasks, whose workers are of this generation.
    #[must_use]
    pub fn new(generation: u32) -> Self {
        Self {
            queue: Queue::local(),
            generation,
            others: OtherGenerations::default(),
            blobs: Blobs::default(),
            results: Results::default(),
            cancelled_in_advance: HashSet::new(),
            owed_answers: HashSet::new(),
            aborting: BTreeMap::new(),
        }
    }

    /// Take a task from the client.
    ///
    /// # Errors
    /// The reason for which the session ends, if there are more tasks than a client has.
    pub fn arrive(&mut self, task: Message, out: &mut Vec<Action>) -> Result<(), String> {
        if self.cancelled_in_advance.remove(&task.id) {
            self.results.deliver(Message::cancelled(task.id), out);
        } else if self.len() + self.results.len() >= MAX_TASKS {
            return Err(format!("the client sent more than {MAX_TASKS} tasks at once"));
        } else if self.attempt(task.id.task).is_none() {
            let id = task.id;
            match self.blobs.arrive(task) {
                Ok(ready) => ready.into_iter().for_each(|task| self.enqueue(task)),
                Err(why) => self.results.deliver(Message::text(id, Outcome::Crashed, why), out),
            }
        }
        Ok(())
    }

    /// Return how many tasks have not ended.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queue.len() + self.blobs.waiting() + self.others.len()
    }

    /// Return the attempt at a task that is here; `None` if it has ended or has not arrived.
    fn attempt(&self, task: u64) -> Option<Attempt> {
        self.queue.attempt(task).or_else(|| self.blobs.attempt(task)).or_else(|| self.others.attempt(task))
    }

    /// Remove a task that waits for blobs or for workers of its generation. Return whether it was one.
    fn remove_early(&mut self, task: u64) -> bool {
        self.blobs.remove(task).or_else(|| self.others.remove(task)).is_some()
    }

    /// Note that a blob is complete: the tasks that waited for it alone go on.
    pub fn blob_is_complete(&mut self, number: u64) {
        self.blobs.complete(number).into_iter().for_each(|task| self.enqueue(task));
    }

    /// Tell the client that a blob could not be stored, and end the tasks that name it with the reason.
    ///
    /// # Errors
    /// The reason for which the session ends, if there are too many of these.
    pub fn blob_failed(&mut self, number: u64, why: &str, out: &mut Vec<Action>) -> Result<(), String> {
        out.push(Action::Reply(Control::BlobLost { number }));
        for id in self.blobs.fail(number, why.to_owned())? {
            self.results.deliver(Message::text(id, Outcome::Crashed, why.to_owned()), out);
        }
        Ok(())
    }

    /// Forget blobs that no task needs any more. A task that waits for one of them would wait in vain.
    pub fn forget(&mut self, blobs: &[u64], out: &mut Vec<Action>) {
        for &number in blobs {
            for id in self.blobs.forget(number, out) {
                self.results.deliver(Message::text(id, Outcome::Crashed, FORGOTTEN.to_owned()), out);
            }
        }
    }

    /// Send waiting tasks to workers with room for them.
    pub fn assign_all(&mut self, out: &mut Vec<Action>) {
        while let Some((worker, task)) = self.queue.assign() {
            self.assign(worker, task, out);
        }
    }

    /// Send a task to the worker that the queue chose for it, behind the descriptors that this worker lacks.
    pub fn assign(&mut self, worker: PeerId, task: Message, out: &mut Vec<Action>) {
        if self.blobs.pass(worker, &task, out) {
            out.push(Action::Assign(worker, task));
        } else {
            self.crash(task.id.task, FORGOTTEN.to_owned(), out);
        }
    }

    /// Forget results that the client has taken.
    pub fn acknowledge(&mut self, ids: &[Attempt], out: &mut Vec<Action>) {
        for id in ids {
            self.cancelled_in_advance.remove(id);
        }
        self.results.acknowledge(ids, out);
    }

    /// Drop a task for the client, unless it runs: then the client is told that it goes on.
    ///
    /// # Errors
    /// As [`Tasks::arrive`], for cancelled tasks that are not here.
    pub fn cancel(&mut self, id: Attempt, out: &mut Vec<Action>) -> Result<(), String> {
        if let Some(worker) = self.drop_task(id, out)? {
            self.ask(worker, Control::Cancel(id), id, out);
        }
        Ok(())
    }

    /// Drop a task for the client, even if it runs: its worker is replaced if the task is still running at `by`.
    ///
    /// # Errors
    /// As [`Tasks::cancel`].
    pub fn abort(&mut self, id: Attempt, by: Instant, out: &mut Vec<Action>) -> Result<(), String> {
        if let Some(worker) = self.drop_task(id, out)? {
            self.aborting.insert(id, KillDeadline { worker, by });
            out.push(Action::Tell(worker, Control::Cancel(id)));
        }
        Ok(())
    }

    /// Hand a task back to the client, unless it runs.
    pub fn recall(&mut self, id: Attempt, out: &mut Vec<Action>) {
        if self.is_other(id) {
            out.push(Action::Reply(Control::RecallRefused(id)));
            return;
        }
        if self.remove_early(id.task) {
            out.push(Action::Reply(Control::GivenBack(id)));
            return;
        }
        match self.queue.give_up(id.task) {
            Cancelled::Dropped => out.push(Action::Reply(Control::GivenBack(id))),
            Cancelled::Held(worker) => self.ask(worker, Control::Recall(id), id, out),
            Cancelled::Unknown => out.push(Action::Reply(Control::RecallRefused(id))),
        }
    }

    /// Return whether another attempt at the task is here: then this one is not, and what the client asks about it is no
    /// question about the one that is here.
    fn is_other(&self, id: Attempt) -> bool {
        self.attempt(id.task).is_some_and(|here| here != id)
    }

    /// Drop a task that waits here or has not arrived. Returns the worker that holds it otherwise.
    fn drop_task(&mut self, id: Attempt, out: &mut Vec<Action>) -> Result<Option<PeerId>, String> {
        let is_other = self.is_other(id);
        if !is_other && self.remove_early(id.task) {
            self.results.deliver(Message::cancelled(id), out);
            return Ok(None);
        }
        match if is_other { Cancelled::Unknown } else { self.queue.cancel(id.task) } {
            Cancelled::Dropped => self.results.deliver(Message::cancelled(id), out),
            Cancelled::Held(worker) => return Ok(Some(worker)),
            Cancelled::Unknown if self.cancelled_in_advance.len() >= MAX_TASKS => {
                return Err(format!("the client cancelled more than {MAX_TASKS} tasks that are not here"));
            }
            Cancelled::Unknown => {
                self.cancelled_in_advance.insert(id);
            }
        }
        Ok(None)
    }

    /// Ask a worker about a task for the client. While the workers are not read from, the worker's answer would come too
    /// late: then the client is told at once that the task goes on.
    fn ask(&mut self, worker: PeerId, question: Control, id: Attempt, out: &mut Vec<Action>) {
        if self.results.is_full() {
            self.refuse(id, out);
        } else {
            self.owed_answers.insert(id);
            out.push(Action::Tell(worker, question));
        }
    }

    /// Answer the client that a task, which a worker holds, goes on.
    fn refuse(&mut self, id: Attempt, out: &mut Vec<Action>) {
        if !self.is_aborting(id) {
            self.queue.uncancel(id.task);
        }
        out.push(Action::Reply(Control::RecallRefused(id)));
    }

    /// Answer what the client waits for, if the workers are not read from: their answers may be minutes away.
    pub fn answer_if_full(&mut self, out: &mut Vec<Action>) {
        if self.results.is_full() {
            for id in std::mem::take(&mut self.owed_answers) {
                self.refuse(id, out);
            }
        }
    }

    /// End a task with its worker's result, which goes to the client, unless the task has ended otherwise before.
    pub fn ended(&mut self, worker: PeerId, result: Message, now: Instant, out: &mut Vec<Action>) {
        if self.aborting.get(&result.id).is_some_and(|deadline| deadline.worker == worker) {
            self.aborting.remove(&result.id);
        }
        if self.queue.done(worker, result.id, now).is_some() {
            self.owed_answers.remove(&result.id);
            self.results.deliver(result, out);
        }
    }

    /// End a task that its worker has run for too long, with this `end`. [`Tasks::overdue_workers`] has the worker from now
    /// on. Return whether the worker still held the task.
    pub fn time_out(&mut self, worker: PeerId, end: Message, now: Instant, out: &mut Vec<Action>) -> bool {
        let late = self.queue.done(worker, end.id, now).is_some();
        if late {
            self.owed_answers.remove(&end.id);
            self.aborting.insert(end.id, KillDeadline { worker, by: now });
            self.results.deliver(end, out);
        }
        late
    }

    /// Take back a task from its worker. The task never began, so the worker need not be ended for it.
    pub fn given_back(&mut self, worker: PeerId, id: Attempt, out: &mut Vec<Action>) {
        if !self.queue.holds(worker, id) {
            return;
        }
        self.aborting.remove(&id);
        // A task that is to be dropped as well ends here.
        if self.owed_answers.remove(&id) && !self.queue.is_to_drop(worker, id) {
            self.queue.remove(id.task);
            out.push(Action::Reply(Control::GivenBack(id)));
        } else {
            self.queue.given_back(worker, id);
            self.leave_to_others(id.task);
        }
    }

    /// Note that a worker does not give a task back or drop it: the task runs.
    pub fn refused(&mut self, worker: PeerId, id: Attempt, out: &mut Vec<Action>) {
        self.queue.recall_refused(worker, id);
        if self.queue.holds(worker, id) && self.owed_answers.remove(&id) {
            self.refuse(id, out);
        }
    }

    /// Put back a task whose worker has died, and not of this task: the task runs elsewhere, goes back to a client that
    /// recalled it, or ends if it was cancelled.
    pub fn run_elsewhere(&mut self, task: u64, out: &mut Vec<Action>) {
        self.queue.requeue(task);
        if let Some(id) = self.queue.attempt(task).filter(|id| self.owed_answers.remove(id)) {
            self.queue.remove(task);
            out.push(Action::Reply(Control::GivenBack(id)));
        }
        self.leave_to_others(task);
    }

    /// Answer the client's question about a task whose worker has died, perhaps of this task, before it could answer: the
    /// task goes on.
    pub fn refuse_suspect(&mut self, task: u64, out: &mut Vec<Action>) {
        if let Some(id) = self.queue.attempt(task).filter(|id| self.owed_answers.remove(id)) {
            self.queue.uncancel(task);
            out.push(Action::Reply(Control::RecallRefused(id)));
        }
    }

    /// End a task whose worker has died, with this reason.
    pub fn crash(&mut self, task: u64, why: String, out: &mut Vec<Action>) {
        if let Some(message) = self.queue.remove(task) {
            self.results.deliver(Message::text(message.id, Outcome::Crashed, why), out);
        }
    }

    /// End the cancelled tasks that came back unstarted, or whose worker is gone.
    pub fn end_cancelled(&mut self, out: &mut Vec<Action>) {
        for id in self.queue.take_cancelled() {
            self.owed_answers.remove(&id);
            self.results.deliver(Message::cancelled(id), out);
        }
    }

    /// Return whether a task was aborted, or ended for its time, and its worker has not ended it yet.
    #[must_use]
    pub fn is_aborting(&self, id: Attempt) -> bool {
        self.aborting.contains_key(&id)
    }

    /// Return the workers that were to end an aborted or late task by now.
    #[must_use]
    pub fn overdue_workers(&self, now: Instant) -> Vec<PeerId> {
        self.aborting.values().filter(|deadline| deadline.by <= now).map(|deadline| deadline.worker).collect()
    }

    /// Forget the deadlines of the tasks that were aborted in a worker, which is gone. Returns these tasks.
    pub fn take_aborting(&mut self, worker: PeerId) -> HashSet<Attempt> {
        let there = self.aborting.iter().filter(|(_, deadline)| deadline.worker == worker);
        let tasks = there.map(|(id, _)| *id).collect();
        self.aborting.retain(|_, deadline| deadline.worker != worker);
        tasks
    }

    /// Return whether all parts agree with one another: the client is owed answers only for tasks that a worker holds, and only
    /// `workers` have tasks to abort.
    #[must_use]
    pub fn is_consistent(&self, is_there: impl Fn(PeerId) -> bool) -> bool {
        self.results.is_consistent()
            && self.others.is_consistent()
            && self.blobs.is_consistent(&is_there, |task| self.queue.attempt(task).is_some())
            && self
                .owed_answers
                .iter()
                .all(|id| self.queue.attempt(id.task) == Some(*id) && !self.queue.is_orphan(id.task))
            && self.aborting.values().all(|deadline| is_there(deadline.worker))
    }
}
