//! The client against real peers: the embedded server, and OpenSSH's `sshd` on loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![allow(clippy::cast_possible_truncation)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use russh::keys::ssh_key::LineEnding;
use russh::keys::{Algorithm, HashAlg, PrivateKey, PublicKey};
use russh::server::{Auth, VerifiedPublicKey};
use skyward_lite::client::pool::{Endpoint, Node, NodeSpec, NodeState, Pool, QUEUE_SHIFT};
use skyward_lite::node::arrivals::{Arrivals, Streams};
use skyward_lite::node::session::{self, AgentSpec};
use skyward_lite::timing::MAX_MESSAGE;
use skyward_lite::transport::auth::{Identity, new_key};
use skyward_lite::transport::host_key::HostKeys;
use skyward_lite::transport::server;
use skyward_lite::transport::ssh::{Algorithms, RekeyLimits, Target};
use skyward_lite::wire::{self, ClientHello, EventReader, FrameSender};
use skyward_lite::wire::{Attempt, BlobPart, Body, Control, Event, MAX_NOTE, Message, Outcome, Outgoing, Packer};

#[path = "support/hello.rs"]
mod support;
use support::client_hello;

/// Bound on everything here: a hang is a failure with a name.
const BOUND: Duration = Duration::from_secs(60);

fn echo_node() -> String {
    // target/release/deps/peers-… → target/release/examples/echo_node
    let exe = std::env::current_exe().unwrap();
    let path = exe.ancestors().nth(2).unwrap().join("examples/echo_node").to_string_lossy().into_owned();
    // With `--test peers` cargo builds no examples: one of an earlier protocol would fail most tests, for no plain reason.
    let changed = |path: &str| std::fs::metadata(path).and_then(|file| file.modified()).unwrap();
    let wire = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/wire")).unwrap();
    let newest = wire.map(|file| changed(&file.unwrap().path().to_string_lossy())).max();
    assert!(Some(changed(&path)) > newest, "{path} is older than the sources: cargo build --release --examples");
    path
}

fn agent_spec(python: &str) -> AgentSpec {
    AgentSpec {
        worker: vec![echo_node(), "worker".to_owned()],
        version: "0".to_owned(),
        python: python.to_owned(),
        epoch: "1".to_owned(),
        packages: [("joblib".to_owned(), "1".to_owned())].into(),
        notices: Vec::new(),
        cores: None,
        directory: None,
    }
}

/// A node that can be connected to.
struct Far {
    endpoint: Endpoint,
    target: Target,
    command: String,
    hello: ClientHello,
}

fn spec(endpoint: Endpoint, key: PrivateKey, host_keys: Vec<PublicKey>, hello: ClientHello) -> Far {
    let target = Target {
        user: std::env::var("USER").unwrap_or_else(|_| "root".to_owned()),
        host_keys: HostKeys { known: host_keys, ..HostKeys::default() },
        algorithms: Algorithms::default(),
        identities: vec![Identity::Key(Arc::new(key))],
        rekey: RekeyLimits::default(),
        timeout: Duration::from_secs(20),
    };
    Far { endpoint, target, command: format!("{} agent", echo_node()), hello }
}

fn add(pool: &Pool, far: Far) {
    let id = pool.add_node("n".to_owned(), false);
    match pool.connect(far.endpoint, far.target) {
        Ok(connection) => {
            let connection = Arc::new(connection);
            let (command, hello) = (far.command, far.hello);
            pool.start_node(
                id,
                NodeSpec { connection, command, stripe: None, again: None, hello, ready_timeout: BOUND },
            );
        }
        Err(why) => pool.fail_node(id, why.to_string()),
    }
}

/// An embedded server and its agent, on a thread of this process.
fn embedded(hello: ClientHello, python: &str) -> Far {
    embedded_agent(hello, agent_spec(python))
}

fn embedded_agent(hello: ClientHello, agent: AgentSpec) -> Far {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (host_key, user_key) = (new_key().unwrap(), new_key().unwrap());
    let host_public = host_key.public_key().clone();
    let authorized = user_key.public_key().clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        drop(runtime.block_on(async {
            theirs.set_nonblocking(true).unwrap();
            let socket = tokio::net::UnixStream::from_std(theirs).unwrap();
            let accepted =
                server::accept(socket, host_key, authorized, RekeyLimits::default(), Duration::from_secs(20))
                    .await
                    .unwrap();
            let (from, to) = tokio::io::split(accepted.stream);
            session::run(Some(Streams::new(from, to)), Arrivals::none(), None, agent).await
        }));
    });
    spec(Endpoint::Socket(ours), user_key, vec![host_public], hello)
}

/// An `sshd` of our own on loopback, ended when dropped.
struct Sshd {
    child: Child,
    port: u16,
    directory: PathBuf,
    host_key: PrivateKey,
    user_key: PrivateKey,
}

