//! A session whose connections are cut anywhere: see `worlds/resume.rs`.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../worlds/memory.rs"]
mod memory;
#[path = "../../tests/support/hello.rs"]
mod support;
#[path = "../worlds/mod.rs"]
mod worlds;

fuzz_target!(|data: &[u8]| memory::bounded(data.len(), || worlds::resume::run(data)));
