//! The agent's decider: what it decides in each situation, and that no order of events confuses it. No process, no socket,
//! no clock: what a worker does is written in the tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use proptest::prelude::*;
use skyward_lite::node::actions::{Action, Exit, Input};
use skyward_lite::node::state::{Settings, State, TICK};
use skyward_lite::node::workers::{ABORT_GRACE, MAX_EARLY_DEATHS, RETIREMENT, SPARE_DELAY, SPARE_RETRY};
use skyward_lite::timing::{NOTE_CREDIT, PEER_TIMEOUT};
use skyward_lite::wire::{Attempt, BlobPart, Body, Control, Event, Message, Offer, Outcome};

const LEASE: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

/// A decider at a time of its own.
struct Node {
    state: State,
    now: Instant,
}

fn settings(processes: usize, slots: usize) -> Settings {
    Settings { node: "n".to_owned(), processes, slots, cores: 4, task_timeout: None, generation: 0, unwind: false }
}

fn a_tick_less(time: Duration) -> Duration {
    time.saturating_sub(TICK)
}

fn id(task: u64) -> Attempt {
    Attempt { task, attempt: 0 }
}

fn task(task: u64) -> Message {
    Message { id: id(task), ..Message::default() }
}

fn sized(task: u64, size: usize) -> Message {
    Message { id: id(task), parts: vec![Bytes::from(vec![0; size])], ..Message::default() }
}

/// A task that names these blobs.
fn naming(task: u64, blobs: &[u64]) -> Message {
    let part = |(place, number): (u16, &u64)| BlobPart { place, number: *number, fresh: false, content: None };
    Message { id: id(task), blobs: (0..).zip(blobs).map(part).collect(), ..Message::default() }
}

fn pass(worker: usize, blob: u64) -> Action {
    Action::Pass(worker, blob)
}

fn exit(running: &[u64]) -> Exit {
    let running = running.iter().map(|task| (id(*task), Duration::from_secs(1))).collect();
    Exit { pid: 7, how: "exited with status 3".to_owned(), running, ..Exit::default() }
}

fn deliver(message: Message) -> Action {
    Action::Deliver(Body::Result, message)
}

fn cancelled(task: u64) -> Action {
    deliver(Message::cancelled(id(task)))
}

fn crashed(task: u64, why: &str) -> Action {
    deliver(Message::text(id(task), Outcome::Crashed, why.to_owned()))
}

fn assign(worker: usize, n: u64) -> Action {
    Action::Assign(worker, task(n))
}

fn recall(worker: usize, task: u64) -> Action {
    Action::Tell(worker, Control::Recall(id(task)))
}

impl Node {
    fn new(settings: Settings) -> Self {
        let now = Instant::now();
        Self { state: State::new(settings, now, LEASE), now }
    }

    /// A node whose workers, numbered from 1, are all ready.
    fn ready(settings: Settings) -> Self {
        let workers = settings.processes;
        let mut node = Self::new(settings);
        node.handle(Input::Begin);
        (1..=workers).for_each(|worker| drop(node.hello(worker)));
        node
    }

    fn handle(&mut self, input: Input<'_>) -> Vec<Action> {
        let mut actions = Vec::new();
        self.state.handle(input, self.now, &mut actions);
        assert!(self.state.is_consistent(), "{:#?}", self.state);
        actions
    }

    fn client(&mut self, event: Event) -> Vec<Action> {
        self.handle(Input::Client(&mut vec![event]))
    }

    fn ask(&mut self, control: Control) -> Vec<Action> {
        self.client(Event::Control(control))
    }

    /// The client sends tasks of these numbers.
    fn submit(&mut self, tasks: impl IntoIterator<Item = u64>) -> Vec<Action> {
        self.handle(Input::Client(&mut tasks.into_iter().map(|n| Event::Message(Body::Task, task(n))).collect()))
    }

    /// The client sends a task that names these blobs.
    fn submit_naming(&mut self, task: u64, blobs: &[u64]) -> Vec<Action> {
        self.client(Event::Message(Body::Task, naming(task, blobs)))
    }

    fn worker(&mut self, worker: usize, event: Event) -> Vec<Action> {
        self.handle(Input::Worker(worker, &mut vec![event]))
    }

    fn hello(&mut self, worker: usize) -> Vec<Action> {
        self.worker(worker, Event::Control(Control::Hello(Bytes::new())))
    }

    fn answer(&mut self, worker: usize, control: Control) -> Vec<Action> {
        self.worker(worker, Event::Control(control))
    }

    fn result(&mut self, worker: usize, result: Message) -> Vec<Action> {
        self.worker(worker, Event::Message(Body::Result, result))
    }

    fn exit(&mut self, worker: usize, running: &[u64]) -> Vec<Action> {
        self.handle(Input::Exited(worker, exit(running)))
    }

    /// Let time pass until the next tick comes.
    fn tick_after(&mut self, time: Duration) -> Vec<Action> {
        self.tick_running(time, &[])
    }

    /// The same, while worker 1 runs these tasks for so long.
    fn tick_running(&mut self, time: Duration, running: &[(u64, Duration)]) -> Vec<Action> {
        self.now += time;
        let table = |worker| match worker {
            1 => running.iter().map(|(task, age)| (id(*task), *age)).collect(),
            _ => Vec::new(),
        };
        self.handle(Input::Tick { orphaned: false, slept: Duration::ZERO, running: &table })
    }

    fn acknowledge(&mut self, tasks: &[u64]) -> Vec<Action> {
        self.ask(Control::Acknowledge(tasks.iter().map(|task| id(*task)).collect()))
    }
}

/// All workers are started at once, and the client is told when the last one is ready, once.
#[test]
fn a_node_is_ready_with_its_last_worker() {
    let mut node = Node::new(settings(2, 1));
    assert_eq!(node.handle(Input::Begin), [Action::Start(1), Action::Start(2)]);
    assert_eq!(node.submit([0]), []);
    assert_eq!(node.hello(2), [assign(2, 0)]);
    assert_eq!(node.hello(1), [Action::Reply(Control::Ready { slots: 2 })]);
    assert_eq!(node.hello(1), []);
    // A task can write a hello to its worker's socket: its worker gets no second slot for that.
    assert_eq!(node.hello(2), []);
    assert_eq!(node.submit([1, 2]), [assign(1, 1)]);
    assert_eq!(node.result(2, task(0)), [deliver(task(0)), assign(2, 2)]);
}

/// A task goes to a worker with a free slot, its result to the client, and the next task takes its place. A task that comes
/// twice is taken once.
#[test]
fn tasks_go_to_free_workers() {
    let mut node = Node::ready(settings(2, 1));
    assert_eq!(node.submit([0, 1, 2, 2]), [assign(1, 0), assign(2, 1)]);
    assert_eq!(node.result(2, task(1)), [deliver(task(1)), assign(2, 2)]);
    assert_eq!(node.result(1, task(0)), [deliver(task(0))]);
    assert_eq!(node.result(2, task(2)), [deliver(task(2))]);
    assert_eq!(node.state.counts(), (0, 0));
}

/// Results beyond the client's credit of 64 MiB wait for its acknowledgements, in their order. One may always be on its
/// way, however large.
#[test]
fn results_wait_for_credit() {
    let mut node = Node::ready(settings(1, 8));
    node.submit(0..5);
    assert_eq!(node.result(1, sized(0, 100 * MIB)), [deliver(sized(0, 100 * MIB))]);
    for n in 1..5 {
        assert_eq!(node.result(1, sized(n, 30 * MIB)), []);
    }
    assert_eq!(node.state.counts(), (0, 4));
    assert_eq!(node.acknowledge(&[7]), []);
    assert_eq!(node.acknowledge(&[0]), [deliver(sized(1, 30 * MIB)), deliver(sized(2, 30 * MIB))]);
    assert_eq!(node.acknowledge(&[2, 1]), [deliver(sized(3, 30 * MIB)), deliver(sized(4, 30 * MIB))]);
    // A small result does not wait until the client has taken a large one.
    node.acknowledge(&[3, 4]);
    node.submit(5..8);
    assert_eq!(node.result(1, sized(5, 40 * MIB)), [deliver(sized(5, 40 * MIB))]);
    assert_eq!(node.result(1, sized(6, 40 * MIB)), []);
    assert_eq!(node.result(1, task(7)), [deliver(task(7))]);
    assert_eq!(node.acknowledge(&[5]), [deliver(sized(6, 40 * MIB))]);
}

#[test]
fn small_results_wait_for_a_credit_of_their_own() {
    let mut node = Node::ready(settings(1, 8));
    // One takes 16 KiB of payload and a few bytes more: 64 MiB are 4096 without those.
    let small = |n| sized(n, 16 * 1024);
    node.submit(0..4100);
    let sent = (0..4100).filter(|n| node.result(1, small(*n)).contains(&deliver(small(*n)))).count();
    assert!((4000..4096).contains(&sent), "{sent}");
    assert_eq!(node.acknowledge(&[0]), [deliver(small(sent as u64))]);
}