impl Sshd {
    fn start(extra: &str) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let directory = std::env::temp_dir().join(format!("skyward-sshd-{}-{port}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let (host_key, user_key) = (new_key().unwrap(), new_key().unwrap());
        let write = |name: &str, text: &str| {
            let path = directory.join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            path.display().to_string()
        };
        let host = write("host_key", &host_key.to_openssh(LineEnding::LF).unwrap());
        let authorized = write("authorized_keys", &user_key.public_key().to_openssh().unwrap());
        let config = write(
            "sshd_config",
            &format!(
                "ListenAddress 127.0.0.1\nPort {port}\nHostKey {host}\nAuthorizedKeysFile {authorized}\n\
                 PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n{extra}\n"
            ),
        );
        if Path::new("/run").is_dir() {
            // Debian's sshd wants its privilege separation directory, which only its init script makes.
            drop(std::fs::create_dir("/run/sshd"));
        }
        let sshd = ["/usr/sbin/sshd", "/usr/bin/sshd"].into_iter().find(|p| Path::new(p).exists());
        let sshd = sshd.expect("sshd is needed for this test: install openssh-server");
        let child = Command::new(sshd)
            .args(["-D", "-e", "-f", &config])
            .stderr(Stdio::piped())
            .spawn()
            .expect("sshd does not start");
        let mut sshd = Self { child, port, directory, host_key, user_key };
        let mut log = BufReader::new(sshd.child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("Server listening") {
            line.clear();
            assert_ne!(log.read_line(&mut line).unwrap(), 0, "sshd ended before it listened");
        }
        // Keep the pipe drained, or sshd would block on it.
        std::thread::spawn(move || drop(log.read_to_end(&mut Vec::new())));
        sshd
    }

    fn node(&self, hello: ClientHello) -> Far {
        let host = vec![self.host_key.public_key().clone()];
        spec(Endpoint::Address("127.0.0.1".to_owned(), self.port), self.user_key.clone(), host, hello)
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        drop(std::fs::remove_dir_all(&self.directory));
    }
}

fn await_nodes(pool: &Pool, reached: impl Fn(&Node) -> bool) -> Vec<Node> {
    let by = Instant::now() + BOUND;
    loop {
        let nodes = pool.nodes();
        if nodes.iter().all(&reached) {
            return nodes;
        }
        assert!(Instant::now() < by, "{nodes:?}");
        let seen: Vec<_> = nodes.iter().map(|n| n.state.name()).collect();
        pool.wait_for_change(&seen, Duration::from_secs(1));
    }
}

fn ready(specs: Vec<Far>) -> Pool {
    let pool = Pool::new(3, MAX_MESSAGE).unwrap();
    for spec in specs {
        add(&pool, spec);
    }
    let nodes = await_nodes(&pool, |n| n.state != NodeState::Connecting);
    assert!(nodes.iter().all(|n| n.state == NodeState::Ready), "{nodes:?}");
    pool
}

fn lost(spec: Far) -> String {
    let pool = Pool::new(3, MAX_MESSAGE).unwrap();
    add(&pool, spec);
    match &await_nodes(&pool, |n| matches!(n.state, NodeState::Lost(_)))[0].state {
        NodeState::Lost(why) => why.clone(),
        other => panic!("{other:?}"),
    }
}

fn task(n: u64, code: u8, parts: Vec<Bytes>) -> Message {
    Message { id: Attempt { task: n, attempt: 0 }, code, parts, ..Message::default() }
}

/// Holds tasks up in their worker until it is opened.
struct Gate(PathBuf);

impl Gate {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("skyward-gate-{}-{name}", std::process::id())))
    }

    fn task(&self, n: u64) -> Message {
        task(n, 1, vec![Bytes::from(self.0.display().to_string())])
    }

    fn open(&self) {
        std::fs::write(&self.0, "").unwrap();
    }

    fn reached(&self, n: u64) -> PathBuf {
        PathBuf::from(format!("{}.reached-{n}", self.0.display()))
    }

    /// Wait until a task of this number waits at the gate.
    fn wait_for(&self, n: u64) {
        let by = Instant::now() + BOUND;
        while !self.reached(n).exists() {
            assert!(Instant::now() < by, "task {n} does not reach the gate");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
        (0..32).for_each(|n| drop(std::fs::remove_file(self.reached(n))));
    }
}

/// Wait until `count` tasks have ended; each exactly once.
fn collect(pool: &Pool, count: usize) -> HashMap<u64, Message> {
    let mut by = Instant::now() + BOUND;
    let mut ended = HashMap::new();
    while ended.len() < count {
        for message in pool.finished(0, Duration::from_secs(1)).expect("closed") {
            by = Instant::now() + BOUND;
            assert!(ended.insert(message.id.task, message).is_none(), "ended twice");
        }
        assert!(Instant::now() < by, "{} of {count} tasks ended", ended.len());
    }
    ended
}

fn submit(pool: &Pool, message: Message) {
    assert!(pool.submit(message, None), "closed");
}

fn echoes(pool: &Pool) {
    let parts =
        |n: u64| vec![Bytes::from(n.to_string()), Bytes::from(vec![7; (n as usize % 7) * 30_000]), Bytes::new()];
    (0..500).for_each(|n| submit(pool, task(n, 0, parts(n))));
    for (n, message) in collect(pool, 500) {
        assert_eq!(message.code, Outcome::Returned as u8);
        assert_eq!(message.parts, parts(n));
    }
}

/// Bytes that cannot be compressed.
fn noise(size: usize) -> Bytes {
    let mut state = 1_u64;
    let bytes = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32).to_le_bytes()
    });
    bytes.flatten().take(size).collect()
}

/// Both directions full of incompressible data: client, agent and workers all go on.
fn saturate(pool: &Pool, bytes: usize) {
    const SIZE: usize = 16 << 20;
    let noise = noise(SIZE);
    let count = bytes / SIZE;
    (0..count as u64).for_each(|n| submit(pool, task(n, 0, vec![noise.clone()])));
    let mut ended = 0;
    let mut by = Instant::now() + BOUND;
    while ended < count {
        for message in pool.finished(0, Duration::from_secs(1)).expect("closed") {
            assert!(message.parts[0] == noise, "task {} came back changed", message.id.task);
            ended += 1;
            by = Instant::now() + BOUND;
        }
        assert!(Instant::now() < by, "{ended} of {count} came back");
    }
    assert!(pool.nodes().iter().all(|n| n.state == NodeState::Ready), "{:?}", pool.nodes());
}

/// The embedded server: the same bytes come back, whatever their size.
#[test]
fn embedded_node_runs_tasks() {
    let pool = ready(vec![embedded(client_hello(4, false), "3.11"), embedded(client_hello(2, true), "3.11")]);
    assert_eq!(pool.nodes().iter().map(|n| n.slots).sum::<usize>(), 6);
    echoes(&pool);
}

/// OpenSSH: the same, over a real `sshd`.
#[test]
fn openssh_node_runs_tasks() {
    let sshd = Sshd::start("");
    let pool = ready(vec![sshd.node(client_hello(4, false))]);
    echoes(&pool);
    assert!(pool.nodes()[0].rtt < Duration::from_secs(1));
}

/// A server without forwarding and with a banner is a node like any other.
#[test]
fn openssh_without_forwarding_is_enough() {
    let sshd = Sshd::start("AllowTcpForwarding no\nAllowStreamLocalForwarding no\nBanner /etc/passwd\nMaxSessions 1");
    echoes(&ready(vec![sshd.node(client_hello(2, false))]));
}

/// 2 GiB each way over the embedded server, across several rekeys.
#[test]
fn embedded_duplex_saturation() {
    saturate(&ready(vec![embedded(client_hello(4, false), "3.11")]), 2 << 30);
}

/// 256 MiB each way over OpenSSH.
#[test]
fn openssh_duplex_saturation() {
    let sshd = Sshd::start("");
    saturate(&ready(vec![sshd.node(client_hello(4, true))]), 256 << 20);
}

/// A host that shows another key than the expected one gets nothing and is named with both fingerprints.
#[test]
fn another_host_key_is_refused() {
    let sshd = Sshd::start("");
    let mut node = sshd.node(client_hello(1, false));
    let other = new_key().unwrap().public_key().clone();
    node.target.host_keys.known = vec![other.clone()];
    let why = lost(node);
    let shown = |k: &PublicKey| k.fingerprint(russh::keys::HashAlg::Sha256).to_string();
    assert!(why.contains("host key") && why.contains(&shown(&other)), "{why}");
    assert!(why.contains(&shown(sshd.host_key.public_key())), "{why}");
}

