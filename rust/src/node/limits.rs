//! What the system lets this node's processes have: open files, and memory.

use std::path::Path;
#[cfg(target_os = "linux")]
use std::sync::OnceLock;

#[cfg(target_os = "linux")]
use rustix::process::{Pid, prlimit};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limit of open files that this process was started with.
#[cfg(target_os = "linux")]
static OPEN_FILES: OnceLock<Rlimit> = OnceLock::new();

/// Let this process open as many files as the system allows it. [`restore_open_files`] gives the processes that it starts
/// the limit that they would have had: programs that use `select` may rely on small numbers.
#[cfg(target_os = "linux")]
pub fn raise_open_files() {
    let before = OPEN_FILES.get_or_init(|| getrlimit(Resource::Nofile));
    let _ = setrlimit(Resource::Nofile, Rlimit { current: before.maximum, maximum: before.maximum });
}

/// See [`raise_open_files`].
#[cfg(target_os = "linux")]
pub fn restore_open_files(process: u32) {
    let pid = i32::try_from(process).ok().and_then(Pid::from_raw);
    if let (Some(limit), Some(pid)) = (OPEN_FILES.get(), pid) {
        let _ = prlimit(Some(pid), Resource::Nofile, *limit);
    }
}

/// Let this process open more files than the 256 that macOS allows by default, which are fewer than the blobs that a node may
/// keep. The processes that it starts have the same limit: they, too, hold a descriptor of each blob.
#[cfg(not(target_os = "linux"))]
pub fn raise_open_files() {
    /// What macOS allows at most, whatever it says.
    const MOST: u64 = 10_240;
    let limit = getrlimit(Resource::Nofile);
    let raised = limit.maximum.map_or(MOST, |most| most.min(MOST));
    if limit.current.is_some_and(|current| current < raised) {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum: limit.maximum });
    }
}

/// Nothing: without `prlimit` a process cannot set the limit of another.
#[cfg(not(target_os = "linux"))]
pub fn restore_open_files(_: u32) {}

/// Return the memory that this node's processes may use, in bytes: the machine's, or the least that the control groups
/// above this process allow; 0 if the system does not say.
#[must_use]
pub fn memory() -> u64 {
    memory_below(Path::new("/"))
}

fn memory_below(root: &Path) -> u64 {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
    let text = read("proc/meminfo");
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB"));
    let total = total.and_then(|kib| kib.trim().parse::<u64>().ok()).map(|kib| kib.saturating_mul(1024));
    let mut least = total.unwrap_or(u64::MAX);
    for line in read("proc/self/cgroup").lines() {
        // The number, the controllers, which version 2 does not name, and the group.
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
        let (mount, file) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        // In a container the group's name may be that of the machine's tree, of which only the container's part is seen
        // here: then its file is at the root.
        for above in Path::new(group.trim_start_matches('/')).ancestors() {
            let limit = std::fs::read_to_string(root.join(mount).join(above).join(file)).unwrap_or_default();
            // "max" is no limit.
            least = limit.trim().parse().map_or(least, |limit: u64| limit.min(least));
        }
    }
    if least == u64::MAX { 0 } else { least }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The least limit of all groups above counts, of both versions of control groups, and the machine's memory.
    #[test]
    fn memory_is_the_least_of_all_limits() {
        let root = std::env::temp_dir().join(format!("skyward-limits-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert_eq!(memory_below(&root), 0);
        write("proc/meminfo", "MemTotal:       1000 kB\nMemFree: 10 kB\n");
        assert_eq!(memory_below(&root), 1_024_000);
        write("proc/self/cgroup", "0::/a/b\n");
        write("sys/fs/cgroup/a/b/memory.max", "max\n");
        assert_eq!(memory_below(&root), 1_024_000);
        write("sys/fs/cgroup/a/memory.max", "500000\n");
        assert_eq!(memory_below(&root), 500_000);
        write("proc/self/cgroup", "5:cpu,memory:/docker/x\n0::/a/b\n");
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "400000\n");
        assert_eq!(memory_below(&root), 400_000);
        std::fs::remove_dir_all(&root).unwrap();
    }
}
