//! One error type per stage of a task's way. The folder `python` turns them into exceptions.
//!
//! A message is a clause in lower case, as it follows the name of the node or worker that it is about.

use std::io;

use crate::text;

/// A peer's bytes are not our protocol, or a frame of ours would not be. The stream is closed then; no memory was taken
/// for the bad bytes.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The magic did not come within the first [`crate::wire::MAX_NOISE`] bytes.
    #[error("no protocol magic within the first {skipped} bytes; the far end printed: {text}")]
    NoMagic { skipped: usize, text: String },
    /// The preamble names another version.
    #[error("protocol version {theirs} on the far end, {ours} here: install the same skyward_lite on both")]
    Version { ours: u32, theirs: u32 },
    /// A declared length is over the cap of its kind.
    #[error("{what} of {len} bytes or entries, over the cap of {cap}")]
    TooLong { what: &'static str, len: usize, cap: usize },
    /// A block that is longer compressed than raw, or raw and of two lengths.
    #[error("block of {wire_len} bytes on the wire for {raw_len} bytes")]
    BadBlock { wire_len: usize, raw_len: usize },
    /// The compressed bytes of a block cannot be decompressed to the declared length.
    #[error("lz4: {0}")]
    Lz4(String),
    /// What is named ends before its declared length.
    #[error("truncated {0}")]
    Truncated(&'static str),
    /// A frame of a kind that no version of this protocol has.
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    /// A flag that is not defined, or a flag on a control frame.
    #[error("frame flags {0:#04x} are not defined here")]
    BadFlags(u8),
    /// A result whose code is no [`crate::wire::Outcome`].
    #[error("unknown outcome {0}")]
    BadOutcome(u8),
    /// A frame whose body is longer or shorter than frames of its kind have it, or than its message declared.
    #[error("{0} with a body of the wrong length")]
    BadBody(&'static str),
    /// A chunk or a message that may not come at this point of the stream.
    #[error("{0}")]
    BadSequence(&'static str),
}

/// A session with a peer could not be opened, or ended otherwise than by our own goodbye.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// See [`FrameError`].
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Reading from the stream or writing to it failed.
    #[error("connection lost: {0}")]
    Io(#[from] io::Error),
    /// The stream ended without a goodbye; with what the far end had printed before the protocol began.
    #[error("connection lost: the stream ended without a goodbye{}", printed(.0))]
    Ended(String),
    /// The far end sent a goodbye, with this reason.
    #[error("the far end ended the session: {0}")]
    Goodbye(String),
    /// No byte could be written to the peer, or none came from it, for [`crate::timing::Timing::peer_timeout`].
    #[error("no sign of life for {0} s")]
    Silent(u64),
    /// More than [`crate::timing::MAX_ANSWERS`] bytes of answers wait to be sent.
    #[error("the far end does not read: answers of more than {} MiB wait to be sent to it", .0 >> 20)]
    Deaf(usize),
    /// A node that is ready with more slots than it was asked for, or with none.
    #[error("the far end offers {offered} slots where 1 to {asked} were asked for")]
    Slots { offered: u64, asked: usize },
    /// The first frame is no hello, or its JSON lacks a field.
    #[error("hello of the far end is not readable: {0}")]
    BadHello(String),
    /// The hello, or the workers, did not come in time.
    #[error("not ready within {0} s")]
    NotReady(u64),
    /// A node gave a task back, or ended it, in a way that only an answer to a request may have.
    #[error("it did what it was not asked for: it {0}; its agent is broken, or no skyward_lite agent")]
    Unasked(&'static str),
    /// Frames come from the node, but no answer to a heartbeat.
    #[error("it answered no heartbeat for {0} s, though something came from it")]
    Unanswered(u64),
    /// A recall, a cancel or an abort was not answered within [`crate::timing::Timing::answer`].
    #[error("it was asked {asked} and has not answered for {seconds} s")]
    NoAnswer { asked: &'static str, seconds: u64 },
    /// No task ended for longer than `task_timeout` and the node's other delays allow.
    #[error(
        "its tasks ended neither by themselves nor by Worker(task_timeout=): none for {seconds} s, and one may run {limit} s"
    )]
    NoResult { seconds: u64, limit: f64 },
    /// A node that announced its departure ran its tasks for longer than [`crate::timing::Timing::drain`].
    #[error("it said that it will soon be gone, and {0} s later it had still not ended its tasks")]
    StillThere(u64),
    /// Its node was given up meanwhile, for a reason that is told elsewhere.
    #[error("it was given up")]
    GivenUp,
    /// The node lacks packages that tasks need, and the pool uses no such node.
    #[error("its environment is not the client's, and strict_env=True: {0}")]
    Unfit(String),
    /// A further channel to the node ended, on which blobs were sent.
    #[error("a channel to it that carried data ended: {0}")]
    Stripe(String),
}

impl SessionError {
    /// Return whether it is the connection that was lost: the peer may live, and the session may go on over another one.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        matches!(self, Self::Io(_) | Self::Ended(_) | Self::Silent(_) | Self::Stripe(_))
    }
}

/// Return the clause about what the far end printed before the protocol began, if it printed anything.
fn printed(noise: &str) -> String {
    if noise.is_empty() { String::new() } else { format!("; the far end printed: {noise}") }
}

/// The SSH connection could not be made. Only [`SshError::Io`], [`SshError::HungUp`] and [`SshError::Timeout`] are
/// worth another try.
#[derive(Debug, thiserror::Error)]
pub enum SshError {
    /// The address was not found or not reached, or the connection broke.
    #[error("cannot connect: {0}")]
    Io(#[from] io::Error),
    /// The server closed the connection before the key exchange was done, as one does that has too many clients.
    #[error("it hung up before it showed its key: {0}")]
    HungUp(String),
    /// The bound on the whole of it ran out.
    #[error("connect, key exchange and authentication took more than {0} s")]
    Timeout(u64),
    /// The server showed a key that is not among the known ones.
    #[error("the host key {got}{} is not known for this host; known: {expected}", if *.revoked { ", which is revoked" } else { "" })]
    HostKey { got: String, revoked: bool, expected: String },
    /// The user's configuration leaves no algorithm of this kind that is supported here.
    #[error("no {what} algorithm that the ssh configuration allows is supported here: {names}")]
    Algorithms { what: &'static str, names: String },
    /// Every identity was offered, and none was accepted.
    #[error("authentication as {user:?} was refused; tried: {tried}; the server accepts: {accepts}")]
    Authentication { user: String, tried: String, accepts: String },
    /// The server accepted the session and not the command.
    #[error("the server refused to run the command {0:?}")]
    Exec(String),
    /// A command that ran for longer than its bound.
    #[error("not done within {seconds} s: {command}")]
    Command { command: String, seconds: u64 },
    /// The program that leads to a machine cannot be started here.
    #[error("{program} does not run here: {error}")]
    Program { program: String, error: io::Error },
    /// A private or public key of the user.
    #[error("key is not readable: {0}")]
    Key(String),
    /// Any other error of the SSH library, in its words, made printable.
    #[error("SSH: {0}")]
    Protocol(String),
}

impl From<russh::Error> for SshError {
    fn from(error: russh::Error) -> Self {
        match error {
            russh::Error::IO(io) => Self::Io(io),
            // Its texts may quote the server.
            other => Self::Protocol(text::lines(other.to_string(), text::LIMIT)),
        }
    }
}

/// Why a node could not be used, or is lost.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error(transparent)]
    Ssh(#[from] SshError),
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The agent of the session is not there any more, and why this is known.
    #[error("its agent is gone: {0}")]
    Gone(String),
    /// The node was away for so many seconds: its lease is over.
    #[error("it was away for longer than its lease: nothing was heard from it for {0} s")]
    Away(u64),
    /// The pool was closed before the node was used.
    #[error("the pool is closed")]
    Closed,
    /// A reason that only the node's caller knows, in its words.
    #[error("{0}")]
    Other(String),
}

impl NodeError {
    /// As [`SessionError::is_cut`].
    #[must_use]
    pub fn is_cut(&self) -> bool {
        match self {
            Self::Session(why) => why.is_cut(),
            Self::Ssh(why) => {
                matches!(why, SshError::Io(_) | SshError::HungUp(_) | SshError::Timeout(_) | SshError::Protocol(_))
            }
            Self::Gone(_) | Self::Away(_) | Self::Closed | Self::Other(_) => false,
        }
    }
}

/// What makes an agent end with an error of its own.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error(transparent)]
    Ssh(#[from] SshError),
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The worker's program could not be started.
    #[error("cannot start a worker: {0}")]
    Spawn(#[source] io::Error),
    /// The agent refused the client, for this reason: their Pythons or environments differ.
    #[error("{0}")]
    Refused(String),
}
