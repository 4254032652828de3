//! Bytes in, events out. Nothing here touches a socket.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};

use crate::error::FrameError;
use crate::wire::blob::{BLOB_CHUNK, BlobChunk};
use crate::wire::block::unpack;
use crate::wire::control::Control;
use crate::wire::header::{Attempt, FIRST, Header, LAST, PreambleReader};
use crate::wire::message::{Assembly, Body, Message};
use crate::wire::pace::bulk;

/// Messages of which one stream may have sent some chunks and not all.
pub const MAX_UNFINISHED: usize = 4096;

/// What a decoder yields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Control(Control),
    Message(Body, Message),
    /// Bytes of a blob. It is not known whether they are the last ones: chunks come in any order.
    Chunk(BlobChunk),
    /// A message that was not admitted has arrived in full; none of it was stored.
    Skipped(Body, Attempt),
    /// A message of so many bytes has arrived in full, and there was no memory to store it.
    NoMemory(Body, Attempt, usize),
}

impl Event {
    /// Return the bytes that are stored for the event, about.
    #[must_use]
    pub fn size(&self) -> usize {
        match self {
            Self::Message(_, message) => message.size(),
            Self::Control(control) => control.size(),
            Self::Chunk(chunk) => chunk.bytes.len(),
            Self::Skipped(..) | Self::NoMemory(..) => 0,
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

/// Decides whether a message is to be stored. A message that is not is read over and ends as [`Event::Skipped`]; an
/// error ends the session. Messages of a single chunk are not offered.
pub type Admit<'a> = dyn FnMut(&Offer) -> Result<bool, FrameError> + Send + 'a;

/// A message of which a first chunk has arrived, and not the last one.
#[derive(Debug)]
enum Unfinished {
    Stored(Assembly),
    /// `left` more bytes must come. `size`: the message's, if memory was missing; `None` if the message was not
    /// admitted.
    Skipped {
        left: usize,
        size: Option<usize>,
    },
}

/// Turns a stream of bytes into events. Append to [`Decoder::buffer`], then call [`Decoder::next`] until it returns
/// `None`.
#[derive(Debug)]
pub struct Decoder {
    /// Bytes that were read from the stream and do not make a whole block yet.
    input: BytesMut,
    /// The present block's frames that were not decoded yet.
    block: Bytes,
    preamble: PreambleReader,
    unfinished: HashMap<(Body, Attempt), Unfinished>,
    /// Payload bytes of the stored ones among `unfinished`: tasks, results, notes, answers.
    unfinished_bytes: (usize, usize, usize, usize),
    /// See [`Decoder::results`].
    results: u64,
    /// See [`Decoder::bulk`].
    bulk: u64,
    max_message: usize,
}

impl Decoder {
    /// Return a decoder that refuses messages of more than `max_message` bytes.
    #[must_use]
    pub fn new(max_message: usize) -> Self {
        Self {
            input: BytesMut::new(),
            block: Bytes::new(),
            preamble: PreambleReader::default(),
            unfinished: HashMap::new(),
            unfinished_bytes: (0, 0, 0, 0),
            results: 0,
            bulk: 0,
            max_message,
        }
    }

    /// Refuse messages of more than `max_message` bytes from now on.
    pub fn set_max_message(&mut self, max_message: usize) {
        self.max_message = max_message;
    }

    /// Return the buffer to which bytes from the stream are appended.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.input
    }

    /// Return how many bytes were read from the stream beyond the frames that were decoded; `None` in the middle of a block, of
    /// which this cannot be said.
    #[must_use]
    pub fn undecoded(&self) -> Option<usize> {
        self.block.is_empty().then(|| self.input.len())
    }

    /// Return what the far end printed before the protocol began, for error messages.
    #[must_use]
    pub fn noise(&self) -> String {
        self.preamble.noise(&self.input)
    }

    /// Return the bytes of results that arrived, also of unfinished ones, without those that were not admitted.
    #[must_use]
    pub fn results(&self) -> u64 {
        self.results
    }

    /// Return the bytes of bulk that arrived: of chunks of large messages, admitted or not, and of blobs.
    #[must_use]
    pub fn bulk(&self) -> u64 {
        self.bulk
    }

    /// Return the next event, or `None` when more bytes are needed. All messages are admitted.
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
            if self.block.is_empty() {
                if !self.preamble.read(&mut self.input)? {
                    return Ok(None);
                }
                let Some(block) = unpack(&mut self.input)? else { return Ok(None) };
                self.block = block;
            }
            if let Some(event) = self.next_frame(admit)? {
                return Ok(Some(event));
            }
        }
    }

