//! Stripes: further channels for blobs, where the round trip is long.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as Socket;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use russh::server::{self, Auth, ChannelOpenHandle, Msg, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, ChannelStream};
use skyward_lite::client::pool::{Endpoint, NodeSpec, NodeState, Pool};
use skyward_lite::client::stripes::{MIN_WAITING_BYTES, stripes};
use skyward_lite::error::{FrameError, SessionError};
use skyward_lite::node::arrivals::{Arrival, Arrivals};
use skyward_lite::node::stripes::Stripes as AgentStripes;
use skyward_lite::timing::{MAX_MESSAGE, MAX_STRIPES, Timing};
use skyward_lite::transport::auth::{Identity, new_key};
use skyward_lite::transport::connection::Connection;
use skyward_lite::transport::host_key::HostKeys;
use skyward_lite::transport::ssh::{Algorithms, RekeyLimits, Target};
use skyward_lite::wire::pace::Allowance;
use skyward_lite::wire::{
    AgentHello, Attempt, BlobPart, Body, Control, Event, EventReader, FrameSender, Message, Outbox, Outcome, greet,
    hello,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf, duplex};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc};

#[path = "support/hello.rs"]
mod support;
use support::{agent_hello, client_hello};

/// Bound on everything here: a hang is a failure with a name.
const BOUND: Duration = Duration::from_secs(30);
/// One way to a host that is far away.
const FAR: Duration = Duration::from_millis(15);
const PATH: &str = "/run/user/1000/skyward-lite-0/stripes";

fn on_a_thread(work: impl Future<Output = ()> + Send + 'static) {
    std::thread::spawn(move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work);
    });
}

fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(BOUND, work).await.expect("no answer") })
}

/// Bytes that cannot be compressed, and differ from place to place.
fn content(size: usize) -> Bytes {
    let mut state = 1_u64;
    let bytes = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from(state >> 32).unwrap().to_le_bytes()
    });
    bytes.flatten().take(size).collect()
}

/// Blobs that arrive in chunks.
#[derive(Debug, Default)]
struct Arrived {
    blobs: HashMap<u64, Vec<u8>>,
    /// Bytes that have arrived, of each.
    bytes: HashMap<u64, usize>,
}

impl Arrived {
    fn take(&mut self, event: &Event) {
        let Event::Chunk(chunk) = event else { panic!("{event:?}") };
        let blob = self.blobs.entry(chunk.number).or_insert_with(|| vec![0; usize::try_from(chunk.total).unwrap()]);
        let at = usize::try_from(chunk.offset).unwrap();
        blob[at..at + chunk.bytes.len()].copy_from_slice(&chunk.bytes);
        *self.bytes.entry(chunk.number).or_default() += chunk.bytes.len();
    }

    fn is_complete(&self, number: u64) -> bool {
        self.blobs.get(&number).is_some_and(|blob| self.bytes[&number] == blob.len())
    }
}

#[test]
fn as_many_stripes_are_opened_as_the_round_trip_asks_for() {
    let table = [(0, 0), (1, 0), (9, 0), (10, 2), (16, 2), (20, 3), (33, 4), (40, 5), (67, 8), (80, 8), (10_000, 8)];
    for (millis, count) in table {
        assert_eq!(stripes(Duration::from_millis(millis)), count, "{millis} ms");
    }
    assert_eq!(stripes(Duration::MAX), MAX_STRIPES);
}

