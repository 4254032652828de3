//! Tasks, results, notes and their answers: messages that are cut into chunks and joined again.
//!
//! ```text
//! message = chunk+                              each chunk is a frame; the first and the last have a flag
//! chunk   = head? bytes                         the head stands in the first chunk
//! head    = code (u8) blobs (u8) parts (u16) generation (u32) slot (u32) calls (u32) nanos (u64) tail
//! tail    = length (u64)[parts] blob[blobs]
//! blob    = place (u16) number (u64)            a part whose bytes travel apart: see `blob.rs`
//! ```
//!
//! Chunks of different messages may alternate. Every length is checked against a cap before anything is allocated for
//! it, so a broken peer costs an error; memory grows with the bytes that arrive.

use bytes::{Buf, Bytes};

use crate::error::FrameError;
use crate::pages::prefer_huge;
use crate::wire::blob::{BlobPart, MAX_BLOBS};
use crate::wire::header::{Attempt, FIRST, Header, LAST, MAX_CHUNK};

/// Parts of one message (its pickle and the buffers beside it); their lengths fit a single frame.
pub const MAX_PARTS: usize = 1024;
/// Payload bytes of a note, and of an answer.
pub const MAX_NOTE: usize = 16 * 1024 * 1024;
/// Bytes set aside for a part of a message before they arrive; beyond it the memory grows with what arrived.
const EAGER_PART_BYTES: usize = 1024 * 1024;
/// By how many times what arrived it then grows, at most to what the head declared. Memory that is set aside costs nothing
/// until it is filled; to grow by little would copy what arrived again and again.
const GROWTH: usize = 15;
/// A part up to this size, in bytes, is copied out of its block; a larger one shares the block's memory.
const MAX_COPIED_PART: usize = 4096;
/// Bytes of memory that a part takes beside its payload, about.
const PART_OVERHEAD: usize = 64;
/// Bytes of a head without the parts' lengths and the blobs.
const HEAD: usize = 24;
/// Bytes of a blob in a head.
const BLOB_HEAD: usize = 10;

/// What a message is about. The number is the kind of its frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Body {
    Task = 11,
    Result = 12,
    /// What a task tells the client, or asks it for, while it runs. The client answers with [`super::Control::NoteAnswer`],
    /// or with [`Body::Answer`].
    Note = 16,
    /// What a note asked for. It has the note's number.
    Answer = 27,
}

impl Body {
    /// Return what a frame of this kind is a chunk of, if it is one.
    #[must_use]
    pub fn of(kind: u8) -> Option<Self> {
        [Self::Task, Self::Result, Self::Note, Self::Answer].into_iter().find(|body| *body as u8 == kind)
    }
}

/// The code of a note that tells the client something, for its listeners.
pub const TELLS: u8 = 0;
/// The code of a note that asks the client for something.
pub const ASKS: u8 = 1;

/// How a task ended: the code of a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Outcome {
    /// The function returned; the parts are its pickled value.
    Returned = 0,
    /// The function raised; the parts are the pickled exception and its traceback.
    Raised = 1,
    /// The worker process died; the part is a description in UTF-8.
    Crashed = 2,
    /// The task was dropped before it started.
    Cancelled = 3,
    /// The node went away and no attempt is left; the part is a description in UTF-8.
    NodeLost = 4,
    /// The task ran for longer than a task may; the part is a description in UTF-8.
    TimedOut = 5,
    /// The parts are the pickled values of a batch's first calls; the worker has not begun the others.
    Partial = 6,
}

impl Outcome {
    const ALL: [Self; 7] =
        [Self::Returned, Self::Raised, Self::Crashed, Self::Cancelled, Self::NodeLost, Self::TimedOut, Self::Partial];

    /// Return the outcome of a result's code. The decoder refuses results of other codes.
    #[must_use]
    pub fn of(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }
}