/// Beyond 256 MiB that wait for credit the workers are not read from, nor taken for silent, and the client's questions
/// about what they hold are answered by the agent: those tasks go on.
#[test]
fn a_full_node_answers_for_its_workers() {
    let mut node = Node::ready(settings(1, 8));
    node.submit(0..8);
    assert_eq!(node.ask(Control::Recall(id(7))), [recall(1, 7)]);
    for n in 0..6 {
        node.result(1, sized(n, 60 * MIB));
    }
    assert!(node.state.is_full());
    let refused = |task| Action::Reply(Control::RecallRefused(id(task)));
    assert_eq!(node.ask(Control::Recall(id(6))), [refused(6)]);
    assert_eq!(node.ask(Control::Cancel(id(6))), [refused(6)]);
    assert_eq!(node.tick_after(TICK), [refused(7)]);
    for _ in 0..100 {
        assert_eq!(node.tick_after(TICK).iter().filter(|action| matches!(action, Action::Kill(_))).count(), 0);
    }
    assert_eq!(node.acknowledge(&[0]), [deliver(sized(1, 60 * MIB)), Action::ReadWorkers]);
    assert!(!node.state.is_full());
    // Both run on: the cancelled one is not to be dropped any more if its worker dies.
    assert_eq!(node.answer(1, Control::RecallRefused(id(7))), []);
    assert_eq!(node.exit(1, &[]), []);
    assert_eq!(node.hello(2), [assign(2, 6), assign(2, 7)]);
}

/// A cancelled task ends at once if it waits here, by its worker's word if that holds it, and on its arrival otherwise.
/// The client hears if it runs.
#[test]
fn cancelled_tasks_end_where_they_are() {
    let mut node = Node::ready(settings(1, 1));
    assert_eq!(node.submit([0, 1]), [assign(1, 0)]);
    assert_eq!(node.ask(Control::Cancel(id(1))), [cancelled(1)]);
    let ask = Action::Tell(1, Control::Cancel(id(0)));
    assert_eq!(node.ask(Control::Cancel(id(0))), std::slice::from_ref(&ask));
    assert_eq!(node.answer(1, Control::RecallRefused(id(0))), [Action::Reply(Control::RecallRefused(id(0)))]);
    assert_eq!(node.answer(1, Control::RecallRefused(id(0))), []);
    assert_eq!(node.ask(Control::Cancel(id(0))), [ask]);
    assert_eq!(node.result(1, Message::cancelled(id(0))), [cancelled(0)]);
    assert_eq!(node.ask(Control::Cancel(id(2))), []);
    assert_eq!(node.submit([2]), [cancelled(2)]);
    // A task that had ended is not remembered for ever.
    assert_eq!(node.ask(Control::Cancel(id(1))), []);
    assert_eq!(node.acknowledge(&[1]), []);
    assert_eq!(node.submit([1]), [assign(1, 1)]);
}

/// A recalled task is given back if it waits here or its worker has not begun it, and refused if it runs or is not here.
#[test]
fn recalled_tasks_are_given_back_or_refused() {
    let mut node = Node::ready(settings(1, 2));
    assert_eq!(node.submit(0..5), (0..4).map(|n| assign(1, n)).collect::<Vec<_>>());
    let given = |task| Action::Reply(Control::GivenBack(id(task)));
    let refused = |task| Action::Reply(Control::RecallRefused(id(task)));
    assert_eq!(node.ask(Control::Recall(id(4))), [given(4)]);
    assert_eq!(node.ask(Control::Recall(id(4))), [refused(4)]);
    assert_eq!(node.ask(Control::Recall(id(0))), [recall(1, 0)]);
    assert_eq!(node.answer(1, Control::RecallRefused(id(0))), [refused(0)]);
    assert_eq!(node.ask(Control::Recall(id(3))), [recall(1, 3)]);
    assert_eq!(node.answer(1, Control::GivenBack(id(3))), [given(3)]);
    // A recalled task whose result is on its way ends with it.
    assert_eq!(node.ask(Control::Recall(id(2))), [recall(1, 2)]);
    assert_eq!(node.result(1, task(2)), [deliver(task(2))]);
    assert_eq!(node.answer(1, Control::RecallRefused(id(2))), []);
    assert_eq!(node.state.counts(), (2, 0));
}

/// A recall that the client asked for is answered if the worker dies first: given back if the task had not begun, refused
/// if it may have killed the worker.
#[test]
fn a_dead_workers_answers_are_given_for_it() {
    let mut node = Node::ready(settings(1, 2));
    node.submit(0..3);
    (0..3).for_each(|n| drop(node.ask(Control::Recall(id(n)))));
    let actions = node.exit(1, &[0, 1]);
    let reply = |control: fn(Attempt) -> Control, task| Action::Reply(control(id(task)));
    assert_eq!(actions[0], reply(Control::GivenBack, 2));
    assert_eq!(actions[1..3], [reply(Control::RecallRefused, 0), reply(Control::RecallRefused, 1)]);
    assert_eq!(node.state.counts(), (2, 0));
}

/// An aborted task that has not ended after a second has its worker replaced and killed, and ends as cancelled.
#[test]
fn an_aborted_task_costs_its_worker() {
    let mut node = Node::ready(settings(1, 1));
    node.submit([0, 1]);
    assert_eq!(node.ask(Control::Abort(id(0))), [Action::Tell(1, Control::Cancel(id(0)))]);
    assert_eq!(node.answer(1, Control::RecallRefused(id(0))), []);
    assert_eq!(node.tick_after(a_tick_less(ABORT_GRACE)), []);
    assert_eq!(node.tick_after(TICK), [Action::Start(2), Action::Kill(1)]);
    assert_eq!(node.hello(2), [assign(2, 1)]);
    // The spare.
    assert_eq!(node.tick_after(TICK), [Action::Start(3), Action::Kill(1)]);
    assert_eq!(node.exit(1, &[0]), [cancelled(0)]);
    // An aborted task that ends in time costs nothing.
    node.ask(Control::Abort(id(1)));
    assert_eq!(node.result(2, task(1)), [deliver(task(1))]);
    assert_eq!(node.tick_after(ABORT_GRACE), []);
}

/// A task that was cancelled in vain and then aborted ends with its worker, and does not run again.
#[test]
fn an_aborted_task_that_refused_to_be_cancelled_does_not_run_again() {
    let mut node = Node::ready(settings(1, 1));
    node.submit([0]);
    node.ask(Control::Cancel(id(0)));
    node.ask(Control::Abort(id(0)));
    assert_eq!(node.answer(1, Control::RecallRefused(id(0))), [Action::Reply(Control::RecallRefused(id(0)))]);
    node.tick_after(ABORT_GRACE);
    assert_eq!(node.exit(1, &[0]), [cancelled(0)]);
}

/// The other tasks of an aborted one's worker go elsewhere if they have not begun, and have three seconds if they have.
#[test]
fn bystanders_of_an_abort_have_time() {
    let mut node = Node::ready(settings(1, 2));
    node.submit(0..3);
    node.ask(Control::Abort(id(0)));
    assert_eq!(node.tick_after(ABORT_GRACE), [recall(1, 1), recall(1, 2), Action::Start(2)]);
    node.hello(2);
    node.answer(1, Control::RecallRefused(id(1)));
    assert_eq!(node.answer(1, Control::GivenBack(id(2))), [assign(2, 2)]);
    assert_eq!(node.tick_after(a_tick_less(RETIREMENT)), [Action::Start(3)]);
    assert_eq!(node.tick_after(TICK), [Action::Kill(1)]);
    // Not its fault: it runs again, and is not blamed.
    assert_eq!(node.exit(1, &[0, 1]), [assign(2, 1), cancelled(0)][..].iter().rev().cloned().collect::<Vec<_>>());
}

/// A worker that gives an aborted task back unstarted is not killed for it.
#[test]
fn an_abort_that_crosses_a_recall_ends_no_worker() {
    let mut node = Node::ready(settings(1, 2));
    node.submit(0..4);
    node.ask(Control::Recall(id(3)));
    node.ask(Control::Abort(id(3)));
    assert_eq!(node.answer(1, Control::GivenBack(id(3))), [cancelled(3)]);
    assert_eq!(node.tick_after(ABORT_GRACE), []);
}

/// A worker that dies while one task runs died of that task. What only waited there runs in its successor.
#[test]
fn the_only_running_task_is_blamed() {
    let mut node = Node::ready(settings(1, 2));
    node.submit(0..4);
    let mut end = exit(&[1]);
    end.stderr_tail = "; the end of its standard error:\noops".to_owned();
    let why =
        "node n: worker process 7 exited with status 3 while it ran this task; the end of its standard error:\noops";
    assert_eq!(node.handle(Input::Exited(1, end)), [crashed(1, why), Action::Start(2)]);
    assert_eq!(node.hello(2), [assign(2, 0), assign(2, 2), assign(2, 3)]);
}

