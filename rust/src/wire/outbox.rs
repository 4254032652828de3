//! What one end has yet to send, and in which order. Pure.
//!
//! Control frames come first, then small messages, then one chunk of each large message in turn. So no small task waits
//! behind a large one, and no heartbeat behind either. (Only what the SSH channel's window has taken already is ahead.)
//!
//! For example: a task of 8 MiB, one of 1 MiB and one of 100 bytes were submitted in this order. The first block has
//! the small task, and a chunk of 32 KiB of the first; the following blocks have chunks of both large ones in turn. The
//! task of 1 MiB has arrived after about 2 MiB, and that of 8 MiB last.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::error::SessionError;
use crate::timing::{MAX_ANSWER_BYTES, MAX_ANSWERS};
use crate::wire::blob::OutgoingBlob;
use crate::wire::block::Packer;
use crate::wire::control::Control;
use crate::wire::decoder::MAX_UNFINISHED;
use crate::wire::flood::{Flood, Piece};
use crate::wire::header::{Attempt, FRAME_HEADER, MAX_CHUNK, put_preamble};
use crate::wire::large::Large;
use crate::wire::message::{Body, Message, Outgoing};
use crate::wire::pace::Allowance;

/// Raw bytes after which a block is sent.
pub(super) const FULL_BLOCK: usize = 64 * 1024;
/// Payload up to which a message is small, in bytes: it goes ahead of chunks of large ones.
pub const MAX_SMALL_MESSAGE: usize = 16 * 1024;
/// Large messages that are sent in turns; others wait until one of them has been sent. The receiver refuses more than
/// [`MAX_UNFINISHED`] at once.
const MAX_TURNS: usize = MAX_UNFINISHED / 4;
/// Acknowledgements in one frame, so that it fits a block.
const ACKNOWLEDGEMENTS_PER_FRAME: usize = 4096;
/// Bytes of output in one frame, and in one block.
pub const MAX_OUTPUT_FRAME: usize = 16 * 1024;
/// Standard output, in the lowest bits of the number that an output frame has for its stream.
pub const STDOUT: u64 = 1;
/// Standard error, alike.
pub const STDERR: u64 = 2;
/// The stream of an output frame whose text is a number: so many bytes of output are left out here.
pub const LEFT_OUT: u64 = 0;

/// See the file's text.
#[derive(Debug)]
pub struct Outbox {
    /// Whether the preamble is still to be sent.
    preamble: bool,
    control: VecDeque<Control>,
    /// What the receiver is to be told that has arrived of its bulk.
    received: Option<u64>,
    /// How many bytes of its stream the receiver need not keep any more.
    reached: Option<u64>,
    acknowledgements: Vec<Attempt>,
    output: Flood<u64>,
    small: VecDeque<Outgoing>,
    /// At most [`MAX_TURNS`] large messages and blobs, of which a chunk each is sent in turn.
    large: VecDeque<Large>,
    /// Large messages and blobs that wait until `large` has room.
    later: VecDeque<Large>,
    /// Payload bytes of messages and blobs that are still to be sent.
    bytes: usize,
    /// Those of blobs among them.
    blob_bytes: usize,
    /// Stripes that are open: while there are any, [`Outbox::fill`] leaves the blobs to them.
    stripes: usize,
    /// Memory of the answers in `control` and `acknowledgements`: see [`Control::answer_cost`].
    answers: usize,
    /// Payload of the answers to notes that were not sent in full.
    answer_bytes: usize,
    /// Set when `answers` exceeded [`MAX_ANSWERS`], or `answer_bytes` [`MAX_ANSWER_BYTES`]: everything was dropped, and nothing more is sent.
    given_up: bool,
    /// Set by [`Outbox::close`]: nothing is added after the goodbye.
    closed: bool,
    /// The block that is being filled; empty between two calls of [`Outbox::fill`], which reuse its memory.
    raw: Vec<u8>,
    packer: Packer,
}

impl Default for Outbox {
    fn default() -> Self {
        Self {
            preamble: true,
            control: VecDeque::new(),
            received: None,
            reached: None,
            acknowledgements: Vec::new(),
            output: Flood::default(),
            small: VecDeque::new(),
            large: VecDeque::new(),
            later: VecDeque::new(),
            bytes: 0,
            blob_bytes: 0,
            stripes: 0,
            answers: 0,
            answer_bytes: 0,
            given_up: false,
            closed: false,
            raw: Vec::new(),
            packer: Packer::default(),
        }
    }
}

impl Outbox {
    /// Send a control frame ahead of all messages.
    pub fn control(&mut self, control: Control) {
        if self.is_open() {
            self.answers += control.answer_cost();
            self.control.push_back(control);
            self.give_up_on_deaf_peer();
        }
    }

    /// Report that so many bytes of bulk have arrived so far. Only the last report is sent of those that wait.
    pub fn received(&mut self, bytes: u64) {
        if self.is_open() {
            self.received = Some(bytes);
        }
    }

