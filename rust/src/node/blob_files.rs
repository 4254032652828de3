//! The blobs that a node has: files in memory, filled by chunks in any order. Which of them are there, and for how long, is
//! decided in `blobs.rs`.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use crate::error::FrameError;
use crate::node::memory_file::{Draft, SharedFile};
use crate::pages::free_aside;
use crate::wire::BlobChunk;

/// Blobs that a client may have begun to send and not ended. It sends at most 1,024 at once over one stream.
const MAX_ARRIVING: usize = 4096;
/// Pieces of one blob that are here without what is between them. Several streams that take turns leave a few.
const MAX_GAPS: usize = 1 << 16;

/// Which bytes of a blob have arrived.
#[derive(Debug, Default)]
struct Ranges {
    /// The end of each range, by its beginning. No two touch.
    ends: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Add a range. Return false, and change nothing, if some of it is here, or there would be too many ranges.
    fn add(&mut self, begin: u64, end: u64) -> bool {
        let before = self.ends.range(..=begin).next_back().map(|(begin, end)| (*begin, *end));
        let after = self.ends.range(begin..).next().map(|(begin, end)| (*begin, *end));
        let overlaps = before.is_some_and(|(_, e)| e > begin) || after.is_some_and(|(b, _)| b < end);
        if overlaps || self.ends.len() >= MAX_GAPS {
            return false;
        }
        let end = match after {
            Some((b, e)) if b == end => {
                self.ends.remove(&b);
                e
            }
            _ => end,
        };
        match before {
            Some((b, e)) if e == begin => self.ends.insert(b, end),
            _ => self.ends.insert(begin, end),
        };
        true
    }

    /// Return whether all bytes up to `total` are here, and nothing behind them.
    fn is_all(&self, total: u64) -> bool {
        self.ends.len() == 1 && self.ends.get(&0) == Some(&total)
    }
}

/// A blob of which not all bytes have arrived.
#[derive(Debug)]
struct Arriving {
    /// The size of the blob; `None` before its first chunk.
    total: Option<u64>,
    ranges: Ranges,
    /// Where the bytes are stored; `None` if they are read over.
    draft: Option<Draft>,
}

/// What [`BlobFiles::take`] made of a chunk.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// Bytes of the blob are missing, or it is read over.
    Partly,
    /// The blob is here.
    Complete,
    /// The blob cannot be stored, for this reason. The rest of it is read over.
    Failed(String),
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct BlobFiles {
    arriving: HashMap<u64, Arriving>,
    complete: HashMap<u64, Arc<SharedFile>>,
}

impl BlobFiles {
    /// Store a chunk.
    ///
    /// # Errors
    /// [`FrameError::BadSequence`] if the chunks of one blob contradict one another: the session is to be ended.
    pub fn take(&mut self, chunk: &BlobChunk) -> Result<Progress, FrameError> {
        let BlobChunk { number, offset, total, bytes } = chunk;
        if self.complete.contains_key(number) {
            return Err(FrameError::BadSequence("a chunk of a blob that is complete"));
        }
        let count = self.arriving.len();
        let mut failure = None;
        let arriving = match self.arriving.entry(*number) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(_) if count >= MAX_ARRIVING => {
                return Err(FrameError::BadSequence("too many unfinished blobs"));
            }
            Entry::Vacant(entry) => {
                let draft = Draft::new().map_err(|error| failure = Some(error)).ok();
                entry.insert(Arriving { total: Some(*total), ranges: Ranges::default(), draft })
            }
        };
        if *arriving.total.get_or_insert(*total) != *total {
            return Err(FrameError::BadSequence("two sizes of one blob"));
        }
        if !arriving.ranges.add(*offset, offset + bytes.len() as u64) {
            return Err(FrameError::BadSequence("bytes of a blob that came before"));
        }
        if let Some(Err(error)) = arriving.draft.as_mut().map(|draft| draft.write(bytes, *offset)) {
            arriving.draft = None;
            failure = Some(error);
        }
        if arriving.ranges.is_all(*total)
            && let Some(Arriving { draft: Some(draft), .. }) = self.arriving.remove(number)
        {
            match draft.end(usize::try_from(*total).unwrap_or(usize::MAX)) {
                Ok(file) => {
                    self.complete.insert(*number, Arc::new(file));
                    return Ok(Progress::Complete);
                }
                Err(error) => failure = Some(error),
            }
        }
        Ok(failure.map_or(Progress::Partly, |error| Progress::Failed(explain(*total, &error))))
    }

    /// Free a blob. If it has not arrived in full, the rest of it is read over.
    pub fn forget(&mut self, number: u64) {
        if let Some(file) = self.complete.remove(&number) {
            free_aside(file.size(), file);
        } else {
            // Frames that say so overtake chunks, perhaps the first one. More than that are no honest client's.
            if self.arriving.len() >= MAX_ARRIVING && !self.arriving.contains_key(&number) {
                return;
            }
            let unknown = || Arriving { total: None, ranges: Ranges::default(), draft: None };
            self.arriving.entry(number).or_insert_with(unknown).draft = None;
        }
    }

    /// Return a blob that is complete.
    #[must_use]
    pub fn get(&self, number: u64) -> Option<&Arc<SharedFile>> {
        self.complete.get(&number)
    }
}