/// A key is good enough only where it was said to be: not if it is revoked, and a new one only if asked for.
#[test]
fn new_and_revoked_host_keys() {
    let sshd = Sshd::start("");
    let key = sshd.host_key.public_key().clone();
    for (known, revoked, accept_new, good) in [
        (false, false, true, true),
        (false, false, false, false),
        (true, true, true, false),
        (false, true, true, false),
    ] {
        let mut node = sshd.node(client_hello(1, false));
        node.target.host_keys.known = if known { vec![key.clone()] } else { Vec::new() };
        node.target.host_keys.revoked = if revoked { vec![key.clone()] } else { Vec::new() };
        node.target.host_keys.accept_new = accept_new;
        let pool = Pool::new(3, MAX_MESSAGE).unwrap();
        let opened = pool.connect(node.endpoint, node.target);
        match opened {
            Ok(connection) => assert!(good && connection.host_key().unwrap().key_data() == key.key_data()),
            Err(why) => assert!(!good && why.to_string().contains("host key"), "{why}"),
        }
    }
}

/// A server that notes with which algorithms a client signs, and lets nobody in.
struct Noting(std::sync::mpsc::Sender<Algorithm>);

impl russh::server::Handler for Noting {
    type Error = russh::Error;

    async fn auth_publickey(&mut self, _user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, russh::Error> {
        drop(self.0.send(key.algorithm.clone()));
        Ok(Auth::reject())
    }
}

/// An RSA key signs with SHA-2, even for a server that says it takes no such signature.
#[test]
fn rsa_keys_never_sign_with_sha1() {
    let file = std::env::temp_dir().join(format!("skyward-rsa-{}", std::process::id()));
    let keygen = Command::new("ssh-keygen").args(["-q", "-t", "rsa", "-b", "2048", "-N", "", "-f"]).arg(&file).status();
    assert!(keygen.unwrap().success());
    for announced in [vec![Algorithm::Ed25519], vec![Algorithm::Ed25519, Algorithm::Rsa { hash: None }]] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let host_key = new_key().unwrap();
        let user_key = russh::keys::load_secret_key(&file, None).unwrap();
        let far = spec(Endpoint::Socket(ours), user_key, vec![host_key.public_key().clone()], client_hello(1, false));
        let (note, noted) = std::sync::mpsc::channel();
        let server = std::thread::spawn(move || {
            let preferred = russh::Preferred { key: announced.into(), ..russh::Preferred::default() };
            let keys = vec![host_key];
            let config = russh::server::Config { keys, preferred, ..russh::server::Config::default() };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            theirs.set_nonblocking(true).unwrap();
            drop(runtime.block_on(async {
                let socket = tokio::net::UnixStream::from_std(theirs).unwrap();
                russh::server::run_stream(Arc::new(config), socket, Noting(note)).await?.await
            }));
        });
        let refused = Pool::new(3, MAX_MESSAGE).unwrap().connect(far.endpoint, far.target);
        assert!(refused.is_err());
        server.join().unwrap();
        assert_eq!(noted.iter().collect::<Vec<_>>(), [Algorithm::Rsa { hash: Some(HashAlg::Sha512) }]);
    }
    std::fs::remove_file(file.with_extension("pub")).unwrap();
    std::fs::remove_file(file).unwrap();
}

/// Commands run beside a session, with input, both streams and their exit status.
#[test]
fn commands_run_to_their_end() {
    let sshd = Sshd::start("");
    let node = sshd.node(client_hello(1, false));
    let pool = Pool::new(3, MAX_MESSAGE).unwrap();
    let connection = Arc::new(pool.connect(node.endpoint, node.target).unwrap());
    let run = |command: &str, input: Bytes| pool.run(Arc::clone(&connection), command.to_owned(), input, BOUND);
    let ended = run("cat; echo oops >&2; exit 7", Bytes::from_static(b"input")).unwrap();
    assert_eq!((ended.status, &ended.stdout[..], &ended.stderr[..]), (Some(7), &b"input"[..], &b"oops\n"[..]));
    let large = Bytes::from(vec![7; 8 << 20]);
    assert_eq!(run("wc -c", large.clone()).unwrap().stdout, b"8388608\n");
    assert_eq!(run("exit 3", large).unwrap().status, Some(3));
    let late = pool.run(Arc::clone(&connection), "sleep 60".to_owned(), Bytes::new(), Duration::from_millis(200));
    assert!(late.unwrap_err().to_string().contains("sleep 60"));
}

/// A key that the host does not know is an authentication error, not a retry loop.
#[test]
fn an_unknown_user_key_is_refused() {
    let sshd = Sshd::start("");
    let mut node = sshd.node(client_hello(1, false));
    node.target.identities = vec![Identity::Key(Arc::new(new_key().unwrap()))];
    let why = lost(node);
    assert!(why.contains("authentication") && why.contains("publickey"), "{why}");
    let mut node = embedded(client_hello(1, false), "3.11");
    node.target.identities = vec![Identity::Key(Arc::new(new_key().unwrap()))];
    assert!(lost(node).contains("authentication"));
}

/// A server that accepts and then says nothing is given up at the deadline.
#[test]
fn a_stalled_server_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let key = new_key().unwrap();
    let host = vec![key.public_key().clone()];
    let port = listener.local_addr().unwrap().port();
    let mut node = spec(Endpoint::Address("127.0.0.1".to_owned(), port), key, host, client_hello(1, false));
    node.target.timeout = Duration::from_millis(300);
    let why = lost(node);
    assert!(why.contains("more than"), "{why}");
}

/// Nobody listens: the reason is the operating system's.
#[test]
fn a_closed_port_is_named() {
    let key = new_key().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let host = vec![key.public_key().clone()];
    let why = lost(spec(Endpoint::Address("127.0.0.1".to_owned(), port), key, host, client_hello(1, false)));
    assert!(why.contains("refused"), "{why}");
}

/// A command that does not exist on the host ends with the session, without a hang.
#[test]
fn a_missing_command_is_a_lost_node() {
    let sshd = Sshd::start("");
    let mut node = sshd.node(client_hello(1, false));
    node.command = "echo hello from the shell; exec /nonexistent".to_owned();
    let why = lost(node);
    assert!(why.contains("without a goodbye") && why.contains("hello from the shell"), "{why}");
    assert!(why.contains("ended with status 127: ") && why.contains("/nonexistent: "), "{why}");
}

/// What a login shell prints first is skipped.
#[test]
fn a_noisy_shell_does_no_harm() {
    let sshd = Sshd::start("");
    let mut node = sshd.node(client_hello(1, false));
    node.command = format!("echo; seq 1 5000; {} agent", echo_node());
    echoes(&ready(vec![node]));
}

