//! The intervals, bounds and byte limits that several processes, or both wings, must agree on. Pure.
//!
//! # Leaving a pool
//!
//! The client waits for its agents, which wait for their workers; so each bound must exceed the sum of the bounds that
//! it contains. The unit test at the end of this file adds them up.
//!
//! | who waits | for what | bound | contains | slack |
//! |---|---|---|---|---|
//! | worker | its interpreter: plugins' contexts, threads, `atexit` | [`Timing::worker_exit`], 2 s | | |
//! | agent | workers that it told to end, before it kills them | [`Timing::worker_exit`], 2 s | the worker | none |
//! | agent | workers that it killed | [`Timing::worker_kill`], 1 s | | |
//! | agent | the client, which closes the session after the goodbye | [`Timing::agent_goodbye`], 1 s | | |
//! | client | the goodbyes of all its nodes | [`Timing::client_goodbye`], 5 s | the agent: 2 + 1 + 1 s | 1 s |
//! | client | the threads of its runtime | [`Timing::runtime_shutdown`], 0.5 s | | |
//! | pool (Python) | the end of the nodes' machines | [`Timing::provider_leave`], 6.5 s | the client: 5 + 0.5 s | 1 s |
//!
//! The last one is `Provider.leave`. Its time begins before the client says goodbye; `Provider.stop` gets the rest of
//! it, but at least half a second. A provider whose machines take longer to end, as those of AWS do, has a `leave` of
//! its own. Callbacks of futures, which are the user's code, are waited for beside these bounds (`JOIN_SECONDS`
//! in `client/pool.py`).

use std::time::Duration;

/// Bytes of prefetched payload (beyond the tasks that fill its slots) that a node or a worker may hold.
pub const WINDOW: usize = 64 * 1024 * 1024;
/// Default cap of one message's payload, in bytes.
pub const MAX_MESSAGE: usize = 4 << 30;
/// A message up to this size, in bytes, is taken whatever the user's limit is: the text of an error has a cap of its
/// own.
pub const LEAST_MESSAGE: usize = 1024 * 1024;
/// A buffer of at least so many bytes is a blob: it crosses to a node once, however many tasks have it. A smaller one
/// travels with each task, which costs less than a file of its own on the node.
pub const BLOB_BYTES: usize = 128 * 1024;
/// Further channels of one SSH connection that carry blobs, at most. OpenSSH's server allows ten sessions on a connection
/// (`MaxSessions`): these, that of the node's own channel, and one more.
pub const MAX_STRIPES: usize = 8;
/// Bytes of results that a node may have sent without an acknowledgement: of small ones, and as many of large ones. A result
/// that is larger travels alone among the large ones.
pub const CREDIT: usize = 64 * 1024 * 1024;
/// Memory of notes, in bytes, that a node may have sent without an answer. A note that is larger travels alone.
pub const NOTE_CREDIT: usize = 16 * 1024 * 1024;
/// Bytes of results and notes beyond the credit that an agent stores; with more it stops reading from its workers.
pub const AGENT_BACKLOG: usize = 256 * 1024 * 1024;
/// Bytes of results that a worker stores until the agent reads them; with more, a thread that ends a task has to wait.
pub const WORKER_BACKLOG: usize = 64 * 1024 * 1024;
/// Memory of answers, in bytes, that may wait to be sent to a peer. Only a peer that goes on asking without reading
/// exceeds it: 16 MiB are the answers to a quarter of a million recalls, or a million acknowledgements, which is one
/// for each task that the peer holds, and all of them are sent ahead of tasks.
pub const MAX_ANSWERS: usize = 16 * 1024 * 1024;
/// Payload of the answers to notes, in bytes, that may wait to be sent to a node, alike: a node's worker processes ask one
/// after the other, and an answer has at most 16 MiB.
pub const MAX_ANSWER_BYTES: usize = 256 * 1024 * 1024;
/// Bytes of tasks' output that wait at one end. Of more, the first [`OUTPUT_HEAD`] and the last [`OUTPUT_TAIL`] are
/// kept (see `wire/flood.rs`).
pub const OUTPUT_HEAD: usize = 1024 * 1024;
/// See [`OUTPUT_HEAD`].
pub const OUTPUT_TAIL: usize = 64 * 1024;