/// Of several running tasks each runs again in a process of its own, the one that began last first, and only the one that
/// ends that process too is blamed. Isolated workers become spares, and all but one of these are ended.
#[test]
fn several_running_tasks_are_tried_alone() {
    let mut node = Node::ready(settings(1, 3));
    node.submit(0..4);
    let mut end = exit(&[0, 1, 2]);
    end.running[2].1 = Duration::ZERO;
    // Its successor, and a process for each suspect as soon as spares are due.
    let starts: Vec<_> = (2..6).map(Action::Start).collect();
    assert_eq!(node.handle(Input::Exited(1, end)), starts);
    assert_eq!(node.hello(2), [assign(2, 3)]);
    assert_eq!(node.hello(4), [assign(4, 2)]);
    assert_eq!(node.hello(5), [assign(5, 0)]);
    let why = "node n: worker process 7 exited with status 3 while it ran this task again, alone";
    assert_eq!(node.exit(4, &[2]), [crashed(2, why)]);
    // The next one takes its place; the first spare that is ready runs what waits.
    assert_eq!(node.hello(3), [assign(3, 1)]);
    assert_eq!(node.result(3, task(1)), [deliver(task(1))]);
    assert_eq!(node.result(5, task(0)), [deliver(task(0))]);
    assert_eq!(node.tick_after(TICK), [Action::Kill(5)]);
    assert_eq!(node.exit(5, &[]), []);
}

/// A spare that nobody needs any more is ended after workers are replaced, not before: the one that is left takes a place.
#[test]
fn surplus_spares_replace_workers_before_they_are_ended() {
    let mut node = Node::ready(settings(1, 3));
    node.submit(0..3);
    assert_eq!(node.exit(1, &[0, 1, 2]), (2..6).map(Action::Start).collect::<Vec<_>>());
    (2..6).for_each(|worker| drop(node.hello(worker)));
    assert_eq!(node.submit([3]), [assign(2, 3)]);
    node.ask(Control::Abort(id(3)));
    (3..6).for_each(|worker| drop(node.result(worker, task(worker as u64 - 3))));
    // Worker 3 takes the place of worker 2, and worker 4 stays as the spare.
    assert_eq!(node.tick_after(ABORT_GRACE), [Action::Kill(2), Action::Kill(5)]);
    assert_eq!(node.exit(2, &[3]), [cancelled(3)]);
    assert_eq!(node.exit(5, &[]), []);
    assert_eq!(node.tick_after(TICK), []);
    assert_eq!(node.submit([4]), [assign(3, 4)]);
}

/// The client was told that a suspect goes on, so it does, although it was to be cancelled: it runs elsewhere if its new
/// process ends before it began.
#[test]
fn a_suspect_that_was_to_be_cancelled_goes_on() {
    let mut node = Node::ready(settings(1, 2));
    node.submit([0, 1]);
    node.ask(Control::Cancel(id(0)));
    assert_eq!(node.exit(1, &[0, 1])[0], Action::Reply(Control::RecallRefused(id(0))));
    node.hello(2);
    assert_eq!(node.hello(3), [assign(3, 0)]);
    assert_eq!(node.exit(3, &[]), [assign(2, 0)]);
}

/// Of the spares, one that is ready takes a lost worker's place.
#[test]
fn spares_that_are_ready_come_first() {
    let mut node = Node::ready(settings(1, 2));
    node.submit([0, 1]);
    assert_eq!(node.exit(1, &[0, 1]), (2..5).map(Action::Start).collect::<Vec<_>>());
    (0..2).for_each(|n| assert_eq!(node.ask(Control::Cancel(id(n))), [cancelled(n)]));
    node.hello(2);
    node.hello(4);
    assert_eq!(node.exit(2, &[]), []);
    assert_eq!(node.submit([2]), [assign(4, 2)]);
}

/// An isolated worker that is killed for an aborted suspect is no regular worker, so none takes its place.
#[test]
fn isolated_workers_are_not_replaced() {
    let mut node = Node::ready(settings(1, 2));
    node.submit([0, 1]);
    assert_eq!(node.exit(1, &[0, 1]), (2..5).map(Action::Start).collect::<Vec<_>>());
    node.hello(2);
    assert_eq!([node.hello(3), node.hello(4)].concat(), [assign(3, 0), assign(4, 1)]);
    node.ask(Control::Abort(id(0)));
    // The spare, which is due because both are taken.
    assert_eq!(node.tick_after(ABORT_GRACE), [Action::Start(5), Action::Kill(3)]);
    assert_eq!(node.exit(3, &[0]), [cancelled(0)]);
    assert_eq!(node.hello(5), []);
    assert_eq!(node.submit([2, 3]), [assign(2, 2), assign(2, 3)]);
}

/// Isolated workers take one suspect after another; there are at most as many as cores, and four at least.
#[test]
fn few_suspects_run_at_once() {
    let mut node = Node::ready(settings(1, 6));
    node.submit(0..6);
    let starts: Vec<_> = (2..7).map(Action::Start).collect();
    assert_eq!(node.exit(1, &[0, 1, 2, 3, 4, 5]), starts);
    let hellos: Vec<_> = (3..7).flat_map(|worker| node.hello(worker)).collect();
    assert_eq!(hellos, (3..7).map(|worker| assign(worker, worker as u64 - 3)).collect::<Vec<_>>());
    assert_eq!(node.result(5, task(2)), [deliver(task(2)), assign(5, 4)]);
    assert_eq!(node.exit(4, &[1])[1..], [Action::Start(7)]);
    // A suspect can be cancelled while it waits, and is not given back.
    assert_eq!(node.ask(Control::Recall(id(5))), [Action::Reply(Control::RecallRefused(id(5)))]);
    assert_eq!(node.ask(Control::Cancel(id(5))), [cancelled(5)]);
    assert_eq!(node.hello(7), []);
    assert_eq!(node.state.counts(), (3, 0));
}

/// After bytes that cannot be read it is unknown which tasks have begun: each that may have is a suspect.
#[test]
fn whoever_may_have_written_nonsense_is_tried_alone() {
    let mut node = Node::ready(settings(1, 2));
    node.submit(0..4);
    let mut end = exit(&[]);
    end.unreadable = Some("truncated frame".to_owned());
    assert_eq!(node.handle(Input::Exited(1, end.clone())), (2..5).map(Action::Start).collect::<Vec<_>>());
    assert_eq!(node.hello(2), [assign(2, 2), assign(2, 3)]);
    assert_eq!(node.hello(3), [assign(3, 0)]);
    let why = "node n: worker process 7 was ended because what it sent cannot be read (truncated frame), perhaps a task \
               wrote to its socket while it ran this task again, alone";
    assert_eq!(node.handle(Input::Exited(3, end))[0], crashed(0, why));
}

/// Three workers in a row that die before their first task end the agent; a task that ends in between makes amends.
#[test]
fn workers_that_die_early_end_the_node() {
    for amends in [false, true] {
        let mut node = Node::new(settings(2, 1));
        node.handle(Input::Begin);
        node.hello(2);
        for n in 1..MAX_EARLY_DEATHS {
            let worker = if n == 1 { 1 } else { n + 1 };
            assert_eq!(node.exit(worker, &[]), [Action::Start(n + 2)]);
        }
        if amends {
            node.submit([0]);
            node.result(2, task(0));
            assert_eq!(node.exit(4, &[]), [Action::Start(5)]);
        } else {
            let why = "3 workers in a row ended by themselves: node n: worker process 7 exited with status 3";
            assert_eq!(node.exit(4, &[]), [Action::Stop(why.to_owned())]);
        }
    }
}

/// A worker that has waited for a task in vain and is killed is replaced, however often.
#[test]
fn idle_workers_may_die() {
    let mut node = Node::ready(settings(1, 1));
    for worker in 1..10 {
        assert_eq!(node.exit(worker, &[]), [Action::Start(worker + 1)]);
        node.hello(worker + 1);
    }
}

/// If process after process ends before it could run a suspect, the suspects end with the reason, and all else goes on.
#[test]
fn suspects_do_not_wait_for_what_does_not_start() {
    let mut node = Node::ready(settings(1, 2));
    node.submit(0..2);
    assert_eq!(node.exit(1, &[0, 1]), (2..5).map(Action::Start).collect::<Vec<_>>());
    node.hello(2);
    assert_eq!(node.exit(3, &[]), []);
    assert_eq!(node.exit(4, &[]), []);
    assert_eq!(node.tick_after(a_tick_less(SPARE_RETRY)), []);
    assert_eq!(node.tick_after(TICK), [Action::Start(5), Action::Start(6)]);
    assert_eq!(node.exit(5, &[]), []);
    let why = "this task ran in a worker process that died of one of its tasks, and no other could be started to run it \
               again, alone: node n: worker process 7 exited with status 3";
    assert_eq!(node.exit(6, &[]), [crashed(0, why), crashed(1, why)]);
    // For the next suspects the processes are counted anew.
    assert_eq!(node.submit([2, 3]), [assign(2, 2), assign(2, 3)]);
    assert_eq!(node.exit(2, &[2, 3]), (7..10).map(Action::Start).collect::<Vec<_>>());
    node.hello(7);
    assert_eq!(node.exit(8, &[]), []);
    assert_eq!(node.exit(9, &[]), []);
    assert_eq!(node.submit([4]), [assign(7, 4)]);
}