/// While a stripe is open the outbox leaves the blobs to stripes, and everything else is sent by itself.
#[test]
fn an_outbox_leaves_blobs_to_its_stripes() {
    let mut outbox = Outbox::default();
    let blob = content(1_000_000);
    outbox.blob(1, blob.clone());
    outbox.blob(2, blob.clone());
    outbox.message(Body::Task, Message { parts: vec![content(100_000)], ..Message::default() });
    assert_eq!(outbox.blob_bytes(), 2_000_000);
    outbox.open_stripe();
    let mut wire = Vec::new();
    while outbox.fill(&mut wire).unwrap() && outbox.bytes() > 2_000_000 {}
    assert_eq!((outbox.bytes(), outbox.blob_bytes()), (2_000_000, 2_000_000));
    let mut raw = Vec::new();
    assert!(outbox.fill_blobs(&mut raw, &mut Allowance::unlimited()));
    assert!((32_000..200_000).contains(&raw.len()), "a block");
    assert_eq!(outbox.bytes(), outbox.blob_bytes());
    // Of what is under way the rest is sent, and of what is not, nothing.
    outbox.blob(3, blob);
    outbox.forget(vec![3]);
    outbox.close_stripe();
    while outbox.fill(&mut wire).unwrap() && outbox.bytes() > 0 {}
    assert_eq!((outbox.bytes(), outbox.blob_bytes()), (0, 0));
    assert!(!outbox.fill_blobs(&mut Vec::new(), &mut Allowance::unlimited()));
}

/// Two stripes carry the blobs together, each byte once; a small message does not wait for a stripe that takes nothing.
#[test]
fn stripes_share_the_blobs() {
    run(async {
        let sender = Arc::new(FrameSender::default());
        let blob = content(3_000_000);
        let (near, far) = duplex(1 << 16);
        let mut own = EventReader::new(far, MAX_MESSAGE);
        tokio::spawn({
            let sender = Arc::clone(&sender);
            async move { sender.run(near, None).await }
        });
        let mut ends = Vec::new();
        for _ in 0..2 {
            let (near, far) = duplex(1 << 16);
            ends.push(EventReader::new(far, MAX_MESSAGE));
            tokio::spawn({
                let sender = Arc::clone(&sender);
                async move { sender.stripe().run(near, None).await }
            });
        }
        // Both have begun.
        tokio::task::yield_now().await;
        sender.send(|o| {
            (1..4).for_each(|number| o.blob(number, blob.clone()));
            o.message(Body::Task, Message { code: 7, ..Message::default() });
        });
        let mut events = Vec::new();
        while events.is_empty() {
            own.read(&mut events).await.unwrap();
        }
        assert!(matches!(&events[..], [Event::Message(Body::Task, Message { code: 7, .. })]), "{events:?}");
        let (mut arrived, mut counts) = (Arrived::default(), [0, 0]);
        while !(1..4).all(|number| arrived.is_complete(number)) {
            for (end, count) in ends.iter_mut().zip(&mut counts) {
                let mut events = Vec::new();
                // One of them may be through already.
                let _ = tokio::time::timeout(Duration::from_millis(10), end.read(&mut events)).await;
                *count += events.len();
                for event in &events {
                    arrived.take(event);
                }
            }
        }
        assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
        assert!(arrived.blobs.values().all(|bytes| *bytes == blob));
        assert_eq!(arrived.bytes.values().sum::<usize>(), 9_000_000);
    });
}

/// What a stripe that was not used leaves behind is sent by the others, or by the session's own stream.
#[test]
fn a_stripe_that_was_not_used_leaves_its_blobs_to_others() {
    run(async {
        let sender = Arc::new(FrameSender::default());
        let stripe = sender.stripe();
        let (near, far) = duplex(1 << 16);
        tokio::spawn({
            let sender = Arc::clone(&sender);
            async move { sender.run(near, None).await }
        });
        sender.send(|o| o.blob(1, content(500_000)));
        tokio::time::timeout(BOUND, sender.blobs_wait(500_000)).await.expect("it waits");
        assert!(!stripe.is_used());
        drop(stripe);
        let (mut own, mut arrived) = (EventReader::new(far, MAX_MESSAGE), Arrived::default());
        while !arrived.is_complete(1) {
            let mut events = Vec::new();
            own.read(&mut events).await.unwrap();
            for event in &events {
                arrived.take(event);
            }
        }
    });
}

