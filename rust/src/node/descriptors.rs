//! The sockets between an agent and its workers, which carry file descriptors beside the frames.
//!
//! A descriptor leaves with the next bytes that are written, whatever they are. The frame that says what it is
//! ([`Control::Descriptor`](crate::wire::Control::Descriptor)) is put into the outbox after the descriptor was added here,
//! so a descriptor arrives before its frame or with it, and both arrive in the same order.
//!
//! The system bounds how many descriptors of one user may be on their way in all sockets together, by the limit of open files
//! of the process that sends one. Nothing is wrong when that is reached, so the sender waits until some have arrived.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Sleep, sleep};

use crate::locks::lock;

/// Descriptors that travel with one write; Linux takes up to 253.
const MAX_AT_ONCE: usize = 64;
/// Bytes per read of a worker's socket.
const READ_BYTES: usize = 64 * 1024;
/// Pause before the next try where too many descriptors are on their way.
const PAUSE: Duration = Duration::from_millis(1);

/// Return whether a write failed because too many descriptors are on their way.
fn is_too_many(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::TOOMANYREFS.raw_os_error())
}

/// Write to a socket, with descriptors. Returns how many bytes were written; with the first of them all descriptors leave.
///
/// # Errors
/// What the system says; then nothing was written.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_AT_ONCE))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        rights.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    Ok(rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut rights, SendFlags::empty())?)
}

/// Descriptors that have arrived, until their frames are read.
#[derive(Debug, Default)]
pub struct Received {
    queue: VecDeque<OwnedFd>,
    /// Some did not arrive: this process has no descriptors left, or the sender sent too many.
    pub incomplete: bool,
}

impl Received {
    /// Return the next descriptor, in the order of their frames.
    pub fn pop(&mut self) -> Option<OwnedFd> {
        self.queue.pop_front()
    }

    /// Return how many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.queue.len()
    }

    /// Read bytes and descriptors from a socket. Returns how many bytes were read; 0 at the end of the stream.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(&mut self, socket: impl AsFd, bytes: &mut [u8]) -> io::Result<usize> {
        #[cfg(target_os = "linux")]
        let flags = RecvFlags::CMSG_CLOEXEC;
        #[cfg(not(target_os = "linux"))]
        let flags = RecvFlags::empty();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_AT_ONCE))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let read = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut rights, flags)?;
        for message in rights.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.queue.extend(descriptors);
            }
        }
        #[cfg(not(target_os = "linux"))]
        for descriptor in &self.queue {
            rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::CLOEXEC)?;
        }
        self.incomplete |= read.flags.contains(ReturnFlags::CTRUNC);
        Ok(read.bytes)
    }
}