/// A spare worker starts two seconds after the node is ready, takes a dead worker's place at once, and is replaced itself.
#[test]
fn a_spare_stands_by() {
    let mut node = Node::ready(settings(1, 1));
    node.submit([0, 1]);
    assert_eq!(node.tick_after(a_tick_less(SPARE_DELAY)), []);
    assert_eq!(node.tick_after(TICK), [Action::Start(2)]);
    node.hello(2);
    let actions = node.exit(1, &[0]);
    assert!(matches!(actions[0], Action::Deliver(..)), "{actions:?}");
    assert_eq!(actions[1..], [assign(2, 1)]);
    assert_eq!(node.tick_after(TICK), [Action::Start(3)]);
    // One that is still starting takes the place all the same.
    assert_eq!(node.exit(2, &[1])[1..], []);
    node.submit([2]);
    assert_eq!(node.hello(3), [assign(3, 2)]);
}

/// A worker that the system does not start ends the agent; a spare that it does not start is tried again later, unless a
/// crash suspect waits for it.
#[test]
fn starts_that_fail() {
    let mut node = Node::new(settings(2, 1));
    node.handle(Input::Begin);
    let stop = [Action::Stop("why".to_owned())];
    assert_eq!(node.handle(Input::NotStarted(1, "why".to_owned())), stop);
    assert_eq!(node.handle(Input::NotStarted(2, "why".to_owned())), []);

    let mut node = Node::ready(settings(1, 1));
    assert_eq!(node.tick_after(SPARE_DELAY), [Action::Start(2)]);
    assert_eq!(node.handle(Input::NotStarted(2, "why".to_owned())), []);
    assert_eq!(node.tick_after(a_tick_less(SPARE_RETRY)), []);
    assert_eq!(node.tick_after(TICK), [Action::Start(3)]);

    let mut node = Node::ready(settings(1, 2));
    node.submit([0, 1]);
    assert_eq!(node.exit(1, &[0, 1]), (2..5).map(Action::Start).collect::<Vec<_>>());
    assert_eq!(node.handle(Input::NotStarted(3, "why".to_owned())), stop);
}

/// A task that runs for longer than it may ends on the node, and its worker with it.
#[test]
fn late_tasks_are_ended() {
    let limit = Duration::from_millis(1500);
    let mut node = Node::ready(Settings { task_timeout: Some(limit), ..settings(1, 1) });
    node.submit([0, 1]);
    assert_eq!(node.tick_running(TICK, &[(0, limit)]), [runs(0)]);
    let text = "node n: the task ran for 1.7 s, longer than Worker(task_timeout=1.5), and was ended";
    let nanos = u64::try_from((limit + TICK).as_nanos()).unwrap();
    let late = deliver(Message { nanos, ..Message::text(id(0), Outcome::TimedOut, text.to_owned()) });
    let running = [(0, limit + TICK)];
    assert_eq!(node.tick_running(TICK, &running), [late, Action::Start(2), Action::Kill(1)]);
    // Its own result comes too late, and nobody is blamed for the worker's end.
    assert_eq!(node.result(1, task(0)), []);
    assert_eq!(node.hello(2), [assign(2, 1)]);
    assert_eq!(node.exit(1, &[0]), []);
    assert_eq!(node.state.counts(), (1, 0));
}

fn runs(task: u64) -> Action {
    Action::Reply(Control::Running(vec![id(task)]))
}

/// The client is told once that a task runs, when it has run for a while; not of a task that has ended.
#[test]
fn tasks_that_run_are_reported() {
    let mut node = Node::ready(settings(1, 2));
    node.submit([0, 1, 2]);
    let long = Duration::from_millis(50);
    assert_eq!(node.tick_running(TICK, &[(0, long / 2), (1, long)]), [runs(1)]);
    assert_eq!(node.tick_running(TICK, &[(0, long), (1, TICK)]), [runs(0)]);
    assert_eq!(node.tick_running(TICK, &[(0, TICK), (1, TICK)]), []);
    assert_eq!(node.result(1, task(0)), [deliver(task(0))]);
    // Its thread is still busy with it.
    assert_eq!(node.tick_running(TICK, &[(0, TICK), (1, TICK)]), []);
    assert_eq!(node.tick_running(TICK, &[(2, TICK), (1, TICK)]), [runs(2)]);
}

/// A thread that does not come back from a task whose result is here costs its worker.
#[test]
fn a_thread_that_clears_up_for_too_long_costs_its_worker() {
    let limit = Duration::from_secs(1);
    let mut node = Node::ready(Settings { task_timeout: Some(limit), ..settings(1, 1) });
    node.submit([0, 1]);
    assert_eq!(node.result(1, task(0)), [deliver(task(0)), assign(1, 1)]);
    assert_eq!(node.tick_running(TICK, &[(0, 2 * limit)]), [recall(1, 1), Action::Start(2)]);
}

/// A worker that is not heard for ten seconds is killed, and its task blamed in these words. One that was never heard may
/// take its time to start.
#[test]
fn silent_workers_are_killed() {
    let mut node = Node::new(settings(2, 1));
    node.handle(Input::Begin);
    node.hello(1);
    node.submit([0]);
    let ticks = PEER_TIMEOUT.as_millis() / TICK.as_millis();
    for _ in 0..ticks {
        assert_eq!(node.tick_after(TICK), []);
    }
    assert_eq!(node.tick_after(TICK), [Action::Kill(1)]);
    let why = "node n: worker process 7 gave no sign of life for 10 s and was ended while it ran this task";
    assert_eq!(node.exit(1, &[0]), [crashed(0, why), Action::Start(3)]);
}

/// A notice that the node will soon be gone is passed on, once.
#[test]
fn a_node_drains_once() {
    let mut node = Node::ready(settings(1, 1));
    let drain = Action::Reply(Control::Drain(Bytes::from_static(b"spot")));
    assert_eq!(node.handle(Input::Drain("spot".to_owned())), [drain]);
    assert_eq!(node.handle(Input::Drain("again".to_owned())), []);
    assert_eq!(node.submit([0]), [assign(1, 0)]);
}

/// The notice may come from a thread that can start no worker: the next tick starts those that are due.
#[test]
fn a_drain_starts_no_worker() {
    let mut node = Node::ready(settings(1, 2));
    node.submit([0, 1]);
    assert_eq!(node.exit(1, &[0, 1]), (2..5).map(Action::Start).collect::<Vec<_>>());
    assert_eq!([node.exit(3, &[]), node.exit(4, &[])].concat(), []);
    node.now += SPARE_RETRY;
    let drain = Action::Reply(Control::Drain(Bytes::from_static(b"spot")));
    assert_eq!(node.handle(Input::Drain("spot".to_owned())), [drain]);
    assert_eq!(node.tick_after(Duration::ZERO), [Action::Start(5), Action::Start(6)]);
}

/// The client's heartbeat is answered, and prolongs the lease from the moment on that it echoes; the workers are told of what is
/// left of it. Without it the agent ends, once.
#[test]
fn the_lease_is_the_clients() {
    let mut node = Node::ready(settings(2, 1));
    let begun = node.now;
    node.now += a_tick_less(LEASE);
    let heartbeat = |echo: Duration| {
        let echo = u64::try_from(echo.as_micros()).unwrap();
        Control::Heartbeat { nonce: 5, lease_ms: 1000, echo }
    };
    let left = |worker, lease_ms| Action::Tell(worker, Control::Heartbeat { nonce: 5, lease_ms, echo: 0 });
    let answer = |lease_ms| vec![Action::Reply(Control::Pulse { nonce: 5 }), left(1, lease_ms), left(2, lease_ms)];
    let now = node.now.duration_since(begun);
    assert_eq!(node.ask(heartbeat(now.saturating_sub(Duration::from_millis(600)))), answer(400));
    // One that was under way for longer changes nothing, and nobody can have heard what is not yet said.
    assert_eq!(node.ask(heartbeat(now.saturating_sub(Duration::from_millis(900)))), answer(400));
    assert_eq!(node.ask(heartbeat(Duration::MAX.min(Duration::from_micros(u64::MAX)))), answer(1000));
    let stops = |actions: Vec<Action>| actions.into_iter().filter(|a| matches!(a, Action::Stop(_))).collect::<Vec<_>>();
    assert_eq!(stops(node.tick_after(Duration::from_millis(800))), []);
    let why = "the lease is over: nothing was heard from the client".to_owned();
    assert_eq!(stops(node.tick_after(TICK)), [Action::Stop(why)]);
    assert_eq!(stops(node.tick_after(TICK)), []);

    // The lease goes on while the machine sleeps.
    let mut node = Node::ready(settings(1, 1));
    let wake = |slept| Input::Tick { orphaned: false, slept, running: &|_| Vec::new() };
    assert_eq!(stops(node.handle(wake(LEASE.saturating_sub(TICK)))), []);
    assert_eq!(stops(node.handle(wake(LEASE))).len(), 1);

    let mut node = Node::ready(settings(1, 1));
    let actions = node.handle(Input::Tick { orphaned: true, slept: Duration::ZERO, running: &|_| Vec::new() });
    assert_eq!(actions, [Action::Stop("the process that started the agent is gone".to_owned())]);
    assert_eq!(node.ask(Control::Goodbye(Bytes::new())), []);
    let mut node = Node::ready(settings(1, 1));
    assert_eq!(node.ask(Control::Goodbye(Bytes::new())), [Action::Stop("goodbye".to_owned())]);
}

