//! What a pool counts and records for those who watch it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use skyward_lite::client::activity::{Activity, Counts, MAX_RECORDS, RECORD_BYTES};
use skyward_lite::client::dispatch::{Action, Dispatch};
use skyward_lite::error::NodeError;
use skyward_lite::timing::Timing;
use skyward_lite::wire::{Attempt, BlobPart, Body, Content, Control, Event, Message, Outcome, slot_number};

#[path = "support/hello.rs"]
mod support;
use support::{agent_hello, client_hello};

struct Client {
    dispatch: Dispatch,
    now: Instant,
    out: Vec<Action>,
}

impl Client {
    /// A pool with nodes of so many slots.
    fn new(slots: &[usize]) -> Self {
        let mut client = Self { dispatch: Dispatch::new(3, Timing::DEFAULT), now: Instant::now(), out: Vec::new() };
        for (node, slots) in slots.iter().enumerate() {
            client.dispatch.add_node(format!("n{node}"), false, client.now);
            assert!(client.dispatch.begin(node, client.now));
            client.dispatch.greeted(node, &client_hello(*slots, false), agent_hello(), client.now);
            client.receive(node, Event::Control(Control::Ready { slots: *slots as u64 }));
        }
        client
    }

    fn receive(&mut self, node: usize, event: Event) {
        self.dispatch.received(node, &mut vec![event], self.now, &mut self.out).unwrap();
    }

    fn submit(&mut self, number: u64, calls: u32) {
        let task = Message { id: id(number), calls, name: 7, parts: vec![vec![0; 100].into()], ..Message::default() };
        self.dispatch.submit(task, None, std::thread::current().id(), self.now, &mut self.out);
    }

    fn end(&mut self, node: usize, number: u64, outcome: Outcome, calls: u32) {
        let (nanos, slot) = (2_000_000, slot_number(3, 1));
        let parts = vec![vec![0; 50].into()];
        let result = Message { id: id(number), code: outcome as u8, calls, nanos, slot, parts, ..Message::default() };
        self.receive(node, Event::Message(Body::Result, result));
    }

    fn counts(&self, node: usize) -> (u64, u64, u64) {
        let Counts { done, failed, rerun } = self.dispatch.activity().of_node(node);
        (done, failed, rerun)
    }
}

fn id(task: u64) -> Attempt {
    Attempt { task, attempt: 0 }
}

/// Calls are counted, and not tasks: those of a batch that have ended, with those that failed. Those of a batch whose
/// process died have all failed. A node cannot report more calls than the task has, and a task that was cancelled counts
/// nowhere.
#[test]
fn calls_are_counted() {
    let mut client = Client::new(&[4]);
    for number in 0..6 {
        client.submit(number, 10);
    }
    assert_eq!(client.dispatch.pending_calls(), 60);
    client.end(0, 0, Outcome::Returned, 10);
    assert_eq!((client.counts(0), client.dispatch.pending_calls()), ((10, 0, 0), 50));
    client.end(0, 1, Outcome::Raised, 3);
    assert_eq!((client.counts(0), client.dispatch.pending_calls()), ((13, 1, 0), 40));
    client.end(0, 2, Outcome::Partial, 4);
    assert_eq!((client.counts(0), client.dispatch.pending_calls()), ((17, 1, 0), 30));
    client.end(0, 3, Outcome::Crashed, 0);
    assert_eq!((client.counts(0), client.dispatch.pending_calls()), ((27, 11, 0), 20));
    client.end(0, 4, Outcome::Returned, 1_000_000);
    assert_eq!((client.counts(0), client.dispatch.pending_calls()), ((37, 11, 0), 10));
    client.dispatch.cancel(5, false, &mut client.out);
    client.end(0, 5, Outcome::Cancelled, 0);
    assert_eq!((client.counts(0), client.dispatch.pending_calls()), ((37, 11, 0), 0));
    assert_eq!(client.dispatch.activity().total(), Counts { done: 37, failed: 11, rerun: 0 });
    assert_eq!((client.dispatch.activity().payload_sent, client.dispatch.activity().payload_received), (600, 300));
}

