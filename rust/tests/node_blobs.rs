//! An agent and its workers as processes of their own: blobs reach tasks, results come back, and nothing of them is left.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![cfg(target_os = "linux")]

use std::collections::HashMap;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use skyward_lite::timing::{BLOB_BYTES, MAX_MESSAGE};
use skyward_lite::wire::{self, Attempt, BlobPart, Body, Control, Event, EventReader, FrameSender, Message, Outcome};
use tokio::process::{Child, ChildStdout, Command};

#[path = "support/hello.rs"]
mod support;
use support::client_hello;

/// Bound on everything here: a hang is a failure with a name.
const BOUND: Duration = Duration::from_secs(60);

/// A client that says what it is told, and its agent.
struct Client {
    link: Arc<FrameSender>,
    source: EventReader<ChildStdout>,
    results: HashMap<u64, Message>,
    agent: Child,
}

impl Client {
    async fn connect(slots: usize, processes: bool) -> Self {
        let exe = std::env::current_exe().unwrap();
        let program = exe.ancestors().nth(2).unwrap().join("examples/echo_node");
        let mut agent = Command::new(program);
        let mut agent =
            agent.arg("agent").stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let (to, from) = (agent.stdin.take().unwrap(), agent.stdout.take().unwrap());
        let link = Arc::new(FrameSender::default());
        let sender = Arc::clone(&link);
        tokio::spawn(async move { sender.run(to, None).await });
        link.send(|o| o.control(wire::hello(&client_hello(slots, processes)).unwrap()));
        let source = EventReader::of_session(from, MAX_MESSAGE, Arc::clone(&link));
        let mut client = Self { source, link, results: HashMap::new(), agent };
        client.source.greeting(&mut Vec::new()).await.unwrap();
        client
    }

    fn submit(&self, n: u64, parts: Vec<Bytes>, blobs: &[(u16, u64)]) {
        let blob =
            |(place, number): &(u16, u64)| BlobPart { place: *place, number: *number, fresh: false, content: None };
        let id = Attempt { task: n, attempt: 0 };
        let message = Message { id, parts, blobs: blobs.iter().map(blob).collect(), ..Message::default() };
        self.link.send(|o| o.message(Body::Task, message));
    }

    /// Wait for the result of this task, and return its parts.
    async fn result(&mut self, n: u64) -> Vec<Bytes> {
        let read = async {
            let mut events = Vec::new();
            while !self.results.contains_key(&n) {
                self.source.read(&mut events).await.unwrap();
                for event in events.drain(..) {
                    if let Event::Message(Body::Result, message) = event {
                        self.link.send(|o| o.acknowledge([message.id]));
                        assert!(self.results.insert(message.id.task, message).is_none(), "ended twice");
                    }
                }
            }
        };
        tokio::time::timeout(BOUND, read).await.expect("no result");
        let result = self.results.remove(&n).unwrap();
        assert_eq!(result.code, Outcome::Returned as u8, "{:?}", result.parts);
        result.parts
    }

    /// Return the files in memory that the agent and its workers have open, for each process.
    fn memory_files(&self) -> Vec<usize> {
        let agent = self.agent.id().unwrap();
        let children = std::fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).unwrap();
        let mut processes: Vec<u32> = children.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
        processes.push(agent);
        let is_memory = |path: std::path::PathBuf| {
            std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:skyward"))
        };
        let count = |pid: u32| {
            let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
            open.filter(|entry| is_memory(entry.as_ref().unwrap().path())).count()
        };
        processes.into_iter().map(count).collect()
    }
}

fn content(n: u64, size: usize) -> Bytes {
    n.to_le_bytes().into_iter().cycle().take(size).collect()
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(test);
}

