//! Tasks' output that waits to be sent, or to be taken. It is bounded: of a flood the middle is left out, and counted.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use crate::timing::{OUTPUT_HEAD, OUTPUT_TAIL};

/// Standard output, in the lowest bits of the number that an output frame has for its stream.
pub const STDOUT: u64 = 1;
/// Standard error, alike.
pub const STDERR: u64 = 2;

/// What a piece counts for at least, in bytes: about the memory that it takes.
const PIECE: usize = 256;
/// Bytes up to which pieces of the same origin become one.
const MERGED: usize = 16 * 1024;

/// Some output, or, if `left_out` is not 0, the place where so many bytes were left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece<F> {
    pub from: F,
    pub text: Bytes,
    pub left_out: usize,
}

impl<F: PartialEq> Piece<F> {
    fn cost(&self) -> usize {
        self.text.len().max(PIECE)
    }

    /// Append another piece to this one; false if they do not belong together.
    fn merge(&mut self, other: &Self) -> bool {
        let together = self.text.len() + other.text.len() <= MERGED;
        if !together || self.from != other.from || self.left_out.max(other.left_out) > 0 {
            return false;
        }
        let mut text = BytesMut::from(std::mem::take(&mut self.text));
        text.extend_from_slice(&other.text);
        self.text = text.freeze();
        true
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Flood<F> {
    first: VecDeque<Piece<F>>,
    gap: Option<Piece<F>>,
    last: VecDeque<Piece<F>>,
    /// What the pieces of `first` count for, and those of `last`.
    bytes: (usize, usize),
}

impl<F> Default for Flood<F> {
    fn default() -> Self {
        Self { first: VecDeque::new(), gap: None, last: VecDeque::new(), bytes: (0, 0) }
    }
}

impl<F: PartialEq> Flood<F> {
    /// Let a piece wait behind all others. If that is too much, the oldest are left out that come after the first ones.
    pub fn push(&mut self, piece: Piece<F>) {
        if piece.text.is_empty() && piece.left_out == 0 {
            return;
        }
        let unbroken = self.last.is_empty() && self.gap.is_none();
        let (pieces, bytes) =
            if unbroken { (&mut self.first, &mut self.bytes.0) } else { (&mut self.last, &mut self.bytes.1) };
        if let Some(before) = pieces.back_mut() {
            let cost = before.cost();
            if (!unbroken || *bytes + piece.text.len() <= OUTPUT_HEAD) && before.merge(&piece) {
                *bytes += before.cost() - cost;
                self.leave_out();
                return;
            }
        }
        if unbroken && self.bytes.0 + piece.cost() <= OUTPUT_HEAD {
            self.bytes.0 += piece.cost();
            self.first.push_back(piece);
            return;
        }
        self.bytes.1 += piece.cost();
        self.last.push_back(piece);
        self.leave_out();
    }

    fn leave_out(&mut self) {
        while let Some(piece) = if self.bytes.1 > OUTPUT_TAIL { self.last.pop_front() } else { None } {
            self.bytes.1 -= piece.cost();
            let before = self.gap.take().map_or(0, |gap| gap.left_out);
            let left_out = before.saturating_add(piece.left_out).saturating_add(piece.text.len());
            self.gap = Some(Piece { from: piece.from, text: Bytes::new(), left_out });
        }
    }

    /// Take the piece that has waited longest.
    pub fn pop(&mut self) -> Option<Piece<F>> {
        if self.first.is_empty() {
            // What was kept of the flood's end may be the beginning of another one.
            self.first = std::mem::take(&mut self.last);
            self.bytes = (self.bytes.1, 0);
            if let Some(gap) = self.gap.take() {
                return Some(gap);
            }
        }
        let piece = self.first.pop_front()?;
        self.bytes.0 -= piece.cost();
        Some(piece)
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.first.is_empty() && self.gap.is_none() && self.last.is_empty()
    }
}
