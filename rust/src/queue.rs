//! Which task goes to which peer: one first-in-first-out queue in front of several peers. Pure state, no I/O; the clock
//! comes in as an argument.
//!
//! The same queue serves twice: at the client its peers are nodes, in the agent they are worker processes.
//!
//! - A peer holds at most `slots + prefetch` tasks, so that no slot waits for a round trip, and beyond its slots at
//!   most [`WINDOW`] bytes of them.
//! - The least loaded peer is served first; load is tasks held per slot.
//! - When no task waits here and a peer has free slots, unstarted tasks are recalled from the most loaded peer.
//!
//! For example: two nodes of 4 slots, whose prefetch is 4 as well, and 20 tasks. Each node is sent 8 tasks, and 4 wait.
//! Those follow one by one as tasks end. Then node A has ended all of its tasks while node B, which got the long ones,
//! still holds 6: it runs 4 of them, so the 2 others are recalled one after the other, and go to A if B had not started
//! them.
//!
//! A task is in one of three places: it waits, a peer holds it, or it is an orphan, whose peer was removed (or not
//! chosen yet) and for which the caller decides at once. Every operation is O(log n) in tasks and peers, but for
//! those that return many tasks.
//!
//! This file has more than 400 lines because every part of it changes the same indexes, whose agreement can be checked
//! only where all of them are in sight.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::timing::WINDOW;
use crate::wire::{Attempt, Message};

/// Interval over which a peer's task rate is measured.
const RATE_WINDOW: Duration = Duration::from_millis(100);
/// What a task and its result may take on their way beside the network's round trip: waking threads on both sides.
const WAKE_UP_DELAY: Duration = Duration::from_millis(2);
/// Tasks beyond its slots that a peer may hold at most, however short they are.
const MAX_PREFETCH: usize = 1 << 16;

/// A peer's number, given by the caller.
pub type PeerId = usize;

/// Whether a task's holder was asked to give it back so that another peer can run it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Recall {
    NotAsked,
    /// The holder's answer is on its way.
    Asked,
    /// The holder has started the task, or had not received it yet. Only [`Queue::recall_all`] asks again.
    Refused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the queue, for any peer.
    Waiting,
    /// Sent to this peer; the number is the task's place in the order of sending.
    Held(PeerId, u64),
    /// No peer holds it, and it is not in the queue: its peer was removed, or it is about to be sent. The caller
    /// decides.
    Orphan,
}

#[derive(Debug)]
#[allow(clippy::struct_excessive_bools)] // each is a fact of its own
struct Entry {
    message: Message,
    /// What the message brings to a peer, in bytes: see [`Message::load`]. It counts towards [`WINDOW`].
    size: usize,
    place: Place,
    recall: Recall,
    /// Set when the task was submitted for one peer: it is neither recalled nor tried elsewhere.
    pinned: bool,
    /// Set while its holder is told to drop it. If the task then comes back unstarted, or its holder is lost, it has
    /// ended.
    cancelled: bool,
    /// Set when a holder was told to drop it, and never unset: from then on a holder may answer that it was dropped.
    droppable: bool,
    /// Set when its holder reported that it runs; unset when the holder loses it.
    running: bool,
}

impl Entry {
    fn new(message: Message, size: usize, place: Place, pinned: bool) -> Self {
        let recall = Recall::NotAsked;
        Self { message, size, place, recall, pinned, cancelled: false, droppable: false, running: false }
    }
}

#[derive(Debug)]
struct Peer {
    /// Tasks that it runs at once.
    slots: usize,
    /// Tasks beyond its slots that it may hold. Follows its rate and its round-trip time: see [`Peer::tune`].
    prefetch: usize,
    /// The least that `prefetch` may be.
    min_prefetch: usize,
    /// The tasks that it holds, by their places in the order of sending.
    held: BTreeMap<u64, u64>,
    /// Payload of the tasks that it holds, in bytes.
    bytes: usize,
    /// The latest round-trip time to it, as the caller measured it.
    rtt: Duration,
    /// Tasks per second that it ended, measured over [`RATE_WINDOW`] or longer, up to `measured`.
    rate: f64,
    /// When `rate` was measured last.
    measured: Instant,
    /// Tasks that it ended since then.
    ended: u32,
    /// Set by [`Queue::close_peer`]: it is sent no more tasks but those that are for it alone.
    closed: bool,
    /// Set by [`Queue::pause_peer`], alike, and none is asked back.
    paused: bool,
}

