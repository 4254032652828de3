//! The blocks of stripes: those that were written, until the receiver has them, and those that have arrived. Pure.
//!
//! Stripes end with the connection. What did not arrive of them is sent again on the stream itself, and so that nothing of it
//! arrives twice, blocks are numbered.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::error::FrameError;
use crate::wire::block::Packer;
use crate::wire::control::Control;

/// Blocks of which the sender is told at once that they have arrived: 256 KiB.
const BLOCKS_PER_REPORT: usize = 4;
/// Blocks that are kept because the receiver may not have them: about 64 MiB, which makes 250 MB/s at a round trip of 250 ms.
/// With more the stripes wait for its report. Each gap in what has arrived is one of these blocks or several, so there are no
/// more gaps, and what an end has of them fits a frame.
const MAX_KEPT_BLOCKS: usize = 1024;

/// The blocks that were written to stripes, until the receiver has them: see `resume.rs`. Pure.
#[derive(Debug, Default)]
pub(super) struct StripeBlocks {
    /// The number of the last block.
    last: u64,
    /// The raw bytes of the blocks that the receiver may not have, by their numbers; none of those that came to `again`.
    kept: BTreeMap<u64, Vec<u8>>,
    /// Those that are to be sent again, on the stream itself.
    again: VecDeque<Vec<u8>>,
    packer: Packer,
}

impl StripeBlocks {
    /// Give a new block a number, as its last frame, and keep it.
    pub fn keep(&mut self, raw: &mut Vec<u8>) {
        self.last += 1;
        // A frame of so few bytes is over no cap.
        drop(Control::StripeBlock { number: self.last }.put(raw));
        self.kept.insert(self.last, raw.clone());
    }

    /// Return whether the receiver is to report first what has arrived.
    pub fn is_full(&self) -> bool {
        self.kept.len() >= MAX_KEPT_BLOCKS
    }

    /// Forget blocks that the receiver has. Others than those that are kept mean nothing. Return whether stripes may have waited
    /// for this.
    pub fn acknowledge(&mut self, blocks: &[u64]) -> bool {
        let was_full = self.is_full();
        for block in blocks {
            self.kept.remove(block);
        }
        was_full
    }

    /// Send the blocks again that the receiver has not: the stripes are broken.
    pub fn resume(&mut self, arrived: &ArrivedBlocks) {
        self.kept.retain(|number, _| !arrived.has(*number));
        let unsent = self.kept.values_mut().filter(|raw| !raw.is_empty());
        self.again.extend(unsent.map(std::mem::take));
    }

    /// Append the next block that is to be sent again to `out`, packed. Return whether there was one.
    pub fn fill_again(&mut self, out: &mut Vec<u8>) -> bool {
        let Some(raw) = self.again.pop_front() else { return false };
        self.packer.pack(&raw, out);
        true
    }

    /// Return the bytes of the blocks that are kept.
    pub fn bytes(&self) -> usize {
        self.kept.values().chain(&self.again).map(Vec::len).sum()
    }
}

/// Which blocks of stripes have arrived. Pure.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrivedBlocks {
    /// All up to this one.
    first: u64,
    /// And these ranges of higher ones: the last block of each, by its first one. Between two of them a block is missing.
    others: BTreeMap<u64, u64>,
}

impl ArrivedBlocks {
    /// Note that a block has arrived.
    ///
    /// # Errors
    /// [`FrameError::BadSequence`] if more blocks are missing before it than a sender keeps.
    pub fn add(&mut self, number: u64) -> Result<(), FrameError> {
        if self.has(number) {
            return Ok(());
        }
        let before = self.others.range(..number).next_back().filter(|(_, last)| **last + 1 == number);
        let first = before.map_or(number, |(first, _)| *first);
        let last = number.checked_add(1).and_then(|next| self.others.remove(&next)).unwrap_or(number);
        self.others.insert(first, last);
        if let Some(last) = self.others.remove(&(self.first + 1)) {
            self.first = last;
        }
        let is_honest = self.others.len() <= MAX_KEPT_BLOCKS;
        if is_honest {
            Ok(())
        } else {
            Err(FrameError::BadSequence("a block of a stripe, of which too many are missing"))
        }
    }

    /// Return whether a block has arrived.
    #[must_use]
    pub fn has(&self, number: u64) -> bool {
        number <= self.first || self.others.range(..=number).next_back().is_some_and(|(_, last)| number <= *last)
    }
}

/// The blocks of stripes that arrived in a session, at its receiver.
#[derive(Debug, Default)]
pub(super) struct BlockReports {
    pub arrived: ArrivedBlocks,
    /// Those that the sender was not told of.
    untold: Vec<u64>,
}

impl BlockReports {
    /// Note that a block has arrived. Return the blocks that the sender is to be told of, if they are enough.
    ///
    /// # Errors
    /// As [`ArrivedBlocks::add`], and for a block that has arrived before.
    pub fn add(&mut self, number: u64) -> Result<Option<Vec<u64>>, FrameError> {
        if self.arrived.has(number) {
            return Err(FrameError::BadSequence("a block of a stripe twice"));
        }
        self.arrived.add(number)?;
        self.untold.push(number);
        Ok((self.untold.len() >= BLOCKS_PER_REPORT).then(|| std::mem::take(&mut self.untold)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A block is sent again once, however often connections break, and counts as under way until it has arrived.
    #[test]
    fn blocks_are_sent_again_once() {
        let mut blocks = StripeBlocks::default();
        (0..MAX_KEPT_BLOCKS).for_each(|_| blocks.keep(&mut vec![7]));
        let mut arrived = ArrivedBlocks::default();
        arrived.add(1).unwrap();
        for _ in 0..2 {
            blocks.resume(&arrived);
            assert_eq!((blocks.again.len(), blocks.kept.len()), (MAX_KEPT_BLOCKS - 1, MAX_KEPT_BLOCKS - 1));
        }
        blocks.keep(&mut vec![7]);
        assert!(blocks.is_full());
        assert!(blocks.acknowledge(&[2]) && !blocks.is_full());
    }

    /// Blocks arrive in any order, each once; a sender that repeats one, or leaves too many out, ends the session.
    #[test]
    fn blocks_that_nobody_can_have_sent_are_refused() {
        let mut reports = BlockReports::default();
        assert_eq!(reports.add(2).unwrap(), None);
        assert!(reports.add(2).is_err());
        assert!(reports.add(0).is_err());
        assert_eq!((reports.add(1).unwrap(), reports.add(3).unwrap()), (None, None));
        assert_eq!(reports.add(7).unwrap(), Some(vec![2, 1, 3, 7]));
        assert!(reports.add(3).is_err());
        let apart = (9..1 << 20).step_by(2).take_while(|number| reports.add(*number).is_ok()).count();
        assert_eq!(apart, MAX_KEPT_BLOCKS - 1);
    }
}
