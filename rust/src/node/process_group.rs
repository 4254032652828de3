//! All that a worker's tasks have started, which ends with the worker: daemons too.
//!
//! The agent is a *subreaper*: a process whose parent has ended becomes a child of the agent, unless a process in between
//! is a subreaper as well. So after a worker's end all that it had started and that still lives is found among the agent's
//! children and below them. While a worker lives, its daemons are the agent's children already and live on, because later
//! tasks may use them. The mark of a process (`mark.rs`) says which worker it belongs to. The agent reaps the processes
//! that it has adopted; those that a task has started itself stay the task's to wait for.
//!
//! When the agent has ended, nobody adopts. Each worker then ends what it has started by itself: its process group, its
//! descendants, and all processes that have its mark; also those that have the mark of a dead worker of the same agent.
//!
//! A resource tracker (`processes.rs`) is waited for, so that it clears up behind the others, and is killed only if it lives
//! on for longer than [`TRACKERS_TIMEOUT`]. A program that imitates it gains that time and no more.

use std::collections::{HashMap, HashSet};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, getpgid, getpid, kill_process, kill_process_group, waitpid};

use crate::node::mark::{self, Mark};
use crate::node::processes::{self, EXEC_TIMEOUT, Stat, add_descendants, children, is_tracker};

/// Pause between two rounds of killing.
pub const PAUSE: Duration = Duration::from_millis(5);
/// How long processes other than trackers may take to end: a process that is killed ends as soon as it leaves the kernel.
const OTHERS_TIMEOUT: Duration = Duration::from_millis(200);
/// Ticks with a look at all adopted processes, after a worker has ended or a look has found something: 2 s.
const LOOKS: u32 = 10;
/// Ticks between two looks otherwise: 5 s.
const QUIET_TICKS: u32 = 25;
/// How long trackers may take to clear up once all other processes have ended.
const TRACKERS_TIMEOUT: Duration = Duration::from_secs(2);
/// A program that waits until the processes in its arguments have ended, at most for the seconds in its first argument;
/// then it kills them and the group that it leads. A process that was given the number of an ended one began at another
/// time, and is not killed.
const WAIT_PROGRAM: &str = "\
import os, sys, time

def begun(pid):
    try:
        with open(f'/proc/{pid}/stat', 'rb') as stat:
            state, *fields = stat.read().rpartition(b') ')[2].split()
    except OSError:
        return None
    return None if state in b'ZX' else fields[18]

def left():
    return [pid for pid, when in trackers.items() if when and begun(pid) == when]

until = time.monotonic() + float(sys.argv[1])
trackers = {int(pid): begun(pid) for pid in sys.argv[2:]}
while left() and time.monotonic() < until:
    time.sleep(0.01)
for pid in left():
    try:
        os.kill(pid, 9)
    except OSError:
        pass
os.killpg(0, 9)
";

/// The processes that a round of killing found alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Survivors {
    Nothing,
    Trackers,
    Others,
}

impl Survivors {
    /// Return how long after the first round these may be alive.
    #[must_use]
    pub fn bound(self) -> Duration {
        match self {
            Self::Nothing => Duration::ZERO,
            Self::Trackers => TRACKERS_TIMEOUT,
            Self::Others => OTHERS_TIMEOUT,
        }
    }
}

/// All that one worker has started, and the worker.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    /// The worker, which leads a process group.
    leader: Option<Pid>,
    /// `None` if the system has no marks: daemons are not found then.
    mark: Option<Mark>,
}

impl Group {
    /// Mark a worker that was just started, and return its group. If no process can have this id, nothing is ever killed.
    #[must_use]
    pub fn of(leader: u32) -> Self {
        let leader = i32::try_from(leader).ok().filter(|pid| *pid > 1).and_then(Pid::from_raw);
        Self { leader, mark: leader.and_then(mark::set) }
    }

    /// Return the group of this process, which is a worker and leads it.
    #[must_use]
    pub fn own() -> Self {
        let leader = rustix::process::getpgrp();
        Self { leader: Some(leader), mark: mark::own().filter(|mark| mark.worker() == Some(leader)) }
    }

