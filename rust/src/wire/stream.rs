//! An outbox that is emptied into a byte stream.
//!
//! [`FrameSender`] shares an outbox between the threads that fill it and the one loop that empties it into a stream; its
//! counterpart is [`EventReader`](super::EventReader). Any `AsyncRead`/`AsyncWrite` will do: an SSH channel, a Unix socket, a
//! pipe.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

use crate::error::{FrameError, SessionError};
use crate::locks::lock;
use crate::timing::{PEER_TIMEOUT, wait_step};
use crate::wire::control::Control;
use crate::wire::outbox::{FULL_BLOCK, Outbox};
use crate::wire::pace::{Allowance, Pace};
use crate::wire::resume::ResendBuffer;
use crate::wire::stripe_blocks::{ArrivedBlocks, BlockReports, StripeBlocks};

/// Bytes in one write to a stream. Larger writes to a russh channel can straddle a rekey (russh #761).
pub(crate) const MAX_WRITE: usize = 32 * 1024;
/// Bytes that are kept of a resumable stream. With more the sender waits for the receiver's report, so the stream carries at
/// most so many bytes in a round trip: 400 MB/s at 80 ms.
const RESEND_BYTES: usize = 32 * 1024 * 1024;
/// Bytes that are kept at most. An honest receiver reports long before: beyond [`RESEND_BYTES`] come only answers to it, what
/// tasks print, and after a cut the blocks of stripes, of which no more than 100 MB are under way.
const MAX_RESEND_BYTES: usize = 256 * 1024 * 1024;

/// An outbox shared with the loop that sends it, and what a session's two directions must know of each other.
#[derive(Debug, Default)]
pub struct FrameSender {
    pub(super) sending: Mutex<Sending>,
    wake: Notify,
    /// Stripes that are open, and those who wait for blobs. Not 0: `wake_stripes` is to be notified.
    pub(super) striping: AtomicUsize,
    /// Notified when there may be blobs to send.
    pub(super) wake_stripes: Notify,
    /// Bytes that [`FrameSender::run`] wrote to the stream.
    sent: AtomicU64,
    /// Bytes that the reader of the same session read from the stream: see `EventReader::of_session`.
    pub(super) received: AtomicU64,
    /// Bytes of bulk that the readers of the same session read.
    pub(super) arrived: AtomicU64,
    /// The blocks of stripes that the readers of the same session read.
    blocks: Mutex<BlockReports>,
}

/// What is to be sent, and how much of it may be under way.
#[derive(Debug, Default)]
pub(super) struct Sending {
    pub outbox: Outbox,
    /// Set by the reader of the same session, which hears what the receiver reports. Without it nothing bounds the bulk.
    pub pace: Option<Pace>,
    /// What the receiver may not have; `None` if the stream ends with its connection. Set by [`FrameSender::begin_stream`].
    pub resend: Option<ResendBuffer>,
    /// Alike, of blobs on stripes.
    pub stripe_blocks: StripeBlocks,
}

/// What [`Sending::fill`] found.
struct Filled {
    /// There was something to send.
    any: bool,
    /// Bulk waits until more of it has arrived. Other frames pass it.
    held: bool,
    /// Bytes that have arrived, as the receiver reports: of bulk, and of a resumable stream.
    reported: u64,
    /// The goodbye is sent.
    finished: bool,
}

impl Sending {
    /// Append the next block to `out`.
    fn fill(&mut self, out: &mut Vec<u8>) -> Result<Filled, SessionError> {
        let kept = self.resend.as_ref().map_or(0, ResendBuffer::len);
        if kept >= MAX_RESEND_BYTES {
            return Err(FrameError::BadSequence("no report of the bytes that have arrived").into());
        }
        let is_full = kept >= RESEND_BYTES;
        let any = self.fill_again(out) || {
            // The reports that the other end waits for are sent all the same.
            let mut bulk = if is_full { Allowance::control() } else { self.allowance() };
            let any = self.outbox.fill_within(out, &mut bulk)?;
            self.note_sent(bulk);
            if let Some(resend) = &mut self.resend {
                resend.push(out);
            }
            any
        };
        let has_no_room = self.pace.as_ref().is_some_and(|pace| pace.room() == 0);
        let held = (is_full && self.outbox.has_messages()) || (has_no_room && self.outbox.has_bulk());
        let reported = self.pace.as_ref().map_or(0, Pace::reported);
        let reported = reported + self.resend.as_ref().map_or(0, |resend| resend.end() - resend.len() as u64);
        let is_written = self.resend.as_ref().is_none_or(ResendBuffer::is_written);
        Ok(Filled { any, held, reported, finished: is_written && self.outbox.is_finished() })
    }

