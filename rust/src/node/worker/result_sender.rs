//! What a worker process sends to its agent: results, which travel together while short tasks follow one another, and
//! answers, which never wait.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::SessionError;
use crate::timing::WORKER_BACKLOG;
use crate::wire::{Body, Message, Outbox, lock};

/// How long the result of a short task may wait for the next task's while more tasks are queued.
const LINGER: Duration = Duration::from_micros(300);
/// Nanoseconds up to which a task is short in that sense.
const SHORT_TASK_NANOS: u64 = 200_000;
/// So many results are sent without waiting for more; a quarter of the tasks that wait if those are more.
const MIN_RESULT_BATCH: usize = 4;

/// What is to be sent.
#[derive(Debug, Default)]
pub struct Unsent {
    outbox: Outbox,
    /// What is in the outbox must not wait for more.
    urgent: bool,
    /// How much was put into the outbox since it was empty.
    batch: usize,
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

    /// Lock for [`ResultSender::send_result`]. Waits while more than [`WORKER_BACKLOG`] bytes are unsent.
    pub fn room(&self) -> MutexGuard<'_, Unsent> {
        let unsent = lock(&self.unsent);
        let full = |unsent: &mut Unsent| unsent.outbox.bytes() > WORKER_BACKLOG;
        self.result_sent.wait_while(unsent, full).unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`ResultSender::room`], but returns nothing where that would wait.
    pub fn try_room(&self) -> Option<MutexGuard<'_, Unsent>> {
        Some(lock(&self.unsent)).filter(|unsent| unsent.outbox.bytes() <= WORKER_BACKLOG)
    }

    /// Send a result, together with the next ones if its task was short and others wait.
    pub fn send_result(&self, unsent: MutexGuard<'_, Unsent>, result: Message, waiting: usize) {
        let urgent =
            waiting == 0 || result.nanos > SHORT_TASK_NANOS || unsent.batch + 1 >= MIN_RESULT_BATCH.max(waiting / 4);
        self.add(unsent, urgent, |outbox| outbox.message(Body::Result, result));
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
    pub fn write(&self, mut socket: UnixStream) -> Result<(), SessionError> {
        let mut out = Vec::new();
        loop {
            out.clear();
            self.fill(&mut out)?;
            socket.write_all(&out)?;
        }
    }

    /// Wait for something to send, and for more if it is not urgent, then take a block of it.
    fn fill(&self, out: &mut Vec<u8>) -> Result<(), SessionError> {
        let unsent = self
            .result_ready
            .wait_while(lock(&self.unsent), |unsent| unsent.outbox.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        let (mut unsent, _) = self
            .result_ready
            .wait_timeout_while(unsent, LINGER, |unsent| !unsent.urgent)
            .unwrap_or_else(PoisonError::into_inner);
        unsent.outbox.fill(out)?;
        if unsent.outbox.is_empty() {
            unsent.urgent = false;
            unsent.batch = 0;
        } else {
            // More than a block: there is nothing to wait for.
            unsent.urgent = true;
        }
        if unsent.outbox.bytes() <= WORKER_BACKLOG {
            self.result_sent.notify_all();
        }
        Ok(())
    }
}