/// When the client leaves, workers that ran a task are asked to end, others killed, and none is replaced or blamed. Where a
/// plugin has set something up, all are asked.
#[test]
fn used_workers_end_in_order() {
    let bye = |worker| Action::Tell(worker, Control::Goodbye(Bytes::new()));
    for unwind in [false, true] {
        let mut node = Node::ready(Settings { unwind, ..settings(3, 1) });
        node.submit([0, 1, 2]);
        node.result(1, task(0));
        node.result(2, task(1));
        node.submit([3]);
        let expected = if unwind { [bye(1), bye(2), bye(3)] } else { [Action::Kill(1), bye(2), Action::Kill(3)] };
        assert_eq!(node.handle(Input::Dismiss), expected);
        assert_eq!(node.exit(2, &[]), []);
        assert_eq!(node.handle(Input::KillAll), [Action::Kill(1), Action::Kill(3)]);
        assert_eq!(node.exit(1, &[3]), []);
    }
}

/// A note reaches the client under a number that names its worker, and the answer goes back to that worker only.
#[test]
fn notes_find_their_way_back() {
    let mut node = Node::ready(settings(2, 1));
    let mut sent = |worker, n| match &node.worker(worker, Event::Message(Body::Note, task(n)))[..] {
        [Action::Deliver(Body::Note, message)] => message.id.task,
        other => panic!("{other:?}"),
    };
    let (first, second) = (sent(1, 1), sent(2, 1));
    assert_ne!(first, second);
    // The same number again: the client takes each once.
    assert_eq!(node.worker(1, Event::Message(Body::Note, task(1))), []);
    let error = Bytes::from_static(b"no");
    let answer = |worker| Action::Tell(worker, Control::NoteAnswer { note: 1, error: error.clone() });
    for (note, worker) in [(second, 2), (first, 1)] {
        assert_eq!(node.ask(Control::NoteAnswer { note, error: error.clone() }), [answer(worker)]);
    }
}

/// What a note asked for goes to its worker, too, under the worker's own number.
#[test]
fn answers_find_their_way_back() {
    let mut node = Node::ready(settings(1, 1));
    let [Action::Deliver(Body::Note, sent)] = &node.worker(1, Event::Message(Body::Note, task(1)))[..] else {
        panic!("no note")
    };
    let number = sent.id;
    let content = |id| Message { id, parts: vec![Bytes::from_static(b"content")], ..Message::default() };
    let answer = Event::Message(Body::Answer, content(number));
    assert_eq!(node.client(answer), [Action::Answer(1, content(id(1)))]);
    let [Action::Deliver(Body::Note, sent)] = &node.worker(1, Event::Message(Body::Note, task(2)))[..] else {
        panic!("no note")
    };
    let number = sent.id;
    let actions = node.client(Event::NoMemory(Body::Answer, number, 9));
    assert!(matches!(&actions[..], [Action::Tell(1, Control::NoteAnswer { note: 2, error })] if !error.is_empty()));
    // No worker sends answers.
    let offer = Offer { body: Body::Answer, id: id(1), size: 9, unfinished: 0 };
    assert!(node.state.admit(1, &offer).is_err());
}

fn of_generation(generation: u32, n: u64) -> Message {
    Message { generation, ..task(n) }
}

impl Node {
    fn submit_of(&mut self, generation: u32, tasks: impl IntoIterator<Item = u64>) -> Vec<Action> {
        let tasks = tasks.into_iter().map(|n| Event::Message(Body::Task, of_generation(generation, n)));
        self.handle(Input::Client(&mut tasks.collect()))
    }
}

/// A task of another generation gets fresh workers. Those of before end what they hold, however long it takes, and are then
/// asked to end; those that hold nothing go at once, the spare too.
#[test]
fn tasks_of_another_generation_get_fresh_workers() {
    let mut node = Node::ready(settings(2, 1));
    assert_eq!(node.tick_after(SPARE_DELAY), [Action::Start(3)]);
    assert_eq!(node.submit([0]), [assign(1, 0)]);
    let actions = node.submit_of(1, [1, 2]);
    assert_eq!(actions, [Action::Kill(3), Action::Start(4), Action::Start(5), Action::Kill(2)]);
    assert_eq!(node.exit(2, &[]), []);
    assert_eq!(node.exit(3, &[]), []);
    assert_eq!(node.state.generation(), 1);
    assert_eq!(node.tick_after(10 * RETIREMENT), [Action::Start(6)], "a spare; task 0 has no time limit");
    assert_eq!(node.hello(4), [Action::Assign(4, of_generation(1, 1))]);
    assert_eq!(node.hello(5), [Action::Assign(5, of_generation(1, 2))]);
    let bye = Action::Tell(1, Control::Goodbye(Bytes::new()));
    assert_eq!(node.result(1, task(0)), [deliver(task(0)), bye]);
    assert_eq!(node.exit(1, &[]), []);
}

/// Neither of two calls of different generations keeps the other one out: what has arrived of one runs, then what has
/// arrived of the other. A task that waits for its workers can be recalled and cancelled.
#[test]
fn generations_take_turns() {
    let mut node = Node::ready(settings(1, 1));
    assert_eq!(node.submit([0]), [assign(1, 0)]);
    // Task 1 waits for the worker, so nothing changes yet; task 4 waits behind those of the other generation.
    assert_eq!(node.submit([1]), []);
    assert_eq!(node.submit_of(1, [2, 3]), []);
    assert_eq!(node.submit([4, 5]), []);
    assert_eq!(node.ask(Control::Recall(id(3))), [Action::Reply(Control::GivenBack(id(3)))]);
    assert_eq!(node.ask(Control::Cancel(id(5))), [cancelled(5)]);
    assert_eq!(node.result(1, task(0)), [deliver(task(0)), assign(1, 1), Action::Start(2)]);
    assert_eq!(node.hello(2), [Action::Assign(2, of_generation(1, 2)), Action::Start(3)]);
    assert_eq!(node.hello(3), [assign(3, 4)]);
    assert_eq!(node.state.counts(), (3, 0));
}

/// A task that is aborted in an outdated worker has as much time to end as in any other, so that the worker can end in order.
#[test]
fn outdated_workers_whose_tasks_are_aborted() {
    let mut node = Node::ready(settings(1, 1));
    node.submit([0]);
    node.submit_of(1, [1]);
    node.ask(Control::Abort(id(0)));
    assert_eq!(node.tick_after(a_tick_less(ABORT_GRACE)), []);
    let actions = node.tick_after(TICK);
    assert_eq!(actions, [Action::Kill(1)]);
}

/// Tasks of another generation do not wait for crash suspects that run alone, however long these take.
#[test]
fn suspects_do_not_keep_another_generation_out() {
    let mut node = Node::ready(settings(1, 2));
    node.submit(0..2);
    assert_eq!(node.exit(1, &[0, 1]), [Action::Start(2), Action::Start(3), Action::Start(4)]);
    assert_eq!(node.submit_of(1, [2]), [], "suspects wait for their processes");
    assert_eq!(node.hello(2), []);
    assert_eq!(node.hello(3), [assign(3, 0)]);
    let actions = node.hello(4);
    assert_eq!(actions, [assign(4, 1), Action::Start(5), Action::Kill(2)]);
    assert_eq!(node.exit(2, &[]), []);
    assert_eq!(node.hello(5), [Action::Assign(5, of_generation(1, 2))]);
    let why = "node n: worker process 7 exited with status 3 while it ran this task";
    assert_eq!(node.exit(3, &[0]), [crashed(0, why)]);
    let bye = Action::Tell(4, Control::Goodbye(Bytes::new()));
    assert_eq!(node.result(4, task(1)), [deliver(task(1)), bye]);
    assert_eq!(node.exit(4, &[]), []);
}