impl Peer {
    /// Tasks held per slot, in 1/1024.
    fn load(&self) -> usize {
        self.held.len().saturating_mul(1024) / self.slots.max(1)
    }

    /// Whether it may hold another task, were that task of no size.
    fn has_place(&self) -> bool {
        self.held.len() < self.slots + self.prefetch
    }

    /// Whether it may hold another task of this size. A free slot takes a task of any size; a task beyond the slots
    /// must fit the window beside the others beyond the slots.
    ///
    /// For example, with 2 slots, a prefetch of 2 and a window of 64 MiB: two tasks of 100 MiB are sent at once, as the
    /// slots are free. Then it holds 200 MiB, of which the two in the slots account for all 200, so a third one of 60
    /// MiB may be sent too, and one of 70 MiB may not: 200 + 70 > 64 + 200.
    fn has_room(&self, size: usize) -> bool {
        // Which tasks are running is not known here: those in the slots count as much as the mean.
        let running = self.bytes / self.held.len().max(1) * self.slots;
        self.held.len() < self.slots
            || (self.has_place() && self.bytes.saturating_add(size) <= WINDOW.saturating_add(running))
    }

    /// Tasks per second: the tasks that ended since the last measurement and that measurement, weighed by time. Falls
    /// towards 0 while no task ends.
    ///
    /// For example: 50/s was measured, and 10 tasks ended in the 300 ms since then. The measurement counts for the 100
    /// ms of [`RATE_WINDOW`], as 5 tasks; 15 tasks in 400 ms are 37.5/s.
    fn rate_at(&self, now: Instant) -> f64 {
        let span = now.saturating_duration_since(self.measured).as_secs_f64();
        let before = RATE_WINDOW.as_secs_f64();
        (self.rate * before + f64::from(self.ended)) / (before + span)
    }

    /// Set the prefetch to one and a half times the tasks that end while a result travels to this end and a task back.
    ///
    /// For example: a node that ends 1,000 tasks per second at a round trip of 38 ms ends 40 tasks in those and the 2
    /// ms of waking threads, so it may hold 60 tasks beyond its slots.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a product of positive, bounded numbers
    fn tune(&mut self) {
        let covered = 1.5 * self.rate * (self.rtt + WAKE_UP_DELAY).as_secs_f64();
        self.prefetch = self.min_prefetch.max((covered as usize).min(MAX_PREFETCH));
    }
}

/// What [`Queue::cancel`] and [`Queue::give_up`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// The task waited here and is gone.
    Dropped,
    /// This peer holds the task: the caller has to tell it.
    Held(PeerId),
    /// No such task: it has ended.
    Unknown,
}

/// See the file's text.
#[derive(Debug, Default)]
pub struct Queue {
    /// The tasks that wait, in order; and numbers of tasks that were cancelled while they waited.
    fifo: VecDeque<u64>,
    /// The tasks that wait.
    waiting: usize,
    /// Every task that has not ended.
    tasks: HashMap<u64, Entry>,
    /// The calls of all of these in sum: see [`Message::calls`].
    calls: u64,
    peers: HashMap<PeerId, Peer>,
    /// The peers that are not closed, by load.
    by_load: BTreeSet<(usize, PeerId)>,
    /// Those among `by_load` that may hold another task.
    with_place: BTreeSet<(usize, PeerId)>,
    /// Tasks that ended here because they had been cancelled, until [`Queue::take_cancelled`].
    cancelled: Vec<Attempt>,
    /// The place in the order of sending of the task that was sent last.
    last_sent: u64,
    /// Tasks whose `recall` is `Asked`.
    open_recalls: usize,
    /// See [`Queue::local`].
    local: bool,
}

impl Queue {
    /// Return a queue for peers in the same machine, which answer at once. A peer of one slot is sent no task in
    /// advance before its rate shows that its tasks are short: a task that is sent in advance would wait behind a long
    /// one while other peers become free.
    #[must_use]
    pub fn local() -> Self {
        Self { local: true, ..Self::default() }
    }