/// Tasks get their blobs in their places, whether they come before the blobs or after them, in several processes and
/// threads, and hand large parts back in theirs.
#[test]
fn blobs_reach_tasks_and_come_back() {
    for processes in [false, true] {
        run(async {
            let mut client = Client::connect(3, processes).await;
            let (a, b) = (content(1, 5_000_000), content(2, BLOB_BYTES));
            let (small, large) = (Bytes::from_static(b"small"), content(3, 300_000));
            let inline = || vec![small.clone(), large.clone()];
            (0..6).for_each(|n| client.submit(n, inline(), &[(1, 10), (3, 20)]));
            client
                .link
                .send(|o| [(10, &a), (20, &b)].into_iter().for_each(|(number, blob)| o.blob(number, blob.clone())));
            (6..12).for_each(|n| client.submit(n, inline(), &[(1, 10), (3, 20)]));
            client.submit(12, vec![], &[(0, 20), (1, 20)]);
            for n in 0..12 {
                assert!(client.result(n).await == [&small, &a, &large, &b], "task {n}");
            }
            assert!(client.result(12).await == [&b, &b]);
        });
    }
}

/// After blobs are forgotten no process has a descriptor of them, whether they were shared or each task had its own.
#[test]
fn forgotten_blobs_leave_no_descriptors() {
    run(async {
        let mut client = Client::connect(2, true).await;
        client.submit(0, vec![], &[]);
        client.result(0).await;
        let before = client.memory_files();
        for n in 1..=1000 {
            client.link.send(|o| o.blob(n, content(n, BLOB_BYTES)));
            client.submit(n, vec![], &[(0, n)]);
            if n > 10 {
                assert!(client.result(n - 10).await == [content(n - 10, BLOB_BYTES)]);
                client.link.send(|o| o.forget(vec![n - 10]));
            }
        }
        for n in 991..=1000 {
            client.result(n).await;
        }
        assert!(client.memory_files().iter().sum::<usize>() > before.iter().sum());
        client.link.send(|o| o.forget((991..=1000).collect()));
        // Each worker hears of it before it gets to a later task, and both get one: each ends when the other one has begun.
        let gate = std::env::temp_dir().join(format!("skyward-gate-{}", std::process::id()));
        let waiting = |task| Message { id: Attempt { task, attempt: 0 }, code: 1, ..Message::default() };
        let path = Bytes::from(gate.display().to_string());
        for n in 2000..2002 {
            client.link.send(|o| o.message(Body::Task, Message { parts: vec![path.clone()], ..waiting(n) }));
        }
        let reached: Vec<_> = (2000..2002).map(|n| format!("{}.reached-{n}", gate.display())).collect();
        while !reached.iter().all(|path| std::fs::exists(path).unwrap()) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        std::fs::write(&gate, "").unwrap();
        for n in 2000..2002 {
            client.result(n).await;
        }
        let made = reached.into_iter().chain([gate.display().to_string()]);
        made.for_each(|path| std::fs::remove_file(path).unwrap());
        assert_eq!(client.memory_files(), before);
    });
}

/// A worker that dies while it has a blob mapped is replaced, and the next one gets the blob.
#[test]
fn a_dead_worker_takes_no_blob_with_it() {
    run(async {
        let mut client = Client::connect(1, false).await;
        let blob = content(1, 1 << 20);
        client.link.send(|o| o.blob(7, blob.clone()));
        client.submit(0, vec![], &[(0, 7)]);
        assert!(client.result(0).await == [&blob]);
        let id = Attempt { task: 1, attempt: 0 };
        let part = BlobPart { place: 0, number: 7, fresh: false, content: None };
        let dying = Message { id, code: 3, blobs: vec![part], ..Message::default() };
        client.link.send(|o| o.message(Body::Task, dying));
        client.submit(2, vec![], &[(0, 7)]);
        assert!(client.result(2).await == [&blob]);
        assert_eq!(client.results.remove(&1).map(|end| end.code), Some(Outcome::Crashed as u8));
        client.link.send(|o| o.control(Control::Goodbye(Bytes::new())));
        let ended = tokio::time::timeout(BOUND, client.agent.wait()).await.expect("the agent does not end");
        assert!(ended.unwrap().success());
    });
}
