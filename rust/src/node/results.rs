//! Results and notes on their way to the client: sent as far as there is credit, kept until the client has taken them.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};

use crate::node::actions::Action;
use crate::queue::PeerId;
use crate::timing::{AGENT_BACKLOG, CREDIT, NOTE_CREDIT};
use crate::wire::{Attempt, Body, MAX_SMALL_MESSAGE, Message};

/// Between agent and client, a note's number has its worker's number in the bits from this one on. So the client's answer
/// finds the worker that asked, and never the process that took this worker's place.
const NOTE_WORKER_SHIFT: u32 = 40;

/// The results of one kind: small ones, or large ones. Each kind has a credit of its own, so that small results do not
/// wait until the client has taken a large one, which may be under way for minutes.
#[derive(Debug, Default)]
struct Flow {
    /// The memory of the results that were sent and not acknowledged, in bytes.
    unacknowledged: usize,
    /// Results for which there is no credit yet, in the order in which the tasks ended.
    backlog: VecDeque<Message>,
    /// The memory of `backlog`, in bytes.
    backlog_bytes: usize,
}

impl Flow {
    /// Return whether a result that takes so many bytes may be sent. One result may always be on its way.
    fn has_credit(&self, cost: usize) -> bool {
        self.unacknowledged == 0 || self.unacknowledged.saturating_add(cost) <= CREDIT
    }

    fn push(&mut self, result: Message) {
        self.backlog_bytes += result.cost();
        self.backlog.push_back(result);
    }

    /// Return the next result if there is credit for it.
    fn pop(&mut self) -> Option<Message> {
        if !self.has_credit(self.backlog.front()?.cost()) {
            return None;
        }
        let result = self.backlog.pop_front()?;
        self.backlog_bytes -= result.cost();
        Some(result)
    }

    fn is_consistent(&self) -> bool {
        self.backlog_bytes == self.backlog.iter().map(Message::cost).sum::<usize>()
            && !self.backlog.front().is_some_and(|result| self.has_credit(result.cost()))
    }
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Results {
    /// Results that were sent, until the client acknowledges them. They use up the credit.
    unacknowledged: HashMap<Attempt, Message>,
    /// Results that travel in one chunk, and larger ones.
    small: Flow,
    large: Flow,
    /// The memory of each note that was sent, in bytes, by its number, until the client answers it.
    unanswered_notes: HashMap<u64, usize>,
    /// The sum of `unanswered_notes`.
    unanswered_bytes: usize,
    /// Notes for which there is no credit yet.
    notes_backlog: VecDeque<Message>,
    /// The memory of `notes_backlog`, in bytes.
    notes_backlog_bytes: usize,
}

impl Results {
    /// Return whether so many bytes wait for the client's credit that the workers are not to be read from.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.small.backlog_bytes + self.large.backlog_bytes + self.notes_backlog_bytes > AGENT_BACKLOG
    }

    /// Return how many results the client has not acknowledged; those that were not sent yet count.
    #[must_use]
    pub fn len(&self) -> usize {
        self.unacknowledged.len() + self.backlog()
    }

    /// Return whether the client has acknowledged every result.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Return how many results were not sent yet, because the client has given no credit for them.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.small.backlog.len() + self.large.backlog.len()
    }

    fn flow(&mut self, result: &Message) -> &mut Flow {
        if result.size() <= MAX_SMALL_MESSAGE { &mut self.small } else { &mut self.large }
    }

    /// Send a task's result, or hold it back until there is credit.
    pub fn deliver(&mut self, result: Message, out: &mut Vec<Action>) {
        self.flow(&result).push(result);
        self.send_results(out);
    }

    /// Forget results that the client has taken, and send as many as have credit now.
    pub fn acknowledge(&mut self, ids: &[Attempt], out: &mut Vec<Action>) {
        for id in ids {
            if let Some(message) = self.unacknowledged.remove(id) {
                self.flow(&message).unacknowledged -= message.cost();
            }
        }
        let was_full = self.is_full();
        self.send_results(out);
        self.read_again(was_full, out);
    }

    fn send_results(&mut self, out: &mut Vec<Action>) {
        while let Some(result) = self.small.pop().or_else(|| self.large.pop()) {
            self.flow(&result).unacknowledged += result.cost();
            if let Some(before) = self.unacknowledged.insert(result.id, result.clone()) {
                self.flow(&before).unacknowledged -= before.cost();
            }
            out.push(Action::Deliver(Body::Result, result));
        }
    }

    /// Send a worker's note, or hold it back until there is credit. One note may always be on its way.
    pub fn deliver_note(&mut self, worker: PeerId, mut note: Message, out: &mut Vec<Action>) {
        note.id.task = (worker as u64) << NOTE_WORKER_SHIFT | (note.id.task & ((1 << NOTE_WORKER_SHIFT) - 1));
        self.notes_backlog_bytes += note.cost();
        self.notes_backlog.push_back(note);
        self.send_notes(out);
    }

    /// Count a note as answered. Returns the worker that sent it, and the number that the note has there.
    pub fn answer_note(&mut self, note: u64, out: &mut Vec<Action>) -> Option<(PeerId, u64)> {
        self.unanswered_bytes -= self.unanswered_notes.remove(&note).unwrap_or_default();
        let was_full = self.is_full();
        self.send_notes(out);
        self.read_again(was_full, out);
        let worker = PeerId::try_from(note >> NOTE_WORKER_SHIFT).ok()?;
        Some((worker, note & ((1 << NOTE_WORKER_SHIFT) - 1)))
    }

    fn send_notes(&mut self, out: &mut Vec<Action>) {
        while let Some(note) = self.notes_backlog.pop_front() {
            let cost = note.cost();
            if self.unanswered_bytes > 0 && self.unanswered_bytes.saturating_add(cost) > NOTE_CREDIT {
                self.notes_backlog.push_front(note);
                break;
            }
            self.notes_backlog_bytes -= cost;
            // A task that writes to its worker's socket can use a number twice. The client takes each number once, so the
            // second note is dropped.
            if let Entry::Vacant(new) = self.unanswered_notes.entry(note.id.task) {
                new.insert(cost);
                self.unanswered_bytes += cost;
                out.push(Action::Deliver(Body::Note, note));
            }
        }
    }

    fn read_again(&self, was_full: bool, out: &mut Vec<Action>) {
        if was_full && !self.is_full() {
            out.push(Action::ReadWorkers);
        }
    }

    /// Return whether each sum is that of the messages that it counts, and no message waits for which there is credit.
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        let sent = |small: bool| {
            let of_kind = self.unacknowledged.values().filter(|result| (result.size() <= MAX_SMALL_MESSAGE) == small);
            of_kind.map(Message::cost).sum::<usize>()
        };
        let notes_backlog_bytes = self.notes_backlog.iter().map(Message::cost).sum::<usize>();
        (self.small.unacknowledged, self.large.unacknowledged) == (sent(true), sent(false))
            && self.small.is_consistent()
            && self.large.is_consistent()
            && self.unanswered_bytes == self.unanswered_notes.values().sum::<usize>()
            && self.notes_backlog_bytes == notes_backlog_bytes
            && (self.notes_backlog.is_empty() || self.unanswered_bytes > 0)
    }
}
