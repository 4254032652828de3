//! Reads events from a blocking socket.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::error::{FrameError, SessionError};
use crate::node::descriptors::Received;
use crate::wire::{Decoder, Event};

/// Bytes per read of the agent's socket.
const READ_BYTES: usize = 256 * 1024;

/// The events that come out of the agent's socket.
pub struct SocketReader {
    socket: UnixStream,
    decoder: Decoder,
    scratch: Vec<u8>,
    /// Descriptors whose frames were not read yet.
    received: Received,
}

impl SocketReader {
    pub fn new(socket: UnixStream) -> Self {
        let decoder = Decoder::new(usize::MAX);
        Self { socket, decoder, scratch: vec![0; READ_BYTES], received: Received::default() }
    }

    /// Wait for the next event. Before each wait `look` is called; while it returns a duration, it is called again after
    /// that time.
    pub fn next(&mut self, mut look: impl FnMut() -> Option<Duration>) -> Result<Event, SessionError> {
        loop {
            if let Some(event) = self.decoder.next()? {
                return Ok(event);
            }
            while let Some(bound) = look() {
                let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
                let bound = Timespec::try_from(bound).ok();
                match poll(&mut fds, bound.as_ref()) {
                    Ok(0) | Err(Errno::INTR) => {}
                    Ok(_) => break,
                    Err(e) => return Err(SessionError::Io(e.into())),
                }
            }
            match self.received.read(&self.socket, &mut self.scratch) {
                Ok(0) => return Err(SessionError::Ended(String::new())),
                Ok(n) => self.decoder.buffer().extend_from_slice(self.scratch.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
            if self.received.incomplete {
                return Err(FrameError::BadSequence("no file descriptor is left for data of a task").into());
            }
        }
    }

    /// Return the descriptor whose frame is the last event.
    ///
    /// # Errors
    /// If it did not come.
    pub fn descriptor(&mut self) -> Result<OwnedFd, SessionError> {
        let descriptor = self.received.pop();
        descriptor.ok_or(SessionError::Frame(FrameError::BadSequence("the frame of a descriptor that did not come")))
    }
}
