//! The client's end of an SSH connection: key exchange, host key, authentication, and then commands.

use std::borrow::Cow;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use russh::client::{self, Handle};
use russh::keys::{Algorithm, PublicKey};
use russh::{Channel, ChannelMsg, ChannelStream, Limits, Preferred};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use crate::error::SshError;
use crate::locks::lock;
use crate::text;
use crate::timing::PEER_TIMEOUT;
use crate::transport::auth::{self, Identity};
use crate::transport::buffered::BufferedWrites;
use crate::transport::host_key::{ConnectionHandler, HostKeyVerdict, HostKeys};
use crate::transport::output::{CommandOutput, append_capped, shown};
use crate::transport::tcp;
use crate::wire::MAX_WRITE;

/// Bytes that a client may send to the embedded server on a channel before the server grants more.
pub const CHANNEL_WINDOW: u32 = 16 * 1024 * 1024;
/// Bytes that a server may send to us on a channel before we grant more. russh grants more when half of them have arrived: at
/// a round trip of 80 ms that allows at least 210 MB/s. They are under way and not in our memory: russh stores a hundred
/// packets of a channel, which are 3 MiB, before it reads no more.
pub const CLIENT_WINDOW: u32 = 32 * 1024 * 1024;
/// The ciphers that we offer: AES-GCM first, which the CPU does in hardware, then russh's safe choices.
const CIPHERS: &[russh::cipher::Name] =
    &[russh::cipher::AES_256_GCM, russh::cipher::CHACHA20_POLY1305, russh::cipher::AES_256_CTR];
/// Names in the list of key exchanges that are none: they announce extensions which we support.
const KEX_EXTENSIONS: &[russh::kex::Name] =
    &[russh::kex::EXTENSION_SUPPORT_AS_CLIENT, russh::kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT];
/// The most bytes in one direction under the same keys: beyond it a cipher is no longer safe.
pub const MAX_REKEY_BYTES: usize = 1 << 30;
/// How often opening a channel is tried again, and the pause before each try. Where the server allows a single session
/// (`MaxSessions 1`), it may not have seen the end of the previous one yet.
const CHANNEL_RETRIES: u32 = 10;
const CHANNEL_RETRY_PAUSE: Duration = Duration::from_millis(200);

/// Return our preferences, for both ends.
pub(super) fn preferred() -> Preferred {
    let mut all = Preferred { cipher: Cow::Borrowed(CIPHERS), ..Preferred::default() };
    // As OpenSSH: a host's signature with SHA-1 proves nothing any more.
    all.key.to_mut().retain(|algorithm| *algorithm != Algorithm::Rsa { hash: None });
    all
}

/// Algorithms to offer, by OpenSSH's names, the preferred one first. An empty list stands for our own preferences; a name
/// that is not supported is left out.
#[derive(Clone, Default)]
pub struct Algorithms {
    pub kex: Vec<String>,
    /// For signatures of the host. If empty, those of the known keys.
    pub host_key: Vec<String>,
    pub cipher: Vec<String>,
    pub mac: Vec<String>,
}

impl Algorithms {
    /// Return our preferences, replaced where a list is given.
    fn preferred(&self) -> Result<Preferred, SshError> {
        let mut all = preferred();
        if !self.kex.is_empty() {
            let mut kex = supported("key exchange", &self.kex, |name| russh::kex::Name::try_from(name).ok())?;
            kex.extend_from_slice(KEX_EXTENSIONS);
            all.kex = Cow::Owned(kex);
        }
        if !self.host_key.is_empty() {
            all.key = Cow::Owned(supported("host key", &self.host_key, |name| Algorithm::new(name).ok())?);
        }
        if !self.cipher.is_empty() {
            all.cipher =
                Cow::Owned(supported("cipher", &self.cipher, |name| russh::cipher::Name::try_from(name).ok())?);
        }
        if !self.mac.is_empty() {
            all.mac = Cow::Owned(supported("MAC", &self.mac, |name| russh::mac::Name::try_from(name).ok())?);
        }
        Ok(all)
    }
}

/// Return the supported ones of the names; an error if there is none.
fn supported<T>(what: &'static str, names: &[String], find: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, SshError> {
    let found: Vec<_> = names.iter().filter_map(|name| find(name)).collect();
    if found.is_empty() { Err(SshError::Algorithms { what, names: names.join(", ") }) } else { Ok(found) }
}

