//! Frames from a node are bounded at the client before they are stored. Each flood comes from a scripted node behind
//! the embedded server. Its client is a process of its own, whose peak memory is compared with its memory before the
//! flood.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![allow(clippy::cast_possible_truncation)]

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use skyward_lite::client::pool::{Endpoint, NodeSpec, NodeState, Pool};
use skyward_lite::transport::auth::{Identity, new_key};
use skyward_lite::transport::host_key::HostKeys;
use skyward_lite::transport::server;
use skyward_lite::transport::ssh::{Algorithms, Target};
use skyward_lite::wire::{self, AgentHello, ClientHello, MAX_MESSAGE, WorkerSpec};
use skyward_lite::wire::{Attempt, Control, MAX_BLOCK, Message, Outcome, Packer, put_preamble};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Bound on everything here.
const BOUND: Duration = Duration::from_secs(60);
/// Memory that a flood may cost, in KiB: a channel's window of 16 MiB, credit for results or notes, and a batch of
/// events.
const MAX_GROWTH_KIB: usize = 64 * 1024;
const FIRST: u8 = 1;
const LAST: u8 = 2;
const READY: u8 = 2;
const HEARTBEAT: u8 = 3;
const ACKNOWLEDGE: u8 = 6;
const TASK: u8 = 11;
const RESULT: u8 = 12;
const OUTPUT: u8 = 14;
const NOTE: u8 = 16;

fn frame(raw: &mut Vec<u8>, kind: u8, flags: u8, task: u64, body: &[u8]) {
    raw.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
    raw.extend([kind, flags, 0, 0]);
    raw.extend(task.to_le_bytes());
    raw.extend(body);
}

/// The head of a message with parts of these lengths, and `bytes` of them in the same frame.
fn head(lens: &[u64], bytes: usize) -> Vec<u8> {
    let mut head = vec![0, 0];
    head.extend(u16::try_from(lens.len()).unwrap().to_le_bytes());
    head.extend(0_u64.to_le_bytes());
    for len in lens {
        head.extend(len.to_le_bytes());
    }
    head.resize(head.len() + bytes, 0);
    head
}

/// As many of the frames that `next` makes as fit a block.
fn full(mut next: impl FnMut(&mut Vec<u8>)) -> Vec<u8> {
    let mut raw = Vec::new();
    loop {
        let before = raw.len();
        next(&mut raw);
        if raw.len() > MAX_BLOCK {
            raw.truncate(before);
            return raw;
        }
    }
}

fn hello_of(concurrency: Option<usize>) -> ClientHello {
    ClientHello {
        version: "0".to_owned(),
        run: "test".to_owned(),
        node: "hostile".to_owned(),
        python: "3.11".to_owned(),
        lease_ms: 60_000,
        packages: BTreeMap::new(),
        strict: false,
        worker: WorkerSpec {
            concurrency,
            processes: false,
            env: BTreeMap::new(),
            sys_path: Vec::new(),
            shares_files: false,
            preload: Vec::new(),
            max_payload: MAX_MESSAGE,
            task_timeout_ms: None,
            setup: String::new(),
            unwind: false,
        },
    }
}

/// The frames of a scripted node: blocks of raw frames, any number of them.
type Script = Box<dyn Iterator<Item = Vec<u8>> + Send>;

/// How a scripted node begins.
struct Opening {
    /// Frames before its hello.
    first: Script,
    cores: usize,
    slots: Option<u64>,
}

impl Default for Opening {
    fn default() -> Self {
        Self { first: Box::new(std::iter::empty()), cores: 1, slots: Some(1) }
    }
}

