//! What a worker process sends to its agent: results, which travel together while short tasks follow one another, and
//! answers, which never wait.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use crate::error::SessionError;
use crate::locks::{lock, wait_timeout_while, wait_while};
use crate::node::descriptors;
use crate::node::memory_file::SharedFile;
use crate::timing::WORKER_BACKLOG;
use crate::wire::{Body, Control, Message, Outbox};

/// How long the result of a short task may wait for the next task's while more tasks are queued.
const LINGER: Duration = Duration::from_micros(300);
/// Nanoseconds up to which a task is short in that sense.
const SHORT_TASK_NANOS: u64 = 200_000;
/// So many results are sent without waiting for more; a quarter of the tasks that wait if those are more.
const MIN_RESULT_BATCH: usize = 4;

/// Files that may wait until the agent has taken them. The system bounds the descriptors of all of a user's processes that are
/// on their way together, often by 1,024.
const MAX_UNTAKEN_FILES: usize = 16;

/// A result, and the files that its blobs are, in their order.
#[derive(Debug, Default)]
pub struct Answer {
    pub message: Message,
    pub files: Vec<SharedFile>,
}

impl From<Message> for Answer {
    fn from(message: Message) -> Self {
        Self { message, files: Vec::new() }
    }
}

/// What is to be sent.
#[derive(Debug, Default)]
pub struct Unsent {
    outbox: Outbox,
    /// What is in the outbox must not wait for more.
    urgent: bool,
    /// How much was put into the outbox since it was empty.
    batch: usize,
    /// The files of results in the outbox, whose descriptors are sent with the next block.
    files: Vec<OwnedFd>,
    /// The bytes of all files that were put here.
    handed: u64,
    /// Those of them that the agent has taken.
    taken: u64,
    /// What `handed` was after each file that the agent has not taken.
    untaken: VecDeque<u64>,
}

impl Unsent {
    /// Return whether the thread that ends a task has to wait before its result is added.
    fn is_full(&self) -> bool {
        self.outbox.bytes() > WORKER_BACKLOG
            || self.handed.saturating_sub(self.taken) > WORKER_BACKLOG as u64
            || self.untaken.len() > MAX_UNTAKEN_FILES
    }
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct ResultSender {
    unsent: Mutex<Unsent>,
    /// Notified when there is something to send, or it has become urgent.
    result_ready: Condvar,
    /// Notified when results may be added again.
    result_sent: Condvar,
}

impl ResultSender {
    /// Send what must not wait for more.
    pub fn send_now(&self, add: impl FnOnce(&mut Outbox)) {
        self.add(lock(&self.unsent), true, add);
    }

    /// Lock for [`ResultSender::send_result`]. Waits while more than [`WORKER_BACKLOG`] bytes are unsent, or in files that
    /// the agent has not taken.
    pub fn room(&self) -> MutexGuard<'_, Unsent> {
        wait_while(&self.result_sent, lock(&self.unsent), |unsent| unsent.is_full())
    }

    /// As [`ResultSender::room`], but returns nothing where that would wait.
    pub fn try_room(&self) -> Option<MutexGuard<'_, Unsent>> {
        Some(lock(&self.unsent)).filter(|unsent| !unsent.is_full())
    }

    /// Send a result, together with the next ones if its task was short and others wait.
    pub fn send_result(&self, mut unsent: MutexGuard<'_, Unsent>, answer: Answer, waiting: usize) {
        let Answer { message: result, files } = answer;
        let urgent =
            waiting == 0 || result.nanos > SHORT_TASK_NANOS || unsent.batch + 1 >= MIN_RESULT_BATCH.max(waiting / 4);
        let sizes: Vec<_> = files.iter().map(|file| file.size() as u64).collect();
        for size in &sizes {
            unsent.handed += size;
            let handed = unsent.handed;
            unsent.untaken.push_back(handed);
        }
        unsent.files.extend(files.into_iter().map(OwnedFd::from));
        self.add(unsent, urgent, |outbox| {
            let number = result.id.task;
            for size in sizes {
                outbox.control(Control::Descriptor { number, size });
            }
            outbox.message(Body::Result, result);
        });
    }

    /// Note how many bytes of files the agent has taken in all.
    pub fn taken(&self, bytes: u64) {
        let mut unsent = lock(&self.unsent);
        unsent.taken = bytes;
        while unsent.untaken.front().is_some_and(|handed| *handed <= bytes) {
            unsent.untaken.pop_front();
        }
        drop(unsent);
        self.result_sent.notify_all();
    }

    /// Add to what is sent. The writer sends at once what is urgent, anything else after [`LINGER`] at the latest.
    fn add(&self, mut unsent: MutexGuard<'_, Unsent>, urgent: bool, add: impl FnOnce(&mut Outbox)) {
        let wake = unsent.outbox.is_empty() || (urgent && !unsent.urgent);
        add(&mut unsent.outbox);
        unsent.batch += 1;
        unsent.urgent |= urgent;
        drop(unsent);
        if wake {
            self.result_ready.notify_one();
        }
    }

    /// Write what is to be sent to the socket, until that fails.
    pub fn write(&self, socket: &UnixStream) -> Result<(), SessionError> {
        let mut out = Vec::new();
        loop {
            out.clear();
            let files = self.fill(&mut out)?;
            descriptors::write_all(socket, &out, &files)?;
        }
    }

    /// Wait for something to send, and for more if it is not urgent, then take a block of it. Returns the descriptors that
    /// leave with it: those of all results that wait, as their frames may be in this block.
    fn fill(&self, out: &mut Vec<u8>) -> Result<Vec<OwnedFd>, SessionError> {
        let unsent = wait_while(&self.result_ready, lock(&self.unsent), |unsent| unsent.outbox.is_empty());
        let mut unsent = wait_timeout_while(&self.result_ready, unsent, LINGER, |unsent| !unsent.urgent);
        unsent.outbox.fill(out)?;
        if unsent.outbox.is_empty() {
            unsent.urgent = false;
            unsent.batch = 0;
        } else {
            // More than a block: there is nothing to wait for.
            unsent.urgent = true;
        }
        let files = std::mem::take(&mut unsent.files);
        if !unsent.is_full() {
            self.result_sent.notify_all();
        }
        Ok(files)
    }
}