/// Write all bytes to a blocking socket, and send all descriptors before the last of the bytes.
///
/// # Errors
/// What the system says.
pub fn write_all(mut socket: &StdUnixStream, mut bytes: &[u8], mut descriptors: &[OwnedFd]) -> io::Result<()> {
    while !descriptors.is_empty() {
        let (now, later) = descriptors.split_at(descriptors.len().min(MAX_AT_ONCE));
        let now: Vec<_> = now.iter().map(AsFd::as_fd).collect();
        let piece = if later.is_empty() { bytes } else { bytes.get(..1).unwrap_or_default() };
        match send(socket, piece, &now) {
            Ok(written) => {
                bytes = bytes.get(written..).unwrap_or_default();
                descriptors = later;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if is_too_many(&e) => std::thread::sleep(PAUSE),
            Err(e) => return Err(e),
        }
    }
    socket.write_all(bytes)
}

/// The descriptors that leave with the next writes to one socket.
#[derive(Debug)]
pub struct Outgoing<T> {
    queue: Mutex<VecDeque<Arc<T>>>,
}

impl<T> Default for Outgoing<T> {
    fn default() -> Self {
        Self { queue: Mutex::default() }
    }
}

impl<T> Outgoing<T> {
    /// Send the descriptor of this file. The frame that says what it is must be put into the outbox after this call.
    pub fn push(&self, file: Arc<T>) {
        lock(&self.queue).push_back(file);
    }
}

/// Writes to a worker's socket, with what is in an [`Outgoing`].
#[derive(Debug)]
pub struct DescriptorWriter<T> {
    socket: OwnedWriteHalf,
    outgoing: Arc<Outgoing<T>>,
    /// Runs while too many descriptors are on their way.
    pause: Option<Pin<Box<Sleep>>>,
}

impl<T> DescriptorWriter<T> {
    #[must_use]
    pub fn new(socket: OwnedWriteHalf, outgoing: Arc<Outgoing<T>>) -> Self {
        Self { socket, outgoing, pause: None }
    }
}

impl<T: AsFd> AsyncWrite for DescriptorWriter<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if let Some(pause) = &mut this.pause {
            ready!(pause.as_mut().poll(cx));
            this.pause = None;
        }
        let mut queue = lock(&this.outgoing.queue);
        if queue.is_empty() {
            drop(queue);
            return Pin::new(&mut this.socket).poll_write(cx, bytes);
        }
        let socket = this.socket.as_ref();
        loop {
            ready!(socket.poll_write_ready(cx))?;
            let count = queue.len().min(MAX_AT_ONCE);
            let now: Vec<_> = queue.iter().take(count).map(|file| file.as_fd()).collect();
            // While more than these wait, a single byte is written: the block must not be complete before the last of them.
            let piece = if count < queue.len() { bytes.get(..1).unwrap_or_default() } else { bytes };
            match socket.try_io(Interest::WRITABLE, || send(socket, piece, &now)) {
                Ok(written) => {
                    queue.drain(..count);
                    return Poll::Ready(Ok(written));
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) if is_too_many(&e) => {
                    ready!(this.pause.insert(Box::pin(sleep(PAUSE))).as_mut().poll(cx));
                }
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// Reads from a worker's socket, and puts the descriptors that come with the bytes into a [`Received`].
#[derive(Debug)]
pub struct DescriptorReader {
    socket: OwnedReadHalf,
    received: Arc<Mutex<Received>>,
    scratch: Vec<u8>,
}

impl DescriptorReader {
    #[must_use]
    pub fn new(socket: OwnedReadHalf) -> Self {
        Self { socket, received: Arc::default(), scratch: vec![0; READ_BYTES] }
    }

    /// Return where the descriptors are.
    #[must_use]
    pub fn received(&self) -> Arc<Mutex<Received>> {
        Arc::clone(&self.received)
    }
}

impl AsyncRead for DescriptorReader {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { socket, received, scratch } = &mut *self;
        let socket = socket.as_ref();
        let room = buffer.remaining().min(scratch.len());
        let scratch = scratch.get_mut(..room).unwrap_or_default();
        loop {
            ready!(socket.poll_read_ready(cx))?;
            match socket.try_io(Interest::READABLE, || lock(received).read(socket, scratch)) {
                Ok(read) => {
                    buffer.put_slice(scratch.get(..read).unwrap_or_default());
                    return Poll::Ready(Ok(()));
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
mod tests {
    use std::io::Read;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    use super::*;

    /// Make the reading end of a pipe in which this number stands.
    fn numbered(number: u8) -> OwnedFd {
        let (read, mut write) = std::io::pipe().unwrap();
        write.write_all(&[number]).unwrap();
        read.into()
    }

    fn numbers(received: &mut Received) -> Vec<u8> {
        let read = |descriptor: OwnedFd| {
            let mut number = [0];
            std::fs::File::from(descriptor).read_exact(&mut number).unwrap();
            number[0]
        };
        std::iter::from_fn(|| received.pop()).map(read).collect()
    }

    /// More descriptors than fit one write arrive in their order, all of them before the last byte.
    #[test]
    fn descriptors_come_before_the_last_byte() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (from, to) = (ours.into_split(), theirs.into_split());
            let outgoing = Arc::new(Outgoing::default());
            let mut writer = DescriptorWriter::new(to.1, Arc::clone(&outgoing));
            let mut reader = DescriptorReader::new(from.0);
            (0..200).for_each(|number| outgoing.push(Arc::new(numbered(number))));
            writer.write_all(b"first").await.unwrap();
            writer.write_all(b"second").await.unwrap();
            let mut bytes = [0; 5];
            reader.read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, b"first");
            assert_eq!(numbers(&mut lock(&reader.received())), (0..200).collect::<Vec<_>>());
            let mut bytes = [0; 6];
            reader.read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, b"second");
            assert!(lock(&reader.received()).count() == 0 && !lock(&reader.received()).incomplete);
        });
    }

    /// The same from a process that blocks.
    #[test]
    fn a_blocking_writer_sends_descriptors_as_well() {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let descriptors: Vec<_> = (0..150).map(numbered).collect();
        write_all(&theirs, b"bytes", &descriptors).unwrap();
        let (mut received, mut bytes, mut all) = (Received::default(), [0; 16], Vec::new());
        while all.len() < 5 {
            let read = received.read(&ours, &mut bytes).unwrap();
            all.extend_from_slice(bytes.get(..read).unwrap());
        }
        assert_eq!(all, b"bytes");
        assert_eq!(numbers(&mut received), (0..150).collect::<Vec<_>>());
    }

    /// Where the user's processes have as many descriptors on their way as the system allows, both kinds of writers wait until
    /// some have arrived. Such a limit is not for those who have certain capabilities: this thread gives them up.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_writer_waits_while_too_many_descriptors_are_on_their_way() {
        use std::sync::mpsc::channel;

        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

        let limit = getrlimit(Resource::Nofile);
        let current = limit.current.unwrap_or(u64::MAX).min(1024);
        setrlimit(Resource::Nofile, Rlimit { current: Some(current), ..limit }).unwrap();
        let (reached, wait) = channel();
        let sender = std::thread::spawn(move || {
            let none = CapabilitySet::empty();
            set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none }).unwrap();
            let file = numbered(9);
            let (unread, full) = StdUnixStream::pair().unwrap();
            let error = loop {
                let sent = send(&full, b"x", &[file.as_fd(); MAX_AT_ONCE]);
                let Err(error) = sent else { continue };
                break error;
            };
            assert!(is_too_many(&error), "{error}");
            reached.send(unread).unwrap();
            let (ours, theirs) = StdUnixStream::pair().unwrap();
            write_all(&theirs, b"blocking", &[file.try_clone().unwrap()]).unwrap();
            let (unread, full) = StdUnixStream::pair().unwrap();
            while send(&full, b"x", &[file.as_fd(); MAX_AT_ONCE]).is_ok() {}
            reached.send(unread).unwrap();
            ours.set_nonblocking(true).unwrap();
            theirs.set_nonblocking(true).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let outgoing = Arc::new(Outgoing::default());
                outgoing.push(Arc::new(file));
                let mut writer = DescriptorWriter::new(UnixStream::from_std(theirs).unwrap().into_split().1, outgoing);
                writer.write_all(b"waking").await.unwrap();
            });
            let (mut received, mut bytes) = (Received::default(), [0; 16]);
            while received.count() < 2 {
                received.read(&ours, &mut bytes).unwrap();
            }
        });
        for unread in wait {
            // Time for a first try that fails: without it this proves less.
            std::thread::sleep(Duration::from_millis(20));
            drop(unread);
        }
        setrlimit(Resource::Nofile, limit).unwrap();
        sender.join().unwrap();
    }

    /// A sender that sends more descriptors at once than our writers do is found out.
    #[test]
    fn too_many_descriptors_are_noticed() {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let file = numbered(0);
        let descriptors = vec![file.as_fd(); MAX_AT_ONCE + 10];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_AT_ONCE + 10))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        assert!(rights.push(SendAncillaryMessage::ScmRights(&descriptors)));
        rustix::net::sendmsg(&theirs, &[IoSlice::new(b"x")], &mut rights, SendFlags::empty()).unwrap();
        let mut received = Received::default();
        assert_eq!(received.read(&ours, &mut [0; 16]).unwrap(), 1);
        assert!(received.incomplete);
    }
}