/// Return why a blob of `size` bytes cannot be stored, in words that follow the node's name.
fn explain(size: u64, error: &io::Error) -> String {
    let remedy = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::MFILE | Errno::NFILE) => "raise the limit of open files there (ulimit -Hn)",
        _ => "free memory there, or space in its directory for temporary files",
    };
    let tenths = size.saturating_add(50_000) / 100_000;
    format!("no room for {}.{} MB of data that this task needs ({error}): {remedy}", tenths / 10, tenths % 10)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn chunk(number: u64, offset: u64, total: u64, bytes: &[u8]) -> BlobChunk {
        BlobChunk { number, offset, total, bytes: Bytes::copy_from_slice(bytes) }
    }

    fn content(files: &BlobFiles, number: u64) -> Vec<u8> {
        files.get(number).unwrap().map().unwrap().as_ref().to_vec()
    }

    /// Chunks that contradict one another end the session, and nothing of it is stored twice.
    #[test]
    fn contradictions_are_errors() {
        let mut files = BlobFiles::default();
        assert_eq!(files.take(&chunk(1, 2, 6, b"cd")).unwrap(), Progress::Partly);
        for (offset, total, bytes) in [(2, 6, b"cd"), (1, 6, b"bc"), (3, 6, b"de"), (4, 7, b"ef")] {
            assert!(files.take(&chunk(1, offset, total, bytes)).is_err(), "{offset} {total}");
        }
        assert_eq!(files.take(&chunk(1, 4, 6, b"ef")).unwrap(), Progress::Partly);
        assert_eq!(files.take(&chunk(1, 0, 6, b"ab")).unwrap(), Progress::Complete);
        assert_eq!(content(&files, 1), b"abcdef");
        assert!(files.take(&chunk(1, 0, 6, b"ab")).is_err());
        let begin = |files: &mut BlobFiles, number| files.take(&chunk(number, 0, 2, b"a"));
        files.arriving = (0..MAX_ARRIVING as u64)
            .map(|n| (n + 10, Arriving { total: Some(2), ranges: Ranges::default(), draft: None }))
            .collect();
        assert!(begin(&mut files, 2).is_err());
        assert!(begin(&mut files, 10).is_ok());
        (0..MAX_ARRIVING as u64).for_each(|number| files.forget(1_000_000 + number));
        assert_eq!(files.arriving.len(), MAX_ARRIVING);
    }

    /// A blob that is forgotten is freed at once, and what still comes of it is read over, whichever comes first.
    #[test]
    fn a_forgotten_blob_is_read_over() {
        let mut files = BlobFiles::default();
        files.take(&chunk(1, 0, 4, b"ab")).unwrap();
        files.forget(1);
        files.forget(2);
        assert!(files.arriving.values().all(|arriving| arriving.draft.is_none()));
        for number in [1, 2] {
            if number == 2 {
                assert_eq!(files.take(&chunk(number, 0, 4, b"ab")).unwrap(), Progress::Partly);
            }
            assert_eq!(files.take(&chunk(number, 2, 4, b"cd")).unwrap(), Progress::Partly);
            assert!(files.get(number).is_none());
        }
        assert!(files.arriving.is_empty());
        assert_eq!(files.take(&chunk(3, 0, 2, b"ab")).unwrap(), Progress::Complete);
        files.forget(3);
        assert!(files.get(3).is_none() && files.arriving.is_empty());
    }

    /// What is said about a lack names the size and the remedy.
    #[test]
    fn a_lack_is_explained() {
        let error = io::Error::from_raw_os_error(Errno::MFILE.raw_os_error());
        assert!(explain(52_428_800, &error).starts_with("no room for 52.4 MB of data that this task needs (Too many"));
        assert!(explain(1, &error).ends_with("raise the limit of open files there (ulimit -Hn)"));
        assert!(explain(1, &io::ErrorKind::StorageFull.into()).contains("free memory there"));
    }

    proptest! {
        /// A blob whose chunks come in any order is complete with the last of them, and has its bytes in their places.
        #[test]
        fn chunks_come_in_any_order(
            lens in proptest::collection::vec(1_usize..50, 1..40),
            order in any::<u64>(),
        ) {
            let bytes: Vec<u8> = (0..lens.iter().sum()).map(|n: usize| u8::try_from(n % 251).unwrap()).collect();
            let mut offset = 0;
            let mut chunks: Vec<_> = lens
                .iter()
                .map(|len| {
                    offset += len;
                    chunk(7, (offset - len) as u64, bytes.len() as u64, bytes.get(offset - len..offset).unwrap())
                })
                .collect();
            chunks.sort_by_key(|chunk| (chunk.offset + 1).wrapping_mul(order | 1).rotate_left(32));
            let mut files = BlobFiles::default();
            for (at, one) in chunks.iter().enumerate() {
                let expected = if at + 1 == chunks.len() { Progress::Complete } else { Progress::Partly };
                prop_assert_eq!(files.take(one).unwrap(), expected);
            }
            prop_assert_eq!(content(&files, 7), bytes);
        }
    }
}
