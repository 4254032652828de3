//! Tasks' output that waits to be sent, or to be taken. It is bounded: of a flood the middle is left out, and counted.

use std::collections::VecDeque;

use bytes::Bytes;

/// Bytes that may wait before some are left out.
pub const FIRST: usize = 1024 * 1024;
/// The latest bytes that are kept of what comes beyond.
pub const LAST: usize = 64 * 1024;

/// Some output, or, if `left_out` is not 0, the place where so many bytes were left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece<F> {
    pub from: F,
    pub text: Bytes,
    pub left_out: usize,
}

/// See the module's text.
#[derive(Debug)]
pub struct Flood<F> {
    first: VecDeque<Piece<F>>,
    gap: Option<Piece<F>>,
    last: VecDeque<Piece<F>>,
    /// Bytes of `first`, and of `last`.
    bytes: (usize, usize),
}

impl<F> Default for Flood<F> {
    fn default() -> Self {
        Self { first: VecDeque::new(), gap: None, last: VecDeque::new(), bytes: (0, 0) }
    }
}

impl<F> Flood<F> {
    /// Let a piece wait behind all others. If that is too much, the oldest are left out that come after the first ones.
    pub fn push(&mut self, piece: Piece<F>) {
        let size = piece.text.len();
        if self.last.is_empty() && self.gap.is_none() && self.bytes.0 + size <= FIRST {
            self.bytes.0 += size;
            self.first.push_back(piece);
            return;
        }
        self.bytes.1 += size;
        self.last.push_back(piece);
        while let Some(piece) = if self.bytes.1 > LAST { self.last.pop_front() } else { None } {
            self.bytes.1 -= piece.text.len();
            let before = self.gap.take().map_or(0, |gap| gap.left_out);
            let left_out = before + piece.left_out + piece.text.len();
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
        self.bytes.0 -= piece.text.len();
        Some(piece)
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.first.is_empty() && self.gap.is_none() && self.last.is_empty()
    }
}
