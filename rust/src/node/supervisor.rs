//! The agent's worker processes: started, followed, replaced, and blamed when they die.
//!
//! A worker that dies while one task runs in it was ended by that task. If several ran, each of them runs again, alone
//! in a process of its own, and the one that ends that process too is named. If no such process can be started, they
//! end with the reason. What only waited in the worker runs elsewhere. A spare worker stands by, so that a replacement
//! need not start first.
//!
//! What a worker writes to its standard output and standard error goes to the client by way of `output.rs`. When the
//! client leaves, workers that have run tasks end as interpreters do, see [`Agent::dismiss`].

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tracing::info;

use crate::error::{AgentError, FrameError, SessionError};
use crate::node::agent::{Agent, State, TICK};
use crate::node::process_group::{Group, PAUSE, Survivors};
use crate::node::slot_table::SlotTable;
use crate::node::stdio::{self, STDERR, STDOUT, forward};
use crate::node::worker::UNWIND;
use crate::queue::PeerId;
use crate::timing::Timing;
use crate::wire::{Attempt, Body, Control, Message, Outcome};
use crate::wire::{EventReader, FrameSender, LEAST_MESSAGE, PEER_TIMEOUT, WorkerHello, hello, lock};

/// How long an aborted task may go on before its worker is replaced: most end by themselves.
pub const GRACE: Duration = Duration::from_secs(1);
/// How long a worker that is being replaced may go on for the sake of its other tasks.
const BYSTANDERS: Duration = Duration::from_secs(3);
/// Workers that may die one after another before their first task before the node is given up.
const FALSE_STARTS: usize = 3;
/// The spare starts when the first tasks are on their way, not in their way.
const SPARE_AFTER: Duration = Duration::from_secs(2);
/// Pause after a spare that did not start.
const SPARE_RETRY: Duration = Duration::from_secs(10);
/// Processes that run suspects, at least; one for each core if those are more.
const SOLOS: usize = 4;
/// How long output is awaited after the worker's end: something outside its group may hold the pipe.
const LAST_OUTPUT: Duration = Duration::from_millis(200);
/// Bound on the end of a worker that was killed, and on reading what it still sent.
const LAST_WORDS: Duration = Timing::DEFAULT.worker_kill;
/// What limits the threads of the numeric libraries, which each take all cores by themselves.
const THREAD_VARIABLES: [&str; 7] = [
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Takes tasks.
    Regular,
    /// Stands by.
    Spare,
    /// Runs suspects, one at a time.
    Solo,
    /// Takes nothing more and ends soon.
    Retired(Instant),
}

struct Member {
    role: Role,
    ready: bool,
    link: Arc<FrameSender>,
    pid: u32,
    group: Group,
    table: SlotTable,
    /// Ticks since it was heard; `None` before the first time.
    silent: Option<u32>,
    /// It has ended a task.
    useful: bool,
    /// The end of its standard error.
    tail: Arc<Mutex<Vec<u8>>>,
}

/// A running task that must end.
#[derive(Debug)]
pub struct KillDeadline {
    pub worker: PeerId,
    /// When it is to be ended by force.
    pub by: Instant,
}

/// All workers, and what is known of their misdeeds.
#[derive(Default)]
pub struct Workers {
    members: HashMap<PeerId, Member>,
    started: PeerId,
    false_starts: usize,
    pub doomed: HashMap<Attempt, KillDeadline>,
    /// Ran in a worker that died together with others: to run alone.
    suspects: VecDeque<u64>,
    /// Workers that died before they could run one, since some wait.
    false_solos: usize,
    /// The node has been ready, so it is worth a spare.
    proven: bool,
    spare_due: Option<Instant>,
    /// How many processes the kernel has ended for want of memory.
    starved: Option<u64>,
    /// No worker is to be started any more.
    over: bool,
}

impl Workers {
    /// Send a task.
    pub fn send(&mut self, worker: PeerId, task: Message) {
        if let Some(member) = self.members.get(&worker) {
            member.link.send(|o| o.message(Body::Task, task));
        }
    }

    pub fn tell(&self, worker: PeerId, control: Control) {
        if let Some(member) = self.members.get(&worker) {
            member.link.send(|o| o.control(control));
        }
    }

