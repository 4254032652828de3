//! Tasks' output that waits: at a node until it is sent, at the client until Python takes it. Pure, and bounded: of too
//! much output the middle is left out, and its bytes are counted.
//!
//! For example: 10 MiB arrive while nobody takes any. The first MiB ([`OUTPUT_HEAD`]) and the last 64 KiB
//! ([`OUTPUT_TAIL`]) are stored; between them stands one piece without text, whose `left_out` is the number of the
//! other bytes.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use crate::timing::{OUTPUT_HEAD, OUTPUT_TAIL};

/// Bytes that a piece counts for at least: about the memory that it takes beside its text.
const MIN_PIECE_COST: usize = 256;
/// Bytes up to which pieces of the same origin are merged.
const MAX_MERGED_PIECE: usize = 16 * 1024;

/// Output of one origin (a stream of a worker, or of a node) or, if `left_out` is not 0, the place where so many bytes
/// of any origin were left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece<F> {
    pub from: F,
    pub text: Bytes,
    pub left_out: usize,
}

impl<F: PartialEq> Piece<F> {
    fn cost(&self) -> usize {
        self.text.len().max(MIN_PIECE_COST)
    }

    /// Append another piece to this one. Return false, and change nothing, if they are of different origins, together
    /// too long, or one is a place where bytes were left out.
    fn merge(&mut self, other: &Self) -> bool {
        let together = self.text.len() + other.text.len() <= MAX_MERGED_PIECE;
        if !together || self.from != other.from || self.left_out.max(other.left_out) > 0 {
            return false;
        }
        let mut text = BytesMut::from(std::mem::take(&mut self.text));
        text.extend_from_slice(&other.text);
        self.text = text.freeze();
        true
    }
}

/// See the file's text.
#[derive(Debug)]
pub struct Flood<F> {
    /// The oldest pieces, which are taken first. Filled up to [`OUTPUT_HEAD`] while nothing waits behind it.
    first: VecDeque<Piece<F>>,
    /// The place where bytes were left out between `first` and `last`.
    gap: Option<Piece<F>>,
    /// The latest pieces, up to [`OUTPUT_TAIL`]: each further piece moves the oldest of them into `gap`.
    last: VecDeque<Piece<F>>,
    /// The bytes that the pieces of `first` count for, and those of `last`.
    bytes: (usize, usize),
}

impl<F> Default for Flood<F> {
    fn default() -> Self {
        Self { first: VecDeque::new(), gap: None, last: VecDeque::new(), bytes: (0, 0) }
    }
}

impl<F: PartialEq> Flood<F> {
    /// Append a piece. If too much waits then, the oldest pieces behind the first ones are left out.
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

    /// Move the oldest pieces of `last` into the gap until the rest is within its bound.
    fn leave_out(&mut self) {
        while let Some(piece) = if self.bytes.1 > OUTPUT_TAIL { self.last.pop_front() } else { None } {
            self.bytes.1 -= piece.cost();
            let before = self.gap.take().map_or(0, |gap| gap.left_out);
            let left_out = before.saturating_add(piece.left_out).saturating_add(piece.text.len());
            self.gap = Some(Piece { from: piece.from, text: Bytes::new(), left_out });
        }
    }

    /// Return the piece that has waited longest, and forget it.
    pub fn pop(&mut self) -> Option<Piece<F>> {
        if self.first.is_empty() {
            // The end of this flood is the beginning of the next one.
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

    /// Return whether no piece waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.first.is_empty() && self.gap.is_none() && self.last.is_empty()
    }
}
