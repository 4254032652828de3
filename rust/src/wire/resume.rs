//! What was written to a stream, until the other end has it. Pure.
//!
//! The connection under a session's stream may be cut and replaced. The bytes of each direction are numbered from the end of
//! the greeting on. The receiver reports how many have arrived ([`super::Control::Reached`]); what was not reported is kept
//! here. On a new connection the receiver says how many bytes it has, and the sender goes on from there. So each byte arrives
//! exactly once and in its order, and nothing above the stream knows of the cut.
//!
//! For example: 1,000,000 bytes were written, and 900,000 are reported, when the connection is cut. The last 100,000 are kept.
//! On the new connection the receiver says that it has 960,000: then the last 40,000 are written again, and new ones behind
//! them.

use std::collections::VecDeque;

use crate::error::FrameError;

/// Bytes of one piece of memory.
const PIECE_BYTES: usize = 256 * 1024;
/// Pieces that are emptied and used again.
const SPARE_PIECES: usize = 4;

/// See the file's text.
#[derive(Debug, Default)]
pub struct ResendBuffer {
    /// The number of the first byte that is kept, which is how many bytes the receiver is known to have.
    start: u64,
    /// The number of the next byte to be written to the present connection. Set back by [`ResendBuffer::resume`].
    next: u64,
    /// Bytes at the beginning of the first piece that are not kept any more.
    gone: usize,
    /// All of them have [`PIECE_BYTES`], but for the last one. Empty pieces stand nowhere in it.
    pieces: VecDeque<Vec<u8>>,
    /// The bytes that are kept.
    len: usize,
    spare: Vec<Vec<u8>>,
}

impl ResendBuffer {
    /// Return how many bytes are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Return whether the receiver is known to have everything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Return how many bytes were put into the stream so far.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start + self.len as u64
    }

    /// Return whether everything was written to the present connection.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.next == self.end()
    }

    /// Keep bytes that are written to the present connection now. Everything before them was written.
    pub fn push(&mut self, mut bytes: &[u8]) {
        debug_assert!(self.is_written());
        self.len += bytes.len();
        self.next += bytes.len() as u64;
        while !bytes.is_empty() {
            if self.pieces.back().is_none_or(|piece| piece.len() == PIECE_BYTES) {
                self.pieces.push_back(self.spare.pop().unwrap_or_else(|| Vec::with_capacity(PIECE_BYTES)));
            }
            let Some(piece) = self.pieces.back_mut() else { return };
            let (now, later) = bytes.split_at(bytes.len().min(PIECE_BYTES - piece.len()));
            piece.extend_from_slice(now);
            bytes = later;
        }
    }

    /// Forget the first bytes: the receiver reports that it has so many. A report of fewer than are known is late: it was sent
    /// before a cut, and comes behind the number that the receiver told on the new connection.
    ///
    /// # Errors
    /// [`FrameError::BadSequence`] if the receiver cannot have so many.
    pub fn acknowledge(&mut self, bytes: u64) -> Result<(), FrameError> {
        if bytes < self.start { Ok(()) } else { self.forget(bytes) }
    }

    /// # Errors
    /// [`FrameError::BadSequence`] if the receiver cannot have so many, or had more before.
    fn forget(&mut self, bytes: u64) -> Result<(), FrameError> {
        let new = bytes.checked_sub(self.start).filter(|_| bytes <= self.next);
        let new = new.and_then(|new| usize::try_from(new).ok()).ok_or(BAD_COUNT)?;
        self.start = bytes;
        self.len -= new;
        self.gone += new;
        while let Some(piece) = self.pieces.front().filter(|piece| self.gone >= piece.len()) {
            self.gone -= piece.len();
            let mut emptied = self.pieces.pop_front().unwrap_or_default();
            emptied.clear();
            if self.spare.len() < SPARE_PIECES {
                self.spare.push(emptied);
            }
        }
        Ok(())
    }

    /// Go on from this byte on a new connection: the receiver has so many.
    ///
    /// # Errors
    /// As [`ResendBuffer::acknowledge`]; and if the receiver had more before.
    pub fn resume(&mut self, received: u64) -> Result<(), FrameError> {
        if !(self.start..=self.end()).contains(&received) {
            return Err(BAD_COUNT);
        }
        // Of a connection that is cut the receiver may have everything, whatever was written last.
        self.next = self.end();
        self.forget(received)?;
        self.next = received;
        Ok(())
    }

    /// Append at most `most` of the bytes that are to be written again to `out`, in their order. Return whether there were any.
    pub fn write_again(&mut self, most: usize, out: &mut Vec<u8>) -> bool {
        let before = out.len();
        let mut at = self.gone + usize::try_from(self.next - self.start).unwrap_or(usize::MAX);
        for piece in self.pieces.iter().skip(at / PIECE_BYTES) {
            at %= PIECE_BYTES;
            let rest = piece.get(at..).unwrap_or_default();
            let room = most - (out.len() - before);
            out.extend_from_slice(rest.get(..rest.len().min(room)).unwrap_or_default());
            at = 0;
        }
        self.next += (out.len() - before) as u64;
        out.len() > before
    }
}

/// The error of a count that the receiver cannot mean.
const BAD_COUNT: FrameError = FrameError::BadSequence("a wrong count of the bytes that have arrived");