/// What a host does with stripes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stripes {
    /// It takes them.
    Good,
    /// It opens no further channel.
    Refused,
    /// It runs no further command.
    NoCommand,
    /// The command fails.
    Fails,
    /// Another agent answers.
    Stranger,
    /// Each ends after the first chunk.
    Cut,
    /// Each sends what an agent does not, and takes nothing.
    Chatty,
    /// They do not exist: the agent names no socket.
    Unknown,
    /// None is opened. The agent's session can go on over another connection, and its stream ends at the first task. The command that would go on with it says nothing.
    Leaves,
}

/// What has arrived at a host, and how.
#[derive(Debug, Default)]
struct Seen {
    arrived: Mutex<Arrived>,
    /// To the client.
    sender: Arc<FrameSender>,
    changed: Notify,
    /// Commands for stripes.
    opened: Mutex<usize>,
    /// Chunks that came over the session's own channel, and over stripes.
    chunks: Mutex<(usize, usize)>,
}

impl Seen {
    fn take(&self, event: &Event, striped: bool) {
        self.arrived.lock().unwrap().take(event);
        let mut chunks = self.chunks.lock().unwrap();
        *(if striped { &mut chunks.1 } else { &mut chunks.0 }) += 1;
        self.changed.notify_one();
    }
}

/// A host with an agent of our own.
struct Host {
    stripes: Stripes,
    seen: Arc<Seen>,
    channels: HashMap<ChannelId, Channel<Msg>>,
    opened: usize,
}

impl server::Handler for Host {
    type Error = russh::Error;

    async fn auth_publickey(&mut self, _user: &str, _key: VerifiedPublicKey<'_>) -> Result<Auth, russh::Error> {
        Ok(Auth::Accept)
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), russh::Error> {
        self.opened += 1;
        if self.opened == 1 || self.stripes != Stripes::Refused {
            self.channels.insert(channel.id(), channel);
            reply.accept().await;
        } else {
            *self.seen.opened.lock().unwrap() += 1;
        }
        Ok(())
    }

    async fn exec_request(&mut self, id: ChannelId, command: &[u8], session: &mut Session) -> Result<(), russh::Error> {
        let channel = self.channels.remove(&id).unwrap();
        let seen = Arc::clone(&self.seen);
        if command == b"agent" {
            session.channel_success(id)?;
            let streams = tokio::io::split(channel.into_stream());
            let stripes = (self.stripes != Stripes::Unknown).then(|| PATH.to_owned());
            if self.stripes == Stripes::Leaves {
                tokio::spawn(leaving_agent(streams, seen));
            } else {
                tokio::spawn(agent(streams, stripes, seen));
            }
            return Ok(());
        }
        if command.starts_with(b"again") {
            self.channels.insert(id, channel);
            return session.channel_success(id);
        }
        assert_eq!(command, format!("stripe {PATH}").as_bytes());
        *seen.opened.lock().unwrap() += 1;
        if self.stripes == Stripes::NoCommand {
            return session.channel_failure(id);
        }
        session.channel_success(id)?;
        tokio::spawn(stripe(channel.into_stream(), self.stripes, seen));
        Ok(())
    }
}

