//! The scheduler, without a socket or a clock of its own.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proptest::prelude::*;
use skyward_lite::queue::{Cancelled, Queue};
use skyward_lite::timing::WINDOW;
use skyward_lite::wire::{Attempt, Message};

#[path = "support/queue.rs"]
mod support;
use support::{assign_all, id, queue, task};

/// Tasks leave in the order in which they came.
#[test]
fn first_in_first_out() {
    let mut queue = queue(&[(1, 10)], 10);
    assert_eq!(assign_all(&mut queue), (0..10).map(|n| (1, n)).collect::<Vec<_>>());
}

/// Every slot of every peer is filled before any peer gets a task in advance.
#[test]
fn slots_before_prefetch() {
    let mut queue = queue(&[(1, 2), (2, 6)], 8);
    let mut count = HashMap::new();
    for (peer, _) in assign_all(&mut queue) {
        *count.entry(peer).or_insert(0) += 1;
    }
    assert_eq!(count, HashMap::from([(1, 2), (2, 6)]));
}

/// A peer holds its slots and as much again, and the rest waits.
#[test]
fn prefetch_is_bounded() {
    let mut queue = queue(&[(1, 5)], 100);
    assert_eq!(assign_all(&mut queue).len(), 10);
    assert_eq!(queue.waiting(), 90);
}

/// A free slot takes a task of any size; a task beyond the slots must fit the window: the example of `Peer::has_room`.
#[test]
fn the_window_counts_tasks_beyond_the_slots() {
    let mib = |n: usize| vec![Bytes::from(vec![0; n << 20])];
    for (size, fits) in [(60, true), (70, false)] {
        let mut queue = queue(&[(1, 2)], 0);
        for (n, size) in [(0, 100), (1, 100), (2, size)] {
            queue.push(Message { parts: mib(size), ..task(n) });
        }
        assert_eq!(assign_all(&mut queue).len(), if fits { 3 } else { 2 });
    }
}

/// Large payloads fill a peer's slots whatever their size, but are not sent in advance beyond the window.
#[test]
fn prefetch_is_bounded_in_bytes() {
    let mut queue = queue(&[(1, 4)], 0);
    let large = Bytes::from(vec![0; WINDOW / 2]);
    for n in 0..20 {
        queue.push(Message { parts: vec![large.clone()], ..task(n) });
    }
    assert_eq!(assign_all(&mut queue).len(), 6);
    let huge = Bytes::from(vec![0; WINDOW + 1]);
    let mut queue = support::queue(&[(1, 4)], 0);
    for n in 0..20 {
        queue.push(Message { parts: vec![huge.clone()], ..task(n) });
    }
    assert_eq!(assign_all(&mut queue).len(), 4);
}

/// A longer round trip at a high rate asks for more tasks in advance.
#[test]
fn prefetch_follows_the_round_trip() {
    let start = Instant::now();
    let mut queue = queue(&[(1, 2)], 10_000);
    queue.set_rtt(1, Duration::from_millis(80));
    let mut sent = assign_all(&mut queue);
    let (before, mut most) = (sent.len(), 0);
    for round in 1..=12_u32 {
        for (peer, n) in sent {
            assert!(queue.done(peer, id(n), start + Duration::from_millis(10) * round).is_some());
        }
        sent = assign_all(&mut queue);
        most = most.max(sent.len());
    }
    assert!(most > 4 * before, "{before} then {most}");
}

/// An answer from the wrong peer, of another attempt, or a second time is not an end.
#[test]
fn stale_answers_are_refused() {
    let now = Instant::now();
    let mut queue = queue(&[(1, 1), (2, 1)], 1);
    assert_eq!(queue.assign().map(|(peer, _)| peer), Some(1));
    assert!(queue.done(2, id(0), now).is_none());
    assert!(queue.done(1, Attempt { task: 0, attempt: 1 }, now).is_none());
    assert!(queue.done(1, id(5), now).is_none());
    assert!(queue.done(1, id(0), now).is_some());
    assert!(queue.done(1, id(0), now).is_none());
    assert!(queue.is_empty());
}

