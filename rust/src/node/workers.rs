//! The worker processes as the agent's decider sees them: their roles, who is blamed when one dies, and which are to be
//! started, replaced or killed.
//!
//! A worker that dies while one task runs in it was ended by that task. If several tasks ran, each of them runs again,
//! isolated in a process that runs nothing else, and the one that ends that process too is named as the cause. If no such
//! process can be started, the suspects end with the reason. Tasks that only waited in the dead worker run elsewhere. A
//! spare worker stands by, so that a replacement need not start first.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use crate::node::actions::{Action, Exit};
use crate::node::tasks::Tasks;
use crate::queue::PeerId;
use crate::timing::{PEER_TIMEOUT, Timing};
use crate::wire::Control;

/// How often the decider is told that time has gone on.
pub const TICK: Duration = Timing::DEFAULT.tick;
/// How long an aborted task may go on before its worker is replaced. Most tasks that are aborted end by themselves.
pub const ABORT_GRACE: Duration = Duration::from_secs(1);
/// How long a worker that is being replaced may go on for the sake of its other tasks.
pub const RETIREMENT: Duration = Duration::from_secs(3);
/// So many workers that die one after another before their first task end the node.
pub const MAX_EARLY_DEATHS: usize = 3;
/// How long after the node is ready its spare worker starts. The first tasks do not have to share the processor with it.
pub const SPARE_DELAY: Duration = Duration::from_secs(2);
/// Pause after a spare worker that did not start.
pub const SPARE_RETRY: Duration = Duration::from_secs(10);
/// So many crash suspects run at once at least, each in a process of its own; one for each core if those are more.
const MIN_ISOLATED: usize = 4;

/// What a worker process is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Takes tasks.
    Regular,
    /// Takes none, and is ready to take another worker's place.
    Spare,
    /// Runs crash suspects, one at a time.
    Isolated,
    /// Takes no more tasks since this time, and ends soon.
    Retired(Instant),
    /// Is of another generation than the tasks that come now. It takes no more tasks, has as long as it likes for those that it
    /// holds, and is then asked to end; when it was asked.
    Outdated(Option<Instant>),
}

/// One worker process.
#[derive(Debug)]
pub struct WorkerState {
    pub role: Role,
    /// It has said that it takes tasks.
    pub ready: bool,
    /// Ticks since something came from it; `None` until the first time.
    silent_ticks: Option<u32>,
    /// It has ended a task.
    pub(super) has_ended_a_task: bool,
}

impl WorkerState {
    /// Return whether the process is taken for stopped: no byte came from it for longer than [`PEER_TIMEOUT`].
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.silent_ticks.is_some_and(|ticks| TICK * ticks > PEER_TIMEOUT)
    }

    /// Return whether its tasks may have left something to write at its end, and it is not being replaced.
    #[must_use]
    pub fn has_something_to_write(&self) -> bool {
        self.has_ended_a_task && !matches!(self.role, Role::Retired(_))
    }
}

/// Which of the tasks that a worker process held may have ended it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Blame {
    /// The tasks that ran, the one that began last first: most tasks that kill a process do it soon.
    pub suspects: Vec<u64>,
    /// The other tasks, the one that was sent last first.
    pub innocent: Vec<u64>,
    /// The process ended before it got to its first task, so the next one will probably do the same.
    pub early: bool,
}

/// All worker processes. See the module's text.
#[derive(Debug)]
pub struct Workers {
    pub(super) members: BTreeMap<PeerId, WorkerState>,
    /// Tasks at once in one process.
    slots: usize,
    /// The node's cores.
    cores: usize,
    /// The number of the worker that was started last.
    started: PeerId,
    /// Regular workers that died before their first task, since the last task that ended.
    early_deaths: usize,
    /// Tasks that ran in a worker that died, together with others, and wait for a process of their own.
    pub(super) crash_suspects: VecDeque<u64>,
    /// Workers that died before they could run a suspect, since suspects wait.
    failed_isolations: usize,
    /// The node has been ready, so a spare worker is worth its memory.
    wants_spare: bool,
    /// When the next spare worker may be started; `None` while one is there or starts.
    pub(super) spare_due: Option<Instant>,
    /// No worker is to be started, and no task to be blamed for one that ends.
    over: bool,
}

