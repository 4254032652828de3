//! The system's processes as `/proc` shows them: who has started whom, who is ending, and which of them are Python's
//! resource trackers.
//!
//! Tasks start resource trackers, those of multiprocessing and of loky. A tracker waits until the last process that it
//! serves has ended, removes the shared memory and the temporary files that this process could not remove, and then ends by
//! itself. A tracker is recognized by its whole command line.

use std::time::{Duration, Instant};

use rustix::process::Pid;

/// How long a search waits for the command lines of processes that are becoming other programs. A process that hides its
/// command line is then taken for no tracker.
pub const EXEC_TIMEOUT: Duration = Duration::from_millis(100);
/// Pause between two looks at a process that is becoming another program.
const EXEC_PAUSE: Duration = Duration::from_micros(500);
/// The flag in `/proc/PID/stat` of a process that is ending.
const PF_EXITING: u32 = 4;
/// The modules whose `main` is a tracker.
const TRACKER_MODULES: [&str; 3] = [
    "multiprocessing.resource_tracker",
    "loky.backend.resource_tracker",
    "joblib.externals.loky.backend.resource_tracker",
];

/// A process, as its `/proc/PID/stat` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    pub parent: i32,
    pub group: i32,
    /// It has ended, or is about to.
    pub is_ending: bool,
    /// It has ended, all its threads included.
    pub has_ended: bool,
}

impl Stat {
    /// Read the fields: pid (name) state parent group session terminal its-group flags …, of which the 18th after the name
    /// is the number of threads. The name may be anything.
    fn parse(stat: &[u8]) -> Option<Self> {
        let stat = String::from_utf8_lossy(stat);
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let is_zombie = matches!(fields.first(), Some(&("Z" | "X")));
        let threads: u32 = fields.get(17).and_then(|count| count.parse().ok()).unwrap_or(1);
        let flags: u32 = fields.get(6)?.parse().ok()?;
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            group: fields.get(2)?.parse().ok()?,
            is_ending: is_zombie || flags & PF_EXITING != 0,
            // A process whose first thread has ended looks like a zombie and runs on.
            has_ended: is_zombie && threads <= 1,
        })
    }
}

fn read(pid: Pid, file: &str) -> Vec<u8> {
    std::fs::read(format!("/proc/{}/{file}", pid.as_raw_nonzero())).unwrap_or_default()
}

/// Return what the system says about a process; `None` if it is gone.
#[must_use]
pub fn stat(pid: Pid) -> Option<Stat> {
    Stat::parse(&read(pid, "stat"))
}

/// Return all processes that have not ended; none if the system does not say.
#[must_use]
pub fn all() -> Vec<(Pid, Stat)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    pids.filter_map(|pid| Some((pid, stat(pid)?))).filter(|(_, stat)| !stat.has_ended).collect()
}

/// Return the processes that the threads of a process have started, and those that it has adopted; none if the system does
/// not say.
#[must_use]
pub fn children(parent: Pid) -> Vec<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", parent.as_raw_nonzero()));
    let lists = tasks.into_iter().flatten().flatten().map(|task| std::fs::read_to_string(task.path().join("children")));
    let pids = |list: String| list.split(' ').filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect::<Vec<_>>();
    lists.flatten().flat_map(pids).collect()
}

/// Append the descendants of the processes in `family` to it.
pub fn add_descendants(family: &mut Vec<Pid>) {
    let mut at = 0;
    while let Some(parent) = family.get(at) {
        let children = children(*parent);
        family.extend(children);
        at += 1;
    }
}

/// Return whether a process is a resource tracker. A process that has ended is none: it has no command line.
#[must_use]
pub fn is_tracker(pid: Pid, until: Instant) -> bool {
    loop {
        let command = read(pid, "cmdline");
        if !command.is_empty() {
            return tracks(&String::from_utf8_lossy(&command));
        }
        // A process without a command line is perhaps in the midst of execve(2), while its parent goes on already. Or it is
        // ending, which takes long if it has much memory.
        if stat(pid).is_none_or(|stat| stat.is_ending) || Instant::now() >= until {
            return false;
        }
        std::thread::sleep(EXEC_PAUSE);
    }
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

#[cfg(test)]
mod tests {
    use super::Stat;

    /// A process that frees its memory, a zombie and one that is gone are ending; one that runs or waits is not, whatever
    /// its name. A zombie that has threads has not ended.
    #[test]
    fn stats() {
        let of = |stat: &str| Stat::parse(stat.as_bytes());
        let ended = Stat { parent: 1, group: 7, is_ending: true, has_ended: true };
        assert_eq!(of("7 (python) R 1 7 7 0 -1 4195332 0"), Some(Stat { has_ended: false, ..ended }));
        assert_eq!(of("7 (a) R 1 ) Z 1 7 7 0 -1 4194304 0"), Some(ended));
        assert_eq!(of("7 (a) Z 1 7 7 0 -1 4194308 0 0 0 0 0 0 0 0 20 0 1 0"), Some(ended));
        assert_eq!(of("7 (a) Z 1 7 7 0 -1 4194308 0 0 0 0 0 0 0 0 20 0 2 0").map(|stat| stat.has_ended), Some(false));
        let runs = Stat { is_ending: false, has_ended: false, ..ended };
        assert_eq!(of("7 (a) Z 4 ) R 1 7 7 0 -1 4194304 0"), Some(runs));
        assert_eq!((of(""), of("7 (a"), of("7 (a) R 1")), (None, None, None));
    }
}
