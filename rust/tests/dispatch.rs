//! What the client decides: events in, actions out, in tables. Without a socket, a thread or a clock.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use bytes::Bytes;
use skyward_lite::client::completions::{Completions, QUEUE_SHIFT};
use skyward_lite::client::dispatch::{Action, Dispatch};
use skyward_lite::client::node::NodeState;
use skyward_lite::client::wakeups::{MAX_BATCH_PAUSE, MAX_BATCHED, Wakeups};
use skyward_lite::error::{NodeError, SessionError};
use skyward_lite::queue::{Cancelled, PeerId};
use skyward_lite::timing::{CREDIT, NOTE_CREDIT, Timing};
use skyward_lite::wire::{AgentHello, Attempt, Body, Control, Event, Message, Offer, Outcome};

#[path = "support/hello.rs"]
mod support;
use support::{agent_hello, client_hello};

use Step::{
    Abort, Again, Away, Back, Cancel, CancelAndWait, Close, Connect, Crashed, Drain, Dropped, Expect, GiveUp,
    GivenBack, Join, JoinReturning, Lost, Ready, Refused, Returned, Submit, SubmitTo, Tick,
};

/// What happens. A node's answers are about the attempt that it was sent last.
#[derive(Debug, Clone, Copy)]
enum Step {
    Submit(u64),
    SubmitTo(PeerId, u64),
    Cancel(u64),
    CancelAndWait(u64),
    Abort(u64),
    /// A node is added and greets, which may have so many slots.
    Connect(usize),
    /// The node's workers take tasks: so many at once.
    Ready(PeerId, usize),
    /// The two steps before for one node.
    Join(usize),
    GivenBack(PeerId, u64),
    Refused(PeerId, u64),
    Returned(PeerId, u64),
    Crashed(PeerId, u64),
    /// The node ended the task because it was cancelled or aborted.
    Dropped(PeerId, u64),
    Drain(PeerId),
    Lost(PeerId),
    /// A node joins that will come back when it is lost; it does so, with so many slots; it will not.
    JoinReturning(usize),
    Again(PeerId, usize),
    GiveUp(PeerId),
    /// The connection to the node is lost; the session goes on.
    Away(PeerId),
    Back(PeerId),
    Expect(usize),
    Tick,
    Close,
}

struct Client {
    dispatch: Dispatch,
    /// When the first nodes greeted.
    start: Instant,
    now: Instant,
    /// The latest attempt at each task that each node was sent.
    sent: BTreeMap<(PeerId, u64), Attempt>,
}

impl Client {
    /// Nodes of so many slots, and two attempts for each task.
    fn new(slots: &[usize]) -> Self {
        let dispatch = Dispatch::new(2, Timing::DEFAULT);
        let start = Instant::now();
        let mut client = Self { dispatch, start, now: start, sent: BTreeMap::new() };
        for slots in slots {
            client.step(Join(*slots));
        }
        client
    }

    fn received(&mut self, from: PeerId, events: Vec<Event>) -> (String, Result<(), SessionError>) {
        let (mut events, mut out) = (events, Vec::new());
        let end = self.dispatch.received(from, &mut events, self.now, &mut out);
        assert!(events.is_empty());
        (self.show(out), end)
    }

    fn step(&mut self, step: Step) -> String {
        let (now, mut out) = (self.now, Vec::new());
        let Self { dispatch, sent, .. } = self;
        let attempt = |node, task| sent.get(&(node, task)).copied().unwrap_or(Attempt { task, attempt: 0 });
        let result = |node, task, code| Event::Message(Body::Result, message(attempt(node, task), code));
        let from = match step {
            Submit(task) => {
                dispatch.submit(message(first(task), Outcome::Returned), None, thread(), now, &mut out);
                None
            }
            SubmitTo(node, task) => {
                dispatch.submit(message(first(task), Outcome::Returned), Some(node), thread(), now, &mut out);
                None
            }
            Cancel(task) | CancelAndWait(task) => {
                dispatch.cancel(task, matches!(step, CancelAndWait(_)), &mut out);
                None
            }
            Abort(task) => {
                dispatch.abort(task, &mut out);
                None
            }
            Connect(slots) | Join(slots) | JoinReturning(slots) => {
                let returns = matches!(step, JoinReturning(_));
                let node = dispatch.add_node(format!("n{}", dispatch.nodes().count()), returns, now);
                assert!(dispatch.begin(node, now));
                dispatch.greeted(node, &client_hello(slots, true), agent_hello(), now);
                let ready = Event::Control(Control::Ready { slots: slots as u64 });
                (!matches!(step, Connect(_))).then_some((node, ready))
            }
            Again(node, slots) => {
                assert!(dispatch.begin(node, now));
                dispatch.greeted(node, &client_hello(slots, true), agent_hello(), now);
                Some((node, Event::Control(Control::Ready { slots: slots as u64 })))
            }
            Away(node) => {
                dispatch.away(node, &SessionError::Silent(10), now, &mut out);
                None
            }
            Back(node) => {
                dispatch.back(node, now, &mut out);
                None
            }
            GiveUp(node) => {
                dispatch.give_up(node, now, &mut out);
                None
            }
            Ready(node, slots) => Some((node, Event::Control(Control::Ready { slots: slots as u64 }))),
            GivenBack(node, task) => Some((node, Event::Control(Control::GivenBack(attempt(node, task))))),
            Refused(node, task) => Some((node, Event::Control(Control::RecallRefused(attempt(node, task))))),
            Returned(node, task) => Some((node, result(node, task, Outcome::Returned))),
            Crashed(node, task) => Some((node, result(node, task, Outcome::Crashed))),
            Dropped(node, task) => Some((node, result(node, task, Outcome::Cancelled))),
            Drain(node) => Some((node, Event::Control(Control::Drain("spot notice".into())))),
            Lost(node) => {
                dispatch.lost(node, Err(NodeError::Other("no power".to_owned())), now, &mut out);
                None
            }
            Expect(count) => {
                dispatch.expect(count, now, &mut out);
                None
            }
            Tick => {
                dispatch.tick([], now, &mut out);
                None
            }
            Close => {
                dispatch.close(now, &mut out);
                None
            }
        };
        if let Some((node, event)) = from {
            dispatch.received(node, &mut vec![event], now, &mut out).unwrap();
        }
        assert!(dispatch.is_consistent(), "after {step:?}: {dispatch:?}");
        self.show(out)
    }

