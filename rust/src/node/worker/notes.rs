//! The notes of a worker process: what its tasks tell the client while they run, or ask it for, until the client has
//! answered.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;

use crate::locks::lock;
use crate::timing::NOTE_CREDIT;
use crate::wire::{Attempt, Message};

/// What the client answered to a note: what the note asked for, and nothing if it asked for nothing; or why the note was not
/// taken.
pub type NoteAnswer = Result<Bytes, Bytes>;

#[derive(Debug, Default)]
struct State {
    /// The number of the note that was made last.
    last: u64,
    /// Where the answer to each note comes out, until it does or is not wanted any more.
    unanswered: HashMap<u64, SyncSender<NoteAnswer>>,
    /// Notes for which there is no credit yet.
    backlog: VecDeque<Message>,
    /// The memory of each note that was sent, in bytes, by its number, until the client answers it.
    sent: HashMap<u64, usize>,
    /// The sum of `sent`.
    sent_bytes: usize,
}

impl State {
    /// Take the notes for which there is credit, to be sent. One note may always be on its way.
    fn take(&mut self) -> Vec<Message> {
        let mut notes = Vec::new();
        while let Some(cost) = self.backlog.front().map(Message::cost)
            && (self.sent_bytes == 0 || self.sent_bytes.saturating_add(cost) <= NOTE_CREDIT)
            && let Some(note) = self.backlog.pop_front()
        {
            self.sent_bytes += cost;
            self.sent.insert(note.id.task, cost);
            notes.push(note);
        }
        notes
    }
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Notes {
    state: Mutex<State>,
}

impl Notes {
    /// Make a note of these parts, which is sent as soon as there is credit for it. `code`: whether it tells or asks. Returns
    /// its number, and where its answer comes out.
    pub fn add(&self, code: u8, parts: Vec<Bytes>) -> (u64, Receiver<NoteAnswer>) {
        let (answered, answer) = sync_channel(1);
        let mut state = lock(&self.state);
        state.last += 1;
        let number = state.last;
        state.unanswered.insert(number, answered);
        state.backlog.push_back(Message {
            id: Attempt { task: number, attempt: 0 },
            code,
            parts,
            ..Message::default()
        });
        (number, answer)
    }

    /// Return the notes that are to be sent now.
    pub fn take(&self) -> Vec<Message> {
        lock(&self.state).take()
    }

    /// Wait no more for the answer to a note, which is not sent if it was not.
    pub fn forget(&self, number: u64) {
        let mut state = lock(&self.state);
        state.unanswered.remove(&number);
        state.backlog.retain(|note| note.id.task != number);
    }

    /// Hand an answer to the thread that waits for it. Returns the notes that are to be sent now.
    pub fn answer(&self, number: u64, answer: NoteAnswer) -> Vec<Message> {
        let mut state = lock(&self.state);
        state.sent_bytes -= state.sent.remove(&number).unwrap_or_default();
        if let Some(answered) = state.unanswered.remove(&number) {
            // Nobody may wait for it any more.
            drop(answered.try_send(answer));
        }
        state.take()
    }
}
