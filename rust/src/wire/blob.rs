//! Blobs: bytes that travel apart from the messages that name them, so that they cross to a node once.
//!
//! ```text
//! chunk = offset (u64) total (u64) bytes        a frame; the number of the blob is in its header
//! ```
//!
//! A chunk says where its bytes belong, so the chunks of one blob may come in any order, and over several streams. The
//! number names one transfer of the blob to one node. It is given by the client and never used again, so that a frame
//! about an earlier transfer of the same bytes cannot be taken for one about a later transfer.

use std::sync::Arc;

use bytes::{Buf, Bytes};

use crate::error::FrameError;
use crate::wire::header::{Attempt, Header, MAX_CHUNK};

/// The kind of a chunk's frame.
pub const BLOB_CHUNK: u8 = 18;
/// Blobs that one message names at most.
pub const MAX_BLOBS: usize = 255;
/// Bytes of a chunk's body before the payload.
const HEAD: usize = 16;

/// The bytes of a blob as the client has them.
#[derive(Debug)]
pub struct Content {
    /// Names these bytes among all those of the pool: equal bytes have equal numbers.
    pub id: u64,
    pub bytes: Bytes,
}

/// A part of a message whose bytes are a blob's.
#[derive(Debug, Clone)]
pub struct BlobPart {
    /// The place of the part among all parts of the message, those that travel in it included.
    pub place: u16,
    /// The number of the blob's transfer to the node; 0 until the task is sent there.
    pub number: u64,
    /// Whether this is the first message that names the content: it alone counts its bytes, see [`super::Message::load`].
    pub fresh: bool,
    /// At the client, the bytes. They are kept as long as a message names them.
    pub content: Option<Arc<Content>>,
}

impl PartialEq for BlobPart {
    fn eq(&self, other: &Self) -> bool {
        (self.place, self.number) == (other.place, other.number)
    }
}

impl Eq for BlobPart {}

/// Bytes of a blob that have arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobChunk {
    pub number: u64,
    /// The place of the first of the bytes in the blob.
    pub offset: u64,
    /// The size of the whole blob, in bytes.
    pub total: u64,
    pub bytes: Bytes,
}

impl BlobChunk {
    /// Read the frame of a chunk. A blob may have at most `max` bytes.
    pub(super) fn read(header: Header, mut body: Bytes, max: usize) -> Result<Self, FrameError> {
        if body.len() < HEAD {
            return Err(FrameError::Truncated("chunk of a blob"));
        }
        let (offset, total) = (body.get_u64_le(), body.get_u64_le());
        if total > max as u64 {
            let len = usize::try_from(total).unwrap_or(usize::MAX);
            return Err(FrameError::TooLong { what: "blob", len, cap: max });
        }
        // An empty chunk brings nothing: a peer could send any number of them.
        if body.is_empty() || offset.checked_add(body.len() as u64).is_none_or(|end| end > total) {
            return Err(FrameError::BadBody("chunk of a blob"));
        }
        Ok(Self { number: header.id.task, offset, total, bytes: body })
    }
}

/// A blob that is being cut into chunks.
#[derive(Debug)]
pub struct OutgoingBlob {
    number: u64,
    bytes: Bytes,
    /// Bytes that were written.
    offset: usize,
}

impl OutgoingBlob {
    #[must_use]
    pub fn new(number: u64, bytes: Bytes) -> Self {
        Self { number, bytes, offset: 0 }
    }

    /// Return the number of the transfer if no chunk of it was written.
    #[must_use]
    pub fn unstarted(&self) -> Option<u64> {
        (self.offset == 0).then_some(self.number)
    }

    /// Return the bytes that were not written yet.
    #[must_use]
    pub fn left(&self) -> usize {
        self.bytes.len() - self.offset
    }

    /// Append the next chunk to `out`. Return whether it was the last.
    pub fn put_chunk(&mut self, out: &mut Vec<u8>) -> bool {
        let bytes = self.bytes.get(self.offset..).unwrap_or_default();
        let bytes = bytes.get(..MAX_CHUNK).unwrap_or(bytes);
        let header = Header { kind: BLOB_CHUNK, flags: 0, id: Attempt { task: self.number, attempt: 0 } };
        header.put(HEAD + bytes.len(), out);
        out.extend_from_slice(&(self.offset as u64).to_le_bytes());
        out.extend_from_slice(&(self.bytes.len() as u64).to_le_bytes());
        out.extend_from_slice(bytes);
        self.offset += bytes.len();
        self.left() == 0
    }
}

/// Return all parts of a message: those that travel in it, and those that travel apart, each at its place.
pub fn in_places<T>(inline: impl IntoIterator<Item = T>, apart: impl IntoIterator<Item = (u16, T)>) -> Vec<T> {
    let mut inline = inline.into_iter();
    let mut parts = Vec::new();
    for (place, part) in apart {
        let before = usize::from(place).saturating_sub(parts.len());
        parts.extend(inline.by_ref().take(before));
        parts.push(part);
    }
    parts.extend(inline);
    parts
}
