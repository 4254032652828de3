//! Tasks that leave a peer before it has ended them: recalled, cancelled, or left behind by a lost peer.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::time::{Duration, Instant};

use skyward_lite::queue::Cancelled;
use skyward_lite::wire::Attempt;

#[path = "support/queue.rs"]
mod support;
use support::{assign_all, id, queue, task};

/// A waiting task is dropped at once; a task that a peer holds is left to that peer.
#[test]
fn cancelling() {
    let mut queue = queue(&[(1, 1)], 4);
    assign_all(&mut queue);
    assert_eq!(queue.cancel(3), Cancelled::Dropped);
    assert_eq!(queue.cancel(3), Cancelled::Unknown);
    assert_eq!(queue.cancel(0), Cancelled::Held(1));
    assert_eq!(queue.waiting(), 1);
    assert!(queue.done(1, id(0), Instant::now()).is_some());
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
    assert!(queue.given_back(1, id(3)));
    assert_eq!(queue.take_cancelled(), [id(3)]);
    for task in queue.remove_peer(1).into_iter().rev() {
        assert!(queue.retry(task, 3));
    }
    assert_eq!(queue.take_cancelled(), [Attempt { task: 2, attempt: 1 }]);
    assert_eq!(assign_all(&mut queue), [(2, 0), (2, 1)]);
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
            assert!(queue.done(peer, id(n), now).is_some());
        }
    }
    while queue.waiting() > 0 {
        now += Duration::from_millis(1);
        for (peer, n) in assign_all(&mut queue) {
            assert!(queue.done(peer, id(n), now).is_some());
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
    assert!(queue.given_back(1, id(3)));
    queue.recall_refused(1, id(2));
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
    assert!(queue.given_back(1, id(2)));
    queue.add_peer(2, 4, now);
    assert_eq!(assign_all(&mut queue), [(2, 2), (2, 3)]);
    assert!(queue.done(1, id(0), now).is_some());
    assert_eq!(queue.held(1).collect::<Vec<_>>(), [id(1)]);
    assert_eq!(queue.remove_peer(1), [1]);
    assert_eq!(queue.give(2, 1).map(|m| m.id), Some(id(1)));
    assert_eq!(queue.give(2, 1), None);
    assert!(queue.done(2, id(1), now).is_some());
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
    assert!(queue.given_back(1, id(3)) && queue.given_back(1, id(2)));
    queue.recall_refused(1, id(0));
    queue.recall_refused(1, id(1));
    assert_eq!(queue.recall_all(1), [id(0), id(1)]);
    assert!(queue.given_back(1, id(1)), "it had not arrived");
    assert!(!queue.given_back(1, id(9)), "it was not asked for");
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
    assert!(queue.done(2, id(0), Instant::now()).is_none());
    assert!(queue.done(2, Attempt { task: 0, attempt: 1 }, Instant::now()).is_some());
    for task in queue.remove_peer(2).into_iter().filter(|&t| t < 4) {
        assert!(!queue.retry(task, 2), "the budget is two attempts");
        assert!(queue.remove(task).is_some());
    }
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
