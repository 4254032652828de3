//! A byte stream to a machine, and commands there.

pub mod identities;
pub mod server;
pub mod ssh;