    pub fn tell_all(&self, control: &Control) {
        for member in self.members.values() {
            member.link.send(|o| o.control(control.clone()));
        }
    }

    /// A worker said something.
    pub fn heard(&mut self, worker: PeerId) {
        if let Some(member) = self.members.get_mut(&worker) {
            member.silent = Some(0);
        }
    }

    /// A worker ended a task.
    pub fn was_useful(&mut self, worker: PeerId) {
        if let Some(member) = self.members.get_mut(&worker) {
            member.useful = true;
        }
        self.false_starts = 0;
    }

    /// Whether a worker has said before that it can take tasks.
    #[must_use]
    pub fn was_ready(&self, worker: PeerId) -> bool {
        self.members.get(&worker).is_some_and(|member| member.ready)
    }

    /// A worker can take tasks. Its slots, if it shall.
    pub fn is_ready(&mut self, worker: PeerId, slots: usize) -> Option<usize> {
        let member = self.members.get_mut(&worker)?;
        member.ready = true;
        (member.role == Role::Regular).then_some(slots)
    }

    /// Whether all workers are ready.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.members.values().all(|m| m.ready)
    }

    pub fn want_spare_later(&mut self) {
        self.proven = true;
        self.spare_due = Some(Instant::now() + SPARE_AFTER);
    }

    fn count(&self, role: Role) -> usize {
        self.members.values().filter(|m| m.role == role).count()
    }

    /// Spares that the waiting suspects need.
    fn spares_wanted(&self, cores: usize) -> usize {
        self.suspects.len().min(cores.max(SOLOS).saturating_sub(self.count(Role::Solo)))
    }

    fn find(&self, role: Role, ready: bool) -> Option<PeerId> {
        self.members.iter().find(|(_, m)| m.role == role && m.ready == ready).map(|(id, _)| *id)
    }

    fn set_role(&mut self, worker: PeerId, role: Role) {
        if let Some(member) = self.members.get_mut(&worker) {
            member.role = role;
        }
    }

    fn kill(&self, worker: PeerId) {
        if let Some(member) = self.members.get(&worker) {
            member.group.kill_leader();
        }
    }
}

impl Agent {
    pub(crate) fn start_crew(self: &Arc<Self>) -> Result<(), AgentError> {
        let mut state = lock(&self.state);
        state.crew.starved = starved();
        for _ in 0..self.shape().0 {
            self.start_worker(&mut state, Role::Regular)?;
        }
        Ok(())
    }

    fn start_worker(self: &Arc<Self>, state: &mut State, role: Role) -> Result<(), AgentError> {
        let (ours, theirs) = StdUnixStream::pair().map_err(AgentError::Spawn)?;
        let table = SlotTable::new().map_err(AgentError::Spawn)?;
        table.send(&ours).map_err(AgentError::Spawn)?;
        ours.set_nonblocking(true).map_err(AgentError::Spawn)?;
        let ours = UnixStream::from_std(ours).map_err(AgentError::Spawn)?;
        let (program, arguments) =
            self.spec.worker.split_first().ok_or_else(|| AgentError::Refused("no worker command".to_owned()))?;
        let slots = self.shape().1;
        let threads = (self.cores / self.work.concurrency.unwrap_or(self.cores).max(1)).max(1).to_string();
        let mut child = Command::new(program)
            .args(arguments)
            .envs(THREAD_VARIABLES.iter().filter(|v| std::env::var_os(v).is_none()).map(|v| (*v, &threads)))
            .envs(&self.work.env)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A group of its own: it can be ended with all that it started, and Ctrl-C at a terminal is not its.
            .process_group(0)
            .spawn()
            .map_err(AgentError::Spawn)?;
        let link = Arc::new(FrameSender::default());
        let setup =
            hello(&WorkerHello { node: self.node.clone(), slots, lease_ms: self.lease_ms, work: self.work.clone() })?;
        link.send(|o| o.control(setup));
        state.crew.started += 1;
        let id = state.crew.started;
        let tail = Arc::<Mutex<Vec<u8>>>::default();
        let mut outlets = tokio::task::JoinSet::new();
        if let Some(stdout) = child.stdout.take() {
            outlets.spawn(forward(stdout, stdio::stream(id, STDOUT), Arc::clone(&self.link), None));
        }
        if let Some(stderr) = child.stderr.take() {
            outlets.spawn(forward(stderr, stdio::stream(id, STDERR), Arc::clone(&self.link), Some(Arc::clone(&tail))));
        }
        let pid = child.id().unwrap_or_default();
        info!(worker = id, pid, "worker started");
        let link_ = Arc::clone(&link);
        let group = Group::of(pid);
        let group_ = group.clone();
        let member =
            Member { role, ready: false, link: link_, pid, group: group_, table, silent: None, useful: false, tail };
        state.crew.members.insert(id, member);
        tokio::spawn(Arc::clone(self).tend(id, child, group, ours, link, outlets));
        Ok(())
    }