/// Greet, be ready, and end each task when its blobs are here.
async fn agent(
    (from, to): (ReadHalf<ChannelStream<Msg>>, WriteHalf<ChannelStream<Msg>>),
    stripes: Option<String>,
    seen: Arc<Seen>,
) {
    let sender = Arc::clone(&seen.sender);
    let mut from = EventReader::of_session(from, MAX_MESSAGE, Arc::clone(&sender));
    let mut events = Vec::new();
    from.greeting(&mut events).await.unwrap();
    let greeting = hello(&AgentHello { socket: stripes, ..agent_hello() }).unwrap();
    sender.send(|o| o.control(greeting));
    sender.send(|o| o.control(Control::Ready { slots: 4 }));
    tokio::spawn({
        let sender = Arc::clone(&sender);
        async move { sender.run(to, None).await }
    });
    let mut tasks: Vec<Message> = Vec::new();
    loop {
        for event in events.drain(..) {
            match event {
                Event::Control(Control::Heartbeat { nonce, .. }) => {
                    sender.send(|o| o.control(Control::Pulse { nonce }));
                }
                Event::Message(Body::Task, task) => tasks.push(task),
                Event::Control(Control::Goodbye(_)) => sender.send(|o| o.close("done")),
                Event::Control(_) => {}
                chunk => seen.take(&chunk, false),
            }
        }
        tasks.retain(|task| {
            let arrived = seen.arrived.lock().unwrap();
            let waits = !task.blobs.iter().all(|blob| arrived.is_complete(blob.number));
            if !waits {
                let end = Message { id: task.id, code: Outcome::Returned as u8, ..Message::default() };
                sender.send(|o| o.message(Body::Result, end));
            }
            waits
        });
        tokio::select! {
            read = from.read(&mut events) => if read.is_err() { return },
            () = seen.changed.notified() => {}
        }
    }
}

/// Greet, be ready, and end the stream without a word at the first task.
async fn leaving_agent((from, mut to): (ReadHalf<ChannelStream<Msg>>, WriteHalf<ChannelStream<Msg>>), seen: Arc<Seen>) {
    let sender = Arc::clone(&seen.sender);
    let mut from = EventReader::of_session(from, MAX_MESSAGE, Arc::clone(&sender));
    let mut events = Vec::new();
    from.greeting(&mut events).await.unwrap();
    from.begin_stream().unwrap();
    sender.begin_stream(true);
    let greeting = hello(&AgentHello { socket: Some(PATH.to_owned()), ..agent_hello() }).unwrap();
    greet(&mut to, greeting).await.unwrap();
    sender.send(|o| o.control(Control::Ready { slots: 4 }));
    let reading = async {
        while !events.iter().any(|event| matches!(event, Event::Message(..))) {
            from.read(&mut events).await.unwrap();
        }
    };
    tokio::select! {
        sent = sender.run(to, None) => sent.unwrap(),
        () = reading => {}
    }
}

/// Be the command of a stripe, and the agent behind it.
async fn stripe(mut stream: ChannelStream<Msg>, stripes: Stripes, seen: Arc<Seen>) {
    // What a login shell says.
    stream.write_all(b"welcome\n").await.unwrap();
    if stripes == Stripes::Fails {
        return;
    }
    let epoch = if stripes == Stripes::Stranger { "2" } else { "1" };
    let (mut outbox, mut greeting) = (Outbox::default(), Vec::new());
    outbox.control(Control::Hello(Bytes::from(epoch)));
    outbox.fill(&mut greeting).unwrap();
    stream.write_all(&greeting).await.unwrap();
    let (from, mut to) = tokio::io::split(stream);
    let mut from = EventReader::of_session(from, MAX_MESSAGE, Arc::clone(&seen.sender));
    let mut events = Vec::new();
    while from.read(&mut events).await.is_ok() {
        if stripes == Stripes::Cut {
            return;
        }
        if stripes == Stripes::Chatty {
            outbox.control(Control::Pulse { nonce: 1 });
            let mut wire = Vec::new();
            outbox.fill(&mut wire).unwrap();
            to.write_all(&wire).await.unwrap();
            // The blob does not become complete.
            return std::future::pending().await;
        }
        events.drain(..).for_each(|event| seen.take(&event, true));
    }
}

/// Carry bytes between two sockets, each some time after it came.
async fn carry(one: Socket, other: Socket, delay: Duration) {
    let (one, other) = (tokio_socket(one), tokio_socket(other));
    let (one, other) = (tokio::io::split(one), tokio::io::split(other));
    for (mut from, mut to) in [(one.0, other.1), (other.0, one.1)] {
        let (late, mut due) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(n) = from.read(&mut buffer).await
                && n > 0
            {
                let _ = late.send((tokio::time::Instant::now() + delay, buffer[..n].to_vec()));
            }
        });
        tokio::spawn(async move {
            while let Some((at, bytes)) = due.recv().await {
                tokio::time::sleep_until(at).await;
                if to.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            let _ = to.shutdown().await;
        });
    }
    std::future::pending::<()>().await;
}

