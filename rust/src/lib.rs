pub mod agent;
pub mod error;
pub mod frame;
pub mod pool;
#[cfg(feature = "python")]
mod python;
pub mod queue;
pub mod server;
pub mod session;
pub mod ssh;
pub mod worker;
