//! How fresh workers take the place of all others, when only tasks of another generation wait: see `generations.rs`.

use std::time::Instant;

use bytes::Bytes;

use crate::node::actions::Action;
use crate::node::tasks::Tasks;
use crate::node::workers::{Role, SPARE_DELAY, Workers};
use crate::wire::{Control, Message};

impl Tasks {
    /// Return the generation of the workers.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Queue a task for the workers; behind those of other generations, if there are any.
    pub(super) fn enqueue(&mut self, task: Message) {
        if task.generation == self.generation && self.others.is_empty() {
            self.queue.push(task);
        } else {
            self.others.push(task);
        }
    }

    /// Go on to the next tasks in `generations.rs`, if no task waits in the queue. Return whether the workers are of another
    /// generation than these tasks, and fresh ones are to take their place.
    pub fn change_generation(&mut self) -> bool {
        if self.queue.waiting() > 0 {
            return false;
        }
        let Some(next) = self.others.next() else { return false };
        self.others.take_next().into_iter().for_each(|task| self.queue.push(task));
        std::mem::replace(&mut self.generation, next) != next
    }

    /// Move a task that was put back into the queue to those of other generations, if the workers are of another one.
    pub(super) fn leave_to_others(&mut self, task: u64) {
        if self.queue.waiting_message(task).is_some_and(|message| message.generation != self.generation)
            && let Some(message) = self.queue.remove(task)
        {
            self.others.push_front(message);
        }
    }
}

impl Workers {
    /// Return whether fresh workers may take the place of all: no crash suspect waits for a process.
    #[must_use]
    pub fn may_be_renewed(&self) -> bool {
        self.crash_suspects.is_empty()
    }

    /// Start fresh workers in the place of all that take tasks, and end those that hold none. Isolated workers end the suspects
    /// that they run: those that run none have become spares.
    pub fn renew(&mut self, tasks: &mut Tasks, now: Instant, out: &mut Vec<Action>) {
        let mut regular = 0;
        for (&id, worker) in &mut self.members {
            regular += usize::from(worker.role == Role::Regular);
            match worker.role {
                Role::Regular if worker.ready => {
                    worker.role = Role::Outdated(None);
                    tasks.queue.pause_peer(id, true);
                }
                Role::Isolated => worker.role = Role::Outdated(None),
                Role::Regular | Role::Spare => {
                    worker.role = Role::Retired(now);
                    out.push(Action::Kill(id));
                }
                Role::Retired(_) | Role::Outdated(_) => {}
            }
        }
        (0..regular).for_each(|_| self.start(Role::Regular, out));
        self.spare_due = Some(now + SPARE_DELAY);
    }

    /// Ask outdated workers to end that have ended what they held. Those that have nothing to write are killed, unless plugins
    /// are to undo what they set up there.
    pub fn end_outdated(&mut self, tasks: &Tasks, unwind: bool, now: Instant, out: &mut Vec<Action>) {
        for (&id, worker) in &mut self.members {
            if worker.role != Role::Outdated(None) || tasks.queue.held(id).next().is_some() {
                continue;
            }
            worker.role = Role::Outdated(Some(now));
            out.push(if unwind || worker.has_ended_a_task {
                Action::Tell(id, Control::Goodbye(Bytes::new()))
            } else {
                Action::Kill(id)
            });
        }
    }
}
