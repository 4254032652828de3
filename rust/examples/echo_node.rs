//! A node without Python, for the tests: an agent on its standard input and output, and the worker that it starts.
//!
//! The worker answers each task with its own parts, and hands large ones over as files. The code says what it does before: 1 waits until the file exists
//! that its first part names, 2 ends the process with status 3, 3 kills it, 4 writes its parts to standard error, 5
//! floods that with 16 MiB. 6 answers with 64 MiB instead. 7 sends its parts as a note, and answers with the answer. 8
//! writes its parts to the worker's socket, as if the worker had sent them to the agent. 9 is as 7, with 15 MiB.
//!
//! An agent that is given a file says that it will soon be gone when that exists.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bytes::Bytes;
use skyward_lite::node::agent;
use skyward_lite::node::arrivals::{Arrivals, Streams};
use skyward_lite::node::memory_file::SharedFile;
use skyward_lite::node::session::{self, AgentSpec};
use skyward_lite::node::worker::{Answer, Worker};
use skyward_lite::timing::BLOB_BYTES;
use skyward_lite::wire::{ASKS, BlobPart, Message, Outcome, TELLS};

/// Return a result whose large parts are files.
fn answer(mut message: Message) -> Answer {
    let mut files = Vec::new();
    for (place, part) in (0..).zip(std::mem::take(&mut message.parts)) {
        match if part.len() < BLOB_BYTES { None } else { SharedFile::of(&part).ok() } {
            None => message.parts.push(part),
            Some(file) => {
                files.push(file);
                message.blobs.push(BlobPart { place, number: 0, fresh: false, content: None });
            }
        }
    }
    Answer { message, files }
}

type Fallible = Result<(), Box<dyn std::error::Error>>;

/// Send a note, and return the answer.
fn noted(worker: &Worker, code: u8, parts: Vec<Bytes>) -> Vec<Bytes> {
    worker.send_note(code, parts).1.recv().into_iter().map(|answer| answer.unwrap_or_else(|error| error)).collect()
}

fn worker() -> Fallible {
    let (worker, setup) = Worker::start(UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?))?;
    worker.ready()?;
    let threads: Vec<_> = (0..setup.slots)
        .map(|slot| {
            let worker = worker.clone();
            std::thread::spawn(move || {
                loop {
                    let Some(task) = worker.next(slot, Duration::from_secs(1)) else {
                        if worker.over() {
                            break;
                        }
                        continue;
                    };
                    let Message { id, code, nanos, .. } = task.message;
                    let mut parts: Vec<Bytes> = task.into_parts().into_iter().flatten().map(Bytes::from).collect();
                    match code {
                        1 => {
                            let gate =
                                parts.first().map(|p| String::from_utf8_lossy(p).into_owned()).unwrap_or_default();
                            drop(std::fs::write(format!("{gate}.reached-{}", id.task), ""));
                            while !std::path::Path::new(&gate).exists() {
                                std::thread::sleep(Duration::from_millis(5));
                            }
                        }
                        2 => std::process::exit(3),
                        3 => std::process::abort(),
                        4 => parts.iter().for_each(|part| drop(std::io::stderr().write_all(part))),
                        5 => (0..1 << 18).for_each(|_| drop(std::io::stderr().write_all(&[b'x'; 63 + 1]))),
                        6 => parts = vec![vec![0; 64 << 20].into()],
                        8 => {
                            let socket = std::io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from);
                            drop(socket.map(|mut socket| parts.iter().try_for_each(|part| socket.write_all(part))));
                        }
                        7 => parts = noted(&worker, TELLS, parts),
                        9 => parts = noted(&worker, TELLS, vec![vec![0; 15 << 20].into()]),
                        10 => parts = noted(&worker, ASKS, parts),
                        _ => {}
                    }
                    let code = Outcome::Returned as u8;
                    worker.finish(answer(Message { id, code, nanos, parts, ..Message::default() }));
                }
            })
        })
        .collect();
    for thread in threads {
        drop(thread.join());
    }
    Ok(())
}

fn agent() -> Fallible {
    let program = std::env::current_exe()?.to_string_lossy().into_owned();
    let spec = AgentSpec {
        worker: vec![program, "worker".to_owned()],
        version: env!("CARGO_PKG_VERSION").to_owned(),
        python: "3.11".to_owned(),
        epoch: std::process::id().to_string(),
        packages: [("joblib".to_owned(), "1".to_owned())].into(),
        notices: Vec::new(),
        cores: None,
        directory: None,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    if let Some(notice) = std::env::args().nth(2) {
        std::thread::spawn(move || {
            while !std::path::Path::new(&notice).exists() || !agent::drain("notice") {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
    }
    runtime.block_on(session::run(
        Some(Streams::new(tokio::io::stdin(), tokio::io::stdout())),
        Arrivals::none(),
        None,
        spec,
    ))?;
    // Tokio reads standard input on a thread that cannot be interrupted.
    std::process::exit(0);
}

fn main() -> Fallible {
    match std::env::args().nth(1).as_deref() {
        Some("agent") => agent(),
        Some("worker") => worker(),
        other => Err(format!("usage: echo_node agent|worker (got {other:?})").into()),
    }
}
