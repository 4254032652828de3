//! The process group that a worker leads: it ends with all processes that the worker's tasks have started.
//!
//! A process that has moved to a group or session of its own, as `timeout` and `setsid` do, is found by way of its
//! parents. Only a daemon, whose parent has ended, is not found.
//!
//! Tasks start Python's resource trackers too, those of multiprocessing and of loky. A tracker waits until the last process
//! that it serves has ended, removes the shared memory and the temporary files that this process could not remove, and
//! then ends by itself. So trackers are killed only if they live on for longer than [`TRACKERS_TIMEOUT`]. A tracker is
//! recognized by its whole command line. A program that imitates it gains that time and no more.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getpgid, getpid, kill_process, kill_process_group, test_kill_process_group};

use crate::wire::lock;

/// Pause between two rounds of killing.
pub const PAUSE: Duration = Duration::from_millis(5);
/// How long processes other than trackers may take to end: a process that is killed ends as soon as it leaves the kernel.
const OTHERS_TIMEOUT: Duration = Duration::from_millis(200);
/// How long trackers may take to clear up once all other processes have ended.
const TRACKERS_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a round waits for the command lines of processes that are becoming other programs. A process that hides its
/// command line is then taken for no tracker, and killed.
const EXEC_TIMEOUT: Duration = Duration::from_millis(100);
/// The flag in `/proc/PID/stat` of a process that is ending.
const PF_EXITING: u32 = 4;
/// The modules whose `main` is a tracker.
const TRACKER_MODULES: [&str; 3] = [
    "multiprocessing.resource_tracker",
    "loky.backend.resource_tracker",
    "joblib.externals.loky.backend.resource_tracker",
];
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

/// The group of one worker.
#[derive(Debug, Clone)]
pub struct Group {
    leader: Option<Pid>,
    /// Trackers outside of the group, found when the worker's other descendants there were killed.
    trackers: Arc<Mutex<Vec<Pid>>>,
}

impl Group {
    /// Return the group of the worker that has this process id. If no process can have this id, nothing is ever killed.
    #[must_use]
    pub fn of(leader: u32) -> Self {
        let leader = i32::try_from(leader).ok().filter(|pid| *pid > 1).and_then(Pid::from_raw);
        Self { leader, trackers: Arc::default() }
    }

    /// Return the group that this process belongs to, and leads.
    #[must_use]
    pub fn own() -> Self {
        Self { leader: Some(rustix::process::getpgrp()), trackers: Arc::default() }
    }

