//! The wire format: bytes in, frames out, and back. Nothing here touches a socket.
//!
//! ```text
//! stream  = preamble block*
//! preamble= magic (16 bytes) version (u32)      anything before the magic is noise from a login shell
//! block   = wire_len (u32, top bit: lz4) raw_len (u32) bytes[wire_len]
//! raw     = frame*                              a frame never straddles two blocks
//! frame   = len (u32) kind (u8) flags (u8) attempt (u16) task (u64) body[len]
//! ```
//!
//! All integers are little-endian. A task, a result or a note is a [`Message`]: a head (code, nanoseconds, the lengths of
//! its parts) and the parts' bytes, cut into chunks. Every length is checked against a cap before anything is
//! allocated for it, so a broken peer costs an error; memory grows with what it really sends.

use std::collections::HashMap;

use bytes::{Buf, Bytes, BytesMut};
use lz4_flex::block as lz4;

use crate::error::FrameError;
use crate::text;

/// Marks where our protocol begins in a stream that a login shell may have written to before.
pub const MAGIC: [u8; 16] = *b"\0SKYWARD-LITE\r\n\0";
/// Version of everything in this file. Both ends must have the same.
pub const PROTOCOL: u32 = 2;
/// Bytes of banner, MOTD or `.bashrc` output that are skipped before the magic.
pub const MAX_NOISE: usize = 64 * 1024;
/// Cap of a block's decompressed size, in bytes; bounds what a declared size can make us allocate.
pub const MAX_BLOCK: usize = 256 * 1024;
/// Cap of a frame's body, in bytes.
pub const MAX_BODY: usize = 64 * 1024;
/// Payload bytes in a chunk: what a small task can wait behind. OpenSSH's and russh's packet limit is the same.
pub const CHUNK: usize = 32 * 1024 - 64;
/// Parts of one message (its pickle and the buffers beside it); their lengths fit a single frame.
pub const MAX_PARTS: usize = 1024;
/// Payload bytes of a note.
pub const MAX_NOTE: usize = 16 * 1024 * 1024;
/// Bytes of the reason in [`Control::Drain`].
pub const MAX_REASON: usize = 1024;
/// Messages that may be under assembly at once on one stream.
pub const MAX_OPEN: usize = 4096;
/// Memory set aside for a part before its bytes arrive; beyond it a part grows with what really came.
const EAGER: usize = 1024 * 1024;
/// A part up to this size, in bytes, is copied out of its block.
const SMALL_PART: usize = 4096;
/// Bytes of memory that a part takes beside its payload, about.
const PART_COST: usize = 64;
/// A block smaller than this is sent raw: lz4's table set-up costs more than it saves.
const MIN_COMPRESS: usize = 512;
/// Blocks that are sent unsampled after a run of incompressible ones, at most.
const MAX_SKIP: u32 = 63;

const BLOCK_HEADER: usize = 8;
const FRAME_HEADER: usize = 16;
const MESSAGE_HEAD: usize = 12;
const LZ4_BIT: u32 = 1 << 31;
const FIRST: u8 = 1;
const LAST: u8 = 2;
const FLAGS: u8 = FIRST | LAST;

/// What a message is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Body {
    Task,
    Result,
    /// What a task tells the client while it runs; the client answers with [`Control::NoteAnswer`].
    Note,
}

/// Names one try at one task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Attempt {
    pub task: u64,
    pub attempt: u16,
}

/// How a task ended.
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
    /// It ran for longer than a task may; the part is a description in UTF-8.
    TimedOut = 5,
    /// The parts are the pickled values of a batch's first calls; the worker has not begun the others.
    Partial = 6,
}

/// The last of the tags.
const MAX_TAG: u8 = Outcome::Partial as u8;

/// A task on its way to a worker, or a result or a note on its way back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub id: Attempt,
    /// On a result: a [`Outcome`]. On a task: how the worker shall read the pickle, which only it knows.
    pub code: u8,
    /// On a result: how long the function ran, in nanoseconds, by the worker's clock. On a task: how long all of it may
    /// run, zero for as long as it likes; the client's own note, in case that its node does not end it.
    pub nanos: u64,
    /// The pickle, then its out-of-band buffers.
    pub parts: Vec<Bytes>,
}