/// Shared data counts for each node that it is sent to, and once there.
#[test]
fn payload_counts_what_is_sent() {
    let mut client = Client::new(&[1, 1]);
    let content = Arc::new(Content { id: 1, bytes: vec![0; 1000].into() });
    for number in 0..4 {
        let blob = BlobPart { place: 0, number: 0, fresh: number == 0, content: Some(Arc::clone(&content)) };
        let task = Message { id: id(number), blobs: vec![blob], parts: vec![vec![0; 10].into()], ..Message::default() };
        client.dispatch.submit(task, None, std::thread::current().id(), client.now, &mut client.out);
    }
    assert_eq!(client.dispatch.activity().payload_sent, 2 * 1000 + 4 * 10);
}

/// What ran on a node that is lost runs again; what waited there had not run. A task without any node has failed.
#[test]
fn losses_are_counted() {
    let mut client = Client::new(&[2, 2]);
    for number in 0..6 {
        client.submit(number, 5);
    }
    // Three tasks each, of which two run.
    assert_eq!(client.dispatch.load(0), (2, 1, 0));
    let lost = |client: &mut Client, node| {
        let end = Err(NodeError::Other("gone".to_owned()));
        client.dispatch.lost(node, end, client.now, &mut client.out);
    };
    lost(&mut client, 0);
    assert_eq!((client.counts(0), client.dispatch.pending_calls()), ((0, 0, 10), 30));
    lost(&mut client, 1);
    assert_eq!(client.dispatch.pending_calls(), 0);
    let total = client.dispatch.activity().total();
    assert_eq!((total.done, total.failed), (30, 30));
}

/// A task runs from its node's report on, until it ends or its node is lost. Reports of other tasks mean nothing.
#[test]
fn a_task_runs_once_its_node_reports_it() {
    let mut client = Client::new(&[1, 1]);
    client.submit(0, 1);
    client.submit(1, 1);
    let report = |client: &mut Client, node| {
        client.receive(node, Event::Control(Control::Running(vec![id(0), id(99), Attempt { task: 0, attempt: 9 }])));
    };
    assert!(!client.dispatch.is_running(0));
    report(&mut client, 1);
    assert!(!client.dispatch.is_running(0), "another node has it");
    report(&mut client, 0);
    assert!(client.dispatch.is_running(0) && !client.dispatch.is_running(1) && !client.dispatch.is_running(99));
    client.dispatch.lost(0, Err(NodeError::Other("gone".to_owned())), client.now, &mut client.out);
    assert!(!client.dispatch.is_running(0));
}

/// A record has all of an attempt, and its start is its end less its duration. The newest are kept, and numbers go on.
#[test]
fn attempts_are_recorded() {
    let mut client = Client::new(&[1]);
    client.submit(0, 10);
    client.now += Duration::from_millis(5);
    client.end(0, 0, Outcome::Raised, 3);
    let (first, records) = client.dispatch.activity().records(0);
    let mut packed = Vec::new();
    records.for_each(|record| record.put(&mut packed));
    assert_eq!((first, packed.len()), (0, RECORD_BYTES));
    let mut expected = Vec::new();
    expected.extend([3_000_000_u64, 2_000_000, 100, 50].into_iter().flat_map(u64::to_le_bytes));
    expected.extend([3_u32, 7, slot_number(3, 1)].into_iter().flat_map(u32::to_le_bytes));
    expected.extend([0, 0, Outcome::Raised as u8, 0]);
    assert_eq!(packed, expected);

    let mut activity = Activity::default();
    activity.add_node(client.now);
    for number in 0..MAX_RECORDS as u64 + 10 {
        let task = Message { id: id(number), calls: 1, ..Message::default() };
        activity.ended(0, &task, &task, client.now);
    }
    for (after, expected) in
        [(0, (10, MAX_RECORDS)), (15, (15, MAX_RECORDS - 5)), (u64::MAX, (MAX_RECORDS as u64 + 10, 0))]
    {
        let (first, records) = activity.records(after);
        assert_eq!((first, records.len()), expected);
    }
    assert_eq!(activity.of_node(0).done, MAX_RECORDS as u64 + 10);
}
