//! The core's log, for the one who looks for a fault: off, unless the environment variable `SKYWARD_LOG` names a level.
//!
//! A client and an agent write it to their standard error. Workers write none of their own: what they print is a task's.

use std::env;
use std::io::{Write, stderr};
use std::sync::Once;

use tracing::level_filters::LevelFilter;

/// Names the least important level that is written: error, warn, info, debug or trace; off or empty for none.
const VARIABLE: &str = "SKYWARD_LOG";

static STARTED: Once = Once::new();

/// Start the log if the variable asks for it. Only the first call of a process counts. A value that names no level is
/// answered by a line on standard error, and by no log.
pub(super) fn start() {
    STARTED.call_once(|| {
        let value = env::var_os(VARIABLE).unwrap_or_default();
        if value.is_empty() {
            return;
        }
        let value = value.to_string_lossy();
        let name = value.to_lowercase();
        // `LevelFilter` also reads numbers, which other programs count in the opposite direction.
        let names = ["off", "error", "warn", "info", "debug", "trace"];
        let level = name.parse::<LevelFilter>().ok().filter(|_| names.contains(&name.as_str()));
        let Some(level) = level else {
            let names = names.join(", ");
            drop(writeln!(stderr(), "skyward_lite: {VARIABLE}={value:?} is no level ({names}): nothing is logged"));
            return;
        };
        // An event that cannot be written is dropped: when nobody reads standard error any more, reporting that there with
        // `eprintln!` would end the I/O thread by a panic.
        tracing_subscriber::fmt().with_max_level(level).with_writer(stderr).log_internal_errors(false).init();
    });
}