/// Another Python is refused at hello, with both versions.
#[test]
fn another_python_is_refused() {
    let why = lost(embedded(client_hello(1, false), "3.12"));
    assert!(why.contains("3.11") && why.contains("3.12"), "{why}");
}

/// A worker that cannot start fails the node, with its exit status.
#[test]
fn a_worker_that_does_not_start_fails_the_node() {
    let worker = vec!["sh".to_owned(), "-c".to_owned(), "exit 7".to_owned()];
    let why = lost(embedded_agent(client_hello(1, false), AgentSpec { worker, ..agent_spec("3.11") }));
    assert!(why.contains("status 7"), "{why}");
    let worker = vec!["/nonexistent".to_owned()];
    let why = lost(embedded_agent(client_hello(1, false), AgentSpec { worker, ..agent_spec("3.11") }));
    assert!(why.contains("No such file"), "{why}");
}

/// A node tells its packages. A node that greets once others are required is lost, and its agent ends at once.
#[test]
fn a_node_without_a_required_package_is_lost() {
    let pool = ready(vec![embedded(client_hello(1, false), "3.11")]);
    let told = pool.nodes().remove(0).hello.unwrap().packages.clone();
    assert_eq!(told, [("joblib".to_owned(), "1".to_owned())].into());
    pool.require([("joblib", "1.0"), ("numpy", "2")].map(|(n, v)| (n.to_owned(), v.to_owned())).into());
    add(&pool, embedded(client_hello(1, false), "3.11"));
    let nodes = await_nodes(&pool, |n| n.state != NodeState::Connecting);
    let NodeState::Lost(why) = &nodes[1].state else { panic!("{nodes:?}") };
    assert!(why.contains("numpy is not installed there. It needs Image(pip=[\"numpy==2\"])"), "{why}");
    assert!(why.contains("strict_env") && !why.contains("joblib"), "{why}");
    assert_eq!(nodes[0].state, NodeState::Ready);
}

/// A worker process that dies fails what it may have been running, and is replaced.
#[test]
fn a_dead_worker_is_named_and_replaced() {
    for processes in [false, true] {
        let pool = ready(vec![embedded(client_hello(1, processes), "3.11")]);
        for (n, (code, says)) in [(2, "status 3"), (3, "SIGABRT")].into_iter().enumerate() {
            let n = n as u64 * 2;
            submit(&pool, task(n, code, vec![]));
            submit(&pool, task(n + 1, 0, vec![Bytes::from_static(b"later")]));
            let ended = collect(&pool, 2);
            let crash = &ended[&n];
            assert_eq!(crash.code, Outcome::Crashed as u8);
            assert!(String::from_utf8_lossy(&crash.parts[0]).contains(says), "{crash:?}");
            assert_eq!(ended[&(n + 1)].code, Outcome::Returned as u8);
        }
    }
}

/// Cut the connections of an `sshd`, which live in children of the listening process.
fn cut(sshd: &Sshd) {
    assert!(Command::new("pkill").args(["-9", "-P", &sshd.child.id().to_string()]).status().unwrap().success());
}

/// A node that drains when its notice is opened.
fn draining(sshd: &Sshd, slots: usize, notice: &Gate) -> Far {
    let mut node = sshd.node(client_hello(slots, false));
    node.command = format!("{} {}", node.command, notice.0.display());
    node
}

fn state(pool: &Pool, node: usize) -> NodeState {
    pool.nodes().swap_remove(node).state
}

