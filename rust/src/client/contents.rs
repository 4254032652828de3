//! The large buffers of tasks, each distinct content once, however many tasks have it.
//!
//! Contents are told apart by XXH3, 128 bits, with a secret that each pool draws: two contents of the same hash are no more
//! likely than a fault of the memory, and nobody who does not know the secret can make them. Equal bytes so have one number
//! and one copy, which is kept while a task names it and for a moment longer. Hashing and copying take no lock.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use twox_hash::XxHash3_128;

use crate::locks::lock;
use crate::pages::free_aside;
use crate::wire::Content;

/// Bytes of the hash's secret: as many as that of XXH3's authors has.
const SECRET_BYTES: usize = 192;
/// How long a content is kept that no task names. A caller who waits for one result before it submits the next task
/// would otherwise copy the same array for each of them.
const LINGER: Duration = Duration::from_secs(1);
/// Bytes of contents that are kept before those are dropped that no task names: data that is never the same again would
/// otherwise pile up for [`LINGER`].
const MAX_LINGERING: usize = 256 << 20;
/// Contents that are remembered before it is looked which of them are of no use.
const MIN_KNOWN: usize = 1024;

/// See the module's text. Owned by the pool.
pub struct Contents {
    secret: [u8; SECRET_BYTES],
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// The number of the content that was added last.
    last: u64,
    by_hash: HashMap<u128, Entry>,
    /// Contents of each size, so that a buffer of a size that none has need not be hashed before it is copied.
    sizes: HashMap<usize, usize>,
    /// Contents that are kept although no task may name them, and when a task last did. See [`LINGER`].
    recent: HashMap<u64, (Instant, Arc<Content>)>,
    /// The sum of the sizes of `recent`.
    recent_bytes: usize,
    /// What no task names is dropped from `recent` when it has more bytes than this and [`MAX_LINGERING`].
    prune_at: usize,
    /// `by_hash` is searched for what is of no use when it has so many entries.
    sweep_at: usize,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    size: usize,
    content: Weak<Content>,
}

impl std::fmt::Debug for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Contents").field("known", &self.known).finish_non_exhaustive()
    }
}

/// A buffer's content, and whether it was copied for this buffer: no task that has not ended had it before.
pub type Found = (Arc<Content>, bool);

impl Contents {
    /// Return a pool's contents, of which there are none.
    ///
    /// # Errors
    /// When the system has no random numbers.
    pub fn new() -> std::io::Result<Self> {
        let mut secret = [0; SECRET_BYTES];
        getrandom::fill(&mut secret).map_err(std::io::Error::other)?;
        Ok(Self { secret, known: Mutex::default() })
    }

    fn hash(&self, bytes: &[u8]) -> u128 {
        // Fails for a secret that is too short, which this one is not; the hash without a secret is as good for honest data.
        XxHash3_128::oneshot_with_secret(&self.secret, bytes).unwrap_or_else(|_| XxHash3_128::oneshot(bytes))
    }

    /// Return the content of a buffer that may change. `copy` copies the buffer, if its content is not there.
    ///
    /// # Errors
    /// What `copy` returns.
    pub fn of_buffer<E>(
        &self,
        buffer: &[u8],
        now: Instant,
        copy: impl FnOnce() -> Result<Bytes, E>,
    ) -> Result<Found, E> {
        let has_size = lock(&self.known).sizes.contains_key(&buffer.len());
        if has_size {
            let hash = self.hash(buffer);
            if let Some(content) = lock(&self.known).find(hash, now) {
                return Ok((content, false));
            }
        }
        // The copy is hashed and not the buffer, which another thread may have changed meanwhile.
        Ok(self.of_bytes(copy()?, now))
    }

    /// Return the content of bytes that do not change. They are kept if their content is not there.
    pub fn of_bytes(&self, bytes: Bytes, now: Instant) -> Found {
        let hash = self.hash(&bytes);
        let mut known = lock(&self.known);
        match known.find(hash, now) {
            Some(content) => (content, false),
            None => (known.add(hash, bytes, now), true),
        }
    }

    /// Forget what is of no use: copies that no task has named for a while, and the numbers of contents that are neither here
    /// nor, as `is_anywhere` has it, on a node.
    pub fn sweep(&self, now: Instant, is_anywhere: impl Fn(u64) -> bool) {
        let mut known = lock(&self.known);
        known.drop_unused(|used| now.duration_since(used) >= LINGER);
        let Known { by_hash, sizes, sweep_at, .. } = &mut *known;
        if by_hash.len() < (*sweep_at).max(MIN_KNOWN) {
            return;
        }
        by_hash.retain(|_, entry| {
            let is_of_use = entry.content.strong_count() > 0 || is_anywhere(entry.id);
            if !is_of_use && let Some(count) = sizes.get_mut(&entry.size) {
                *count -= 1;
                if *count == 0 {
                    sizes.remove(&entry.size);
                }
            }
            is_of_use
        });
        *sweep_at = 2 * by_hash.len();
    }

    /// Keep nothing that no task names.
    pub fn clear(&self) {
        let mut known = lock(&self.known);
        known.recent_bytes = 0;
        let recent = std::mem::take(&mut known.recent);
        drop(known);
        drop(recent);
    }

    /// Return how many contents are remembered, and the bytes of those that are kept.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let known = lock(&self.known);
        let kept = known.by_hash.values().filter(|entry| entry.content.strong_count() > 0);
        (known.by_hash.len(), kept.map(|entry| entry.size).sum())
    }
}

impl Known {
    fn find(&mut self, hash: u128, now: Instant) -> Option<Arc<Content>> {
        let content = self.by_hash.get(&hash)?.content.upgrade()?;
        self.keep(&content, now);
        Some(content)
    }

    fn keep(&mut self, content: &Arc<Content>, now: Instant) {
        if self.recent.insert(content.id, (now, Arc::clone(content))).is_none() {
            self.recent_bytes += content.bytes.len();
        }
    }

    /// Keep no more what no task names, of those that were used at a time for which `is_old` holds.
    fn drop_unused(&mut self, is_old: impl Fn(Instant) -> bool) {
        let (mut unused, mut bytes) = (Vec::new(), 0);
        self.recent.retain(|_, (used, content)| {
            let is_kept = !is_old(*used) || Arc::strong_count(content) > 1;
            if !is_kept {
                bytes += content.bytes.len();
                unused.push(Arc::clone(content));
            }
            is_kept
        });
        self.recent_bytes -= bytes;
        free_aside(bytes, unused);
    }

    /// Add a content that is not here, under the number that it had if it was here before.
    fn add(&mut self, hash: u128, bytes: Bytes, now: Instant) -> Arc<Content> {
        let size = bytes.len();
        let id = if let Some(entry) = self.by_hash.get(&hash) {
            entry.id
        } else {
            self.last += 1;
            *self.sizes.entry(size).or_default() += 1;
            self.last
        };
        if self.recent_bytes > self.prune_at.max(MAX_LINGERING) {
            self.drop_unused(|_| true);
            // What tasks name is looked through again when as much was added.
            self.prune_at = 2 * self.recent_bytes;
        }
        let content = Arc::new(Content { id, bytes });
        self.by_hash.insert(hash, Entry { id, size, content: Arc::downgrade(&content) });
        self.keep(&content, now);
        content
    }
}