    /// Append what is to be sent again on a new connection, if there is anything.
    fn fill_again(&mut self, out: &mut Vec<u8>) -> bool {
        let Some(resend) = &mut self.resend else { return false };
        if !resend.is_written() {
            return resend.write_again(FULL_BLOCK, out);
        }
        let any = self.stripe_blocks.fill_again(out);
        resend.push(out);
        any
    }

    /// Return how much bulk may be put into a block.
    pub fn allowance(&self) -> Allowance {
        let room = self.pace.as_ref().map_or(u64::MAX, Pace::room);
        Allowance { room, ..Allowance::unlimited() }
    }

    /// Note the bulk that a block has.
    pub fn note_sent(&mut self, bulk: Allowance) {
        let more = self.outbox.has_bulk();
        if let Some(pace) = &mut self.pace
            && (bulk.taken > 0 || more)
        {
            pace.on_sent(bulk.taken, more, Instant::now());
        }
    }
}

/// Bounds how long a peer may do nothing. Time is counted in steps, see [`wait_step`].
pub(super) struct Silence {
    bound: Option<Duration>,
    step: Duration,
    /// Whole steps in which the peer did nothing.
    waited: Duration,
    step_end: tokio::time::Instant,
}

impl Silence {
    pub fn new(bound: Option<Duration>) -> Self {
        let step = wait_step(bound.unwrap_or(PEER_TIMEOUT));
        Self { bound, step, waited: Duration::ZERO, step_end: tokio::time::Instant::now() + step }
    }

    /// Begin to count anew: the peer did something.
    fn end(&mut self) {
        *self = Self::new(self.bound);
    }

    /// Wait for what the peer does. Time that earlier calls waited counts, too.
    async fn wait<T>(&mut self, work: impl Future<Output = T>) -> Result<T, SessionError> {
        tokio::pin!(work);
        loop {
            match tokio::time::timeout_at(self.step_end, &mut work).await {
                Ok(done) => return Ok(done),
                Err(_) if self.bound.is_some_and(|bound| self.waited >= bound) => {
                    return Err(SessionError::Silent(self.waited.as_secs()));
                }
                Err(_) => self.waited += self.step,
            }
            self.step_end = tokio::time::Instant::now() + self.step;
        }
    }
}

impl FrameSender {
    /// Begin to number the stream's bytes, now that the greeting is over, preamble and all. `resumable`: what the receiver has
    /// not reported is kept, and sent again after [`FrameSender::resume`].
    pub fn begin_stream(&self, resumable: bool) {
        let mut sending = lock(&self.sending);
        sending.outbox.skip_preamble();
        sending.resend = resumable.then(ResendBuffer::default);
    }

    /// Note that a new connection takes the place of the broken one, and [`FrameSender::run`] will write to it. The receiver has
    /// so many bytes of the stream, and these blocks of stripes.
    ///
    /// # Errors
    /// [`FrameError::BadSequence`] if it cannot have them.
    pub fn resume(&self, received: u64, blocks: &ArrivedBlocks) -> Result<(), FrameError> {
        let mut sending = lock(&self.sending);
        let Some(resend) = &mut sending.resend else {
            return Err(FrameError::BadSequence("a stream that cannot go on"));
        };
        resend.resume(received)?;
        sending.stripe_blocks.resume(blocks);
        Ok(())
    }

