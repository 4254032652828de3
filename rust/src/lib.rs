//! The core of `skyward_lite`: everything between a pickled task and the worker process that runs it.
//!
//! The folders say where the code runs. A task travels down this list and its result back up; imports point the same way,
//! and [`client`] and [`node`] never name each other.
//!
//! | room | promise |
//! |---|---|
//! | `python/` | The border with Python, built for the extension only. It turns arguments into bytes and releases the GIL. |
//! | [`client`] | The user's process. [`client::dispatch`] decides (pure), [`client::pool`] offers the calls, and one I/O thread serves all nodes; callers' threads never wait for it. |
//! | [`queue`] | Which peer gets which task. Pure, and used twice: nodes at the client, workers in the agent. |
//! | [`wire`] | Frames, messages and every cap, pure and fuzzed; and the byte stream that carries them. |
//! | [`transport`] | The encrypted connection to a machine, and commands there; the embedded server of `Local()`. |
//! | [`node`] | A node. The agent runs no user code: [`node::state`] decides (pure), [`node::agent`] carries it out. [`node::worker`] is the part of a worker process that needs no GIL. |
//!
//! [`timing`] has the intervals and limits that processes must agree on, [`error`] one type per stage, and [`text`] makes
//! harmless what a node says before it is shown. [`pages`] finds memory for large buffers.
//!
//! Nothing here waits without a bound: connecting has `connect_timeout`, a silent peer is lost after
//! [`timing::Timing::peer_timeout`], a write that blocks for as long fails, and a node works on without its client no longer
//! than the lease.

#[cfg(not(unix))]
compile_error!("skyward_lite runs on Linux and macOS; on Windows build it within WSL, the Windows Subsystem for Linux");

pub mod client;
pub mod error;
mod locks;
pub mod node;
pub mod pages;
#[cfg(feature = "python")]
mod python;
pub mod queue;
pub mod text;
pub mod timing;
pub mod transport;
pub mod wire;