impl Workers {
    #[must_use]
    pub fn new(slots: usize, cores: usize) -> Self {
        Self {
            members: BTreeMap::new(),
            slots,
            cores,
            started: 0,
            early_deaths: 0,
            crash_suspects: VecDeque::new(),
            failed_isolations: 0,
            wants_spare: false,
            spare_due: None,
            over: false,
        }
    }

    /// Start nothing from now on, and blame no task for a worker that ends.
    pub fn finish(&mut self) {
        self.over = true;
    }

    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Return the workers that are there, in the order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (PeerId, &WorkerState)> {
        self.members.iter().map(|(id, worker)| (*id, worker))
    }

    pub fn start(&mut self, role: Role, out: &mut Vec<Action>) {
        if self.over {
            return;
        }
        self.started += 1;
        let worker = WorkerState { role, ready: false, silent_ticks: None, has_ended_a_task: false };
        self.members.insert(self.started, worker);
        out.push(Action::Start(self.started));
    }

    /// Forget a worker whose process could not be started. Returns whether the node cannot do without it.
    pub fn not_started(&mut self, worker: PeerId, now: Instant) -> bool {
        let Some(WorkerState { role, .. }) = self.members.remove(&worker) else { return false };
        if role == Role::Spare {
            self.spare_due = Some(now + SPARE_RETRY);
        }
        role == Role::Regular || !self.crash_suspects.is_empty()
    }

    /// Take out a worker whose process has ended.
    pub fn remove(&mut self, worker: PeerId) -> Option<WorkerState> {
        self.members.remove(&worker)
    }

    /// Note that bytes came from a worker.
    pub fn heard(&mut self, worker: PeerId) {
        if let Some(worker) = self.members.get_mut(&worker) {
            worker.silent_ticks = Some(0);
        }
    }

    /// Note that a worker takes tasks. Return whether this is new and all workers are ready now.
    pub fn is_ready(&mut self, id: PeerId, tasks: &mut Tasks, now: Instant) -> bool {
        let Some(worker) = self.members.get_mut(&id).filter(|worker| !worker.ready) else { return false };
        worker.ready = true;
        if worker.role == Role::Regular {
            tasks.queue.add_peer(id, self.slots, now);
        }
        self.members.values().all(|worker| worker.ready)
    }

    /// Note that the node is ready: its spare worker may start after [`SPARE_DELAY`].
    pub fn want_spare(&mut self, now: Instant) {
        self.wants_spare = true;
        self.spare_due = Some(now + SPARE_DELAY);
    }

    /// Note that a worker ended a task.
    pub fn ended_a_task(&mut self, worker: PeerId) {
        if let Some(worker) = self.members.get_mut(&worker) {
            worker.has_ended_a_task = true;
        }
        self.early_deaths = 0;
    }

    /// Return which of the tasks in `held` may have ended this worker process, which is taken out already.
    ///
    /// Only tasks that began are suspects. If what the process sent could not be read, its answers are unknown, and each
    /// of the first `slots` tasks may have begun. An aborted task is no suspect: the process was ended for it.
    pub fn blame(&self, id: PeerId, worker: &WorkerState, held: &[u64], exit: &Exit, tasks: &mut Tasks) -> Blame {
        let aborted = tasks.take_aborting(id);
        let may_have_begun = if exit.unreadable.is_some() { held.len().min(self.slots) } else { 0 };
        let mut blame = Blame {
            // A worker that died of a task did something, and one that died idle may have been killed.
            early: !worker.has_ended_a_task
                && exit.running.is_empty()
                && may_have_begun == 0
                && !(worker.ready && held.is_empty()),
            ..Blame::default()
        };
        let mut suspects = Vec::new();
        for (at, &task) in held.iter().enumerate().rev() {
            let attempt = tasks.queue.attempt(task).filter(|attempt| !aborted.contains(attempt));
            let ran = exit.running.iter().find(|(id, _)| Some(*id) == attempt).map(|(_, age)| *age);
            let age = ran.or_else(|| attempt.filter(|_| at < may_have_begun).map(|_| Duration::ZERO));
            match age {
                Some(age) if !matches!(worker.role, Role::Retired(_)) => suspects.push((age, task)),
                _ => blame.innocent.push(task),
            }
        }
        suspects.sort_unstable();
        blame.suspects = suspects.into_iter().map(|(_, task)| task).collect();
        blame
    }

