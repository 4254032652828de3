//! What runs in the user's process.

pub mod liveness;
pub mod pool;