/// Add a node to the pool that follows a script, and sends a goodbye at its end. It stops when the client has left.
fn add_hostile(pool: &Pool, asked: Option<usize>, opening: Opening, script: Script) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (host_key, user_key) = (new_key().unwrap(), new_key().unwrap());
    let (host_public, authorized) = (host_key.public_key().clone(), user_key.public_key().clone());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        drop(runtime.block_on(async {
            theirs.set_nonblocking(true).unwrap();
            let socket = tokio::net::UnixStream::from_std(theirs).unwrap();
            let accepted = server::accept(socket, host_key, authorized, Duration::from_secs(20)).await.unwrap();
            let (mut from, mut to) = tokio::io::split(accepted.stream);
            let reading = async {
                let mut buffer = vec![0; 1 << 16];
                while from.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
                std::future::pending::<()>().await;
            };
            let writing = async {
                let mut wire = Vec::new();
                put_preamble(&mut wire);
                let hello = AgentHello {
                    version: "0".to_owned(),
                    python: "3.11".to_owned(),
                    epoch: "1".to_owned(),
                    cores: opening.cores,
                    pid: 1,
                    differences: Vec::new(),
                };
                let mut begin = Vec::new();
                wire::hello(&hello).unwrap().put(&mut begin).unwrap();
                if let Some(slots) = opening.slots {
                    frame(&mut begin, READY, 0, slots, &[]);
                }
                let mut end = Vec::new();
                Control::Goodbye(Bytes::from_static(b"the script is over")).put(&mut end).unwrap();
                let mut blocks = opening.first.chain([begin]).chain(script).chain([end]);
                let mut packer = Packer::default();
                // A script may wait for the test.
                while let (rest, Some(raw)) = tokio::task::spawn_blocking(|| {
                    let raw = blocks.next();
                    (blocks, raw)
                })
                .await
                .unwrap()
                {
                    blocks = rest;
                    packer.pack(&raw, &mut wire);
                    for piece in wire.chunks(32 * 1024) {
                        to.write_all(piece).await?;
                    }
                    wire.clear();
                }
                to.flush().await?;
                to.shutdown().await?;
                tokio::time::sleep(Duration::from_secs(20)).await;
                std::io::Result::Ok(())
            };
            tokio::select! {
                () = reading => Ok(()),
                written = writing => written,
            }
        }));
    });
    let target = Target {
        user: "root".to_owned(),
        host_keys: HostKeys { known: vec![host_public], ..HostKeys::default() },
        algorithms: Algorithms::default(),
        identities: vec![Identity::Key(Arc::new(user_key))],
        timeout: Duration::from_secs(20),
    };
    let id = pool.add_node("hostile".to_owned());
    let connection = Arc::new(pool.connect(Endpoint::Socket(ours), target).unwrap());
    let spec = NodeSpec { connection, command: String::new(), hello: hello_of(asked), ready_timeout: BOUND };
    pool.start_node(id, spec);
}

/// Why the first node was lost.
fn await_loss(pool: &Pool) -> String {
    let by = Instant::now() + BOUND;
    loop {
        if let NodeState::Lost(why) = &pool.nodes()[0].state {
            return why.clone();
        }
        assert!(Instant::now() < by, "{:?}", pool.nodes());
        let seen: Vec<_> = pool.nodes().iter().map(|n| n.state.name()).collect();
        pool.wait_for_change(&seen, Duration::from_secs(1));
    }
}

fn status(field: &str) -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn repeat(raw: Vec<u8>, times: usize) -> Script {
    Box::new(std::iter::repeat_n(raw, times))
}

/// Chunks of messages, in rounds: one of each of `count` messages in each round.
fn unfinished(kind: u8, count: u64, rounds: usize, size: u64) -> Script {
    let chunk = 60_000;
    let first = move |task| {
        let mut raw = Vec::new();
        frame(&mut raw, kind, FIRST, task, &head(&[size], chunk));
        raw
    };
    let more = move |task| {
        let mut raw = Vec::new();
        frame(&mut raw, kind, 0, task, &vec![0; chunk]);
        raw
    };
    Box::new((0..count).map(first).chain((1..rounds).flat_map(move |_| (0..count).map(more))))
}

/// The floods by name: how the node begins, and the frames that follow.
fn flood(name: &str) -> (Opening, Script) {
    let plain = Opening::default();
    let mut number = 0;
    let mut next = move || {
        number += 1;
        number
    };
    match name {
        "empty output" => (plain, repeat(full(|raw| frame(raw, OUTPUT, 0, 9, &[])), 200)),
        "output of one byte" => (plain, repeat(full(|raw| frame(raw, OUTPUT, 0, next() << 3 | 1, b"x")), 100)),
        "output that holds a block" => {
            let late = head(&[60_000], 60_000);
            let mut raw = Vec::new();
            (0..4).for_each(|_| frame(&mut raw, RESULT, FIRST | LAST, 99, &late));
            frame(&mut raw, OUTPUT, 0, 9, b"x");
            (plain, repeat(raw, 1500))
        }
        "unknown results" => (plain, unfinished(RESULT, 4000, 3, 1 << 30)),
        "a huge unknown result" => (plain, unfinished(RESULT, 1, 8000, 1 << 30)),
        "unknown results of many parts" => {
            let lens = [vec![0; 1023], vec![1]].concat();
            let first = move |task| {
                let mut raw = Vec::new();
                frame(&mut raw, RESULT, FIRST, task, &head(&lens, 0));
                raw
            };
            (plain, Box::new((0..4000).map(first)))
        }
        "tasks" => (plain, unfinished(TASK, 4000, 2, 1 << 30)),
        "small notes" => {
            let body = head(&[1], 1);
            let mut block = move || full(|raw| frame(raw, NOTE, FIRST | LAST, next(), &body));
            (plain, Box::new((0..200).map(move |_| block())))
        }
        "notes" => (plain, unfinished(NOTE, 4000, 3, 16 << 20)),
        "output before the hello" => {
            (Opening { first: repeat(full(|raw| frame(raw, OUTPUT, 0, 9, &[])), 200), ..plain }, repeat(vec![], 0))
        }
        "acknowledgements" => (plain, repeat(full(|raw| frame(raw, ACKNOWLEDGE, 0, 0, &vec![7; 60_000])), 400)),
        control if control.starts_with("control ") => {
            let kind: u8 = control.trim_start_matches("control ").parse().unwrap();
            let body: &[u8] = if kind == HEARTBEAT { &[0; 8] } else { &[] };
            (plain, repeat(full(|raw| frame(raw, kind, 0, next(), body)), 100))
        }
        other => panic!("no flood is called {other:?}"),
    }
}