    /// Note that these tasks are to run again, each in a process of its own.
    pub fn suspect(&mut self, tasks: Vec<u64>) {
        self.crash_suspects.extend(tasks);
    }

    /// Replace a regular worker that has ended, or return true if the node is to be given up.
    pub fn lost_regular(&mut self, early: bool, tasks: &mut Tasks, now: Instant, out: &mut Vec<Action>) -> bool {
        self.early_deaths += usize::from(early);
        if self.early_deaths >= MAX_EARLY_DEATHS {
            return true;
        }
        self.replace(tasks, now, out);
        false
    }

    /// Note that a spare or isolated worker has ended. Return the suspects that are to be given up: all of them, if too many
    /// processes in a row ended before they could run a suspect.
    pub fn lost_helper(&mut self, early: bool, now: Instant) -> Vec<u64> {
        if !early {
            self.spare_due = Some(now);
            return Vec::new();
        }
        self.spare_due = Some(now + SPARE_RETRY);
        self.failed_isolations += usize::from(!self.crash_suspects.is_empty());
        let others = self.count(Role::Spare) + self.count(Role::Isolated);
        if self.failed_isolations < MAX_EARLY_DEATHS || others > 0 {
            return Vec::new();
        }
        std::mem::take(&mut self.crash_suspects).into()
    }

    /// Put a worker in the place of one that is lost: the spare if there is one.
    fn replace(&mut self, tasks: &mut Tasks, now: Instant, out: &mut Vec<Action>) {
        self.spare_due = Some(now);
        match self.find_spare(true).or_else(|| self.find_spare(false)) {
            Some(spare) => {
                if self.set_role(spare, Role::Regular) {
                    tasks.queue.add_peer(spare, self.slots, now);
                }
            }
            None => self.start(Role::Regular, out),
        }
    }

    /// Replace a worker that runs a task that must end. [`Workers::kill_lost`] kills the worker at once if it runs nothing
    /// else.
    pub fn retire(&mut self, id: PeerId, tasks: &mut Tasks, now: Instant, out: &mut Vec<Action>) {
        let Some(role) = self.members.get(&id).map(|worker| worker.role) else { return };
        if matches!(role, Role::Retired(_)) {
            return;
        }
        self.set_role(id, Role::Retired(now));
        out.extend(tasks.queue.close_peer(id).into_iter().map(|task| Action::Tell(id, Control::Recall(task))));
        if role == Role::Regular {
            self.replace(tasks, now, out);
        }
    }

    /// Send each crash suspect to a process of its own, a few at a time, and start the processes that are missing for that.
    /// Isolated workers that have nothing left to do become spares.
    pub fn isolate_suspects(&mut self, tasks: &mut Tasks, now: Instant, out: &mut Vec<Action>) {
        loop {
            let queue = &mut tasks.queue;
            let idle = |id: &PeerId| queue.held(*id).next().is_none();
            let isolated = self.members.iter().filter(|(_, worker)| worker.role == Role::Isolated);
            let free = isolated.map(|(id, _)| *id).find(idle);
            let Some(&task) = self.crash_suspects.front() else {
                self.failed_isolations = 0;
                let Some(worker) = free else { return };
                queue.remove_peer(worker);
                self.set_role(worker, Role::Spare);
                continue;
            };
            if !queue.is_orphan(task) {
                // It was cancelled meanwhile.
                self.crash_suspects.pop_front();
                continue;
            }
            let Some(worker) = free.or_else(|| self.find_spare(true)) else { break };
            if free.is_none() {
                self.set_role(worker, Role::Isolated);
                queue.add_peer(worker, 1, now);
                queue.close_peer(worker);
            }
            self.crash_suspects.pop_front();
            if let Some(message) = queue.give(worker, task) {
                tasks.assign(worker, message, out);
            }
        }
        if self.spare_due.is_none_or(|due| due <= now) {
            for _ in self.count(Role::Spare)..self.spares_wanted() {
                self.start(Role::Spare, out);
            }
        }
    }