    /// Take the steps, and compare the actions that come of each.
    fn check(&mut self, table: &[(Step, &str)]) {
        for (number, (step, actions)) in table.iter().enumerate() {
            assert_eq!(self.step(*step), *actions, "of step {number}, {step:?}");
        }
    }

    /// Send a heartbeat to a node from which so many bytes of results have come. Return its number.
    fn beat(&mut self, node: PeerId, results: u64) -> Result<u64, SessionError> {
        let mut out = Vec::new();
        self.dispatch.beat(node, false, results, self.now, &mut out)?;
        let nonce = u64::try_from((self.now - self.start).as_micros()).unwrap();
        let heartbeat = Control::Heartbeat { nonce, lease_ms: 60_000, echo: 0 };
        assert_eq!(out, [Action::Tell(node, heartbeat), Action::Wake(node)]);
        Ok(nonce)
    }

    /// Send a node so many heartbeats, of which it answers each after `rtt`.
    fn beats(&mut self, node: PeerId, count: u32, rtt: Duration) -> Result<(), SessionError> {
        for _ in 0..count {
            self.now += Timing::DEFAULT.heartbeat;
            let nonce = self.beat(node, 0)?;
            self.now += rtt;
            self.received(node, vec![Event::Control(Control::Pulse { nonce })]).1?;
        }
        Ok(())
    }

    /// Submit and end so many tasks, `pause` after one another.
    fn run(&mut self, tasks: u64, pause: Duration) {
        for task in 1..=tasks {
            self.step(Submit(task));
            self.now += pause;
            self.step(Returned(0, task));
        }
    }

    fn show(&mut self, out: Vec<Action>) -> String {
        let shown: Vec<_> = out.into_iter().map(|action| self.show_action(action)).collect();
        shown.join(", ")
    }

    fn show_action(&mut self, action: Action) -> String {
        match action {
            Action::Send(node, task) => {
                self.sent.insert((node, task.id.task), task.id);
                format!("send {} to {node}", name(task.id))
            }
            Action::SendBlob(node, number, bytes) => format!("blob {number} of {} to {node}", bytes.len()),
            Action::Forget(node, blobs) => format!("forget {blobs:?} at {node}"),
            Action::Tell(node, Control::Recall(id)) => format!("recall {} from {node}", name(id)),
            Action::Tell(node, Control::Cancel(id)) => format!("cancel {} at {node}", name(id)),
            Action::Tell(node, Control::Abort(id)) => format!("abort {} at {node}", name(id)),
            Action::Tell(node, other) => format!("tell {node} {other:?}"),
            Action::Acknowledge(node, id) => format!("acknowledge {} to {node}", name(id)),
            Action::Goodbye(node, _) => format!("leave {node}"),
            Action::Wake(node) => format!("wake {node}"),
            Action::Complete(from, end) => {
                let how = match Outcome::of(end.code) {
                    Some(Outcome::Returned) => "returned",
                    Some(Outcome::Cancelled) => "cancelled",
                    Some(Outcome::Crashed) => "crashed",
                    Some(Outcome::NodeLost) => "node lost",
                    _ => "otherwise",
                };
                let from = from.map(|node| format!(" by {node}")).unwrap_or_default();
                format!("{} ends: {how}{from}", name(end.id))
            }
            Action::Answer(node, answer) => format!("answer {} at {node}", answer.id.task),
            Action::Note(from, note) => format!("note {} from {from}", note.id.task),
            Action::Print(node, ..) => format!("print of {node}"),
            Action::Notify => "notify".to_owned(),
        }
    }
}

fn first(task: u64) -> Attempt {
    Attempt { task, attempt: 0 }
}

/// "7" for the first attempt at task 7, "7.1" for the second one.
fn name(id: Attempt) -> String {
    if id.attempt == 0 { id.task.to_string() } else { format!("{}.{}", id.task, id.attempt) }
}

fn message(id: Attempt, code: Outcome) -> Message {
    Message { id, code: code as u8, ..Message::default() }
}

fn thread() -> ThreadId {
    std::thread::current().id()
}

/// A task goes to the least loaded node; with every slot and its prefetch filled it waits for the next result.
#[test]
fn tasks_go_to_the_least_loaded_node() {
    Client::new(&[1, 1]).check(&[
        (Submit(1), "send 1 to 0, wake 0"),
        (Submit(2), "send 2 to 1, wake 1"),
        (Submit(3), "send 3 to 0, wake 0"),
        (Submit(4), "send 4 to 1, wake 1"),
        (Submit(5), ""),
        (Returned(1, 2), "2 ends: returned by 1, send 5 to 1, wake 1"),
        (Returned(0, 1), "1 ends: returned by 0"),
    ]);
}

/// Tasks that are submitted before a node is there wait for it.
#[test]
fn tasks_wait_for_the_first_node() {
    Client::new(&[]).check(&[(Submit(1), ""), (Expect(0), ""), (Join(1), "send 1 to 0, wake 0, notify")]);
}

