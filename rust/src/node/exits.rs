//! What becomes of a worker's tasks when its process has ended: the part of the decider (`state.rs`) that blames, and replaces.

use std::time::Instant;

use crate::node::actions::{Action, Exit};
use crate::node::state::State;
use crate::node::workers::{MAX_EARLY_DEATHS, Role, WorkerState};
use crate::queue::PeerId;
use crate::timing::PEER_TIMEOUT;

impl State {
    pub(super) fn on_exit(&mut self, id: PeerId, exit: &Exit, now: Instant, out: &mut Vec<Action>) {
        let Some(worker) = self.workers.remove(id) else { return };
        let held = self.tasks.queue.remove_peer(id);
        self.tasks.blobs.worker_ended(id);
        if self.workers.is_over() {
            return;
        }
        let blame = self.workers.blame(id, &worker, &held, exit, &mut self.tasks);
        for task in blame.innocent {
            self.tasks.run_elsewhere(task, out);
        }
        for &task in &blame.suspects {
            self.tasks.refuse_suspect(task, out);
        }
        let what = self.describe(&worker, exit);
        let tail = &exit.stderr_tail;
        if let [culprit] = blame.suspects[..] {
            let again = if worker.role == Role::Isolated { " again, alone" } else { "" };
            self.tasks.crash(culprit, format!("{what} while it ran this task{again}{tail}"), out);
        } else if matches!(worker.role, Role::Outdated(_)) {
            // They run again in fresh workers of their generation, in which the one that kills a worker is found.
            blame.suspects.into_iter().for_each(|task| self.tasks.run_elsewhere(task, out));
        } else {
            self.workers.suspect(blame.suspects);
        }
        match worker.role {
            Role::Regular => {
                if self.workers.lost_regular(blame.early, &mut self.tasks, now, out) {
                    self.stop(format!("{MAX_EARLY_DEATHS} workers in a row ended by themselves: {what}{tail}"), out);
                }
            }
            Role::Spare | Role::Isolated => {
                for task in self.workers.lost_helper(blame.early, now) {
                    // Suspects that were cancelled meanwhile have ended.
                    if self.tasks.queue.is_orphan(task) {
                        let text = format!(
                            "this task ran in a worker process that died of one of its tasks, and no other could be \
                             started to run it again, alone: {what}{tail}"
                        );
                        self.tasks.crash(task, text, out);
                    }
                }
            }
            Role::Retired(_) | Role::Outdated(_) => {}
        }
    }

    /// Return how a worker's process ended, as a sentence without its end.
    fn describe(&self, worker: &WorkerState, exit: &Exit) -> String {
        let how = match &exit.unreadable {
            Some(error) => {
                format!("was ended because what it sent cannot be read ({error}), perhaps a task wrote to its socket")
            }
            None if worker.is_silent() => {
                format!("gave no sign of life for {} s and was ended", PEER_TIMEOUT.as_secs())
            }
            None => exit.how.clone(),
        };
        format!("node {}: worker process {} {how}", self.settings.node, exit.pid)
    }
}
