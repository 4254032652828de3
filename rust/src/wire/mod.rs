//! Frames and messages, and a byte stream that carries them. Both ends use it.

pub mod flood;
mod frame;
mod session;

pub use frame::*;
pub use session::*;
