//! The scheduler, without a socket or a clock of its own.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proptest::prelude::*;
use skyward_lite::queue::{Cancelled, Queue};
use skyward_lite::timing::WINDOW;
use skyward_lite::wire::{Attempt, Message};

fn id(task: u64) -> Attempt {
    Attempt { task, attempt: 0 }
}

fn task(n: u64) -> Message {
    Message { id: id(n), code: 0, nanos: 0, parts: vec![Bytes::from_static(b"x")] }
}

fn queue(peers: &[(usize, usize)], tasks: u64) -> Queue {
    let mut queue = Queue::default();
    for &(peer, slots) in peers {
        queue.add_peer(peer, slots, Instant::now());
    }
    (0..tasks).for_each(|n| queue.push(task(n)));
    queue
}

fn assign_all(queue: &mut Queue) -> Vec<(usize, u64)> {
    std::iter::from_fn(|| queue.assign()).map(|(peer, message)| (peer, message.id.task)).collect()
}

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
    let mut queue = self::queue(&[(1, 4)], 0);
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
            assert!(queue.done(peer, id(n), start + Duration::from_millis(10) * round));
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
    assert!(!queue.done(2, id(0), now));
    assert!(!queue.done(1, Attempt { task: 0, attempt: 1 }, now));
    assert!(!queue.done(1, id(5), now));
    assert!(queue.done(1, id(0), now));
    assert!(!queue.done(1, id(0), now));
    assert!(queue.is_empty());
}

/// The tasks of a lost peer run elsewhere, in their old order, ahead of those that wait, as another attempt.
#[test]
fn a_lost_peers_tasks_go_first() {
    let mut queue = queue(&[(1, 2)], 6);
    assert_eq!(assign_all(&mut queue).len(), 4);
    for task in queue.remove_peer(1).into_iter().rev() {
        assert!(queue.retry(task, 2));
    }
    queue.add_peer(2, 10, Instant::now());
    assert_eq!(assign_all(&mut queue), (0..6).map(|n| (2, n)).collect::<Vec<_>>());
    assert!(!queue.done(2, id(0), Instant::now()));
    assert!(queue.done(2, Attempt { task: 0, attempt: 1 }, Instant::now()));
    for task in queue.remove_peer(2).into_iter().filter(|&t| t < 4) {
        assert!(!queue.retry(task, 2), "the budget is two attempts");
        assert!(queue.remove(task).is_some());
    }
}

/// A waiting task is dropped at once; a task that a peer holds is left to that peer.
#[test]
fn cancelling() {
    let mut queue = queue(&[(1, 1)], 4);
    assign_all(&mut queue);
    assert_eq!(queue.cancel(3), Cancelled::Dropped);
    assert_eq!(queue.cancel(3), Cancelled::Unknown);
    assert_eq!(queue.cancel(0), Cancelled::Held(1));
    assert_eq!(queue.waiting(), 1);
    assert!(queue.done(1, id(0), Instant::now()));
    assert_eq!(assign_all(&mut queue), [(1, 2)]);
}

/// A task that was cancelled while a peer held it ends when it comes back, by a recall or with its peer's loss.
#[test]
fn cancelled_tasks_do_not_come_back() {
    let now = Instant::now();
    let mut queue = queue(&[(1, 2)], 4);
    assign_all(&mut queue);
    queue.add_peer(2, 4, now);
    assert_eq!(queue.steal(now), Some((1, id(3))));
    assert_eq!(queue.cancel(3), Cancelled::Held(1));
    assert_eq!(queue.cancel(2), Cancelled::Held(1));
    assert!(queue.returned(1, id(3)));
    assert_eq!(queue.take_cancelled(), [id(3)]);
    for task in queue.remove_peer(1).into_iter().rev() {
        assert!(queue.retry(task, 3));
    }
    assert_eq!(queue.take_cancelled(), [Attempt { task: 2, attempt: 1 }]);
    assert_eq!(assign_all(&mut queue), [(2, 0), (2, 1)]);
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
            assert!(queue.done(peer, id(n), start + Duration::from_millis(20) * round));
        }
        sent = assign_all(&mut queue);
    }
    assert!(sent.len() > 4, "{}", sent.len());
}

