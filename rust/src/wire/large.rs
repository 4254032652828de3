//! What is sent in chunks, in turn with others: large messages, and blobs.

use crate::wire::blob::OutgoingBlob;
use crate::wire::message::Outgoing;

/// See the file's text.
#[derive(Debug)]
pub(super) enum Large {
    Message(Outgoing),
    Blob(OutgoingBlob),
}

impl Large {
    pub fn is_blob(&self) -> bool {
        matches!(self, Self::Blob(_))
    }

    pub fn left(&self) -> usize {
        match self {
            Self::Message(message) => message.left,
            Self::Blob(blob) => blob.left(),
        }
    }

    /// As [`Outgoing::answer_size`].
    pub fn answer_size(&self) -> usize {
        match self {
            Self::Message(message) => message.answer_size(),
            Self::Blob(_) => 0,
        }
    }

    /// Append the next chunk to `out`. Return whether it was the last.
    pub fn put_chunk(&mut self, out: &mut Vec<u8>) -> bool {
        match self {
            Self::Message(message) => message.put_chunk(out),
            Self::Blob(blob) => blob.put_chunk(out),
        }
    }
}
