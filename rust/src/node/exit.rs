//! How a worker's process ended, in words.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// Follows the processes that the kernel ends for want of memory.
#[derive(Debug)]
pub struct OomCounter {
    /// Reads how many there are; `None` if the system does not say.
    read: fn() -> Option<u64>,
    /// How many there were at the last look.
    kills: Option<u64>,
}

impl OomCounter {
    /// Count from now on.
    #[must_use]
    pub fn new() -> Self {
        Self::reading(oom_kills)
    }

    fn reading(read: fn() -> Option<u64>) -> Self {
        Self { read, kills: read() }
    }

    /// Return whether the kernel has ended a process since the last call.
    fn has_risen(&mut self) -> bool {
        let before = std::mem::replace(&mut self.kills, (self.read)());
        self.kills > before
    }
}

impl Default for OomCounter {
    fn default() -> Self {
        Self::new()
    }
}

/// Return how many processes the kernel has ended for want of memory: in our control group if that counts, else at all.
fn oom_kills() -> Option<u64> {
    let group = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = group.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let count = |file: &str| {
        let text = std::fs::read_to_string(file).ok()?;
        text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
    };
    count(&format!("/sys/fs/cgroup{path}/memory.events")).or_else(|| count("/proc/vmstat"))
}

/// Return how a process ended, in words that follow its name: "exited with status 3". Asks the kernel, which takes about
/// 0.2 ms, whether it ended a process for want of memory since the last call; so this is for a process that ended by itself.
#[must_use]
pub fn describe_exit(status: io::Result<ExitStatus>, oom: &mut OomCounter) -> String {
    let out_of_memory = oom.has_risen();
    match status.map(|s| (s.signal(), s.code())) {
        Ok((Some(9), _)) if out_of_memory => "was killed by the kernel's out-of-memory killer (SIGKILL)".to_owned(),
        Ok((Some(signal), _)) => format!("was killed by signal {signal}{}", signal_name(signal)),
        Ok((None, Some(code))) => format!("exited with status {code}"),
        Ok((None, None)) => "ended".to_owned(),
        Err(e) => format!("ended, its exit status is unknown: {e}"),
    }
}

fn signal_name(signal: i32) -> &'static str {
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

/// Return the end of a worker's standard error, to be appended to how the worker ended; nothing if it wrote nothing.
#[must_use]
pub fn describe_stderr(tail: &[u8]) -> String {
    let text = String::from_utf8_lossy(tail);
    let text = text.trim();
    if text.is_empty() { String::new() } else { format!("; the end of its standard error:\n{text}") }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    static KILLS: AtomicU64 = AtomicU64::new(5);

    /// The kernel's kill is the reason of the next process that dies of SIGKILL, and of that one only.
    #[test]
    #[allow(clippy::unnecessary_wraps)] // `None` is for systems that do not say
    fn a_lack_of_memory_is_named_once() {
        fn read() -> Option<u64> {
            Some(KILLS.load(Ordering::Relaxed))
        }
        let mut oom = OomCounter::reading(read);
        let mut describe = |signal| describe_exit(Ok(ExitStatus::from_raw(signal)), &mut oom);
        let by_hand = "was killed by signal 9 (SIGKILL; the kernel's out-of-memory killer uses it too)";
        assert_eq!(describe(9), by_hand);
        KILLS.fetch_add(1, Ordering::Relaxed);
        assert_eq!(describe(9), "was killed by the kernel's out-of-memory killer (SIGKILL)");
        assert_eq!(describe(9), by_hand);
        // A process that a task had started was killed, and the worker ended of that.
        KILLS.fetch_add(1, Ordering::Relaxed);
        assert_eq!(describe(3 << 8), "exited with status 3");
        assert_eq!(describe(9), by_hand);
    }
}
