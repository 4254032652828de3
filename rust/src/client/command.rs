//! Commands that run on a machine to their end, while the caller waits and sees what they print.

use std::mem::take;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;

use crate::client::pool::Pool;
use crate::error::{NodeError, SshError};
use crate::locks::lock;
use crate::transport::connection::Connection;
use crate::transport::output::CommandOutput;

/// Pause between two looks at what a command has printed: a person reads no faster.
const OUTPUT_POLL: Duration = Duration::from_millis(250);

impl Pool {
    /// Run a command to its end. Waits for it, at most for `bound`.
    ///
    /// # Errors
    /// As [`Pool::connect`].
    pub fn run(
        &self,
        connection: Arc<Connection>,
        command: String,
        input: Bytes,
        bound: Duration,
    ) -> Result<CommandOutput, NodeError> {
        self.wait(async move {
            let ended = tokio::time::timeout(bound, connection.run(&command, input)).await;
            Ok(ended.map_err(|_| SshError::Command { command, seconds: bound.as_secs() })??)
        })
    }

    /// As [`Pool::run`]. `watch` is called on this thread, a few times per second at most, with what the command has printed
    /// since the last call: standard output and standard error. It sees no more than [`CommandOutput`] stores. If it returns
    /// false, the command is given up.
    ///
    /// # Errors
    /// As [`Pool::connect`]; `None` if `watch` has returned false.
    pub fn run_watched(
        &self,
        connection: Arc<Connection>,
        command: String,
        input: Bytes,
        bound: Duration,
        mut watch: impl FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<Option<CommandOutput>, NodeError> {
        let output = Arc::<Mutex<CommandOutput>>::default();
        let (done, waiting) = sync_channel(1);
        let stored = Arc::clone(&output);
        let running = self.spawn(async move {
            let ended = tokio::time::timeout(bound, connection.run_into(&command, input, &stored)).await;
            let timed_out = |_| SshError::Command { command, seconds: bound.as_secs() };
            drop(done.send(ended.map_err(timed_out).flatten()));
        });
        let (mut stdout, mut stderr) = (0, 0);
        loop {
            let ended = match waiting.recv_timeout(OUTPUT_POLL) {
                Ok(ended) => Some(ended.map_err(NodeError::from)),
                Err(RecvTimeoutError::Timeout) => None,
                // A runtime that has ended drops the work, and `done` with it.
                Err(RecvTimeoutError::Disconnected) => Some(Err(NodeError::Closed)),
            };
            let new = {
                let output = lock(&output);
                (unseen(&output.stdout, &mut stdout), unseen(&output.stderr, &mut stderr))
            };
            let is_new = !new.0.is_empty() || !new.1.is_empty();
            if is_new && !watch(&new.0, &new.1) {
                running.abort();
                return Ok(None);
            }
            if let Some(ended) = ended {
                return ended.map(|()| Some(take(&mut *lock(&output))));
            }
        }
    }
}

/// Return the bytes after the first `seen`, which become seen.
fn unseen(bytes: &[u8], seen: &mut usize) -> Vec<u8> {
    let new = bytes.get(*seen..).unwrap_or_default().to_vec();
    *seen = bytes.len();
    new
}
