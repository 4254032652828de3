//! A byte stream to a machine, and commands there.
//!
//! [`connection`] is what the client holds: [`ssh`], with [`host_key`] (is this the host?) and [`auth`] (who are we?), or
//! [`command`], a process of this machine that leads to the other one. [`server`] is the embedded far end of `Local()`. Both ends write through [`buffered`]; `tcp.rs` makes
//! the sockets.

pub mod auth;
pub mod buffered;
pub mod command;
pub mod connection;
pub mod host_key;
pub mod identities;
pub mod output;
pub mod server;
pub mod ssh;
mod tcp;