/// When an outdated worker dies, its task is the cause if it alone ran there; others run again in fresh workers of their own
/// generation.
#[test]
fn outdated_workers_that_die() {
    let mut node = Node::ready(settings(1, 2));
    node.submit([0, 1, 2]);
    assert_eq!(node.submit_of(1, [3]), [Action::Start(2)]);
    assert_eq!(node.hello(2), [Action::Assign(2, of_generation(1, 3))]);
    assert_eq!(node.exit(1, &[0, 1]), [Action::Start(3)]);
    assert_eq!(node.hello(3), [assign(3, 1), assign(3, 0), assign(3, 2)]);
    assert_eq!(node.submit_of(1, [4]), [Action::Start(4)]);
    let why = "node n: worker process 7 exited with status 3 while it ran this task";
    assert_eq!(node.exit(3, &[1]), [crashed(1, why)]);
    assert_eq!(node.hello(4), [Action::Assign(4, of_generation(1, 4)), Action::Start(5)]);
    assert_eq!(node.hello(5), [assign(5, 0), assign(5, 2)]);
}

/// Notes beyond their credit wait until earlier ones are answered. One may always be on its way.
#[test]
fn notes_wait_for_credit() {
    let mut node = Node::ready(settings(1, 1));
    let mut notes: Vec<_> = (0..3).map(|n| Event::Message(Body::Note, sized(n, NOTE_CREDIT / 2))).collect();
    let sent = |actions: &[Action]| match actions {
        [Action::Deliver(Body::Note, message), ..] => message.id.task,
        other => panic!("{other:?}"),
    };
    let actions = node.handle(Input::Worker(1, &mut notes));
    assert_eq!(actions.len(), 1, "{actions:?}");
    let mut last = sent(&actions);
    for n in 0..3 {
        let actions = node.ask(Control::NoteAnswer { note: last, error: Bytes::new() });
        assert_eq!(actions.last(), Some(&Action::Tell(1, Control::NoteAnswer { note: n, error: Bytes::new() })));
        if n < 2 {
            last = sent(&actions);
        }
    }
}

/// An answer counts only from the worker that holds the task. No other one ends it, gives it back, or lifts its abort.
#[test]
fn forged_answers_count_for_their_worker_only() {
    let mut node = Node::ready(settings(2, 1));
    node.submit([0, 1]);
    node.ask(Control::Abort(id(0)));
    assert_eq!(node.result(2, task(0)), []);
    assert_eq!(node.answer(2, Control::GivenBack(id(0))), []);
    assert_eq!(node.answer(2, Control::RecallRefused(id(0))), []);
    assert_eq!(node.result(1, Message { id: Attempt { task: 0, attempt: 1 }, ..task(0) }), []);
    let actions = node.tick_after(ABORT_GRACE);
    assert_eq!(actions, [Action::Start(3), Action::Kill(1)]);
    let offer = |body, task, unfinished| Offer { body, id: id(task), size: 300 * MIB, unfinished };
    assert!(node.state.admit(1, &offer(Body::Result, 0, 0)).unwrap());
    assert!(!node.state.admit(2, &offer(Body::Result, 0, 0)).unwrap());
    assert!(node.state.admit(2, &offer(Body::Note, 9, 0)).unwrap());
    assert!(!node.state.admit(2, &offer(Body::Note, 9, 1)).unwrap());
    assert!(node.state.admit(2, &offer(Body::Task, 9, 0)).is_err());
}

/// Where memory runs out for a message, its task ends or its note is answered.
#[test]
fn messages_without_memory_are_answered() {
    let mut node = Node::ready(settings(1, 1));
    let text = "node n: no memory for a task of 9 bytes in its agent";
    assert_eq!(node.client(Event::NoMemory(Body::Task, id(5), 9)), [crashed(5, text)]);
    node.submit([0, 1]);
    let text = "node n: the task has ended, but the agent has no memory for its result of 9 bytes";
    assert_eq!(node.worker(1, Event::NoMemory(Body::Result, id(0), 9)), [crashed(0, text), assign(1, 1)]);
    assert_eq!(node.worker(1, Event::Skipped(Body::Result, id(1))), [cancelled(1)]);
    for event in [Event::Skipped(Body::Note, id(3)), Event::NoMemory(Body::Note, id(3), 9)] {
        let actions = node.worker(1, event);
        assert!(matches!(&actions[..], [Action::Tell(1, Control::NoteAnswer { note: 3, error })] if !error.is_empty()));
    }
}

// ----------------------------------------------------------------------------------------------------------- blobs

/// A task waits for the last of its blobs, and tasks without blobs do not wait for it. Each worker gets each descriptor
/// once, ahead of the first task that names the blob.
#[test]
fn tasks_wait_for_their_blobs() {
    let mut node = Node::ready(settings(2, 1));
    let assign = |worker, n, blobs: &[u64]| Action::Assign(worker, naming(n, blobs));
    assert_eq!(node.submit_naming(0, &[7, 8, 7]), []);
    assert_eq!(node.submit_naming(0, &[7, 8, 7]), []);
    assert_eq!(node.submit([1]), [assign(1, 1, &[])]);
    assert_eq!(node.handle(Input::BlobComplete(7)), []);
    assert_eq!(node.state.counts(), (2, 0));
    assert_eq!(node.handle(Input::BlobComplete(8)), [pass(2, 7), pass(2, 8), assign(2, 0, &[7, 8, 7])]);
    assert_eq!(node.result(1, task(1)), [deliver(task(1))]);
    assert_eq!(node.submit_naming(2, &[8]), [pass(1, 8), assign(1, 2, &[8])]);
    assert_eq!(node.result(1, task(2)), [deliver(task(2))]);
    assert_eq!(node.submit_naming(3, &[8]), [assign(1, 3, &[8])]);
    // A worker in the place of another one has nothing.
    assert_eq!(node.exit(1, &[]), [Action::Start(3)]);
    assert_eq!(node.hello(3), [pass(3, 8), assign(3, 3, &[8])]);
}

/// What the client does not want any more need not wait for its blobs to arrive.
#[test]
fn tasks_that_wait_for_blobs_can_be_taken_back() {
    let mut node = Node::ready(settings(1, 4));
    (0..4).for_each(|n| drop(node.submit_naming(n, &[7])));
    assert_eq!(node.ask(Control::Cancel(id(0))), [cancelled(0)]);
    assert_eq!(node.ask(Control::Abort(id(1))), [cancelled(1)]);
    assert_eq!(node.ask(Control::Recall(id(2))), [Action::Reply(Control::GivenBack(id(2)))]);
    assert_eq!(node.handle(Input::BlobComplete(7)), [pass(1, 7), Action::Assign(1, naming(3, &[7]))]);
    node.ask(Control::Cancel(id(4)));
    assert_eq!(node.submit_naming(4, &[9]), [cancelled(4)]);
}

/// A blob that cannot be stored ends the tasks that name it, those that come later as well, until it is forgotten; the client
/// hears of it once.
#[test]
fn tasks_without_their_blobs_crash() {
    let mut node = Node::ready(settings(1, 4));
    node.submit_naming(0, &[7, 8]);
    let lost = Action::Reply(Control::BlobLost { number: 7 });
    let failed = node.handle(Input::BlobFailed(7, "no room".to_owned()));
    assert_eq!(failed, [lost, crashed(0, "node n: no room")]);
    assert_eq!(node.submit_naming(1, &[7]), [crashed(1, "node n: no room")]);
    assert_eq!(node.handle(Input::BlobComplete(8)), []);
    assert_eq!(node.ask(Control::Forget(vec![7])), []);
    assert_eq!(node.state.counts(), (0, 0));
}

/// A blob that is forgotten is freed here and in the workers that have it. A task that names it all the same ends.
#[test]
fn forgotten_blobs_are_freed() {
    let why = "the client told the node to forget data that this task needs";
    let mut node = Node::ready(settings(2, 1));
    let forget = |worker, blob| Action::Tell(worker, Control::Forget(vec![blob]));
    node.handle(Input::BlobComplete(7));
    node.submit_naming(0, &[7]);
    node.submit_naming(1, &[]);
    assert_eq!(node.submit_naming(2, &[7]), []);
    assert_eq!(node.submit_naming(3, &[8]), []);
    let freed = [forget(1, 7), Action::DropBlob(7), Action::DropBlob(8), crashed(3, why)];
    assert_eq!(node.ask(Control::Forget(vec![7, 8])), freed);
    assert_eq!(node.result(2, task(1)), [deliver(task(1)), crashed(2, why)]);
    assert_eq!(node.state.counts(), (1, 0));
}

