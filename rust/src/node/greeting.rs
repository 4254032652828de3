//! The answer to the client's hello: what this node is, and whether it serves the client.

use std::collections::BTreeMap;

use crate::node::limits::memory;
use crate::wire::{AgentHello, ClientHello};

/// What an agent must be told that it cannot find out.
#[derive(Debug, Clone)]
pub struct AgentSpec {
    /// The command that starts a worker; its standard input is the socket to us.
    pub worker: Vec<String>,
    /// The version of our package.
    pub version: String,
    /// The node's Python, "3.11".
    pub python: String,
    /// Names this life of the agent.
    pub epoch: String,
    /// The node's distributions: normalized name → version.
    pub packages: BTreeMap<String, String>,
    /// A private directory of this agent, where its workers run and may keep files; `None` where they share the client's.
    pub directory: Option<String>,
    /// What the client's log is to say of this node, a sentence each.
    pub notices: Vec<String>,
    /// Cores that it may use, if it sees more than it may.
    pub cores: Option<usize>,
}

/// Return why a client is not served, if it is not.
pub fn refusal(client: &ClientHello, spec: &AgentSpec) -> Option<String> {
    (client.python != spec.python).then(|| {
        format!(
            "the client runs Python {}, this node Python {}: functions pickled by one do not run in the other",
            client.python, spec.python
        )
    })
}

/// Return what the client is told of this node.
pub fn answer(spec: &AgentSpec) -> AgentHello {
    AgentHello {
        version: spec.version.clone(),
        python: spec.python.clone(),
        epoch: spec.epoch.clone(),
        cores: cores(spec.cores),
        pid: std::process::id(),
        memory: memory(),
        socket: None,
        boot: boot(),
        notices: spec.notices.clone(),
        packages: spec.packages.clone(),
    }
}

/// Return the host's number of this boot; empty if it is not known.
pub fn boot() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim_ascii().to_owned()
}

/// Return the cores that this process may use, and no more than `most`.
pub fn cores(most: Option<usize>) -> usize {
    let visible = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    most.map_or(visible, |most| visible.min(most).max(1))
}
