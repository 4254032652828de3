//! One error type per stage of the data's way. `python.rs` maps them to the exceptions of `errors.py`.

use std::io;

use crate::text;

/// The peer's bytes are not our protocol. The stream is closed; nothing was allocated for the bad part.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("no protocol magic within the first {skipped} bytes; the far end printed: {text}")]
    NoMagic { skipped: usize, text: String },
    #[error("protocol version {theirs} on the far end, {ours} here: install the same skyward_lite on both")]
    Version { ours: u32, theirs: u32 },
    #[error("{what} of {len} bytes or entries, over the cap of {cap}")]
    TooLong { what: &'static str, len: usize, cap: usize },
    #[error("block of {wire_len} bytes on the wire for {raw_len} bytes")]
    BadBlock { wire_len: usize, raw_len: usize },
    #[error("lz4: {0}")]
    Lz4(String),
    #[error("truncated {0}")]
    Truncated(&'static str),
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    #[error("frame flags {0:#04x} are not defined here")]
    BadFlags(u8),
    #[error("unknown message code {0}")]
    BadTag(u8),
    #[error("{0} with a body of the wrong length")]
    BadBody(&'static str),
    #[error("{0}")]
    BadSequence(&'static str),
}

/// A session with a peer could not be opened or went away.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("connection lost: {0}")]
    Io(#[from] io::Error),
    #[error("connection lost: the stream ended without a goodbye{}", printed(.0))]
    Ended(String),
    #[error("the far end ended the session: {0}")]
    Goodbye(String),
    #[error("no sign of life for {0} s")]
    Silent(u64),
    #[error("the far end does not read: answers of more than {} MiB wait to be sent to it", .0 >> 20)]
    Deaf(usize),
    #[error("the far end offers {offered} slots where 1 to {asked} were asked for")]
    Slots { offered: u64, asked: usize },
    #[error("hello of the far end is not readable: {0}")]
    BadHello(String),
    #[error("not ready within {0} s")]
    NotReady(u64),
    #[error("it did what it was not asked for: it {0}; its agent is broken, or no skyward_lite agent")]
    Unasked(&'static str),
    #[error("it answered no heartbeat for {0} s, though something came from it")]
    Unanswered(u64),
    #[error("it was asked {asked} and has not answered for {seconds} s")]
    NoAnswer { asked: &'static str, seconds: u64 },
    #[error(
        "its tasks ended neither by themselves nor by Worker(task_timeout=): none for {seconds} s, and one may run {limit} s"
    )]
    NoResult { seconds: u64, limit: f64 },
    #[error("it said that it will soon be gone, and {0} s later it had still not ended its tasks")]
    StillThere(u64),
}

fn printed(noise: &str) -> String {
    if noise.is_empty() { String::new() } else { format!("; the far end printed: {noise}") }
}

/// The SSH connection could not be made. Only [`SshError::Io`], [`SshError::HungUp`] and [`SshError::Timeout`] are worth
/// another try.
#[derive(Debug, thiserror::Error)]
pub enum SshError {
    #[error("cannot connect: {0}")]
    Io(#[from] io::Error),
    #[error("it hung up before it showed its key: {0}")]
    HungUp(String),
    #[error("connect, key exchange and authentication took more than {0} s")]
    Timeout(u64),
    #[error("the host key {got}{} is not known for this host; known: {expected}", if *.revoked { ", which is revoked" } else { "" })]
    HostKey { got: String, revoked: bool, expected: String },
    #[error("no {what} algorithm that the ssh configuration allows is supported here: {names}")]
    Algorithms { what: &'static str, names: String },
    #[error("authentication as {user:?} was refused; tried: {tried}; the server accepts: {accepts}")]
    Authentication { user: String, tried: String, accepts: String },
    #[error("the server refused to run the command {0:?}")]
    Exec(String),
    #[error("not done within {seconds} s: {command}")]
    Command { command: String, seconds: u64 },
    #[error("key is not readable: {0}")]
    Key(String),
    #[error("SSH: {0}")]
    Protocol(String),
}

impl From<russh::Error> for SshError {
    fn from(error: russh::Error) -> Self {
        match error {
            russh::Error::IO(io) => Self::Io(io),
            // Some of its errors have the server's own words.
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
    #[error("the pool is closed")]
    Closed,
    /// What the caller found.
    #[error("{0}")]
    Other(String),
}

/// What makes an agent end with an error of its own.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error(transparent)]
    Ssh(#[from] SshError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("cannot start a worker: {0}")]
    Spawn(io::Error),
    #[error("{0}")]
    Refused(String),
}