    /// Report that so many bytes of the receiver's stream have arrived so far. Only the last report is sent of those that
    /// wait. It is sent after a goodbye, too.
    pub fn reached(&mut self, bytes: u64) {
        if !self.given_up {
            self.reached = Some(bytes);
        }
    }

    /// Send no preamble: it was sent with the greeting.
    pub fn skip_preamble(&mut self) {
        self.preamble = false;
    }

    /// Acknowledge results. Many become one frame.
    pub fn acknowledge(&mut self, ids: impl IntoIterator<Item = Attempt>) {
        if self.is_open() {
            let before = self.acknowledgements.len();
            self.acknowledgements.extend(ids);
            self.answers += (self.acknowledgements.len() - before) * size_of::<Attempt>();
            self.give_up_on_deaf_peer();
        }
    }

    /// Drop everything if more answers wait than those of a peer that reads. [`Outbox::fill`] returns the error.
    fn give_up_on_deaf_peer(&mut self) {
        if self.answers > MAX_ANSWERS || self.answer_bytes > MAX_ANSWER_BYTES {
            *self = Self { given_up: true, stripes: self.stripes, ..Self::default() };
        }
    }

    /// Send what tasks wrote to a stream, at most [`MAX_OUTPUT_FRAME`] bytes. If too much output waits, its middle is
    /// left out.
    pub fn output(&mut self, stream: u64, text: Bytes) {
        if self.is_open() {
            self.output.push(Piece { from: stream, text, left_out: 0 });
        }
    }

    fn next_output(&mut self) -> Option<Control> {
        let piece = self.output.pop()?;
        Some(if piece.left_out == 0 {
            Control::Output { stream: piece.from, text: piece.text }
        } else {
            Control::Output { stream: LEFT_OUT, text: Bytes::from(piece.left_out.to_string()) }
        })
    }

    /// Send a task, a result, a note or the answer to one.
    pub fn message(&mut self, body: Body, message: Message) {
        if !self.is_open() {
            return;
        }
        let size = message.size();
        self.bytes += size;
        let message = Outgoing::new(body, message);
        self.answer_bytes += message.answer_size();
        if size <= MAX_SMALL_MESSAGE {
            self.small.push_back(message);
        } else {
            self.large(Large::Message(message));
        }
        self.give_up_on_deaf_peer();
    }

    /// Send a blob, in chunks. Messages that name the blob may arrive before it.
    pub fn blob(&mut self, number: u64, bytes: Bytes) {
        if self.is_open() {
            self.bytes += bytes.len();
            self.blob_bytes += bytes.len();
            self.large(Large::Blob(OutgoingBlob::new(number, bytes)));
        }
    }

    fn large(&mut self, large: Large) {
        let queue = if self.large.len() < MAX_TURNS { &mut self.large } else { &mut self.later };
        queue.push_back(large);
    }

    /// Tell the receiver to forget these blobs. A blob of which nothing was sent is not sent.
    pub fn forget(&mut self, mut blobs: Vec<u64>) {
        for queue in [&mut self.large, &mut self.later] {
            queue.retain(|large| {
                let Large::Blob(blob) = large else { return true };
                let Some(at) = blob.unstarted().and_then(|number| blobs.iter().position(|b| *b == number)) else {
                    return true;
                };
                blobs.swap_remove(at);
                self.bytes -= blob.left();
                self.blob_bytes -= blob.left();
                false
            });
        }
        while self.large.len() < MAX_TURNS
            && let Some(next) = self.later.pop_front()
        {
            self.large.push_back(next);
        }
        if !blobs.is_empty() {
            self.control(Control::Forget(blobs));
        }
    }

    /// Send a goodbye, and nothing after it. Messages that were not sent yet are dropped; output is still sent.
    pub fn close(&mut self, why: &str) {
        if !self.closed {
            self.small.clear();
            self.large.clear();
            self.later.clear();
            (self.bytes, self.blob_bytes, self.answer_bytes) = (0, 0, 0);
            while let Some(output) = self.next_output() {
                self.control.push_back(output);
            }
            self.received = None;
            self.control.push_back(Control::Goodbye(Bytes::copy_from_slice(why.as_bytes())));
            self.closed = true;
        }
    }

    fn is_open(&self) -> bool {
        !self.closed && !self.given_up
    }

