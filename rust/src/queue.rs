//! Which task goes where. One first-in-first-out queue in front of several peers; pure state, no I/O.
//!
//! The same queue serves twice: at the client its peers are nodes, in the agent they are worker processes. A peer
//! holds at most `slots + prefetch` tasks, so that it never waits for a round trip, and beyond its slots at most
//! `window` bytes. The least loaded peer is served first. When nothing waits and a peer has free slots, unstarted
//! tasks are recalled from the most loaded one. Every operation is O(log n).

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::wire::{Attempt, Message};

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
    /// For its holder only: it neither moves nor is it tried elsewhere.
    pinned: bool,
    /// Its holder was told to drop it: if it comes back unstarted, or its holder is lost, that is its end.
    cancelled: bool,
    /// A holder was ever told so: it may say that it was dropped.
    droppable: bool,
}

impl Entry {
    fn new(message: Message, size: usize, place: Place, pinned: bool) -> Self {
        Self { message, size, place, recall: Recall::NotAsked, pinned, cancelled: false, droppable: false }
    }
}

#[derive(Debug)]
struct Peer {
    slots: usize,
    /// Tasks beyond its slots that it may hold, and the least of that.
    prefetch: usize,
    least: usize,
    /// What it holds, in the order in which it was sent.
    held: BTreeMap<u64, u64>,
    bytes: usize,
    rtt: Duration,
    rate: f64,
    since: Instant,
    done: u32,
    /// Takes nothing but what it is given by name.
    closed: bool,
}

impl Peer {
    fn load(&self) -> usize {
        self.held.len().saturating_mul(1024) / self.slots.max(1)
    }

    fn has_place(&self) -> bool {
        self.held.len() < self.slots + self.prefetch
    }

    fn has_room(&self, size: usize) -> bool {
        // What the tasks in its slots take of the bytes, were all as large as the mean.
        let running = self.bytes / self.held.len().max(1) * self.slots;
        self.held.len() < self.slots
            || (self.has_place() && self.bytes.saturating_add(size) <= WINDOW.saturating_add(running))
    }

    /// Tasks per second: what was seen since the last measurement, weighed with that one by time. Falls towards 0
    /// while nothing ends.
    fn rate_at(&self, now: Instant) -> f64 {
        let span = now.saturating_duration_since(self.since).as_secs_f64();
        let before = RATE_WINDOW.as_secs_f64();
        (self.rate * before + f64::from(self.done)) / (before + span)
    }

    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a product of positive, bounded numbers
    fn tune(&mut self) {
        let covered = 1.5 * self.rate * (self.rtt + SLACK).as_secs_f64();
        self.prefetch = self.least.max((covered as usize).min(1 << 16));
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
    /// Those of them that may hold another task.
    open: BTreeSet<(usize, PeerId)>,
    /// Tasks that ended here because they had been cancelled, until [`Queue::take_cancelled`].
    cancelled: Vec<Attempt>,
    sent: u64,
    recalls: usize,
    near: bool,
}

impl Queue {
    /// A queue whose peers answer in no time. One that runs a single task gets nothing in advance before its rate shows
    /// that this pays: behind a long task it would wait while others become free.
    #[must_use]
    pub fn local() -> Self {
        Self { near: true, ..Self::default() }
    }

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
        let least = if self.near && slots == 1 { 0 } else { slots };
        let peer = Peer {
            slots,
            prefetch: least,
            least,
            held: BTreeMap::new(),
            bytes: 0,
            rtt: Duration::ZERO,
            rate: 0.0,
            since: now,
            done: 0,
            closed: false,
        };
        self.peers.insert(id, peer);
        self.list(id);
    }

    /// After a change of prefetch, which leaves the load as it is.
    fn relist(&mut self, id: PeerId) {
        self.unlist(id);
        self.list(id);
    }

    fn unlist(&mut self, id: PeerId) {
        if let Some(peer) = self.peers.get(&id) {
            self.by_load.remove(&(peer.load(), id));
            self.open.remove(&(peer.load(), id));
        }
    }

    fn list(&mut self, id: PeerId) {
        if let Some(peer) = self.peers.get(&id).filter(|p| !p.closed) {
            self.by_load.insert((peer.load(), id));
            if peer.has_place() {
                self.open.insert((peer.load(), id));
            }
        }
    }

