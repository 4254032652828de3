//! An outbox and a decoder on a byte stream: the only file of the wire that touches one.
//!
//! [`FrameSender`] shares an outbox between the threads that fill it and the one loop that empties it into a stream;
//! [`EventReader`] reads events. Any `AsyncRead`/`AsyncWrite` will do: an SSH channel, a Unix socket, a pipe.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

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
use crate::wire::pace::{Allowance, Pace};

/// Events that are returned before more are decoded, and the bytes of them.
const EVENTS_PER_READ: usize = 1024;
const BYTES_PER_READ: usize = 1024 * 1024;
/// Bytes in one write to a stream. Larger writes to a russh channel can straddle a rekey (russh #761).
pub(crate) const MAX_WRITE: usize = 32 * 1024;
/// Bytes of bulk that arrive before their sender is told so at once.
const REPORT_BYTES: u64 = 256 * 1024;
/// How soon the sender of bulk is told of fewer bytes, and how often at most.
const REPORT_INTERVAL: Duration = Duration::from_millis(1);

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
    /// Bytes that the reader of the same session read from the stream: see [`EventReader::of_session`].
    received: AtomicU64,
    /// Bytes of bulk that the readers of the same session read.
    arrived: AtomicU64,
}

/// What is to be sent, and how much of it may be under way.
#[derive(Debug, Default)]
pub(super) struct Sending {
    pub outbox: Outbox,
    /// Set by the reader of the same session, which hears what the receiver reports. Without it nothing bounds the bulk.
    pub pace: Option<Pace>,
}

/// What [`Sending::fill`] found.
struct Filled {
    /// There was something to send.
    any: bool,
    /// Bulk waits until more of it has arrived. Other frames pass it.
    held: bool,
    /// Bytes of bulk that have arrived, as the receiver reports.
    reported: u64,
    /// The goodbye is sent.
    finished: bool,
}

impl Sending {
    /// Append the next block to `out`.
    fn fill(&mut self, out: &mut Vec<u8>) -> Result<Filled, SessionError> {
        let mut bulk = self.allowance();
        let any = self.outbox.fill_within(out, &mut bulk)?;
        let more = self.note_sent(bulk);
        let reported = self.pace.as_ref().map_or(0, Pace::reported);
        let held = more && self.pace.as_ref().is_some_and(|pace| pace.room() == 0);
        Ok(Filled { any, held, reported, finished: self.outbox.is_finished() })
    }

    /// Return how much bulk may be put into a block.
    pub fn allowance(&self) -> Allowance {
        let room = self.pace.as_ref().map_or(u64::MAX, Pace::room);
        Allowance { room, ..Allowance::unlimited() }
    }

    /// Note the bulk that a block has. Return whether there is more to send.
    pub fn note_sent(&mut self, bulk: Allowance) -> bool {
        let more = self.outbox.has_bulk();
        if let Some(pace) = &mut self.pace
            && (bulk.taken > 0 || more)
        {
            pace.on_sent(bulk.taken, more, Instant::now());
        }
        more
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

/// The events that come out of a stream.
#[derive(Debug)]
pub struct EventReader<R> {
    stream: R,
    /// The sender of the same session, if there is one.
    link: Option<Arc<FrameSender>>,
    decoder: Decoder,
    /// Whether the decoder may have events left: the next call then reads nothing from the stream.
    more: bool,
    reports: Reports,
}

/// What the sender of bulk is told of its arrival. Used only in a session.
#[derive(Debug)]
struct Reports {
    /// Bytes of bulk that this reader has read and counted in [`FrameSender::arrived`], those of them that were reported, and
    /// when they were.
    counted: u64,
    told: u64,
    told_at: tokio::time::Instant,
    /// More has arrived, and is to be reported at that time if nothing else arrives before.
    due: Option<tokio::time::Instant>,
}

impl Reports {
    /// Note that this reader has read so many bytes of bulk so far. Tell the sender how many have arrived on all streams of the
    /// session, if that is worth a frame, or it is `due`.
    fn tell(&mut self, bulk: u64, is_due: bool, link: &FrameSender) {
        link.arrived.fetch_add(bulk - self.counted, Relaxed);
        self.counted = bulk;
        let new = bulk - self.told;
        if new == 0 {
            return;
        }
        let now = tokio::time::Instant::now();
        if is_due || new >= REPORT_BYTES || now >= self.told_at + REPORT_INTERVAL {
            (self.told, self.told_at, self.due) = (bulk, now, None);
            link.send(|o| o.received(link.arrived.load(Relaxed)));
        } else {
            self.due = Some(self.told_at + REPORT_INTERVAL);
        }
    }
}

impl<R: AsyncRead + Unpin> EventReader<R> {
    /// Read from `stream`, refusing messages over `max_message` bytes.
    pub fn new(stream: R, max_message: usize) -> Self {
        let reports = Reports { counted: 0, told: 0, told_at: tokio::time::Instant::now(), due: None };
        Self { stream, link: None, decoder: Decoder::new(max_message), more: false, reports }
    }

    /// As [`EventReader::new`], for a session in which `link` is the sender: each end reports to the other the bulk that
    /// arrives, and no more of it is under way than this stream delivers.
    pub fn of_session(stream: R, max_message: usize, link: Arc<FrameSender>) -> Self {
        lock(&link.sending).pace.get_or_insert_with(|| Pace::new(Instant::now()));
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
        if !self.more && self.read_some().await? == 0 {
            return Err(SessionError::Ended(self.decoder.noise()));
        }
        self.more = true;
        let (mut count, mut bytes) = (0, 0);
        while count < most && bytes < BYTES_PER_READ {
            let Some(event) = self.decoder.next_admitted(&mut admit)? else {
                self.more = false;
                break;
            };
            if let (Event::Control(Control::Received { bytes }), Some(link)) = (&event, &self.link) {
                link.reported(*bytes);
                continue;
            }
            count += 1;
            bytes += event.size();
            events.push(event);
        }
        if let Some(link) = &self.link {
            self.reports.tell(self.decoder.bulk(), false, link);
        }
        Ok(())
    }

    /// Wait for bytes, and give them to the decoder. Return how many there were; 0 at the end of the stream.
    async fn read_some(&mut self) -> Result<usize, SessionError> {
        let buffer = self.decoder.buffer();
        buffer.reserve(FULL_BLOCK);
        let Some(link) = &self.link else { return Ok(self.stream.read_buf(buffer).await?) };
        let read = loop {
            let Some(due) = self.reports.due else { break self.stream.read_buf(self.decoder.buffer()).await? };
            match tokio::time::timeout_at(due, self.stream.read_buf(self.decoder.buffer())).await {
                Ok(read) => break read?,
                Err(_) => self.reports.tell(self.decoder.bulk(), true, link),
            }
        };
        link.received.fetch_add(read as u64, Relaxed);
        Ok(read)
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
