//! Files in memory, which processes share by handing over their descriptors.
//!
//! A file is written once, by one process. Then it is sealed: nobody can write to it, shrink it or make it grow any more. So a
//! process that maps the file can rely on it, whatever the others do. Where the system has no memory files, or no
//! memory, a file without a name in a directory for temporary files takes its place; its readers get a descriptor with
//! which they cannot write.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::node::mapping::Mapping;
use crate::pages::free_aside;

/// Make a file in memory that has no name.
#[cfg(target_os = "linux")]
fn memory() -> io::Result<File> {
    use rustix::fs::{MemfdFlags, memfd_create};

    let create = |flags| memfd_create("skyward", MemfdFlags::CLOEXEC | flags);
    // Systems may refuse memory files that could be executed; before Linux 6.3 there is no flag that says so.
    let fd = create(MemfdFlags::NOEXEC_SEAL).or_else(|_| create(MemfdFlags::ALLOW_SEALING))?;
    Ok(File::from(fd))
}

#[cfg(not(target_os = "linux"))]
fn memory() -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Make the file immutable, for every process.
#[cfg(target_os = "linux")]
fn seal(file: &File) -> io::Result<()> {
    use rustix::fs::{SealFlags, fcntl_add_seals};

    Ok(fcntl_add_seals(file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL)?)
}

#[cfg(not(target_os = "linux"))]
fn seal(_: &File) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Return whether nobody can change or shrink the file any more.
#[cfg(target_os = "linux")]
fn is_sealed(file: &File) -> bool {
    use rustix::fs::{SealFlags, fcntl_get_seals};

    let needed = SealFlags::SHRINK | SealFlags::WRITE;
    fcntl_get_seals(file).is_ok_and(|seals| seals.contains(needed))
}

#[cfg(not(target_os = "linux"))]
fn is_sealed(_: &File) -> bool {
    false
}

/// Make a file on a disk that has no name. Returns it as one descriptor that can read and write, and one that can only
/// read.
fn temporary() -> io::Result<(File, File)> {
    temporary_in(&std::env::temp_dir()).or_else(|_| temporary_in(Path::new("/var/tmp")))
}

fn temporary_in(directory: &Path) -> io::Result<(File, File)> {
    let mut name = [0; 16];
    getrandom::fill(&mut name).map_err(io::Error::other)?;
    let path: PathBuf = directory.join(format!("skyward-{:032x}", u128::from_le_bytes(name)));
    let writing = File::options().read(true).write(true).create_new(true).mode(0o400).open(&path)?;
    let reading = File::open(&path);
    std::fs::remove_file(&path)?;
    Ok((writing, reading?))
}

/// Make a file that two processes may read and write at any time.
///
/// # Errors
/// When the system can make no more files.
pub fn unsealed() -> io::Result<File> {
    memory().or_else(|_| temporary().map(|(file, _)| file))
}

/// A file that is being written.
#[derive(Debug)]
pub struct Draft {
    file: File,
    /// The descriptor that readers get, if the file is on a disk; `None` if the file is in memory.
    reading: Option<File>,
}

impl Draft {
    /// Begin a file in memory, or else on a disk.
    ///
    /// # Errors
    /// What the system says if neither can be made.
    pub fn new() -> io::Result<Self> {
        match memory() {
            Ok(file) => Ok(Self { file, reading: None }),
            Err(_) => Self::on_disk(),
        }
    }

    fn on_disk() -> io::Result<Self> {
        temporary().map(|(file, reading)| Self { file, reading: Some(reading) })
    }

