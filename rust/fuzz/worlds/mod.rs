//! The two deciders, each with hostile peers, and the two ends of a session whose connections are cut, driven by a script of
//! bytes: what the fuzzer changes, and what
//! `rust/tests/worlds.rs` makes at random.
//!
//! A peer's frames are forged from the script, packed into blocks, perhaps broken, cut into pieces, and read by a decoder as
//! in a session. So a hello that is missing or comes twice, a length that lies, a number that was never given and a block
//! that unpacks to much more are all in it.
#![allow(dead_code)] // not every target needs all of it

pub mod agent;
pub mod client;
pub mod forge;
pub mod resume;
pub mod script;