/// Not a test of its own: the process in which the flood of the environment's name is measured.
#[test]
#[ignore = "started by the tests of floods"]
fn a_flooded_client() {
    let name = std::env::var("FLOOD").unwrap();
    let pool = Pool::new(1, MAX_MESSAGE).unwrap();
    let (opening, script) = flood(&name);
    let before = status("VmRSS");
    add_hostile(&pool, Some(1), opening, script);
    let why = await_loss(&pool);
    println!("GREW {} {}", status("VmHWM").saturating_sub(before), why);
}

/// Run a flood in a process of its own: how much its memory grew, in KiB, and why the node was lost.
fn flooded(name: &str) -> (usize, String) {
    let text = child("a_flooded_client", name, "");
    let grew = text.lines().find_map(|line| line.split_once("GREW ")).unwrap_or_else(|| panic!("{name}: {text}"));
    let (kib, why) = grew.1.split_once(' ').unwrap();
    (kib.parse().unwrap(), why.to_owned())
}

/// Run an ignored test of this file after these commands of a shell. Return its output.
fn child(test: &str, flood: &str, before: &str) -> String {
    let ended = Command::new("sh")
        .args(["-c", &format!("{before} exec \"$0\" \"$@\"")])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .env("FLOOD", flood)
        .output()
        .unwrap();
    let (out, error) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert!(ended.status.success(), "{flood}: {} {out} {error}", ended.status);
    out.into_owned()
}

/// Check that floods cost the client no more memory than a window and a batch of events, and end with this reason.
fn cost_little(floods: &[(&str, &str)]) {
    for (name, ends) in floods {
        let (kib, why) = flooded(name);
        println!("{name}: {kib} KiB: {why}");
        assert!(kib < MAX_GROWTH_KIB && why.contains(ends), "{name}: {kib} KiB, {why}");
    }
}

const OVER: &str = "the script is over";

/// Output in many pieces, or in few that would keep the memory of whole blocks, is bounded as any other.
#[test]
fn a_flood_of_output_costs_little() {
    cost_little(&[("empty output", OVER), ("output of one byte", OVER), ("output that holds a block", OVER)]);
}

/// Results that nobody asked for are read over; a node that sends tasks is lost.
#[test]
fn results_that_nobody_asked_for_cost_nothing() {
    cost_little(&[
        ("unknown results", OVER),
        ("a huge unknown result", OVER),
        ("unknown results of many parts", OVER),
        ("tasks", "a task from a node"),
    ]);
}

/// Notes beyond the credit end the session.
#[test]
fn a_flood_of_notes_costs_little() {
    cost_little(&[("small notes", "notes without an answer"), ("notes", "notes without an answer")]);
}

/// Control frames cost nothing, and frames before the hello are not stored.
#[test]
fn control_frames_cost_nothing() {
    let before = ("output before the hello", "it began with Output");
    cost_little(&[before, ("acknowledgements", "not asked for"), ("control 3", "not asked for")]);
    // Whether the node is lost at the first one is another question.
    cost_little(&[("control 9", ""), ("control 10", "")]);
    for kind in [4, 7, 8, 13, 17] {
        cost_little(&[(&format!("control {kind}"), "not asked for")]);
    }
}

/// A node gets as many slots as were asked for, or fewer; one that offers others is lost, with both numbers in the
/// error.
#[test]
fn slots_are_those_that_were_asked_for() {
    for (asked, cores, offered, wrong) in [
        (Some(4), 1, 1 << 63, Some("offers 9223372036854775808 slots where 1 to 4")),
        (Some(4), 1, 1 << 32, Some("4294967296 slots")),
        (Some(4), 8, 5, Some("offers 5 slots where 1 to 4")),
        (Some(4), 8, 0, Some("offers 0 slots")),
        (Some(4), 8, 4, None),
        (Some(4), 8, 3, None),
        (None, 8, 8, None),
        (None, 8, 9, Some("offers 9 slots where 1 to 8")),
        (None, usize::MAX, 1 << 40, Some("where 1 to 8192")),
        (None, 0, 1, None),
    ] {
        let pool = Pool::new(1, MAX_MESSAGE).unwrap();
        let opening = Opening { cores, slots: Some(offered), ..Opening::default() };
        let mut again = Vec::new();
        frame(&mut again, READY, 0, 1, &[]);
        add_hostile(&pool, asked, opening, repeat(again, 2));
        let why = await_loss(&pool);
        assert!(why.contains(wrong.unwrap_or("became ready twice")), "{offered} of {asked:?}: {why}");
        let slots = if wrong.is_some() { 0 } else { offered as usize };
        assert_eq!(pool.nodes()[0].slots, slots, "nothing else is taken");
    }
}