/// A task or an answer on its way to a worker, or a result or a note on its way back.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Message {
    pub id: Attempt,
    /// Of a result: its [`Outcome`]. Of a task: how the worker's Python reads the pickle; nobody else looks at it. Of a note:
    /// [`TELLS`] or [`ASKS`].
    pub code: u8,
    /// Of a task: the generation of the client's modules that it was pickled with. Only workers of this generation run it.
    pub generation: u32,
    /// Of a result: the slot of the node that ran the task, see [`slot_number`].
    pub slot: u32,
    /// Of a task: how many calls it consists of. Of a result: how many of them have ended, with a value or an exception; 0
    /// if that is not known.
    pub calls: u32,
    /// Of a result: how long the function ran, in nanoseconds, by the worker's clock. Of a task: how long the task may
    /// run in all, 0 for as long as it likes; the client uses it when the task's node does not end the task in time.
    pub nanos: u64,
    /// Of a task, at the client alone: the number of its function's name. It is not sent.
    pub name: u32,
    /// The pickle, then those of its out-of-band buffers that travel in the message.
    pub parts: Vec<Bytes>,
    /// The other buffers, in the order of their places among all parts.
    pub blobs: Vec<BlobPart>,
}

/// Bits of a slot's number in its node that are its number in its worker; the others are the worker's number.
pub const SLOT_BITS: u32 = 12;

/// Return the number in its node of this slot of this worker. Numbers that have too many bits lose the upper ones.
#[must_use]
pub fn slot_number(worker: u32, slot: usize) -> u32 {
    let slot = u32::try_from(slot).unwrap_or(u32::MAX) & ((1 << SLOT_BITS) - 1);
    worker << SLOT_BITS | slot
}

impl Message {
    /// Return a result whose only part is text, for outcomes that no pickle describes.
    #[must_use]
    pub fn text(id: Attempt, outcome: Outcome, text: String) -> Self {
        Self { id, code: outcome as u8, parts: vec![Bytes::from(text)], ..Self::default() }
    }

    /// Return the result of a task that was dropped before it started.
    #[must_use]
    pub fn cancelled(id: Attempt) -> Self {
        Self { id, code: Outcome::Cancelled as u8, ..Self::default() }
    }

    /// Return how the task ended that this is the result of.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        Outcome::of(self.code)
    }

    /// Return the size of the payload that travels in the message, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.parts.iter().map(Bytes::len).sum()
    }

    /// Return the bytes that sending the message brings to a node, about: its payload, and the blobs that no message named
    /// before it.
    #[must_use]
    pub fn load(&self) -> usize {
        let fresh = self.blobs.iter().filter(|blob| blob.fresh).filter_map(|blob| blob.content.as_ref());
        self.size() + fresh.map(|content| content.bytes.len()).sum::<usize>()
    }

    /// Return the bytes of memory that the message takes, about: many small parts take more than their payload.
    #[must_use]
    pub fn cost(&self) -> usize {
        self.size() + (self.parts.len() + self.blobs.len() + 2) * PART_OVERHEAD
    }

    fn put_head(&self, out: &mut Vec<u8>) {
        let count = u16::try_from(self.parts.len()).unwrap_or(u16::MAX);
        let blobs = self.blobs.get(..MAX_BLOBS).unwrap_or(&self.blobs);
        out.extend_from_slice(&[self.code, u8::try_from(blobs.len()).unwrap_or(u8::MAX)]);
        out.extend_from_slice(&count.to_le_bytes());
        out.extend_from_slice(&self.generation.to_le_bytes());
        out.extend_from_slice(&self.slot.to_le_bytes());
        out.extend_from_slice(&self.calls.to_le_bytes());
        out.extend_from_slice(&self.nanos.to_le_bytes());
        for part in &self.parts {
            out.extend_from_slice(&(part.len() as u64).to_le_bytes());
        }
        for blob in blobs {
            out.extend_from_slice(&blob.place.to_le_bytes());
            out.extend_from_slice(&blob.number.to_le_bytes());
        }
    }
}

