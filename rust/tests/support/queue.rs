//! Queues of small tasks.

use std::time::Instant;

use bytes::Bytes;
use skyward_lite::queue::Queue;
use skyward_lite::wire::{Attempt, Message};

pub fn id(task: u64) -> Attempt {
    Attempt { task, attempt: 0 }
}

pub fn task(n: u64) -> Message {
    Message { id: id(n), parts: vec![Bytes::from_static(b"x")], ..Message::default() }
}

pub fn queue(peers: &[(usize, usize)], tasks: u64) -> Queue {
    let mut queue = Queue::default();
    for &(peer, slots) in peers {
        queue.add_peer(peer, slots, Instant::now());
    }
    (0..tasks).for_each(|n| queue.push(task(n)));
    queue
}

pub fn assign_all(queue: &mut Queue) -> Vec<(usize, u64)> {
    std::iter::from_fn(|| queue.assign()).map(|(peer, message)| (peer, message.id.task)).collect()
}
