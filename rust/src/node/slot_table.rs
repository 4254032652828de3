//! Which task each thread of a worker runs, in memory that outlives the process.
//!
//! The worker writes a task's number into its slot before it unpickles the task, and clears the slot when it has no task.
//! So the agent knows which tasks may have killed a process that has died, and which tasks of a living process run for
//! too long.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bytes::Buf;

use crate::node::descriptors::{self, Received};
use crate::node::memory_file::unsealed;
use crate::wire::Attempt;

/// Bytes of a slot's record: when its task began (u64, nanoseconds of the system's monotonic clock; 0: no task runs), the
/// task (u64), its attempt (u64).
const RECORD_BYTES: usize = 24;
/// The beginning of a task whose time does not count: by the clock, it has run for no time at all.
const NOT_COUNTED: u64 = u64::MAX;

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

impl SlotTable {
    /// Make a table for one worker.
    ///
    /// # Errors
    /// When the system can make no more memory files.
    pub fn new() -> io::Result<Self> {
        unsealed().map(|file| Self { file })
    }

    /// Send the table to the process at the other end of `socket`, ahead of everything else.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn send(&self, socket: &UnixStream) -> io::Result<()> {
        descriptors::send(socket, b"T", &[self.file.as_fd()]).map(drop)
    }

    /// Return the table that the agent sent first.
    ///
    /// # Errors
    /// When the socket fails, or something else came first.
    pub fn receive(socket: &UnixStream) -> io::Result<Self> {
        let mut received = Received::default();
        received.read(socket, &mut [0])?;
        let table = received.pop().ok_or_else(|| io::Error::other("the agent sent no table"))?;
        Ok(Self { file: File::from(table) })
    }

    /// Set the task that a slot runs from now on.
    pub fn set(&self, slot: usize, id: Option<Attempt>) {
        let mut record = [0; RECORD_BYTES];
        if let Some(id) = id {
            let fields = [now(), id.task, u64::from(id.attempt)];
            let bytes = fields.into_iter().flat_map(u64::to_le_bytes);
            record.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        }
        // If the write fails, this task is not among those that are blamed for the process's death.
        drop(self.file.write_all_at(&record, (slot * RECORD_BYTES) as u64));
    }

    /// Count the time of a slot's task from now on.
    pub fn restart(&self, slot: usize) {
        drop(self.file.write_all_at(&now().to_le_bytes(), (slot * RECORD_BYTES) as u64));
    }

    /// Count the time of a slot's task no more: the task waits for another task, or for the agent.
    pub fn stop(&self, slot: usize) {
        drop(self.file.write_all_at(&NOT_COUNTED.to_le_bytes(), (slot * RECORD_BYTES) as u64));
    }

    /// Return the tasks that run, and for how long each does.
    #[must_use]
    pub fn running(&self, slots: usize) -> Vec<(Attempt, Duration)> {
        let mut before = self.read(slots);
        loop {
            // A record that is being written can be read half. One that is the same when it is read again is whole.
            let again = self.read(slots);
            if again == before {
                break;
            }
            before = again;
        }
        let now = now();
        let mut running = Vec::new();
        for mut record in before.chunks_exact(RECORD_BYTES) {
            let (began, task, attempt) = (record.get_u64_le(), record.get_u64_le(), record.get_u64_le());
            if began != 0 {
                let id = Attempt { task, attempt: u16::try_from(attempt).unwrap_or(u16::MAX) };
                running.push((id, Duration::from_nanos(now.saturating_sub(began))));
            }
        }
        running
    }

    fn read(&self, slots: usize) -> Vec<u8> {
        let mut bytes = vec![0; slots * RECORD_BYTES];
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
