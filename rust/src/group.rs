//! The process group that a worker leads: it ends with all that the worker's tasks have started.
//!
//! What has moved to a group or session of its own, as `timeout` and `setsid` do, is found by its parents. Only a daemon,
//! whose parent has ended, is on its own.
//!
//! Python's resource trackers, of multiprocessing and of loky, are in it too. They remove the shared memory and the
//! temporary files of processes that could not do so, when the last of these has ended: they are left out, and end by
//! themselves.

use std::time::Duration;

use rustix::process::{Pid, Signal, getpgid, kill_process, kill_process_group, test_kill_process_group};

/// Pause between two rounds.
pub const PAUSE: Duration = Duration::from_millis(5);
/// Rounds in which all should have ended: what is killed ends as soon as it leaves the kernel.
pub const ROUNDS: usize = 40;
/// Rounds that resource trackers get then.
pub const TRACKERS: usize = 100;

/// What a round found alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    Nothing,
    Trackers,
    Others,
}

/// One round: kill everything in the group, but if there are resource trackers these and this process. What is being
/// started meanwhile is then found by the next one.
#[must_use]
pub fn sweep(group: Pid) -> Left {
    if test_kill_process_group(group).is_err() {
        return Left::Nothing;
    }
    let Some(members) = members(group) else {
        kill(group);
        return Left::Nothing;
    };
    if !members.iter().any(|(_, tracker)| *tracker) {
        // At once, so that nothing can be started meanwhile.
        kill(group);
        return if members.is_empty() { Left::Nothing } else { Left::Others };
    }
    let mut left = Left::Trackers;
    for (pid, tracker) in members {
        if !tracker && pid != rustix::process::getpid() {
            left = Left::Others;
            // Gone already: fine.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    left
}

/// Kill the leader of a group, and those of its descendants that have left the group.
pub fn kill_leader(leader: Pid) {
    // So that it starts nothing more meanwhile. Gone already: fine.
    let _ = kill_process(leader, Signal::STOP);
    kill_escaped(leader);
    let _ = kill_process(leader, Signal::KILL);
}

/// Kill those descendants of the leader of a group that have left the group.
pub fn kill_escaped(leader: Pid) {
    let mut family = vec![leader];
    let mut at = 0;
    while let Some(parent) = family.get(at) {
        let children = children(*parent);
        family.extend(children);
        at += 1;
    }
    for pid in family {
        if getpgid(Some(pid)).is_ok_and(|group| group != leader) && !is_tracker(pid) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Kill everything in the group.
pub fn kill(group: Pid) {
    let _ = kill_process_group(group, Signal::KILL);
}

/// The living processes of a group, and whether each is a resource tracker; `None` if the system does not say.
#[cfg(target_os = "linux")]
fn members(group: Pid) -> Option<Vec<(Pid, bool)>> {
    let mut members = Vec::new();
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
            members.push((pid, is_tracker(pid)));
        }
    }
    Some(members)
}

fn is_tracker(pid: Pid) -> bool {
    let command = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    String::from_utf8_lossy(&command).contains("resource_tracker")
}

/// The processes that each thread of a process has started; nothing if the system does not say.
fn children(parent: Pid) -> Vec<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", parent.as_raw_nonzero()));
    let lists = tasks.into_iter().flatten().flatten().map(|task| std::fs::read_to_string(task.path().join("children")));
    let pids = |list: String| list.split(' ').filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect::<Vec<_>>();
    lists.flatten().flat_map(pids).collect()
}

#[cfg(not(target_os = "linux"))]
fn members(_: Pid) -> Option<Vec<(Pid, bool)>> {
    None
}