/// A crash suspect's own process gets the blobs that the suspect names.
#[test]
fn suspects_get_their_blobs() {
    let mut node = Node::ready(settings(1, 2));
    node.handle(Input::BlobComplete(7));
    node.submit_naming(0, &[7]);
    node.submit_naming(1, &[7]);
    let started = node.exit(1, &[0, 1]);
    assert_eq!(started, [Action::Start(2), Action::Start(3), Action::Start(4)]);
    let actions: Vec<_> = (2..=4).flat_map(|worker| node.hello(worker)).collect();
    for (worker, n) in [(3, 0), (4, 1)] {
        let at = actions.iter().position(|action| *action == pass(worker, 7)).expect("not passed");
        let next = actions.get(at + 1);
        assert_eq!(next, Some(&Action::Assign(worker, naming(n, &[7]))), "{actions:?}");
    }
}

// ------------------------------------------------------------------------------------------------------ any order

/// A worker process as `worker.rs` has it, whose messages take their time both ways.
#[derive(Default)]
struct Process {
    to_worker: VecDeque<Event>,
    to_agent: VecDeque<Event>,
    queue: VecDeque<u64>,
    running: Vec<(u64, Instant)>,
    cancelled_in_advance: HashSet<u64>,
    /// The blobs of which it has descriptors.
    blobs: HashSet<u64>,
    greeted: bool,
    killed: bool,
    /// Of the tasks that it runs.
    generation: u32,
}

impl Process {
    /// Take in the next message from the agent.
    fn receive(&mut self) -> bool {
        let unqueue = |queue: &mut VecDeque<u64>, task| {
            let at = queue.iter().position(|t| *t == task);
            at.and_then(|at| queue.remove(at)).is_some()
        };
        let answer = match self.to_worker.pop_front() {
            None => return false,
            Some(Event::Message(_, task)) if self.cancelled_in_advance.remove(&task.id.task) => {
                Event::Message(Body::Result, Message::cancelled(task.id))
            }
            Some(Event::Message(_, task)) => {
                assert!(task.blobs.iter().all(|blob| self.blobs.contains(&blob.number)), "no descriptor: {task:?}");
                self.queue.push_back(task.id.task);
                return true;
            }
            Some(Event::Control(Control::Cancel(id))) => {
                if unqueue(&mut self.queue, id.task) {
                    Event::Message(Body::Result, Message::cancelled(id))
                } else if self.running.iter().any(|(task, _)| *task == id.task) {
                    Event::Control(Control::RecallRefused(id))
                } else {
                    self.cancelled_in_advance.insert(id.task);
                    return true;
                }
            }
            Some(Event::Control(Control::Recall(id))) => Event::Control(if unqueue(&mut self.queue, id.task) {
                Control::GivenBack(id)
            } else {
                Control::RecallRefused(id)
            }),
            Some(Event::Control(Control::Descriptor { number, .. })) => {
                assert!(self.blobs.insert(number), "blob {number} is passed twice");
                return true;
            }
            Some(Event::Control(Control::Forget(blobs))) => {
                assert!(blobs.iter().all(|blob| self.blobs.remove(blob)), "{blobs:?} were not here");
                return true;
            }
            Some(Event::Control(Control::Goodbye(_))) => {
                assert!(self.queue.is_empty() && self.running.is_empty(), "asked to end with tasks");
                self.killed = true;
                return true;
            }
            Some(_) => return true,
        };
        self.to_agent.push_back(answer);
        true
    }

    fn begin(&mut self, slots: usize, now: Instant) -> bool {
        let free = self.running.len() < slots;
        let task = if free { self.queue.pop_front() } else { None };
        self.running.extend(task.map(|task| (task, now)));
        task.is_some()
    }

    fn end(&mut self, at: usize, large: &Bytes) -> bool {
        if self.running.is_empty() {
            return false;
        }
        let (n, _) = self.running.remove(at % self.running.len());
        // 50 to 200 MiB: one or two of them fill the agent's backlog.
        let parts = if n % 3 == 0 { (0..=n % 4).map(|_| large.clone()).collect() } else { Vec::new() };
        self.to_agent.push_back(Event::Message(Body::Result, Message { parts, ..task(n) }));
        true
    }
}

/// A blob as the client and the node's files have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blob {
    Arriving,
    Complete,
    /// There was no room for it.
    Lost,
    Forgotten,
}

/// A node with a client and processes that do anything in any order.
struct World {
    node: Node,
    slots: usize,
    processes: BTreeMap<usize, Process>,
    /// The next task's number.
    next: u64,
    /// How each task ended, for the client.
    ends: HashMap<u64, &'static str>,
    unacknowledged: Vec<u64>,
    /// Tasks that ran in some process at its end.
    ran_at_an_end: HashSet<u64>,
    /// All blobs that the client began to send, by their numbers.
    blobs: Vec<Blob>,
    /// Which blobs each task names.
    named: HashMap<u64, Vec<u64>>,
    /// Blobs that the client forgot although tasks named them.
    betrayed: HashSet<u64>,
    /// The generation of the tasks that the client sends now.
    generation: u32,
    /// So many of the next starts fail.
    failing: u8,
    stopped: bool,
    /// The agent read from no worker after the last step.
    was_full: bool,
    large: Bytes,
}

impl World {
    fn new(processes: usize, slots: usize, timed: bool) -> Self {
        let task_timeout = timed.then_some(Duration::from_secs(4));
        let mut world = Self {
            node: Node::new(Settings { task_timeout, ..settings(processes, slots) }),
            slots,
            processes: BTreeMap::new(),
            next: 0,
            ends: HashMap::new(),
            unacknowledged: Vec::new(),
            ran_at_an_end: HashSet::new(),
            blobs: Vec::new(),
            named: HashMap::new(),
            betrayed: HashSet::new(),
            generation: 0,
            failing: 0,
            stopped: false,
            was_full: false,
            large: Bytes::from(vec![0; 50 * MIB]),
        };
        let actions = world.node.handle(Input::Begin);
        world.obey(actions);
        world
    }

    /// Carry actions out, and look at what they say.
    fn obey(&mut self, actions: Vec<Action>) {
        let mut actions = VecDeque::from(actions);
        let mut reads_again = false;
        while let Some(action) = actions.pop_front() {
            match action {
                Action::Start(worker) if self.failing > 0 => {
                    self.failing -= 1;
                    actions.extend(self.node.handle(Input::NotStarted(worker, "no".to_owned())));
                }
                Action::Start(worker) => {
                    let process = Process { generation: self.node.state.generation(), ..Process::default() };
                    self.processes.insert(worker, process);
                }
                Action::Kill(worker) => self.processes.get_mut(&worker).expect("nobody to kill").killed = true,
                Action::Assign(worker, task) => {
                    let process = self.processes.get_mut(&worker).expect("nobody to run it");
                    assert_eq!(process.generation, task.generation, "a worker gets a task of another generation");
                    process.to_worker.push_back(Event::Message(Body::Task, task));
                }
                Action::Tell(worker, control) => {
                    if let Some(process) = self.processes.get_mut(&worker) {
                        process.to_worker.push_back(Event::Control(control));
                    }
                }
                Action::Deliver(_, result) => {
                    let task = result.id.task;
                    let is_blamed = result.code == Outcome::Crashed as u8;
                    let lacks = |blob: &u64| {
                        self.blobs[usize::try_from(*blob).unwrap()] == Blob::Lost || self.betrayed.contains(blob)
                    };
                    let is_blamed = is_blamed && !self.named.get(&task).is_some_and(|blobs| blobs.iter().any(lacks));
                    assert!(!is_blamed || self.ran_at_an_end.contains(&task), "blamed, and did not run: {result:?}");
                    self.unacknowledged.push(task);
                    assert_eq!(self.ends.insert(task, "result"), None, "task {task} ends twice");
                }
                Action::Reply(Control::GivenBack(id)) => {
                    assert_eq!(self.ends.insert(id.task, "given back"), None, "task {} ends twice", id.task);
                }
                Action::Pass(worker, number) => {
                    assert_eq!(self.blobs[usize::try_from(number).unwrap()], Blob::Complete);
                    let process = self.processes.get_mut(&worker).expect("nobody to have it");
                    let control = Control::Descriptor { number, size: 1 };
                    process.to_worker.push_back(Event::Control(control));
                }
                Action::DropBlob(number) => {
                    assert_eq!(self.blobs[usize::try_from(number).unwrap()], Blob::Forgotten);
                }
                Action::Stop(_) => self.stopped = true,
                Action::Answer(..) => panic!("an answer to no note"),
                Action::ReadWorkers => reads_again = true,
                Action::Reply(_) => {}
            }
        }
        let is_full = self.node.state.is_full();
        assert_eq!(reads_again, self.was_full && !is_full, "the workers are read from again at the wrong time");
        self.was_full = is_full;
        let (unfinished, backlog) = self.node.state.counts();
        assert_eq!(self.next, (unfinished + backlog + self.ends.len()) as u64, "a task is lost or in two places");
    }

