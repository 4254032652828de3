//! Which command lines are those of resource trackers, and which processes belong to a worker. What becomes of them is also in
//! `tests/pool/test_trackers.py` and `test_daemons.py`.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use skyward_lite::node::processes::tracks;

fn line(arguments: &[&str]) -> String {
    arguments.iter().flat_map(|argument| [*argument, "\0"]).collect()
}

/// The command lines that Python 3.11 to 3.14 and loky 3.0 to 3.5 give to their trackers, flags of the interpreter
/// included, are recognized.
#[test]
fn real_trackers() {
    let standard = "from multiprocessing.resource_tracker import main;main(5)";
    for arguments in [
        &["/usr/bin/python3", "-c", standard][..],
        &["python", "-B", "-Wdefault", "-X", "dev", "-X", "frozen_modules=off", "-c", standard],
        &["/opt/my env/bin/python", "-I", "-OO", "-c", "from multiprocessing.resource_tracker import main;main(1023)"],
        &["python", "-c", "from loky.backend.resource_tracker import main; main(12, False)"],
        &["python", "-c", "from joblib.externals.loky.backend.resource_tracker import main; main(12, True)"],
        &["python", "-c", "from joblib.externals.loky.backend.resource_tracker import main; main(12, 1)"],
    ] {
        assert!(tracks(&line(arguments)), "{arguments:?}");
    }
}

/// A command line that only mentions a tracker, or starts one by way of another program, is not that of a tracker.
#[test]
fn mentions_of_trackers() {
    let code = "from multiprocessing.resource_tracker import main;main(5)";
    let quoted = format!("python -c '{code}'");
    for arguments in [
        &[][..],
        &[code],
        &["-c", code],
        &["python", code],
        &["python", "resource_tracker.py"],
        &["python", "-m", "multiprocessing.resource_tracker"],
        &["python", "train.py", "-c", code],
        &["python", "-c", code, "resource_tracker"],
        &["timeout", "60", "python", "-c", code],
        &["sh", "-c", &quoted],
        &["python", "-X", "-c", code],
        &["python", "-c", "import time; time.sleep(600) # from multiprocessing.resource_tracker import main;main(5)"],
        &["python", "-c", "from multiprocessing.resource_tracker import main;main(5); import time"],
        &["python", "-c", "from multiprocessing.resource_tracker import main;main(5)\nimport os;main(5)"],
        &["python", "-c", "from multiprocessing.resource_tracker import main;main()"],
        &["python", "-c", "from multiprocessing.resource_tracker import main;main(-5)"],
        &["python", "-c", "from multiprocessing.resource_tracker import main;main(5, verbose)"],
        &["python", "-c", "from my.resource_tracker import main;main(5)"],
        &["python", "-c", "from multiprocessing.forkserver import main; main(5)"],
    ] {
        assert!(!tracks(&line(arguments)), "{arguments:?}");
    }
    assert!(!tracks(""));
}

proptest! {
    /// Any text is judged without a panic, and no text that lacks a tracker's import is taken for a tracker.
    #[test]
    fn any_command_line(command in any::<String>()) {
        prop_assert!(!tracks(&command) || command.contains(".resource_tracker import main;"));
    }
}

/// Processes that this one adopts end with the worker to which their marks belong, and with no other.
#[cfg(target_os = "linux")]
mod adopted {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use rustix::process::Pid;
    use skyward_lite::node::process_group::{Adopted, Group, Survivors, adopt_orphans};
    use skyward_lite::node::processes;

    /// Become a daemon that ignores signals, has a child of its own, and clears its environment; then live on.
    const WORKER: &str = "read go; (env -i setsid -f sh -c 'trap \"\" TERM HUP; echo $$; sleep 600 & exec sleep 600'); \
                          sleep 600 & exec sleep 600";

    struct Worker {
        process: Child,
        group: Group,
        daemon: Pid,
    }

    fn start() -> Worker {
        let mut command = Command::new("sh");
        command.args(["-c", WORKER]).stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut process = command.spawn().unwrap();
        let group = Group::of(process.id());
        process.stdin.take().unwrap().write_all(b"go\n").unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Worker { process, group, daemon: Pid::from_raw(line.trim().parse().unwrap()).unwrap() }
    }

    fn lives(pid: Pid) -> bool {
        processes::stat(pid).is_some_and(|stat| !stat.has_ended)
    }

    fn eventually(mut is_so: impl FnMut() -> bool) {
        let until = Instant::now() + Duration::from_secs(20);
        while !is_so() {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn daemons_end_with_their_worker() {
        adopt_orphans();
        let (mut first, mut second) = (start(), start());
        let me = i32::try_from(std::process::id()).unwrap();
        for daemon in [first.daemon, second.daemon] {
            eventually(|| processes::stat(daemon).is_some_and(|stat| stat.parent == me));
        }
        let mut adopted = Adopted::default();
        adopted.on_tick();
        assert!(lives(first.daemon) && lives(second.daemon));
        first.group.kill_leader();
        first.process.wait().unwrap();
        eventually(|| first.group.sweep() == Survivors::Nothing);
        assert!(!lives(first.daemon) && lives(second.daemon));
        // What nobody has swept is found by a later look, and reaped.
        second.process.kill().unwrap();
        second.process.wait().unwrap();
        adopted.hurry();
        eventually(|| {
            adopted.on_tick();
            processes::children(Pid::from_raw(me).unwrap()).is_empty()
        });
        assert!(!lives(second.daemon));
        assert_eq!(second.group.sweep(), Survivors::Nothing);
    }
}
