//! Channels and forwardings that a peer opens without being asked: both ends refuse all of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::os::unix::net::UnixStream as Socket;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use russh::keys::{PrivateKey, PrivateKeyWithHashAlg, PublicKeyOrCertificate};
use russh::server::{self, Auth, ChannelOpenHandle, Msg, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, client};
use skyward_lite::client::pool::{Endpoint, Pool};
use skyward_lite::timing::MAX_MESSAGE;
use skyward_lite::transport::auth::{Identity, new_key};
use skyward_lite::transport::buffered::BufferedWrites;
use skyward_lite::transport::host_key::HostKeys;
use skyward_lite::transport::ssh::{Algorithms, CHANNEL_WINDOW, RekeyLimits, Target};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

/// Bound on everything here: a hang is a failure with a name.
const BOUND: Duration = Duration::from_secs(30);

/// A server that answers a command by opening channels: `rounds` of each kind. Then it prints what came of them.
struct Opener {
    rounds: usize,
}

async fn open_all(handle: &server::Handle) -> Vec<String> {
    let mut outcomes = Vec::new();
    let mut note = |kind: &str, opened: Result<Channel<Msg>, russh::Error>| {
        let outcome = match opened {
            Ok(_) => "accepted".to_owned(),
            Err(russh::Error::ChannelOpenFailure(why)) => format!("refused ({why:?})"),
            Err(why) => format!("failed ({why})"),
        };
        outcomes.push(format!("{kind}: {outcome}"));
    };
    note("session", handle.channel_open_session().await);
    note("direct-tcpip", handle.channel_open_direct_tcpip("localhost", 22, "localhost", 1).await);
    note("direct-streamlocal", handle.channel_open_direct_streamlocal("/tmp/socket").await);
    note("forwarded-tcpip", handle.channel_open_forwarded_tcpip("localhost", 22, "localhost", 1).await);
    note("forwarded-streamlocal", handle.channel_open_forwarded_streamlocal("/tmp/socket").await);
    note("x11", handle.channel_open_x11("localhost", 1).await);
    note("auth-agent", handle.channel_open_agent().await);
    outcomes
}

impl server::Handler for Opener {
    type Error = russh::Error;

    async fn auth_publickey(&mut self, _user: &str, _key: VerifiedPublicKey<'_>) -> Result<Auth, russh::Error> {
        Ok(Auth::Accept)
    }

    async fn channel_open_session(
        &mut self,
        _channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), russh::Error> {
        reply.accept().await;
        Ok(())
    }

    async fn exec_request(&mut self, id: ChannelId, _: &[u8], session: &mut Session) -> Result<(), russh::Error> {
        session.channel_success(id)?;
        let (handle, rounds) = (session.handle(), self.rounds);
        tokio::spawn(async move {
            let mut outcomes = Vec::new();
            for _ in 0..rounds {
                outcomes.extend(open_all(&handle).await);
            }
            drop(handle.data(id, Bytes::from(outcomes.join("\n"))).await);
            let _ = handle.exit_status_request(id, 0).await;
            let _ = handle.close(id).await;
        });
        Ok(())
    }
}

fn on_a_thread(work: impl Future<Output = ()> + Send + 'static) {
    std::thread::spawn(move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work);
    });
}

fn tokio_socket(socket: Socket) -> UnixStream {
    socket.set_nonblocking(true).unwrap();
    UnixStream::from_std(socket).unwrap()
}

