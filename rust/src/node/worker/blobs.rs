//! The blobs that a worker process has descriptors of, and the tasks that name them.
//!
//! The agent sends each descriptor once, ahead of the first task that names the blob. Each task maps the blob anew, so that
//! no task sees what another one wrote.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;

use crate::error::FrameError;
use crate::node::mapping::Mapping;
use crate::node::memory_file::SharedFile;
use crate::wire::{Attempt, Message, in_places};

/// A blob as one task has it: a mapping of its own, and the file, for further mappings.
#[derive(Debug)]
pub struct MappedBlob {
    pub memory: Mapping,
    pub file: Arc<SharedFile>,
}

impl MappedBlob {
    /// Map a blob anew: with the bytes that were received, whatever a task wrote to another mapping of it.
    ///
    /// # Errors
    /// As [`Mapping::writable`].
    pub fn new(file: Arc<SharedFile>) -> io::Result<Self> {
        Ok(Self { memory: file.map_writable()?, file })
    }
}

/// A part of a task, as its function gets it.
#[derive(Debug)]
pub enum Part {
    Inline(Bytes),
    Mapped(MappedBlob),
}

impl From<Part> for Bytes {
    fn from(part: Part) -> Self {
        match part {
            Part::Inline(bytes) => bytes,
            Part::Mapped(blob) => Self::from_owner(blob.memory),
        }
    }
}

/// A task, with the blobs that it names.
#[derive(Debug)]
pub struct Task {
    pub message: Message,
    /// In the order of `message.blobs`.
    blobs: Vec<Arc<SharedFile>>,
}

impl Task {
    #[must_use]
    pub fn id(&self) -> Attempt {
        self.message.id
    }

    /// Return whether all parts travelled in the message.
    #[must_use]
    pub fn is_inline(&self) -> bool {
        self.blobs.is_empty()
    }

    /// Return the parts of the task, in their places.
    ///
    /// # Errors
    /// If a blob cannot be mapped: this process may have no more memory, or no more mappings.
    pub fn into_parts(self) -> io::Result<Vec<Part>> {
        let Self { message, blobs } = self;
        let mapped = blobs.into_iter().map(MappedBlob::new).collect::<io::Result<Vec<_>>>()?;
        let places = message.blobs.into_iter().map(|blob| blob.place);
        Ok(in_places(message.parts.into_iter().map(Part::Inline), places.zip(mapped.into_iter().map(Part::Mapped))))
    }
}

/// The blobs of which this process has descriptors, by their numbers. The thread that reads from the agent owns it.
#[derive(Debug, Default)]
pub struct BlobTable {
    files: HashMap<u64, Arc<SharedFile>>,
}

impl BlobTable {
    /// Take a descriptor from the agent.
    ///
    /// # Errors
    /// If it is not that of a file of this size.
    pub fn add(&mut self, number: u64, size: u64, descriptor: OwnedFd) -> io::Result<()> {
        let file = SharedFile::trusted(out_of_the_way(descriptor), size)?;
        self.files.insert(number, Arc::new(file));
        Ok(())
    }

    /// Close the descriptors of these blobs, once no task needs them.
    pub fn forget(&mut self, numbers: &[u64]) {
        for number in numbers {
            self.files.remove(number);
        }
    }

    /// Return a task with its blobs; `None` if the descriptor of one did not come.
    ///
    /// # Errors
    /// [`FrameError::BadSequence`] if the descriptor of one was closed: this process can run no task that needs the blob.
    pub fn find(&self, message: Message) -> Result<Option<Task>, FrameError> {
        let mut blobs = Vec::with_capacity(message.blobs.len());
        for blob in &message.blobs {
            let Some(file) = self.files.get(&blob.number) else { return Ok(None) };
            file.check()
                .map_err(|_| FrameError::BadSequence("the file of data that tasks share was closed, by a task?"))?;
            blobs.push(Arc::clone(file));
        }
        Ok(Some(Task { message, blobs }))
    }
}

/// Give a descriptor a number that is above all those that the process may give to others, so that blobs take no
/// descriptors from tasks, and tasks that use `select` find small numbers.
#[cfg(target_os = "linux")]
fn out_of_the_way(descriptor: OwnedFd) -> OwnedFd {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let limit = getrlimit(Resource::Nofile);
    let Some(first) = limit.current.and_then(|limit| i32::try_from(limit).ok()) else { return descriptor };
    if limit.current == limit.maximum {
        return descriptor;
    }
    // The limit is for new descriptors only. A program that another thread starts just now has the higher limit.
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if setrlimit(Resource::Nofile, raised).is_err() {
        return descriptor;
    }
    let moved = rustix::io::fcntl_dupfd_cloexec(&descriptor, first);
    let _ = setrlimit(Resource::Nofile, limit);
    moved.unwrap_or(descriptor)
}

#[cfg(not(target_os = "linux"))]
fn out_of_the_way(descriptor: OwnedFd) -> OwnedFd {
    descriptor
}

#[cfg(test)]
#[allow(clippy::unwrap_used, unsafe_code)]
mod tests {
    use std::mem::ManuallyDrop;
    use std::os::fd::{AsFd, AsRawFd, FromRawFd};

    use super::*;
    use crate::wire::BlobPart;

    /// Where a task has closed the descriptor of a blob and another file has its number, no task gets the other file's bytes.
    #[test]
    fn another_file_in_the_place_of_a_blob_is_noticed() {
        let descriptor = |byte| OwnedFd::from(SharedFile::of(&[byte; 5000]).unwrap());
        let mut table = BlobTable::default();
        // Not with `add`: its descriptor may have a number that `dup2` does not take.
        table.files.insert(1, Arc::new(SharedFile::trusted(descriptor(1), 5000).unwrap()));
        let part = BlobPart { place: 0, number: 1, fresh: false, content: None };
        let message = Message { blobs: vec![part], ..Message::default() };
        let before = table.find(message.clone()).unwrap().unwrap();
        let number = table.files.get(&1).unwrap().as_fd().as_raw_fd();
        // The number stays the table's; only what it names changes, as the kernel allows.
        let mut place = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
        rustix::io::dup2(descriptor(2), &mut place).unwrap();
        assert!(table.find(message).is_err());
        assert!(before.into_parts().is_err());
    }
}
