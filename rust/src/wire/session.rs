//! A session between two ends: who they are, what they still have to say, and when the other one is gone.
//!
//! [`Outbox`] decides the order of what is sent: control frames first, then small messages, then one chunk of each
//! large one in turn, so here no small task waits behind a large one and no heartbeat behind either. (What the SSH
//! channel's window has taken already is ahead of both.)
//! [`FrameSender`] shares an outbox between the threads that fill it and the one loop that empties it into a stream;
//! [`EventReader`] reads events. Any `AsyncRead`/`AsyncWrite` will do: an SSH channel, a Unix socket, a pipe.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

use crate::error::{FrameError, SessionError};
use crate::text;
pub use crate::timing::{CREDIT, HEARTBEAT, LEAST_MESSAGE, MAX_ANSWERS, MAX_MESSAGE, NOTE_CREDIT, PEER_TIMEOUT};
use crate::wire::flood::{Flood, Piece};
use crate::wire::{
    Attempt, Body, CHUNK, Control, Decoder, Event, MAX_OPEN, Message, Offer, Outgoing, Packer, put_preamble,
};

/// How finely waiting is counted.
pub(crate) const SLICE: Duration = Duration::from_secs(1);
/// Events that are handed on before more are decoded, and the bytes of them.
const BATCH: usize = 1024;
const BATCH_BYTES: usize = 1024 * 1024;
/// Raw bytes after which a block is sent.
const BLOCK: usize = 64 * 1024;
/// Payload up to which a message is small: it goes ahead of chunks of large ones.
const SMALL: usize = 16 * 1024;
/// Large messages that are sent in turns; others wait until one of them has been sent. The receiver refuses more than
/// [`MAX_OPEN`] at once.
const TURNS: usize = MAX_OPEN / 4;
/// Bytes in one write to a stream. Larger writes to a russh channel can straddle a rekey (russh #761).
pub(crate) const WRITE: usize = 32 * 1024;
/// Acknowledgements in one frame, so that it fits a block.
const ACKS: usize = 4096;
/// Bytes of a sentence that a node says, and how many of them are shown.
const SENTENCE: usize = 500;
const SENTENCES: usize = 100;
/// Bytes of output in one frame, and in one block.
pub const LINES: usize = 16 * 1024;
/// The stream of an output frame whose text is a number: so many bytes of output are left out here.
pub const LEFT_OUT: u64 = 0;

/// The client's hello to an agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClientHello {
    /// The version of our package at the client.
    pub version: String,
    /// Names the pool; the same over reconnections.
    pub run: String,
    /// What the client calls this node.
    pub node: String,
    /// The client's Python, "3.11": the node's must be the same.
    pub python: String,
    pub lease_ms: u64,
    /// Distributions that the node should have as the client has them: name → version.
    #[serde(default)]
    pub packages: BTreeMap<String, String>,
    /// Whether a node that has not is refused.
    #[serde(default)]
    pub strict: bool,
    pub worker: WorkerSpec,
}

/// How an agent runs its workers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WorkerSpec {
    /// Tasks at once on the node; `None`: one per core.
    pub concurrency: Option<usize>,
    /// One process of `concurrency` threads, or `concurrency` processes.
    pub processes: bool,
    /// Set in the workers' environment before they start.
    pub env: BTreeMap<String, String>,
    /// The client's import path, for nodes that share its file system.
    pub sys_path: Vec<String>,
    /// Whether the node sees the client's files and processes under the same names.
    #[serde(default)]
    pub shares_files: bool,
    /// Modules that a worker imports before it takes tasks.
    pub preload: Vec<String>,
    /// Cap of one message, in bytes.
    pub max_payload: usize,
    /// How long one task may run, in milliseconds.
    pub task_timeout_ms: Option<u64>,
    /// What the plugins do in a worker; only its Python part can read it. Empty: nothing.
    pub setup: String,
    /// Whether workers are to be asked to end, so that the setup can be undone, before they are killed.
    pub unwind: bool,
}