impl Message {
    /// A message whose only part is text, for the ends that no pickle describes.
    #[must_use]
    pub fn text(id: Attempt, code: Outcome, text: String) -> Self {
        Self { id, code: code as u8, nanos: 0, parts: vec![Bytes::from(text)] }
    }

    /// The end of a task that was dropped before it started.
    #[must_use]
    pub fn cancelled(id: Attempt) -> Self {
        Self { id, code: Outcome::Cancelled as u8, nanos: 0, parts: Vec::new() }
    }

    /// Payload size in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.parts.iter().map(Bytes::len).sum()
    }

    /// Bytes of memory that the message takes, about: many small parts take more than their payload.
    #[must_use]
    pub fn cost(&self) -> usize {
        self.size() + (self.parts.len() + 2) * PART_COST
    }
}

/// A frame that is no part of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// Who I am and what I want, in JSON (see `session.rs`).
    Hello(Bytes),
    /// The node has its workers and takes tasks.
    Ready { slots: u64 },
    /// I live. The receiver may go on working for `lease_ms` milliseconds without another one.
    Heartbeat { nonce: u64, lease_ms: u64 },
    /// Echo of a heartbeat's nonce.
    Pulse { nonce: u64 },
    /// I end this session on purpose; why, in UTF-8. An end of stream without it is a lost connection.
    Goodbye(Bytes),
    /// These results were taken: forget them, and count their bytes as credit again.
    Acknowledge(Vec<Attempt>),
    /// Drop this task if it has not started. Answered with its result, or with `RecallRefused` if it is running.
    Cancel(Attempt),
    /// Drop this task, and end it if it is running: its result is not wanted any more.
    Abort(Attempt),
    /// Give this task back if it has not started.
    Recall(Attempt),
    /// The recalled task, given back unstarted.
    GivenBack(Attempt),
    /// The recalled task has started, or is not here: no hope of getting it back.
    RecallRefused(Attempt),
    /// What a worker wrote. `output.rs` says what is in the stream's number.
    Output { stream: u64, text: Bytes },
    /// This node will soon be gone; why, in UTF-8. It wants no more tasks, and those back that it has not started.
    Drain(Bytes),
    /// The note of this number was taken, or was not; why not, in UTF-8. Empty: it was taken.
    NoteAnswer { note: u64, error: Bytes },
}

/// What a decoder yields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Control(Control),
    Message(Body, Message),
    /// A message that was not admitted has arrived in full; none of it was stored.
    Skipped(Body, Attempt),
    /// A message of so many bytes has arrived in full, and there was no memory to store it.
    NoMemory(Body, Attempt, usize),
}

impl Event {
    /// Bytes that arrived for the event, about.
    #[must_use]
    pub fn size(&self) -> usize {
        match self {
            Self::Message(_, message) => message.size(),
            Self::Control(Control::Output { text: body, .. } | Control::NoteAnswer { error: body, .. }) => body.len(),
            Self::Control(Control::Acknowledge(ids)) => ids.len() * size_of::<Attempt>(),
            Self::Control(_) | Self::Skipped(..) | Self::NoMemory(..) => 0,
        }
    }
}

/// What the first of several chunks tells of its message, before any of it is stored.
#[derive(Debug, Clone, Copy)]
pub struct Offer {
    pub body: Body,
    pub id: Attempt,
    /// The message's payload, in bytes.
    pub size: usize,
    /// The payload of all admitted messages of this kind that are not complete, in bytes.
    pub unfinished: usize,
}

/// Whether a message is to be stored. One that is not is read over and ends as [`Event::Skipped`]; an error ends the
/// session. Messages of a single chunk are not offered.
pub type Admit<'a> = dyn FnMut(&Offer) -> Result<bool, FrameError> + Send + 'a;

mod kind {
    pub const HELLO: u8 = 1;
    pub const READY: u8 = 2;
    pub const HEARTBEAT: u8 = 3;
    pub const PULSE: u8 = 4;
    pub const GOODBYE: u8 = 5;
    pub const ACKNOWLEDGE: u8 = 6;
    pub const CANCEL: u8 = 7;
    pub const RECALL: u8 = 8;
    pub const GIVEN_BACK: u8 = 9;
    pub const RECALL_REFUSED: u8 = 10;
    pub const TASK: u8 = 11;
    pub const RESULT: u8 = 12;
    pub const ABORT: u8 = 13;
    pub const OUTPUT: u8 = 14;
    pub const DRAIN: u8 = 15;
    pub const NOTE: u8 = 16;
    pub const NOTE_ANSWER: u8 = 17;
}

