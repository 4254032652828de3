//! The core's part of the user's process.
//!
//! | file | what it promises |
//! |---|---|
//! | `dispatch.rs` | PURE: calls, node events and ticks in; frames to send, ended tasks and changed states out |
//! | `arrivals.rs` | its half that nodes drive: their frames and heartbeats |
//! | `absence.rs` | its half for nodes that are away, come back, or are lost |
//! | `sending.rs` | its half that sends: tasks, their blobs, and requests about them |
//! | `activity.rs` | PURE: counters, and a record of each ended attempt, for those who watch a run |
//! | `blobs.rs` | PURE: which blobs a node has, and what it is to forget |
//! | `contents.rs` | the large buffers of tasks, each distinct content once |
//! | `wakeups.rs` | PURE: when the I/O thread is woken for a submitted task |
//! | `liveness.rs` | PURE: when a node has not done for too long what it was asked to do |
//! | `io.rs` | the lock around the decider; carries its actions out |
//! | `pool.rs` | the calls from Python, and the I/O thread |
//! | `watching.rs` | how the pool stands and what it has done, for callers |
//! | `command.rs` | a command that runs on a machine to its end, and what it prints |
//! | `session.rs` | one node's connection, from the first byte to the last |
//! | `reattach.rs` | a session whose connection was lost goes on over another one |
//! | `stripes.rs` | further channels of a node's SSH connection, for blobs, where the round trip is long |
//! | `node.rs` | a node and its states |
//! | `packages.rs` | PURE: whether a node has the packages that tasks have named |
//! | `completions.rs`, `inbox.rs` | ended tasks, output and notes, until they are taken |

mod absence;
pub mod activity;
mod arrivals;
pub mod blobs;
mod command;
pub mod completions;
pub mod contents;
pub mod dispatch;
pub mod inbox;
mod io;
pub mod liveness;
pub mod node;
pub mod packages;
pub mod pool;
pub mod reattach;
mod sending;
pub mod session;
pub mod stripes;
pub mod wakeups;
pub mod watching;