    fn next_frame(&mut self, admit: &mut Admit<'_>) -> Result<Option<Event>, FrameError> {
        let (header, body) = Header::read(&mut self.block)?;
        let of = Body::of(header.kind);
        if header.flags & !(FIRST | LAST) != 0 || (header.flags != 0 && of.is_none()) {
            return Err(FrameError::BadFlags(header.flags));
        }
        if of.is_some() || header.kind == BLOB_CHUNK {
            self.bulk += bulk(body.len());
        }
        match of {
            None if header.kind == BLOB_CHUNK => {
                BlobChunk::read(header, body, self.max_message).map(|chunk| Some(Event::Chunk(chunk)))
            }
            None => Control::read(header, body).map(|control| Some(Event::Control(control))),
            Some(of) if header.flags & FIRST != 0 => self.first_chunk(of, header, body, admit),
            Some(of) => {
                let unfinished = self.unfinished.remove(&(of, header.id));
                let unfinished = unfinished.ok_or(FrameError::BadSequence("a chunk without a beginning"))?;
                self.chunk(of, header, body, unfinished)
            }
        }
    }

    fn first_chunk(
        &mut self,
        of: Body,
        header: Header,
        mut chunk: Bytes,
        admit: &mut Admit<'_>,
    ) -> Result<Option<Event>, FrameError> {
        let id = header.id;
        if self.unfinished.contains_key(&(of, id)) {
            return Err(FrameError::BadSequence("a message begins twice"));
        }
        let arrived = chunk.len() as u64;
        let assembly = Assembly::begin(of, id, self.max_message, &mut chunk)?;
        if header.flags & LAST != 0 {
            if of == Body::Result {
                self.results += arrived;
            }
            return assembly.whole(of, chunk).map(|message| Some(Event::Message(of, message)));
        }
        if self.unfinished.len() >= MAX_UNFINISHED {
            return Err(FrameError::BadSequence("too many unfinished messages"));
        }
        let (size, unfinished) = (assembly.size, *self.unfinished_bytes(of));
        let unfinished = if admit(&Offer { body: of, id, size, unfinished })? {
            *self.unfinished_bytes(of) += size;
            if of == Body::Result {
                self.results += arrived - chunk.len() as u64; // the head; `chunk` counts the rest
            }
            Unfinished::Stored(assembly)
        } else {
            Unfinished::Skipped { left: size, size: None }
        };
        self.chunk(of, header, chunk, unfinished)
    }

    /// Store a chunk of `unfinished`, from which the head has been taken if it is the first. Return the event if the chunk
    /// is the last.
    fn chunk(
        &mut self,
        of: Body,
        header: Header,
        mut chunk: Bytes,
        mut unfinished: Unfinished,
    ) -> Result<Option<Event>, FrameError> {
        match &mut unfinished {
            Unfinished::Stored(assembly) => {
                if of == Body::Result {
                    self.results += chunk.len() as u64;
                }
                if !assembly.take(&mut chunk)? {
                    let (size, missing) = (assembly.size, assembly.missing());
                    *self.unfinished_bytes(of) -= size;
                    let left = missing.checked_sub(chunk.len()).ok_or(FrameError::BadBody("message"))?;
                    unfinished = Unfinished::Skipped { left, size: Some(size) };
                }
            }
            Unfinished::Skipped { left, .. } => {
                *left = left.checked_sub(chunk.len()).ok_or(FrameError::BadBody("message"))?;
            }
        }
        if header.flags & LAST == 0 {
            self.unfinished.insert((of, header.id), unfinished);
            return Ok(None);
        }
        Ok(Some(match unfinished {
            Unfinished::Stored(assembly) => {
                let size = assembly.size;
                let message = assembly.end()?;
                *self.unfinished_bytes(of) -= size;
                Event::Message(of, message)
            }
            Unfinished::Skipped { left: 0, size: None } => Event::Skipped(of, header.id),
            Unfinished::Skipped { left: 0, size: Some(size) } => Event::NoMemory(of, header.id, size),
            Unfinished::Skipped { .. } => return Err(FrameError::Truncated("message")),
        }))
    }

    fn unfinished_bytes(&mut self, of: Body) -> &mut usize {
        match of {
            Body::Task => &mut self.unfinished_bytes.0,
            Body::Result => &mut self.unfinished_bytes.1,
            Body::Note => &mut self.unfinished_bytes.2,
            Body::Answer => &mut self.unfinished_bytes.3,
        }
    }
}