// ---------------------------------------------------------------------------------------------------- encoding

/// Write the preamble that opens each direction of a stream.
pub fn put_preamble(out: &mut Vec<u8>) {
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&PROTOCOL.to_le_bytes());
}

fn put_header(out: &mut Vec<u8>, len: usize, kind: u8, flags: u8, id: Attempt) {
    // Every caller stays under MAX_BODY, which fits.
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&id.attempt.to_le_bytes());
    out.extend_from_slice(&id.task.to_le_bytes());
}

fn put_frame(out: &mut Vec<u8>, kind: u8, id: Attempt, body: &[u8]) {
    put_header(out, body.len(), kind, 0, id);
    out.extend_from_slice(body);
}

impl Control {
    /// Append this frame to a block's raw bytes. Long acknowledgements become several frames.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] for a hello, goodbye, output or answer over [`MAX_BODY`], or a reason over [`MAX_REASON`].
    pub fn put(&self, out: &mut Vec<u8>) -> Result<(), FrameError> {
        let plain = |task| Attempt { task, attempt: 0 };
        match self {
            Self::Hello(body)
            | Self::Goodbye(body)
            | Self::Output { text: body, .. }
            | Self::NoteAnswer { error: body, .. } => {
                if body.len() > MAX_BODY {
                    return Err(FrameError::TooLong { what: "control frame", len: body.len(), cap: MAX_BODY });
                }
                let (kind, id) = match self {
                    Self::Hello(_) => (kind::HELLO, 0),
                    Self::Output { stream, .. } => (kind::OUTPUT, *stream),
                    Self::NoteAnswer { note, .. } => (kind::NOTE_ANSWER, *note),
                    _ => (kind::GOODBYE, 0),
                };
                put_frame(out, kind, plain(id), body);
            }
            Self::Drain(why) => {
                if why.len() > MAX_REASON {
                    return Err(FrameError::TooLong { what: "reason", len: why.len(), cap: MAX_REASON });
                }
                put_frame(out, kind::DRAIN, plain(0), why);
            }
            Self::Ready { slots } => put_frame(out, kind::READY, plain(*slots), &[]),
            Self::Heartbeat { nonce, lease_ms } => {
                put_frame(out, kind::HEARTBEAT, plain(*nonce), &lease_ms.to_le_bytes());
            }
            Self::Pulse { nonce } => put_frame(out, kind::PULSE, plain(*nonce), &[]),
            Self::Acknowledge(ids) => {
                for some in ids.chunks(MAX_BODY / 10) {
                    put_header(out, some.len() * 10, kind::ACKNOWLEDGE, 0, plain(0));
                    for id in some {
                        out.extend_from_slice(&id.task.to_le_bytes());
                        out.extend_from_slice(&id.attempt.to_le_bytes());
                    }
                }
            }
            Self::Cancel(id) => put_frame(out, kind::CANCEL, *id, &[]),
            Self::Abort(id) => put_frame(out, kind::ABORT, *id, &[]),
            Self::Recall(id) => put_frame(out, kind::RECALL, *id, &[]),
            Self::GivenBack(id) => put_frame(out, kind::GIVEN_BACK, *id, &[]),
            Self::RecallRefused(id) => put_frame(out, kind::RECALL_REFUSED, *id, &[]),
        }
        Ok(())
    }
}

/// A message being cut into chunks.
#[derive(Debug)]
pub struct Outgoing {
    body: Body,
    message: Message,
    started: bool,
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

    /// Append the next chunk to `out`; true when it was the last.
    pub fn put_chunk(&mut self, out: &mut Vec<u8>) -> bool {
        let at = out.len();
        let kind = match self.body {
            Body::Task => kind::TASK,
            Body::Result => kind::RESULT,
            Body::Note => kind::NOTE,
        };
        put_header(out, 0, kind, 0, self.message.id);
        let mut flags = 0;
        if !self.started {
            self.started = true;
            flags |= FIRST;
            let count = u16::try_from(self.message.parts.len()).unwrap_or(u16::MAX);
            out.extend_from_slice(&[self.message.code, 0]);
            out.extend_from_slice(&count.to_le_bytes());
            out.extend_from_slice(&self.message.nanos.to_le_bytes());
            for part in &self.message.parts {
                out.extend_from_slice(&(part.len() as u64).to_le_bytes());
            }
        }
        let mut room = CHUNK;
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
        let len = u32::try_from(out.len() - at - FRAME_HEADER).unwrap_or(u32::MAX);
        if let Some(header) = out.get_mut(at..at + FRAME_HEADER) {
            for (to, from) in header.iter_mut().zip(len.to_le_bytes()) {
                *to = from;
            }
            if let Some(byte) = header.get_mut(5) {
                *byte = flags;
            }
        }
        last
    }
}