    /// Take a frame of the other end that is about the streams themselves. Return false for any other frame.
    ///
    /// # Errors
    /// [`FrameError::BadSequence`] for a report that cannot be true.
    pub(super) fn on_report(&self, control: &Control) -> Result<bool, FrameError> {
        match control {
            Control::Received { bytes } => self.reported(*bytes),
            Control::Reached { bytes } => self.reached(*bytes)?,
            Control::StripeBlock { number } => self.block_arrived(*number)?,
            Control::BlocksArrived(blocks) => {
                let was_full = lock(&self.sending).stripe_blocks.acknowledge(blocks);
                if was_full {
                    self.flush();
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Take the receiver's report that it has so many bytes of the stream.
    fn reached(&self, bytes: u64) -> Result<(), FrameError> {
        let mut sending = lock(&self.sending);
        let Some(resend) = &mut sending.resend else { return Ok(()) };
        let was_full = resend.len() >= RESEND_BYTES;
        resend.acknowledge(bytes)?;
        drop(sending);
        if was_full {
            self.flush();
        }
        Ok(())
    }

    /// Note that a block of a stripe has arrived, and tell its sender if it is worth a frame.
    fn block_arrived(&self, number: u64) -> Result<(), FrameError> {
        let untold = lock(&self.blocks).add(number)?;
        if let Some(blocks) = untold {
            self.send(|o| o.control(Control::BlocksArrived(blocks)));
        }
        Ok(())
    }

    /// Return the blocks of stripes that have arrived.
    pub fn arrived_blocks(&self) -> ArrivedBlocks {
        lock(&self.blocks).arrived.clone()
    }

    /// Return how many bytes of the stream are kept, because the receiver may not have them.
    pub fn kept_bytes(&self) -> usize {
        let sending = lock(&self.sending);
        sending.resend.as_ref().map_or(0, ResendBuffer::len) + sending.stripe_blocks.bytes()
    }

    /// Return the sender of the node's next session. It goes on counting this one's traffic.
    #[must_use]
    pub fn successor(&self) -> Self {
        let (sent, received) = self.traffic();
        Self { sent: AtomicU64::new(sent), received: AtomicU64::new(received), ..Self::default() }
    }

    /// Add to what is sent, and wake the sender.
    pub fn send(&self, add: impl FnOnce(&mut Outbox)) {
        add(&mut lock(&self.sending).outbox);
        self.flush();
    }

    /// Add to what is sent without waking the sender: [`FrameSender::flush`] or [`FrameSender::send`] must follow soon.
    pub fn stage(&self, add: impl FnOnce(&mut Outbox)) {
        add(&mut lock(&self.sending).outbox);
    }

    /// Return whether messages wait to be sent.
    pub fn is_busy(&self) -> bool {
        lock(&self.sending).outbox.bytes() > 0
    }

    /// Wake the sender, and those of stripes.
    pub fn flush(&self) {
        self.wake.notify_one();
        if self.striping.load(Relaxed) > 0 && lock(&self.sending).outbox.blob_bytes() > 0 {
            self.wake_stripes.notify_waiters();
        }
    }

    /// Return the bytes that were ever written to the stream, and those that the session's reader read from it.
    pub fn traffic(&self) -> (u64, u64) {
        (self.sent.load(Relaxed), self.received.load(Relaxed))
    }

    /// Bound the bulk that is under way, as the receiver of it reports what arrives.
    pub(super) fn bound_bulk(&self) {
        lock(&self.sending).pace.get_or_insert_with(|| Pace::new(Instant::now()));
    }

    /// Take the receiver's report that so many bytes of bulk have arrived there so far.
    fn reported(&self, bytes: u64) {
        if let Some(pace) = &mut lock(&self.sending).pace {
            pace.on_received(bytes, Instant::now());
        }
        self.flush();
    }

    /// Empty the outbox into `stream` until it is closed, then shut the stream's sending side down.
    ///
    /// # Errors
    /// [`SessionError::Io`] when the stream fails, [`SessionError::Silent`] when it takes nothing for `bound`, or the receiver
    /// of bulk reports nothing for as long.
    pub async fn run(&self, mut stream: impl AsyncWrite + Unpin, bound: Option<Duration>) -> Result<(), SessionError> {
        let mut out = Vec::with_capacity(2 * FULL_BLOCK);
        let (mut write_silence, mut report_silence, mut seen) = (Silence::new(bound), Silence::new(bound), None);
        loop {
            out.clear();
            let Filled { any, held, reported, finished } = lock(&self.sending).fill(&mut out)?;
            if any || finished {
                self.write(&mut stream, &out, finished, &mut write_silence).await?;
            }
            if finished {
                return Ok(());
            }
            let waits_at = held.then_some(reported);
            if waits_at != seen {
                seen = waits_at;
                report_silence.end();
            }
            if any {
                continue;
            }
            if held {
                // The report wakes this loop, and so does anything else that is to be sent.
                report_silence.wait(self.wake.notified()).await?;
            } else {
                self.wake.notified().await;
            }
        }
    }

    /// Write bytes to a stream, which may take nothing for as long as `silence` says; then shut its sending side down if `finished`.
    pub(super) async fn write(
        &self,
        stream: &mut (impl AsyncWrite + Unpin),
        bytes: &[u8],
        finished: bool,
        silence: &mut Silence,
    ) -> Result<(), SessionError> {
        let write = async {
            for piece in bytes.chunks(MAX_WRITE) {
                stream.write_all(piece).await?;
                self.sent.fetch_add(piece.len() as u64, Relaxed);
            }
            stream.flush().await?;
            if finished { stream.shutdown().await } else { Ok(()) }
        };
        silence.end();
        Ok(silence.wait(write).await??)
    }
}

/// Write the first frame of a stream, behind the preamble.
///
/// # Errors
/// [`SessionError::Io`] when the stream fails.
pub async fn greet(stream: &mut (impl AsyncWrite + Unpin), greeting: Control) -> Result<(), SessionError> {
    let (mut outbox, mut out) = (Outbox::default(), Vec::new());
    outbox.control(greeting);
    while outbox.fill(&mut out)? {
        for piece in out.chunks(MAX_WRITE) {
            stream.write_all(piece).await?;
        }
        out.clear();
    }
    Ok(stream.flush().await?)
}