/// A result that comes just before the goodbye is its task's end.
#[test]
fn a_result_before_the_goodbye_counts() {
    a_result_counts_before(|raw| Control::Goodbye(Bytes::from_static(b"and out")).put(raw).unwrap());
}

/// A result that comes just before a frame of an unknown kind is its task's end.
#[test]
fn a_result_before_nonsense_counts() {
    a_result_counts_before(|raw| frame(raw, 99, 0, 0, &[]));
}

/// A task ends with its result if the same read has an end of the session behind it.
fn a_result_counts_before(end: impl FnOnce(&mut Vec<u8>)) {
    let pool = Pool::new(1, MAX_MESSAGE).unwrap();
    let (submitted, go) = std::sync::mpsc::channel::<()>();
    let mut raw = Vec::new();
    frame(&mut raw, RESULT, FIRST | LAST, 0, &head(&[3], 3));
    end(&mut raw);
    add_hostile(
        &pool,
        Some(1),
        Opening::default(),
        Box::new(std::iter::once_with(move || go.recv().map(|()| raw).unwrap())),
    );
    submit_when_ready(&pool, 0);
    submitted.send(()).unwrap();
    let ended = pool.finished(0, BOUND).unwrap();
    assert_eq!(ended.iter().map(|m| (m.id.task, m.code)).collect::<Vec<_>>(), [(0, Outcome::Returned as u8)]);
}

/// Submit a task when the first node is ready, which takes it then.
fn submit_when_ready(pool: &Pool, task: u64) {
    pool.wait_for_change(&["connecting"], BOUND);
    assert_eq!(pool.nodes()[0].state, NodeState::Ready);
    pool.submit(Message { id: Attempt { task, attempt: 0 }, code: 0, nanos: 0, parts: Vec::new() }, Some(0));
}

/// Results that are owed may be large, but not several at once beyond the credit.
#[test]
fn unfinished_results_are_bounded_in_sum() {
    let pool = Pool::new(1, MAX_MESSAGE).unwrap();
    let (submitted, go) = std::sync::mpsc::channel::<()>();
    let script = unfinished(RESULT, 3, 1, 40 << 20).inspect(move |_| _ = go.recv());
    add_hostile(&pool, Some(1), Opening::default(), Box::new(script));
    (0..3).for_each(|task| submit_when_ready(&pool, task));
    drop(submitted);
    assert!(await_loss(&pool).contains("unfinished results of 83886080 bytes"), "{:?}", pool.nodes());
}

/// Not a test of its own: a client whose address space is limited, and a node that answers with more.
#[test]
#[ignore = "started by the test of results without memory"]
fn a_client_without_memory() {
    let pool = Pool::new(1, MAX_MESSAGE).unwrap();
    let (submitted, go) = std::sync::mpsc::channel::<()>();
    let chunks = 20_000;
    let large = unfinished(RESULT, 1, chunks, 60_000 * chunks as u64 + 7).inspect(move |_| _ = go.recv());
    let mut last = Vec::new();
    frame(&mut last, RESULT, LAST, 0, &[1; 7]);
    frame(&mut last, RESULT, FIRST | LAST, 1, &head(&[3], 3));
    add_hostile(&pool, Some(2), Opening { slots: Some(2), ..Opening::default() }, Box::new(large.chain([last])));
    (0..2).for_each(|task| submit_when_ready(&pool, task));
    drop(submitted);
    let mut ended = Vec::new();
    while ended.len() < 2 {
        ended.extend(pool.finished(0, BOUND).unwrap());
    }
    assert_eq!((ended[0].code, ended[1].code), (Outcome::Crashed as u8, Outcome::Returned as u8), "{ended:?}");
    println!("{}", String::from_utf8_lossy(&ended[0].parts[0]));
}

/// Where there is no memory for a result its task ends with an error, and the session goes on.
#[test]
fn a_result_without_memory_is_an_error() {
    let text = child("a_client_without_memory", "", "ulimit -v 900000;");
    assert!(text.contains("no memory for its result of 1200000007 bytes"), "{text}");
}