    /// Return whether a goodbye was the last thing to send, and is sent.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.closed && self.is_empty()
    }

    /// Return the payload bytes of messages and blobs that are still to be sent.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Note that a stripe was opened, which calls [`Outbox::fill_blobs`].
    pub fn open_stripe(&mut self) {
        self.stripes += 1;
    }

    /// Note that a stripe has ended.
    pub fn close_stripe(&mut self) {
        self.stripes -= 1;
    }

    /// Return the bytes of blobs that are still to be sent.
    #[must_use]
    pub fn blob_bytes(&self) -> usize {
        self.blob_bytes
    }

    /// Return whether chunks of large messages or of blobs are still to be sent.
    #[must_use]
    pub fn has_bulk(&self) -> bool {
        !self.large.is_empty()
    }

    /// Return whether messages or chunks are still to be sent.
    #[must_use]
    pub fn has_messages(&self) -> bool {
        !self.small.is_empty() || self.has_bulk()
    }

    /// Return whether there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.control.is_empty()
            && self.received.is_none()
            && self.reached.is_none()
            && self.acknowledgements.is_empty()
            && self.output.is_empty()
            && self.small.is_empty()
            && self.large.is_empty()
    }

    /// Append the next block to `out`. Return false if there was nothing to send.
    ///
    /// # Errors
    /// [`SessionError::Frame`] if a control frame is over its cap, [`SessionError::Deaf`] if answers over
    /// [`MAX_ANSWERS`] or [`MAX_ANSWER_BYTES`] waited.
    pub fn fill(&mut self, out: &mut Vec<u8>) -> Result<bool, SessionError> {
        self.fill_within(out, &mut Allowance::unlimited())
    }

    /// As [`Outbox::fill`], with chunks of large messages and of blobs only as far as they are allowed.
    ///
    /// # Errors
    /// As [`Outbox::fill`].
    pub fn fill_within(&mut self, out: &mut Vec<u8>, bulk: &mut Allowance) -> Result<bool, SessionError> {
        if self.given_up {
            return Err(SessionError::Deaf(MAX_ANSWERS));
        }
        if self.preamble {
            self.preamble = false;
            put_preamble(out);
        }
        self.raw.clear();
        self.put_control()?;
        if bulk.messages {
            self.put_messages(bulk);
        }
        if self.raw.is_empty() {
            return Ok(!out.is_empty());
        }
        self.packer.pack(&self.raw, out);
        Ok(true)
    }

    /// Append the control frames, one frame of acknowledgements and one of output, until the block is full.
    fn put_control(&mut self) -> Result<(), SessionError> {
        if let Some(bytes) = self.received.take() {
            Control::Received { bytes }.put(&mut self.raw)?;
        }
        if let Some(bytes) = self.reached.take() {
            Control::Reached { bytes }.put(&mut self.raw)?;
        }
        while let Some(control) = if self.raw.len() < FULL_BLOCK { self.control.pop_front() } else { None } {
            self.answers -= control.answer_cost();
            control.put(&mut self.raw)?;
        }
        if !self.acknowledgements.is_empty() && self.raw.len() < FULL_BLOCK {
            let count = self.acknowledgements.len().min(ACKNOWLEDGEMENTS_PER_FRAME);
            let ids: Vec<_> = self.acknowledgements.drain(..count).collect();
            self.answers -= ids.len() * size_of::<Attempt>();
            Control::Acknowledge(ids).put(&mut self.raw)?;
        }
        if self.raw.len() < FULL_BLOCK
            && let Some(output) = self.next_output()
        {
            output.put(&mut self.raw)?;
        }
        Ok(())
    }

    /// Append small messages and, as far as bulk is allowed, chunks of large ones, until the block is full.
    fn put_messages(&mut self, bulk: &mut Allowance) {
        // A block has place for one chunk of a large message, however many small ones wait.
        let small_until = if self.large.is_empty() || bulk.room == 0 { FULL_BLOCK } else { FULL_BLOCK - MAX_CHUNK };
        while let Some(mut small) = if self.raw.len() < small_until { self.small.pop_front() } else { None } {
            self.bytes -= small.left;
            self.answer_bytes -= small.answer_size();
            let at = self.raw.len();
            small.put_chunk(&mut self.raw);
            bulk.take(self.raw.len() - at - FRAME_HEADER);
        }
        let mut raw = std::mem::take(&mut self.raw);
        let striped = self.stripes > 0;
        self.put_large(&mut raw, bulk, |large| !(striped && large.is_blob()));
        self.raw = raw;
    }

    /// Append chunks of blobs, as far as bulk is allowed, to `raw`, the empty block of a stripe, until it is full. Return false if
    /// there were none.
    pub fn fill_blobs(&mut self, raw: &mut Vec<u8>, bulk: &mut Allowance) -> bool {
        self.put_large(raw, bulk, Large::is_blob);
        !raw.is_empty()
    }

    /// Append chunks of large ones in turn, as far as bulk is allowed, until the block is full.
    fn put_large(&mut self, raw: &mut Vec<u8>, bulk: &mut Allowance, wanted: impl Fn(&Large) -> bool) {
        while bulk.room > 0
            && raw.len() < FULL_BLOCK
            && let Some(at) = self.large.iter().position(&wanted)
            && let Some(mut large) = self.large.remove(at)
        {
            let (before, at) = (large.left(), raw.len());
            let last = large.put_chunk(raw);
            let sent = before - large.left();
            self.bytes -= sent;
            self.blob_bytes -= if large.is_blob() { sent } else { 0 };
            bulk.take(raw.len() - at - FRAME_HEADER);
            self.answer_bytes -= if last { large.answer_size() } else { 0 };
            self.large.extend(if last { self.later.pop_front() } else { Some(large) });
        }
    }
}