    /// Write bytes to their place. A file in memory for which there is no more memory goes on as a file on a disk.
    ///
    /// # Errors
    /// What the system says if that has no room either.
    pub fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let written = self.file.write_all_at(bytes, offset);
        if written.is_ok() || self.reading.is_some() {
            return written;
        }
        let mut disk = Self::on_disk()?;
        io::copy(&mut &self.file, &mut disk.file)?;
        disk.file.write_all_at(bytes, offset)?;
        *self = disk;
        Ok(())
    }

    /// End the file, of which `size` bytes were written.
    ///
    /// # Errors
    /// What the system says if the file cannot be sealed.
    pub fn end(self, size: usize) -> io::Result<SharedFile> {
        let Some(reading) = self.reading else {
            seal(&self.file)?;
            return Ok(SharedFile { file: self.file, size, id: None });
        };
        Ok(SharedFile { file: reading, size, id: None })
    }
}

/// A file that does not change any more.
#[derive(Debug)]
pub struct SharedFile {
    file: File,
    /// Bytes, more than 0.
    size: usize,
    /// The device and the number of a file that came from another process. See [`SharedFile::check`].
    id: Option<(u64, u64)>,
}

impl SharedFile {
    /// Write these bytes to a sealed file in memory.
    ///
    /// # Errors
    /// What the system says if it has no such files, or no memory.
    pub fn of(bytes: &[u8]) -> io::Result<Self> {
        let mut file = memory()?;
        file.write_all(bytes)?;
        seal(&file)?;
        Ok(Self { file, size: bytes.len(), id: None })
    }

    /// Take a file of `size` bytes from a process that is trusted to leave it as it is.
    ///
    /// # Errors
    /// If it has another size.
    pub fn trusted(file: OwnedFd, size: u64) -> io::Result<Self> {
        let file = File::from(file);
        let metadata = file.metadata()?;
        let found = metadata.len();
        match usize::try_from(size) {
            Ok(size) if found == size as u64 && size > 0 => {
                Ok(Self { file, size, id: Some((metadata.dev(), metadata.ino())) })
            }
            _ => Err(io::Error::other(format!("a file of {found} bytes in the place of one of {size}"))),
        }
    }

    /// Take a file of `size` bytes from any process; `None` if it is not sealed, has another size, or has holes, for which
    /// memory would be needed when they are read.
    #[must_use]
    pub fn sealed(file: OwnedFd, size: u64) -> Option<Self> {
        // First: this asks no file system, and another process's file may be of one that never answers.
        let file = Some(File::from(file)).filter(is_sealed)?;
        let file = Self::trusted(file.into(), size).ok()?;
        let blocks = rustix::fs::fstat(&file.file).ok()?.st_blocks;
        (u64::try_from(blocks).ok()?.checked_mul(512)? >= size).then_some(file)
    }

    /// Check that the descriptor is still that of the file which came. Code of a task can close any descriptor of its process,
    /// and another file may have got its number.
    ///
    /// # Errors
    /// If it is not.
    pub fn check(&self) -> io::Result<()> {
        let Some(id) = self.id else { return Ok(()) };
        match self.file.metadata() {
            Ok(metadata) if (metadata.dev(), metadata.ino()) == id => Ok(()),
            _ => Err(io::Error::other("its file was closed, by a task?")),
        }
    }

    /// Return the size, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// Map the file, to be read only.
    ///
    /// # Errors
    /// As [`Mapping::readable`].
    pub fn map(&self) -> io::Result<Mapping> {
        Mapping::readable(&self.file, self.size)
    }

    /// Map the file, to be read and written, without a change of the file.
    ///
    /// # Errors
    /// As [`SharedFile::check`] and [`Mapping::writable`].
    pub fn map_writable(&self) -> io::Result<Mapping> {
        self.check()?;
        Mapping::writable(&self.file, self.size)
    }
}

/// A mapping that is freed by [`free_aside`].
#[derive(Debug)]
pub struct FreedAside(Option<Mapping>);

impl From<Mapping> for FreedAside {
    fn from(mapping: Mapping) -> Self {
        Self(Some(mapping))
    }
}

impl AsRef<[u8]> for FreedAside {
    fn as_ref(&self) -> &[u8] {
        self.0.as_ref().map_or(&[], AsRef::as_ref)
    }
}