/// An idle node is given what a loaded one has not started, whatever else is asked about the task meanwhile.
#[test]
fn a_recall_meets_whatever_else_happens_to_the_task() {
    let races: &[&[(Step, &str)]] = &[
        &[(GivenBack(0, 2), "send 2 to 1, wake 1"), (Returned(1, 2), "2 ends: returned by 1")],
        &[(Refused(0, 2), ""), (Returned(0, 2), "2 ends: returned by 0")],
        &[(Returned(0, 2), "2 ends: returned by 0"), (Refused(0, 2), "")],
        &[(Crashed(0, 2), "2 ends: crashed by 0"), (Refused(0, 2), "")],
        &[(Cancel(2), "cancel 2 at 0, wake 0"), (GivenBack(0, 2), "2 ends: cancelled")],
        &[(Cancel(2), "cancel 2 at 0, wake 0"), (Dropped(0, 2), "2 ends: cancelled by 0"), (Refused(0, 2), "")],
        &[
            (Cancel(2), "cancel 2 at 0, wake 0"),
            (Refused(0, 2), ""),
            (Refused(0, 2), ""),
            (Returned(0, 2), "2 ends: returned by 0"),
        ],
        &[(CancelAndWait(2), "cancel 2 at 0, wake 0"), (GivenBack(0, 2), "notify")],
        &[(CancelAndWait(2), "cancel 2 at 0, wake 0"), (Dropped(0, 2), "acknowledge 2 to 0, wake 0, notify")],
        &[(Abort(2), "abort 2 at 0, wake 0"), (GivenBack(0, 2), "2 ends: cancelled")],
        &[(Abort(2), "abort 2 at 0, wake 0"), (Refused(0, 2), ""), (Dropped(0, 2), "2 ends: cancelled by 0")],
        &[(Abort(2), "abort 2 at 0, wake 0"), (Returned(0, 2), "2 ends: returned by 0"), (Refused(0, 2), "")],
        &[
            (Cancel(2), "cancel 2 at 0, wake 0"),
            (Abort(2), "abort 2 at 0, wake 0"),
            (Lost(0), "leave 0, 2.1 ends: cancelled, send 1.1 to 1, wake 0, wake 1, notify"),
        ],
        &[(Lost(0), "leave 0, send 1.1 to 1, send 2.1 to 1, wake 0, wake 1, notify")],
        &[
            (GivenBack(0, 2), "send 2 to 1, wake 1"),
            (Lost(0), "leave 0, send 1.1 to 1, wake 0, wake 1, notify"),
            (Returned(1, 2), "2 ends: returned by 1"),
        ],
    ];
    for race in races {
        let mut client = Client::new(&[1]);
        client.check(&[
            (Submit(1), "send 1 to 0, wake 0"),
            (Submit(2), "send 2 to 0, wake 0"),
            (Join(1), "recall 2 from 0, wake 0, notify"),
        ]);
        client.check(race);
    }
}

/// A task that waits is dropped at once, and one that has ended is not.
#[test]
fn a_task_that_waits_is_cancelled_at_once() {
    let mut client = Client::new(&[1]);
    for task in 1..=4 {
        client.step(Submit(task));
    }
    let mut out = Vec::new();
    assert_eq!(client.dispatch.cancel(3, true, &mut out), Cancelled::Dropped);
    assert!(!client.dispatch.cancel_answer(3));
    client.check(&[(Abort(4), "4 ends: cancelled"), (Returned(0, 1), "1 ends: returned by 0")]);
    assert_eq!(client.dispatch.cancel(1, true, &mut out), Cancelled::Unknown);
    assert_eq!(out, []);
    client.check(&[(Abort(1), "")]);
}

/// The caller who waits in a cancel hears whether the task was dropped, and then nobody else does.
#[test]
fn a_cancel_that_is_waited_for_is_answered() {
    for (answer, actions, dropped) in [
        (Dropped(0, 1), "acknowledge 1 to 0, wake 0, notify", true),
        (Refused(0, 1), "notify", false),
        (Returned(0, 1), "1 ends: returned by 0, notify", false),
        (Lost(0), "leave 0, wake 0, notify", true),
    ] {
        let mut client = Client::new(&[1]);
        client.step(Submit(1));
        client.step(CancelAndWait(1));
        assert!(client.dispatch.is_cancel_pending(1));
        client.check(&[(answer, actions)]);
        assert!(!client.dispatch.is_cancel_pending(1), "{answer:?}");
        assert_eq!(client.dispatch.cancel_answer(1), dropped, "{answer:?}");
    }
    // When nobody waits any more, the task ends as every other.
    let mut client = Client::new(&[1]);
    client.step(Submit(1));
    client.step(CancelAndWait(1));
    assert!(!client.dispatch.cancel_answer(1));
    client.check(&[(Dropped(0, 1), "1 ends: cancelled by 0")]);
}

/// What a draining node has not started runs elsewhere, a crash there is not held against the task, and neither is the loss.
#[test]
fn a_draining_node_is_emptied() {
    let mut client = Client::new(&[2, 2]);
    for task in 1..=4 {
        client.step(Submit(task));
    }
    client.check(&[
        (SubmitTo(0, 5), "send 5 to 0, wake 0"),
        (Drain(0), "recall 3 from 0, recall 1 from 0, wake 0, notify"),
        (Refused(0, 1), ""),
        (GivenBack(0, 3), "send 3 to 1, wake 1"),
        (Submit(6), "send 6 to 1, wake 1"),
        // Perhaps the task had not arrived when it was asked for.
        (Tick, "recall 1 from 0, wake 0"),
        (Tick, ""),
        (Returned(1, 2), "2 ends: returned by 1"),
        (Crashed(0, 1), "acknowledge 1 to 0, send 1 to 1, wake 0, wake 1"),
        (SubmitTo(0, 7), "send 7 to 0, wake 0"),
        (Lost(0), "leave 0, 7 ends: node lost, 5 ends: node lost, wake 0, notify"),
        (SubmitTo(0, 8), "8 ends: node lost"),
    ]);
    let lost = &client.dispatch.node(0).unwrap().state;
    assert_eq!(lost, &NodeState::Lost("no power (it was draining: spot notice)".to_owned()));
    let mut client = Client::new(&[1, 1]);
    client.step(Submit(1));
    client.step(Drain(0));
    client.check(&[(Lost(0), "leave 0, send 1 to 1, wake 0, wake 1, notify")]);
}

/// A draining node that has no task left is left, once, and takes no task from then on.
#[test]
fn a_drained_node_is_left() {
    let mut client = Client::new(&[1, 1]);
    client.check(&[
        (SubmitTo(0, 1), "send 1 to 0, wake 0"),
        (Drain(0), "notify"),
        (Tick, ""),
        (Returned(0, 1), "1 ends: returned by 0"),
        (Tick, "leave 0, wake 0"),
        (Tick, ""),
        (SubmitTo(0, 2), "2 ends: node lost"),
        (Lost(0), "leave 0, wake 0, notify"),
        (Submit(3), "send 3 to 1, wake 1"),
    ]);
    let lost = &client.dispatch.node(0).unwrap().state;
    assert_eq!(lost, &NodeState::Lost("it has done its last task: spot notice".to_owned()));
    // Also one whose workers never took tasks.
    Client::new(&[]).check(&[
        (Connect(1), ""),
        (Drain(0), "notify"),
        (Tick, "leave 0, wake 0"),
        (Ready(0, 1), "notify"),
        (SubmitTo(0, 1), "1 ends: node lost"),
    ]);
}

