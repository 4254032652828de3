//! An agent with a socket and the streams that come there, in an order that is not that of their commands: what comes late
//! changes nothing of a session that goes on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![cfg(target_os = "linux")]

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream as Socket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use skyward_lite::node::arrivals::Arrivals;
use skyward_lite::node::session;
use skyward_lite::node::session::AgentSpec;
use skyward_lite::timing::MAX_MESSAGE;
use skyward_lite::wire::{
    ArrivedBlocks, Attach, ClientHello, Control, Event, EventReader, FrameSender, attach, greet, hello,
};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

#[path = "support/hello.rs"]
mod support;
use support::client_hello;

/// Bound on everything here: a hang is a failure with a name.
const BOUND: Duration = Duration::from_secs(30);

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(BOUND, test).await.expect("no answer") })
}

fn tokio_socket(socket: Socket) -> UnixStream {
    socket.set_nonblocking(true).unwrap();
    UnixStream::from_std(socket).unwrap()
}

/// A stream that a command has handed over.
struct Handed {
    /// The command's connection to the agent.
    relay: UnixStream,
    stream: Socket,
}

/// The agent's socket.
struct At(PathBuf);

impl At {
    /// Serve one client here, in the present runtime.
    fn serve(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("skyward-attach-{name}-{}", std::process::id()));
        drop(std::fs::remove_file(&path));
        let arrivals = Arrivals::of(UnixListener::bind(&path).unwrap()).unwrap();
        let spec = AgentSpec {
            worker: vec!["sleep".to_owned(), "60".to_owned()],
            version: "0".to_owned(),
            python: "3.11".to_owned(),
            epoch: "1".to_owned(),
            packages: [].into(),
            notices: Vec::new(),
            cores: None,
            directory: None,
        };
        tokio::spawn(session::run(None, arrivals, Some(path.to_string_lossy().into_owned()), spec));
        Self(path)
    }

    /// Hand `theirs` over, as `attach.py` does: the other end of `stream`.
    fn hand(&self, kind: u8, stream: Socket, theirs: &Socket) -> Handed {
        let relay = Socket::connect(Path::new(&self.0)).unwrap();
        let fds = [theirs.as_fd(), theirs.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        assert!(rights.push(SendAncillaryMessage::ScmRights(&fds)));
        rustix::net::sendmsg(&relay, &[IoSlice::new(&[kind])], &mut rights, SendFlags::empty()).unwrap();
        Handed { relay: tokio_socket(relay), stream }
    }
}

impl Drop for At {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

/// A client with a session.
struct Client {
    link: Arc<FrameSender>,
    reader: EventReader<OwnedReadHalf>,
    to: OwnedWriteHalf,
    /// Open for as long as the client is.
    relay: UnixStream,
}

impl Client {
    async fn begin(at: &At) -> Self {
        let (ours, theirs) = Socket::pair().unwrap();
        let Handed { relay, stream } = at.hand(b'n', ours, &theirs);
        drop(theirs);
        let (from, mut to) = tokio_socket(stream).into_split();
        greet(&mut to, hello(&ClientHello { resumable: true, ..client_hello(1, true) }).unwrap()).await.unwrap();
        let link = Arc::new(FrameSender::default());
        let mut reader = EventReader::of_session(from, MAX_MESSAGE, Arc::clone(&link));
        reader.greeting(&mut Vec::new()).await.unwrap();
        reader.begin_stream().unwrap();
        link.begin_stream(true);
        Self { link, reader, to, relay }
    }

    /// Go on over another connection, by the try of this number.
    async fn go_on(&mut self, at: &At, number: u64) {
        self.reader.disconnect();
        let (ours, theirs) = Socket::pair().unwrap();
        let Handed { relay, stream } = at.hand(b'a', ours, &theirs);
        drop(theirs);
        let (from, mut to) = tokio_socket(stream).into_split();
        greet(&mut to, wanted(self.reader.reached(), number)).await.unwrap();
        let mut reader = EventReader::new(from, 0);
        let answer = reader.attached().await.unwrap();
        let (from, rest) = reader.into_parts().unwrap();
        self.link.resume(answer.received, &answer.blocks).unwrap();
        self.reader.resume(from.unwrap(), &rest);
        (self.to, self.relay) = (to, relay);
    }