impl Drop for FreedAside {
    fn drop(&mut self) {
        if let Some(mapping) = self.0.take() {
            free_aside(mapping.len(), mapping);
        }
    }
}

impl AsFd for SharedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<SharedFile> for OwnedFd {
    fn from(file: SharedFile) -> Self {
        file.file.into()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Read;

    use super::*;

    fn reopened(file: &SharedFile) -> OwnedFd {
        file.as_fd().try_clone_to_owned().unwrap()
    }

    /// What is mapped can be written to, and neither the file nor another mapping of it changes.
    #[test]
    fn mappings_are_private() {
        let file = SharedFile::of(&[7; 10_000]).unwrap();
        let (ours, theirs) = (file.map_writable().unwrap(), file.map_writable().unwrap());
        // The memory is mapped for writing, and no reference to it exists.
        #[allow(unsafe_code)]
        unsafe {
            ours.as_ptr().write(8);
        }
        assert_eq!((ours.as_ref().first(), theirs.as_ref().first()), (Some(&8), Some(&7)));
        assert_eq!(file.map_writable().unwrap().as_ref(), [7; 10_000]);
        drop(file);
        assert_eq!(theirs.as_ref(), [7; 10_000]);
    }

    /// A sealed file can be neither written nor cut off nor mapped for writing to the file; a file that is not sealed, has
    /// another size or has holes is refused.
    #[test]
    fn only_sealed_files_are_taken_from_anybody() {
        let file = SharedFile::of(&[1; 8192]).unwrap();
        assert!(file.file.set_len(1).is_err() && file.file.set_len(9000).is_err());
        assert!(file.file.write_at(&[2], 0).is_err());
        assert!(SharedFile::sealed(reopened(&file), 8191).is_none());
        assert!(SharedFile::sealed(reopened(&file), 0).is_none());
        assert!(SharedFile::sealed(reopened(&file), 8192).is_some_and(|file| file.map().is_ok()));
        let open = memory().unwrap();
        open.write_all_at(&[1; 8192], 0).unwrap();
        assert!(SharedFile::sealed(open.into(), 8192).is_none());
        let hollow = memory().unwrap();
        hollow.set_len(1 << 20).unwrap();
        seal(&hollow).unwrap();
        assert!(SharedFile::sealed(hollow.into(), 1 << 20).is_none());
        let (read, _write) = std::io::pipe().unwrap();
        assert!(SharedFile::sealed(read.into(), 1).is_none());
    }

    /// A file on a disk has no name, and its readers cannot write to it.
    #[test]
    fn files_on_a_disk_are_like_files_in_memory() {
        let mut draft = Draft::on_disk().unwrap();
        draft.write(&[2; 5000], 5000).unwrap();
        draft.write(&[1; 5000], 0).unwrap();
        let file = draft.end(10_000).unwrap();
        assert!(file.file.set_len(1).is_err());
        assert!(file.file.write_at(&[2], 0).is_err());
        let mut bytes = Vec::new();
        (&file.file).read_to_end(&mut bytes).unwrap();
        assert_eq!(file.map_writable().unwrap().as_ref(), bytes);
        assert_eq!(bytes, [[1; 5000], [2; 5000]].concat());
    }

    /// Where no memory is left in the middle of a file, the file goes on on a disk, with the bytes that it had.
    #[test]
    fn a_file_moves_to_a_disk() {
        // A descriptor that refuses all further bytes, as a file does for which there is no memory.
        let file = memory().unwrap();
        file.write_all_at(&[3; 5000], 0).unwrap();
        seal(&file).unwrap();
        let mut draft = Draft { file, reading: None };
        draft.write(&[4; 10], 5000).unwrap();
        assert!(draft.reading.is_some());
        let file = draft.end(5010).unwrap();
        assert_eq!(file.map().unwrap().as_ref(), [&[3; 5000][..], &[4; 10]].concat());
    }
}