/// Tasks wait for the node that replaces a draining one, but not for ever.
#[test]
fn a_replacement_is_waited_for() {
    let mut client = Client::new(&[1]);
    client.check(&[(Drain(0), "notify"), (Submit(1), "")]);
    let begin = client.now;
    client.now = begin + Timing::DEFAULT.replacement.mul_f64(0.99);
    client.check(&[(Tick, "leave 0, wake 0"), (Tick, "")]);
    client.now = begin + Timing::DEFAULT.replacement;
    client.check(&[(Tick, "1 ends: node lost"), (Submit(2), "2 ends: node lost")]);
    client.check(&[(Join(1), "notify"), (Submit(3), "send 3 to 1, wake 1")]);
}

/// A node whose connection is lost keeps its tasks and gets no others; it takes requests, which reach it later. When it is back all
/// goes on. Tasks wait for it, if it is the only one.
#[test]
fn an_absent_node_keeps_its_tasks() {
    let mut client = Client::new(&[1, 1]);
    client.check(&[
        (Submit(1), "send 1 to 0, wake 0"),
        (Submit(2), "send 2 to 1, wake 1"),
        (Submit(3), "send 3 to 0, wake 0"),
        (Away(0), "notify"),
        (Submit(4), "send 4 to 1, wake 1"),
        (Submit(5), ""),
        (SubmitTo(0, 6), "send 6 to 0, wake 0"),
        (Cancel(3), "cancel 3 at 0, wake 0"),
        (Returned(1, 2), "2 ends: returned by 1, send 5 to 1, wake 1"),
        (Returned(1, 4), "4 ends: returned by 1"),
        // The other one is idle but for one task, and steals nothing from a node that does not hear it.
        (Returned(1, 5), "5 ends: returned by 1"),
        (Tick, ""),
        (Away(1), "notify"),
        (Submit(7), ""),
        (Tick, ""),
    ]);
    let named = |client: &Client, node| client.dispatch.node(node).unwrap().state.name();
    assert_eq!(named(&client, 0), "reconnecting");
    client.check(&[(Back(0), "notify")]);
    assert_eq!(named(&client, 0), "ready");
    client.check(&[
        (Returned(0, 1), "1 ends: returned by 0"),
        (Dropped(0, 3), "3 ends: cancelled by 0, send 7 to 0, wake 0"),
        (Lost(1), "leave 1, wake 1, notify"),
    ]);
    // A node that will soon be gone still will when it is back; its loss while it is away is not held against its tasks.
    let mut client = Client::new(&[1]);
    client.check(&[
        (Submit(1), "send 1 to 0, wake 0"),
        (Drain(0), "recall 1 from 0, wake 0, notify"),
        (Away(0), "notify"),
    ]);
    client.check(&[(Back(0), "notify")]);
    assert_eq!(named(&client, 0), "draining");
    client.check(&[
        (Away(0), "notify"),
        (Join(1), "notify"),
        (Lost(0), "leave 0, send 1 to 1, wake 0, wake 1, notify"),
    ]);
}

/// A node is given up no earlier than its lease and the grace after its last heartbeat came. What it sent otherwise tells nothing
/// of its lease, nor does a heartbeat that is older than the last one.
#[test]
fn a_lease_counts_from_the_heartbeat_that_was_heard() {
    let mut client = Client::new(&[1]);
    let lease = Duration::from_secs(60) + Timing::DEFAULT.lease_grace;
    assert_eq!(client.dispatch.lease(0, client.now), (client.start + lease, 0));
    let stamp = |nonce| vec![Event::Control(Control::Heartbeat { nonce, lease_ms: 0, echo: 0 })];
    client.now += Duration::from_secs(7);
    client.received(0, stamp(5_000_000)).1.unwrap();
    let heard = client.now;
    client.now += Duration::from_secs(2);
    client.received(0, stamp(4_000_000)).1.unwrap();
    client.received(0, vec![Event::Control(Control::Output { stream: 1, text: Bytes::from_static(b"x") })]).1.unwrap();
    assert_eq!(client.dispatch.lease(0, client.now), (heard + lease, 2));
    let mut out = Vec::new();
    client.dispatch.beat(0, false, 0, client.now, &mut out).unwrap();
    let echoes = |action: &Action| matches!(action, Action::Tell(0, Control::Heartbeat { echo: 5_000_000, .. }));
    assert!(out.iter().any(echoes), "{out:?}");
}

/// Tasks wait for a lost node that will come back, for as long as nodes have to start; also while it fails to. Its record begins
/// anew, and what is left of its last session means nothing in this one.
#[test]
fn a_lost_node_comes_back() {
    let mut client = Client::new(&[]);
    client.check(&[
        (JoinReturning(1), "notify"),
        (Submit(1), "send 1 to 0, wake 0"),
        (Lost(0), "leave 0, wake 0, notify"),
        (Submit(2), ""),
    ]);
    let begun = client.now;
    client.now = begun + Timing::DEFAULT.replacement.mul_f64(0.5);
    // It comes, and is gone before its workers are ready.
    assert!(client.dispatch.begin(0, client.now));
    client.check(&[(Lost(0), "leave 0, wake 0, notify")]);
    client.now = begun + Timing::DEFAULT.replacement.mul_f64(0.99);
    client.check(&[(Tick, ""), (Again(0, 1), "send 1.1 to 0, send 2 to 0, wake 0, notify")]);
    client.check(&[(Returned(0, 1), "1.1 ends: returned by 0"), (Lost(0), "leave 0, wake 0, notify")]);
    client.now += Timing::DEFAULT.replacement;
    client.check(&[(Tick, "2.1 ends: node lost"), (Submit(3), "3 ends: node lost")]);
    client.check(&[(Again(0, 1), "notify"), (Submit(4), "send 4 to 0, wake 0"), (Lost(0), "leave 0, wake 0, notify")]);
    client.check(&[(GiveUp(0), "4.1 ends: node lost")]);
    assert!(!client.dispatch.begin(0, client.now));

    // A node that never was ready is not waited for, unless its connection was cut.
    let mut client = Client::new(&[]);
    for (end, waits) in [
        (NodeError::Other("no Python".to_owned()), false),
        (SessionError::Ended(String::new()).into(), true),
        (SessionError::Goodbye("no".to_owned()).into(), false),
    ] {
        let node = client.dispatch.add_node("n".to_owned(), true, client.now);
        client.dispatch.begin(node, client.now);
        client.dispatch.lost(node, Err(end), client.now, &mut Vec::new());
        assert_eq!(client.dispatch.node(node).unwrap().returns, waits);
    }
}