    fn ask(&mut self, control: Control) {
        let actions = self.node.ask(control);
        self.obey(actions);
    }

    fn submit(&mut self) {
        self.next += 1;
        let task = Message { generation: self.generation, ..task(self.next - 1) };
        let actions = self.node.client(Event::Message(Body::Task, task));
        self.obey(actions);
    }

    /// Send a task that names a new blob, or one of those that the client has not forgotten, or both.
    fn submit_naming(&mut self, which: u8, more: u8) {
        let old = usize::from(which) % self.blobs.len().max(1);
        let mut named = Vec::new();
        if !more.is_multiple_of(3) && self.blobs.get(old).is_some_and(|blob| *blob != Blob::Forgotten) {
            named.push(old as u64);
        }
        if !more.is_multiple_of(2) || named.is_empty() {
            named.push(self.blobs.len() as u64);
            self.blobs.push(Blob::Arriving);
        }
        self.next += 1;
        self.named.insert(self.next - 1, named.clone());
        let task = Message { generation: self.generation, ..naming(self.next - 1, &named) };
        let actions = self.node.client(Event::Message(Body::Task, task));
        self.obey(actions);
    }

    /// The rest of a blob arrives, and is stored or not.
    fn bring(&mut self, blob: usize, is_lost: bool) {
        if self.blobs.get(blob) == Some(&Blob::Arriving) {
            let number = blob as u64;
            self.blobs[blob] = if is_lost { Blob::Lost } else { Blob::Complete };
            let no_room = Input::BlobFailed(number, "no room".to_owned());
            let actions = self.node.handle(if is_lost { no_room } else { Input::BlobComplete(number) });
            self.obey(actions);
        }
    }

    /// The client forgets a blob: one that no task needs, or any at all if the client is broken.
    fn forget(&mut self, blob: usize, is_broken: bool) {
        let number = blob as u64;
        let needs = |(task, blobs): (&u64, &Vec<u64>)| blobs.contains(&number) && !self.ends.contains_key(task);
        let is_needed = self.named.iter().any(needs);
        if self.blobs.get(blob).is_none_or(|blob| *blob == Blob::Forgotten) || (is_needed && !is_broken) {
            return;
        }
        if is_needed {
            self.betrayed.insert(number);
        }
        if self.blobs[blob] != Blob::Lost {
            self.blobs[blob] = Blob::Forgotten;
        }
        self.ask(Control::Forget(vec![number]));
        self.blobs[blob] = Blob::Forgotten;
    }

    /// Hand what a process sent to the agent, unless that does not read.
    fn report(&mut self, worker: usize, most: usize) -> bool {
        let Some(process) = self.processes.get_mut(&worker) else { return false };
        if self.node.state.is_full() || process.to_agent.is_empty() {
            return false;
        }
        let most = most.min(process.to_agent.len());
        let mut events = process.to_agent.drain(..most).collect();
        let actions = self.node.handle(Input::Worker(worker, &mut events));
        self.obey(actions);
        true
    }

    fn end_process(&mut self, worker: usize, unreadable: bool) {
        while !unreadable && self.report(worker, usize::MAX) {}
        let Some(process) = self.processes.remove(&worker) else { return };
        let age = |since| self.node.now.saturating_duration_since(since);
        let running: Vec<_> = process.running.iter().map(|(task, since)| (id(*task), age(*since))).collect();
        self.ran_at_an_end.extend(running.iter().map(|(id, _)| id.task));
        if unreadable {
            // Whatever it was sent may have begun.
            let sent = process.to_worker.iter().filter_map(|event| match event {
                Event::Message(_, task) => Some(task.id.task),
                _ => None,
            });
            self.ran_at_an_end.extend(sent.chain(process.queue.iter().copied()));
            let ended = process.to_agent.iter().filter_map(|event| match event {
                Event::Message(_, result) => Some(result.id.task),
                Event::Control(Control::GivenBack(id)) => Some(id.task),
                _ => None,
            });
            self.ran_at_an_end.extend(ended);
        }
        let unreadable = unreadable.then(|| "nonsense".to_owned());
        let exit = Exit { how: "ended".to_owned(), running, unreadable, ..Exit::default() };
        let actions = self.node.handle(Input::Exited(worker, exit));
        self.obey(actions);
    }

    fn tick(&mut self, time: Duration) {
        self.node.now += time;
        let (now, processes) = (self.node.now, &self.processes);
        let running = |worker| {
            let process: &Process = &processes[&worker];
            process.running.iter().map(|(task, since)| (id(*task), now.saturating_duration_since(*since))).collect()
        };
        let mut actions = Vec::new();
        self.node.state.handle(
            Input::Tick { orphaned: false, slept: Duration::ZERO, running: &running },
            now,
            &mut actions,
        );
        assert!(self.node.state.is_consistent(), "{:#?}", self.node.state);
        self.obey(actions);
    }

    fn greet(&mut self, worker: usize) {
        if let Some(process) = self.processes.get_mut(&worker)
            && !std::mem::replace(&mut process.greeted, true)
        {
            process.to_agent.push_front(Event::Control(Control::Hello(Bytes::new())));
        }
    }

    fn step(&mut self, (deed, which, more): (u8, u8, u8)) {
        let workers: Vec<_> = self.processes.keys().copied().collect();
        let worker = workers.get(usize::from(which) % workers.len().max(1)).copied().unwrap_or_default();
        // One that was not submitted yet as well: control frames overtake messages.
        let task = id(u64::from(which) % (self.next + 1));
        let (slots, now, large) = (self.slots, self.node.now, self.large.clone());
        let mut process = self.processes.get_mut(&worker);
        match deed % 29 {
            0..4 => self.submit(),
            4 => self.greet(worker),
            5..8 => (0..=more % 4).for_each(|_| _ = process.as_mut().map(|process| process.receive())),
            8..11 => _ = process.map(|process| process.begin(slots, now)),
            11..14 => _ = process.map(|process| process.end(usize::from(more), &large)),
            14..17 => _ = self.report(worker, usize::from(1 + more % 4)),
            17 => self.ask(Control::Cancel(task)),
            18 => self.ask(Control::Abort(task)),
            19 => self.ask(Control::Recall(task)),
            // Rarely a process that has not greeted: three of these in a row end the node.
            20 if more < 4 || (more < 128 && process.is_some_and(|process| process.greeted)) => {
                self.end_process(worker, more % 8 == 0);
            }
            20 => self.failing = u8::from(more > 252),
            21 => self.tick(Duration::from_millis(u64::from(more) * 10)),
            24 | 25 => self.submit_naming(which, more),
            26 => self.bring(usize::from(which) % self.blobs.len().max(1), more % 8 == 0),
            28 => self.generation = u32::from(more % 3),
            27 => self.forget(usize::from(which) % self.blobs.len().max(1), more % 8 == 0),
            _ => {
                let taken = self.unacknowledged.split_off(self.unacknowledged.len() / 2);
                self.ask(Control::Acknowledge(taken.into_iter().map(id).collect()));
            }
        }
    }

    /// Let everything go its way without further trouble.
    fn finish(&mut self) {
        self.failing = 0;
        (0..self.blobs.len()).for_each(|blob| self.bring(blob, false));
        for _ in 0..10_000 {
            let heartbeat = Control::Heartbeat { nonce: 0, lease_ms: 60_000, echo: 0 };
            self.ask(heartbeat);
            for worker in self.processes.keys().copied().collect::<Vec<_>>() {
                self.greet(worker);
                let (slots, now, large) = (self.slots, self.node.now, self.large.clone());
                let Some(process) = self.processes.get_mut(&worker) else { continue };
                if process.killed {
                    self.end_process(worker, false);
                    continue;
                }
                while process.receive() {}
                while process.begin(slots, now) {}
                while process.end(0, &large) {}
                self.report(worker, usize::MAX);
                let taken = std::mem::take(&mut self.unacknowledged);
                self.ask(Control::Acknowledge(taken.into_iter().map(id).collect()));
            }
            if self.stopped || self.ends.len() as u64 == self.next {
                return;
            }
            self.tick(TICK);
        }
        panic!("{} of {} tasks have ended: {:#?}", self.ends.len(), self.next, self.node.state);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    /// In any order of submits, generations, blobs, cancels, aborts, recalls, late answers, crashes, failed starts, timeouts and
    /// acknowledgements, each task is in one place, runs in workers of its generation and ends once, all credit is counted, and only tasks
    /// that ran are blamed.
    #[test]
    fn every_task_ends_once(
        shape in prop_oneof![Just((1, 1)), Just((1, 3)), Just((2, 1)), Just((3, 1))],
        timed in any::<bool>(),
        steps in proptest::collection::vec(any::<(u8, u8, u8)>(), 1..400),
    ) {
        let mut world = World::new(shape.0, shape.1, timed);
        for step in steps {
            world.step(step);
            if world.stopped {
                return Ok(());
            }
        }
        world.finish();
    }
}