/// When the keys of a connection are renewed: after so many bytes in one direction, or after so long.
#[derive(Debug, Clone, Copy)]
pub struct RekeyLimits {
    /// At most [`MAX_REKEY_BYTES`] count.
    pub bytes: usize,
    pub time: Duration,
}

impl Default for RekeyLimits {
    /// As RFC 4253 recommends, section 9.
    fn default() -> Self {
        Self { bytes: MAX_REKEY_BYTES, time: Duration::from_secs(3600) }
    }
}

impl From<RekeyLimits> for Limits {
    fn from(limits: RekeyLimits) -> Self {
        let bytes = limits.bytes.clamp(1, MAX_REKEY_BYTES);
        Self::new(bytes, bytes, limits.time)
    }
}

/// Whom to connect to, and as whom.
#[derive(Clone)]
pub struct Target {
    pub user: String,
    pub host_keys: HostKeys,
    pub algorithms: Algorithms,
    /// Ways to prove who we are, in the order in which they are tried.
    pub identities: Vec<Identity>,
    pub rekey: RekeyLimits,
    /// Bound on connection, key exchange and authentication together.
    pub timeout: Duration,
}

/// An open SSH connection, on which commands run. Dropping it closes the connection.
pub struct SshConnection {
    handle: Handle<ConnectionHandler>,
    /// The key that the host showed.
    pub(super) host_key: PublicKey,
    /// Key exchanges on this connection, the first one included. Changed by the connection's handler.
    exchanges: Arc<AtomicU64>,
}

/// Open an SSH connection over `stream`.
///
/// # Errors
/// Any [`SshError`]. Nothing but the key exchange is sent before the host's key is verified.
pub async fn connect<S>(stream: S, target: &Target) -> Result<SshConnection, SshError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let seconds = target.timeout.as_secs();
    tokio::time::timeout(target.timeout, open(stream, target)).await.map_err(|_| SshError::Timeout(seconds))?
}

/// As [`connect`], over a TCP connection that is made first, to each of the name's addresses within the same bound.
///
/// # Errors
/// As [`connect`]; [`SshError::Io`] if the name does not resolve or nobody answers.
pub async fn connect_tcp(host: &str, port: u16, target: &Target) -> Result<SshConnection, SshError> {
    let seconds = target.timeout.as_secs();
    let timeout = |_| SshError::Timeout(seconds);
    let found =
        tokio::time::timeout(target.timeout, tokio::net::lookup_host((host, port))).await.map_err(timeout)??;
    let mut why = SshError::Io(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    for address in found {
        let began = Instant::now();
        match tokio::time::timeout(target.timeout, tcp::connect(address)).await.map_err(timeout) {
            Ok(Ok(socket)) => {
                let left = target.timeout.saturating_sub(began.elapsed());
                return tokio::time::timeout(left, open(socket, target)).await.map_err(timeout)?;
            }
            Ok(Err(error)) => why = error.into(),
            Err(error) => why = error,
        }
    }
    Err(why)
}

async fn open<S>(stream: S, target: &Target) -> Result<SshConnection, SshError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let host_keys = &target.host_keys;
    let mut preferred = target.algorithms.preferred()?;
    if target.algorithms.host_key.is_empty() && !host_keys.known.is_empty() {
        preferred.key = Cow::Owned(host_keys.algorithms());
    }
    let limits = target.rekey.into();
    let config = client::Config { window_size: CLIENT_WINDOW, preferred, limits, ..client::Config::default() };
    let (verdict, exchanges) = (Arc::<Mutex<HostKeyVerdict>>::default(), Arc::<AtomicU64>::default());
    let handler = ConnectionHandler::new(host_keys.clone(), Arc::clone(&verdict), Arc::clone(&exchanges));
    let stream = BufferedWrites::new(stream, Some(PEER_TIMEOUT));
    let connected = client::connect_stream(Arc::new(config), stream, handler).await;
    let verdict = std::mem::take(&mut *lock(&verdict));
    let (mut handle, host_key) = match (connected, verdict) {
        (_, HostKeyVerdict::Unknown(got)) => return Err(host_keys.refuse(got, false)),
        (_, HostKeyVerdict::Revoked(got)) => return Err(host_keys.refuse(got, true)),
        (Ok(handle), HostKeyVerdict::Good(host_key)) => (handle, host_key),
        (Ok(_), HostKeyVerdict::NotShown) => return Err(SshError::Protocol("the host showed no key".to_owned())),
        // Only the types of the known keys were offered: the host has no key of these types.
        (Err(russh::Error::NoCommonAlgo { kind: russh::AlgorithmKind::Key, theirs, .. }), _) => {
            return Err(host_keys.refuse(text::line(theirs.join(", "), text::LIMIT), false));
        }
        // A server that is asked too often, or that is only starting, ends the connection without a word.
        (Err(russh::Error::Disconnect), HostKeyVerdict::NotShown) => {
            return Err(SshError::HungUp("end of stream".to_owned()));
        }
        (Err(russh::Error::IO(error)), HostKeyVerdict::NotShown) => return Err(SshError::HungUp(error.to_string())),
        (Err(error), _) => return Err(error.into()),
    };
    auth::authenticate(&mut handle, &target.user, &target.identities).await?;
    Ok(SshConnection { handle, host_key, exchanges })
}

