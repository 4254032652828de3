//! The mark by which a worker's processes are found, wherever they have gone.
//!
//! A daemon leaves the worker's process group and session, closes what it has open, and its parent ends; it may clear its
//! environment, and become another program. Its resource limits stay: fork(2) and execve(2) hand them on. Linux has one
//! that nothing obeys any more since version 2.4.25, `RLIMIT_LOCKS`. Its soft value is the mark: a number that says to
//! which worker of which agent a process belongs. Anybody may read it in `/proc/PID/limits`.
//!
//! Bits of a mark, from the highest on: 8 that say that it is a mark, 34 that are random in each agent, 22 for the
//! worker's process id. Linux has no process ids beyond 2²².

use rustix::process::Pid;

const PID_BITS: u32 = 22;
const PID_MASK: u64 = (1 << PID_BITS) - 1;
const IS_MARK_SHIFT: u32 = 56;
/// The highest bits of a mark. No limit that has a meaning is as large.
const IS_MARK: u64 = 0x53;

/// See the module's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(u64);

impl Mark {
    /// Return what a limit says as a mark.
    #[must_use]
    pub fn from_limit(limit: u64) -> Option<Self> {
        (limit >> IS_MARK_SHIFT == IS_MARK).then_some(Self(limit))
    }

    /// Return the process id of the worker that the mark was made for.
    #[must_use]
    pub fn worker(self) -> Option<Pid> {
        i32::try_from(self.0 & PID_MASK).ok().and_then(Pid::from_raw)
    }

    /// Return whether the marks are of workers of the same agent.
    #[must_use]
    pub fn is_of_same_agent(self, other: Self) -> bool {
        self.0 >> PID_BITS == other.0 >> PID_BITS
    }

    fn new(agent: u64, worker: Pid) -> Option<Self> {
        let worker = u64::try_from(worker.as_raw_nonzero().get()).ok().filter(|pid| *pid <= PID_MASK)?;
        Self::from_limit((IS_MARK << IS_MARK_SHIFT) | ((agent << PID_BITS) & ((1 << IS_MARK_SHIFT) - 1)) | worker)
    }
}

/// Return the limit of a process, in which its mark is, from `/proc/PID/limits`: "Max file locks  SOFT  HARD  locks".
#[must_use]
pub fn parse_limit(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max file locks"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

#[cfg(target_os = "linux")]
pub use linux::{limit_of, of, own, set};

#[cfg(target_os = "linux")]
mod linux {
    use std::sync::OnceLock;

    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

    use super::{Mark, parse_limit};

    /// What all marks of this agent have in common.
    static AGENT: OnceLock<u64> = OnceLock::new();

    /// Give a process that was just started a mark of its own. Returns it; `None` if the system does not allow it.
    #[must_use]
    pub fn set(worker: Pid) -> Option<Mark> {
        let agent = AGENT.get_or_init(|| getrandom::u64().unwrap_or_else(|_| u64::from(std::process::id())));
        let mark = Mark::new(*agent, worker)?;
        let limit = Rlimit { current: Some(mark.0), maximum: getrlimit(Resource::Locks).maximum };
        prlimit(Some(worker), Resource::Locks, limit).ok().map(|_| mark)
    }

    /// Return this process's own mark, if it is a worker or was started by a task.
    #[must_use]
    pub fn own() -> Option<Mark> {
        getrlimit(Resource::Locks).current.and_then(Mark::from_limit)
    }

    /// Return the limit of a process; `None` if it is gone.
    #[must_use]
    pub fn limit_of(pid: Pid) -> Option<u64> {
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", pid.as_raw_nonzero())).ok()?;
        parse_limit(&limits)
    }

    /// Return the mark of a process.
    #[must_use]
    pub fn of(pid: Pid) -> Option<Mark> {
        limit_of(pid).and_then(Mark::from_limit)
    }
}

#[cfg(not(target_os = "linux"))]
mod elsewhere {
    use rustix::process::Pid;

    use super::Mark;

    pub fn set(_: Pid) -> Option<Mark> {
        None
    }

    pub fn own() -> Option<Mark> {
        None
    }

    pub fn of(_: Pid) -> Option<Mark> {
        None
    }

    pub fn limit_of(_: Pid) -> Option<u64> {
        None
    }
}
#[cfg(not(target_os = "linux"))]
pub use elsewhere::{limit_of, of, own, set};

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A mark says which worker it is for and is no limit of any other use, whatever numbers it is made of.
    #[test]
    fn marks_tell_workers_and_agents_apart() {
        let pid = |number| Pid::from_raw(number).unwrap();
        for agent in [0, 1, u64::MAX] {
            for worker in [2, 31_415, (1 << 22) - 1] {
                let mark = Mark::new(agent, pid(worker)).unwrap();
                assert_eq!((Mark::from_limit(mark.0), mark.worker()), (Some(mark), Some(pid(worker))));
                assert!(mark.is_of_same_agent(Mark::new(agent, pid(7)).unwrap()));
                assert!(!mark.is_of_same_agent(Mark::new(agent ^ 1, pid(worker)).unwrap()));
            }
        }
        assert_eq!(Mark::new(1, pid(1 << 22)), None);
        assert!([0, 1024, 1 << 40, u64::MAX, u64::MAX >> 1].into_iter().all(|limit| Mark::from_limit(limit).is_none()));
    }

    #[test]
    fn limits_are_read() {
        let limits =
            |soft| format!("Max locked memory 1 2 bytes\nMax file locks            {soft}    unlimited   locks\n");
        assert_eq!(parse_limit(&limits("5980780305148031033")), Some(5_980_780_305_148_031_033));
        assert_eq!(parse_limit(&limits("unlimited")), Some(u64::MAX));
        assert_eq!((parse_limit(""), parse_limit("Max file locks"), parse_limit(&limits("x"))), (None, None, None));
    }

    /// Which process a task starts, and what becomes of its parents: its mark stays. Another process has none.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_mark_is_handed_on() {
        use std::process::{Command, Stdio};
        let mut child = Command::new("sh")
            .args(["-c", "read go; env -i setsid -w sh -c 'cat /proc/self/limits'"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = pid_of(child.id());
        assert_eq!((of(pid), own()), (None, None));
        let mark = set(pid).unwrap();
        assert_eq!((of(pid), mark.worker()), (Some(mark), Some(pid)));
        drop(child.stdin.take());
        let output = child.wait_with_output().unwrap();
        let limit = parse_limit(&String::from_utf8(output.stdout).unwrap()).unwrap();
        assert_eq!(Mark::from_limit(limit), Some(mark));
    }

    #[cfg(target_os = "linux")]
    fn pid_of(number: u32) -> Pid {
        Pid::from_raw(i32::try_from(number).unwrap()).unwrap()
    }
}
