//! Which blobs are here, which tasks wait for some, and which worker has the descriptor of which. Pure.
//!
//! The client decides what is sent and what is forgotten. A task may arrive before the blobs that it names; it is held here
//! until all of them are complete, and goes to a worker behind the descriptors that this worker lacks.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::node::actions::Action;
use crate::queue::PeerId;
use crate::wire::{Attempt, Control, Message};

/// Blobs that could not be stored, and that the client has not forgotten. It hears of each of them.
const MAX_FAILED: usize = 1 << 16;

/// A task that names blobs which are not complete.
#[derive(Debug)]
struct Waiting {
    task: Message,
    /// How many of the names in it are those of blobs that are not complete. More than 0.
    missing: usize,
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Blobs {
    /// The blobs that are complete, until the client forgets them.
    complete: HashSet<u64>,
    /// Why a blob could not be stored, until the client forgets the blob.
    failed: HashMap<u64, String>,
    /// The tasks that wait, by their numbers.
    waiting: HashMap<u64, Waiting>,
    /// The tasks that wait for each blob, in the order of their arrival; a task that names the blob twice is there twice.
    awaited: HashMap<u64, Vec<u64>>,
    /// The blobs whose descriptors each worker has.
    passed: BTreeMap<PeerId, HashSet<u64>>,
}

impl Blobs {
    /// Take a task that has arrived. Return it if all of its blobs are here; else it waits.
    ///
    /// # Errors
    /// Why it can never run: one of its blobs could not be stored.
    pub fn arrive(&mut self, task: Message) -> Result<Option<Message>, String> {
        if let Some(why) = task.blobs.iter().find_map(|blob| self.failed.get(&blob.number)) {
            return Err(why.clone());
        }
        let mut missing = 0;
        for blob in task.blobs.iter().filter(|blob| !self.complete.contains(&blob.number)) {
            self.awaited.entry(blob.number).or_default().push(task.id.task);
            missing += 1;
        }
        if missing == 0 {
            return Ok(Some(task));
        }
        self.waiting.insert(task.id.task, Waiting { task, missing });
        Ok(None)
    }

    /// Note that a blob is complete. Return the tasks that waited for it and for no other.
    pub fn complete(&mut self, number: u64) -> Vec<Message> {
        self.complete.insert(number);
        let mut ready = Vec::new();
        for task in self.awaited.remove(&number).unwrap_or_default() {
            if let Some(waiting) = self.waiting.get_mut(&task) {
                waiting.missing -= 1;
                if waiting.missing == 0 {
                    ready.extend(self.waiting.remove(&task).map(|waiting| waiting.task));
                }
            }
        }
        ready
    }

    /// Note that a blob could not be stored. Return the tasks that waited for it.
    ///
    /// # Errors
    /// The reason for which the session ends, if there are too many of these.
    pub fn fail(&mut self, number: u64, why: String) -> Result<Vec<Attempt>, String> {
        self.failed.insert(number, why);
        if self.failed.len() > MAX_FAILED {
            return Err(format!("the client sent more than {MAX_FAILED} blobs for which there is no room"));
        }
        Ok(self.give_up(number))
    }

    /// Forget a blob, also in the workers. Return the tasks that waited for it.
    pub fn forget(&mut self, number: u64, out: &mut Vec<Action>) -> Vec<Attempt> {
        if self.failed.remove(&number).is_some() {
            return Vec::new();
        }
        self.complete.remove(&number);
        for (&worker, blobs) in &mut self.passed {
            if blobs.remove(&number) {
                out.push(Action::Tell(worker, Control::Forget(vec![number])));
            }
        }
        out.push(Action::DropBlob(number));
        self.give_up(number)
    }

    fn give_up(&mut self, number: u64) -> Vec<Attempt> {
        let tasks = self.awaited.remove(&number).unwrap_or_default();
        tasks.into_iter().filter_map(|task| self.remove(task).map(|message| message.id)).collect()
    }

    /// Take out a task that waits for blobs.
    pub fn remove(&mut self, task: u64) -> Option<Message> {
        let Waiting { task: message, .. } = self.waiting.remove(&task)?;
        for blob in &message.blobs {
            if let Some(tasks) = self.awaited.get_mut(&blob.number) {
                tasks.retain(|other| *other != task);
                if tasks.is_empty() {
                    self.awaited.remove(&blob.number);
                }
            }
        }
        Some(message)
    }

    /// Return whether a task waits for blobs.
    #[must_use]
    pub fn is_waiting(&self, task: u64) -> bool {
        self.waiting.contains_key(&task)
    }

    /// Return the attempt at a task that waits for blobs.
    #[must_use]
    pub fn attempt(&self, task: u64) -> Option<Attempt> {
        self.waiting.get(&task).map(|waiting| waiting.task.id)
    }

    /// Return how many tasks wait for blobs.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Send a worker the descriptors that it lacks for a task. Return false, and send none, if a blob of the task is not
    /// here any more.
    pub fn pass(&mut self, worker: PeerId, task: &Message, out: &mut Vec<Action>) -> bool {
        if task.blobs.is_empty() {
            return true;
        }
        if !task.blobs.iter().all(|blob| self.complete.contains(&blob.number)) {
            return false;
        }
        let passed = self.passed.entry(worker).or_default();
        for blob in &task.blobs {
            if passed.insert(blob.number) {
                out.push(Action::Pass(worker, blob.number));
            }
        }
        true
    }

    /// Forget what a worker had, which has ended.
    pub fn worker_ended(&mut self, worker: PeerId) {
        self.passed.remove(&worker);
    }

    /// Return whether all parts agree with one another: each waiting task is noted with every blob that it waits for, which is
    /// not here, and only workers that are there have blobs, which are complete. A waiting task is not in the queue.
    #[must_use]
    pub fn is_consistent(&self, is_there: impl Fn(PeerId) -> bool, is_queued: impl Fn(u64) -> bool) -> bool {
        let mut noted: HashMap<u64, usize> = HashMap::new();
        for task in self.awaited.values().flatten() {
            *noted.entry(*task).or_default() += 1;
        }
        noted.len() == self.waiting.len()
            && self.waiting.iter().all(|(task, waiting)| noted.get(task) == Some(&waiting.missing) && !is_queued(*task))
            && self.awaited.keys().all(|blob| !self.complete.contains(blob) && !self.failed.contains_key(blob))
            && self.passed.iter().all(|(worker, blobs)| is_there(*worker) && blobs.is_subset(&self.complete))
    }
}