fn tokio_socket(socket: Socket) -> UnixStream {
    socket.set_nonblocking(true).unwrap();
    UnixStream::from_std(socket).unwrap()
}

/// A pool with a node at such a host, `delay` away.
fn pool(stripes: Stripes, delay: Duration) -> (Pool, Arc<Seen>) {
    let (pool, seen, _) = pool_and_connection(stripes, delay);
    (pool, seen)
}

fn pool_and_connection(stripes: Stripes, delay: Duration) -> (Pool, Arc<Seen>, Arc<Connection>) {
    let ((ours, near), (far, theirs)) = (Socket::pair().unwrap(), Socket::pair().unwrap());
    let (host_key, user_key) = (new_key().unwrap(), new_key().unwrap());
    let target = Target {
        user: "user".to_owned(),
        host_keys: HostKeys { known: vec![host_key.public_key().clone()], ..HostKeys::default() },
        algorithms: Algorithms::default(),
        identities: vec![Identity::Key(Arc::new(user_key))],
        rekey: RekeyLimits::default(),
        timeout: BOUND,
    };
    let seen = Arc::<Seen>::default();
    let host = Host { stripes, seen: Arc::clone(&seen), channels: HashMap::new(), opened: 0 };
    on_a_thread(carry(near, far, delay));
    on_a_thread(async move {
        let config = server::Config { keys: vec![host_key], ..server::Config::default() };
        let session = server::run_stream(Arc::new(config), tokio_socket(theirs), host).await.unwrap();
        drop(session.await);
    });
    let leaves = stripes == Stripes::Leaves;
    let timing = if leaves { Timing::DEFAULT.faster(10) } else { Timing::DEFAULT };
    let pool = Pool::with_timing(1, MAX_MESSAGE, timing).unwrap();
    let id = pool.add_node("far".to_owned(), false);
    let connection = Arc::new(pool.connect(Endpoint::Socket(ours), target).unwrap());
    let (command, stripe) = ("agent".to_owned(), (!leaves).then(|| "stripe".to_owned()));
    let again = leaves.then(|| "again".to_owned());
    let (ready_timeout, hello) = (BOUND, client_hello(4, false));
    let connected = Arc::clone(&connection);
    pool.start_node(id, NodeSpec { connection, command, stripe, again, hello, ready_timeout });
    (pool, seen, connected)
}