    /// Follow one worker from its first byte to its exit status.
    async fn tend(
        self: Arc<Self>,
        id: PeerId,
        mut child: Child,
        group: Group,
        socket: UnixStream,
        link: Arc<FrameSender>,
        mut outlets: tokio::task::JoinSet<()>,
    ) {
        let (from, to) = socket.into_split();
        let reading = async {
            let mut source = EventReader::new(from, self.work.max_payload.max(LEAST_MESSAGE));
            let mut events = Vec::new();
            loop {
                match source.read_admitted(&mut events, |offer| self.admit(id, offer)).await {
                    Err(SessionError::Frame(nonsense)) => {
                        // Results that came before the nonsense count, and their tasks are not blamed for it.
                        self.on_worker(id, &mut events);
                        break Some(nonsense);
                    }
                    Err(_) => break None,
                    Ok(()) => self.on_worker(id, &mut events),
                }
                while lock(&self.state).is_full() {
                    // The tick is for a relief between the look and the wait.
                    drop(tokio::time::timeout(TICK, self.relief.notified()).await);
                }
            }
        };
        tokio::pin!(reading);
        let mut all_read = false;
        let mut nonsense = None;
        let early = tokio::select! {
            end = &mut reading => {
                all_read = true;
                nonsense = end;
                None
            }
            // A write that fails or blocks for too long: the process is dead or stopped.
            _ = link.run(to, Some(PEER_TIMEOUT)) => None,
            // Its end of the socket may live on in a process that a task forked.
            status = child.wait() => Some(status),
        };
        let status = if let Some(status) = early {
            Ok(status)
        } else {
            group.kill_leader();
            tokio::time::timeout(LAST_WORDS, child.wait()).await
        };
        // With the group the last copies of that end are closed; what it still sent can be read to the end.
        end_group(&group).await;
        if !all_read {
            drop(tokio::time::timeout(LAST_WORDS, reading).await);
        }
        drop(tokio::time::timeout(LAST_OUTPUT, async { while outlets.join_next().await.is_some() {} }).await);
        self.worker_ended(id, status.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())), nonsense.as_ref());
    }

    /// A worker has ended. `nonsense`: it was ended because of what came over its socket, which a task can write to.
    fn worker_ended(self: &Arc<Self>, id: PeerId, status: io::Result<ExitStatus>, nonsense: Option<&FrameError>) {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let Some(member) = state.crew.members.remove(&id) else { return };
        info!(worker = id, pid = member.pid, ?status, "worker ended");
        let held = state.queue.remove_peer(id);
        let running = member.table.running(self.shape().1);
        let doomed: Vec<_> = state.crew.doomed.extract_if(|_, doom| doom.worker == id).map(|(id, _)| id).collect();
        if state.crew.over {
            return;
        }
        let what = match nonsense {
            None => self.obituary(&mut state.crew, &member, status),
            Some(error) => format!(
                "node {}: worker process {} was ended because what it sent cannot be read ({error}), perhaps a task wrote \
                 to its socket",
                self.node, member.pid
            ),
        };
        // What it had to say after the nonsense is unknown: each task that can have begun may have written it.
        let began: Vec<_> = held.iter().take(if nonsense.is_some() { self.shape().1 } else { 0 }).copied().collect();
        // A worker that died of a task did something, and one that died idle may have been killed. One that dies before
        // it gets to its first task will do so again.
        let idle = running.is_empty() && began.is_empty();
        let false_start = !member.useful && idle && !(member.ready && held.is_empty());
        let mut suspects = Vec::new();
        for task in held.into_iter().rev() {
            let attempt = state.queue.attempt(task).filter(|a| !doomed.contains(a));
            let ran = running.iter().find(|(ran, _)| Some(*ran) == attempt).map(|(_, age)| *age);
            match ran.or_else(|| attempt.filter(|_| began.contains(&task)).map(|_| Duration::ZERO)) {
                Some(age) if !matches!(member.role, Role::Retired(_)) => {
                    // The client asked for it back or to drop it, and the worker has not answered.
                    if let Some(id) = attempt.filter(|id| state.asked.remove(id)) {
                        state.queue.uncancel(task);
                        self.link.send(|o| o.control(Control::RecallRefused(id)));
                    }
                    suspects.push((age, task));
                }
                // One that was cancelled ends with this.
                _ => {
                    state.queue.requeue(task);
                    // The client asked for it back, and the worker has not answered.
                    if let Some(id) = state.queue.attempt(task).filter(|id| state.asked.remove(id)) {
                        state.queue.remove(task);
                        self.link.send(|o| o.control(Control::GivenBack(id)));
                    }
                }
            }
        }
        if let [(_, culprit)] = suspects[..] {
            if let Some(message) = state.queue.remove(culprit) {
                state.asked.remove(&message.id);
                let again = if member.role == Role::Solo { " again, alone," } else { "" };
                let text = format!("{what} while it ran this task{again}{}", member.last_words());
                self.deliver(state, Message::text(message.id, Outcome::Crashed, text));
            }
        } else {
            // Held back until each can have a process for itself. Most tasks that kill do it soon.
            suspects.sort_unstable();
            state.crew.suspects.extend(suspects.into_iter().map(|(_, task)| task));
        }
        match member.role {
            Role::Regular => {
                state.crew.false_starts += usize::from(false_start);
                if state.crew.false_starts >= FALSE_STARTS {
                    let why =
                        format!("{FALSE_STARTS} workers in a row ended by themselves: {what}{}", member.last_words());
                    self.end(state, why);
                } else {
                    self.replace(state);
                }
            }
            Role::Spare | Role::Solo if false_start => {
                state.crew.spare_due = Some(Instant::now() + SPARE_RETRY);
                state.crew.false_solos += usize::from(!state.crew.suspects.is_empty());
                let others = state.crew.count(Role::Spare) + state.crew.count(Role::Solo);
                if state.crew.false_solos >= FALSE_STARTS && others == 0 {
                    self.fail_suspects(state, &format!("{what}{}", member.last_words()));
                }
            }
            Role::Spare | Role::Solo => state.crew.spare_due = Some(Instant::now()),
            Role::Retired(_) => {}
        }
        self.pump(state);
    }

    /// End the tasks that wait to run alone: no worker can be started for them.
    fn fail_suspects(&self, state: &mut State, what: &str) {
        for task in std::mem::take(&mut state.crew.suspects) {
            // Others were cancelled meanwhile.
            if state.queue.is_orphan(task)
                && let Some(message) = state.queue.remove(task)
            {
                state.asked.remove(&message.id);
                let text = format!(
                    "this task ran in a worker process that died of one of its tasks, and no other could be started to \
                     run it again, alone: {what}"
                );
                self.deliver(state, Message::text(message.id, Outcome::Crashed, text));
            }
        }
    }

    /// Say how a worker died.
    fn obituary(&self, crew: &mut Workers, member: &Member, status: io::Result<ExitStatus>) -> String {
        let killed = status.as_ref().is_ok_and(|s| s.signal() == Some(9));
        let before = std::mem::replace(&mut crew.starved, starved());
        let how = if member.silent.is_some_and(is_silent) {
            format!("gave no sign of life for {} s and was ended", PEER_TIMEOUT.as_secs())
        } else if killed && crew.starved > before {
            "was killed by the kernel's out-of-memory killer (SIGKILL)".to_owned()
        } else {
            describe(status)
        };
        format!("node {}: worker process {} {how}", self.node, member.pid)
    }

    /// Have a worker take the place of one that is lost: the spare if there is one.
    fn replace(self: &Arc<Self>, state: &mut State) {
        state.crew.spare_due = Some(Instant::now());
        if let Some(spare) = state.crew.find(Role::Spare, true) {
            state.crew.set_role(spare, Role::Regular);
            state.queue.add_peer(spare, self.shape().1, Instant::now());
        } else if let Some(spare) = state.crew.find(Role::Spare, false) {
            state.crew.set_role(spare, Role::Regular);
        } else if let Err(e) = self.start_worker(state, Role::Regular) {
            self.end(state, e.to_string());
        }
    }

    /// Have a worker that runs what must end replaced: at once, if nothing else runs in it.
    fn retire(self: &Arc<Self>, state: &mut State, id: PeerId) {
        let Some(role) = state.crew.members.get(&id).map(|m| m.role) else { return };
        if matches!(role, Role::Retired(_)) {
            return;
        }
        state.crew.set_role(id, Role::Retired(Instant::now()));
        for task in state.queue.close_peer(id) {
            state.crew.tell(id, Control::Recall(task));
        }
        if role == Role::Regular {
            self.replace(state);
        }
    }

    /// Give each suspect a process for itself, a few at a time.
    pub(crate) fn run_suspects(self: &Arc<Self>, state: &mut State) {
        let now = Instant::now();
        loop {
            let (crew, queue) = (&mut state.crew, &mut state.queue);
            let mut solos = crew.members.iter().filter(|(_, m)| m.role == Role::Solo);
            let free = solos.find(|(id, _)| queue.held(**id).next().is_none()).map(|(id, _)| *id);
            let Some(&task) = crew.suspects.front() else {
                crew.false_solos = 0;
                let Some(solo) = free else { break };
                queue.remove_peer(solo);
                crew.set_role(solo, Role::Spare);
                continue;
            };
            if !queue.is_orphan(task) {
                // Cancelled meanwhile.
                crew.suspects.pop_front();
                continue;
            }
            let Some(solo) = free.or_else(|| crew.find(Role::Spare, true)) else { break };
            if free.is_none() {
                crew.set_role(solo, Role::Solo);
                queue.add_peer(solo, 1, now);
                queue.close_peer(solo);
            }
            crew.suspects.pop_front();
            if let Some(message) = queue.give(solo, task) {
                crew.send(solo, message);
            }
        }
        if state.crew.spare_due.is_some_and(|due| due > now) {
            // The last one did not start.
            return;
        }
        let missing = state.crew.spares_wanted(self.cores).saturating_sub(state.crew.count(Role::Spare));
        for _ in 0..missing {
            if let Err(e) = self.start_worker(state, Role::Spare) {
                self.end(state, e.to_string());
            }
        }
    }

    /// End what must end, find workers that are stopped, and keep one spare, or as many as suspects need.
    pub(crate) fn look_after_crew(self: &Arc<Self>, state: &mut State) {
        let now = Instant::now();
        let slots = self.shape().1;
        if let Some(limit) = self.work.task_timeout_ms.map(Duration::from_millis) {
            let mut late = Vec::new();
            for (worker, member) in state.crew.members.iter().filter(|(_, m)| m.ready && m.role != Role::Spare) {
                let running = member.table.running(slots).into_iter();
                late.extend(running.filter(|(_, age)| *age > limit).map(|(id, age)| (*worker, id, age)));
            }
            for (worker, id, age) in late {
                if state.queue.done(worker, id, now) {
                    state.asked.remove(&id);
                    state.crew.doomed.insert(id, KillDeadline { worker, by: now });
                    let text = format!(
                        "node {}: the task ran for {:.1} s, longer than Worker(task_timeout={}), and was ended",
                        self.node,
                        age.as_secs_f64(),
                        limit.as_secs_f64()
                    );
                    self.deliver(state, Message::text(id, Outcome::TimedOut, text));
                } else if !state.crew.doomed.contains_key(&id) {
                    // Its result is here, but its thread does not come back for the tasks that wait there.
                    self.retire(state, worker);
                }
            }
        }
        let overdue: Vec<_> = state.crew.doomed.values().filter(|d| d.by <= now).map(|d| d.worker).collect();
        for worker in overdue {
            self.retire(state, worker);
        }
        let full = state.is_full();
        let crew = &mut state.crew;
        for (id, member) in &mut crew.members {
            // While the backlog is full nobody is listened to.
            if let (Some(silent), false) = (&mut member.silent, full) {
                *silent += 1;
                if is_silent(*silent) {
                    member.group.kill_leader();
                }
            }
            if let Role::Retired(since) = member.role
                && (since + BYSTANDERS <= now || state.queue.held(*id).all(|task| crew.doomed.contains_key(&task)))
            {
                member.group.kill_leader();
            }
        }
        let spares: Vec<_> = crew.members.iter().filter(|(_, m)| m.role == Role::Spare).map(|(id, _)| *id).collect();
        for extra in spares.iter().skip(crew.spares_wanted(self.cores).max(1)) {
            crew.set_role(*extra, Role::Retired(now));
            crew.kill(*extra);
        }
        if crew.proven && spares.is_empty() && crew.spare_due.is_some_and(|due| due <= now) {
            // One that cannot be started is missed only by a worker that dies.
            let started = self.start_worker(state, Role::Spare);
            state.crew.spare_due = started.is_err().then_some(now + SPARE_RETRY);
        }
    }

    /// End the workers in order: each is asked to end as interpreters do, which runs what was registered with `atexit`,
    /// finalizers, and writes what open files hold back. Waits for them, at most [`UNWIND`].
    ///
    /// A worker that has not run a task has nothing to write and nobody to tell, and one that holds a task does not come
    /// to its end in time: both are killed at once. Where a plugin has set something up in the workers, all are asked.
    pub(crate) async fn dismiss(&self) {
        {
            let mut guard = lock(&self.state);
            let state = &mut *guard;
            state.crew.over = true;
            for (id, member) in &state.crew.members {
                let replaced = matches!(member.role, Role::Retired(_));
                let used = member.useful && !replaced && state.queue.held(*id).next().is_none();
                if used || self.work.unwind {
                    member.link.send(|o| o.control(Control::Goodbye(Bytes::new())));
                } else {
                    member.group.kill_leader();
                }
            }
        }
        self.crew_ended(UNWIND).await;
    }

    /// Kill all workers and what they started; no new ones are started from now on. Waits for them, so that none is
    /// left as a zombie and what they wrote has been read.
    pub(crate) async fn end_crew(&self) {
        {
            let mut state = lock(&self.state);
            state.crew.over = true;
            for member in state.crew.members.values() {
                member.group.kill_leader();
            }
        }
        self.crew_ended(LAST_WORDS).await;
        // What could not be ended until now does not have to be waited for.
        lock(&self.state).crew.members.values().for_each(|member| member.group.kill());
    }

    async fn crew_ended(&self, bound: Duration) {
        let gone = async {
            while !lock(&self.state).crew.members.is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        drop(tokio::time::timeout(bound, gone).await);
    }
}