/// An agent's answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AgentHello {
    pub version: String,
    pub python: String,
    /// Names this life of the agent: attempts of another epoch mean nothing to it.
    pub epoch: String,
    pub cores: usize,
    pub pid: u32,
    /// What the client has and this node has not, or in another version; a sentence each.
    #[serde(deserialize_with = "read_sentences")]
    pub differences: Vec<String>,
}

/// What an agent tells a worker that it starts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WorkerHello {
    pub node: String,
    /// Threads that take tasks.
    pub slots: usize,
    pub lease_ms: u64,
    pub work: WorkerSpec,
}

/// Read what a node says in sentences, as it may be shown.
fn read_sentences<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let said: Vec<String> = Vec::deserialize(from)?;
    let more = said.len().saturating_sub(SENTENCES);
    let mut shown: Vec<String> = said.iter().take(SENTENCES).map(|one| text::line(one, SENTENCE)).collect();
    if more > 0 {
        shown.push(format!("and {more} more"));
    }
    Ok(shown)
}

/// Write a hello as a control frame.
///
/// # Errors
/// [`SessionError::BadHello`] if it cannot be written as JSON.
pub fn hello<T: Serialize>(value: &T) -> Result<Control, SessionError> {
    let json = serde_json::to_vec(value).map_err(|e| SessionError::BadHello(e.to_string()))?;
    Ok(Control::Hello(Bytes::from(json)))
}

/// Read the body of a hello.
///
/// # Errors
/// [`SessionError::BadHello`] if a field is missing or of another type.
pub fn read_hello<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, SessionError> {
    serde_json::from_slice(body).map_err(|e| SessionError::BadHello(text::line(e.to_string(), SENTENCE)))
}

/// What one end has yet to send.
#[derive(Debug)]
pub struct Outbox {
    preamble: bool,
    control: VecDeque<Control>,
    acks: Vec<Attempt>,
    output: Flood<u64>,
    small: VecDeque<Outgoing>,
    /// Of these a chunk each in turn.
    large: VecDeque<Outgoing>,
    /// Large ones whose turns have not come.
    later: VecDeque<Outgoing>,
    bytes: usize,
    /// Memory of the answers that wait in `control` and `acks`.
    answers: usize,
    /// The peer asks and does not read: all that waited was dropped, and nothing more is sent.
    given_up: bool,
    closed: bool,
    raw: Vec<u8>,
    packer: Packer,
}

/// Memory that a control frame takes, in bytes, if it answers the peer. What this end sends by itself has a bound of its
/// own: tasks are aborted or cancelled by their caller.
fn answer_cost(control: &Control) -> usize {
    let body = match control {
        Control::NoteAnswer { error, .. } => error.len(),
        Control::Pulse { .. } | Control::Recall(_) | Control::GivenBack(_) | Control::RecallRefused(_) => 0,
        _ => return 0,
    };
    size_of::<Control>() + body
}

impl Default for Outbox {
    fn default() -> Self {
        Self {
            preamble: true,
            control: VecDeque::new(),
            acks: Vec::new(),
            output: Flood::default(),
            small: VecDeque::new(),
            large: VecDeque::new(),
            later: VecDeque::new(),
            bytes: 0,
            answers: 0,
            given_up: false,
            closed: false,
            raw: Vec::new(),
            packer: Packer::default(),
        }
    }
}

impl Outbox {
    /// Send a control frame ahead of all messages.
    pub fn control(&mut self, control: Control) {
        if !self.closed && !self.given_up {
            self.answers += answer_cost(&control);
            self.control.push_back(control);
            self.give_up_deaf();
        }
    }

    /// Drop everything if more answers wait than those of a peer that reads. [`Outbox::fill`] returns the error.
    fn give_up_deaf(&mut self) {
        if self.answers > MAX_ANSWERS {
            *self = Self { given_up: true, ..Self::default() };
        }
    }

    /// Acknowledge results. Many become one frame.
    pub fn acknowledge(&mut self, ids: impl IntoIterator<Item = Attempt>) {
        if !self.closed && !self.given_up {
            let before = self.acks.len();
            self.acks.extend(ids);
            self.answers += (self.acks.len() - before) * size_of::<Attempt>();
            self.give_up_deaf();
        }
    }