/// Wraps raw bytes into blocks, compressing while that pays.
///
/// After a block that lz4 could not shrink by an eighth, the next 1, 3, 7 … 63 blocks go raw unsampled.
#[derive(Default)]
pub struct Packer {
    table: lz4::CompressTable,
    skip: u32,
    backoff: u32,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").field("skip", &self.skip).finish_non_exhaustive()
    }
}

impl Packer {
    /// Append `raw` (at most [`MAX_BLOCK`] bytes of whole frames) to `out` as one block.
    pub fn pack(&mut self, raw: &[u8], out: &mut Vec<u8>) {
        let raw_len = u32::try_from(raw.len()).unwrap_or(u32::MAX).to_le_bytes();
        let at = out.len();
        if raw.len() >= MIN_COMPRESS {
            if self.skip > 0 {
                self.skip -= 1;
            } else {
                out.resize(at + BLOCK_HEADER + lz4::get_maximum_output_size(raw.len()), 0);
                let room = out.get_mut(at + BLOCK_HEADER..).unwrap_or_default();
                let packed = lz4::compress_into_with_table(raw, room, &mut self.table).unwrap_or(usize::MAX);
                if packed < raw.len() - raw.len() / 8 {
                    self.backoff = 0;
                    out.truncate(at + BLOCK_HEADER + packed);
                    let wire = u32::try_from(packed).unwrap_or(0) | LZ4_BIT;
                    let header = wire.to_le_bytes().into_iter().chain(raw_len);
                    for (to, from) in out.iter_mut().skip(at).zip(header) {
                        *to = from;
                    }
                    return;
                }
                out.truncate(at);
                self.backoff = (self.backoff * 2 + 1).min(MAX_SKIP);
                self.skip = self.backoff;
            }
        }
        out.extend_from_slice(&raw_len);
        out.extend_from_slice(&raw_len);
        out.extend_from_slice(raw);
    }
}

// ---------------------------------------------------------------------------------------------------- decoding

#[derive(Debug)]
enum Open {
    Stored(Assembly),
    /// Of this message `left` more bytes must come; `size` if memory was missing, else it was not admitted.
    Skipped {
        left: usize,
        size: Option<usize>,
    },
}

#[derive(Debug)]
struct Assembly {
    size: usize,
    code: u8,
    nanos: u64,
    lens: Vec<usize>,
    done: Vec<Bytes>,
    part: Vec<u8>,
}

/// Turns a stream of bytes into events. Feed [`Decoder::buffer`], then call [`Decoder::next`] until it says `None`.
#[derive(Debug)]
pub struct Decoder {
    input: BytesMut,
    block: Bytes,
    greeted: bool,
    /// Bytes of the input in which the magic does not begin.
    searched: usize,
    noise: Vec<u8>,
    open: HashMap<(Body, Attempt), Open>,
    /// Payload bytes of stored messages that are not complete: tasks, results, notes.
    unfinished: (usize, usize, usize),
    results: u64,
    max_message: usize,
}

impl Decoder {
    /// A decoder that refuses messages of more than `max_message` bytes.
    #[must_use]
    pub fn new(max_message: usize) -> Self {
        Self {
            input: BytesMut::new(),
            block: Bytes::new(),
            greeted: false,
            searched: 0,
            noise: Vec::new(),
            open: HashMap::new(),
            unfinished: (0, 0, 0),
            results: 0,
            max_message,
        }
    }

    /// Refuse messages of more than `max_message` bytes from now on.
    pub fn set_max_message(&mut self, max_message: usize) {
        self.max_message = max_message;
    }

