//! A machine behind a command: what comes from its processes, how their ends are told, and that none is left behind.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Mutex;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::process::{Pid, test_kill_process};
use skyward_lite::error::SshError;
use skyward_lite::transport::command::{CommandConnection, Ending};
use skyward_lite::transport::output::CommandOutput;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Bound on everything here that waits.
const BOUND: Duration = Duration::from_secs(20);

fn shell() -> CommandConnection {
    CommandConnection::new(vec!["sh".to_owned(), "-c".to_owned()], None, Ending::default())
}

async fn run(connection: &CommandConnection, line: &str, input: impl Into<Bytes>) -> CommandOutput {
    let output = Mutex::default();
    let run = connection.run_into(line, input.into(), &output);
    tokio::time::timeout(BOUND, run).await.unwrap().unwrap();
    output.into_inner().unwrap()
}

fn output(status: Option<u32>, stdout: &str, stderr: &str) -> CommandOutput {
    CommandOutput { status, stdout: stdout.into(), stderr: stderr.into() }
}

/// Wait until no process has this number.
async fn is_gone(pid: &str) {
    let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
    let begin = Instant::now();
    while test_kill_process(pid).is_ok() {
        assert!(begin.elapsed() < BOUND, "process {pid:?} is left");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A command gets its input to the end, and leaves its output and its status, or none after a signal.
#[tokio::test]
async fn a_command_runs_to_its_end() {
    let shell = shell();
    assert_eq!(run(&shell, "cat; echo b >&2; exit 3", "a").await, output(Some(3), "a", "b\n"));
    assert_eq!(run(&shell, "kill -9 $$", "").await, output(None, "", ""));
    // It does not read what it is sent, more than a pipe holds.
    assert_eq!(run(&shell, "exec 0<&-; echo a", vec![7; 1 << 20]).await, output(Some(0), "a\n", ""));
    // What it has started keeps its output open.
    let left = run(&shell, "sleep 60 & echo $!", "").await;
    assert_eq!(left.status, Some(0));
    run(&shell, &format!("kill {}", String::from_utf8(left.stdout).unwrap()), "").await;
}

/// The environment is ours, or all that is given, and the program is found by its PATH.
#[tokio::test]
async fn the_environment_is_what_was_given() {
    let path = std::env::var("PATH").unwrap();
    let given = vec![("PATH".to_owned(), path), ("ONLY".to_owned(), "this".to_owned())];
    let command = CommandConnection::new(vec!["sh".to_owned(), "-c".to_owned()], Some(given), Ending::default());
    assert_eq!(run(&command, "echo $ONLY$HOME", "").await, output(Some(0), "this\n", ""));
    assert_eq!(run(&shell(), "echo ${HOME:+home}", "").await, output(Some(0), "home\n", ""));
}

#[tokio::test]
async fn a_program_that_is_not_there_is_named() {
    let missing = CommandConnection::new(vec!["no-such-program".to_owned(), "x y".to_owned()], None, Ending::default());
    let error = missing.run_into("true", Bytes::new(), &Mutex::default()).await.unwrap_err();
    assert!(matches!(&error, SshError::Program { .. }));
    assert_eq!(error.to_string(), "no-such-program does not run here: No such file or directory (os error 2)");
    assert_eq!(missing.exec("true").err().unwrap().to_string(), error.to_string());
    assert_eq!(missing.shown(), "no-such-program x y");
}

/// Bytes go both ways, and the end of the output tells how the process has ended and what it printed last.
#[tokio::test]
async fn the_end_of_a_stream_tells_its_reason() {
    for (line, expected) in [
        ("exit 5", "the command ended with status 5"),
        ("echo gone >&2; kill -9 $$", "the command was ended by signal 9; it printed: gone"),
        ("exec 1>&-; sleep 60", "the command closed its output"),
    ] {
        let (mut from, mut to) = shell().exec(&format!("head -c 4; {line}")).unwrap();
        to.write_all(b"ping").await.unwrap();
        let mut seen = Vec::new();
        let end = tokio::time::timeout(BOUND, from.read_to_end(&mut seen)).await.unwrap().unwrap_err();
        assert_eq!((seen.as_slice(), end.to_string().as_str()), (&b"ping"[..], expected));
    }
}

/// A process whose stream is dropped ends: by the end of its input, by SIGTERM, or at last by SIGKILL.
#[tokio::test]
async fn a_dropped_stream_leaves_no_process() {
    for line in ["cat >/dev/null", "sleep 60", "trap '' TERM; while :; do sleep 0.1; done"] {
        let (mut from, to) = shell().exec(&format!("echo $$; {line}")).unwrap();
        let mut pid = [0; 32];
        let count = tokio::time::timeout(BOUND, from.read(&mut pid)).await.unwrap().unwrap();
        drop((from, to));
        is_gone(std::str::from_utf8(pid.get(..count).unwrap()).unwrap()).await;
    }
}

/// When a pool is closed no thread may have the time to end a process: those that do not end at once are killed.
#[tokio::test]
async fn what_does_not_end_in_time_is_killed() {
    let ending = Ending::default();
    let shell = CommandConnection::new(vec!["sh".to_owned(), "-c".to_owned()], None, ending.clone());
    let (mut from, to) = shell.exec("echo $$; trap '' TERM; while :; do sleep 0.1; done").unwrap();
    let mut pid = [0; 32];
    let count = tokio::time::timeout(BOUND, from.read(&mut pid)).await.unwrap().unwrap();
    drop((from, to));
    ending.finish(Duration::ZERO);
    is_gone(std::str::from_utf8(pid.get(..count).unwrap()).unwrap()).await;
}

/// A command that is given up before it has ended leaves no process either.
#[tokio::test]
async fn a_command_that_is_given_up_ends() {
    let (shell, seen) = (shell(), Mutex::<CommandOutput>::default());
    {
        let run = shell.run_into("echo $$; sleep 60", Bytes::new(), &seen);
        tokio::pin!(run);
        while seen.lock().unwrap().stdout.is_empty() {
            assert!(tokio::time::timeout(Duration::from_millis(5), &mut run).await.is_err());
        }
    }
    let pid = String::from_utf8(seen.into_inner().unwrap().stdout).unwrap();
    is_gone(&pid).await;
}
