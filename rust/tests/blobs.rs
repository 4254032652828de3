//! What the client decides about shared data: one copy of each content, which blobs a node has, and what it is to forget.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use skyward_lite::client::blobs::{DEFAULT_BUDGET, MAX_KEPT_BLOBS, NodeBlobs, budget};
use skyward_lite::client::contents::Contents;
use skyward_lite::wire::{Attempt, BlobPart, Content, Message};

// ------------------------------------------------------------------------------------------------ contents

#[allow(clippy::unnecessary_wraps)] // as copies of real buffers, which may fail
fn copy(bytes: &[u8]) -> Result<Bytes, Infallible> {
    Ok(Bytes::copy_from_slice(bytes))
}

/// Equal buffers have one copy, however many tasks have them; the first one counts as fresh.
#[test]
fn equal_buffers_have_one_copy() {
    let contents = Contents::new().unwrap();
    let now = Instant::now();
    let (one, other) = (vec![1; 1000], vec![2; 1000]);
    let (first, fresh) = contents.of_buffer(&one, now, || copy(&one)).unwrap();
    assert!(fresh);
    let (second, fresh) =
        contents.of_buffer(&one.clone(), now, || -> Result<_, Infallible> { unreachable!() }).unwrap();
    assert!(!fresh && Arc::ptr_eq(&first, &second));
    let (third, fresh) = contents.of_buffer(&other, now, || copy(&other)).unwrap();
    assert!(fresh && third.id != first.id && third.bytes == other);
    let (fourth, fresh) = contents.of_bytes(Bytes::from(one), now);
    assert!(!fresh && Arc::ptr_eq(&first, &fourth));
    assert_eq!(contents.counts(), (2, 2000));
}

/// A buffer that changes between two tasks is another content, and one that changes back is the first again.
#[test]
fn a_changed_buffer_is_another_content() {
    let contents = Contents::new().unwrap();
    let now = Instant::now();
    let mut buffer = vec![0; 1 << 20];
    let (before, _) = contents.of_buffer(&buffer, now, || copy(&buffer)).unwrap();
    buffer[777_777] = 1;
    let (after, fresh) = contents.of_buffer(&buffer, now, || copy(&buffer)).unwrap();
    assert!(fresh && after.id != before.id && after.bytes == buffer);
    buffer[777_777] = 0;
    assert_eq!(contents.of_buffer(&buffer, now, || copy(&buffer)).unwrap().0.id, before.id);
}

/// What changes while it is copied is known by the content of the copy.
#[test]
fn a_copy_is_known_by_what_it_has() {
    let contents = Contents::new().unwrap();
    let now = Instant::now();
    let torn = Bytes::from(vec![7; 1000]);
    let (content, _) = contents.of_buffer(&[0; 1000], now, || Ok::<_, Infallible>(torn.clone())).unwrap();
    assert_eq!(contents.of_bytes(torn, now).0.id, content.id);
    assert_ne!(contents.of_bytes(Bytes::from(vec![0; 1000]), now).0.id, content.id);
}

/// A content that no task names goes after a moment. If it comes again, it has its old number as long as a node has it.
#[test]
fn what_no_task_names_is_not_kept() {
    let contents = Contents::new().unwrap();
    let start = Instant::now();
    let later = start + Duration::from_secs(2);
    let bytes = Bytes::from(vec![1; 1000]);
    let (content, _) = contents.of_bytes(bytes.clone(), start);
    let id = content.id;
    contents.sweep(later, |_| true);
    assert_eq!(contents.counts(), (1, 1000));
    drop(content);
    contents.sweep(start, |_| true);
    assert_eq!(contents.counts(), (1, 1000));
    contents.sweep(later, |_| true);
    assert_eq!(contents.counts(), (1, 0));
    let (content, fresh) = contents.of_bytes(bytes, later);
    assert_eq!((content.id, fresh), (id, true));
}

/// Of data that is never the same again, little is kept that no task names; what tasks name stays.
#[test]
fn data_that_never_comes_again_does_not_pile_up() {
    const SIZE: usize = 32 << 20;
    let (contents, now) = (Contents::new().unwrap(), Instant::now());
    let add = |n: u8| contents.of_bytes(Bytes::from(vec![n; SIZE]), now).0;
    let named = add(0);
    (1..14).for_each(|n| drop(add(n)));
    assert!(contents.counts().1 <= 9 * SIZE, "{:?}", contents.counts());
    assert_eq!(contents.of_bytes(named.bytes.clone(), now).0.id, named.id);
}

/// Millions of different contents do not make the table of hashes grow: the numbers that mean nothing are forgotten.
#[test]
fn numbers_that_mean_nothing_are_forgotten() {
    let contents = Contents::new().unwrap();
    let start = Instant::now();
    for round in 0..20_u32 {
        let now = start + Duration::from_secs(10) * round;
        for number in 0..1000_u32 {
            contents.of_bytes(Bytes::from([round.to_le_bytes(), number.to_le_bytes()].concat()), now);
        }
        contents.sweep(now + Duration::from_secs(5), |id| id == 3);
    }
    assert!(contents.counts().0 < 3000, "{:?}", contents.counts());
    let third = [0_u32.to_le_bytes(), 2_u32.to_le_bytes()].concat();
    assert_eq!(contents.of_bytes(Bytes::from(third), start).0.id, 3);
}

// ------------------------------------------------------------------------------------------------ one node's blobs

