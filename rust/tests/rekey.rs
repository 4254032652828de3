//! SSH connections whose keys are renewed again and again, while bytes flow in both directions and while none do: none is
//! lost, and none comes twice. Both ends are russh here; `tests/hosts/test_rekeys.py` has OpenSSH at the far end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::os::unix::net::UnixStream as Socket;
use std::sync::Arc;
use std::time::Duration;

use skyward_lite::transport::auth::{Identity, new_key};
use skyward_lite::transport::host_key::HostKeys;
use skyward_lite::transport::server;
use skyward_lite::transport::ssh::{self, Algorithms, RekeyLimits, Target};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

/// Bound on everything here: a hang is a failure with a name.
const BOUND: Duration = Duration::from_secs(60);
/// Bytes in each direction.
const BYTES: u64 = 24 << 20;
const MIB: usize = 1 << 20;
/// The size of a write, as in `wire/stream.rs`.
const WRITE: usize = 32 * 1024;

fn limits(bytes: usize, millis: u64) -> RekeyLimits {
    RekeyLimits { bytes, time: Duration::from_millis(millis) }
}

/// What is to be read from a byte on: bytes that lie elsewhere in the stream differ.
fn pattern(at: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 8);
    let mut word = at / 8;
    while bytes.len() < len + 8 {
        bytes.extend((word ^ 0x5bd1_e995).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        word += 1;
    }
    let begin = usize::try_from(at % 8).unwrap();
    bytes[begin..begin + len].to_vec()
}

async fn write(mut to: impl AsyncWrite + Unpin, bytes: u64) {
    let mut at = 0;
    while at < bytes {
        let len = WRITE.min(usize::try_from(bytes - at).unwrap());
        to.write_all(&pattern(at, len)).await.unwrap();
        at += len as u64;
    }
    to.flush().await.unwrap();
}

async fn read(mut from: impl AsyncRead + Unpin, bytes: u64) {
    let (mut at, mut buffer) = (0, vec![0; 1 << 18]);
    while at < bytes {
        let most = buffer.len().min(usize::try_from(bytes - at).unwrap());
        let count = from.read(&mut buffer[..most]).await.unwrap();
        assert!(count > 0, "the stream ended at byte {at}");
        assert_eq!(buffer[..count], pattern(at, count), "near byte {at}");
        at += count as u64;
    }
}

/// Send the same bytes in both directions at once, then nothing for a time, then small ones there and back.
async fn exchange(stream: impl AsyncRead + AsyncWrite + Unpin, bytes: u64, pause: Duration, begins: bool) {
    let (mut from, mut to) = tokio::io::split(stream);
    tokio::join!(write(&mut to, bytes), read(&mut from, bytes));
    for _ in 0..3 {
        tokio::time::sleep(pause).await;
        for round in 0_u32..200 {
            if begins {
                to.write_all(&round.to_le_bytes()).await.unwrap();
                to.flush().await.unwrap();
            }
            assert_eq!(from.read_u32_le().await.unwrap(), round);
            if !begins {
                to.write_all(&round.to_le_bytes()).await.unwrap();
                to.flush().await.unwrap();
            }
        }
    }
    if !begins {
        // What was written last is still on its way: the other end leaves first.
        assert!(from.read_u8().await.is_err(), "more came than was sent");
    }
}

fn on_a_thread<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> std::thread::JoinHandle<T> {
    std::thread::spawn(move || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(async { tokio::time::timeout(BOUND, work).await.expect("the connection stalls") })
    })
}

fn tokio_socket(socket: Socket) -> UnixStream {
    socket.set_nonblocking(true).unwrap();
    UnixStream::from_std(socket).unwrap()
}

/// Exchange bytes over a connection whose ends renew their keys after these limits. Return how often they did.
fn rekeys(client: RekeyLimits, embedded: RekeyLimits, bytes: u64, pause: Duration) -> u64 {
    let (ours, theirs) = Socket::pair().unwrap();
    let (host_key, user_key) = (new_key().unwrap(), new_key().unwrap());
    let target = Target {
        user: "user".to_owned(),
        host_keys: HostKeys { known: vec![host_key.public_key().clone()], ..HostKeys::default() },
        algorithms: Algorithms::default(),
        identities: vec![Identity::Key(Arc::new(user_key.clone()))],
        rekey: client,
        timeout: BOUND,
    };
    let authorized = user_key.public_key().clone();
    let far = on_a_thread(async move {
        let accepted = server::accept(tokio_socket(theirs), host_key, authorized, embedded, BOUND).await.unwrap();
        exchange(accepted.stream, bytes, pause, false).await;
    });
    let near = on_a_thread(async move {
        let connection = ssh::connect(tokio_socket(ours), &target).await.unwrap();
        exchange(connection.exec("").await.unwrap(), bytes, pause, true).await;
        connection.key_exchanges() - 1
    });
    let rekeys = near.join().unwrap();
    far.join().unwrap();
    rekeys
}

const NEVER: usize = 1 << 30;
const HOUR: u64 = 3_600_000;

/// The client's end renews the keys after each MiB.
#[test]
fn by_volume_from_the_client() {
    assert!(rekeys(limits(MIB, HOUR), RekeyLimits::default(), BYTES, Duration::ZERO) >= 12);
}

/// The server's end does.
#[test]
fn by_volume_from_the_server() {
    assert!(rekeys(RekeyLimits::default(), limits(MIB, HOUR), BYTES, Duration::ZERO) >= 12);
}

/// Both ends do, and often at once.
#[test]
fn by_volume_from_both_ends() {
    assert!(rekeys(limits(MIB, HOUR), limits(MIB, HOUR), BYTES, Duration::ZERO) >= 12);
}

/// A limit is less than one write: the keys are renewed as often as the ends come to it.
#[test]
fn by_hardly_any_volume() {
    assert!(rekeys(limits(16 * 1024, HOUR), limits(16 * 1024, HOUR), BYTES, Duration::ZERO) >= 12);
}

/// Both ends renew the keys by the clock, while the connection is busy and while it is idle.
#[test]
fn by_time_from_both_ends() {
    let often = limits(NEVER, 20);
    assert!(rekeys(often, often, BYTES, Duration::from_millis(200)) >= 12);
}

/// One end does.
#[test]
fn by_time_from_one_end() {
    let (often, hourly) = (limits(NEVER, 20), RekeyLimits::default());
    let pause = Duration::from_millis(200);
    assert!(rekeys(often, hourly, 1 << 20, pause) >= 12);
    assert!(rekeys(hourly, often, 1 << 20, pause) >= 12);
}