/// A task behind a long one is recalled, however fast its peer was before.
#[test]
fn tasks_behind_a_long_one_are_recalled() {
    let start = Instant::now();
    let mut queue = queue(&[(1, 1)], 1000);
    let mut now = start;
    for _ in 0..20 {
        now += Duration::from_millis(10);
        for (peer, n) in assign_all(&mut queue) {
            assert!(queue.done(peer, id(n), now));
        }
    }
    while queue.waiting() > 0 {
        now += Duration::from_millis(1);
        for (peer, n) in assign_all(&mut queue) {
            assert!(queue.done(peer, id(n), now));
        }
    }
    (1000..1003).for_each(|n| queue.push(task(n)));
    assert_eq!(assign_all(&mut queue).len(), 3);
    queue.add_peer(2, 1, now);
    assert_eq!(queue.steal(now), None, "it would be done before the answer came");
    assert!(queue.steal(now + Duration::from_secs(30)).is_some());
}

/// An idle peer gets tasks that a loaded one has not started, the newest first, and never those that are likely
/// running.
#[test]
fn idle_peers_steal() {
    let now = Instant::now();
    let mut queue = queue(&[(1, 2)], 4);
    assign_all(&mut queue);
    queue.add_peer(2, 4, now);
    assert_eq!(queue.steal(now), Some((1, id(3))));
    assert_eq!(queue.steal(now), Some((1, id(2))));
    assert_eq!(queue.steal(now), None);
    assert!(queue.returned(1, id(3)));
    queue.kept(1, id(2));
    assert_eq!(assign_all(&mut queue), [(2, 3)]);
    assert_eq!(queue.steal(now), None, "a refused recall is not repeated");
}