fn await_state(pool: &Pool, node: usize, state: impl Fn(&NodeState) -> bool) {
    let by = Instant::now() + BOUND;
    while !state(&self::state(pool, node)) {
        assert!(Instant::now() < by, "{:?}", pool.nodes());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Tasks of a lost node run on the others; without others they end with its name.
#[test]
fn a_lost_nodes_tasks_run_elsewhere() {
    let gate = Gate::new("lost");
    let sshd = Sshd::start("");
    let pool = ready(vec![sshd.node(client_hello(2, false)), embedded(client_hello(2, false), "3.11")]);
    (0..8).for_each(|n| submit(&pool, gate.task(n)));
    cut(&sshd);
    await_nodes(&pool, |n| {
        n.slots == 2 && (n.state == NodeState::Ready) == n.hello.as_ref().is_some_and(|h| h.epoch == "1")
    });
    gate.open();
    assert!(collect(&pool, 8).values().all(|m| m.code == Outcome::Returned as u8));

    let gate = Gate::new("all lost");
    let pool = ready(vec![sshd.node(client_hello(2, false))]);
    (0..8).for_each(|n| submit(&pool, gate.task(n)));
    cut(&sshd);
    let ended = collect(&pool, 8);
    assert!(ended.values().all(|m| m.code == Outcome::NodeLost as u8), "{ended:?}");
    submit(&pool, task(9, 0, vec![]));
    assert_eq!(collect(&pool, 1)[&9].code, Outcome::NodeLost as u8);
}

/// A thread that takes from one completion queue is not held up by a queue from which no thread takes.
#[test]
fn completion_queues_do_not_wait_for_one_another() {
    let pool = ready(vec![embedded(client_hello(2, false), "3.11")]);
    let queue = pool.open_queue();
    assert_eq!(queue, 1);
    // More bytes than the node may send before results are acknowledged.
    let large = noise(16 << 20);
    (0..6).for_each(|n| submit(&pool, task((queue << QUEUE_SHIFT) + n, 0, vec![large.clone()])));
    let by = Instant::now() + BOUND;
    while pool.counts().0 > 2 {
        assert!(Instant::now() < by, "{:?}", pool.counts());
        std::thread::sleep(Duration::from_millis(5));
    }
    for n in 0..3 {
        submit(&pool, task(n, 0, vec![]));
        assert!(collect(&pool, 1).contains_key(&n));
    }
    pool.wake(0);
    assert!(pool.finished(0, BOUND).unwrap().is_empty());
    let mut ended = 0;
    while ended < 6 {
        let messages = pool.finished(queue, BOUND).unwrap();
        assert!(messages.iter().all(|m| m.parts[0] == large));
        assert!(!messages.is_empty(), "{ended} came");
        ended += messages.len();
    }
    pool.close_queue(queue);
    assert_eq!(pool.finished(queue, BOUND), None);
    assert_eq!(pool.counts(), (0, 0));
}

/// What a draining node has not started runs on the other, what it runs may end there, and what is for it alone stays.
#[test]
fn a_draining_node_takes_nothing_more() {
    let (gate, notice) = (Gate::new("drains"), Gate::new("drains-notice"));
    let sshd = Sshd::start("");
    let pool = ready(vec![draining(&sshd, 1, &notice)]);
    submit(&pool, task(0, 0, vec![]));
    submit(&pool, gate.task(1));
    assert!(collect(&pool, 1).contains_key(&0));
    (2..5).for_each(|n| submit(&pool, task(n, 0, vec![])));
    assert!(pool.submit(task(5, 0, vec![]), Some(0)));
    notice.open();
    await_state(&pool, 0, |s| *s == NodeState::Draining("notice".to_owned()));
    assert!(pool.submit(task(6, 0, vec![]), Some(0)));
    submit(&pool, task(7, 0, vec![]));
    add(&pool, embedded(client_hello(1, false), "3.11"));
    let moved = collect(&pool, 4).into_keys().collect::<std::collections::BTreeSet<_>>();
    assert_eq!(moved, [2, 3, 4, 7].into());
    assert!(pool.finished(0, Duration::from_millis(500)).unwrap().is_empty(), "the others wait for the running one");
    gate.open();
    assert!(collect(&pool, 3).values().all(|m| m.code == Outcome::Returned as u8));
    assert_eq!(pool.counts(), (0, 0));
    pool.close();
    assert!(pool.nodes().iter().all(|n| n.state == NodeState::Closed), "{:?}", pool.nodes());
}

/// The loss of a draining node is not held against its tasks, which wait for a node if none is left but on its way.
#[test]
fn an_announced_loss_is_not_charged() {
    let (gate, notice) = (Gate::new("announced"), Gate::new("announced-notice"));
    let sshd = Sshd::start("");
    let pool = Pool::new(1, MAX_MESSAGE).unwrap();
    add(&pool, draining(&sshd, 2, &notice));
    await_state(&pool, 0, |s| *s == NodeState::Ready);
    (0..6).for_each(|n| submit(&pool, gate.task(n)));
    assert!(pool.submit(gate.task(6), Some(0)));
    notice.open();
    await_state(&pool, 0, |s| matches!(s, NodeState::Draining(_)));
    pool.expect(1);
    cut(&sshd);
    let ended = collect(&pool, 1);
    assert_eq!(ended[&6].code, Outcome::NodeLost as u8, "it was for that node only");
    let why = String::from_utf8_lossy(&ended[&6].parts[0]).into_owned();
    assert!(why.contains("it was draining: notice"), "{why}");
    add(&pool, embedded(client_hello(2, false), "3.11"));
    pool.expect(0);
    gate.open();
    assert!(collect(&pool, 6).values().all(|m| m.code == Outcome::Returned as u8));
}

/// A node that gets its notice before it was ready is never one.
#[test]
fn a_node_may_drain_before_it_is_ready() {
    let notice = Gate::new("early-notice");
    notice.open();
    let sshd = Sshd::start("");
    let pool = Pool::new(1, MAX_MESSAGE).unwrap();
    add(&pool, draining(&sshd, 2, &notice));
    submit(&pool, task(0, 0, vec![]));
    await_state(&pool, 0, |s| matches!(s, NodeState::Draining(_)));
    // It may have been ready for a moment, if it started fast.
    add(&pool, embedded(client_hello(2, false), "3.11"));
    assert_eq!(collect(&pool, 1)[&0].code, Outcome::Returned as u8);
    let by = Instant::now() + BOUND;
    while pool.nodes()[0].slots == 0 {
        assert!(Instant::now() < by, "{:?}", pool.nodes());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(pool.submit(task(1, 0, vec![]), Some(0)));
    assert_eq!(collect(&pool, 1)[&1].code, Outcome::Returned as u8);
}

/// While nodes are expected nothing fails for want of one; when none is any more, everything that waits does, at once.
#[test]
fn tasks_wait_for_expected_nodes() {
    let (gate, notice) = (Gate::new("expected"), Gate::new("expected-notice"));
    let sshd = Sshd::start("");
    let pool = ready(vec![draining(&sshd, 1, &notice)]);
    (0..3).for_each(|n| submit(&pool, gate.task(n)));
    pool.expect(2);
    cut(&sshd);
    await_state(&pool, 0, |s| matches!(s, NodeState::Lost(_)));
    submit(&pool, task(3, 0, vec![]));
    pool.expect(1);
    assert!(pool.finished(0, Duration::from_millis(300)).unwrap().is_empty());
    pool.expect(0);
    let ended = collect(&pool, 4);
    assert!(ended.values().all(|m| m.code == Outcome::NodeLost as u8), "{ended:?}");
    // A node may still be added, and then there is hope again.
    add(&pool, embedded(client_hello(1, false), "3.11"));
    submit(&pool, task(4, 0, vec![]));
    assert_eq!(collect(&pool, 1)[&4].code, Outcome::Returned as u8);

    // Draining nodes are hope only until they are lost, which is when they have done their last task.
    let pool = ready(vec![draining(&sshd, 1, &notice)]);
    notice.open();
    await_state(&pool, 0, |s| *s == NodeState::Lost("it has done its last task: notice".to_owned()));
    submit(&pool, task(5, 0, vec![]));
    assert_eq!(collect(&pool, 1)[&5].code, Outcome::NodeLost as u8);
    pool.close();
    assert_eq!(pool.add_node("late".to_owned(), false), 1);
    assert_eq!(state(&pool, 1), NodeState::Closed);
}

/// Cancelled tasks never start, wherever they wait; running ones end as they would.
#[test]
fn cancelled_tasks_do_not_start() {
    let gate = Gate::new("cancelled");
    let pool = ready(vec![embedded(client_hello(1, false), "3.11")]);
    submit(&pool, task(0, 0, vec![]));
    (1..10).for_each(|n| submit(&pool, gate.task(n)));
    // After the first result the only slot is the second task's, which waits at the gate.
    assert!(collect(&pool, 1).contains_key(&0));
    gate.wait_for(1);
    // Half of them with the node's answer, half of them without.
    assert!((2..6).all(|n| pool.cancel(n, BOUND)));
    let dropped = (6..10).filter(|&n| pool.cancel(n, Duration::ZERO)).count();
    assert!(collect(&pool, 4 - dropped).values().all(|m| m.code == Outcome::Cancelled as u8));
    assert!(!pool.cancel(1, BOUND), "it is running");
    gate.open();
    assert_eq!(collect(&pool, 1)[&1].code, Outcome::Returned as u8);
    assert_eq!(pool.counts(), (0, 0));
}

/// A running task that is aborted is ended, and its worker replaced; what else runs there runs on or again.
#[test]
fn aborted_tasks_are_ended() {
    for (slots, processes) in [(2, false), (2, true)] {
        let gate = Gate::new("aborted");
        let pool = ready(vec![embedded(client_hello(slots, processes), "3.11")]);
        let other = Gate::new("bystander");
        submit(&pool, gate.task(0));
        submit(&pool, other.task(1));
        submit(&pool, task(2, 0, vec![]));
        pool.abort(0);
        let ended = collect(&pool, 2);
        assert_eq!(ended[&0].code, Outcome::Cancelled as u8, "{slots} {processes}");
        other.open();
        let ended = collect(&pool, 1);
        assert_eq!(ended[&1].code, Outcome::Returned as u8);
        assert_eq!(pool.counts(), (0, 0));
    }
}

/// Of several tasks in a process that dies each runs again, alone; only the one that does it again fails.
#[test]
fn bystanders_of_a_crash_run_again_alone() {
    let gate = Gate::new("bystanders");
    let pool = ready(vec![embedded(client_hello(3, false), "3.11")]);
    submit(&pool, gate.task(0));
    submit(&pool, gate.task(1));
    submit(&pool, task(2, 3, vec![]));
    submit(&pool, task(3, 0, vec![]));
    let ended = collect(&pool, 2);
    assert_eq!(ended[&3].code, Outcome::Returned as u8);
    assert_eq!(ended[&2].code, Outcome::Crashed as u8);
    let text = String::from_utf8_lossy(&ended[&2].parts[0]).into_owned();
    assert!(text.contains("node tested") && text.contains("SIGABRT"), "{text}");
    gate.open();
    assert!(collect(&pool, 2).values().all(|m| m.code == Outcome::Returned as u8));
    submit(&pool, task(4, 0, vec![]));
    assert_eq!(collect(&pool, 1)[&4].code, Outcome::Returned as u8);
}

/// A client that says what it is told, and an agent in the same thread.
struct Raw {
    link: Arc<FrameSender>,
    source: EventReader<tokio::io::ReadHalf<tokio::io::DuplexStream>>,
    seen: Vec<Event>,
}

impl Raw {
    async fn connect(hello: ClientHello) -> Self {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let (from, to) = tokio::io::split(theirs);
        tokio::spawn(session::run(Some(Streams::new(from, to)), Arrivals::none(), None, agent_spec("3.11")));
        let (from, to) = tokio::io::split(ours);
        let link = Arc::new(FrameSender::default());
        let sender = Arc::clone(&link);
        tokio::spawn(async move { sender.run(to, None).await });
        link.send(|o| o.control(wire::hello(&hello).unwrap()));
        let mut raw =
            Self { source: EventReader::of_session(from, MAX_MESSAGE, Arc::clone(&link)), link, seen: Vec::new() };
        raw.source.greeting(&mut raw.seen).await.unwrap();
        raw
    }

    fn submit(&self, message: Message) {
        self.link.send(|o| o.message(Body::Task, message));
    }

    /// Read until `count` such events were seen.
    async fn until(&mut self, count: usize, such: impl Fn(&Event) -> bool) {
        let read = async {
            while self.seen.iter().filter(|event| such(event)).count() < count {
                let read = self.source.read(&mut self.seen).await;
                assert!(read.is_ok(), "{read:?} after {:?}", self.seen.last());
            }
        };
        tokio::time::timeout(BOUND, read).await.expect("nothing came");
    }

    /// Let the agent's clock go on, for more than the time between two of its heartbeats.
    async fn heartbeats(&mut self) {
        let before = self.seen.iter().filter(|event| heartbeat(event)).count();
        self.until(before + 2, heartbeat).await;
    }

    fn ended(&self) -> Vec<(u64, u8)> {
        let result = |event: &Event| match event {
            Event::Message(Body::Result, message) => Some((message.id.task, message.code)),
            _ => None,
        };
        self.seen.iter().filter_map(result).collect()
    }
}

fn heartbeat(event: &Event) -> bool {
    matches!(event, Event::Control(Control::Heartbeat { .. }))
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(test);
}

/// The limit is for a task, not for how long the client lets its result wait.
#[test]
fn a_result_that_waits_is_not_late() {
    run(async {
        let mut hello = client_hello(2, false);
        hello.worker.task_timeout_ms = Some(1000);
        let mut client = Raw::connect(hello).await;
        // One for the credit, five for the agent's backlog, two for the worker's; two wait in their threads.
        (0..10).for_each(|n| client.submit(task(n, 6, vec![])));
        client.until(1, |event| matches!(event, Event::Message(..))).await;
        client.heartbeats().await;
        assert_eq!(client.ended().len(), 1);
        let mut taken = 0;
        while taken < 10 {
            client.until(taken + 1, |event| matches!(event, Event::Message(..))).await;
            let ids = client.ended().into_iter().skip(taken).map(|(task, _)| Attempt { task, attempt: 0 });
            let ids: Vec<_> = ids.collect();
            taken += ids.len();
            client.link.send(|o| o.acknowledge(ids));
        }
        assert!(client.ended().iter().all(|(_, code)| *code == Outcome::Returned as u8), "{:?}", client.ended());
    });
}

/// A task that runs for too long is ended on the node.
#[test]
fn late_tasks_are_ended() {
    for processes in [false, true] {
        let gate = Gate::new("late");
        let mut hello = client_hello(2, processes);
        hello.worker.task_timeout_ms = Some(300);
        let pool = ready(vec![embedded(hello, "3.11")]);
        submit(&pool, gate.task(0));
        assert_eq!(collect(&pool, 1)[&0].code, Outcome::TimedOut as u8);
        submit(&pool, task(1, 0, vec![]));
        assert_eq!(collect(&pool, 1)[&1].code, Outcome::Returned as u8);
    }
}

/// What tasks write comes with the names of node and stream; a flood is bounded and hinders nothing.
#[test]
fn output_is_forwarded() {
    let pool = ready(vec![embedded(client_hello(1, false), "3.11")]);
    submit(&pool, task(0, 4, vec![Bytes::from_static(b"one\ntwo\nhalf")]));
    submit(&pool, task(1, 5, vec![]));
    assert_eq!(collect(&pool, 2)[&0].code, Outcome::Returned as u8);
    pool.close();
    let mut text = Vec::new();
    while let Some(lines) = pool.output(BOUND) {
        for (node, stream, line) in lines {
            // The first worker's standard error; what is left out is the node's word.
            assert_eq!((node.as_str(), stream & 3), ("n", 2));
            assert!(matches!(stream >> 3, 0 | 1), "{stream}");
            text.extend_from_slice(&line);
        }
    }
    assert!(text.starts_with(b"one\ntwo\n"), "{}", String::from_utf8_lossy(&text));
    assert!(text.len() < 4 << 20, "{}", text.len());
    assert!(String::from_utf8_lossy(&text).contains("left out"));
}

/// What a task asks for comes whole, up to 16 MiB, also while nobody takes what tasks tell; or the reason why it does not.
#[test]
fn requests_are_answered() {
    let pool = ready(vec![embedded(client_hello(2, true), "3.11"), embedded(client_hello(2, false), "3.11")]);
    submit(&pool, task(100, 7, vec![Bytes::from("told")]));
    let content = |n: u64| Bytes::from(vec![n as u8; if n == 0 { MAX_NOTE } else { n as usize * 50_000 }]);
    (0..20).for_each(|n| submit(&pool, task(n, 10, vec![Bytes::from(n.to_string())])));
    let mut answered = 0;
    let by = Instant::now() + BOUND;
    while answered < 20 {
        for (node, request) in pool.requests(Duration::from_secs(1)).expect("closed") {
            let n = String::from_utf8_lossy(&request.parts[0]).parse().unwrap();
            if n == 7 {
                pool.answer_note(node, request.id.task, Bytes::from("why not"));
            } else {
                pool.answer_request(node, request.id.task, content(n));
            }
            answered += 1;
        }
        assert!(Instant::now() < by, "{answered} of 20 requests came");
    }
    for (n, message) in collect(&pool, 20) {
        let expected = if n == 7 { Bytes::from("why not") } else { content(n) };
        assert!(message.parts == [expected], "the answer to {n} came changed");
    }
    let told = pool.notes(BOUND).expect("closed");
    assert_eq!(told[0].1.parts[0], "told");
    pool.answer_note(told[0].0, told[0].1.id.task, Bytes::new());
    collect(&pool, 1);
    pool.close();
    assert!(pool.requests(BOUND).is_none());
}

/// Each note reaches the client whole, and its answer the task that sent it, whichever node and process that is in.
#[test]
fn notes_come_home_and_their_answers_go_back() {
    let pool = ready(vec![embedded(client_hello(3, true), "3.11"), embedded(client_hello(3, false), "3.11")]);
    let text = |n: u64| Bytes::from(vec![n as u8; n as usize * 20_000]);
    (0..60).for_each(|n| submit(&pool, task(n, 7, vec![Bytes::from(n.to_string()), text(n)])));
    let mut answered = 0;
    let by = Instant::now() + BOUND;
    while answered < 60 {
        for (node, note) in pool.notes(Duration::from_secs(1)).expect("closed") {
            let n = String::from_utf8_lossy(&note.parts[0]).parse().unwrap();
            assert!(note.parts[1] == text(n), "note {n} came changed");
            pool.answer_note(node, note.id.task, Bytes::from(format!("answer {n}")));
            answered += 1;
        }
        assert!(Instant::now() < by, "{answered} of 60 notes came");
    }
    for (n, message) in collect(&pool, 60) {
        assert_eq!(message.parts, [Bytes::from(format!("answer {n}"))]);
    }
    pool.close();
    assert!(pool.notes(BOUND).is_none());
}

/// A task that writes frames to its worker's socket before it ends.
fn forging(n: u64, frames: impl FnOnce(&mut Vec<u8>)) -> Message {
    let (mut raw, mut wire) = (Vec::new(), Vec::new());
    frames(&mut raw);
    Packer::default().pack(&raw, &mut wire);
    task(n, 8, vec![Bytes::from(wire)])
}

fn result(event: &Event) -> bool {
    matches!(event, Event::Message(Body::Result, _))
}

/// A worker that sends a task, or the beginning of a large result that it does not owe, stores nothing in the agent.
#[test]
fn a_worker_cannot_fill_the_agent() {
    run(async {
        let mut client = Raw::connect(client_hello(1, false)).await;
        let large = |body, n| {
            move |raw: &mut Vec<u8>| {
                let message = task(n, 0, vec![Bytes::from(vec![0; 1 << 20])]);
                assert!(!Outgoing::new(body, message).put_chunk(raw));
            }
        };
        client.submit(forging(0, large(Body::Result, 7)));
        client.until(1, result).await;
        assert_eq!(client.ended(), [(0, Outcome::Returned as u8)]);
        client.submit(forging(1, large(Body::Task, 7)));
        client.until(2, result).await;
        assert_eq!(client.ended()[1], (1, Outcome::Crashed as u8));
        client.submit(task(2, 0, vec![]));
        client.until(3, result).await;
    });
}

/// A worker that announces a descriptor and does not send it, or names one in a result, is ended, and the task that did it is
/// named; the agent goes on.
#[test]
fn a_worker_cannot_confuse_the_agent_about_descriptors() {
    type Forge = Box<dyn FnOnce(&mut Vec<u8>)>;
    run(async {
        let mut client = Raw::connect(client_hello(1, false)).await;
        let blob = BlobPart { place: 0, number: 0, fresh: false, content: None };
        let named = Message { blobs: vec![blob], ..task(1, 0, vec![]) };
        let cases: [(&str, Forge); 2] = [
            (
                "the frame of a descriptor that did not come",
                Box::new(|raw| Control::Descriptor { number: 0, size: 1 << 20 }.put(raw).unwrap()),
            ),
            (
                "a result without the descriptors of its blobs",
                Box::new(|raw| assert!(Outgoing::new(Body::Result, named).put_chunk(raw))),
            ),
        ];
        for (n, (why, frames)) in (0..).zip(cases) {
            client.submit(forging(n, frames));
            client.until(1 + n as usize, result).await;
            let Some(Event::Message(_, end)) = client.seen.iter().rfind(|event| result(event)) else { panic!() };
            let said = String::from_utf8_lossy(&end.parts[0]);
            assert_eq!((end.id.task, end.code), (n, Outcome::Crashed as u8), "{said}");
            assert!(said.contains(why), "{said}");
        }
        client.submit(task(2, 0, vec![noise(1 << 20)]));
        client.until(3, result).await;
        assert_eq!(client.ended()[2], (2, Outcome::Returned as u8));
    });
}

/// The threads of one worker can all send their largest note at once.
#[test]
fn many_large_notes_at_once_are_all_taken() {
    let pool = ready(vec![embedded(client_hello(20, false), "3.11")]);
    (0..20).for_each(|n| submit(&pool, task(n, 9, vec![])));
    let mut taken = 0;
    while taken < 20 {
        let notes = pool.notes(BOUND).expect("closed");
        assert!(!notes.is_empty(), "{taken} notes came");
        taken += notes.len();
        for (node, note) in notes {
            pool.answer_note(node, note.id.task, Bytes::new());
        }
    }
    let ends = collect(&pool, 20);
    assert!(ends.values().all(|end| end.parts == [Bytes::new()]), "{ends:?}");
}

/// While so many results wait for the client that the agent reads from no worker, its questions are answered all the same.
#[test]
fn an_agent_that_is_full_answers() {
    run(async {
        let gate = Gate::new("full");
        let mut client = Raw::connect(client_hello(2, false)).await;
        client.submit(gate.task(0));
        (1..=6).for_each(|n| client.submit(task(n, 6, vec![])));
        (7..=8).for_each(|n| client.submit(task(n, 4, vec![Bytes::from(format!("{n}"))])));
        // The last one begins when its worker has sent five results, of which the client has credit for one.
        let last =
            |event: &Event| matches!(event, Event::Control(Control::Output { text, .. }) if text.ends_with(b"8"));
        client.until(1, last).await;
        let id = Attempt { task: 0, attempt: 0 };
        for n in 1..=50 {
            client.link.send(|o| o.control(if n % 2 == 0 { Control::Cancel(id) } else { Control::Recall(id) }));
            client.until(n, |event| *event == Event::Control(Control::RecallRefused(id))).await;
        }
        gate.open();
        for n in 1..=9 {
            client.until(n, result).await;
            let ended: Vec<_> = client.ended().into_iter().map(|(task, _)| Attempt { task, attempt: 0 }).collect();
            client.link.send(|o| o.acknowledge(ended));
        }
        assert!(client.ended().iter().all(|(_, code)| *code == Outcome::Returned as u8), "{:?}", client.ended());
    });
}

/// A client that sends what no client sends is told why its agent ends.
#[test]
fn an_agent_ends_when_its_client_is_broken() {
    type Send = fn(&FrameSender);
    let part = |n: u64, size: usize| task(n, 0, vec![Bytes::from(vec![0; size])]);
    let cases: [(&str, Send); 6] = [
        ("a result or a note from a client", |link| {
            link.send(|o| o.message(Body::Result, task(0, 0, vec![noise(1 << 20)])));
        }),
        ("a result or a note from a client", |link| {
            link.send(|o| o.message(Body::Note, task(0, 0, vec![noise(1 << 20)])));
        }),
        ("bytes of a blob that came before", |link| {
            // Their chunks take turns.
            link.send(|o| (0..2).for_each(|_| o.blob(7, noise(1 << 20))));
        }),
        ("blob of 3145728 bytes", |link| link.send(|o| o.blob(7, noise(3 << 20)))),
        ("message of 3145728 bytes", |link| link.send(|o| o.message(Body::Task, task(0, 0, vec![noise(3 << 20)])))),
        ("cancelled more than 1048576 tasks", |link| {
            link.send(|o| (0..=1 << 20).for_each(|n| o.control(Control::Cancel(Attempt { task: n, attempt: 0 }))));
        }),
    ];
    for (why, send) in cases {
        run(async {
            let mut hello = client_hello(1, false);
            hello.worker.max_payload = 2 << 20;
            let mut client = Raw::connect(hello).await;
            client.submit(part(100, 2 << 20));
            client.until(1, result).await;
            send(&client.link);
            client.until(1, |event| matches!(event, Event::Control(Control::Goodbye(_)))).await;
            let Some(Event::Control(Control::Goodbye(said))) = client.seen.last() else { panic!() };
            let said = String::from_utf8_lossy(said);
            assert!(said.contains(why), "{said}");
        });
    }
}

/// A task for one node runs there, however busy it is, and fails with it.
#[test]
fn pinned_tasks_stay() {
    let gate = Gate::new("pinned");
    let nodes = vec![embedded(client_hello(1, false), "3.11"), embedded(client_hello(1, false), "3.11")];
    let pool = ready(nodes);
    assert!((0..4).all(|n| pool.submit(gate.task(n), Some(1))));
    (4..8).for_each(|n| submit(&pool, task(n, 0, vec![])));
    assert_eq!(collect(&pool, 4).into_keys().collect::<std::collections::BTreeSet<_>>(), (4..8).collect());
    gate.open();
    assert!(collect(&pool, 4).values().all(|m| m.code == Outcome::Returned as u8));
    assert!(pool.submit(task(9, 0, vec![]), Some(7)));
    assert_eq!(collect(&pool, 1)[&9].code, Outcome::NodeLost as u8);
}

/// An idle node gets what a loaded one has not started.
#[test]
fn work_moves_to_an_idle_node() {
    let gate = Gate::new("moves");
    let pool = ready(vec![embedded(client_hello(2, false), "3.11")]);
    (0..2).for_each(|n| submit(&pool, gate.task(n)));
    (2..4).for_each(|n| submit(&pool, task(n, 0, vec![])));
    add(&pool, embedded(client_hello(2, true), "3.11"));
    // The first node's slots are taken: these two can only end on the second.
    let moved = collect(&pool, 2);
    assert!(moved.contains_key(&2) && moved.contains_key(&3), "{moved:?}");
    gate.open();
    assert!(collect(&pool, 2).values().all(|m| m.code == Outcome::Returned as u8));
    assert_eq!(pool.counts(), (0, 0));
}

/// Closing cancels what is left, and a closed pool says so.
#[test]
fn closing_ends_every_task() {
    let gate = Gate::new("closing");
    let pool = ready(vec![embedded(client_hello(1, false), "3.11")]);
    (0..5).for_each(|n| submit(&pool, gate.task(n)));
    pool.close();
    let ended = pool.finished(0, Duration::ZERO).unwrap();
    assert_eq!(ended.len(), 5);
    assert!(ended.iter().all(|m| m.code == Outcome::Cancelled as u8));
    assert_eq!(pool.finished(0, Duration::ZERO), None);
    assert!(pool.nodes().iter().all(|n| n.state == NodeState::Closed), "{:?}", pool.nodes());
}

/// The stream of a refused connection carried nothing but the key exchange.
#[test]
fn nothing_is_sent_before_the_host_is_verified() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let key = new_key().unwrap();
    let host = vec![key.public_key().clone()];
    let port = listener.local_addr().unwrap().port();
    let mut node = spec(Endpoint::Address("127.0.0.1".to_owned(), port), key, host, client_hello(1, false));
    node.target.timeout = Duration::from_secs(1);
    node.command = "SECRET-COMMAND".to_owned();
    let reader = std::thread::spawn(move || {
        let (mut stream, _): (TcpStream, _) = listener.accept().unwrap();
        let mut sent = Vec::new();
        stream.set_read_timeout(Some(BOUND)).unwrap();
        drop(stream.read_to_end(&mut sent));
        sent
    });
    lost(node);
    let sent = reader.join().unwrap();
    assert!(sent.starts_with(b"SSH-2.0-") && sent.len() < 4096, "{} bytes", sent.len());
    assert!(!sent.windows(6).any(|w| w == b"SECRET"));
}
