//! The events that come out of a byte stream, and what its sender is told of their arrival.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::error::{FrameError, SessionError};
use crate::text;
use crate::wire::control::Control;
use crate::wire::decoder::{Decoder, Event, Offer};
use crate::wire::hello::{Attach, MAX_SENTENCE, read_hello};
use crate::wire::outbox::FULL_BLOCK;
use crate::wire::stream::FrameSender;

/// Events that are returned before more are decoded, and the bytes of them.
const EVENTS_PER_READ: usize = 1024;
const BYTES_PER_READ: usize = 1024 * 1024;
/// Bytes of bulk that arrive before their sender is told so at once.
const REPORT_BYTES: u64 = 256 * 1024;
/// How soon the sender of bulk is told of fewer bytes, and how often at most.
const REPORT_INTERVAL: Duration = Duration::from_millis(1);
/// Bytes of a resumable stream that arrive before their sender is told that it need not keep them. Fewer are told with the next
/// heartbeat.
const REACHED_BYTES: u64 = 128 * 1024;

/// The events that come out of a stream.
#[derive(Debug)]
pub struct EventReader<R> {
    /// `None` while the connection is broken: nothing comes then.
    stream: Option<R>,
    /// The sender of the same session, if there is one.
    link: Option<Arc<FrameSender>>,
    decoder: Decoder,
    /// Whether the decoder may have events left: the next call then reads nothing from the stream.
    more: bool,
    reports: Reports,
    reached: Option<Reached>,
}

/// How far a resumable stream has arrived. Set by [`EventReader::begin_stream`].
#[derive(Debug)]
struct Reached {
    /// Bytes of the stream that have arrived.
    bytes: u64,
    /// Those that the sender was told of.
    told: u64,
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
        let decoder = Decoder::new(max_message);
        Self { stream: Some(stream), link: None, decoder, more: false, reports, reached: None }
    }

    /// As [`EventReader::new`], for a session in which `link` is the sender: each end reports to the other the bulk that
    /// arrives, and no more of it is under way than this stream delivers.
    pub fn of_session(stream: R, max_message: usize, link: Arc<FrameSender>) -> Self {
        link.bound_bulk();
        Self { link: Some(link), ..Self::new(stream, max_message) }
    }

    /// Begin to number the stream's bytes, now that the greeting is over: see [`FrameSender::begin_stream`].
    ///
    /// # Errors
    /// [`FrameError::BadSequence`] if the far end put the greeting and other frames into one block.
    pub fn begin_stream(&mut self) -> Result<(), FrameError> {
        let bytes =
            self.decoder.undecoded().ok_or(FrameError::BadSequence("a hello that is not a block of its own"))?;
        self.reached = Some(Reached { bytes: bytes as u64, told: 0 });
        Ok(())
    }

    /// Return how many bytes of the stream have arrived; 0 before [`EventReader::begin_stream`].
    pub fn reached(&self) -> u64 {
        self.reached.as_ref().map_or(0, |reached| reached.bytes)
    }

    /// Close the connection. From now on nothing comes until [`EventReader::resume`].
    pub fn disconnect(&mut self) {
        self.stream = None;
    }

    /// Go on with a new connection, on which `rest` was read behind the handshake.
    pub fn resume(&mut self, stream: R, rest: &[u8]) {
        self.stream = Some(stream);
        self.decoder.buffer().extend_from_slice(rest);
        self.more |= !rest.is_empty();
        if let Some(reached) = &mut self.reached {
            reached.told = reached.bytes;
            reached.bytes += rest.len() as u64;
        }
        if let Some(link) = &self.link {
            // The reader of a stripe that was cut may have counted bytes that it did not report any more.
            link.send(|o| o.received(link.arrived.load(Relaxed)));
        }
    }

    /// Return the stream, and what was read from it behind the first frame.
    ///
    /// # Errors
    /// As [`EventReader::begin_stream`].
    pub fn into_parts(mut self) -> Result<(Option<R>, BytesMut), FrameError> {
        self.begin_stream()?;
        Ok((self.stream, std::mem::take(self.decoder.buffer())))
    }

    /// Tell the sender how far its stream has arrived, if it was not told.
    pub fn tell_reached(&mut self) {
        self.tell(1);
    }

    /// As [`EventReader::tell_reached`], if it is so many bytes.
    fn tell(&mut self, at_least: u64) {
        if let (Some(Reached { bytes, told }), Some(link)) = (&mut self.reached, &self.link)
            && *bytes - *told >= at_least
        {
            *told = *bytes;
            link.send(|o| o.reached(*bytes));
        }
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
            if let (Event::Control(control), Some(link)) = (&event, &self.link)
                && link.on_report(control)?
            {
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
        let Some(stream) = &mut self.stream else { return std::future::pending().await };
        let Some(link) = &self.link else { return Ok(stream.read_buf(buffer).await?) };
        let read = loop {
            let Some(due) = self.reports.due else { break stream.read_buf(self.decoder.buffer()).await? };
            match tokio::time::timeout_at(due, stream.read_buf(self.decoder.buffer())).await {
                Ok(read) => break read?,
                Err(_) => self.reports.tell(self.decoder.bulk(), true, link),
            }
        };
        link.received.fetch_add(read as u64, Relaxed);
        if let Some(reached) = &mut self.reached {
            reached.bytes += read as u64;
        }
        self.tell(REACHED_BYTES);
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
        match self.first(rest).await? {
            Control::Hello(body) => Ok(body),
            other => Err(SessionError::BadHello(text::line(format!("it began with {other:?}"), MAX_SENTENCE))),
        }
    }

    /// As [`EventReader::greeting`], for the answer of an agent that there was a session with.
    ///
    /// # Errors
    /// As [`EventReader::greeting`].
    pub async fn attached(&mut self) -> Result<Attach, SessionError> {
        match self.first(&mut Vec::new()).await? {
            Control::Attach(body) => read_hello(&body),
            other => Err(SessionError::BadHello(text::line(format!("it began with {other:?}"), MAX_SENTENCE))),
        }
    }

    /// Wait for the first frame, which is a control frame.
    async fn first(&mut self, rest: &mut Vec<Event>) -> Result<Control, SessionError> {
        while rest.is_empty() {
            self.fill(rest, 1, |_| Err(FrameError::BadSequence("a message before the hello"))).await?;
        }
        match rest.remove(0) {
            Event::Control(Control::Goodbye(why)) => Err(SessionError::Goodbye(text::lines(why, text::LIMIT))),
            Event::Control(control) => Ok(control),
            _ => Err(SessionError::BadHello("it began with a message".to_owned())),
        }
    }
}