    /// Send what tasks wrote to a stream, at most [`LINES`] bytes. If too much waits, some of it is left out.
    pub fn output(&mut self, stream: u64, text: Bytes) {
        if !self.closed && !self.given_up {
            self.output.push(Piece { from: stream, text, left_out: 0 });
        }
    }

    fn next_output(&mut self) -> Option<Control> {
        let piece = self.output.pop()?;
        Some(if piece.left_out == 0 {
            Control::Output { stream: piece.from, text: piece.text }
        } else {
            Control::Output { stream: LEFT_OUT, text: Bytes::from(piece.left_out.to_string()) }
        })
    }

    /// Send a task, a result or a note.
    pub fn message(&mut self, body: Body, message: Message) {
        if self.closed || self.given_up {
            return;
        }
        let size = message.size();
        self.bytes += size;
        let queue = match size {
            ..=SMALL => &mut self.small,
            _ if self.large.len() < TURNS => &mut self.large,
            _ => &mut self.later,
        };
        queue.push_back(Outgoing::new(body, message));
    }

    /// Say goodbye, and nothing after it. Messages that were not sent yet are dropped; output is not.
    pub fn close(&mut self, why: &str) {
        if !self.closed {
            self.small.clear();
            self.large.clear();
            self.later.clear();
            self.bytes = 0;
            while let Some(output) = self.next_output() {
                self.control.push_back(output);
            }
            self.control.push_back(Control::Goodbye(Bytes::copy_from_slice(why.as_bytes())));
            self.closed = true;
        }
    }

    /// Bytes of payload that are still to be sent.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.control.is_empty()
            && self.acks.is_empty()
            && self.output.is_empty()
            && self.small.is_empty()
            && self.large.is_empty()
    }

    /// Append the next block to `out`; false when there was nothing to send.
    ///
    /// # Errors
    /// [`SessionError::Frame`] if a control frame is over its cap, [`SessionError::Deaf`] if answers over [`MAX_ANSWERS`]
    /// waited.
    pub fn fill(&mut self, out: &mut Vec<u8>) -> Result<bool, SessionError> {
        if self.given_up {
            return Err(SessionError::Deaf(MAX_ANSWERS));
        }
        if self.preamble {
            self.preamble = false;
            put_preamble(out);
        }
        self.raw.clear();
        while let Some(control) = if self.raw.len() < BLOCK { self.control.pop_front() } else { None } {
            self.answers -= answer_cost(&control);
            control.put(&mut self.raw)?;
        }
        if !self.acks.is_empty() && self.raw.len() < BLOCK {
            let some: Vec<_> = self.acks.drain(..self.acks.len().min(ACKS)).collect();
            self.answers -= some.len() * size_of::<Attempt>();
            Control::Acknowledge(some).put(&mut self.raw)?;
        }
        if self.raw.len() < BLOCK
            && let Some(output) = self.next_output()
        {
            output.put(&mut self.raw)?;
        }
        // One chunk of a large message's turn comes with every block, however many small ones there are.
        let room = if self.large.is_empty() { BLOCK } else { BLOCK - CHUNK };
        while let Some(mut small) = if self.raw.len() < room { self.small.pop_front() } else { None } {
            self.bytes -= small.left;
            small.put_chunk(&mut self.raw);
        }
        while let Some(mut large) = if self.raw.len() < BLOCK { self.large.pop_front() } else { None } {
            let before = large.left;
            let last = large.put_chunk(&mut self.raw);
            self.bytes -= before - large.left;
            self.large.extend(if last { self.later.pop_front() } else { Some(large) });
        }
        if self.raw.is_empty() {
            return Ok(!out.is_empty());
        }
        self.packer.pack(&self.raw, out);
        Ok(true)
    }
}

/// Locks even if a thread panicked while it held the lock: our state is valid between any two statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An outbox shared with the loop that sends it.
#[derive(Debug, Default)]
pub struct FrameSender {
    outbox: Mutex<Outbox>,
    wake: Notify,
}

impl FrameSender {
    /// Add to what is sent, and wake the sender.
    pub fn send(&self, add: impl FnOnce(&mut Outbox)) {
        add(&mut lock(&self.outbox));
        self.wake.notify_one();
    }