    /// Let a peer take nothing more but what it is given; the tasks that it is now to be asked back for.
    pub fn close_peer(&mut self, id: PeerId) -> Vec<Attempt> {
        self.unlist(id);
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.closed = true;
        }
        self.recall_all(id)
    }

    /// The tasks that a peer is to be asked back for: all that may go elsewhere and of which its answer is not awaited.
    /// One that it kept may be asked for again: perhaps it had not arrived when it was asked for.
    pub fn recall_all(&mut self, id: PeerId) -> Vec<Attempt> {
        let Some(peer) = self.peers.get(&id) else { return Vec::new() };
        let mut asked = Vec::new();
        for task in peer.held.values() {
            if let Some(entry) = self.tasks.get_mut(task)
                && entry.recall != Recall::Asked
                && !entry.pinned
                && !entry.cancelled
            {
                entry.recall = Recall::Asked;
                self.recalls += 1;
                asked.push(entry.message.id);
            }
        }
        asked
    }

    /// What a peer holds, in the order in which it was sent.
    pub fn held(&self, id: PeerId) -> impl Iterator<Item = Attempt> {
        let tasks = self.peers.get(&id).into_iter().flat_map(|p| p.held.values());
        tasks.filter_map(|t| self.tasks.get(t).map(|e| e.message.id))
    }

    /// Take a peer out. What it held is returned in the order in which it was sent; the caller gives each back with
    /// [`Queue::requeue`] or [`Queue::retry`], the last one first, or ends it with [`Queue::remove`].
    pub fn remove_peer(&mut self, id: PeerId) -> Vec<u64> {
        self.unlist(id);
        let Some(peer) = self.peers.remove(&id) else { return Vec::new() };
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
        self.relist(id);
    }

    /// Append a task.
    pub fn push(&mut self, message: Message) {
        let task = message.id.task;
        let size = message.size();
        let place = Place::Waiting;
        let entry = Entry::new(message, size, place, false);
        self.tasks.insert(task, entry);
        self.fifo.push_back(task);
        self.waiting += 1;
    }

    /// Add a task for this peer only, however much it holds: send it at once. `None` if there is no such peer.
    pub fn push_to(&mut self, peer: PeerId, message: Message) -> Option<Message> {
        self.peers.get(&peer)?;
        let task = message.id.task;
        let size = message.size();
        let place = Place::Orphan;
        let entry = Entry::new(message, size, place, true);
        self.tasks.insert(task, entry);
        self.give(peer, task)
    }

    /// Give a task that a removed peer held to this one, which is to be sent it at once.
    pub fn give(&mut self, peer: PeerId, task: u64) -> Option<Message> {
        if self.is_orphan(task) { self.hold(peer, task) } else { None }
    }

    /// Put a task that a removed peer held back at the front; or end it, if it was cancelled.
    /// False if the task is for that peer only; it is then left to [`Queue::remove`].
    pub fn requeue(&mut self, task: u64) -> bool {
        let Some(entry) = self.tasks.get_mut(&task).filter(|e| e.place == Place::Orphan) else { return false };
        if entry.cancelled {
            self.cancelled.push(entry.message.id);
            self.tasks.remove(&task);
            return true;
        }
        if entry.pinned {
            return false;
        }
        entry.place = Place::Waiting;
        self.fifo.push_front(task);
        self.waiting += 1;
        true
    }

    /// The tasks that ended because they had been cancelled when they came back unstarted or lost their peer.
    pub fn take_cancelled(&mut self) -> Vec<Attempt> {
        std::mem::take(&mut self.cancelled)
    }

    /// Like [`Queue::requeue`], as another attempt: answers to the earlier one are stale from now on.
    /// False if `budget` attempts were made or the task is for that peer only; it is then left to [`Queue::remove`].
    pub fn retry(&mut self, task: u64, budget: u16) -> bool {
        let Some(entry) = self.tasks.get_mut(&task) else { return false };
        let next = entry.message.id.attempt.saturating_add(1);
        if (next >= budget || entry.pinned) && !entry.cancelled {
            return false;
        }
        entry.message.id.attempt = next;
        self.requeue(task)
    }

    /// The next task to send and the peer to send it to, while both exist.
    pub fn assign(&mut self) -> Option<(PeerId, Message)> {
        let task = loop {
            let &task = self.fifo.front()?;
            // What was cancelled while waiting left its number behind.
            match self.tasks.get(&task) {
                Some(entry) if entry.place == Place::Waiting => break task,
                _ => self.fifo.pop_front(),
            };
        };
        let size = self.tasks.get(&task)?.size;
        let has_room = |id: &PeerId| self.peers.get(id).is_some_and(|p| p.has_room(size));
        let id = self.open.iter().map(|&(_, id)| id).find(has_room)?;
        self.fifo.pop_front();
        self.waiting -= 1;
        self.hold(id, task).map(|message| (id, message))
    }

    fn hold(&mut self, id: PeerId, task: u64) -> Option<Message> {
        self.unlist(id);
        let entry = self.tasks.get_mut(&task)?;
        let peer = self.peers.get_mut(&id)?;
        self.sent += 1;
        entry.place = Place::Held(id, self.sent);
        peer.held.insert(self.sent, task);
        peer.bytes += entry.size;
        let message = entry.message.clone();
        self.list(id);
        Some(message)
    }

    fn unhold(&mut self, task: u64) {
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        if entry.recall == Recall::Asked {
            self.recalls -= 1;
        }
        entry.recall = Recall::NotAsked;
        let Place::Held(id, seq) = std::mem::replace(&mut entry.place, Place::Orphan) else { return };
        let size = entry.size;
        self.unlist(id);
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.held.remove(&seq);
            peer.bytes = peer.bytes.saturating_sub(size);
        }
        self.list(id);
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
                self.relist(from);
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

    /// Whether this peer holds this attempt and was asked for it back, and has not answered.
    #[must_use]
    pub fn is_asked_back(&self, peer: PeerId, id: Attempt) -> bool {
        self.holds(peer, id) && self.tasks.get(&id.task).is_some_and(|e| e.recall == Recall::Asked)
    }

    /// Whether this peer holds this attempt and was told to drop it.
    #[must_use]
    pub fn is_to_drop(&self, peer: PeerId, id: Attempt) -> bool {
        self.holds(peer, id) && self.tasks.get(&id.task).is_some_and(|e| e.cancelled)
    }

    /// Whether the peer that holds a task may say that the task was dropped: a holder was told to drop it, if only in vain.
    #[must_use]
    pub fn is_droppable(&self, task: u64) -> bool {
        self.tasks.get(&task).is_some_and(|e| e.droppable)
    }

    /// The place in the order of sending of the oldest task that a peer holds, and the most that the sender says in `nanos`
    /// of one that it holds. What is said of the oldest is 0 if that is said of all.
    #[must_use]
    pub fn oldest(&self, peer: PeerId) -> Option<(u64, u64)> {
        let held = &self.peers.get(&peer)?.held;
        let (number, oldest) = held.first_key_value()?;
        let nanos = |task| self.tasks.get(task).map(|e: &Entry| e.message.nanos);
        // It may wait there for a longer one, which arrived before it.
        let most = if nanos(oldest)? == 0 { 0 } else { held.values().filter_map(nanos).max()? };
        Some((*number, most))
    }

    /// Forget a task wherever it is; its message, if it was known.
    pub fn remove(&mut self, task: u64) -> Option<Message> {
        if self.tasks.get(&task)?.place == Place::Waiting {
            self.waiting -= 1;
        }
        self.unhold(task);
        self.tasks.remove(&task).map(|entry| entry.message)
    }

    /// Forget the tasks that wait for any peer; what they were.
    pub fn take_waiting(&mut self) -> Vec<Attempt> {
        let tasks: Vec<_> = self.fifo.drain(..).collect();
        // What was cancelled while waiting left its number behind.
        let waits = |t: &u64| self.tasks.get(t).is_some_and(|e| e.place == Place::Waiting);
        let waiting: Vec<_> = tasks.into_iter().filter(waits).collect();
        waiting.into_iter().filter_map(|t| self.remove(t).map(|message| message.id)).collect()
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
        match self.tasks.get_mut(&task) {
            None => Cancelled::Unknown,
            Some(Entry { place: Place::Held(peer, _), cancelled, droppable, .. }) => {
                *cancelled = true;
                *droppable = true;
                Cancelled::Held(*peer)
            }
            Some(_) => {
                self.remove(task);
                Cancelled::Dropped
            }
        }
    }

    /// A task that was to be cancelled is running, and goes on.
    pub fn uncancel(&mut self, task: u64) {
        if let Some(entry) = self.tasks.get_mut(&task) {
            entry.cancelled = false;
        }
    }

    /// Give a task up that the caller wants back: dropped here if it waits, otherwise its holder is to be asked.
    /// One that waits to be given to somebody is not for others.
    pub fn give_up(&mut self, task: u64) -> Cancelled {
        match self.tasks.get(&task).map(|e| e.place) {
            Some(Place::Held(peer, _)) => Cancelled::Held(peer),
            Some(Place::Orphan) => Cancelled::Unknown,
            _ => self.cancel(task),
        }
    }

    /// Whether a task waits to be given to somebody.
    #[must_use]
    pub fn is_orphan(&self, task: u64) -> bool {
        self.tasks.get(&task).is_some_and(|e| e.place == Place::Orphan)
    }

    /// The tasks that wait to be given to somebody. Looks at all tasks: for checks.
    pub fn orphans(&self) -> impl Iterator<Item = u64> {
        self.tasks.iter().filter(|(_, entry)| entry.place == Place::Orphan).map(|(task, _)| *task)
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
            .find(|t| self.tasks.get(t).is_some_and(|e| e.recall == Recall::NotAsked && !e.pinned))
            .copied()?;
        let entry = self.tasks.get_mut(&task)?;
        entry.recall = Recall::Asked;
        self.recalls += 1;
        Some((busy, entry.message.id))
    }

    /// A peer gave a task back unstarted. True if the caller should assign it again.
    pub fn returned(&mut self, from: PeerId, id: Attempt) -> bool {
        // Who is the only one to run a task was not asked for it.
        if !self.holds(from, id) || self.tasks.get(&id.task).is_some_and(|e| e.pinned) {
            return false;
        }
        self.unhold(id.task);
        self.requeue(id.task)
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
