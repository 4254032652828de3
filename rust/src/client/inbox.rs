//! What tasks wrote, and what they told this process, until the caller's threads have taken it.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use bytes::Bytes;

use crate::locks::{lock, wait_timeout_while};
use crate::wire::flood::{Flood, Piece};
use crate::wire::{ASKS, LEFT_OUT, Message, STDERR};

/// What a worker wrote: the node's name, the number of the stream as `node/stdio.rs` makes it, and the text.
pub type Lines = (String, u64, Bytes);

/// See the module's text. Output, notes and requests each have a thread that takes them.
#[derive(Debug, Default)]
pub struct Inbox {
    output: Mutex<Waiting<Flood<(String, u64)>>>,
    /// Notified when output comes and none was there, and when the pool is closed.
    output_came: Condvar,
    notes: Notes,
    /// Notes that ask for something: they do not wait until a listener of the user's has taken the notes before them.
    requests: Notes,
}

#[derive(Debug, Default)]
struct Notes {
    notes: Mutex<Waiting<Vec<(u64, Message)>>>,
    /// Notified when a note comes, and when the pool is closed.
    came: Condvar,
}

impl Notes {
    fn add(&self, sender: u64, note: Message) {
        lock(&self.notes).items.push((sender, note));
        self.came.notify_one();
    }

    fn take(&self, bound: Duration) -> Option<Vec<(u64, Message)>> {
        let notes = lock(&self.notes);
        let mut notes = wait_timeout_while(&self.came, notes, bound, |n| n.items.is_empty() && !n.closed);
        // Notes that still wait when the pool is closed have no sender left that could hear an answer.
        (!notes.closed).then(|| std::mem::take(&mut notes.items))
    }

    fn close(&self) {
        lock(&self.notes).closed = true;
        self.came.notify_all();
    }
}

#[derive(Debug, Default)]
struct Waiting<T> {
    items: T,
    /// The pool is closed: nothing more comes.
    closed: bool,
}

impl Inbox {
    /// Add what a worker of this node wrote to a stream. Of a flood the middle is left out.
    pub fn add_output(&self, node: &str, stream: u64, text: Bytes) {
        let from = (node.to_owned(), stream);
        let piece = if stream == LEFT_OUT {
            let number = str::from_utf8(&text).ok().and_then(|text| text.parse().ok());
            Piece { from, text: Bytes::new(), left_out: number.unwrap_or_default() }
        } else {
            Piece { from, text, left_out: 0 }
        };
        let mut output = lock(&self.output);
        let was_empty = output.items.is_empty();
        output.items.push(piece);
        // The thread that takes output waits only while there is none; and a flood of empty pieces does not wake it.
        if was_empty && !output.items.is_empty() {
            self.output_came.notify_one();
        }
    }

    /// Take what workers wrote, waiting up to `bound` for it. Return `None` if all was taken and the pool is closed.
    pub fn take_output(&self, bound: Duration) -> Option<Vec<Lines>> {
        let output = lock(&self.output);
        let mut output = wait_timeout_while(&self.output_came, output, bound, |o| o.items.is_empty() && !o.closed);
        if output.closed && output.items.is_empty() {
            return None;
        }
        let lines = std::iter::from_fn(|| output.items.pop()).map(|Piece { from: (node, stream), text, left_out }| {
            if left_out == 0 {
                (node, stream, text)
            } else {
                // The node counted these bytes, no worker wrote them.
                let text = format!("… {left_out} bytes of output are left out here\n");
                (node, STDERR, Bytes::from(text))
            }
        });
        Some(lines.collect())
    }

    /// Add what a task told or asked this process.
    pub fn add_note(&self, sender: u64, note: Message) {
        let notes = if note.code == ASKS { &self.requests } else { &self.notes };
        notes.add(sender, note);
    }

    /// Take what tasks told this process, each note with its node, waiting up to `bound` for one. Return `None` once the
    /// pool is closed.
    pub fn take_notes(&self, bound: Duration) -> Option<Vec<(u64, Message)>> {
        self.notes.take(bound)
    }

    /// As [`Inbox::take_notes`], for what tasks asked this process.
    pub fn take_requests(&self, bound: Duration) -> Option<Vec<(u64, Message)>> {
        self.requests.take(bound)
    }

    /// Mark the pool as closed: the threads that take return when nothing is left.
    pub fn close(&self) {
        lock(&self.output).closed = true;
        self.output_came.notify_all();
        self.notes.close();
        self.requests.close();
    }
}