    /// Where to append what was read from the stream.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.input
    }

    /// What the far end printed before the protocol began, for error messages.
    #[must_use]
    pub fn noise(&self) -> String {
        let from = if self.greeted { &self.noise[..] } else { &self.input[..] };
        text::lines(from.trim_ascii(), text::LIMIT)
    }

    /// Bytes of results that came, unfinished ones too, without those that were not admitted.
    #[must_use]
    pub fn results(&self) -> u64 {
        self.results
    }

    /// The next event, or `None` when more bytes are needed. All messages are admitted.
    ///
    /// # Errors
    /// Any [`FrameError`]: the stream is then unusable and must be closed.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<Event>, FrameError> {
        self.next_admitted(&mut |_| Ok(true))
    }

    /// As [`Decoder::next`]; `admit` is asked at the first of several chunks whether its message is to be stored.
    ///
    /// # Errors
    /// As [`Decoder::next`], and what `admit` returns.
    pub fn next_admitted(&mut self, admit: &mut Admit<'_>) -> Result<Option<Event>, FrameError> {
        loop {
            if self.block.is_empty() && !self.next_block()? {
                return Ok(None);
            }
            if let Some(event) = self.next_frame(admit)? {
                return Ok(Some(event));
            }
        }
    }

    fn greet(&mut self) -> Result<bool, FrameError> {
        let rest = self.input.get(self.searched..).unwrap_or_default();
        let Some(at) = rest.windows(MAGIC.len()).position(|w| w == MAGIC).map(|at| at + self.searched) else {
            self.searched = self.input.len().saturating_sub(MAGIC.len() - 1);
            if self.input.len() > MAX_NOISE + MAGIC.len() {
                return Err(FrameError::NoMagic { skipped: self.input.len(), text: self.noise() });
            }
            return Ok(false);
        };
        if at > MAX_NOISE {
            return Err(FrameError::NoMagic { skipped: at, text: self.noise() });
        }
        if self.input.len() < at + MAGIC.len() + 4 {
            return Ok(false);
        }
        self.noise = self.input.split_to(at).to_vec();
        self.input.advance(MAGIC.len());
        let theirs = self.input.get_u32_le();
        if theirs != PROTOCOL {
            return Err(FrameError::Version { ours: PROTOCOL, theirs });
        }
        self.greeted = true;
        Ok(true)
    }

    fn next_block(&mut self) -> Result<bool, FrameError> {
        if !self.greeted && !self.greet()? {
            return Ok(false);
        }
        let mut header = self.input.as_ref();
        if header.len() < BLOCK_HEADER {
            return Ok(false);
        }
        let wire = header.get_u32_le();
        let raw_len = header.get_u32_le() as usize;
        let packed = wire & LZ4_BIT != 0;
        let wire_len = (wire & !LZ4_BIT) as usize;
        if raw_len > MAX_BLOCK || raw_len == 0 {
            return Err(FrameError::TooLong { what: "block", len: raw_len, cap: MAX_BLOCK });
        }
        if wire_len > raw_len || (!packed && wire_len != raw_len) {
            return Err(FrameError::BadBlock { wire_len, raw_len });
        }
        if self.input.len() < BLOCK_HEADER + wire_len {
            self.input.reserve(BLOCK_HEADER + wire_len - self.input.len());
            return Ok(false);
        }
        self.input.advance(BLOCK_HEADER);
        let wire = self.input.split_to(wire_len);
        self.block = if packed {
            let mut raw = vec![0; raw_len];
            let n = lz4::decompress_into(&wire, &mut raw).map_err(|e| FrameError::Lz4(e.to_string()))?;
            if n != raw_len {
                return Err(FrameError::Lz4(format!("{n} bytes where {raw_len} were declared")));
            }
            Bytes::from(raw)
        } else {
            wire.freeze()
        };
        Ok(true)
    }

    fn next_frame(&mut self, admit: &mut Admit<'_>) -> Result<Option<Event>, FrameError> {
        if self.block.len() < FRAME_HEADER {
            return Err(FrameError::Truncated("frame header"));
        }
        let len = self.block.get_u32_le() as usize;
        let kind = self.block.get_u8();
        let flags = self.block.get_u8();
        let attempt = self.block.get_u16_le();
        let task = self.block.get_u64_le();
        if len > MAX_BODY {
            return Err(FrameError::TooLong { what: "frame", len, cap: MAX_BODY });
        }
        if len > self.block.len() {
            return Err(FrameError::Truncated("frame body"));
        }
        let mut body = self.block.split_to(len);
        let id = Attempt { task, attempt };
        let chunk = matches!(kind, kind::TASK | kind::RESULT | kind::NOTE);
        if flags & !FLAGS != 0 || (flags != 0 && !chunk) {
            return Err(FrameError::BadFlags(flags));
        }
        let control = match kind {
            kind::TASK => return self.chunk(Body::Task, id, flags, body, admit),
            kind::RESULT => return self.chunk(Body::Result, id, flags, body, admit),
            kind::NOTE => return self.chunk(Body::Note, id, flags, body, admit),
            kind::HELLO => return Ok(Some(Event::Control(Control::Hello(body)))),
            kind::GOODBYE => return Ok(Some(Event::Control(Control::Goodbye(body)))),
            // Copied: a slice of a few bytes would keep the memory of its whole block.
            kind::OUTPUT => {
                let text = Bytes::copy_from_slice(&body);
                return Ok(Some(Event::Control(Control::Output { stream: task, text })));
            }
            kind::NOTE_ANSWER => {
                let error = Bytes::copy_from_slice(&body);
                return Ok(Some(Event::Control(Control::NoteAnswer { note: task, error })));
            }
            kind::DRAIN => {
                if len > MAX_REASON {
                    return Err(FrameError::TooLong { what: "reason", len, cap: MAX_REASON });
                }
                return Ok(Some(Event::Control(Control::Drain(body))));
            }
            kind::HEARTBEAT => {
                if len != 8 {
                    return Err(FrameError::BadBody("heartbeat"));
                }
                return Ok(Some(Event::Control(Control::Heartbeat { nonce: task, lease_ms: body.get_u64_le() })));
            }
            kind::ACKNOWLEDGE => {
                if !len.is_multiple_of(10) {
                    return Err(FrameError::BadBody("acknowledgement"));
                }
                let mut ids = Vec::with_capacity(len / 10);
                while body.has_remaining() {
                    ids.push(Attempt { task: body.get_u64_le(), attempt: body.get_u16_le() });
                }
                return Ok(Some(Event::Control(Control::Acknowledge(ids))));
            }
            kind::READY => Control::Ready { slots: task },
            kind::PULSE => Control::Pulse { nonce: task },
            kind::CANCEL => Control::Cancel(id),
            kind::ABORT => Control::Abort(id),
            kind::RECALL => Control::Recall(id),
            kind::GIVEN_BACK => Control::GivenBack(id),
            kind::RECALL_REFUSED => Control::RecallRefused(id),
            other => return Err(FrameError::UnknownKind(other)),
        };
        if len != 0 {
            return Err(FrameError::BadBody("control frame"));
        }
        Ok(Some(Event::Control(control)))
    }

    fn chunk(
        &mut self,
        kind: Body,
        id: Attempt,
        flags: u8,
        mut body: Bytes,
        admit: &mut Admit<'_>,
    ) -> Result<Option<Event>, FrameError> {
        let last = flags & LAST != 0;
        let came = if kind == Body::Result { body.len() as u64 } else { 0 };
        let mut open = if flags & FIRST != 0 {
            if self.open.contains_key(&(kind, id)) {
                return Err(FrameError::BadSequence("a message begins twice"));
            }
            let assembly = self.head(&mut body)?;
            if kind == Body::Result && assembly.code > MAX_TAG {
                return Err(FrameError::BadTag(assembly.code));
            }
            if kind == Body::Note && assembly.size > MAX_NOTE {
                return Err(FrameError::TooLong { what: "note", len: assembly.size, cap: MAX_NOTE });
            }
            if last {
                self.results += came;
                return Self::whole(kind, id, assembly, body).map(|m| Some(Event::Message(kind, m)));
            }
            if self.open.len() >= MAX_OPEN {
                return Err(FrameError::BadSequence("too many unfinished messages"));
            }
            let (size, unfinished) = (assembly.size, *self.unfinished(kind));
            if admit(&Offer { body: kind, id, size, unfinished })? {
                *self.unfinished(kind) += size;
                Open::Stored(assembly)
            } else {
                Open::Skipped { left: size, size: None }
            }
        } else {
            self.open.remove(&(kind, id)).ok_or(FrameError::BadSequence("a chunk without a beginning"))?
        };
        match &mut open {
            Open::Stored(assembly) => {
                self.results += came;
                if !assembly.take(&mut body)? {
                    let (size, missing) = (assembly.size, assembly.missing());
                    *self.unfinished(kind) -= size;
                    let left = missing.checked_sub(body.len()).ok_or(FrameError::BadBody("message"))?;
                    open = Open::Skipped { left, size: Some(size) };
                }
            }
            Open::Skipped { left, .. } => {
                *left = left.checked_sub(body.len()).ok_or(FrameError::BadBody("message"))?;
            }
        }
        if !last {
            self.open.insert((kind, id), open);
            return Ok(None);
        }
        Ok(Some(match open {
            Open::Stored(Assembly { size, code, nanos, lens, done, .. }) if done.len() == lens.len() => {
                *self.unfinished(kind) -= size;
                Event::Message(kind, Message { id, code, nanos, parts: done })
            }
            Open::Skipped { left: 0, size: None } => Event::Skipped(kind, id),
            Open::Skipped { left: 0, size: Some(size) } => Event::NoMemory(kind, id, size),
            Open::Stored(_) | Open::Skipped { .. } => return Err(FrameError::Truncated("message")),
        }))
    }

    fn unfinished(&mut self, kind: Body) -> &mut usize {
        match kind {
            Body::Task => &mut self.unfinished.0,
            Body::Result => &mut self.unfinished.1,
            Body::Note => &mut self.unfinished.2,
        }
    }

    fn head(&self, body: &mut Bytes) -> Result<Assembly, FrameError> {
        if body.len() < MESSAGE_HEAD {
            return Err(FrameError::Truncated("message head"));
        }
        let code = body.get_u8();
        let _reserved = body.get_u8();
        let count = usize::from(body.get_u16_le());
        let nanos = body.get_u64_le();
        if count > MAX_PARTS {
            return Err(FrameError::TooLong { what: "list of parts", len: count, cap: MAX_PARTS });
        }
        if body.len() < count * 8 {
            return Err(FrameError::Truncated("message head"));
        }
        let mut lens = Vec::with_capacity(count);
        let mut total = 0_usize;
        for _ in 0..count {
            let len = usize::try_from(body.get_u64_le()).unwrap_or(usize::MAX);
            total = total.saturating_add(len);
            lens.push(len);
        }
        if total > self.max_message {
            return Err(FrameError::TooLong { what: "message", len: total, cap: self.max_message });
        }
        Ok(Assembly { size: total, code, nanos, done: Vec::with_capacity(count), lens, part: Vec::new() })
    }

    /// A message in a single frame. Its parts are slices of the block, unless they are so small that they would keep
    /// much more memory alive than they count for. Those of notes are always copied: notes are counted in bytes.
    fn whole(kind: Body, id: Attempt, assembly: Assembly, mut body: Bytes) -> Result<Message, FrameError> {
        let Assembly { code, nanos, lens, mut done, .. } = assembly;
        let small = if kind == Body::Note { usize::MAX } else { SMALL_PART };
        for len in lens {
            if len > body.len() {
                return Err(FrameError::Truncated("message"));
            }
            let part = body.split_to(len);
            done.push(if len <= small { Bytes::copy_from_slice(&part) } else { part });
        }
        if body.is_empty() { Ok(Message { id, code, nanos, parts: done }) } else { Err(FrameError::BadBody("message")) }
    }
}

impl Assembly {
    /// Store what came; false if there is no memory for it.
    fn take(&mut self, body: &mut Bytes) -> Result<bool, FrameError> {
        while let Some(&len) = self.lens.get(self.done.len()) {
            let now = body.len().min(len - self.part.len());
            if self.part.capacity() < self.part.len() + now {
                let grow = self.part.capacity().max(EAGER).max(now).min(len - self.part.len());
                if self.part.try_reserve_exact(grow).is_err() {
                    return Ok(false);
                }
            }
            self.part.extend_from_slice(&body.split_to(now));
            if self.part.len() < len {
                break;
            }
            self.done.push(Bytes::from(std::mem::take(&mut self.part)));
        }
        if body.is_empty() { Ok(true) } else { Err(FrameError::BadBody("message")) }
    }

    /// Bytes that are not stored yet.
    fn missing(&self) -> usize {
        self.size - self.part.len() - self.done.iter().map(Bytes::len).sum::<usize>()
    }
}