/// The answer to a note of a session that is over does not reach the node's next one.
#[test]
fn an_answer_goes_to_the_session_of_its_note() {
    let mut client = Client::new(&[]);
    client.step(JoinReturning(1));
    let note = || Event::Message(Body::Note, message(first(9), Outcome::Returned));
    let sender = |client: &mut Client| {
        let (mut events, mut out) = (vec![note()], Vec::new());
        client.dispatch.received(0, &mut events, client.now, &mut out).unwrap();
        out.into_iter().find_map(|action| if let Action::Note(from, _) = action { Some(from) } else { None }).unwrap()
    };
    let before = sender(&mut client);
    client.step(Lost(0));
    client.step(Again(0, 1));
    let after = sender(&mut client);
    let mut out = Vec::new();
    client.dispatch.answer_note(before, 9, Bytes::new(), &mut out);
    assert_eq!(out, []);
    client.dispatch.answer_note(after, 9, Bytes::new(), &mut out);
    assert_eq!(out.len(), 2, "{out:?}");
}

/// A task is tried again on another node when its node is lost, as often as it has attempts.
#[test]
fn a_lost_node_costs_an_attempt() {
    Client::new(&[1, 1]).check(&[
        (Submit(1), "send 1 to 0, wake 0"),
        (Lost(0), "leave 0, send 1.1 to 1, wake 0, wake 1, notify"),
        (Lost(1), "leave 1, 1.1 ends: node lost, wake 1, notify"),
        (Submit(2), "2 ends: node lost"),
    ]);
    // A task that is for one node alone is not tried elsewhere, and one that waited has lost nothing.
    Client::new(&[1, 1]).check(&[
        (SubmitTo(0, 1), "send 1 to 0, wake 0"),
        (Lost(0), "leave 0, 1 ends: node lost, wake 0, notify"),
        (SubmitTo(0, 2), "2 ends: node lost"),
        (SubmitTo(7, 3), "3 ends: node lost"),
    ]);
}

/// A task for one node alone is sent there however loaded the node is, and is not recalled.
#[test]
fn a_pinned_task_stays_where_it_is() {
    Client::new(&[1]).check(&[
        (SubmitTo(0, 1), "send 1 to 0, wake 0"),
        (SubmitTo(0, 2), "send 2 to 0, wake 0"),
        (SubmitTo(0, 3), "send 3 to 0, wake 0"),
        (Join(1), "notify"),
        (Drain(0), "notify"),
        (Returned(0, 3), "3 ends: returned by 0"),
    ]);
}

/// Answers that come late or twice are acknowledged, counted, and end nothing.
#[test]
fn late_and_doubled_results_are_stale() {
    let mut client = Client::new(&[1, 1]);
    client.check(&[
        (Submit(1), "send 1 to 0, wake 0"),
        (Returned(0, 1), "1 ends: returned by 0"),
        (Returned(0, 1), "acknowledge 1 to 0, wake 0"),
        (Crashed(1, 1), "acknowledge 1 to 1, wake 1"),
        (Submit(2), "send 2 to 0, wake 0"),
        (Lost(0), "leave 0, send 2.1 to 1, wake 0, wake 1, notify"),
    ]);
    let earlier = vec![Event::Message(Body::Result, message(first(2), Outcome::Returned))];
    assert_eq!(client.received(1, earlier).0, "acknowledge 2 to 1, wake 1");
    let skipped = vec![Event::Skipped(Body::Result, first(2)), Event::NoMemory(Body::Result, first(2), 1)];
    assert_eq!(client.received(1, skipped).0, "acknowledge 2 to 1, acknowledge 2 to 1, wake 1");
    assert_eq!(client.dispatch.counts(), (1, 5));
    client.check(&[(Returned(1, 2), "2.1 ends: returned by 1")]);
}

/// A task whose result has no room in this process's memory has ended all the same.
#[test]
fn a_result_without_memory_ends_its_task() {
    let mut client = Client::new(&[1]);
    client.step(Submit(1));
    let event = Event::NoMemory(Body::Result, first(1), 1 << 40);
    assert_eq!(client.received(0, vec![event]).0, "1 ends: crashed by 0");
}

/// While nodes are on their way tasks wait for them, and end with the last one that does not come.
#[test]
fn tasks_wait_while_nodes_are_expected() {
    Client::new(&[1]).check(&[
        (Expect(2), ""),
        (Submit(1), "send 1 to 0, wake 0"),
        (Lost(0), "leave 0, wake 0, notify"),
        (Submit(2), ""),
        (Expect(1), ""),
        (Expect(0), "1.1 ends: node lost, 2 ends: node lost"),
    ]);
}

/// A pool that is closed leaves its nodes and cancels its tasks; what comes afterwards ends at once.
#[test]
fn closing_ends_every_task() {
    let mut client = Client::new(&[1]);
    for task in 1..=3 {
        client.step(Submit(task));
    }
    let unconnected = client.dispatch.add_node("late".to_owned(), false, Instant::now());
    let mut ends: Vec<_> = client.step(Close).split(", ").map(str::to_owned).collect();
    ends.sort();
    let cancelled = ["1 ends: cancelled", "2 ends: cancelled", "3 ends: cancelled"];
    assert_eq!(ends, [&cancelled[..], &["leave 0", "leave 1", "wake 0", "wake 1"]].concat());
    assert_eq!(client.dispatch.node(unconnected).unwrap().state, NodeState::Closed);
    assert!(!client.dispatch.begin(unconnected, Instant::now()));
    client.check(&[
        (Submit(4), "4 ends: node lost"),
        (SubmitTo(0, 5), "5 ends: node lost"),
        (Returned(0, 1), "acknowledge 1 to 0, wake 0"),
        (Close, "leave 0, wake 0, leave 1, wake 1"),
        (Lost(0), "leave 0, wake 0, notify"),
    ]);
    assert_eq!(client.dispatch.node(0).unwrap().state, NodeState::Closed);
    let added = client.dispatch.add_node("later".to_owned(), false, Instant::now());
    assert_eq!(client.dispatch.node(added).unwrap().state, NodeState::Closed);
}

