//! Memory that is mapped from a file: the only unsafe code of the node.

// A mapping is an address; each use says why it is sound.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;
use std::ptr::{NonNull, null_mut};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A private mapping of a whole file: what is written to it stays in this process, and is seen through this mapping only.
///
/// The bytes of the file never change while it is mapped: it is sealed, or nobody but the agent can write to it, and the
/// agent has written all of it.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<c_void>,
    /// More than 0.
    len: usize,
}

// SAFETY: a mapping belongs to the process, and not to a thread; only `as_ptr` hands out a pointer that can be written to.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` allows reading only.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Map the first `len` bytes of a file, to be read only.
    ///
    /// # Errors
    /// What the system says, for example that this process has too many mappings; also if `len` is 0.
    pub fn readable(file: impl AsFd, len: usize) -> io::Result<Self> {
        Self::new(file, len, ProtFlags::READ)
    }

    /// Map the first `len` bytes of a file, to be read and written. A page takes memory of its own when it is written to.
    ///
    /// # Errors
    /// As [`Mapping::readable`].
    pub fn writable(file: impl AsFd, len: usize) -> io::Result<Self> {
        Self::new(file, len, ProtFlags::READ | ProtFlags::WRITE)
    }

    fn new(file: impl AsFd, len: usize, access: ProtFlags) -> io::Result<Self> {
        // SAFETY: the address is the kernel's choice, so no memory that is in use is replaced.
        let start = unsafe { mmap(null_mut(), len, access, MapFlags::PRIVATE, file, 0) }?;
        NonNull::new(start).map(|start| Self { start, len }).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Return where the memory begins. It lives as long as this does. Only what [`Mapping::writable`] returned may be written
    /// to, and only by a caller that makes no use of `as_ref`.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr().cast()
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `len` bytes are mapped there, which are initialized as every file's are, for as long as this lives. They
        // do not change, see the struct's text.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this mapping was made by `new` and is removed once; references to it have ended with it.
        let _ = unsafe { munmap(self.start.as_ptr(), self.len) };
    }
}
