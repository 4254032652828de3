//! The core of `skyward_lite`: what lies between a pickled task and the worker process that runs it.
//!
//! A task travels down this list and its result back up; imports point the same way.
//!
//! 1. `python` (`python.rs`, built for the extension only) is the boundary: the only file that names pyo3.
//!    It turns arguments into bytes and lets go of the GIL.
//! 2. [`pool`] is the client: it appends the task to its queue, keeps a session with every node, and collects what has
//!    ended, lane by lane: futures have one, each call of `Parallel` another. One I/O thread serves all nodes; callers'
//!    threads never wait for it.
//! 3. [`queue`] says which peer gets which task. It is pure, and used twice: nodes at the client, workers in the agent.
//!    [`liveness`] says when a node has not done for too long what it was asked.
//! 4. [`session`] says in which order things are sent, who the two ends are, and when one of them is gone.
//! 5. [`frame`] is the wire: blocks, frames, chunks, lz4, and every cap. It is pure and fuzzed.
//! 6. [`ssh`] is the client's end of the encrypted connection, [`server`] the embedded far end that `Local()` uses
//!    where another node has OpenSSH's `sshd`. [`identities`] reads the user's keys as OpenSSH keeps them.
//! 7. [`agent`] is the node: it runs no user code, hands tasks out and keeps results until the client has acknowledged
//!    them. When it learns that it will soon be gone it says so ([`agent::drain`]). `crew` is what it does with its
//!    worker processes: it starts, follows, blames and replaces them. [`output`] sends on what they print
//!    ([`flood`] bounds it here and at the client), and [`group`] is what ends with each of them.
//! 8. [`worker`] is the part of a worker process that needs no GIL: reading, writing, and ending the process group
//!    when the agent is gone or the lease is over. [`table`] is where it notes what it runs, for the agent to read.
//!
//! [`error`] has one type per stage; [`text`] makes harmless what a node says before it is shown. Nothing here waits without a bound: connecting has `connect_timeout`, a silent
//! peer is lost after [`session::PEER_TIMEOUT`], a write that blocks for as long fails, and a node works on without its
//! client no longer than the lease.

pub mod client;
pub mod error;
mod locks;
pub mod node;
#[cfg(feature = "python")]
mod python;
pub mod queue;
pub mod text;
pub mod timing;
pub mod transport;
pub mod wire;