/// What the caller took is acknowledged with the next wake-up, what nobody takes with the next tick.
#[test]
fn results_are_acknowledged_when_they_are_taken() {
    let mut client = Client::new(&[1]);
    client.check(&[
        (Submit(1), "send 1 to 0, wake 0"),
        (Submit(2), "send 2 to 0, wake 0"),
        (Returned(0, 1), "1 ends: returned by 0"),
        (Returned(0, 2), "2 ends: returned by 0"),
    ]);
    let mut out = Vec::new();
    client.dispatch.taken(0, thread(), [(0, first(1))], client.now, &mut out);
    assert_eq!(client.show(out), "acknowledge 1 to 0");
    let mut out = Vec::new();
    client.dispatch.wake(&mut out);
    client.dispatch.wake(&mut out);
    assert_eq!(client.show(out), "wake 0");
    let mut out = Vec::new();
    client.dispatch.tick([(0, first(2))], client.now, &mut out);
    assert_eq!(client.show(out), "acknowledge 2 to 0, wake 0");
}

/// The thread that takes a queue's tasks submits several before the sender is woken; others wake it each time.
#[test]
fn wake_ups_are_batched() {
    const QUEUE: u64 = 3;
    let other = std::thread::spawn(thread).join().unwrap();
    let start = Instant::now();
    let soon = |n: u32| start + Duration::from_micros(10) * n;
    let mut wakeups = Wakeups::default();
    assert!(!wakeups.may_batch(QUEUE, thread(), 1000, soon(0)), "nobody takes from the queue");
    wakeups.taken(QUEUE, thread(), soon(0));
    let batched = |wakeups: &mut Wakeups, unfinished| {
        let batch = (1..=100).take_while(|n| wakeups.may_batch(QUEUE, thread(), unfinished, soon(*n))).count();
        assert_eq!(wakeups.take().count(), 0);
        batch + 1
    };
    assert_eq!(batched(&mut wakeups, 100), 20);
    assert_eq!(batched(&mut wakeups, 4), 1);
    assert_eq!(batched(&mut wakeups, 1_000_000), MAX_BATCHED);
    assert!(wakeups.may_batch(QUEUE, thread(), 100, soon(50)));
    assert!(!wakeups.may_batch(QUEUE, other, 100, soon(51)), "another thread does not come back for more");
    assert!(!wakeups.may_batch(QUEUE + 1, thread(), 100, soon(51)), "this thread does not take from that queue");
    assert!(!wakeups.may_batch(QUEUE, thread(), 100, soon(50) + MAX_BATCH_PAUSE), "the caller is slow");
    wakeups.close_queue(QUEUE);
    assert!(!wakeups.may_batch(QUEUE, thread(), 100, soon(80)));
}

/// A batch of submits leaves with one wake-up.
#[test]
fn a_batch_is_sent_together() {
    let mut client = Client::new(&[64]);
    for task in 1..=50 {
        client.step(Submit(task));
    }
    client.dispatch.taken(0, thread(), [], client.now, &mut Vec::new());
    for task in 51..=59 {
        assert_eq!(client.step(Submit(task)), format!("send {task} to 0"));
    }
    assert_eq!(client.step(Submit(60)), "send 60 to 0");
    assert_eq!(client.step(Submit(61)), "send 61 to 0");
    assert_eq!(client.step(Submit(62)), "send 62 to 0, wake 0", "12 are a fifth of 62");
}

/// A node that sends what it may not send is lost; what it sent before counts, what it sent afterwards does not.
#[test]
fn what_a_node_may_not_send_ends_its_session() {
    let control = Event::Control;
    let wrong = [
        control(Control::GivenBack(first(1))),
        control(Control::RecallRefused(first(1))),
        control(Control::Ready { slots: 1 }),
        control(Control::Pulse { nonce: 7 }),
        control(Control::Goodbye("bye".into())),
        control(Control::Recall(first(1))),
        Event::Message(Body::Task, message(first(9), Outcome::Returned)),
        Event::Message(Body::Result, message(first(2), Outcome::Cancelled)),
        Event::Message(Body::Result, message(first(2), Outcome::NodeLost)),
        Event::Message(Body::Result, message(first(2), Outcome::TimedOut)),
    ];
    for event in wrong {
        let mut client = Client::new(&[2]);
        client.step(Submit(1));
        client.step(Submit(2));
        let returned = |task| Event::Message(Body::Result, message(first(task), Outcome::Returned));
        let (actions, end) = client.received(0, vec![returned(1), event.clone(), returned(2)]);
        assert_eq!(actions, "1 ends: returned by 0", "{event:?}");
        assert!(end.is_err(), "{event:?}");
    }
    let mut client = Client::new(&[1]);
    client.step(Drain(0));
    assert!(client.received(0, vec![control(Control::Drain("again".into()))]).1.is_err());
    for slots in [0, 3, u64::MAX] {
        let mut client = Client::new(&[]);
        let node = client.dispatch.add_node("n".to_owned(), false, Instant::now());
        client.dispatch.greeted(node, &client_hello(2, true), agent_hello(), client.now);
        let (_, end) = client.received(node, vec![control(Control::Ready { slots })]);
        assert!(matches!(end, Err(SessionError::Slots { .. })), "{slots}");
    }
}

