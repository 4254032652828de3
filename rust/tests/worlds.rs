//! Random bytes for the deciders at both ends: what the fuzzer does for hours (`rust/fuzz`), for a second.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use proptest::prelude::*;

#[path = "support/hello.rs"]
mod support;
#[path = "../fuzz/worlds/mod.rs"]
mod worlds;

/// How many cases there are; the environment can ask for more.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(1500)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever nodes send and callers do: each task ends once, nothing is taken from a node that it did not have, and the
    /// state agrees with itself.
    #[test]
    fn hostile_nodes(script in prop::collection::vec(any::<u8>(), 0..3000)) {
        worlds::client::run(&script);
    }

    /// Whatever is cut, and wherever: each frame arrives once, with its bytes, and control frames in their order.
    #[test]
    fn connections_that_are_cut(script in prop::collection::vec(any::<u8>(), 0..600)) {
        worlds::resume::run(&script);
    }

    /// Whatever a client and workers send: no task ends more often than it came, no worker survives the agent, and the state
    /// agrees with itself.
    #[test]
    fn hostile_clients_and_workers(script in prop::collection::vec(any::<u8>(), 0..3000)) {
        worlds::agent::run(&script);
    }
}
/// What the fuzzer found once is not found again.
#[test]
fn scripts_that_once_failed() {
    for (name, run) in
        [("client", worlds::client::run as fn(&[u8])), ("agent", worlds::agent::run), ("resume", worlds::resume::run)]
    {
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        for script in std::fs::read_dir(directory).into_iter().flatten() {
            run(&std::fs::read(script.unwrap().path()).unwrap());
        }
    }
}