/// Wait until the pool's only node is in a state.
fn await_state(pool: &Pool, such: impl Fn(&NodeState) -> bool) {
    let by = Instant::now() + BOUND;
    while !such(&pool.nodes()[0].state) {
        assert!(Instant::now() < by, "{:?}", pool.nodes());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A thread that has offered another connection for a node that is away returns when the pool is closed.
#[test]
fn nobody_waits_for_a_node_of_a_pool_that_is_closed() {
    let (pool, _seen, connection) = pool_and_connection(Stripes::Leaves, Duration::ZERO);
    await_state(&pool, |state| *state == NodeState::Ready);
    assert!(pool.submit(Message { id: Attempt { task: 1, attempt: 0 }, ..Message::default() }, None));
    await_state(&pool, |state| matches!(state, NodeState::Reconnecting(_)));
    let pool = Arc::new(pool);
    let (done, waiting) = std::sync::mpsc::channel();
    let offering = Arc::clone(&pool);
    std::thread::spawn(move || drop(done.send(offering.resume_node(0, connection))));
    // The session is busy with the command that says nothing, so the connection that is offered waits, or is offered yet.
    std::thread::sleep(Duration::from_millis(50));
    pool.close();
    waiting.recv_timeout(BOUND).expect("it returns").unwrap();
}

/// Submit a task that names a blob of this content, and return how it ended.
fn end_of(pool: &Pool, bytes: Bytes) -> Message {
    let (content, fresh) = pool.contents().of_bytes(bytes, Instant::now());
    let blobs = vec![BlobPart { place: 1, number: 0, fresh, content: Some(content) }];
    let id = Attempt { task: 1, attempt: 0 };
    assert!(pool.submit(Message { id, parts: vec![Bytes::new()], blobs, ..Message::default() }, None));
    let by = Instant::now() + BOUND;
    loop {
        if let Some(end) = pool.finished(0, Duration::from_secs(1)).unwrap().pop() {
            return end;
        }
        assert!(Instant::now() < by, "the task does not end: {:?}", pool.nodes());
    }
}

const SIZE: usize = 2 * MIN_WAITING_BYTES;

#[test]
fn a_far_host_gets_a_blob_over_stripes() {
    let (pool, seen) = pool(Stripes::Good, FAR);
    let blob = content(SIZE);
    let end = end_of(&pool, blob.clone());
    assert_eq!(end.code, Outcome::Returned as u8, "{:?}", pool.nodes());
    assert!((2..=MAX_STRIPES).contains(&*seen.opened.lock().unwrap()));
    assert_eq!(seen.arrived.lock().unwrap().blobs[&1], blob);
    let (own, striped) = *seen.chunks.lock().unwrap();
    assert!(striped > own, "{own} chunks came over the session's own channel, {striped} over stripes");
    let sent = pool.traffic()[0].0;
    assert!(sent > SIZE as u64, "what crosses stripes is counted: {sent}");
    pool.close();
    assert_eq!(pool.nodes()[0].state, NodeState::Closed);
}

#[test]
fn no_stripe_is_opened_for_little_nor_for_a_host_that_is_near_or_has_none() {
    for (stripes, delay, size) in [
        (Stripes::Good, Duration::ZERO, SIZE),
        (Stripes::Good, FAR, MIN_WAITING_BYTES - 1),
        (Stripes::Unknown, FAR, SIZE),
    ] {
        let (pool, seen) = pool(stripes, delay);
        assert_eq!(end_of(&pool, content(size)).code, Outcome::Returned as u8);
        assert_eq!(*seen.opened.lock().unwrap(), 0, "{stripes:?}, {delay:?}, {size} bytes");
    }
}

/// A host that takes no stripe, in whatever way, gets all over the session's own channel.
#[test]
fn a_host_that_takes_no_stripe_is_served_all_the_same() {
    for stripes in [Stripes::Refused, Stripes::NoCommand, Stripes::Fails, Stripes::Stranger] {
        let (pool, seen) = pool(stripes, FAR);
        let end = end_of(&pool, content(SIZE));
        assert_eq!(end.code, Outcome::Returned as u8, "{stripes:?}: {:?}", pool.nodes());
        assert!(*seen.opened.lock().unwrap() > 0);
        assert_eq!(seen.chunks.lock().unwrap().1, 0);
    }
}

/// A stripe that ends while it is used may have lost a chunk: the session ends.
#[test]
fn a_stripe_that_ends_early_ends_the_session() {
    for (stripes, why) in [(Stripes::Cut, "a channel to it that carried data ended"), (Stripes::Chatty, "on a stripe")]
    {
        let (pool, _) = pool(stripes, FAR);
        assert_eq!(end_of(&pool, content(SIZE)).code, Outcome::NodeLost as u8);
        let NodeState::Lost(found) = &pool.nodes()[0].state else { panic!("{stripes:?}: {:?}", pool.nodes()) };
        assert!(found.contains(why), "{found}");
    }
}

/// A directory of a test, which goes with this.
struct Directory(std::path::PathBuf);

impl Directory {
    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn tempfile(name: &str) -> Directory {
    let path = std::env::temp_dir().join(format!("skyward-test-{name}-{}", std::process::id()));
    std::fs::create_dir(&path).unwrap();
    Directory(path)
}

/// A stripe that is handed to an agent's listener: what was written into it, and the command's connection.
async fn hand_over(path: &str) -> (UnixStream, UnixStream) {
    let relay = UnixStream::connect(path).await.unwrap();
    let (ours, theirs) = Socket::pair().unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut rights = rustix::net::SendAncillaryBuffer::new(&mut space);
    let descriptors = [theirs.as_fd(), theirs.as_fd()];
    assert!(rights.push(rustix::net::SendAncillaryMessage::ScmRights(&descriptors)));
    let flags = rustix::net::SendFlags::empty();
    rustix::net::sendmsg(&relay, &[std::io::IoSlice::new(b"+")], &mut rights, flags).unwrap();
    (tokio_socket(ours), relay)
}

/// An agent greets on each stripe, takes what it brings, and ends the command when the stripe ends; what is no chunk ends the
/// session.
#[test]
fn an_agent_takes_stripes() {
    run(async {
        let directory = tempfile("stripes");
        let path = format!("{}/agent", directory.path());
        let mut arrivals = Arrivals::of(std::os::unix::net::UnixListener::bind(&path).unwrap()).unwrap();
        let (taken, mut arriving) = mpsc::unbounded_channel();
        let take = move |events: &mut Vec<Event>| {
            events.drain(..).for_each(|event| taken.send(event).unwrap());
            Ok(())
        };
        let mut serving = tokio::spawn(async move {
            let mut stripes = AgentStripes::new("7".to_owned(), MAX_MESSAGE, Arc::default());
            loop {
                tokio::select! {
                    arrival = arrivals.next() => match arrival {
                        Arrival::Stripe(streams) => stripes.add(streams, take.clone()),
                        Arrival::New(_) | Arrival::Again(..) => panic!("not a stripe"),
                    },
                    broken = stripes.broken() => return broken,
                }
            }
        });
        // Who hands nothing over is no stripe.
        let stranger = UnixStream::connect(&path).await.unwrap();
        drop(stranger);
        let mut ends = Vec::new();
        for _ in 0..2 {
            let (stream, relay) = hand_over(&path).await;
            let (from, to) = stream.into_split();
            let mut from = EventReader::new(from, 0);
            assert_eq!(from.greeting(&mut Vec::new()).await.unwrap(), "7");
            ends.push((from, to, relay));
        }
        let sender = FrameSender::default();
        let blob = content(500_000);
        sender.send(|o| o.blob(3, blob.clone()));
        let (mut arrived, mut stripe) = (Arrived::default(), sender.stripe());
        let (_, to, _) = &mut ends[0];
        tokio::select! {
            end = stripe.run(to, None) => panic!("{end:?}"),
            () = async {
                while !arrived.is_complete(3) {
                    arrived.take(&arriving.recv().await.unwrap());
                }
            } => {}
        }
        assert_eq!(arrived.blobs[&3], blob);
        // The client ends a stripe: the command ends. The command ends: the stripe does.
        let (_, to, mut relay) = ends.remove(0);
        drop(to);
        assert_eq!(relay.read(&mut [0]).await.unwrap(), 0);
        let (mut from, _to, relay) = ends.remove(0);
        drop(relay);
        let end = loop {
            if let Err(end) = from.read(&mut Vec::new()).await {
                break end;
            }
        };
        assert!(matches!(end, SessionError::Ended(_) | SessionError::Io(_)), "{end}");
        let (mut stream, _relay) = hand_over(&path).await;
        let mut wire = Vec::new();
        let mut outbox = Outbox::default();
        outbox.control(Control::Cancel(Attempt::default()));
        outbox.fill(&mut wire).unwrap();
        stream.write_all(&wire).await.unwrap();
        assert!(matches!((&mut serving).await.unwrap(), FrameError::BadSequence(_)));
    });
}