/// A peer that is full does not keep the others from being sent more.
#[test]
fn a_full_peer_does_not_block_the_others() {
    let start = Instant::now();
    let mut queue = queue(&[(1, 1)], 2);
    assert_eq!(assign_all(&mut queue).len(), 2);
    queue.add_peer(2, 1, start);
    queue.set_rtt(2, Duration::from_millis(80));
    (10..2000).for_each(|n| queue.push(task(n)));
    let mut sent = assign_all(&mut queue);
    for round in 1..=10_u32 {
        assert!(sent.iter().all(|&(peer, _)| peer == 2));
        for (peer, n) in sent {
            assert!(queue.done(peer, id(n), start + Duration::from_millis(20) * round).is_some());
        }
        sent = assign_all(&mut queue);
    }
    assert!(sent.len() > 4, "{}", sent.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Every task ends exactly once, in any order of events.
    #[test]
    fn every_task_ends_once(steps in prop::collection::vec((0_u8..10, any::<u8>()), 0..300)) {
        let start = Instant::now();
        let mut queue = Queue::default();
        let mut held: HashMap<usize, Vec<Attempt>> = HashMap::new();
        let mut ended: HashMap<u64, u32> = HashMap::new();
        let (mut tasks, mut peers) = (0_u64, 0_usize);
        let end = |ended: &mut HashMap<u64, u32>, task| *ended.entry(task).or_default() += 1;
        for (i, (step, pick)) in steps.into_iter().enumerate() {
            let now = start + Duration::from_millis(i as u64);
            let peer = held.keys().copied().min().map(|low| low + usize::from(pick) % held.len());
            let attempt = peer.and_then(|p| held.get(&p)).and_then(|h| h.get(usize::from(pick) % h.len().max(1))).copied();
            match step {
                0 => { peers += 1; queue.add_peer(peers, 1 + usize::from(pick) % 4, now); held.insert(peers, vec![]); }
                1 | 2 => for _ in 0..=pick % 8 { queue.push(task(tasks)); tasks += 1; },
                3 => if let (Some(p), Some(id)) = (peer, attempt) {
                    prop_assert!(queue.done(p, id, now).is_some());
                    held.get_mut(&p).unwrap().retain(|&h| h != id);
                    end(&mut ended, id.task);
                },
                4 => if let Some(p) = peer.filter(|p| held.contains_key(p)) {
                    held.remove(&p);
                    for task in queue.remove_peer(p).into_iter().rev() {
                        let announced = pick % 2 == 0;
                        if !(if announced { queue.requeue(task) } else { queue.retry(task, 3) }) {
                            prop_assert!(queue.remove(task).is_some());
                            end(&mut ended, task);
                        }
                    }
                },
                5 => if tasks > 0 {
                    let task = u64::from(pick) % tasks;
                    if queue.cancel(task) == Cancelled::Dropped { end(&mut ended, task); }
                },
                6 => if let Some((p, id)) = queue.steal(now) {
                    if pick % 2 == 0 {
                        prop_assert!(queue.given_back(p, id));
                        held.get_mut(&p).unwrap().retain(|&h| h != id);
                    } else {
                        queue.recall_refused(p, id);
                    }
                },
                7 => if let Some(p) = peer {
                    for (n, id) in queue.close_peer(p).into_iter().rev().enumerate() {
                        if n % 3 == 0 {
                            queue.recall_refused(p, id);
                        } else {
                            prop_assert!(queue.given_back(p, id));
                            held.get_mut(&p).unwrap().retain(|&h| h != id);
                        }
                    }
                },
                8 => if pick % 16 == 0 {
                    for id in queue.take_waiting() { end(&mut ended, id.task); }
                },
                _ => while let Some((p, message)) = queue.assign() { held.get_mut(&p).unwrap().push(message.id); },
            }
            for id in queue.take_cancelled() { end(&mut ended, id.task); }
            prop_assert_eq!(queue.len() + ended.len(), usize::try_from(tasks).unwrap());
        }
        for id in queue.take_all() { end(&mut ended, id.task); }
        prop_assert_eq!(queue.waiting(), 0);
        prop_assert!(ended.values().all(|&n| n == 1));
        prop_assert_eq!(ended.len() as u64, tasks);
    }
}

/// The oldest task may wait behind one that overtook it and may run for longer: it is allowed as much time.
#[test]
fn the_oldest_task_is_given_the_longest_time() {
    let mut queue = queue(&[(1, 2)], 0);
    for (n, nanos) in [(0, 5), (1, 90), (2, 7)] {
        queue.push(Message { nanos, ..task(n) });
    }
    assert_eq!(queue.oldest(1), None);
    assign_all(&mut queue);
    assert_eq!(queue.oldest(1), Some((1, 90)));
    assert!(queue.done(1, id(1), Instant::now()).is_some());
    assert_eq!(queue.oldest(1), Some((1, 7)));
    assert!(queue.done(1, id(0), Instant::now()).is_some());
    assert_eq!(queue.oldest(1), Some((3, 7)));
}

/// Only tasks that wait for any peer are taken.
#[test]
fn waiting_tasks_are_taken() {
    let mut queue = queue(&[(1, 1)], 5);
    assert_eq!(assign_all(&mut queue).len(), 2);
    assert_eq!(queue.cancel(3), Cancelled::Dropped);
    assert_eq!(queue.take_waiting(), [id(2), id(4)]);
    assert_eq!((queue.waiting(), queue.len()), (0, 2));
    assert!(queue.take_waiting().is_empty());
}

/// Local peers of one slot hold one task each until their rate shows that their tasks are short.
#[test]
fn no_task_waits_behind_a_long_one_of_a_local_peer() {
    let start = Instant::now();
    let mut queue = Queue::local();
    queue.add_peer(1, 1, start);
    queue.add_peer(2, 4, start);
    (0..20).for_each(|n| queue.push(task(n)));
    let held = assign_all(&mut queue);
    assert_eq!(held.iter().filter(|(peer, _)| *peer == 1).count(), 1);
    assert_eq!(held.iter().filter(|(peer, _)| *peer == 2).count(), 8);
    let mut queue = Queue::local();
    queue.add_peer(1, 1, start);
    (0..2000).for_each(|n| queue.push(task(n)));
    let mut now = start;
    for n in 0..500 {
        assign_all(&mut queue);
        now += Duration::from_micros(250);
        assert!(queue.done(1, id(n), now).is_some());
    }
    assign_all(&mut queue);
    assert!(queue.held(1).count() > 5, "4,000 tasks/s want some in advance");
}
