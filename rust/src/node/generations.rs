//! Tasks of other generations than the workers', in the order of their arrival.
//!
//! A generation is one state of the modules that the user edits at the client. A worker has imported those of one generation,
//! and nothing is ever loaded anew in a process, so a task runs only in a worker of its generation. Tasks wait here until
//! no task of the workers' generation waits in the queue; then fresh workers take over (`renewal.rs`), and the workers of
//! before end what they hold.
//!
//! For example, a client that runs a long call edits a module and begins a second call. The first call's tasks that had arrived
//! before run; then come the second call's, in fresh workers. Tasks of the first call that arrive meanwhile wait behind
//! these, so that neither call keeps the other one out.

use std::collections::{BTreeMap, HashMap};

use crate::wire::{Attempt, Message};

/// Tasks of other generations than the workers', and those that arrived behind them.
#[derive(Debug, Default)]
pub struct OtherGenerations {
    /// The tasks by their places in the order in which they are to run.
    tasks: BTreeMap<i64, Message>,
    /// The place of each task.
    places: HashMap<u64, i64>,
}

impl OtherGenerations {
    /// Append a task that has arrived.
    pub fn push(&mut self, task: Message) {
        let place = self.tasks.last_key_value().map_or(0, |(last, _)| last + 1);
        self.insert(place, task);
    }

    /// Put a task back that had begun, ahead of all others.
    pub fn push_front(&mut self, task: Message) {
        let place = self.tasks.first_key_value().map_or(0, |(first, _)| first - 1);
        self.insert(place, task);
    }

    fn insert(&mut self, place: i64, task: Message) {
        self.places.insert(task.id.task, place);
        self.tasks.insert(place, task);
    }

    /// Return the generation of the task that is to run next.
    #[must_use]
    pub fn next(&self) -> Option<u32> {
        self.tasks.first_key_value().map(|(_, task)| task.generation)
    }

    /// Take the tasks from the first one on that are of its generation.
    pub fn take_next(&mut self) -> Vec<Message> {
        let Some(generation) = self.next() else { return Vec::new() };
        let mut taken = Vec::new();
        while let Some(first) = self.tasks.first_entry().filter(|first| first.get().generation == generation) {
            let task = first.remove();
            self.places.remove(&task.id.task);
            taken.push(task);
        }
        taken
    }

    /// Return the attempt at this task that waits here.
    #[must_use]
    pub fn attempt(&self, task: u64) -> Option<Attempt> {
        self.places.get(&task).and_then(|place| self.tasks.get(place)).map(|task| task.id)
    }

    /// Take a task out.
    pub fn remove(&mut self, task: u64) -> Option<Message> {
        self.places.remove(&task).and_then(|place| self.tasks.remove(&place))
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Return whether each task is found by its number.
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        self.places.len() == self.tasks.len()
            && self.tasks.iter().all(|(place, task)| self.places.get(&task.id.task) == Some(place))
    }
}
