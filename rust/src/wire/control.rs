//! The frames that are no part of a message: what each means, how it is written, and how it is read.
//!
//! [`control_frames!`] has one entry per frame. A new frame is a new entry, and what its receiver does with it.

use bytes::{Buf, Bytes};

use crate::error::FrameError;
use crate::wire::header::{Attempt, Header, MAX_BODY};

/// Cap of the reason in [`Control::Drain`], in bytes.
pub const MAX_REASON: usize = 1024;
/// Bytes of an attempt in an acknowledgement.
const ATTEMPT_BYTES: usize = 10;

/// Define [`Control`], its writer and its reader. An entry is: the frame's documentation, its kind (a number that names
/// it on the wire and is never given to another), its variant, then how [`Writer`] writes it and how [`Frame`] is read.
macro_rules! control_frames {
    ($(
        $(#[$doc:meta])*
        $kind:literal => $name:ident $fields:tt:
            write |$pattern:pat, $to:ident| $write:expr;
            read |$frame:ident| $read:expr;
    )*) => {
        /// A frame that is no part of a message.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum Control {
            $($(#[$doc])* $name $fields,)*
        }

        impl Control {
            /// Append this frame to a block's raw bytes. Long acknowledgements become several frames.
            ///
            /// # Errors
            /// [`FrameError::TooLong`] for a text over [`MAX_BODY`], or a reason over [`MAX_REASON`].
            pub fn put(&self, out: &mut Vec<u8>) -> Result<(), FrameError> {
                match self {
                    $($pattern => {
                        let mut $to = Writer { kind: $kind, out };
                        $write
                    })*
                }
            }

            /// Read a frame that has arrived in full.
            #[inline]
            pub(super) fn read(header: Header, body: Bytes) -> Result<Self, FrameError> {
                match header.kind {
                    $($kind => {
                        let $frame = Frame { id: header.id, body };
                        Ok($read)
                    })*
                    other => Err(FrameError::UnknownKind(other)),
                }
            }
        }
    };
}

control_frames! {
    /// Who the sender is and what it wants, in JSON (see `hello.rs`). The first frame of each direction.
    1 => Hello(Bytes):
        write |Self::Hello(json), to| to.text(0, json);
        read |frame| Self::Hello(frame.body);

    /// From an agent: the node has its workers and takes tasks. From a worker: the worker takes tasks.
    2 => Ready { slots: u64 }:
        write |Self::Ready { slots }, to| to.number(*slots);
        read |frame| Self::Ready { slots: frame.number()? };

    /// The sender lives. From a client to its agent: the agent may go on working for `lease_ms` milliseconds from the time on
    /// at which it sent its own heartbeat `echo`, the last one that the client has heard; 0 if the client has heard none. From
    /// an agent to a worker: the worker may go on for `lease_ms` milliseconds from now on; `echo` is 0. From an agent to its
    /// client: `nonce` is the agent's time in microseconds, more than 0; the others are 0.
    3 => Heartbeat { nonce: u64, lease_ms: u64, echo: u64 }:
        write |Self::Heartbeat { nonce, lease_ms, echo }, to| to.two(*nonce, *lease_ms, *echo);
        read |frame| {
            let (lease_ms, echo) = frame.two("heartbeat")?;
            Self::Heartbeat { nonce: frame.id.task, lease_ms, echo }
        };

    /// The answer to the heartbeat of the same nonce.
    4 => Pulse { nonce: u64 }:
        write |Self::Pulse { nonce }, to| to.number(*nonce);
        read |frame| Self::Pulse { nonce: frame.number()? };

    /// The sender ends this session on purpose; why, in UTF-8. A stream that ends without it is a lost connection.
    5 => Goodbye(Bytes):
        write |Self::Goodbye(why), to| to.text(0, why);
        read |frame| Self::Goodbye(frame.body);

    /// The client has these results: the agent forgets them, and their bytes are credit again.
    6 => Acknowledge(Vec<Attempt>):
        write |Self::Acknowledge(ids), to| to.attempts(ids);
        read |frame| Self::Acknowledge(frame.attempts("acknowledgement")?);

    /// Drop this task if it has not started. Answered with its result, or with `RecallRefused` if it is running.
    7 => Cancel(Attempt):
        write |Self::Cancel(id), to| to.attempt(*id);
        read |frame| Self::Cancel(frame.attempt()?);

    /// Give this task back if it has not started. Answered with `GivenBack`, `RecallRefused` or its result.
    8 => Recall(Attempt):
        write |Self::Recall(id), to| to.attempt(*id);
        read |frame| Self::Recall(frame.attempt()?);

    /// The recalled task is given back unstarted.
    9 => GivenBack(Attempt):
        write |Self::GivenBack(id), to| to.attempt(*id);
        read |frame| Self::GivenBack(frame.attempt()?);

    /// The recalled or cancelled task is not given back: it has started, or is not here.
    10 => RecallRefused(Attempt):
        write |Self::RecallRefused(id), to| to.attempt(*id);
        read |frame| Self::RecallRefused(frame.attempt()?);

    // 11 and 12 are tasks and results: see `message.rs`.

    /// Drop this task, and end it if it is running: nobody wants its result any more.
    13 => Abort(Attempt):
        write |Self::Abort(id), to| to.attempt(*id);
        read |frame| Self::Abort(frame.attempt()?);

    /// What tasks wrote to a stream. The stream's number is made by `node/stdio.rs`; 0 is [`super::LEFT_OUT`].
    14 => Output { stream: u64, text: Bytes }:
        write |Self::Output { stream, text }, to| to.text(*stream, text);
        read |frame| Self::Output { stream: frame.id.task, text: frame.copied() };

    /// This node will soon be gone; why, in UTF-8. It takes no more tasks, and gives back those that it has not
    /// started.
    15 => Drain(Bytes):
        write |Self::Drain(why), to| {
            not_over("reason", why.len(), MAX_REASON)?;
            to.text(0, why)
        };
        read |frame| {
            not_over("reason", frame.body.len(), MAX_REASON)?;
            Self::Drain(frame.body)
        };

    // 16 are notes: see `message.rs`.

    /// The note of this number was taken if `error` is empty; otherwise why it was not, in UTF-8.
    17 => NoteAnswer { note: u64, error: Bytes }:
        write |Self::NoteAnswer { note, error }, to| to.text(*note, error);
        read |frame| Self::NoteAnswer { note: frame.id.task, error: frame.copied() };

    // 18 are chunks of blobs: see `blob.rs`.

    /// No task will name these blobs any more: forget them, also those that have not arrived in full.
    19 => Forget(Vec<u64>):
        write |Self::Forget(blobs), to| to.numbers(blobs);
        read |frame| Self::Forget(frame.numbers("list of blobs")?);

    /// So many bytes of chunks, of large messages and of blobs, have arrived from the receiver of this frame so far.
    20 => Received { bytes: u64 }:
        write |Self::Received { bytes }, to| to.number(*bytes);
        read |frame| Self::Received { bytes: frame.number()? };

    /// The node could not store this blob. Tasks that name it end there as crashed.
    21 => BlobLost { number: u64 }:
        write |Self::BlobLost { number }, to| to.number(*number);
        read |frame| Self::BlobLost { number: frame.number()? };

    /// Between an agent and its worker: the next descriptor that comes over this socket is the memory of this blob, of so
    /// many bytes. From a worker: that of the next blob in the result of the task of this number.
    22 => Descriptor { number: u64, size: u64 }:
        write |Self::Descriptor { number, size }, to| to.bytes(*number, &size.to_le_bytes());
        read |frame| Self::Descriptor { number: frame.id.task, size: frame.u64("descriptor")? };

    /// On a new connection between a client and an agent that had a session before: what the sender has of it, in JSON (see
    /// `hello.rs`). The first frame of each direction, in place of `Hello`.
    23 => Attach(Bytes):
        write |Self::Attach(json), to| to.text(0, json);
        read |frame| Self::Attach(frame.body);

    /// So many bytes of the stream have arrived from the receiver of this frame, which need not keep them any more.
    24 => Reached { bytes: u64 }:
        write |Self::Reached { bytes }, to| to.number(*bytes);
        read |frame| Self::Reached { bytes: frame.number()? };

    /// The last frame of each block of a stripe: the block's number.
    25 => StripeBlock { number: u64 }:
        write |Self::StripeBlock { number }, to| to.number(*number);
        read |frame| Self::StripeBlock { number: frame.number()? };

    /// These tasks run at the node, and have done so for some time.
    28 => Running(Vec<Attempt>):
        write |Self::Running(ids), to| to.attempts(ids);
        read |frame| Self::Running(frame.attempts("list of running tasks")?);

    /// The stripes' blocks of these numbers have arrived from the receiver of this frame.
    26 => BlocksArrived(Vec<u64>):
        write |Self::BlocksArrived(blocks), to| to.numbers(blocks);
        read |frame| Self::BlocksArrived(frame.numbers("list of blocks")?);
}

impl Control {
    /// Bytes that the receiver stores for this frame beside the enum, about.
    pub(super) fn size(&self) -> usize {
        match self {
            Self::Output { text: body, .. } | Self::NoteAnswer { error: body, .. } => body.len(),
            Self::Acknowledge(ids) | Self::Running(ids) => size_of_val(ids.as_slice()),
            Self::Forget(numbers) | Self::BlocksArrived(numbers) => size_of_val(numbers.as_slice()),
            _ => 0,
        }
    }

    /// Memory that this frame takes, in bytes, if it answers the peer or asks it for something that the peer made
    /// necessary; else 0. Every other frame has a bound of its own: its sender sends few, or one per task of a caller.
    pub(super) fn answer_cost(&self) -> usize {
        let body = match self {
            Self::NoteAnswer { error, .. } => error.len(),
            Self::BlocksArrived(blocks) => size_of_val(blocks.as_slice()),
            Self::Pulse { .. } | Self::Recall(_) | Self::GivenBack(_) | Self::RecallRefused(_) => 0,
            _ => return 0,
        };
        size_of::<Self>() + body
    }
}

fn not_over(what: &'static str, len: usize, cap: usize) -> Result<(), FrameError> {
    if len > cap { Err(FrameError::TooLong { what, len, cap }) } else { Ok(()) }
}

/// Appends the frame of one kind to a block's raw bytes.
struct Writer<'a> {
    kind: u8,
    out: &'a mut Vec<u8>,
}

#[allow(clippy::unnecessary_wraps)] // every way to write a frame has the same type
impl Writer<'_> {
    fn put(&mut self, id: Attempt, body: &[u8]) {
        Header { kind: self.kind, flags: 0, id }.put(body.len(), self.out);
        self.out.extend_from_slice(body);
    }

    /// About an attempt, without a body.
    fn attempt(&mut self, id: Attempt) -> Result<(), FrameError> {
        self.put(id, &[]);
        Ok(())
    }

    /// A number without a body.
    fn number(&mut self, number: u64) -> Result<(), FrameError> {
        self.bytes(number, &[])
    }

    /// A number and a body of fixed length.
    fn bytes(&mut self, number: u64, body: &[u8]) -> Result<(), FrameError> {
        self.put(Attempt { task: number, attempt: 0 }, body);
        Ok(())
    }

    /// A number and a body of two integers.
    fn two(&mut self, number: u64, first: u64, second: u64) -> Result<(), FrameError> {
        self.bytes(number, &[first.to_le_bytes(), second.to_le_bytes()].concat())
    }

    /// A number and a body of any length up to [`MAX_BODY`].
    fn text(&mut self, number: u64, body: &[u8]) -> Result<(), FrameError> {
        not_over("control frame", body.len(), MAX_BODY)?;
        self.bytes(number, body)
    }

    /// Attempts, in as many frames as they need; no frame if there are none.
    fn attempts(&mut self, ids: &[Attempt]) -> Result<(), FrameError> {
        for ids in ids.chunks(MAX_BODY / ATTEMPT_BYTES) {
            let header = Header { kind: self.kind, flags: 0, id: Attempt { task: 0, attempt: 0 } };
            header.put(ids.len() * ATTEMPT_BYTES, self.out);
            for id in ids {
                self.out.extend_from_slice(&id.task.to_le_bytes());
                self.out.extend_from_slice(&id.attempt.to_le_bytes());
            }
        }
        Ok(())
    }

    /// Numbers, in as many frames as they need; no frame if there are none.
    fn numbers(&mut self, numbers: &[u64]) -> Result<(), FrameError> {
        for numbers in numbers.chunks(MAX_BODY / 8) {
            let body: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            self.bytes(0, &body)?;
        }
        Ok(())
    }
}

