//! The streams that come to the agent over its socket.
//!
//! The socket is in a directory that only the agent's user can enter. For each stream the client runs a command on the host
//! (`python/skyward_lite/node/attach.py`), which connects to the socket, hands over its standard input and output, and lives
//! until the agent closes the connection. No byte of a stream passes through that command: the agent reads from the SSH server's
//! own pipe.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::time::Duration;

use bytes::BytesMut;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tracing::debug;

use crate::error::SessionError;
use crate::node::stdio;
use crate::timing::Timing;
use crate::wire::{Attach, EventReader, checked};

/// What comes from the client.
pub type Reading = Box<dyn AsyncRead + Unpin + Send>;
/// What goes to the client.
pub type Writing = Box<dyn AsyncWrite + Unpin + Send>;

/// Streams that were announced and are not complete, at most: others wait in the socket's queue.
const MAX_OPENING: usize = 32;
/// Pause after an error of `accept`, which has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What the command sends with the descriptors, for each kind of stream.
const NEW: u8 = b'n';
const AGAIN: u8 = b'a';
const STRIPE: u8 = b'+';
/// What the command is sent when the agent takes the stream of a session.
const TAKEN: &[u8] = b"k";

/// Both directions of a stream of the client.
pub struct Streams {
    pub reading: Reading,
    pub writing: Writing,
    /// The connection of the command that handed the stream over. When it ends, nothing that is written arrives any more.
    /// `None` if there is no such command.
    pub relay: Option<UnixStream>,
    /// Whether the client's end was closed already when the stream came: by a connection that broke just then.
    pub is_left: bool,
}

impl Streams {
    /// Return streams that no command handed over.
    pub fn new(
        reading: impl AsyncRead + Unpin + Send + 'static,
        writing: impl AsyncWrite + Unpin + Send + 'static,
    ) -> Self {
        let (reading, writing) = checked::answer(reading, writing);
        Self { reading: Box::new(reading), writing: Box::new(writing), relay: None, is_left: false }
    }

    /// Tell the command that the agent has a use for the stream.
    pub async fn take(&mut self) -> io::Result<()> {
        match &mut self.relay {
            Some(relay) => relay.write_all(TAKEN).await,
            None => Ok(()),
        }
    }
}

/// A stream that has come.
pub enum Arrival {
    /// For a new session.
    New(Streams),
    /// For a session that was there before: what the client has of it, and what was read behind that.
    Again(Streams, Attach, BytesMut),
    Stripe(Streams),
}

/// See the file's text.
pub struct Arrivals {
    /// `None`: no stream ever comes.
    listener: Option<UnixListener>,
    /// The streams that were announced and are not complete.
    opening: JoinSet<Result<Arrival, SessionError>>,
}

impl Arrivals {
    /// Return those of an agent without a socket: none ever comes.
    #[must_use]
    pub fn none() -> Self {
        Self { listener: None, opening: JoinSet::new() }
    }

    /// Return those of this socket. Must be called inside a Tokio runtime.
    ///
    /// # Errors
    /// When the socket is none.
    pub fn of(listener: StdUnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener: Some(UnixListener::from_std(listener)?), opening: JoinSet::new() })
    }

    /// Wait for the next stream. Cancel-safe: no stream is lost if the future is dropped.
    pub async fn next(&mut self) -> Arrival {
        loop {
            let Some(listener) = &self.listener else { return std::future::pending().await };
            tokio::select! {
                accepted = listener.accept(), if self.opening.len() < MAX_OPENING => match accepted {
                    Ok((relay, _)) => drop(self.opening.spawn(open(relay))),
                    Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
                },
                Some(opened) = self.opening.join_next() => match opened {
                    Ok(Ok(arrival)) => return arrival,
                    Ok(Err(why)) => debug!(%why, "a stream did not open"),
                    Err(_) => {}
                },
            }
        }
    }
}

/// Receive a stream from the command that is connected.
async fn open(relay: UnixStream) -> Result<Arrival, SessionError> {
    let bound = Timing::DEFAULT.hello;
    tokio::time::timeout(bound, receive(relay)).await.map_err(|_| SessionError::NotReady(bound.as_secs()))?
}

async fn receive(relay: UnixStream) -> Result<Arrival, SessionError> {
    if relay.peer_cred()?.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied).into());
    }
    let (kind, reading, writing) = descriptors(&relay).await?;
    let is_left = is_left(&reading)?;
    let (reading, writing) = (stdio::reader(reading)?, stdio::writer(writing)?);
    let streams = Streams { relay: Some(relay), is_left, ..Streams::new(reading, writing) };
    match kind {
        NEW => Ok(Arrival::New(streams)),
        STRIPE => Ok(Arrival::Stripe(streams)),
        AGAIN => {
            let Streams { reading, writing, mut relay, .. } = streams;
            if let Some(relay) = &mut relay {
                relay.write_all(TAKEN).await?;
            }
            let mut reader = EventReader::new(reading, 0);
            let attach = reader.attached().await?;
            let (reading, rest) = reader.into_parts()?;
            let reading = reading.ok_or(SessionError::Ended(String::new()))?;
            Ok(Arrival::Again(Streams { reading, writing, relay, is_left }, attach, rest))
        }
        _ => Err(io::Error::from(io::ErrorKind::InvalidData).into()),
    }
}

/// Return whether nobody writes to a stream any more, whatever there is to read yet.
fn is_left(reading: &OwnedFd) -> io::Result<bool> {
    let left = PollFlags::HUP | PollFlags::RDHUP;
    let mut polled = [PollFd::new(reading, left)];
    rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    Ok(polled.iter().any(|polled| polled.revents().intersects(left)))
}

/// Wait for the byte and the two descriptors that the command sends: the stream's kind, its input and its output.
async fn descriptors(relay: &UnixStream) -> io::Result<(u8, OwnedFd, OwnedFd)> {
    let (mut byte, mut descriptors) = ([0], Vec::new());
    relay
        .async_io(Interest::READABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut rights = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC;
            rustix::net::recvmsg(relay, &mut [IoSliceMut::new(&mut byte)], &mut rights, flags)?;
            for message in rights.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    descriptors.extend(received);
                }
            }
            Ok(())
        })
        .await?;
    match (descriptors.pop(), descriptors.pop()) {
        (Some(writing), Some(reading)) => Ok((byte[0], reading, writing)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "no descriptors")),
    }
}