    /// Kill everything but resource trackers, and this process if it has to wait for others; a process that is started
    /// meanwhile is then found by the next call.
    #[must_use]
    pub fn sweep(&self) -> Survivors {
        let Some(leader) = self.leader else { return Survivors::Nothing };
        let until = Instant::now() + EXEC_TIMEOUT;
        let (trackers, others): (Vec<_>, Vec<_>) = self.members().into_iter().partition(|pid| is_tracker(*pid, until));
        let is_last = !self.is_own() || others.iter().all(|pid| is_in(*pid, leader));
        if trackers.is_empty() && is_last && self.is_in_use(leader, &others) {
            // All at once, so that no process can be started meanwhile.
            let _ = kill_process_group(leader, Signal::KILL);
        }
        let is_clear = (others.is_empty(), trackers.is_empty());
        others.into_iter().for_each(kill);
        match is_clear {
            (true, true) => Survivors::Nothing,
            (true, false) => Survivors::Trackers,
            (false, _) => Survivors::Others,
        }
    }

    /// Kill the leader. What it has started is found by [`Group::sweep`] then.
    pub fn kill_leader(&self) {
        self.leader.into_iter().for_each(kill);
    }

    /// Kill everything, trackers and this process too.
    pub fn kill(&self) {
        let members = self.members();
        let group = self.leader.filter(|leader| self.is_in_use(*leader, &members));
        members.into_iter().for_each(kill);
        if let Some(leader) = group {
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }

    /// Wait for the trackers to end, then kill the whole group, this process too.
    ///
    /// The trackers wait for this process in turn, because it holds the pipe on which they listen. So it becomes another
    /// program, which has nothing open.
    pub fn end_with_trackers(&self) -> ! {
        let until = Instant::now() + EXEC_TIMEOUT;
        let mut trackers = self.members();
        trackers.retain(|pid| is_tracker(*pid, until));
        if let (false, Ok(python)) = (trackers.is_empty(), std::env::current_exe()) {
            // Isolated, and without an environment: no task has a say in what this program does.
            let failed = Command::new(python)
                .args(["-I", "-S", "-c", WAIT_PROGRAM, &TRACKERS_TIMEOUT.as_secs_f64().to_string()])
                .args(trackers.iter().map(|pid| pid.as_raw_nonzero().to_string()))
                .env_clear()
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .exec();
            drop(failed);
        }
        let _ = kill_process(getpid(), Signal::KILL);
        std::process::exit(1);
    }

    /// Return whether this process is the worker.
    fn is_own(&self) -> bool {
        self.leader == Some(getpid())
    }

    /// Return whether the process group still is the worker's: the number of an empty one may be given to another.
    fn is_in_use(&self, leader: Pid, members: &[Pid]) -> bool {
        self.mark.is_none() || mark::of(leader) == self.mark || members.iter().any(|pid| is_in(*pid, leader))
    }

    /// Return all that the worker has started and that lives, without this process and, at the agent, without the worker.
    fn members(&self) -> Vec<Pid> {
        match (self.leader, self.mark) {
            (None, _) => Vec::new(),
            (Some(leader), mark) if self.is_own() => found(leader, mark),
            (Some(leader), None) => found(leader, None),
            (Some(_), mark) => {
                let mut members: Vec<_> = adopted().into_iter().filter(|(_, of)| *of == mark).map(|it| it.0).collect();
                add_descendants(&mut members);
                members
            }
        }
    }
}

/// Return whether a process is in a process group.
fn is_in(pid: Pid, group: Pid) -> bool {
    getpgid(Some(pid)).is_ok_and(|of| of == group)
}

/// Let this process, the agent, adopt the processes below it whose parents end. Without it, daemons are found by their
/// marks only when the agent has ended.
pub fn adopt_orphans() {
    #[cfg(target_os = "linux")]
    let _ = rustix::process::set_child_subreaper(Some(getpid()));
}

/// What the agent does about the processes that it has adopted. A look at each of them takes a while, and most of the time
/// there is nothing to be found: so they are only reaped with each tick.
#[derive(Debug, Default)]
pub struct Adopted {
    /// Ticks that have a look at each of them, from now on.
    looks: u32,
    /// Ticks without a look since the last one.
    quiet: u32,
}

impl Adopted {
    /// Note that a worker has ended: what it may have left behind is to be looked for soon.
    pub fn hurry(&mut self) {
        self.looks = LOOKS;
    }