/// A message that is being cut into chunks.
#[derive(Debug)]
pub struct Outgoing {
    body: Body,
    message: Message,
    /// Whether the first chunk, with the head, was written.
    started: bool,
    /// The part that the next chunk begins in, and the bytes of it that were written.
    part: usize,
    offset: usize,
    /// Bytes of payload not yet written.
    pub left: usize,
}

impl Outgoing {
    #[must_use]
    pub fn new(body: Body, message: Message) -> Self {
        let left = message.size();
        Self { body, message, started: false, part: 0, offset: 0, left }
    }

    /// Return the payload of the whole message, in bytes, if it is an answer to a note; else 0.
    #[must_use]
    pub fn answer_size(&self) -> usize {
        if self.body == Body::Answer { self.message.size() } else { 0 }
    }

    /// Append the next chunk to `out`. Return whether it was the last.
    pub fn put_chunk(&mut self, out: &mut Vec<u8>) -> bool {
        let at = out.len();
        Header { kind: self.body as u8, flags: 0, id: self.message.id }.put(0, out);
        let mut flags = 0;
        if !self.started {
            self.started = true;
            flags |= FIRST;
            self.message.put_head(out);
        }
        let mut room = MAX_CHUNK;
        while let Some(part) = self.message.parts.get(self.part) {
            let bytes = part.get(self.offset..).unwrap_or_default();
            let (now, later) = bytes.split_at(bytes.len().min(room));
            out.extend_from_slice(now);
            room -= now.len();
            self.left -= now.len();
            if later.is_empty() {
                self.part += 1;
                self.offset = 0;
            } else {
                self.offset += now.len();
                break;
            }
        }
        let last = self.part >= self.message.parts.len();
        if last {
            flags |= LAST;
        }
        Header::complete(at, flags, out);
        last
    }
}

/// A message that is being joined from its chunks.
#[derive(Debug)]
pub(super) struct Assembly {
    id: Attempt,
    code: u8,
    generation: u32,
    slot: u32,
    calls: u32,
    nanos: u64,
    /// Payload bytes of the whole message.
    pub size: usize,
    /// The parts' lengths, as the head declared them.
    lens: Vec<usize>,
    /// The parts that are complete.
    done: Vec<Bytes>,
    /// The bytes that arrived of the part behind them.
    part: Vec<u8>,
    blobs: Vec<BlobPart>,
}

impl Assembly {
    /// Take a message's head off its first chunk, and check what it declares.
    pub fn begin(body: Body, id: Attempt, max_message: usize, chunk: &mut Bytes) -> Result<Self, FrameError> {
        if chunk.len() < HEAD {
            return Err(FrameError::Truncated("message head"));
        }
        let code = chunk.get_u8();
        let blob_count = usize::from(chunk.get_u8());
        let count = usize::from(chunk.get_u16_le());
        let generation = chunk.get_u32_le();
        let slot = chunk.get_u32_le();
        let calls = chunk.get_u32_le();
        let nanos = chunk.get_u64_le();
        if count + blob_count > MAX_PARTS {
            return Err(FrameError::TooLong { what: "list of parts", len: count + blob_count, cap: MAX_PARTS });
        }
        if chunk.len() < count * 8 + blob_count * BLOB_HEAD {
            return Err(FrameError::Truncated("message head"));
        }
        let mut lens = Vec::with_capacity(count);
        let mut size = 0_usize;
        for _ in 0..count {
            let len = usize::try_from(chunk.get_u64_le()).unwrap_or(usize::MAX);
            size = size.saturating_add(len);
            lens.push(len);
        }
        // The user's limit is for tasks and results.
        if size > max_message && body != Body::Answer {
            return Err(FrameError::TooLong { what: "message", len: size, cap: max_message });
        }
        let blobs = read_blobs(blob_count, count, chunk)?;
        if body == Body::Result && Outcome::of(code).is_none() {
            return Err(FrameError::BadOutcome(code));
        }
        if matches!(body, Body::Note | Body::Answer) && size > MAX_NOTE {
            return Err(FrameError::TooLong { what: "note", len: size, cap: MAX_NOTE });
        }
        Ok(Self {
            id,
            code,
            generation,
            slot,
            calls,
            nanos,
            size,
            done: Vec::with_capacity(count),
            lens,
            part: Vec::new(),
            blobs,
        })
    }