/// A node may send results that it owes, and notes within its credit.
#[test]
fn only_what_a_node_owes_is_stored() {
    let mut client = Client::new(&[1]);
    client.step(Submit(1));
    let offer = |body, task, size, unfinished| Offer { body, id: first(task), size, unfinished };
    let admit = |client: &Client, offer| client.dispatch.admit(0, &offer).ok();
    assert_eq!(admit(&client, offer(Body::Result, 1, CREDIT + 1, 0)), Some(true));
    assert_eq!(admit(&client, offer(Body::Result, 1, CREDIT, 1)), None);
    assert_eq!(admit(&client, offer(Body::Result, 2, 1, 0)), Some(false));
    assert_eq!(admit(&client, offer(Body::Task, 1, 1, 0)), None);
    assert_eq!(admit(&client, offer(Body::Note, 1, NOTE_CREDIT + 1, 0)), Some(true));
    assert_eq!(admit(&client, offer(Body::Note, 1, NOTE_CREDIT, 1)), None);
    let note = |number, size| {
        let parts = vec![Bytes::from(vec![0; size])];
        Event::Message(Body::Note, Message { parts, ..message(first(number), Outcome::Returned) })
    };
    assert_eq!(client.received(0, vec![note(1, NOTE_CREDIT)]).0, "note 1 from 0");
    assert_eq!(admit(&client, offer(Body::Note, 2, 1, 0)), None);
    let (actions, end) = client.received(0, vec![note(2, 1)]);
    assert!(actions.is_empty() && end.is_err());
    let mut out = Vec::new();
    client.dispatch.answer_note(0, 1, Bytes::new(), &mut out);
    assert_eq!(out.last(), Some(&Action::Wake(0)));
    assert_eq!(client.received(0, vec![note(2, 1)]).0, "note 2 from 0");
    assert!(client.received(0, vec![note(2, 1)]).1.is_err(), "two notes of the same number");
    client.check(&[(Lost(0), "leave 0, 1.1 ends: node lost, wake 0, notify")]);
    assert_eq!(admit(&client, offer(Body::Note, 2, NOTE_CREDIT, 0)), Some(true), "the lost node's notes are forgotten");
}

/// A node that announces its departure before its workers take tasks is sent only the tasks that are for it alone.
#[test]
fn a_node_may_drain_before_it_is_ready() {
    Client::new(&[]).check(&[
        (Connect(1), ""),
        (Submit(1), ""),
        (Drain(0), "notify"),
        (Ready(0, 1), "notify"),
        (SubmitTo(0, 2), "send 2 to 0, wake 0"),
        (Returned(0, 2), "2 ends: returned by 0"),
        (Join(1), "send 1 to 1, wake 1, notify"),
    ]);
}

/// A node whose session has begun when the pool is closed is left, and its goodbye is waited for.
#[test]
fn a_node_that_connects_is_left_too() {
    let mut client = Client::new(&[]);
    client.check(&[(Connect(1), ""), (Close, "leave 0, wake 0")]);
    assert!(client.dispatch.node(0).unwrap().state.is_alive());
    client.check(&[(Lost(0), "leave 0, wake 0, notify")]);
    assert_eq!(client.dispatch.node(0).unwrap().state, NodeState::Closed);
}

/// A node that is asked for one slot per core has as many as its cores, at least 1 and at most 8192.
#[test]
fn a_node_has_one_slot_per_core_unless_told_otherwise() {
    for (cores, slots, is_right) in
        [(3, 3, true), (3, 4, false), (0, 1, true), (0, 2, false), (10_000, 8192, true), (10_000, 8193, false)]
    {
        let mut client = Client::new(&[]);
        let node = client.dispatch.add_node("n".to_owned(), false, Instant::now());
        let mut hello = client_hello(1, true);
        hello.worker.concurrency = None;
        client.dispatch.greeted(node, &hello, AgentHello { cores, ..agent_hello() }, client.now);
        let (_, end) = client.received(node, vec![Event::Control(Control::Ready { slots })]);
        assert_eq!(end.is_ok(), is_right, "{slots} slots of {cores} cores");
    }
}

/// A task behind a long one is recalled when its node, which was fast before, has ended no task for a while.
#[test]
fn a_tick_recalls_from_a_node_that_became_slow() {
    let mut client = Client::new(&[1]);
    client.run(400, Duration::from_micros(250));
    for task in 501..=505 {
        client.step(Submit(task));
    }
    client.check(&[(Join(1), "notify"), (Tick, "")]);
    client.now += Duration::from_secs(10);
    client.check(&[(Tick, "recall 505 from 0, wake 0"), (GivenBack(0, 505), "send 505 to 1, wake 1")]);
}

/// A node's round-trip time is the smallest one that was measured, which may rise to twice itself with each heartbeat.
#[test]
fn round_trips_are_measured() {
    let mut client = Client::new(&[1]);
    assert_eq!(client.dispatch.node(0).unwrap().rtt, Duration::MAX);
    for (measured, rtt) in [(10, 10), (50, 20), (5, 5), (100, 10), (12, 12)] {
        client.beats(0, 1, Duration::from_millis(measured)).unwrap();
        assert_eq!(client.dispatch.node(0).unwrap().rtt, Duration::from_millis(rtt), "{measured} ms");
    }
}

/// The longer the round trip, the more tasks a fast node is sent in advance.
#[test]
fn a_long_way_is_filled_with_tasks() {
    let mut client = Client::new(&[1]);
    client.run(400, Duration::from_micros(500));
    client.beats(0, 1, Duration::from_millis(50)).unwrap();
    let sent = (501..=1000).filter(|task| client.step(Submit(*task)).starts_with("send")).count();
    assert!((100..200).contains(&sent), "{sent} tasks, where 2000 end per second");
}

/// A node that answers heartbeats and not a request is lost, unless the answer is of no interest any more.
#[test]
fn requests_must_be_answered() {
    for (request, asked, answer) in [
        (Tick, "to give a task back", GivenBack(0, 2)),
        (Tick, "to give a task back", Refused(0, 2)),
        (Cancel(2), "to drop a task", Refused(0, 2)),
        (Abort(2), "to end a task", Dropped(0, 2)),
    ] {
        let waiting = |answer: Option<Step>| {
            let mut client = Client::new(&[1]);
            client.step(Submit(1));
            client.step(Submit(2));
            if matches!(request, Tick) {
                assert_eq!(client.step(Join(1)), "recall 2 from 0, wake 0, notify");
            }
            client.step(request);
            client.beats(0, 30, Duration::ZERO).unwrap();
            answer.map(|answer| client.step(answer));
            client.beats(0, 1, Duration::ZERO)
        };
        let end = waiting(None).unwrap_err();
        assert!(matches!(end, SessionError::NoAnswer { asked: about, .. } if about == asked), "{end}");
        waiting(Some(Returned(0, 2))).unwrap();
        waiting(Some(answer)).unwrap();
    }
}

