//! Which task goes where. One first-in-first-out queue in front of several peers; pure state, no I/O.
//!
//! The same queue serves twice: at the client its peers are nodes, in the agent they are worker processes. A peer
//! holds at most `slots + prefetch` tasks, so that it never waits for a round trip, and beyond its slots at most
//! `window` bytes. The least loaded peer is served first. When nothing waits and a peer has free slots, unstarted
//! tasks are recalled from the most loaded one. Every operation is O(log n).

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::frame::{Attempt, Message};

/// Bytes of prefetched payload (beyond the tasks that fill its slots) that a peer may hold.
pub const WINDOW: usize = 64 * 1024 * 1024;
/// Interval over which a peer's task rate is measured.
const RATE_WINDOW: Duration = Duration::from_millis(100);
/// What a batch may take on its way beside the network's round trip: wake-ups on both sides.
const SLACK: Duration = Duration::from_millis(2);

/// A peer's number, given by the caller.
pub type PeerId = usize;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Recall {
    NotAsked,
    Asked,
    Refused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the queue.
    Waiting,
    /// Sent to this peer, with its place in that peer's order.
    Held(PeerId, u64),
    /// Its peer was removed; the caller decides.
    Orphan,
}

#[derive(Debug)]
struct Entry {
    message: Message,
    size: usize,
    place: Place,
    recall: Recall,
}

#[derive(Debug)]
struct Peer {
    slots: usize,
    prefetch: usize,
    /// What it holds, in the order in which it was sent.
    held: BTreeMap<u64, u64>,
    bytes: usize,
    rtt: Duration,
    rate: f64,
    since: Instant,
    done: u32,
}

impl Peer {
    fn load(&self) -> usize {
        self.held.len().saturating_mul(1024) / self.slots.max(1)
    }

    fn has_room(&self, size: usize) -> bool {
        self.held.len() < self.slots
            || (self.held.len() < self.slots + self.prefetch && self.bytes.saturating_add(size) <= WINDOW)
    }

    /// Tasks per second: the mean of the last measured rate and what was seen since.
    fn rate_at(&self, now: Instant) -> f64 {
        let span = now.saturating_duration_since(self.since);
        if span < RATE_WINDOW { self.rate } else { 0.5 * self.rate + 0.5 * f64::from(self.done) / span.as_secs_f64() }
    }

    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a product of positive, bounded numbers
    fn tune(&mut self) {
        let covered = 1.5 * self.rate * (self.rtt + SLACK).as_secs_f64();
        self.prefetch = self.slots.max((covered as usize).min(1 << 16));
    }
}

/// What became of a wish to cancel.
#[derive(Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// It waited here and is gone.
    Dropped,
    /// This peer holds it: tell it.
    Held(PeerId),
    /// No such task: it has ended.
    Unknown,
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Queue {
    fifo: VecDeque<u64>,
    waiting: usize,
    tasks: HashMap<u64, Entry>,
    peers: HashMap<PeerId, Peer>,
    by_load: BTreeSet<(usize, PeerId)>,
    sent: u64,
    recalls: usize,
}

