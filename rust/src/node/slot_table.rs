//! What each thread of a worker is running, in memory that outlives the process.
//!
//! The worker notes a task before it unpickles it, and forgets it when it has nothing to do. So the agent knows, when
//! the process has died, which tasks may have killed it, and while it lives, which ones run for too long.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bytes::Buf;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

use crate::wire::Attempt;

/// Bytes of a slot's record: when it began (u64, nanoseconds of the system's monotonic clock; 0 for nothing), task
/// (u64), attempt (u64).
const RECORD: usize = 24;
/// When a task began whose time does not count: it has run for no time at all.
const NEVER: u64 = u64::MAX;

/// See the module's text.
#[derive(Debug)]
pub struct SlotTable {
    file: File,
}

fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u64::try_from(time.tv_nsec));
    seconds.unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(nanos.unwrap_or(0)).max(1)
}

#[cfg(target_os = "linux")]
fn memory() -> io::Result<File> {
    let fd = rustix::fs::memfd_create("skyward-running", rustix::fs::MemfdFlags::CLOEXEC)?;
    Ok(File::from(fd))
}

#[cfg(not(target_os = "linux"))]
fn memory() -> io::Result<File> {
    let mut name = [0; 16];
    getrandom::fill(&mut name).map_err(io::Error::other)?;
    let path = std::env::temp_dir().join(format!("skyward-{:032x}", u128::from_le_bytes(name)));
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

impl SlotTable {
    /// A table for one worker.
    ///
    /// # Errors
    /// When the system has no memory file left to give.
    pub fn new() -> io::Result<Self> {
        memory().map(|file| Self { file })
    }

    /// Send it to the process at the other end of `socket`, ahead of everything else.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn send(&self, socket: &UnixStream) -> io::Result<()> {
        let fds = [self.file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        rights.push(SendAncillaryMessage::ScmRights(&fds));
        rustix::net::sendmsg(socket, &[io::IoSlice::new(b"T")], &mut rights, SendFlags::empty())?;
        Ok(())
    }

    /// Take the table that the agent sent first.
    ///
    /// # Errors
    /// When the socket fails, or something else came first.
    pub fn receive(socket: &UnixStream) -> io::Result<Self> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        rustix::net::recvmsg(socket, &mut [io::IoSliceMut::new(&mut byte)], &mut rights, RecvFlags::empty())?;
        let mut fds = rights.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let fd: OwnedFd = fds.next().ok_or_else(|| io::Error::other("the agent sent no table"))?;
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
        Ok(Self { file: File::from(fd) })
    }

    /// Note what a slot runs from now on.
    pub fn set(&self, slot: usize, id: Option<Attempt>) {
        let mut record = [0; RECORD];
        if let Some(id) = id {
            let fields = [now(), id.task, u64::from(id.attempt)];
            let bytes = fields.into_iter().flat_map(u64::to_le_bytes);
            record.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        }
        // Without a note a death blames fewer tasks than it might, no more.
        drop(self.file.write_all_at(&record, (slot * RECORD) as u64));
    }

    /// Let a slot's time begin anew.
    pub fn restart(&self, slot: usize) {
        drop(self.file.write_all_at(&now().to_le_bytes(), (slot * RECORD) as u64));
    }

    /// Let a slot's time count no more: its task waits for what is not its own doing.
    pub fn stop(&self, slot: usize) {
        drop(self.file.write_all_at(&NEVER.to_le_bytes(), (slot * RECORD) as u64));
    }

    /// What runs, and for how long.
    #[must_use]
    pub fn running(&self, slots: usize) -> Vec<(Attempt, Duration)> {
        let mut before = self.read(slots);
        loop {
            // A record that is being written can be read half: what is read twice is whole.
            let again = self.read(slots);
            if again == before {
                break;
            }
            before = again;
        }
        let now = now();
        let mut running = Vec::new();
        for mut record in before.chunks_exact(RECORD) {
            let (began, task, attempt) = (record.get_u64_le(), record.get_u64_le(), record.get_u64_le());
            if began != 0 {
                let id = Attempt { task, attempt: u16::try_from(attempt).unwrap_or(u16::MAX) };
                running.push((id, Duration::from_nanos(now.saturating_sub(began))));
            }
        }
        running
    }

    fn read(&self, slots: usize) -> Vec<u8> {
        let mut bytes = vec![0; slots * RECORD];
        let mut at = 0;
        while let Some(rest) = bytes.get_mut(at..) {
            match self.file.read_at(rest, at as u64) {
                Ok(0) => break,
                Ok(n) => at += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        bytes
    }
}