/// A node that ends tasks is not lost because of one that takes long. Twice the time that its workers took to start is
/// added to the bound.
#[test]
fn tasks_must_end() {
    for (beats_before_ready, bound) in [(0, 40), (5, 50)] {
        let begun = || {
            let mut client = Client::new(&[]);
            client.step(Connect(2));
            client.beats(0, beats_before_ready, Duration::ZERO).unwrap();
            client.step(Ready(0, 2));
            for task in [1, 2] {
                let task = Message { nanos: 10_000_000_000, ..message(first(task), Outcome::Returned) };
                client.dispatch.submit(task, None, thread(), client.now, &mut Vec::new());
            }
            // The first heartbeat begins to count.
            client.beats(0, bound, Duration::ZERO).unwrap();
            client
        };
        assert!(matches!(begun().beats(0, 1, Duration::ZERO), Err(SessionError::NoResult { limit: 10.0, .. })));
        let mut client = begun();
        assert_eq!(client.step(Returned(0, 2)), "2 ends: returned by 0");
        client.beats(0, bound, Duration::ZERO).unwrap();
        assert!(client.beats(0, 1, Duration::ZERO).is_err());
    }
}

/// Results of tasks that a node does not hold are no sign that it is busy sending the answers to heartbeats.
#[test]
fn stale_results_excuse_no_silence() {
    let silent = |client: &mut Client, stale: bool| {
        for round in 1..=200 {
            client.now += Timing::DEFAULT.heartbeat;
            let parts = vec![Bytes::from(vec![0; 64 * 1024])];
            let task = if stale { 1 } else { round };
            client.step(Submit(round));
            let result = Message { parts, ..message(first(task), Outcome::Returned) };
            client.received(0, vec![Event::Message(Body::Result, result)]).1?;
            client.beat(0, round * 64 * 1024)?;
        }
        Ok(())
    };
    let mut client = Client::new(&[1000]);
    assert!(matches!(silent(&mut client, true), Err(SessionError::Unanswered(120))));
    silent(&mut Client::new(&[1000]), false).unwrap();
}

/// A node may send the heartbeats that gather in a day between two of the client's, and not more.
#[test]
fn a_flood_of_heartbeats_ends_the_session() {
    let mut client = Client::new(&[1]);
    let heartbeats = |count| vec![Event::Control(Control::Heartbeat { nonce: 0, lease_ms: 0, echo: 0 }); count];
    client.received(0, heartbeats(1 << 16)).1.unwrap();
    client.beat(0, 0).unwrap();
    client.received(0, heartbeats(1 << 16)).1.unwrap();
    assert!(client.received(0, heartbeats(1)).1.is_err());
}

/// A node that is lost is sent no heartbeat.
#[test]
fn a_lost_node_owes_nothing() {
    let mut client = Client::new(&[1]);
    client.step(Lost(0));
    let mut out = Vec::new();
    client.dispatch.beat(0, false, 0, client.now, &mut out).unwrap();
    assert_eq!(out, []);
}

/// Each queue has its own ended tasks; what is not taken for a while is told once, so that it can be acknowledged.
#[test]
fn ended_tasks_wait_in_their_queue() {
    const NOW: Duration = Duration::ZERO;
    let completions = Completions::default();
    let queue = completions.open();
    assert_eq!((queue, completions.open()), (1, 2));
    let end = |queue: u64, number: u64| (Some(0), message(first((queue << QUEUE_SHIFT) + number), Outcome::Returned));
    assert!(completions.add([end(0, 1), end(1, 1), end(1, 2)]));
    assert!(!completions.add([end(7, 1)]), "that queue is not open");
    assert_eq!(completions.take(0, NOW), Some(vec![end(0, 1)]));
    assert_eq!(completions.take_stuck(), []);
    let stuck = [(0, end(1, 1).1.id), (0, end(1, 2).1.id)];
    assert_eq!(completions.take_stuck(), stuck);
    assert_eq!(completions.take_stuck(), []);
    let taken: Vec<_> = completions.take(1, NOW).unwrap().into_iter().map(|(from, _)| from).collect();
    assert_eq!(taken, [None, None], "they were acknowledged");
    completions.wake(1);
    assert_eq!(completions.take(1, Duration::from_secs(60)), Some(Vec::new()));
    completions.finish();
    assert!(completions.add([end(1, 3)]), "a task may end while the pool is being closed");
    assert_eq!(completions.take(1, NOW), Some(vec![end(1, 3)]));
    assert_eq!(completions.take(1, Duration::from_secs(60)), None);
    assert!(!completions.add([end(1, 4)]), "the queue's thread was told that no more will come");
    completions.close(1);
    assert_eq!(completions.take(1, NOW), None);
}

/// A thread that waits for a queue's tasks is woken when one ends, when it is to look up, and when the pool is closed; and
/// what was taken between two ticks was not stuck.
#[test]
fn a_thread_that_waits_for_ended_tasks_is_woken() {
    const LONG: Duration = Duration::from_secs(60);
    let completions = Completions::default();
    let end = || (Some(0), message(first(1), Outcome::Returned));
    let woken_by = |wake: &dyn Fn()| {
        let begun = Instant::now();
        let taken = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| completions.take(0, LONG));
            std::thread::sleep(Duration::from_millis(50));
            wake();
            waiting.join().unwrap()
        });
        assert!(begun.elapsed() < LONG / 2);
        taken
    };
    assert_eq!(woken_by(&|| assert!(completions.add([end()]))), Some(vec![end()]));
    assert_eq!(woken_by(&|| completions.wake(0)), Some(Vec::new()));
    let begun = Instant::now();
    assert_eq!(completions.take(0, Duration::from_millis(50)), Some(Vec::new()));
    assert!(begun.elapsed() >= Duration::from_millis(50), "it was to look up once");
    for _ in 0..3 {
        assert!(completions.add([end()]));
        assert_eq!(completions.take_stuck(), []);
        assert_eq!(completions.take(0, Duration::ZERO), Some(vec![end()]));
    }
    assert_eq!(woken_by(&|| completions.finish()), None);
}