    /// Return how many tasks wait for any peer.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Return how many tasks have not ended.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Return how many calls the tasks have in sum that have not ended.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.calls
    }

    /// Return how many calls a task has that has not ended.
    #[must_use]
    pub fn calls_of(&self, task: u64) -> u32 {
        self.tasks.get(&task).map_or(0, |entry| entry.message.calls)
    }

    /// Return whether every task has ended.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Return the peers' slots in sum.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.peers.values().map(|p| p.slots).sum()
    }

    /// Add a peer, which may be sent tasks from now on.
    pub fn add_peer(&mut self, id: PeerId, slots: usize, now: Instant) {
        let slots = slots.max(1);
        let min_prefetch = if self.local && slots == 1 { 0 } else { slots };
        let peer = Peer {
            slots,
            prefetch: min_prefetch,
            min_prefetch,
            held: BTreeMap::new(),
            bytes: 0,
            rtt: Duration::ZERO,
            rate: 0.0,
            measured: now,
            ended: 0,
            closed: false,
            paused: false,
        };
        self.peers.insert(id, peer);
        self.index(id);
    }

    /// Correct a peer's entry in the indexes by load after a change of its prefetch, which leaves its load as it is.
    fn reindex(&mut self, id: PeerId) {
        self.unindex(id);
        self.index(id);
    }

    /// Take a peer out of the indexes by load, before its load changes.
    fn unindex(&mut self, id: PeerId) {
        if let Some(peer) = self.peers.get(&id) {
            self.by_load.remove(&(peer.load(), id));
            self.with_place.remove(&(peer.load(), id));
        }
    }

    /// Put a peer into the indexes by load.
    fn index(&mut self, id: PeerId) {
        if let Some(peer) = self.peers.get(&id).filter(|p| !p.closed && !p.paused) {
            self.by_load.insert((peer.load(), id));
            if peer.has_place() {
                self.with_place.insert((peer.load(), id));
            }
        }
    }

    /// Send a peer no more tasks but those that are for it alone. Return the tasks that it is to be asked to give back.
    pub fn close_peer(&mut self, id: PeerId) -> Vec<Attempt> {
        self.unindex(id);
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.closed = true;
        }
        self.recall_all(id)
    }

    /// Send a peer no more tasks but those that are for it alone, until it is resumed; or resume it.
    pub fn pause_peer(&mut self, id: PeerId, paused: bool) {
        self.unindex(id);
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.paused = paused;
        }
        self.index(id);
    }

    /// Return the tasks that a peer is to be asked to give back: all that may go elsewhere, but for those that it has
    /// been asked for and has not answered. A refused task is asked for again, as it may not have arrived at the first
    /// time.
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
                self.open_recalls += 1;
                asked.push(entry.message.id);
            }
        }
        asked
    }

    /// Return the tasks that a peer holds, in the order of sending.
    pub fn held(&self, id: PeerId) -> impl Iterator<Item = Attempt> {
        let tasks = self.peers.get(&id).into_iter().flat_map(|p| p.held.values());
        tasks.filter_map(|t| self.tasks.get(t).map(|e| e.message.id))
    }

    /// Remove a peer. Return the tasks that it held, in the order of sending; they are orphans now. The caller puts
    /// each of them back with [`Queue::requeue`] or [`Queue::retry`], the last one first, or ends it with
    /// [`Queue::remove`].
    pub fn remove_peer(&mut self, id: PeerId) -> Vec<u64> {
        self.unindex(id);
        let Some(peer) = self.peers.remove(&id) else { return Vec::new() };
        for task in peer.held.values() {
            if let Some(entry) = self.tasks.get_mut(task) {
                entry.place = Place::Orphan;
                entry.running = false;
                if entry.recall == Recall::Asked {
                    self.open_recalls -= 1;
                }
                entry.recall = Recall::NotAsked;
            }
        }
        peer.held.into_values().collect()
    }

    /// Set the round-trip time to a peer.
    pub fn set_rtt(&mut self, id: PeerId, rtt: Duration) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.rtt = rtt;
            peer.tune();
        }
        self.reindex(id);
    }

    /// Append a task, for any peer.
    pub fn push(&mut self, message: Message) {
        let task = message.id.task;
        let size = message.load();
        let place = Place::Waiting;
        let entry = Entry::new(message, size, place, false);
        self.insert(entry);
        self.fifo.push_back(task);
        self.waiting += 1;
    }

    /// Add a task for this peer only, however much the peer holds. Return its message, which is to be sent at once;
    /// `None` if there is no such peer.
    pub fn push_to(&mut self, peer: PeerId, message: Message) -> Option<Message> {
        self.peers.get(&peer)?;
        let task = message.id.task;
        let size = message.load();
        let place = Place::Orphan;
        let entry = Entry::new(message, size, place, true);
        self.insert(entry);
        self.give(peer, task)
    }

    fn insert(&mut self, entry: Entry) {
        self.calls += u64::from(entry.message.calls);
        self.tasks.insert(entry.message.id.task, entry);
    }

    /// Take a task out that no peer holds. Return its message.
    fn forget(&mut self, task: u64) -> Option<Message> {
        let message = self.tasks.remove(&task)?.message;
        self.calls -= u64::from(message.calls);
        Some(message)
    }

    /// Give an orphan to this peer. Return its message, which is to be sent at once.
    pub fn give(&mut self, peer: PeerId, task: u64) -> Option<Message> {
        if self.is_orphan(task) { self.hold(peer, task) } else { None }
    }

    /// Put an orphan back at the front of the queue; or end it, if it was cancelled.
    /// Return false if the task was for its lost peer only; it is then left to [`Queue::remove`].
    pub fn requeue(&mut self, task: u64) -> bool {
        let Some(entry) = self.tasks.get_mut(&task).filter(|e| e.place == Place::Orphan) else { return false };
        if entry.cancelled {
            self.cancelled.push(entry.message.id);
            self.forget(task);
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

    /// Return the tasks that ended since the last call because they were cancelled and then given back, or lost their
    /// peer.
    pub fn take_cancelled(&mut self) -> Vec<Attempt> {
        std::mem::take(&mut self.cancelled)
    }

    /// As [`Queue::requeue`], but as another attempt: results of the earlier attempt are stale from now on.
    /// Return false if `budget` attempts were made or the task was for its lost peer only; it is then left to
    /// [`Queue::remove`].
    pub fn retry(&mut self, task: u64, budget: u16) -> bool {
        let Some(entry) = self.tasks.get_mut(&task) else { return false };
        let next = entry.message.id.attempt.saturating_add(1);
        if (next >= budget || entry.pinned) && !entry.cancelled {
            return false;
        }
        entry.message.id.attempt = next;
        self.requeue(task)
    }

    /// Return the next task to send and the least loaded peer that has room for it, while both exist.
    pub fn assign(&mut self) -> Option<(PeerId, Message)> {
        let task = loop {
            let &task = self.fifo.front()?;
            // A task that was cancelled while it waited left its number behind.
            match self.tasks.get(&task) {
                Some(entry) if entry.place == Place::Waiting => break task,
                _ => self.fifo.pop_front(),
            };
        };
        let size = self.tasks.get(&task)?.size;
        let has_room = |id: &PeerId| self.peers.get(id).is_some_and(|p| p.has_room(size));
        let id = self.with_place.iter().map(|&(_, id)| id).find(has_room)?;
        self.fifo.pop_front();
        self.waiting -= 1;
        self.hold(id, task).map(|message| (id, message))
    }

    /// Note that this peer holds a task from now on, as the last one in its order.
    fn hold(&mut self, id: PeerId, task: u64) -> Option<Message> {
        self.unindex(id);
        let entry = self.tasks.get_mut(&task)?;
        let peer = self.peers.get_mut(&id)?;
        self.last_sent += 1;
        entry.place = Place::Held(id, self.last_sent);
        peer.held.insert(self.last_sent, task);
        peer.bytes += entry.size;
        let message = entry.message.clone();
        self.index(id);
        Some(message)
    }

    /// Make a task an orphan, if a peer holds it.
    fn unhold(&mut self, task: u64) {
        let Some(entry) = self.tasks.get_mut(&task) else { return };
        if entry.recall == Recall::Asked {
            self.open_recalls -= 1;
        }
        entry.recall = Recall::NotAsked;
        entry.running = false;
        let Place::Held(id, seq) = std::mem::replace(&mut entry.place, Place::Orphan) else { return };
        let size = entry.size;
        self.unindex(id);
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.held.remove(&seq);
            peer.bytes = peer.bytes.saturating_sub(size);
        }
        self.index(id);
    }

    /// Note that a peer ended a task, and return the task. Return `None`, and change nothing, if the peer does not hold this
    /// attempt: the result is late or came twice.
    pub fn done(&mut self, from: PeerId, id: Attempt, now: Instant) -> Option<Message> {
        if !self.holds(from, id) {
            return None;
        }
        self.unhold(id.task);
        let task = self.forget(id.task);
        if let Some(peer) = self.peers.get_mut(&from) {
            peer.ended += 1;
            if now.saturating_duration_since(peer.measured) >= RATE_WINDOW {
                peer.rate = peer.rate_at(now);
                peer.measured = now;
                peer.ended = 0;
                peer.tune();
                self.reindex(from);
            }
        }
        task
    }

    /// Note that a peer runs a task; nothing if the peer does not hold this attempt.
    pub fn set_running(&mut self, from: PeerId, id: Attempt) {
        if self.holds(from, id)
            && let Some(entry) = self.tasks.get_mut(&id.task)
        {
            entry.running = true;
        }
    }

    /// Return whether a task's holder has reported that the task runs.
    #[must_use]
    pub fn is_running(&self, task: u64) -> bool {
        self.tasks.get(&task).is_some_and(|entry| entry.running)
    }

    /// Return how many tasks a peer holds.
    #[must_use]
    pub fn count_held(&self, peer: PeerId) -> usize {
        self.peers.get(&peer).map_or(0, |peer| peer.held.len())
    }

    /// Return whether this peer holds this attempt.
    #[must_use]
    pub fn holds(&self, peer: PeerId, id: Attempt) -> bool {
        self.tasks
            .get(&id.task)
            .is_some_and(|e| e.message.id == id && matches!(e.place, Place::Held(holder, _) if holder == peer))
    }

    /// Return whether this peer holds this attempt, was asked to give it back, and has not answered.
    #[must_use]
    pub fn is_asked_back(&self, peer: PeerId, id: Attempt) -> bool {
        self.holds(peer, id) && self.tasks.get(&id.task).is_some_and(|e| e.recall == Recall::Asked)
    }

    /// Return whether this peer holds this attempt and is told to drop it.
    #[must_use]
    pub fn is_to_drop(&self, peer: PeerId, id: Attempt) -> bool {
        self.holds(peer, id) && self.tasks.get(&id.task).is_some_and(|e| e.cancelled)
    }

    /// Return whether a task's holder may answer that the task was dropped: a holder was told to drop it at some time,
    /// if only in vain.
    #[must_use]
    pub fn is_droppable(&self, task: u64) -> bool {
        self.tasks.get(&task).is_some_and(|e| e.droppable)
    }

    /// Return the place in the order of sending of the oldest task that a peer holds, and the longest time that one of
    /// the peer's tasks may run: the largest [`Message::nanos`], or 0 if the oldest task may run for as long as it
    /// likes.
    #[must_use]
    pub fn oldest(&self, peer: PeerId) -> Option<(u64, u64)> {
        let held = &self.peers.get(&peer)?.held;
        let (number, oldest) = held.first_key_value()?;
        let nanos = |task| self.tasks.get(task).map(|e: &Entry| e.message.nanos);
        // The oldest task may wait at the peer for one that was sent later and may run longer, but arrived first.
        let most = if nanos(oldest)? == 0 { 0 } else { held.values().filter_map(nanos).max()? };
        Some((*number, most))
    }

    /// Remove a task wherever it is. Return its message; `None` if it has ended.
    pub fn remove(&mut self, task: u64) -> Option<Message> {
        if self.tasks.get(&task)?.place == Place::Waiting {
            self.waiting -= 1;
        }
        self.unhold(task);
        self.forget(task)
    }

    /// Remove the tasks that wait for any peer, and return them.
    pub fn take_waiting(&mut self) -> Vec<Attempt> {
        let tasks: Vec<_> = self.fifo.drain(..).collect();
        // A task that was cancelled while it waited left its number behind.
        let waits = |t: &u64| self.tasks.get(t).is_some_and(|e| e.place == Place::Waiting);
        let waiting: Vec<_> = tasks.into_iter().filter(waits).collect();
        waiting.into_iter().filter_map(|t| self.remove(t).map(|message| message.id)).collect()
    }

    /// Remove all tasks, and return them.
    pub fn take_all(&mut self) -> Vec<Attempt> {
        let ids: Vec<_> = self.tasks.values().map(|e| e.message.id).collect();
        for id in &ids {
            self.remove(id.task);
        }
        ids
    }

    /// Return the present attempt at a task; `None` if it has ended.
    #[must_use]
    pub fn attempt(&self, task: u64) -> Option<Attempt> {
        self.tasks.get(&task).map(|e| e.message.id)
    }

    /// Return the message of a task that waits for any peer.
    #[must_use]
    pub fn waiting_message(&self, task: u64) -> Option<&Message> {
        self.tasks.get(&task).filter(|e| e.place == Place::Waiting).map(|e| &e.message)
    }

    /// Remove a task if no peer holds it. Otherwise mark it as cancelled, and return its holder, which is to be told to
    /// drop it.
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

    /// Note that the holder of a cancelled task runs it and goes on: the task is no longer cancelled.
    pub fn uncancel(&mut self, task: u64) {
        if let Some(entry) = self.tasks.get_mut(&task) {
            entry.cancelled = false;
        }
    }

    /// Remove a task that this queue's own supplier recalls (the client, which recalls from an agent), if it waits.
    /// Otherwise return its holder, which is to be asked for it; the task is not cancelled by this. An orphan stays, as
    /// `Unknown`: the caller has already decided which peer gets it.
    pub fn give_up(&mut self, task: u64) -> Cancelled {
        match self.tasks.get(&task).map(|e| e.place) {
            Some(Place::Held(peer, _)) => Cancelled::Held(peer),
            Some(Place::Orphan) => Cancelled::Unknown,
            _ => self.cancel(task),
        }
    }

    /// Return whether a task is an orphan: the caller decides which peer gets it.
    #[must_use]
    pub fn is_orphan(&self, task: u64) -> bool {
        self.tasks.get(&task).is_some_and(|e| e.place == Place::Orphan)
    }

    /// Return the orphans. Looks at every task: for checks.
    pub fn orphans(&self) -> impl Iterator<Item = u64> {
        self.tasks.iter().filter(|(_, entry)| entry.place == Place::Orphan).map(|(task, _)| *task)
    }

    /// Return a task to recall and its holder, while (1) no task waits, (2) the least loaded peer has a free slot that
    /// no earlier recall will fill, and (3) the most loaded peer would not start the task before its answer is here.
    ///
    /// For example: peers A and B have 4 slots each and a round trip of 8 ms. A holds 2 tasks, so it has 2 free slots,
    /// and no recall is on its way. B holds 9 tasks, 5 of them beyond its slots, and ends 100 tasks per second: within
    /// two round trips, 2 · (8 + 2 ms), it will start 2 of them. 5 > 2, so the last of the 5 is recalled, and at the
    /// next call the one before it. A third call returns `None`: the two recalls will fill A's slots.
    pub fn steal(&mut self, now: Instant) -> Option<(PeerId, Attempt)> {
        if self.waiting > 0 {
            return None;
        }
        let &(_, idle) = self.by_load.first()?;
        let &(_, busy) = self.by_load.last()?;
        let free = self.peers.get(&idle).map(|p| p.slots.saturating_sub(p.held.len()))?;
        if free <= self.open_recalls {
            return None;
        }
        let victim = self.peers.get(&busy)?;
        // The first `slots` tasks are most likely running: only those after them are recalled.
        let excess = victim.held.len().saturating_sub(victim.slots);
        #[allow(clippy::cast_precision_loss)] // a count of tasks
        if excess as f64 <= victim.rate_at(now) * 2.0 * (victim.rtt + WAKE_UP_DELAY).as_secs_f64() {
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
        self.open_recalls += 1;
        Some((busy, entry.message.id))
    }

    /// Take back a task that a peer gave back unstarted. Return whether it waits again, so that the caller should
    /// assign it.
    pub fn given_back(&mut self, from: PeerId, id: Attempt) -> bool {
        // A task for one peer only was not recalled from it.
        if !self.holds(from, id) || self.tasks.get(&id.task).is_some_and(|e| e.pinned) {
            return false;
        }
        self.unhold(id.task);
        self.requeue(id.task)
    }

    /// Note that a peer refused to give a task back, as it has started it or had not received it.
    pub fn recall_refused(&mut self, from: PeerId, id: Attempt) {
        if self.holds(from, id)
            && let Some(entry) = self.tasks.get_mut(&id.task)
            && entry.recall == Recall::Asked
        {
            entry.recall = Recall::Refused;
            self.open_recalls -= 1;
        }
    }
}