    /// Add to what is sent, with whatever wakes the sender next: [`FrameSender::flush`] must follow soon.
    pub fn stage(&self, add: impl FnOnce(&mut Outbox)) {
        add(&mut lock(&self.outbox));
    }

    /// Whether messages wait to be sent.
    pub fn is_busy(&self) -> bool {
        lock(&self.outbox).bytes() > 0
    }

    /// Wake the sender.
    pub fn flush(&self) {
        self.wake.notify_one();
    }

    /// Empty the outbox into `stream` until it is closed, then shut the stream's sending side down.
    ///
    /// # Errors
    /// [`SessionError::Io`] when the stream fails, [`SessionError::Silent`] when it takes nothing for `bound`.
    pub async fn run(&self, mut stream: impl AsyncWrite + Unpin, bound: Option<Duration>) -> Result<(), SessionError> {
        let mut out = Vec::with_capacity(2 * BLOCK);
        loop {
            out.clear();
            let (any, closed) = {
                let mut outbox = lock(&self.outbox);
                (outbox.fill(&mut out)?, outbox.closed && outbox.is_empty())
            };
            let write = async {
                for chunk in out.chunks(WRITE) {
                    stream.write_all(chunk).await?;
                }
                stream.flush().await?;
                if closed { stream.shutdown().await } else { Ok(()) }
            };
            tokio::pin!(write);
            let mut waited = Duration::ZERO;
            loop {
                // In slices: if this process was stopped itself, that counts as one of them.
                match tokio::time::timeout(SLICE, &mut write).await {
                    Ok(written) => break written?,
                    Err(_) if bound.is_some_and(|bound| waited >= bound) => {
                        return Err(SessionError::Silent(waited.as_secs()));
                    }
                    Err(_) => waited += SLICE,
                }
            }
            if closed {
                return Ok(());
            }
            if !any {
                self.wake.notified().await;
            }
        }
    }
}

/// The events that come out of a stream.
#[derive(Debug)]
pub struct EventReader<R> {
    stream: R,
    decoder: Decoder,
    /// What was read is perhaps not all decoded.
    more: bool,
}

impl<R: AsyncRead + Unpin> EventReader<R> {
    /// Read from `stream`, refusing messages over `max_message` bytes.
    pub fn new(stream: R, max_message: usize) -> Self {
        Self { stream, decoder: Decoder::new(max_message), more: false }
    }

    /// Refuse messages over `max_message` bytes from now on.
    pub fn set_max_message(&mut self, max_message: usize) {
        self.decoder.set_max_message(max_message);
    }

    /// Wait for bytes and append the events that they complete (perhaps none) to `events`: at most a batch, the next call
    /// returns the others. All messages are admitted.
    ///
    /// # Errors
    /// [`SessionError::Ended`] at the end of the stream, [`SessionError::Frame`] if it is not our protocol.
    /// Cancel-safe: no byte is lost if the future is dropped.
    pub async fn read(&mut self, events: &mut Vec<Event>) -> Result<(), SessionError> {
        self.fill(events, BATCH, |_| Ok(true)).await
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
        self.fill(events, BATCH, admit).await
    }

    async fn fill(
        &mut self,
        events: &mut Vec<Event>,
        most: usize,
        mut admit: impl FnMut(&Offer) -> Result<bool, FrameError> + Send,
    ) -> Result<(), SessionError> {
        if !self.more {
            let buffer = self.decoder.buffer();
            buffer.reserve(BLOCK);
            if self.stream.read_buf(buffer).await? == 0 {
                return Err(SessionError::Ended(self.decoder.noise()));
            }
        }
        self.more = true;
        let (mut count, mut bytes) = (0, 0);
        while count < most && bytes < BATCH_BYTES {
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

    /// Bytes of results that came, unfinished ones too.
    pub fn results(&self) -> u64 {
        self.decoder.results()
    }

    /// Wait for the far end's hello, which comes first. Of what was sent with it nothing is decoded yet.
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
                Err(SessionError::BadHello(text::line(format!("it began with {other:?}"), SENTENCE)))
            }
            _ => Err(SessionError::BadHello("it began with a message".to_owned())),
        }
    }
}