    /// Retire the workers whose aborted or late tasks have not ended in time.
    pub fn end_overdue(&mut self, tasks: &mut Tasks, now: Instant, out: &mut Vec<Action>) {
        for worker in tasks.overdue_workers(now) {
            self.retire(worker, tasks, now, out);
        }
    }

    /// Count a tick of silence for each worker, unless none is read from, and kill those that are stopped. Kill retired workers
    /// that have had their time or run nothing but aborted tasks, and outdated ones that were asked to end and have not.
    pub fn kill_lost(&mut self, tasks: &Tasks, now: Instant, out: &mut Vec<Action>) {
        for (&id, worker) in &mut self.members {
            if let Some(ticks) = worker.silent_ticks.as_mut().filter(|_| !tasks.results.is_full()) {
                *ticks += 1;
                if worker.is_silent() {
                    out.push(Action::Kill(id));
                }
            }
            let only_aborting = || tasks.queue.held(id).all(|task| tasks.is_aborting(task));
            let is_due = match worker.role {
                Role::Retired(since) => since + RETIREMENT <= now || only_aborting(),
                Role::Outdated(Some(since)) => since + Timing::DEFAULT.worker_exit <= now,
                Role::Regular | Role::Spare | Role::Isolated | Role::Outdated(None) => false,
            };
            if is_due {
                out.push(Action::Kill(id));
            }
        }
    }

    /// Start the spare worker if there is none and it is due.
    pub fn start_spare(&mut self, now: Instant, out: &mut Vec<Action>) {
        if self.wants_spare && self.count(Role::Spare) == 0 && self.spare_due.is_some_and(|due| due <= now) {
            self.spare_due = None;
            self.start(Role::Spare, out);
        }
    }

    /// Retire all spare workers but one, or as many as crash suspects wait for. [`Workers::kill_lost`] kills them then.
    pub fn retire_surplus(&mut self, now: Instant) {
        let wanted = self.spares_wanted().max(1);
        let spares = self.members.values_mut().filter(|worker| worker.role == Role::Spare);
        spares.skip(wanted).for_each(|surplus| surplus.role = Role::Retired(now));
    }

    fn count(&self, role: Role) -> usize {
        self.members.values().filter(|worker| worker.role == role).count()
    }

    /// Spare workers that the waiting suspects need.
    fn spares_wanted(&self) -> usize {
        self.crash_suspects.len().min(self.cores.max(MIN_ISOLATED).saturating_sub(self.count(Role::Isolated)))
    }

    fn find_spare(&self, ready: bool) -> Option<PeerId> {
        let mut spares = self.members.iter().filter(|(_, worker)| worker.role == Role::Spare && worker.ready == ready);
        spares.next().map(|(id, _)| *id)
    }

    /// Returns whether the worker is ready.
    fn set_role(&mut self, worker: PeerId, role: Role) -> bool {
        self.members.get_mut(&worker).is_some_and(|worker| {
            worker.role = role;
            worker.ready
        })
    }

    /// Return whether each task that no worker may take waits for a process of its own.
    #[must_use]
    pub fn is_consistent(&self, tasks: &Tasks) -> bool {
        let suspects: HashSet<_> = self.crash_suspects.iter().copied().collect();
        tasks.queue.orphans().all(|task| suspects.contains(&task))
            && tasks.is_consistent(|worker| self.members.contains_key(&worker))
            && self.early_deaths <= MAX_EARLY_DEATHS
    }
}
