//! Stripes, at the agent: further streams from the client, which bring blobs. See `client/stripes.rs`.
//!
//! The agent listens on a socket in a directory that only its user can enter, and tells the client the path in its hello. For
//! each stripe the client runs a command on the host (`environment/build.py`) that connects to the socket, hands over its
//! standard input and output, and lives until the agent closes the connection. No byte of a stripe passes through that
//! command: the agent reads from the SSH server's own pipe.
//!
//! The end of a stripe is no event here: the client notices it, and knows whether anything was lost.

use std::fs::{self, File};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tracing::debug;

use crate::error::{FrameError, SessionError};
use crate::node::stdio;
use crate::timing::{MAX_STRIPES, Timing};
use crate::wire::{Control, Event, EventReader, FrameSender, Outbox};

/// The beginning of the names of the directories.
const PREFIX: &str = "skyward-lite-";
const SOCKET: &str = "stripes";
/// Bytes of the longest directory in which an agent makes its own: a socket's path may have 107.
const MAX_BASE_BYTES: usize = 64;
/// How often another name is tried for the directory.
const NAMES: usize = 3;
/// Pause after an error of `accept`, which has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket for stripes. The path goes when this is dropped.
#[derive(Debug)]
pub struct StripeListener {
    socket: UnixListener,
    directory: Directory,
    /// The agent's, which it tells on each stripe. Set by [`StripeListener::greeted`].
    epoch: String,
    /// The most bytes of a blob. Set by [`StripeListener::greeted`].
    max_blob: usize,
}

/// A directory of this user, which is removed when this is dropped. An agent that is killed leaves it behind, without the
/// lock: the next agent removes it.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
    /// Its lock.
    _lock: File,
}

impl Directory {
    fn new(base: &Path) -> io::Result<Self> {
        let mut number = [0; 8];
        getrandom::fill(&mut number).map_err(io::Error::other)?;
        let path = base.join(format!("{PREFIX}{:016x}", u64::from_le_bytes(number)));
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        match lock(&path) {
            Ok(lock) => Ok(Self { path, _lock: lock }),
            // Another agent took it for one that was left behind, and removes it.
            Err(error) => Err(error),
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Take a directory's lock, if nobody has it.
fn lock(directory: &Path) -> io::Result<File> {
    let file = File::open(directory)?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

fn remove(directory: &Path) {
    drop(fs::remove_file(directory.join(SOCKET)));
    drop(fs::remove_dir(directory));
}

/// Remove the directories in `base` that agents of this user have left behind.
fn sweep(base: &Path) {
    let user = rustix::process::geteuid().as_raw();
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let is_ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX))
            && entry.metadata().is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == user);
        if is_ours && let Ok(_lock) = lock(&entry.path()) {
            remove(&entry.path());
        }
    }
}

impl StripeListener {
    /// Listen in the user's directory for such files, or in that for temporary ones. Return `None` if neither can be used.
    ///
    /// Must be called inside a Tokio runtime.
    #[must_use]
    pub fn open() -> Option<Self> {
        let places = [std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from), Some(std::env::temp_dir())];
        let usable = |base: &PathBuf| base.is_absolute() && base.as_os_str().len() <= MAX_BASE_BYTES;
        places.into_iter().flatten().filter(usable).chain([PathBuf::from("/tmp")]).find_map(|base| {
            sweep(&base);
            (0..NAMES).find_map(|_| Self::within(&base).inspect_err(|why| debug!(%why, "no stripes")).ok())
        })
    }

    fn within(base: &Path) -> io::Result<Self> {
        let directory = Directory::new(base)?;
        let socket = UnixListener::bind(directory.path.join(SOCKET))?;
        Ok(Self { socket, directory, epoch: String::new(), max_blob: 0 })
    }

    /// Take the agent's epoch and the most bytes of a blob. Return the path of the socket, if it is text.
    pub fn greeted(&mut self, epoch: &str, max_blob: usize) -> Option<String> {
        (self.epoch, self.max_blob) = (epoch.to_owned(), max_blob);
        self.directory.path.join(SOCKET).into_os_string().into_string().ok()
    }
}

/// Take stripes, if there is a socket for them, until dropped; [`MAX_STRIPES`] at once. The chunks that they bring go to `take`.
/// Return how the client broke the protocol, if it did. `link`: the sender of the session.
pub async fn serve<F>(listener: Option<StripeListener>, link: Arc<FrameSender>, take: F) -> FrameError
where
    F: Fn(&mut Vec<Event>) -> Result<(), FrameError> + Clone + Send + 'static,
{
    let Some(StripeListener { socket, directory: _directory, epoch, max_blob }) = listener else {
        return std::future::pending().await;
    };
    let mut stripes = JoinSet::new();
    loop {
        tokio::select! {
            accepted = socket.accept(), if stripes.len() < MAX_STRIPES => match accepted {
                Ok((relay, _)) => {
                    let stripe = Stripe { relay, epoch: epoch.clone(), link: Arc::clone(&link), max_blob };
                    stripes.spawn(stripe.run(take.clone()));
                }
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            },
            Some(ended) = stripes.join_next() => match ended {
                Ok(Err(SessionError::Frame(why))) => return why,
                Ok(Err(why)) => debug!(%why, "a stripe has ended"),
                Ok(Ok(())) | Err(_) => {}
            },
        }
    }
}

/// What a stripe's task needs.
struct Stripe {
    /// The connection of the command that hands the stripe over.
    relay: UnixStream,
    epoch: String,
    link: Arc<FrameSender>,
    max_blob: usize,
}

impl Stripe {
    async fn run(mut self, take: impl Fn(&mut Vec<Event>) -> Result<(), FrameError>) -> Result<(), SessionError> {
        let user = rustix::process::geteuid().as_raw();
        if self.relay.peer_cred()?.uid() != user {
            return Ok(());
        }
        let received = tokio::time::timeout(Timing::DEFAULT.hello, receive(&self.relay)).await;
        let (reading, writing) = received.map_err(|_| SessionError::NotReady(Timing::DEFAULT.hello.as_secs()))??;
        let mut greeting = Vec::new();
        let mut outbox = Outbox::default();
        outbox.control(Control::Hello(self.epoch.into_bytes().into()));
        outbox.fill(&mut greeting)?;
        let mut to = stdio::writer(writing)?;
        to.write_all(&greeting).await?;
        let mut from = EventReader::of_session(stdio::reader(reading)?, self.max_blob, self.link);
        let mut events = Vec::new();
        let mut said = [0];
        loop {
            tokio::select! {
                read = from.read(&mut events) => read?,
                // The command says nothing more. When it ends, the server drops what comes for it.
                _ = self.relay.read(&mut said) => return Ok(()),
            }
            if events.iter().any(|event| !matches!(event, Event::Chunk(_))) {
                return Err(FrameError::BadSequence("something else than blobs on a stripe").into());
            }
            take(&mut events)?;
        }
    }
}

/// Wait for the two descriptors that the command sends: the stripe's input and output.
async fn receive(relay: &UnixStream) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut descriptors = Vec::new();
    relay
        .async_io(Interest::READABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut rights = RecvAncillaryBuffer::new(&mut space);
            let (mut byte, flags) = ([0], RecvFlags::CMSG_CLOEXEC);
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
        (Some(writing), Some(reading)) => Ok((reading, writing)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "no descriptors")),
    }
}
