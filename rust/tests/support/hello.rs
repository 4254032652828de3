//! What a client and an agent tell of themselves.

use std::collections::BTreeMap;

use skyward_lite::timing::MAX_MESSAGE;
use skyward_lite::wire::{AgentHello, ClientHello, WorkerSpec};

/// A client that wants a node of so many slots.
pub fn client_hello(slots: usize, processes: bool) -> ClientHello {
    ClientHello {
        version: "0".to_owned(),
        run: "test".to_owned(),
        node: "tested".to_owned(),
        python: "3.11".to_owned(),
        lease_ms: 60_000,
        generation: 0,
        resumable: false,
        worker: WorkerSpec {
            concurrency: Some(slots),
            processes,
            env: BTreeMap::new(),
            sys_path: Vec::new(),
            shares_files: false,
            serves_modules: false,
            preload: Vec::new(),
            max_payload: MAX_MESSAGE,
            cache_bytes: None,
            task_timeout_ms: None,
            context: String::new(),
            setup: String::new(),
            unwind: false,
        },
    }
}

/// An agent of the same version and Python as that client.
#[allow(dead_code)] // Only some of the tests that share this file have an agent of their own.
pub fn agent_hello() -> AgentHello {
    AgentHello {
        version: "0".to_owned(),
        python: "3.11".to_owned(),
        epoch: "1".to_owned(),
        cores: 1,
        pid: 1,
        memory: 0,
        socket: None,
        boot: String::new(),
        notices: Vec::new(),
        packages: BTreeMap::new(),
    }
}