    /// Send a heartbeat, and wait for the agent's answer.
    async fn is_answered(&mut self, nonce: u64) {
        self.link.send(|o| o.control(Control::Heartbeat { nonce, lease_ms: 60_000, echo: 0 }));
        let mut seen = Vec::new();
        let Self { link, reader, to, relay: _ } = self;
        let read = async {
            while !seen.iter().any(|event| *event == Event::Control(Control::Pulse { nonce })) {
                reader.read(&mut seen).await.expect("the session goes on");
                reader.tell_reached();
            }
        };
        tokio::select! {
            sent = link.run(to, None) => panic!("{sent:?}"),
            () = read => {}
        }
    }
}

fn wanted(received: u64, number: u64) -> Control {
    let (epoch, boot) = ("1".to_owned(), String::new());
    attach(&Attach { epoch, received, number, blocks: ArrivedBlocks::default(), boot }).unwrap()
}

/// A client gave a try up, and goes on by a later one. The first one's command comes to the agent afterwards.
#[test]
fn a_try_to_go_on_that_is_overtaken_is_no_use() {
    run(async {
        let at = At::serve("late");
        let mut client = Client::begin(&at).await;
        let before = client.reader.reached();
        client.is_answered(1).await;
        client.go_on(&at, 2).await;
        client.is_answered(2).await;
        let (ours, theirs) = Socket::pair().unwrap();
        let Handed { relay: _relay, stream } = at.hand(b'a', ours, &theirs);
        drop(theirs);
        let (mut from, mut to) = tokio_socket(stream).into_split();
        greet(&mut to, wanted(before, 1)).await.unwrap();
        let mut answer = Vec::new();
        tokio::io::AsyncReadExt::read_to_end(&mut from, &mut answer).await.unwrap();
        assert!(answer.is_empty(), "{answer:?}");
        client.is_answered(3).await;
        client.go_on(&at, 3).await;
        client.is_answered(4).await;
    });
}

/// The command of a connection that broke begins late, when its client has a session by another one.
#[test]
fn a_new_session_whose_client_has_left_is_none() {
    run(async {
        let at = At::serve("left");
        let mut client = Client::begin(&at).await;
        client.is_answered(1).await;
        let (ours, theirs) = Socket::pair().unwrap();
        // The hello of the client is there, and the client is not.
        let mut gone = tokio_socket(ours);
        greet(&mut gone, hello(&client_hello(1, true)).unwrap()).await.unwrap();
        drop(gone);
        let (unused, _) = Socket::pair().unwrap();
        let Handed { mut relay, .. } = at.hand(b'n', unused, &theirs);
        let mut said = Vec::new();
        tokio::io::AsyncReadExt::read_to_end(&mut relay, &mut said).await.unwrap();
        assert_eq!(said, b"k", "its command need not look for another agent");
        client.is_answered(2).await;
        // One that is there gets what it wants: this agent ends.
        let (ours, theirs) = Socket::pair().unwrap();
        let Handed { mut relay, mut stream } = at.hand(b'n', ours, &theirs);
        drop(theirs);
        tokio::io::AsyncReadExt::read_to_end(&mut relay, &mut said).await.unwrap();
        assert_eq!((said.len(), stream.read(&mut [0]).unwrap()), (1, 0));
    });
}

/// A client says goodbye and leaves at once: the end of its command may be seen as soon as the goodbye. The agent ends, and
/// does not wait for the client to come back.
#[test]
fn a_goodbye_just_before_the_end_of_the_connection_is_read() {
    for round in 0..20 {
        run(async {
            let at = At::serve(&format!("goodbye-{round}"));
            let mut client = Client::begin(&at).await;
            client.is_answered(1).await;
            let Client { link, reader, mut to, relay } = client;
            link.send(|o| o.close("it is over"));
            // In one go, so that the agent, which shares this thread, finds both.
            let mut sending = Box::pin(async { link.run(&mut to, None).await });
            let polled = std::future::poll_fn(|task| std::task::Poll::Ready(sending.as_mut().poll(task))).await;
            assert!(matches!(polled, std::task::Poll::Ready(Ok(()))), "{polled:?}");
            drop(relay);
            while Socket::connect(Path::new(&at.0)).is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            drop(reader);
        });
    }
}