/// A node, and the tasks that it holds.
struct Node {
    blobs: NodeBlobs,
    held: BTreeSet<u64>,
    last: u64,
}

enum Step {
    /// Send this task with these contents, of so many bytes each. Expected: the transfers that it takes.
    Send(u64, &'static [(u64, usize)], &'static [u64]),
    /// The task has left the node.
    End(u64),
    /// Expected: the transfers that the node is to forget.
    Evict(&'static [u64]),
    /// The node could not store this transfer.
    Lost(u64),
}

use Step::{End, Evict, Lost, Send};

fn parts(contents: &[(u64, usize)]) -> Vec<BlobPart> {
    let part = |(place, &(id, size)): (u16, &(u64, usize))| BlobPart {
        place,
        number: 0,
        fresh: false,
        content: Some(Arc::new(Content { id, bytes: Bytes::from(vec![0; size]) })),
    };
    (1..).zip(contents).map(part).collect()
}

fn check(budget: u64, table: &[Step]) {
    let mut node = Node { blobs: NodeBlobs::new(budget), held: BTreeSet::new(), last: 0 };
    for (number, step) in table.iter().enumerate() {
        match step {
            Send(task, contents, transfers) => {
                let mut parts = parts(contents);
                node.held.insert(*task);
                let last = &mut node.last;
                let sent = node.blobs.send(Attempt { task: *task, attempt: 0 }, &mut parts, || {
                    *last += 1;
                    *last
                });
                let sent: Vec<_> = sent.into_iter().map(|(number, _)| number).collect();
                assert_eq!(sent, *transfers, "step {number}");
                assert!(parts.iter().all(|part| part.number > 0));
            }
            End(task) => assert!(node.held.remove(task)),
            Evict(forgotten) => {
                let held = &node.held;
                assert_eq!(node.blobs.evict(|task| held.contains(&task.task)), *forgotten, "step {number}");
            }
            Lost(transfer) => node.blobs.lost(*transfer),
        }
        assert!(node.blobs.is_consistent(), "step {number}");
    }
}

/// A content crosses once, however many tasks name it, one of them twice; and stays when they have ended.
#[test]
fn a_content_crosses_once() {
    check(
        100,
        &[
            Send(1, &[(7, 50), (7, 50)], &[1]),
            Send(2, &[(7, 50), (8, 50)], &[2]),
            End(1),
            End(2),
            Evict(&[]),
            Send(3, &[(8, 50), (7, 50)], &[]),
        ],
    );
}

/// Beyond the budget those go that were used least recently, and none that a task names which the node holds.
#[test]
fn the_least_recently_used_goes_first() {
    check(
        100,
        &[
            Send(1, &[(1, 40)], &[1]),
            Send(2, &[(2, 40)], &[2]),
            Send(3, &[(1, 40)], &[]),
            End(1),
            End(2),
            Send(4, &[(3, 40)], &[3]),
            Evict(&[2]),
            Send(5, &[(2, 40)], &[4]),
            Evict(&[]),
            End(3),
            Evict(&[1]),
            End(4),
            End(5),
            Evict(&[]),
        ],
    );
}

/// A blob over the budget works for its tasks, and goes when the last of them has left.
#[test]
fn a_blob_over_the_budget_stays_for_its_tasks() {
    check(
        10,
        &[
            Send(1, &[(1, 40)], &[1]),
            Evict(&[]),
            Send(2, &[(1, 40)], &[]),
            End(1),
            Evict(&[]),
            End(2),
            Evict(&[1]),
            Send(3, &[(1, 40)], &[2]),
        ],
    );
}

/// What the node could not store comes again with the next task. A late report about an earlier transfer changes nothing.
/// The node is to remember the loss until it holds no task that names the lost transfer.
#[test]
fn a_lost_blob_comes_again() {
    check(
        100,
        &[
            Send(1, &[(1, 40)], &[1]),
            Lost(1),
            Evict(&[]),
            Send(2, &[(1, 40)], &[2]),
            Lost(1),
            Send(3, &[(1, 40)], &[]),
            End(1),
            Evict(&[1]),
            Evict(&[]),
        ],
    );
}

/// Small blobs are bounded in number, as each takes a descriptor.
#[test]
fn the_number_of_blobs_is_bounded() {
    let mut blobs = NodeBlobs::new(u64::MAX);
    let mut last = 0;
    let mut forgotten = 0;
    for task in 0..1000 {
        let sent = blobs.send(Attempt { task, attempt: 0 }, &mut parts(&[(task, 1)]), || {
            last += 1;
            last
        });
        assert_eq!(sent.len(), 1);
        forgotten += blobs.evict(|other| other.task == task).len();
    }
    assert_eq!(forgotten, 1000 - MAX_KEPT_BLOBS);
}

#[test]
fn the_budget_is_a_share_of_the_memory() {
    assert_eq!(budget(Some(5), 1 << 40), 5);
    assert_eq!(budget(None, 8 << 30), 2 << 30);
    assert_eq!(budget(None, 0), DEFAULT_BUDGET);
}

/// The bytes of a content count for the message alone that brought it.
#[test]
fn shared_bytes_count_once() {
    let mut message =
        Message { parts: vec![Bytes::from(vec![0; 10])], blobs: parts(&[(1, 100)]), ..Message::default() };
    assert_eq!((message.size(), message.load()), (10, 10));
    message.blobs.iter_mut().for_each(|blob| blob.fresh = true);
    assert_eq!((message.size(), message.load()), (10, 110));
}
