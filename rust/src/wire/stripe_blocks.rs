//! The blocks of stripes: those that were written, until the receiver has them, and those that have arrived. Pure.
//!
//! Stripes end with the connection. What did not arrive of them is sent again on the stream itself, and so that nothing of it
//! arrives twice, blocks are numbered.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::error::FrameError;
use crate::wire::block::Packer;
use crate::wire::control::Control;

/// Blocks that may have arrived while an earlier one has not. More are under way on no stripes: they are 4 GiB.
const MAX_BLOCKS_AHEAD: usize = 1 << 16;
/// Blocks of which the sender is told at once that they have arrived: 256 KiB.
const BLOCKS_PER_REPORT: usize = 4;

/// The blocks that were written to stripes, until the receiver has them: see `resume.rs`. Pure.
#[derive(Debug, Default)]
pub(super) struct StripeBlocks {
    /// The number of the last block.
    last: u64,
    /// The raw bytes of the blocks that the receiver may not have, by their numbers.
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

    /// Forget blocks that the receiver has. Others than those that are kept mean nothing.
    pub fn acknowledge(&mut self, blocks: &[u64]) {
        for block in blocks {
            self.kept.remove(block);
        }
    }

    /// Send the blocks again that the receiver has not: the stripes are broken.
    pub fn resume(&mut self, arrived: &ArrivedBlocks) {
        self.kept.retain(|number, _| !arrived.has(*number));
        // The earlier ones are in the stream already.
        self.again.extend(std::mem::take(&mut self.kept).into_values());
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
    /// And these, which are higher.
    others: BTreeSet<u64>,
}

impl ArrivedBlocks {
    /// Note that a block has arrived.
    pub fn add(&mut self, number: u64) {
        if number > self.first {
            self.others.insert(number);
        }
        while self.others.remove(&(self.first + 1)) {
            self.first += 1;
        }
    }

    /// Return whether a block has arrived.
    #[must_use]
    pub fn has(&self, number: u64) -> bool {
        number <= self.first || self.others.contains(&number)
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
    /// [`FrameError::BadSequence`] for a block that has arrived before, or far ahead of others.
    pub fn add(&mut self, number: u64) -> Result<Option<Vec<u64>>, FrameError> {
        if self.arrived.has(number) {
            return Err(FrameError::BadSequence("a block of a stripe twice"));
        }
        self.arrived.add(number);
        if self.arrived.others.len() > MAX_BLOCKS_AHEAD {
            return Err(FrameError::BadSequence("blocks of stripes without those before them"));
        }
        self.untold.push(number);
        Ok((self.untold.len() >= BLOCKS_PER_REPORT).then(|| std::mem::take(&mut self.untold)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Blocks arrive in any order, each once; a sender that repeats one, or leaves one out for ever, ends the session.
    #[test]
    fn blocks_that_nobody_can_have_sent_are_refused() {
        let mut reports = BlockReports::default();
        assert_eq!(reports.add(2).unwrap(), None);
        assert!(reports.add(2).is_err());
        assert!(reports.add(0).is_err());
        assert_eq!((reports.add(1).unwrap(), reports.add(3).unwrap()), (None, None));
        assert_eq!(reports.add(7).unwrap(), Some(vec![2, 1, 3, 7]));
        assert!(reports.add(3).is_err());
        let ahead = (8..1 << 20).take_while(|number| reports.add(*number).is_ok()).count();
        assert_eq!(ahead, MAX_BLOCKS_AHEAD - 1);
    }
}
