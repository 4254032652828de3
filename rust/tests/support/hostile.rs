//! A scripted node behind the embedded server, which sends any frames to the client.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use crate::hello::client_hello;
use bytes::Bytes;
use skyward_lite::client::pool::{Endpoint, NodeSpec, Pool};
use skyward_lite::transport::auth::{Identity, new_key};
use skyward_lite::transport::host_key::HostKeys;
use skyward_lite::transport::server;
use skyward_lite::transport::ssh::{Algorithms, RekeyLimits, Target};
use skyward_lite::wire::{self, AgentHello, ClientHello, Control, MAX_BLOCK, Packer, WorkerSpec, put_preamble};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bound on a node's start.
const BOUND: Duration = Duration::from_secs(60);
pub const FIRST: u8 = 1;
pub const LAST: u8 = 2;
pub const READY: u8 = 2;
pub const HEARTBEAT: u8 = 3;
pub const ACKNOWLEDGE: u8 = 6;
pub const TASK: u8 = 11;
pub const RESULT: u8 = 12;
pub const OUTPUT: u8 = 14;
pub const NOTE: u8 = 16;

pub fn frame(raw: &mut Vec<u8>, kind: u8, flags: u8, task: u64, body: &[u8]) {
    raw.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
    raw.extend([kind, flags, 0, 0]);
    raw.extend(task.to_le_bytes());
    raw.extend(body);
}

/// The head of a message with parts of these lengths, and `bytes` of them in the same frame.
pub fn head(lens: &[u64], bytes: usize) -> Vec<u8> {
    let mut head = vec![0, 0];
    head.extend(u16::try_from(lens.len()).unwrap().to_le_bytes());
    head.extend([0; 20]);
    for len in lens {
        head.extend(len.to_le_bytes());
    }
    head.resize(head.len() + bytes, 0);
    head
}

/// As many of the frames that `next` makes as fit a block.
pub fn full(mut next: impl FnMut(&mut Vec<u8>)) -> Vec<u8> {
    let mut raw = Vec::new();
    loop {
        let before = raw.len();
        next(&mut raw);
        if raw.len() > MAX_BLOCK {
            raw.truncate(before);
            return raw;
        }
    }
}

fn hello_of(concurrency: Option<usize>) -> ClientHello {
    let hello = client_hello(1, false);
    let worker = WorkerSpec { concurrency, ..hello.worker };
    ClientHello { node: "hostile".to_owned(), worker, ..hello }
}

/// The frames of a scripted node: blocks of raw frames, any number of them.
pub type Script = Box<dyn Iterator<Item = Vec<u8>> + Send>;

/// How a scripted node begins.
pub struct Opening {
    /// Frames before its hello.
    pub first: Script,
    pub cores: usize,
    pub slots: Option<u64>,
}

impl Default for Opening {
    fn default() -> Self {
        Self { first: Box::new(std::iter::empty()), cores: 1, slots: Some(1) }
    }
}

/// Send a hello, and the frames of the opening and of the script.
async fn follow(opening: Opening, script: Script, mut to: impl AsyncWrite + Unpin) -> std::io::Result<()> {
    let hello = AgentHello {
        version: "0".to_owned(),
        python: "3.11".to_owned(),
        epoch: "1".to_owned(),
        cores: opening.cores,
        pid: 1,
        memory: 0,
        socket: None,
        boot: String::new(),
        notices: Vec::new(),
        packages: BTreeMap::new(),
    };
    let mut begin = Vec::new();
    wire::hello(&hello).unwrap().put(&mut begin).unwrap();
    if let Some(slots) = opening.slots {
        frame(&mut begin, READY, 0, slots, &[]);
    }
    let mut end = Vec::new();
    Control::Goodbye(Bytes::from_static(b"the script is over")).put(&mut end).unwrap();
    let mut blocks = opening.first.chain([begin]).chain(script).chain([end]);
    let (mut wire, mut packer) = (Vec::new(), Packer::default());
    put_preamble(&mut wire);
    // A script may wait for the test.
    while let (rest, Some(raw)) = tokio::task::spawn_blocking(|| {
        let raw = blocks.next();
        (blocks, raw)
    })
    .await
    .unwrap()
    {
        blocks = rest;
        packer.pack(&raw, &mut wire);
        for piece in wire.chunks(32 * 1024) {
            to.write_all(piece).await?;
        }
        wire.clear();
    }
    to.flush().await?;
    to.shutdown().await?;
    tokio::time::sleep(Duration::from_secs(20)).await;
    Ok(())
}

/// Add a node to the pool that follows a script, and sends a goodbye at its end. It stops when the client has left.
pub fn add_hostile(pool: &Pool, asked: Option<usize>, opening: Opening, script: Script) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (host_key, user_key) = (new_key().unwrap(), new_key().unwrap());
    let (host_public, authorized) = (host_key.public_key().clone(), user_key.public_key().clone());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        drop(runtime.block_on(async {
            theirs.set_nonblocking(true).unwrap();
            let socket = tokio::net::UnixStream::from_std(theirs).unwrap();
            let accepted =
                server::accept(socket, host_key, authorized, RekeyLimits::default(), Duration::from_secs(20))
                    .await
                    .unwrap();
            let (mut from, to) = tokio::io::split(accepted.stream);
            let reading = async {
                let mut buffer = vec![0; 1 << 16];
                while from.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = reading => Ok(()),
                written = follow(opening, script, to) => written,
            }
        }));
    });
    let target = Target {
        user: "root".to_owned(),
        host_keys: HostKeys { known: vec![host_public], ..HostKeys::default() },
        algorithms: Algorithms::default(),
        identities: vec![Identity::Key(Arc::new(user_key))],
        rekey: RekeyLimits::default(),
        timeout: Duration::from_secs(20),
    };
    let id = pool.add_node("hostile".to_owned(), false);
    let connection = Arc::new(pool.connect(Endpoint::Socket(ours), target).unwrap());
    let spec = NodeSpec {
        connection,
        command: String::new(),
        stripe: None,
        again: None,
        hello: hello_of(asked),
        ready_timeout: BOUND,
    };
    pool.start_node(id, spec);
}