/// No more tasks are recalled than there are free slots.
#[test]
fn stealing_is_bounded_by_free_slots() {
    let now = Instant::now();
    let mut queue = queue(&[(1, 5)], 10);
    assign_all(&mut queue);
    queue.add_peer(2, 2, now);
    assert!(queue.steal(now).is_some());
    assert!(queue.steal(now).is_some());
    assert_eq!(queue.steal(now), None);
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
                    prop_assert!(queue.done(p, id, now));
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
                        prop_assert!(queue.returned(p, id));
                        held.get_mut(&p).unwrap().retain(|&h| h != id);
                    } else {
                        queue.kept(p, id);
                    }
                },
                7 => if let Some(p) = peer {
                    for (n, id) in queue.close_peer(p).into_iter().rev().enumerate() {
                        if n % 3 == 0 {
                            queue.kept(p, id);
                        } else {
                            prop_assert!(queue.returned(p, id));
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
        for id in queue.drain() { end(&mut ended, id.task); }
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
    assert!(queue.done(1, id(1), Instant::now()));
    assert_eq!(queue.oldest(1), Some((1, 7)));
    assert!(queue.done(1, id(0), Instant::now()));
    assert_eq!(queue.oldest(1), Some((3, 7)));
}

/// A closed peer keeps its tasks, is asked to give them back, and is sent no more but those for it alone.
#[test]
fn closed_peers_take_nothing_more() {
    let now = Instant::now();
    let mut queue = queue(&[(1, 2)], 3);
    assert_eq!(assign_all(&mut queue).len(), 3);
    assert_eq!(queue.cancel(1), Cancelled::Held(1));
    assert_eq!(queue.close_peer(1), [id(0), id(2)]);
    queue.push(task(3));
    assert_eq!(queue.assign(), None);
    assert!(queue.returned(1, id(2)));
    queue.add_peer(2, 4, now);
    assert_eq!(assign_all(&mut queue), [(2, 2), (2, 3)]);
    assert!(queue.done(1, id(0), now));
    assert_eq!(queue.held(1).collect::<Vec<_>>(), [id(1)]);
    assert_eq!(queue.remove_peer(1), [1]);
    assert_eq!(queue.give(2, 1).map(|m| m.id), Some(id(1)));
    assert_eq!(queue.give(2, 1), None);
    assert!(queue.done(2, id(1), now));
}

/// An orphan is not given up to the supplier that recalls it, and can be cancelled.
#[test]
fn orphans_are_not_recalled() {
    let mut queue = queue(&[(1, 1)], 1);
    assert_eq!(assign_all(&mut queue).len(), 1);
    queue.remove_peer(1);
    assert!(queue.is_orphan(0));
    assert_eq!(queue.give_up(0), Cancelled::Unknown);
    assert_eq!(queue.cancel(0), Cancelled::Dropped);
    assert!(!queue.is_orphan(0));
}

/// A task for one peer is sent at once, moves nowhere, and is not tried elsewhere.
#[test]
fn pinned_tasks_stay_where_they_are() {
    let now = Instant::now();
    let mut queue = queue(&[(1, 1)], 0);
    for n in 0..5 {
        assert_eq!(queue.push_to(1, task(n)).map(|m| m.id), Some(id(n)));
    }
    assert_eq!(queue.push_to(7, task(9)), None);
    queue.add_peer(2, 8, now);
    assert_eq!(queue.steal(now + Duration::from_secs(1)), None);
    assert_eq!(queue.remove_peer(1).len(), 5);
    assert!((0..5).all(|n| !queue.retry(n, 3) && queue.remove(n).is_some()));
    assert!(queue.is_empty());
}

/// A draining peer is asked to give back all tasks but those for it alone, and again those that it refused.
#[test]
fn a_draining_peer_is_asked_again() {
    let now = Instant::now();
    let mut queue = queue(&[(1, 2)], 4);
    assert_eq!(assign_all(&mut queue).len(), 4);
    assert!(queue.push_to(1, task(9)).is_some());
    assert_eq!(queue.close_peer(1), [id(0), id(1), id(2), id(3)]);
    assert!(queue.recall_all(1).is_empty(), "no answer has come");
    // The last one first, so that they wait in their old order.
    assert!(queue.returned(1, id(3)) && queue.returned(1, id(2)));
    queue.kept(1, id(0));
    queue.kept(1, id(1));
    assert_eq!(queue.recall_all(1), [id(0), id(1)]);
    assert!(queue.returned(1, id(1)), "it had not arrived");
    assert!(!queue.returned(1, id(9)), "it was not asked for");
    assert!(queue.push_to(1, task(10)).is_some(), "a task for it alone is still sent");
    queue.push(task(11));
    queue.add_peer(2, 4, now);
    assert_eq!(assign_all(&mut queue), [(2, 1), (2, 2), (2, 3), (2, 11)]);
    assert_eq!(queue.held(1).collect::<Vec<_>>(), [id(0), id(9), id(10)]);
}

/// If a loss was announced, the tasks that the peer ran go on elsewhere as the same attempt, but for those for it
/// alone.
#[test]
fn announced_losses_are_not_charged() {
    let mut queue = queue(&[(1, 3)], 3);
    assert_eq!(assign_all(&mut queue).len(), 3);
    assert!(queue.push_to(1, task(9)).is_some());
    queue.close_peer(1);
    assert_eq!(queue.cancel(2), Cancelled::Held(1));
    let lost: Vec<_> = queue.remove_peer(1).into_iter().rev().filter(|&n| !queue.requeue(n)).collect();
    assert_eq!(lost, [9]);
    assert!(queue.remove(9).is_some());
    assert_eq!(queue.take_cancelled(), [id(2)]);
    queue.add_peer(2, 2, Instant::now());
    assert_eq!(assign_all(&mut queue), [(2, 0), (2, 1)]);
    let first = queue.remove_peer(2)[0];
    assert!(queue.retry(first, 2), "its first loss that counts");
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

/// A task that had started when it was cancelled is tried again when its peer is lost.
#[test]
fn a_cancel_that_comes_too_late_is_forgotten() {
    let mut queue = queue(&[(1, 1)], 1);
    assert_eq!(assign_all(&mut queue).len(), 1);
    assert_eq!(queue.cancel(0), Cancelled::Held(1));
    queue.uncancel(0);
    queue.remove_peer(1);
    assert!(queue.retry(0, 3));
    assert!(queue.take_cancelled().is_empty());
    assert_eq!(queue.waiting(), 1);
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
        assert!(queue.done(1, id(n), now));
    }
    assign_all(&mut queue);
    assert!(queue.held(1).count() > 5, "4,000 tasks/s want some in advance");
}
