//! What the ends of a session tell of themselves: the body of the first frame of each direction, in JSON.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::SessionError;
use crate::text;
use crate::wire::control::Control;
use crate::wire::stripe_blocks::ArrivedBlocks;

/// Bytes that are shown of a sentence that a node sent, and of an error in its hello.
pub(super) const MAX_SENTENCE: usize = 500;
/// Bytes of the longest name that a distribution may have.
const MAX_NAME: usize = 200;
/// Bytes that are shown of a distribution's version.
const MAX_VERSION: usize = 100;
/// Sentences that are shown of those that a node sent.
const MAX_SENTENCES: usize = 100;

/// The client's hello to an agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClientHello {
    /// The version of our package at the client.
    pub version: String,
    /// Names the pool.
    pub run: String,
    /// The client's name for this node.
    pub node: String,
    /// The client's Python, "3.11": the node's must be the same.
    pub python: String,
    /// How long the node may go on working without the client, in milliseconds.
    pub lease_ms: u64,
    /// The generation of the client's modules: that of the first workers.
    #[serde(default)]
    pub generation: u32,
    /// Whether the client can go on with the session over another connection, if the agent has a socket for it.
    #[serde(default)]
    pub resumable: bool,
    pub worker: WorkerSpec,
}

/// How an agent runs its workers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(clippy::struct_excessive_bools)] // a record of settings, each of which is on or off for itself
pub struct WorkerSpec {
    /// Tasks at once on the node; `None`: one per core.
    pub concurrency: Option<usize>,
    /// True: `concurrency` processes that run one task at once. False: one process of `concurrency` threads.
    pub processes: bool,
    /// Set in the workers' environment before they start.
    pub env: BTreeMap<String, String>,
    /// The client's import path, for nodes that share its file system.
    pub sys_path: Vec<String>,
    /// Whether the node sees the client's files and processes under the same names.
    #[serde(default)]
    pub shares_files: bool,
    /// Whether workers ask the client for modules that are local there.
    #[serde(default)]
    pub serves_modules: bool,
    /// Modules that a worker imports before it takes tasks.
    pub preload: Vec<String>,
    /// Cap of one message's payload, in bytes.
    pub max_payload: usize,
    /// Bytes of shared data that the node keeps between tasks; `None`: a share of its memory.
    #[serde(default)]
    pub cache_bytes: Option<u64>,
    /// How long one task may run, in milliseconds; `None`: as long as it likes.
    pub task_timeout_ms: Option<u64>,
    /// What the client's program has set for all of its calculations; only the worker's Python part can read it.
    #[serde(default)]
    pub context: String,
    /// What the plugins do in a worker; only its Python part can read it. Empty: nothing.
    pub setup: String,
    /// Whether workers are asked to end, so that the setup can be undone, before they are killed.
    pub unwind: bool,
}

/// An agent's answer to the client's hello.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AgentHello {
    /// The version of our package on the node.
    pub version: String,
    /// The node's Python, "3.11".
    pub python: String,
    /// Names this life of the agent: attempts of another epoch mean nothing to it.
    pub epoch: String,
    /// The node's cores.
    pub cores: usize,
    /// The agent's process.
    pub pid: u32,
    /// The memory that the node's processes may use, in bytes; 0 if it is not known.
    #[serde(default)]
    pub memory: u64,
    /// The path of the socket at which the agent takes further streams of its client (`node/arrivals.rs`): stripes, and the
    /// one that replaces a broken one; `None` if it takes none.
    #[serde(default)]
    pub socket: Option<String>,
    /// The host's number of this boot; empty if it is not known.
    #[serde(default)]
    pub boot: String,
    /// What the client's log is to say of the node, a sentence each.
    #[serde(default, deserialize_with = "read_sentences")]
    pub notices: Vec<String>,
    /// The node's distributions: normalized name → version. Empty if the node does not tell them.
    #[serde(default, deserialize_with = "read_packages")]
    pub packages: BTreeMap<String, String>,
}

/// What either end tells of a session on a new connection: see `resume.rs`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Attach {
    /// As [`AgentHello::epoch`]: of the agent that the client had the session with, and of the agent that is there.
    pub epoch: String,
    /// How many bytes of the stream have arrived at the sender of this. An agent of another epoch has none.
    pub received: u64,
    /// The number of the client's try to go on with the session, from 1 on; 0 from an agent. A try that was given up may reach
    /// the agent after a later one, and is no use then.
    #[serde(default)]
    pub number: u64,
    /// The blocks of stripes that have arrived at the agent.
    #[serde(default)]
    pub blocks: ArrivedBlocks,
    /// As [`AgentHello::boot`]. Empty from a client.
    #[serde(default)]
    pub boot: String,
}

/// An agent's hello to a worker that it starts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WorkerHello {
    /// The client's name for this node.
    pub node: String,
    /// The worker's number in its node. A worker that takes another one's place has a number of its own.
    pub number: u32,
    /// Threads that take tasks.
    pub slots: usize,
    /// As [`ClientHello::lease_ms`].
    pub lease_ms: u64,
    /// The generation of the client's modules whose tasks the process runs.
    pub generation: u32,
    /// A directory of the pool's own on this node; empty where there is none.
    pub directory: String,
    pub work: WorkerSpec,
}

/// Read sentences that a node sent, made harmless and bounded in length and number.
fn read_sentences<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let sentences: Vec<String> = Vec::deserialize(from)?;
    let more = sentences.len().saturating_sub(MAX_SENTENCES);
    let shown = sentences.iter().take(MAX_SENTENCES).map(|sentence| text::line(sentence, MAX_SENTENCE));
    Ok(shown.chain((more > 0).then(|| format!("and {more} more"))).collect())
}

/// Read the distributions that a node sent. An entry whose name cannot be a distribution's is dropped; a version is made
/// harmless and bounded in length. The frame bounds their number.
fn read_packages<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, String>, D::Error> {
    let is_in_name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let is_name = |name: &str| !name.is_empty() && name.len() <= MAX_NAME && name.bytes().all(is_in_name);
    let told: BTreeMap<String, String> = BTreeMap::deserialize(from)?;
    let names = told.into_iter().filter(|(name, _)| is_name(name));
    Ok(names.map(|(name, version)| (name, text::line(version, MAX_VERSION))).collect())
}

/// Write a hello as a control frame.
///
/// # Errors
/// [`SessionError::BadHello`] if it cannot be written as JSON.
pub fn hello<T: Serialize>(value: &T) -> Result<Control, SessionError> {
    json(value).map(Control::Hello)
}

/// As [`hello`], for a session that goes on.
///
/// # Errors
/// As [`hello`].
pub fn attach(value: &Attach) -> Result<Control, SessionError> {
    json(value).map(Control::Attach)
}

fn json<T: Serialize>(value: &T) -> Result<Bytes, SessionError> {
    serde_json::to_vec(value).map(Bytes::from).map_err(|e| SessionError::BadHello(e.to_string()))
}

/// Read the body of a hello.
///
/// # Errors
/// [`SessionError::BadHello`] if a field is missing or of another type.
pub fn read_hello<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, SessionError> {
    serde_json::from_slice(body).map_err(|e| SessionError::BadHello(text::line(e.to_string(), MAX_SENTENCE)))
}
