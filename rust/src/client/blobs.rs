//! Which blobs a node has, as the client decides it: what is sent ahead of a task, what stays for later tasks, and what is
//! forgotten. Pure state: no I/O, no clock.
//!
//! The node is never asked. A blob counts as there as soon as it is sent, for the node holds a task until all of its blobs
//! have arrived. A blob is pinned while the node holds a task that names it. Of the others those that were used last stay,
//! up to a budget of bytes and a number of blobs.
//!
//! For example, with a budget of 100 MB: two tasks of 80 MB each, with different data, are sent to a node; it has 160 MB
//! then, all of them pinned. When the first task has ended, its blob is forgotten, and the second one's stays when that
//! task has ended, too: the next task with the same data brings no byte.

use std::collections::HashMap;

use bytes::Bytes;

use crate::wire::{Attempt, BlobPart};

/// Blobs that a node keeps at most beside those that are pinned. Each takes a descriptor there.
pub const MAX_KEPT_BLOBS: usize = 256;
/// The budget of a node that does not tell its memory, in bytes.
pub const DEFAULT_BUDGET: u64 = 256 << 20;
/// The share of a node's memory that is its budget, unless the user set one: one part in so many.
pub const BUDGET_SHARE: u64 = 4;
/// Tasks that are noted as users of a blob before it is looked which of them have ended.
const MIN_USERS: usize = 64;

/// A blob that a node has, or that is on its way there.
#[derive(Debug)]
struct Blob {
    /// The number of its transfer to the node.
    number: u64,
    size: u64,
    /// When a task that names it was last sent, by the count of such tasks.
    used: u64,
    /// The tasks that name it, and perhaps some that the node does not hold any more.
    users: Vec<Attempt>,
    /// `users` is searched for tasks that have ended when it has so many entries.
    sweep_at: usize,
}

impl Blob {
    fn is_pinned(&mut self, holds: &impl Fn(Attempt) -> bool) -> bool {
        self.users.retain(|user| holds(*user));
        !self.users.is_empty()
    }
}

/// See the module's text. Owned by the node's record.
#[derive(Debug)]
pub struct NodeBlobs {
    /// Bytes that the node keeps at most beside those that are pinned.
    budget: u64,
    /// The blobs, by the numbers of their contents.
    blobs: HashMap<u64, Blob>,
    /// Blobs that the node could not store, until it holds no task that names them: until then it must know that they are
    /// lost, because such a task may still be on its way.
    lost: Vec<Blob>,
    /// The sum of the sizes of `blobs`.
    bytes: u64,
    /// Blobs that were named by the tasks that were sent.
    uses: u64,
}

impl NodeBlobs {
    #[must_use]
    pub fn new(budget: u64) -> Self {
        Self { budget, blobs: HashMap::new(), lost: Vec::new(), bytes: 0, uses: 0 }
    }

    /// Note that a task is sent to the node that names these blobs, and give each the number of its transfer. `next` is
    /// called for the number of a new one. Return what is to be sent ahead of the task.
    pub fn send(&mut self, task: Attempt, parts: &mut [BlobPart], mut next: impl FnMut() -> u64) -> Vec<(u64, Bytes)> {
        let mut missing = Vec::new();
        for part in parts {
            let Some(content) = &part.content else { continue };
            let blob = self.blobs.entry(content.id).or_insert_with(|| {
                let (number, size) = (next(), content.bytes.len() as u64);
                self.bytes += size;
                missing.push((number, content.bytes.clone()));
                Blob { number, size, used: 0, users: Vec::new(), sweep_at: MIN_USERS }
            });
            self.uses += 1;
            blob.used = self.uses;
            blob.users.push(task);
            part.number = blob.number;
        }
        missing
    }

    /// Drop the blobs that are beyond the budget and not pinned, those first that were used least recently, and what was
    /// lost. Return the numbers of their transfers. `holds` says which tasks the node still holds.
    pub fn evict(&mut self, holds: impl Fn(Attempt) -> bool) -> Vec<u64> {
        for blob in self.blobs.values_mut().filter(|blob| blob.users.len() >= blob.sweep_at) {
            blob.users.retain(|user| holds(*user));
            blob.sweep_at = MIN_USERS.max(2 * blob.users.len());
        }
        let mut forgotten: Vec<u64> =
            self.lost.extract_if(.., |blob| !blob.is_pinned(&holds)).map(|b| b.number).collect();
        if !self.is_over_budget() {
            return forgotten;
        }
        let blobs = self.blobs.iter_mut();
        let unpinned = blobs.filter_map(|(id, blob)| (!blob.is_pinned(&holds)).then_some((blob.used, *id)));
        let mut unpinned: Vec<(u64, u64)> = unpinned.collect();
        unpinned.sort_unstable();
        for (_, content) in unpinned {
            if !self.is_over_budget() {
                break;
            }
            forgotten.extend(self.remove(content).map(|blob| blob.number));
        }
        forgotten
    }

    fn is_over_budget(&self) -> bool {
        self.bytes > self.budget || self.blobs.len() > MAX_KEPT_BLOBS
    }

    fn remove(&mut self, content: u64) -> Option<Blob> {
        let blob = self.blobs.remove(&content)?;
        self.bytes -= blob.size;
        Some(blob)
    }

    /// Note that the node could not store the blob of this transfer: the next task that names its content brings it again.
    pub fn lost(&mut self, number: u64) {
        let content = self.blobs.iter().find(|(_, blob)| blob.number == number).map(|(content, _)| *content);
        let blob = content.and_then(|content| self.remove(content));
        self.lost.extend(blob);
    }

    /// Return the bytes of all blobs that the node has, or will have.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.bytes
    }

    /// Return whether the node has this content, or will have it.
    #[must_use]
    pub fn has(&self, content: u64) -> bool {
        self.blobs.contains_key(&content)
    }

    /// Return whether the sum is that of the blobs' sizes.
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        self.bytes == self.blobs.values().map(|blob| blob.size).sum::<u64>()
    }
}

impl Default for NodeBlobs {
    fn default() -> Self {
        Self::new(DEFAULT_BUDGET)
    }
}

/// Return the budget of a node with so much memory, where the user set `wanted`; both in bytes.
#[must_use]
pub fn budget(wanted: Option<u64>, memory: u64) -> u64 {
    wanted.unwrap_or(if memory == 0 { DEFAULT_BUDGET } else { memory / BUDGET_SHARE })
}
