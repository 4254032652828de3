//! Stripes: further streams to the peer of a [`FrameSender`], which carry blobs and nothing else. They take them from the
//! sender's one outbox. When they pay is decided in `client/stripes.rs`.

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::io::AsyncWrite;

use crate::error::SessionError;
use crate::locks::lock;
use crate::wire::block::Packer;
use crate::wire::header::put_preamble;
use crate::wire::outbox::FULL_BLOCK;
use crate::wire::stream::{FrameSender, Sending, Silence};

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
