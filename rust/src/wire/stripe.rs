//! Stripes: further streams to the peer of a [`FrameSender`], which carry blobs and nothing else. They take them from the
//! sender's one outbox. When they pay is decided in `client/stripes.rs`.

use std::collections::{BTreeMap, VecDeque};
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

/// Blocks of which the sender is told at once that they have arrived: 256 KiB.
const BLOCKS_PER_REPORT: usize = 4;
/// Blocks that are kept because the receiver may not have them: about 64 MiB, which makes 250 MB/s at a round trip of 250 ms.
/// With more the stripes wait for its report. Each gap in what has arrived is one of these blocks or several, so there are no
/// more gaps, and what an end has of them fits a frame.
const MAX_KEPT_BLOCKS: usize = 1024;

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

    /// Return whether the receiver is to report first what has arrived.
    fn is_full(&self) -> bool {
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
    /// As [`ArrivedBlocks::add`].
    pub fn add(&mut self, number: u64) -> Result<Option<Vec<u64>>, FrameError> {
        self.arrived.add(number)?;
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
                if sending.stripe_blocks.is_full() {
                    return false;
                }
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
