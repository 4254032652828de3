//! The process group that a worker leads: it ends with all that the worker's tasks have started.
//!
//! Python's resource trackers, of multiprocessing and of loky, are in it too. They remove the shared memory and the
//! temporary files of processes that could not do so, when the last of these has ended: they are left out, and end by
//! themselves.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};

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
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
    left
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
            let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            members.push((pid, String::from_utf8_lossy(&command).contains("resource_tracker")));
        }
    }
    Some(members)
}

#[cfg(not(target_os = "linux"))]
fn members(_: Pid) -> Option<Vec<(Pid, bool)>> {
    None
}