    /// Kill everything in the group once. If there are resource trackers, they and this process are spared; a process that
    /// is started meanwhile is then found by the next call.
    #[must_use]
    pub fn sweep(&self) -> Survivors {
        let Some(group) = self.leader else { return Survivors::Nothing };
        let outside = if self.trackers_outside().is_empty() { Survivors::Nothing } else { Survivors::Trackers };
        if test_kill_process_group(group).is_err() {
            return outside;
        }
        let Some(members) = members(group) else {
            self.kill();
            return Survivors::Nothing;
        };
        if outside == Survivors::Nothing && !members.iter().any(|(_, tracker)| *tracker) {
            // All at once, so that no process can be started meanwhile.
            self.kill();
            return if members.is_empty() { Survivors::Nothing } else { Survivors::Others };
        }
        let mut left = outside;
        for (pid, tracker) in members {
            if tracker {
                left = left.max(Survivors::Trackers);
            } else if pid != getpid() {
                left = Survivors::Others;
                // It may have ended already.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        left
    }

    /// Kill the leader, and its descendants that have left the group.
    pub fn kill_leader(&self) {
        let Some(leader) = self.leader else { return };
        // Stopped, it starts no process meanwhile. It may have ended already.
        let _ = kill_process(leader, Signal::STOP);
        self.kill_escaped();
        let _ = kill_process(leader, Signal::KILL);
    }

    /// Kill the leader's descendants that have left the group.
    pub fn kill_escaped(&self) {
        let Some(leader) = self.leader else { return };
        let mut family = vec![leader];
        let mut at = 0;
        while let Some(parent) = family.get(at) {
            let children = children(*parent);
            family.extend(children);
            at += 1;
        }
        let until = Instant::now() + EXEC_TIMEOUT;
        for pid in family {
            if getpgid(Some(pid)).is_ok_and(|group| group != leader) {
                if is_tracker(pid, until) {
                    lock(&self.trackers).push(pid);
                } else {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
        }
    }

    /// Wait for the trackers outside of the group to end, and kill those that do not.
    pub fn end_outside(&self) {
        let begun = Instant::now();
        while !self.trackers_outside().is_empty() && begun.elapsed() < TRACKERS_TIMEOUT {
            std::thread::sleep(PAUSE);
        }
        self.kill_outside();
    }

    fn kill_outside(&self) {
        for pid in self.trackers_outside() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }

    /// Kill everything: the group, and the trackers outside of it.
    pub fn kill(&self) {
        self.kill_outside();
        if let Some(group) = self.leader {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }

    /// Wait for the trackers to end, then kill the whole group, this process too.
    ///
    /// The trackers wait for this process in turn, because it holds the pipe on which they listen. So it becomes another
    /// program, which has nothing open.
    pub fn end_with_trackers(&self) -> ! {
        let inside = self.leader.and_then(members).unwrap_or_default();
        let mut trackers = self.trackers_outside();
        trackers.extend(inside.iter().filter(|(_, tracker)| *tracker).map(|(pid, _)| *pid));
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

    /// Return the trackers outside of the group that are alive. A process that was given the number of an ended tracker is
    /// none.
    fn trackers_outside(&self) -> Vec<Pid> {
        let mut trackers = lock(&self.trackers);
        let until = Instant::now() + EXEC_TIMEOUT;
        trackers.retain(|pid| is_tracker(*pid, until));
        trackers.clone()
    }
}

/// Return the living processes of a group, and whether each is a resource tracker; `None` if the system does not say.
#[cfg(target_os = "linux")]
fn members(group: Pid) -> Option<Vec<(Pid, bool)>> {
    let mut members = Vec::new();
    let until = Instant::now() + EXEC_TIMEOUT;
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        // pid (name) state parent group …, and the name may be anything.
        let Ok(stat) = std::fs::read(entry.path().join("stat")) else { continue };
        let stat = String::from_utf8_lossy(&stat);
        let mut fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
        let (state, of) = (fields.next(), fields.nth(1).and_then(|group| group.parse().ok()));
        if of == Some(group.as_raw_nonzero().get()) && !matches!(state, Some("Z" | "X")) {
            members.push((pid, is_tracker(pid, until)));
        }
    }
    Some(members)
}

#[cfg(not(target_os = "linux"))]
fn members(_: Pid) -> Option<Vec<(Pid, bool)>> {
    None
}

/// Return whether a process is a resource tracker. A process that has ended is none: it has no command line.
fn is_tracker(pid: Pid, until: Instant) -> bool {
    let read = |file: &str| std::fs::read(format!("/proc/{}/{file}", pid.as_raw_nonzero())).unwrap_or_default();
    loop {
        let command = read("cmdline");
        if !command.is_empty() {
            return tracks(&String::from_utf8_lossy(&command));
        }
        // A process without a command line is perhaps in the midst of execve(2), while its parent goes on already. Or it is
        // ending, which takes long if it has much memory.
        if is_ending(&read("stat")) || Instant::now() >= until {
            return false;
        }
        std::thread::sleep(PAUSE / 10);
    }
}

/// Return whether a `/proc/PID/stat` is of a process that is ending or has ended. Its fields are: pid (name) state parent
/// group session terminal its-group flags …
fn is_ending(stat: &[u8]) -> bool {
    let stat = String::from_utf8_lossy(stat);
    let mut fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    let (state, flags) = (fields.next(), fields.nth(5).and_then(|flags| flags.parse::<u32>().ok()));
    matches!(state, Some("Z" | "X")) || flags.is_none_or(|flags| flags & PF_EXITING != 0)
}

/// Return whether a command line, each argument ended by a zero byte, is that of a resource tracker:
/// `python [flags of the interpreter] -c "from MODULE import main;main(5)"`. In loky's, a space stands before `main`, and
/// a second argument says whether the tracker is verbose.
#[must_use]
pub fn tracks(command: &str) -> bool {
    let arguments: Vec<&str> = command.strip_suffix('\0').unwrap_or(command).split('\0').collect();
    let [_program, flags @ .., "-c", code] = arguments.as_slice() else { return false };
    // -X has its value in an argument of its own.
    let mut flags = flags.iter();
    while let Some(flag) = flags.next() {
        if !flag.starts_with('-') || (*flag == "-X" && flags.next().is_none()) {
            return false;
        }
    }
    let Some((module, call)) = code.strip_prefix("from ").and_then(|code| code.split_once(" import main;")) else {
        return false;
    };
    let Some(values) = call.trim_start().strip_prefix("main(").and_then(|call| call.strip_suffix(')')) else {
        return false;
    };
    let (pipe, verbose) = values.split_once(", ").unwrap_or((values, "0"));
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    TRACKER_MODULES.contains(&module) && number(pipe) && (number(verbose) || matches!(verbose, "True" | "False"))
}

/// Return the processes that the threads of a process have started; none if the system does not say.
fn children(parent: Pid) -> Vec<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", parent.as_raw_nonzero()));
    let lists = tasks.into_iter().flatten().flatten().map(|task| std::fs::read_to_string(task.path().join("children")));
    let pids = |list: String| list.split(' ').filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect::<Vec<_>>();
    lists.flatten().flat_map(pids).collect()
}

#[cfg(test)]
mod tests {
    use super::is_ending;

    /// A process that frees its memory, a zombie and one that is gone are ending; one that runs or waits is not,
    /// whatever its name.
    #[test]
    fn ending_processes() {
        for ending in [&b"7 (python) R 1 7 7 0 -1 4195332 0"[..], b"7 (a) R 1 ) Z 1 7 7 0 -1 4194304 0", b"", b"7 (a"] {
            assert!(is_ending(ending));
        }
        assert!(!is_ending(b"7 (a) Z 4 ) R 1 7 7 0 -1 4194304 0"));
        assert!(!is_ending(&std::fs::read("/proc/self/stat").unwrap_or_default()));
    }
}
