//! The client's end of an SSH connection: verify the host, authenticate, run one command, hand out its stream.

use std::borrow::Cow;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use russh::client::{self, AuthResult};
use russh::keys::ssh_key::private::Ed25519Keypair;
use russh::keys::{Algorithm, HashAlg, PrivateKey, PrivateKeyWithHashAlg, PublicKey, PublicKeyOrCertificate};
use russh::{ChannelMsg, ChannelStream, Preferred};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use crate::error::SshError;
use crate::session::{SLICE, SUSPECT, lock};

/// Bytes that the far end may send on a channel before we grant more. OpenSSH's own is 2 MiB: 25 MB/s at 80 ms.
pub const CHANNEL_WINDOW: u32 = 16 * 1024 * 1024;
/// The ciphers that we offer: AES-GCM first, which the CPU does in hardware, then russh's safe choices.
const CIPHERS: &[russh::cipher::Name] =
    &[russh::cipher::AES_256_GCM, russh::cipher::CHACHA20_POLY1305, russh::cipher::AES_256_CTR];

/// Our preferences for both ends.
pub(crate) fn preferred() -> Preferred {
    Preferred { cipher: Cow::Borrowed(CIPHERS), ..Preferred::default() }
}

/// Whom to connect to, and as whom.
#[derive(Clone)]
pub struct Target {
    pub user: String,
    /// Our private key.
    pub key: PrivateKey,
    /// The host's keys, any of which it may show. Only their types are offered.
    pub host_keys: Vec<PublicKey>,
    /// What to run there.
    pub command: String,
    /// Bound on connection, key exchange and authentication together.
    pub timeout: Duration,
}

/// Make a fresh Ed25519 key.
///
/// # Errors
/// [`SshError::Key`] when the system has no randomness to give.
pub fn new_key() -> Result<PrivateKey, SshError> {
    let mut seed = [0_u8; 32];
    getrandom::fill(&mut seed).map_err(|e| SshError::Key(e.to_string()))?;
    Ok(PrivateKey::from(Ed25519Keypair::from_seed(&seed)))
}

/// An open connection. Dropping it closes the connection.
pub struct Connection {
    _handle: client::Handle<Verifier>,
    pub stream: ChannelStream<client::Msg>,
}

struct Verifier {
    expected: Vec<PublicKey>,
    refused: Arc<Mutex<Option<String>>>,
}

impl client::Handler for Verifier {
    type Error = russh::Error;

    async fn check_server_key(&mut self, shown: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        // Certificates are never offered; one that comes all the same is refused.
        let PublicKeyOrCertificate::PublicKey { key, .. } = shown else {
            *lock(&self.refused) = Some("a host certificate".to_owned());
            return Ok(false);
        };
        let good = self.expected.iter().any(|e| e.key_data() == key.key_data());
        if !good {
            *lock(&self.refused) = Some(fingerprint(key));
        }
        Ok(good)
    }
}

fn fingerprint(key: &PublicKey) -> String {
    format!("{} {}", key.algorithm(), key.fingerprint(HashAlg::Sha256))
}

fn algorithms(keys: &[PublicKey]) -> Vec<Algorithm> {
    let mut all = Vec::new();
    for key in keys {
        let names = match key.algorithm() {
            Algorithm::Rsa { .. } => {
                vec![Algorithm::Rsa { hash: Some(HashAlg::Sha512) }, Algorithm::Rsa { hash: Some(HashAlg::Sha256) }]
            }
            other => vec![other],
        };
        for name in names {
            if !all.contains(&name) {
                all.push(name);
            }
        }
    }
    all
}

/// Open an SSH connection over `stream` and run the target's command.
///
/// # Errors
/// Any [`SshError`]. Nothing but the key exchange is sent before the host's key is verified.
pub async fn connect<S>(stream: S, target: &Target) -> Result<Connection, SshError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let seconds = target.timeout.as_secs();
    tokio::time::timeout(target.timeout, open(stream, target)).await.map_err(|_| SshError::Timeout(seconds))?
}

/// As [`connect`], over a TCP connection that is made first, within the same bound.
///
/// # Errors
/// As [`connect`]; [`SshError::Io`] if the name does not resolve or nobody answers.
pub async fn connect_tcp(host: &str, port: u16, target: &Target) -> Result<Connection, SshError> {
    let seconds = target.timeout.as_secs();
    let both = async {
        let socket = TcpStream::connect((host, port)).await?;
        // Nagle's algorithm would hold small frames back until the last ones are acknowledged.
        socket.set_nodelay(true)?;
        open(socket, target).await
    };
    tokio::time::timeout(target.timeout, both).await.map_err(|_| SshError::Timeout(seconds))?
}