/// How often a process tells its peers that it lives, and how long it waits for them. [`Timing::DEFAULT`] is what pools
/// have; [`Timing::faster`] is for tests, which must then give it to both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// How often an end of a session sends a heartbeat.
    pub heartbeat: Duration,
    /// Silence after which the peer is taken for lost, and the longest time for which one write may block.
    pub peer_timeout: Duration,
    /// How often the client and the agent look at what the clock alone changes: deadlines, leases, idle peers.
    pub tick: Duration,
    /// The agent's bound on the client's hello.
    pub hello: Duration,
    /// The client's bound on a node's answer to a heartbeat, a recall, a cancel or an abort. An honest agent answers
    /// the first three at once, and an abort when the task has been ended, which takes it a few seconds. The bound is
    /// as long because the request may wait behind an upload; a longer wait would end the node's lease.
    pub answer: Duration,
    /// The client's bound on a node that announced its departure to end what it runs. EC2 gives two minutes.
    pub drain: Duration,
    /// How long tasks that any node may run stay queued for the node that replaces one that announced its departure: as
    /// long as nodes have to start.
    pub replacement: Duration,
    /// How long after the end of a node's lease, as the client knows it, the client takes the node's attempts for ended: the
    /// agent looks at its lease each [`Timing::tick`], workers end with it, and clocks differ by little.
    pub lease_grace: Duration,
    /// The client's bound on one try to go on with a session on a new connection.
    pub attach: Duration,
    /// A worker's bound on its own exit, and the agent's on the exits that it asked for.
    pub worker_exit: Duration,
    /// The agent's bound on the exits of the workers that it killed.
    pub worker_kill: Duration,
    /// The agent's bound on its goodbye to the client.
    pub agent_goodbye: Duration,
    /// The client's bound on its goodbye to all nodes.
    pub client_goodbye: Duration,
    /// The client's bound on the threads of its runtime, after the goodbyes.
    pub runtime_shutdown: Duration,
    /// `Provider.leave` in Python.
    pub provider_leave: Duration,
}

impl Timing {
    /// The timing of pools.
    pub const DEFAULT: Self = Self {
        heartbeat: Duration::from_secs(2),
        peer_timeout: Duration::from_secs(10),
        tick: Duration::from_millis(200),
        hello: Duration::from_secs(20),
        answer: Duration::from_secs(60),
        drain: Duration::from_secs(600),
        replacement: Duration::from_secs(600),
        lease_grace: Duration::from_secs(5),
        attach: Duration::from_secs(20),
        worker_exit: Duration::from_secs(2),
        worker_kill: Duration::from_secs(1),
        agent_goodbye: Duration::from_secs(1),
        client_goodbye: Duration::from_secs(5),
        runtime_shutdown: Duration::from_millis(500),
        provider_leave: Duration::from_millis(6500),
    };

    /// Return the timing in which everything takes a `by`th of the time.
    #[must_use]
    pub fn faster(&self, by: u32) -> Self {
        let by = by.max(1);
        Self {
            heartbeat: self.heartbeat / by,
            peer_timeout: self.peer_timeout / by,
            tick: self.tick / by,
            hello: self.hello / by,
            answer: self.answer / by,
            drain: self.drain / by,
            replacement: self.replacement / by,
            lease_grace: self.lease_grace / by,
            attach: self.attach / by,
            worker_exit: self.worker_exit / by,
            worker_kill: self.worker_kill / by,
            agent_goodbye: self.agent_goodbye / by,
            client_goodbye: self.client_goodbye / by,
            runtime_shutdown: self.runtime_shutdown / by,
            provider_leave: self.provider_leave / by,
        }
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Return the steps in which a wait of at most `bound` is counted. A stop of this process, as by a debugger or a
/// suspended laptop, then counts as one step and not as the peer's silence.
#[must_use]
pub fn wait_step(bound: Duration) -> Duration {
    bound / 10
}

/// [`Timing::heartbeat`] of pools.
pub const HEARTBEAT: Duration = Timing::DEFAULT.heartbeat;
/// [`Timing::peer_timeout`] of pools.
pub const PEER_TIMEOUT: Duration = Timing::DEFAULT.peer_timeout;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bound_of_leaving_exceeds_the_sum_of_those_that_it_contains() {
        for timing in [Timing::DEFAULT, Timing::DEFAULT.faster(10)] {
            let agent = timing.worker_exit + timing.worker_kill + timing.agent_goodbye;
            assert!(timing.client_goodbye > agent, "{timing:?}");
            assert!(timing.provider_leave > timing.client_goodbye + timing.runtime_shutdown, "{timing:?}");
        }
    }

    #[test]
    fn a_peer_that_lives_is_heard_several_times_before_it_is_taken_for_lost() {
        assert!(Timing::DEFAULT.peer_timeout >= 4 * Timing::DEFAULT.heartbeat);
        assert!(Timing::DEFAULT.tick < Timing::DEFAULT.heartbeat && wait_step(PEER_TIMEOUT) < HEARTBEAT);
    }
}
