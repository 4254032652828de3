//! What runs in the user's process.

mod arrivals;
pub mod completions;
pub mod dispatch;
pub mod inbox;
mod io;
pub mod liveness;
pub mod node;
pub mod pool;
pub mod session;
pub mod wakeups;