    /// Return the message whose only chunk is `chunk`. Its parts are slices of the block, unless they are so small that
    /// they would keep much more memory alive than they count for. Parts of notes are always copied: notes are counted
    /// in bytes.
    pub fn whole(self, body: Body, mut chunk: Bytes) -> Result<Message, FrameError> {
        let Self { id, code, generation, slot, calls, nanos, lens, done: mut parts, blobs, .. } = self;
        let max_copied = if body == Body::Note { usize::MAX } else { MAX_COPIED_PART };
        for len in lens {
            if len > chunk.len() {
                return Err(FrameError::Truncated("message"));
            }
            let part = chunk.split_to(len);
            parts.push(if len <= max_copied { Bytes::copy_from_slice(&part) } else { part });
        }
        if chunk.is_empty() {
            Ok(Message { id, code, generation, slot, calls, nanos, name: 0, parts, blobs })
        } else {
            Err(FrameError::BadBody("message"))
        }
    }

    /// Store a chunk. Return false if there is no memory for it; the bytes that were not stored are left in `chunk`.
    pub fn take(&mut self, chunk: &mut Bytes) -> Result<bool, FrameError> {
        while let Some(&len) = self.lens.get(self.done.len()) {
            let now = chunk.len().min(len - self.part.len());
            if self.part.capacity() < self.part.len() + now {
                let grow = self.part.capacity().saturating_mul(GROWTH).max(EAGER_PART_BYTES).max(now);
                if self.part.try_reserve_exact(grow.min(len - self.part.len())).is_err() {
                    return Ok(false);
                }
                if self.part.len() >= EAGER_PART_BYTES / 2 {
                    // Not before much has arrived: of a huge page one byte costs all of it.
                    prefer_huge(&mut self.part);
                }
            }
            self.part.extend_from_slice(&chunk.split_to(now));
            if self.part.len() < len {
                break;
            }
            self.done.push(Bytes::from(std::mem::take(&mut self.part)));
        }
        if chunk.is_empty() { Ok(true) } else { Err(FrameError::BadBody("message")) }
    }

    /// Return the payload bytes that are not stored yet.
    pub fn missing(&self) -> usize {
        self.size - self.part.len() - self.done.iter().map(Bytes::len).sum::<usize>()
    }

    /// Return the message after its last chunk.
    pub fn end(self) -> Result<Message, FrameError> {
        let Self { id, code, generation, slot, calls, nanos, lens, done: parts, blobs, .. } = self;
        if parts.len() == lens.len() {
            Ok(Message { id, code, generation, slot, calls, nanos, name: 0, parts, blobs })
        } else {
            Err(FrameError::Truncated("message"))
        }
    }
}

/// Read the blobs of a head, of a message with so many parts beside them. Their places must be in order, and such that
/// every part has a place.
fn read_blobs(count: usize, parts: usize, head: &mut Bytes) -> Result<Vec<BlobPart>, FrameError> {
    let mut blobs = Vec::with_capacity(count);
    let mut least = 0;
    for _ in 0..count {
        let (place, number) = (head.get_u16_le(), head.get_u64_le());
        if usize::from(place) < least || usize::from(place) >= parts + count {
            return Err(FrameError::BadSequence("a blob at a place that the message does not have"));
        }
        least = usize::from(place) + 1;
        blobs.push(BlobPart { place, number, fresh: false, content: None });
    }
    Ok(blobs)
}