/// Connect to an [`Opener`] and run a command there: what it says of its channels.
fn outcomes(rounds: usize) -> Result<Vec<String>, String> {
    let (ours, theirs) = Socket::pair().unwrap();
    let (host_key, user_key) = (new_key().unwrap(), new_key().unwrap());
    let target = Target {
        user: "user".to_owned(),
        host_keys: HostKeys { known: vec![host_key.public_key().clone()], ..HostKeys::default() },
        algorithms: Algorithms::default(),
        identities: vec![Identity::Key(Arc::new(user_key))],
        rekey: RekeyLimits::default(),
        timeout: BOUND,
    };
    on_a_thread(async move {
        let config = server::Config { keys: vec![host_key], ..server::Config::default() };
        let session = server::run_stream(Arc::new(config), tokio_socket(theirs), Opener { rounds }).await.unwrap();
        drop(session.await);
    });
    let pool = Pool::new(1, MAX_MESSAGE).unwrap();
    let connection = Arc::new(pool.connect(Endpoint::Socket(ours), target).map_err(|e| e.to_string())?);
    let output = pool.run(connection, "open".to_owned(), Bytes::new(), BOUND).map_err(|e| e.to_string())?;
    if output.status != Some(0) {
        return Err("the connection ended before the command did".to_owned());
    }
    Ok(String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect())
}

/// A server that opens a channel of any kind is refused, and its command runs on.
#[test]
fn channels_that_a_server_opens_are_refused() {
    let said = outcomes(3).unwrap();
    assert_eq!(said.len(), 21);
    assert!(said.iter().all(|line| line.ends_with("refused (AdministrativelyProhibited)")), "{said:#?}");
}

/// A server that goes on opening channels loses its connection: refusals are not kept for it without a bound.
#[test]
fn a_server_that_opens_channels_for_ever_is_left() {
    assert!(outcomes(1000).is_err());
}

/// What is kept for a peer that reads nothing is bounded, and the connection ends.
#[test]
fn what_a_peer_does_not_read_is_not_kept_without_a_bound() {
    let writing = async {
        let (ours, _theirs) = tokio::io::duplex(1024);
        let mut stream = BufferedWrites::new(ours, Some(Duration::from_secs(1)));
        let (piece, mut taken) = (vec![0; 1 << 20], 0);
        loop {
            match stream.write(&piece).await {
                Ok(more) => taken += more,
                Err(why) => break (taken, why.kind()),
            }
            assert!(taken <= 64 << 20);
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (taken, why) = runtime.block_on(async { tokio::time::timeout(BOUND, writing).await.unwrap() });
    assert!(taken >= 2 * CHANNEL_WINDOW as usize, "the windows of channels have room");
    assert_eq!(why, std::io::ErrorKind::TimedOut);
}

struct Anything;

impl client::Handler for Anything {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _shown: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(true)
    }
}

/// The embedded server grants one session: no second one, no other kind of channel, no forwarding.
#[test]
fn the_embedded_server_grants_one_session() {
    let (ours, theirs) = Socket::pair().unwrap();
    let (host_key, user_key): (PrivateKey, PrivateKey) = (new_key().unwrap(), new_key().unwrap());
    let authorized = user_key.public_key().clone();
    on_a_thread(async move {
        let accepted = skyward_lite::transport::server::accept(
            tokio_socket(theirs),
            host_key,
            authorized,
            RekeyLimits::default(),
            BOUND,
        )
        .await;
        drop(accepted);
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let attempts = async {
        let config = Arc::new(client::Config::default());
        let mut handle = client::connect_stream(config, tokio_socket(ours), Anything).await.unwrap();
        let key = PrivateKeyWithHashAlg::new(Arc::new(user_key), None);
        assert!(handle.authenticate_publickey("local", key).await.unwrap().success());
        let _session = handle.channel_open_session().await.unwrap();
        let refused = |opened: Result<Channel<client::Msg>, russh::Error>| match opened {
            Err(russh::Error::ChannelOpenFailure(_)) => {}
            other => panic!("{other:?}"),
        };
        refused(handle.channel_open_session().await);
        refused(handle.channel_open_direct_tcpip("localhost", 22, "localhost", 1).await);
        refused(handle.channel_open_direct_streamlocal("/tmp/socket").await);
        refused(handle.channel_open_x11("localhost", 1).await);
        assert!(handle.tcpip_forward("localhost", 0).await.is_err());
        assert!(handle.streamlocal_forward("/tmp/socket").await.is_err());
    };
    runtime.block_on(async { tokio::time::timeout(BOUND, attempts).await.unwrap() });
}
