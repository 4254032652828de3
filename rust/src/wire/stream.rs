//! An outbox and a decoder on a byte stream: the only file of the wire that touches one.
//!
//! [`FrameSender`] shares an outbox between the threads that fill it and the one loop that empties it into a stream;
//! [`EventReader`] reads events. Any `AsyncRead`/`AsyncWrite` will do: an SSH channel, a Unix socket, a pipe.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

use crate::error::{FrameError, SessionError};
use crate::locks::lock;
use crate::text;
use crate::timing::{PEER_TIMEOUT, wait_step};
use crate::wire::control::Control;
use crate::wire::decoder::{Decoder, Event, Offer};
use crate::wire::hello::MAX_SENTENCE;
use crate::wire::outbox::{FULL_BLOCK, Outbox};

/// Events that are returned before more are decoded, and the bytes of them.
const EVENTS_PER_READ: usize = 1024;
const BYTES_PER_READ: usize = 1024 * 1024;
/// Bytes in one write to a stream. Larger writes to a russh channel can straddle a rekey (russh #761).
pub(crate) const MAX_WRITE: usize = 32 * 1024;

/// An outbox shared with the loop that sends it, and what a session's two directions must know of each other.
#[derive(Debug, Default)]
pub struct FrameSender {
    pub(super) outbox: Mutex<Outbox>,
    wake: Notify,
    /// Stripes that are open, and those who wait for blobs. Not 0: `wake_stripes` is to be notified.
    pub(super) striping: AtomicUsize,
    /// Notified when there may be blobs to send.
    pub(super) wake_stripes: Notify,
    /// Bytes that [`FrameSender::run`] wrote to the stream.
    sent: AtomicU64,
    /// Bytes that the reader of the same session read from the stream: see [`EventReader::of_session`].
    received: AtomicU64,
}

impl FrameSender {
    /// Add to what is sent, and wake the sender.
    pub fn send(&self, add: impl FnOnce(&mut Outbox)) {
        add(&mut lock(&self.outbox));
        self.flush();
    }

    /// Add to what is sent without waking the sender: [`FrameSender::flush`] or [`FrameSender::send`] must follow soon.
    pub fn stage(&self, add: impl FnOnce(&mut Outbox)) {
        add(&mut lock(&self.outbox));
    }

    /// Return whether messages wait to be sent.
    pub fn is_busy(&self) -> bool {
        lock(&self.outbox).bytes() > 0
    }

    /// Wake the sender, and those of stripes.
    pub fn flush(&self) {
        self.wake.notify_one();
        if self.striping.load(Relaxed) > 0 && lock(&self.outbox).blob_bytes() > 0 {
            self.wake_stripes.notify_waiters();
        }
    }

    /// Return the bytes that were ever written to the stream, and those that the session's reader read from it.
    pub fn traffic(&self) -> (u64, u64) {
        (self.sent.load(Relaxed), self.received.load(Relaxed))
    }

    /// Empty the outbox into `stream` until it is closed, then shut the stream's sending side down.
    ///
    /// # Errors
    /// [`SessionError::Io`] when the stream fails, [`SessionError::Silent`] when it takes nothing for `bound`.
    pub async fn run(&self, mut stream: impl AsyncWrite + Unpin, bound: Option<Duration>) -> Result<(), SessionError> {
        let mut out = Vec::with_capacity(2 * FULL_BLOCK);
        loop {
            out.clear();
            let (any, finished) = {
                let mut outbox = lock(&self.outbox);
                (outbox.fill(&mut out)?, outbox.is_finished())
            };
            self.write(&mut stream, &out, finished, bound).await?;
            if finished {
                return Ok(());
            }
            if !any {
                self.wake.notified().await;
            }
        }
    }

    /// Write bytes to a stream, which may take nothing for `bound`; then shut its sending side down if `finished`.
    pub(super) async fn write(
        &self,
        stream: &mut (impl AsyncWrite + Unpin),
        bytes: &[u8],
        finished: bool,
        bound: Option<Duration>,
    ) -> Result<(), SessionError> {
        let step = wait_step(bound.unwrap_or(PEER_TIMEOUT));
        let write = async {
            for piece in bytes.chunks(MAX_WRITE) {
                stream.write_all(piece).await?;
                self.sent.fetch_add(piece.len() as u64, Relaxed);
            }
            stream.flush().await?;
            if finished { stream.shutdown().await } else { Ok(()) }
        };
        tokio::pin!(write);
        let mut waited = Duration::ZERO;
        loop {
            match tokio::time::timeout(step, &mut write).await {
                Ok(written) => return Ok(written?),
                Err(_) if bound.is_some_and(|bound| waited >= bound) => {
                    return Err(SessionError::Silent(waited.as_secs()));
                }
                Err(_) => waited += step,
            }
        }
    }
}