    /// Reap those that have ended. From time to time kill those whose worker has ended.
    pub fn on_tick(&mut self) {
        children(getpid()).into_iter().filter(|pid| has_ended(*pid)).filter_map(classify).for_each(reap);
        if self.looks == 0 && self.quiet < QUIET_TICKS {
            self.quiet += 1;
            return;
        }
        self.quiet = 0;
        // What one that was killed had started is adopted next.
        self.looks = if kill_left(false) { LOOKS } else { self.looks.saturating_sub(1) };
    }

    /// Kill all of them, now that all workers have ended.
    pub fn end_all() {
        let begun = Instant::now();
        while kill_left(true) && begun.elapsed() < OTHERS_TIMEOUT {
            std::thread::sleep(PAUSE);
        }
    }
}

/// Kill the processes that this process, the agent, has adopted and whose worker has ended. Trackers are killed only if this
/// is `the_end`. Returns whether there were any.
fn kill_left(the_end: bool) -> bool {
    let is_left = |mark: Option<Mark>| mark.is_none_or(|mark| !is_alive(mark));
    let mut left: Vec<_> = adopted().into_iter().filter(|(_, mark)| is_left(*mark)).map(|it| it.0).collect();
    add_descendants(&mut left);
    let until = Instant::now() + EXEC_TIMEOUT;
    left.retain(|pid| the_end || !is_tracker(*pid, until));
    let any = !left.is_empty();
    left.into_iter().for_each(kill);
    any
}

/// Return the living processes that this process has adopted, with their marks, and reap those that have ended.
fn adopted() -> Vec<(Pid, Option<Mark>)> {
    let mut adopted: Vec<_> = children(getpid()).into_iter().filter_map(classify).collect();
    adopted.retain(|(pid, _)| matches!(waitpid(Some(*pid), WaitOptions::NOHANG), Ok(None)));
    adopted
}

/// Return a child of this process, and its mark, if it was adopted. A worker has a mark of its own. A child that has this
/// process's limit was started by it, and for another purpose.
fn classify(pid: Pid) -> Option<(Pid, Option<Mark>)> {
    let own = mark::limit_of(getpid())?;
    let limit = mark::limit_of(pid).filter(|limit| *limit != own)?;
    let mark = Mark::from_limit(limit);
    (mark.and_then(Mark::worker) != Some(pid)).then_some((pid, mark))
}

fn reap((pid, _): (Pid, Option<Mark>)) {
    let _ = waitpid(Some(pid), WaitOptions::NOHANG);
}

/// Return whether a child of this process has ended. It is not reaped.
#[cfg(target_os = "linux")]
fn has_ended(pid: Pid) -> bool {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    matches!(waitid(WaitId::Pid(pid), look), Ok(Some(_)))
}

#[cfg(not(target_os = "linux"))]
fn has_ended(_: Pid) -> bool {
    false
}

/// Return whether the worker that a mark was made for lives.
fn is_alive(mark: Mark) -> bool {
    let lives = |worker| processes::stat(worker).is_some_and(|stat| !stat.has_ended);
    mark.worker().is_some_and(|worker| mark::of(worker) == Some(mark) && lives(worker))
}

/// Return what this process, a worker, has started: its group, its descendants, what has its mark, and what has the mark of
/// a dead worker of the same agent; without this process.
fn found(leader: Pid, own: Option<Mark>) -> Vec<Pid> {
    let all = processes::all();
    let is_marked = |pid| {
        let both = own.zip(mark::of(pid));
        both.is_some_and(|(own, mark)| mark == own || (mark.is_of_same_agent(own) && !is_alive(mark)))
    };
    let is_root = |pid, stat: &Stat| stat.group == leader.as_raw_nonzero().get() || is_marked(pid);
    let mut family: Vec<Pid> = all.iter().filter(|(pid, stat)| is_root(*pid, stat)).map(|it| it.0).collect();
    let mut known: HashSet<Pid> = family.iter().copied().collect();
    let mut children: HashMap<i32, Vec<Pid>> = HashMap::new();
    for (pid, stat) in &all {
        children.entry(stat.parent).or_default().push(*pid);
    }
    let mut at = 0;
    while let Some(parent) = family.get(at) {
        let new = children.remove(&parent.as_raw_nonzero().get()).unwrap_or_default();
        family.extend(new.into_iter().filter(|pid| known.insert(*pid)));
        at += 1;
    }
    family.retain(|pid| *pid != leader);
    family
}

/// Kill a process, which may have ended already.
fn kill(pid: Pid) {
    let _ = kill_process(pid, Signal::KILL);
}
