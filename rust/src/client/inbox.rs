//! What tasks wrote, and what they told this process, until the caller's threads have taken it.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use bytes::Bytes;

use crate::locks::{lock, wait_timeout_while};
use crate::wire::flood::{Flood, Piece};
use crate::wire::{LEFT_OUT, Message, STDERR};

/// What a worker wrote: the node's name, the number of the stream as `node/stdio.rs` makes it, and the text.
pub type Lines = (String, u64, Bytes);

/// See the module's text. Output and notes each have a thread that takes them.
#[derive(Debug, Default)]
pub struct Inbox {
    output: Mutex<Waiting<Flood<(String, u64)>>>,
    /// Notified when output comes and none was there, and when the pool is closed.
    output_came: Condvar,
    notes: Mutex<Waiting<Vec<(u64, Message)>>>,
    /// Notified when a note comes, and when the pool is closed.
    note_came: Condvar,
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

    /// Add what a task told this process.
    pub fn add_note(&self, sender: u64, note: Message) {
        lock(&self.notes).items.push((sender, note));
        self.note_came.notify_one();
    }

    /// Take what tasks told this process, each note with its node, waiting up to `bound` for one. Return `None` once the
    /// pool is closed.
    pub fn take_notes(&self, bound: Duration) -> Option<Vec<(u64, Message)>> {
        let notes = lock(&self.notes);
        let mut notes = wait_timeout_while(&self.note_came, notes, bound, |n| n.items.is_empty() && !n.closed);
        // Notes that still wait when the pool is closed have no sender left that could hear an answer.
        (!notes.closed).then(|| std::mem::take(&mut notes.items))
    }

    /// Mark the pool as closed: the threads that take return when nothing is left.
    pub fn close(&self) {
        lock(&self.output).closed = true;
        self.output_came.notify_all();
        lock(&self.notes).closed = true;
        self.note_came.notify_all();
    }
}
