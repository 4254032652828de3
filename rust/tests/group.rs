//! Which command lines are those of resource trackers. What becomes of the processes is in `tests/test_trackers.py`.

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