/// A control frame as it arrived.
struct Frame {
    id: Attempt,
    body: Bytes,
}

impl Frame {
    /// What [`Writer::attempt`] wrote.
    fn attempt(&self) -> Result<Attempt, FrameError> {
        if self.body.is_empty() { Ok(self.id) } else { Err(FrameError::BadBody("control frame")) }
    }

    /// What [`Writer::number`] wrote.
    fn number(&self) -> Result<u64, FrameError> {
        self.attempt().map(|id| id.task)
    }

    /// The body, if it is one integer.
    fn u64(&self, what: &'static str) -> Result<u64, FrameError> {
        let body = <[u8; 8]>::try_from(&self.body[..]).map_err(|_| FrameError::BadBody(what))?;
        Ok(u64::from_le_bytes(body))
    }

    /// What [`Writer::two`] wrote in the body.
    fn two(&self, what: &'static str) -> Result<(u64, u64), FrameError> {
        let body = <[u8; 16]>::try_from(&self.body[..]).map_err(|_| FrameError::BadBody(what))?;
        let mut body = &body[..];
        Ok((body.get_u64_le(), body.get_u64_le()))
    }

    /// The body, copied: a slice of a few bytes would keep the memory of its whole block.
    fn copied(&self) -> Bytes {
        Bytes::copy_from_slice(&self.body)
    }

    /// What [`Writer::numbers`] wrote in one frame.
    fn numbers(mut self, what: &'static str) -> Result<Vec<u64>, FrameError> {
        if !self.body.len().is_multiple_of(8) {
            return Err(FrameError::BadBody(what));
        }
        let mut numbers = Vec::with_capacity(self.body.len() / 8);
        while self.body.has_remaining() {
            numbers.push(self.body.get_u64_le());
        }
        Ok(numbers)
    }

    /// What [`Writer::attempts`] wrote in one frame.
    fn attempts(mut self, what: &'static str) -> Result<Vec<Attempt>, FrameError> {
        if !self.body.len().is_multiple_of(ATTEMPT_BYTES) {
            return Err(FrameError::BadBody(what));
        }
        let mut ids = Vec::with_capacity(self.body.len() / ATTEMPT_BYTES);
        while self.body.has_remaining() {
            ids.push(Attempt { task: self.body.get_u64_le(), attempt: self.body.get_u16_le() });
        }
        Ok(ids)
    }
}