async fn open<S>(stream: S, target: &Target) -> Result<Connection, SshError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let config = client::Config {
        window_size: CHANNEL_WINDOW,
        preferred: Preferred { key: Cow::Owned(algorithms(&target.host_keys)), ..preferred() },
        ..client::Config::default()
    };
    let refused = Arc::new(Mutex::new(None));
    let verifier = Verifier { expected: target.host_keys.clone(), refused: Arc::clone(&refused) };
    let connected = client::connect_stream(Arc::new(config), Unblocked::new(stream, Some(SUSPECT)), verifier).await;
    let mut handle = connected.map_err(|error| match lock(&refused).take() {
        Some(got) => {
            SshError::HostKey { got, expected: target.host_keys.iter().map(fingerprint).collect::<Vec<_>>().join(", ") }
        }
        None => error.into(),
    })?;
    let hash = if target.key.algorithm().is_rsa() { handle.best_supported_rsa_hash().await?.flatten() } else { None };
    let key = PrivateKeyWithHashAlg::new(Arc::new(target.key.clone()), hash);
    if let AuthResult::Failure { remaining_methods, .. } = handle.authenticate_publickey(&target.user, key).await? {
        let accepts = remaining_methods.iter().map(<&str>::from).collect::<Vec<_>>().join(", ");
        return Err(SshError::Authentication { user: target.user.clone(), accepts });
    }
    let mut channel = handle.channel_open_session().await?;
    channel.exec(true, target.command.as_str()).await?;
    loop {
        match channel.wait().await {
            Some(ChannelMsg::Success) => break,
            Some(ChannelMsg::WindowAdjusted { .. }) => {}
            _ => return Err(SshError::Exec(target.command.clone())),
        }
    }
    Ok(Connection { _handle: handle, stream: channel.into_stream() })
}

/// A stream whose writes never wait: what the socket does not take at once is kept and sent while reading.
///
/// russh writes inside the loop that also reads. Two such ends whose socket buffers are both full wait for each
/// other for ever; over this stream each goes on reading. What is kept is bounded by the SSH channels' windows. A
/// socket that takes nothing for a set time is an error, which russh has no bound for.
#[derive(Debug)]
pub struct Unblocked<S> {
    inner: S,
    kept: BytesMut,
    /// Slices of time for which the socket took nothing, of at most so many.
    stuck: u32,
    bound: Option<u32>,
    slice: Pin<Box<Sleep>>,
}

impl<S> Unblocked<S> {
    /// Wrap a socket that may take nothing for `bound`. Must be called inside a Tokio runtime.
    pub fn new(inner: S, bound: Option<Duration>) -> Self {
        let bound = bound.map(|b| u32::try_from(b.as_secs()).unwrap_or(u32::MAX));
        Self { inner, kept: BytesMut::new(), stuck: 0, bound, slice: Box::pin(tokio::time::sleep(SLICE)) }
    }

    fn moved(&mut self) {
        self.stuck = 0;
        self.slice.as_mut().reset(Instant::now() + SLICE);
    }
}

impl<S: AsyncWrite + Unpin> Unblocked<S> {
    /// Send what is kept. Pending while the socket takes no more.
    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.kept.is_empty() {
            match Pin::new(&mut self.inner).poll_write(cx, &self.kept) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(n)) => {
                    self.kept.advance(n);
                    self.moved();
                }
                Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                Poll::Pending => {
                    while self.slice.as_mut().poll(cx).is_ready() {
                        self.stuck += 1;
                        if self.bound.is_some_and(|bound| self.stuck >= bound) {
                            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                        }
                        self.slice.as_mut().reset(Instant::now() + SLICE);
                    }
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Unblocked<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Err(e)) = self.drain(cx) {
            return Poll::Ready(Err(e));
        }
        if self.kept.is_empty() {
            match Pin::new(&mut self.inner).poll_write(cx, buf) {
                Poll::Ready(done) => return Poll::Ready(done),
                Poll::Pending => self.moved(),
            }
        }
        self.kept.extend_from_slice(buf);
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.drain(cx) {
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            _ => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(self.drain(cx))?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Unblocked<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(Err(e)) = self.drain(cx) {
            return Poll::Ready(Err(e));
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}
