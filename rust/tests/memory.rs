//! Frames from a node are bounded at the client before they are stored. Each flood comes from a scripted node behind
//! the embedded server. Its client is a process of its own, whose peak memory is compared with its memory before the
//! flood.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![allow(clippy::cast_possible_truncation)]

use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use skyward_lite::client::pool::{NodeState, Pool};
use skyward_lite::timing::MAX_MESSAGE;
use skyward_lite::wire::{Attempt, Control, Message, Outcome};

#[path = "support/hello.rs"]
mod hello;
#[path = "support/hostile.rs"]
mod hostile;
use hostile::{
    ACKNOWLEDGE, FIRST, HEARTBEAT, LAST, NOTE, OUTPUT, Opening, READY, RESULT, Script, TASK, add_hostile, frame, full,
    head,
};

/// Bound on everything here.
const BOUND: Duration = Duration::from_secs(60);
/// Memory that a flood may cost, in KiB: a channel's window of 16 MiB, credit for results or notes, and a batch of
/// events.
const MAX_GROWTH_KIB: usize = 64 * 1024;
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
            let body: &[u8] = if kind == HEARTBEAT { &[0; 16] } else { &[] };
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
        ("tasks", "a task or an answer from a node"),
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
    pool.submit(Message { id: Attempt { task, attempt: 0 }, ..Message::default() }, Some(0));
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
