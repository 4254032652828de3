//! The client's decider among hostile nodes and callers who do anything: see `worlds/client.rs`.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../worlds/memory.rs"]
mod memory;
#[path = "../../tests/support/hello.rs"]
mod support;
#[path = "../worlds/mod.rs"]
mod worlds;

fuzz_target!(|data: &[u8]| memory::bounded(data.len(), || worlds::client::run(data)));