impl Member {
    /// The end of its standard error, to be appended to how it ended.
    fn last_words(&self) -> String {
        let tail = lock(&self.tail);
        let text = String::from_utf8_lossy(&tail);
        let text = text.trim();
        if text.is_empty() { String::new() } else { format!("; the end of its standard error:\n{text}") }
    }
}

fn is_silent(ticks: u32) -> bool {
    TICK * ticks > PEER_TIMEOUT
}

/// End what a worker has started, now that it has ended.
async fn end_group(group: &Group) {
    let begun = Instant::now();
    loop {
        let left = group.sweep();
        if left == Survivors::Nothing {
            return;
        }
        if begun.elapsed() >= left.bound() {
            group.kill();
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// How many processes the kernel has ended for want of memory: in our control group if that counts, else at all.
fn starved() -> Option<u64> {
    let group = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = group.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let count = |file: &str| {
        let text = std::fs::read_to_string(file).ok()?;
        text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
    };
    count(&format!("/sys/fs/cgroup{path}/memory.events")).or_else(|| count("/proc/vmstat"))
}

fn describe(status: io::Result<ExitStatus>) -> String {
    match status.map(|s| (s.signal(), s.code())) {
        Ok((Some(signal), _)) => format!("was killed by signal {signal}{}", name(signal)),
        Ok((None, Some(code))) => format!("exited with status {code}"),
        Ok((None, None)) => "ended".to_owned(),
        Err(e) => format!("ended, its exit status is unknown: {e}"),
    }
}

fn name(signal: i32) -> &'static str {
    match signal {
        4 => " (SIGILL)",
        6 => " (SIGABRT)",
        7 => " (SIGBUS)",
        8 => " (SIGFPE)",
        9 => " (SIGKILL; the kernel's out-of-memory killer uses it too)",
        11 => " (SIGSEGV)",
        15 => " (SIGTERM)",
        _ => "",
    }
}
