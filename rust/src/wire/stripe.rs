//! Stripes: further streams to the peer of a [`FrameSender`], which carry blobs and nothing else. They take them from the
//! sender's one outbox. When they pay is decided in `client/stripes.rs`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::io::AsyncWrite;

use crate::error::{FrameError, SessionError};
use crate::locks::lock;
use crate::wire::block::Packer;
use crate::wire::control::Control;
use crate::wire::header::put_preamble;
use crate::wire::outbox::FULL_BLOCK;
use crate::wire::stream::{FrameSender, Sending, Silence};

/// Blocks that may have arrived while an earlier one has not. More are under way on no stripes: they are 4 GiB.
const MAX_BLOCKS_AHEAD: usize = 1 << 16;
/// Blocks of which the sender is told at once that they have arrived: 256 KiB.
const BLOCKS_PER_REPORT: usize = 4;

impl FrameSender {
    /// Wait until blobs of so many bytes are to be sent.
    pub async fn blobs_wait(&self, bytes: usize) {
        let _counted = Counted::new(&self.striping);
        self.find(|sending| sending.outbox.blob_bytes() >= bytes).await;
    }

    /// Return a stripe: from now on blobs are sent by it and by other stripes alone.
    pub fn stripe(&self) -> Stripe<'_> {
        let mut sending = lock(&self.sending);
        sending.outbox.open_stripe();
        if let Some(pace) = &mut sending.pace {
            pace.widen(Instant::now());
        }
        drop(sending);
        Stripe { sender: self, _counted: Counted::new(&self.striping), is_used: false }
    }

    /// Look into the outbox until `found`, again whenever something was added.
    async fn find(&self, mut found: impl FnMut(&mut Sending) -> bool) {
        let mut woken = std::pin::pin!(self.wake_stripes.notified());
        loop {
            // Before the look: what is added after it then ends the wait.
            woken.as_mut().enable();
            if found(&mut lock(&self.sending)) {
                return;
            }
            woken.as_mut().await;
            woken.set(self.wake_stripes.notified());
        }
    }
}

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
    fn keep(&mut self, raw: &mut Vec<u8>) {
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

/// A part of a count, for as long as this lives.
#[derive(Debug)]
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// A further stream to the peer of a [`FrameSender`], which carries blobs. Dropped when the stream has ended.
#[derive(Debug)]
pub struct Stripe<'a> {
    sender: &'a FrameSender,
    _counted: Counted<'a>,
    is_used: bool,
}

impl Stripe<'_> {
    /// Write blobs to `stream` for as long as there are any; then wait for more.
    ///
    /// # Errors
    /// As [`FrameSender::run`].
    pub async fn run(
        &mut self,
        mut stream: impl AsyncWrite + Unpin,
        bound: Option<Duration>,
    ) -> Result<Infallible, SessionError> {
        let mut raw = Vec::with_capacity(2 * FULL_BLOCK);
        let mut out = Vec::with_capacity(2 * FULL_BLOCK);
        let mut packer = Packer::default();
        put_preamble(&mut out);
        let mut silence = Silence::new(bound);
        loop {
            let fill = |sending: &mut Sending| {
                let mut bulk = sending.allowance();
                let any = sending.outbox.fill_blobs(&mut raw, &mut bulk);
                sending.note_sent(bulk);
                if any && sending.resend.is_some() {
                    sending.stripe_blocks.keep(&mut raw);
                }
                any
            };
            self.sender.find(fill).await;
            self.is_used = true;
            packer.pack(&raw, &mut out);
            self.sender.write(&mut stream, &out, false, &mut silence).await?;
            raw.clear();
            out.clear();
        }
    }

    /// Return whether blobs were written to the stream, perhaps not in full: if it ends, they may be lost.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.is_used
    }
}

impl Drop for Stripe<'_> {
    fn drop(&mut self) {
        lock(&self.sender.sending).outbox.close_stripe();
        // What this stripe has left is for the others, or for the sender itself.
        self.sender.flush();
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