impl SshConnection {
    /// Open a channel, which may be refused `retries` times, and start a command on it.
    async fn start(&self, command: &str, mut retries: u32) -> Result<Channel<client::Msg>, SshError> {
        let mut channel = loop {
            match self.handle.channel_open_session().await {
                Err(russh::Error::ChannelOpenFailure(_)) if retries > 0 => retries -= 1,
                opened => break opened?,
            }
            tokio::time::sleep(CHANNEL_RETRY_PAUSE).await;
        };
        channel.exec(true, command).await?;
        loop {
            match channel.wait().await {
                Some(ChannelMsg::Success) => return Ok(channel),
                Some(ChannelMsg::WindowAdjusted { .. }) => {}
                _ => return Err(SshError::Exec(shown(command).to_owned())),
            }
        }
    }

    /// Start a command, and return its standard input and output as one stream. Its standard error is dropped.
    ///
    /// # Errors
    /// [`SshError::Exec`] if the server refuses.
    pub async fn exec(&self, command: &str) -> Result<ChannelStream<client::Msg>, SshError> {
        Ok(self.start(command, CHANNEL_RETRIES).await?.into_stream())
    }

    /// As [`SshConnection::exec`], without another try if the server does not open a channel.
    ///
    /// # Errors
    /// As [`SshConnection::exec`], and [`SshError::Protocol`] for a channel that is refused.
    pub async fn exec_once(&self, command: &str) -> Result<ChannelStream<client::Msg>, SshError> {
        Ok(self.start(command, 0).await?.into_stream())
    }

    /// Return false if the connection is known to have ended.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.handle.is_closed()
    }

    /// Return how long the server takes to answer; `None` if the connection has ended. Waits as long as that takes.
    pub async fn round_trip(&self) -> Option<Duration> {
        let begun = Instant::now();
        self.handle.send_ping().await.ok().filter(|()| !self.handle.is_closed()).map(|()| begun.elapsed())
    }

    /// Return how often both ends agreed on keys; 1 before the keys were first renewed.
    #[must_use]
    pub fn key_exchanges(&self) -> u64 {
        self.exchanges.load(Relaxed)
    }

    /// Run a command to its end, with `input` as its standard input. `output` has what it has printed, as it comes.
    ///
    /// # Errors
    /// [`SshError::Exec`] if the server refuses.
    pub async fn run_into(&self, command: &str, input: Bytes, output: &Mutex<CommandOutput>) -> Result<(), SshError> {
        let (mut from, to) = self.start(command, CHANNEL_RETRIES).await?.split();
        let send = async {
            let mut left = input;
            // A command that has ended takes no more input, and its status tells the reason.
            while !left.is_empty() && to.data_bytes(left.split_to(left.len().min(MAX_WRITE))).await.is_ok() {}
            drop(to.eof().await);
        };
        let receive = async {
            while let Some(message) = from.wait().await {
                match message {
                    ChannelMsg::Data { data } => append_capped(&mut lock(output).stdout, &data),
                    ChannelMsg::ExtendedData { data, .. } => append_capped(&mut lock(output).stderr, &data),
                    ChannelMsg::ExitStatus { exit_status } => lock(output).status = Some(exit_status),
                    _ => {}
                }
            }
        };
        tokio::pin!(send, receive);
        tokio::select! {
            () = &mut receive => {}
            () = &mut send => receive.await,
        }
        Ok(())
    }
}