/// The events that come out of a stream.
#[derive(Debug)]
pub struct EventReader<R> {
    stream: R,
    /// The sender of the same session, if there is one.
    link: Option<Arc<FrameSender>>,
    decoder: Decoder,
    /// Whether the decoder may have events left: the next call then reads nothing from the stream.
    more: bool,
}

impl<R: AsyncRead + Unpin> EventReader<R> {
    /// Read from `stream`, refusing messages over `max_message` bytes.
    pub fn new(stream: R, max_message: usize) -> Self {
        Self { stream, link: None, decoder: Decoder::new(max_message), more: false }
    }

    /// As [`EventReader::new`], for the session in which `link` is the sender.
    pub fn of_session(stream: R, max_message: usize, link: Arc<FrameSender>) -> Self {
        Self { link: Some(link), ..Self::new(stream, max_message) }
    }

    /// Refuse messages over `max_message` bytes from now on.
    pub fn set_max_message(&mut self, max_message: usize) {
        self.decoder.set_max_message(max_message);
    }

    /// Wait for bytes and append the events that they complete (perhaps none) to `events`: at most [`EVENTS_PER_READ`],
    /// the next call returns the others. All messages are admitted.
    ///
    /// # Errors
    /// [`SessionError::Ended`] at the end of the stream, [`SessionError::Frame`] if it is not our protocol.
    /// Cancel-safe: no byte is lost if the future is dropped.
    pub async fn read(&mut self, events: &mut Vec<Event>) -> Result<(), SessionError> {
        self.fill(events, EVENTS_PER_READ, |_| Ok(true)).await
    }

    /// As [`EventReader::read`]; of messages of several chunks only those are stored that `admit` wants, see [`Offer`].
    ///
    /// # Errors
    /// As [`EventReader::read`], and what `admit` returns.
    pub async fn read_admitted(
        &mut self,
        events: &mut Vec<Event>,
        admit: impl FnMut(&Offer) -> Result<bool, FrameError> + Send,
    ) -> Result<(), SessionError> {
        self.fill(events, EVENTS_PER_READ, admit).await
    }

    async fn fill(
        &mut self,
        events: &mut Vec<Event>,
        most: usize,
        mut admit: impl FnMut(&Offer) -> Result<bool, FrameError> + Send,
    ) -> Result<(), SessionError> {
        if !self.more {
            let buffer = self.decoder.buffer();
            buffer.reserve(FULL_BLOCK);
            let read = self.stream.read_buf(buffer).await?;
            if read == 0 {
                return Err(SessionError::Ended(self.decoder.noise()));
            }
            if let Some(link) = &self.link {
                link.received.fetch_add(read as u64, Relaxed);
            }
        }
        self.more = true;
        let (mut count, mut bytes) = (0, 0);
        while count < most && bytes < BYTES_PER_READ {
            let Some(event) = self.decoder.next_admitted(&mut admit)? else {
                self.more = false;
                break;
            };
            count += 1;
            bytes += event.size();
            events.push(event);
        }
        Ok(())
    }

    /// Return the bytes of results that arrived, also of unfinished ones: see [`Decoder::results`].
    pub fn results(&self) -> u64 {
        self.decoder.results()
    }

    /// Wait for the far end's hello, which comes first. Frames that arrived with it are not decoded yet.
    ///
    /// # Errors
    /// As [`EventReader::read`]; [`SessionError::Goodbye`] if the far end refuses.
    pub async fn greeting(&mut self, rest: &mut Vec<Event>) -> Result<Bytes, SessionError> {
        while rest.is_empty() {
            self.fill(rest, 1, |_| Err(FrameError::BadSequence("a message before the hello"))).await?;
        }
        match rest.remove(0) {
            Event::Control(Control::Hello(body)) => Ok(body),
            Event::Control(Control::Goodbye(why)) => Err(SessionError::Goodbye(text::lines(why, text::LIMIT))),
            Event::Control(other) => {
                Err(SessionError::BadHello(text::line(format!("it began with {other:?}"), MAX_SENTENCE)))
            }
            _ => Err(SessionError::BadHello("it began with a message".to_owned())),
        }
    }
}