impl Queue {
    /// Tasks that no peer holds.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Tasks that have not ended.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Whether every task has ended.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// The peers' slots in sum.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.peers.values().map(|p| p.slots).sum()
    }

    /// Let a peer take part.
    pub fn add_peer(&mut self, id: PeerId, slots: usize, now: Instant) {
        let slots = slots.max(1);
        let peer = Peer {
            slots,
            prefetch: slots,
            held: BTreeMap::new(),
            bytes: 0,
            rtt: Duration::ZERO,
            rate: 0.0,
            since: now,
            done: 0,
        };
        self.by_load.insert((peer.load(), id));
        self.peers.insert(id, peer);
    }

    /// Take a peer out. What it held is returned in the order in which it was sent; the caller gives each back with
    /// [`Queue::requeue`] or [`Queue::retry`], the last one first, or ends it with [`Queue::remove`].
    pub fn remove_peer(&mut self, id: PeerId) -> Vec<u64> {
        let Some(peer) = self.peers.remove(&id) else { return Vec::new() };
        self.by_load.remove(&(peer.load(), id));
        for task in peer.held.values() {
            if let Some(entry) = self.tasks.get_mut(task) {
                entry.place = Place::Orphan;
                if entry.recall == Recall::Asked {
                    self.recalls -= 1;
                }
                entry.recall = Recall::NotAsked;
            }
        }
        peer.held.into_values().collect()
    }

    /// A new round-trip time to a peer.
    pub fn set_rtt(&mut self, id: PeerId, rtt: Duration) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.rtt = rtt;
            peer.tune();
        }
    }

    /// Append a task.
    pub fn push(&mut self, message: Message) {
        let task = message.id.task;
        let size = message.size();
        self.tasks.insert(task, Entry { message, size, place: Place::Waiting, recall: Recall::NotAsked });
        self.fifo.push_back(task);
        self.waiting += 1;
    }

    /// Put a task that a removed peer held back at the front.
    pub fn requeue(&mut self, task: u64) {
        if let Some(entry) = self.tasks.get_mut(&task)
            && entry.place == Place::Orphan
        {
            entry.place = Place::Waiting;
            self.fifo.push_front(task);
            self.waiting += 1;
        }
    }

    /// Like [`Queue::requeue`], as another attempt: answers to the earlier one are stale from now on.
    /// False if `budget` attempts were made; the task is then left to [`Queue::remove`].
    pub fn retry(&mut self, task: u64, budget: u16) -> bool {
        let Some(entry) = self.tasks.get_mut(&task) else { return false };
        let next = entry.message.id.attempt.saturating_add(1);
        if next >= budget {
            return false;
        }
        entry.message.id.attempt = next;
        self.requeue(task);
        true
    }

    /// The next task to send and the peer to send it to, while both exist.
    pub fn assign(&mut self) -> Option<(PeerId, Message)> {
        let &(load, id) = self.by_load.first()?;
        let task = loop {
            let &task = self.fifo.front()?;
            // What was cancelled while waiting left its number behind.
            match self.tasks.get(&task) {
                Some(entry) if entry.place == Place::Waiting => break task,
                _ => self.fifo.pop_front(),
            };
        };
        let entry = self.tasks.get_mut(&task)?;
        let peer = self.peers.get_mut(&id)?;
        if !peer.has_room(entry.size) {
            return None;
        }
        self.fifo.pop_front();
        self.waiting -= 1;
        self.sent += 1;
        entry.place = Place::Held(id, self.sent);
        peer.held.insert(self.sent, task);
        peer.bytes += entry.size;
        self.by_load.remove(&(load, id));
        self.by_load.insert((peer.load(), id));
        Some((id, entry.message.clone()))
    }

    fn unhold(&mut self, task: u64) {
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        if entry.recall == Recall::Asked {
            self.recalls -= 1;
        }
        entry.recall = Recall::NotAsked;
        let Place::Held(id, seq) = std::mem::replace(&mut entry.place, Place::Orphan) else { return };
        let Some(peer) = self.peers.get_mut(&id) else { return };
        self.by_load.remove(&(peer.load(), id));
        peer.held.remove(&seq);
        peer.bytes = peer.bytes.saturating_sub(entry.size);
        self.by_load.insert((peer.load(), id));
    }

    /// A peer ended a task. False for an answer that is late or doubled: not the attempt that this peer holds.
    pub fn done(&mut self, from: PeerId, id: Attempt, now: Instant) -> bool {
        if !self.holds(from, id) {
            return false;
        }
        self.unhold(id.task);
        self.tasks.remove(&id.task);
        if let Some(peer) = self.peers.get_mut(&from) {
            peer.done += 1;
            if now.saturating_duration_since(peer.since) >= RATE_WINDOW {
                peer.rate = peer.rate_at(now);
                peer.since = now;
                peer.done = 0;
                peer.tune();
            }
        }
        true
    }

    /// Whether this peer holds this attempt.
    #[must_use]
    pub fn holds(&self, peer: PeerId, id: Attempt) -> bool {
        self.tasks
            .get(&id.task)
            .is_some_and(|e| e.message.id == id && matches!(e.place, Place::Held(holder, _) if holder == peer))
    }

    /// Forget a task wherever it is; its message, if it was known.
    pub fn remove(&mut self, task: u64) -> Option<Message> {
        if self.tasks.get(&task)?.place == Place::Waiting {
            self.waiting -= 1;
        }
        self.unhold(task);
        self.tasks.remove(&task).map(|entry| entry.message)
    }

    /// Forget all tasks; what they were.
    pub fn drain(&mut self) -> Vec<Attempt> {
        let ids: Vec<_> = self.tasks.values().map(|e| e.message.id).collect();
        for id in &ids {
            self.remove(id.task);
        }
        ids
    }

    /// The present attempt at a task that has not ended.
    #[must_use]
    pub fn attempt(&self, task: u64) -> Option<Attempt> {
        self.tasks.get(&task).map(|e| e.message.id)
    }

    /// Drop a task if it waits; otherwise say who holds it.
    pub fn cancel(&mut self, task: u64) -> Cancelled {
        match self.tasks.get(&task) {
            None => Cancelled::Unknown,
            Some(Entry { place: Place::Held(peer, _), .. }) => Cancelled::Held(*peer),
            Some(_) => {
                self.remove(task);
                Cancelled::Dropped
            }
        }
    }

    /// A task to ask back, while nothing waits, some peer has a free slot that no earlier recall will fill, and the
    /// most loaded peer would not get to it before the answer is here.
    pub fn steal(&mut self, now: Instant) -> Option<(PeerId, Attempt)> {
        if self.waiting > 0 {
            return None;
        }
        let &(_, idle) = self.by_load.first()?;
        let &(_, busy) = self.by_load.last()?;
        let free = self.peers.get(&idle).map(|p| p.slots.saturating_sub(p.held.len()))?;
        if free <= self.recalls {
            return None;
        }
        let victim = self.peers.get(&busy)?;
        // The first `slots` tasks are most likely running: only what came after them is asked for.
        let excess = victim.held.len().saturating_sub(victim.slots);
        #[allow(clippy::cast_precision_loss)] // a count of tasks
        if excess as f64 <= victim.rate_at(now) * 2.0 * (victim.rtt + SLACK).as_secs_f64() {
            return None;
        }
        let task = victim
            .held
            .values()
            .rev()
            .take(excess)
            .find(|t| self.tasks.get(t).is_some_and(|e| e.recall == Recall::NotAsked))
            .copied()?;
        let entry = self.tasks.get_mut(&task)?;
        entry.recall = Recall::Asked;
        self.recalls += 1;
        Some((busy, entry.message.id))
    }

    /// A peer gave a task back unstarted. True if the caller should assign it again.
    pub fn returned(&mut self, from: PeerId, id: Attempt) -> bool {
        if !self.holds(from, id) {
            return false;
        }
        self.unhold(id.task);
        self.requeue(id.task);
        true
    }

    /// A peer keeps a recalled task, which has started.
    pub fn kept(&mut self, from: PeerId, id: Attempt) {
        if self.holds(from, id)
            && let Some(entry) = self.tasks.get_mut(&id.task)
            && entry.recall == Recall::Asked
        {
            entry.recall = Recall::Refused;
            self.recalls -= 1;
        }
    }
}
