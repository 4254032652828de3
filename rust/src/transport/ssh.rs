//! The client's end of an SSH connection: verify the host, authenticate, run one command, hand out its stream.

use std::borrow::Cow;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use russh::client::{self, AuthResult};
use russh::keys::agent::AgentIdentity;
use russh::keys::agent::client::AgentClient;
use russh::keys::signature::Signer as _;
use russh::keys::ssh_encoding::Encode;
use russh::keys::ssh_key::Error;
use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};
use russh::keys::{
    Algorithm, Certificate, HashAlg, PrivateKey, PrivateKeyWithHashAlg, PublicKey, PublicKeyOrCertificate,
    load_secret_key,
};
use russh::{AgentAuthError, Signer};
use russh::{Channel, ChannelId, ChannelMsg, ChannelStream, Preferred};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use crate::error::SshError;
use crate::text;
use crate::transport::identities;
use crate::wire::{PEER_TIMEOUT, SLICE, WRITE, lock};

/// Bytes that the far end may send on a channel before we grant more. OpenSSH's own is 2 MiB: 25 MB/s at 80 ms.
pub const CHANNEL_WINDOW: u32 = 16 * 1024 * 1024;
/// Bytes that are kept of each stream of a command that is run to its end.
pub const MAX_OUTPUT: usize = 1024 * 1024;
/// The ciphers that we offer: AES-GCM first, which the CPU does in hardware, then russh's safe choices.
const CIPHERS: &[russh::cipher::Name] =
    &[russh::cipher::AES_256_GCM, russh::cipher::CHACHA20_POLY1305, russh::cipher::AES_256_CTR];

/// What a key exchange is called beside the real ones: announcements of what we can do.
const ANNOUNCED: &[russh::kex::Name] =
    &[russh::kex::EXTENSION_SUPPORT_AS_CLIENT, russh::kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT];
/// Channels that a server may try to open on one connection before the connection is closed. None is granted.
const MAX_OPENED: u32 = 64;

/// Our preferences for both ends.
pub(crate) fn preferred() -> Preferred {
    let mut all = Preferred { cipher: Cow::Borrowed(CIPHERS), ..Preferred::default() };
    // OpenSSH takes no host's word for it any more if that is signed with SHA-1.
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
    /// Our preferences, with the lists that are given in their place.
    fn preferred(&self) -> Result<Preferred, SshError> {
        let mut all = preferred();
        if !self.kex.is_empty() {
            let mut kex = supported("key exchange", &self.kex, |name| russh::kex::Name::try_from(name).ok())?;
            kex.extend_from_slice(ANNOUNCED);
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

/// Those of the names that are supported; an error if none is.
fn supported<T>(what: &'static str, names: &[String], find: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, SshError> {
    let found: Vec<_> = names.iter().filter_map(|name| find(name)).collect();
    if found.is_empty() { Err(SshError::Algorithms { what, names: names.join(", ") }) } else { Ok(found) }
}

/// Whom to connect to, and as whom.
#[derive(Clone)]
pub struct Target {
    pub user: String,
    /// The host's keys, any of which it may show. Only their types are offered.
    pub host_keys: Vec<PublicKey>,
    /// Keys that it must not show, whatever else is said.
    pub revoked: Vec<PublicKey>,
    /// Without known keys, whether any other may be shown: the caller sees it in [`Connection::host_key`].
    pub accept_new: bool,
    /// What may be used, where that is not left to us.
    pub algorithms: Algorithms,
    /// What to prove with who we are, in the order in which it is tried.
    pub identities: Vec<Identity>,
    /// Bound on connection, key exchange and authentication together.
    pub timeout: Duration,
}

/// A way to prove who we are.
#[derive(Clone)]
pub enum Identity {
    /// A private key.
    Key(Arc<PrivateKey>),
    /// The private key in this file, which may be missing, and the certificate in the other.
    File(PathBuf, Option<PathBuf>),
    /// The keys and certificates of the agent at this socket: first those wanted, in their order; then the others,
    /// unless `only`. The `certificates` in these files are for keys that it has.
    Agent { socket: PathBuf, wanted: Vec<PublicKey>, only: bool, certificates: Vec<PathBuf> },
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

/// An open connection, on which commands run. Dropping it closes the connection.
pub struct Connection {
    handle: client::Handle<Verifier>,
    /// What the host showed.
    pub host_key: PublicKey,
}

/// The part of a command that is shown in errors: what follows " -- ", if that is there. What is before it is a check of
/// the host, which tells a reader nothing.
pub(crate) fn shown(command: &str) -> &str {
    command.rsplit_once(" -- ").map_or(command, |(_, program)| program)
}

/// What a command that has ended left.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit status; `None` if a signal or the end of the connection ended it.
    pub status: Option<u32>,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

struct Verifier {
    expected: Vec<PublicKey>,
    revoked: Vec<PublicKey>,
    accept_new: bool,
    shown: Arc<Mutex<HostKeyVerdict>>,
    /// Channels that the server has tried to open.
    opened: u32,
}

#[derive(Default)]
enum HostKeyVerdict {
    #[default]
    Nothing,
    Good(PublicKey),
    Bad(String),
}

impl client::Handler for Verifier {
    type Error = russh::Error;

    async fn check_server_key(&mut self, shown: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        // Certificates are never offered; one that comes all the same is refused.
        let PublicKeyOrCertificate::PublicKey { key, .. } = shown else {
            *lock(&self.shown) = HostKeyVerdict::Bad("a host certificate".to_owned());
            return Ok(false);
        };
        let among = |keys: &[PublicKey]| keys.iter().any(|k| k.key_data() == key.key_data());
        let revoked = among(&self.revoked);
        let good = !revoked && (among(&self.expected) || (self.expected.is_empty() && self.accept_new));
        *lock(&self.shown) = if good {
            HostKeyVerdict::Good(key.clone())
        } else {
            HostKeyVerdict::Bad(format!("{}{}", fingerprint(key), if revoked { ", which is revoked" } else { "" }))
        };
        Ok(good)
    }

    // A server has no channel to open to us: nothing is forwarded, and what it opens nobody would read. Dropping `_reply`
    // refuses the channel. russh's own handlers would accept all kinds but the unknown ones.

    async fn server_channel_open_session(
        &mut self,
        _channel: Channel<client::Msg>,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.refuse_channel()
    }

    async fn server_channel_open_direct_tcpip(
        &mut self,
        _channel: Channel<client::Msg>,
        _host: &str,
        _port: u32,
        _originator: &str,
        _originator_port: u32,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.refuse_channel()
    }

    async fn server_channel_open_direct_streamlocal(
        &mut self,
        _channel: Channel<client::Msg>,
        _path: &str,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.refuse_channel()
    }

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        _channel: Channel<client::Msg>,
        _address: &str,
        _port: u32,
        _originator: &str,
        _originator_port: u32,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.refuse_channel()
    }

    async fn server_channel_open_forwarded_streamlocal(
        &mut self,
        _channel: Channel<client::Msg>,
        _path: &str,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.refuse_channel()
    }

    async fn server_channel_open_agent_forward(
        &mut self,
        _channel: Channel<client::Msg>,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.refuse_channel()
    }

    async fn server_channel_open_x11(
        &mut self,
        _channel: Channel<client::Msg>,
        _originator: &str,
        _originator_port: u32,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.refuse_channel()
    }

    /// Only over the bound an unknown kind goes on to the handler below, which can close the connection.
    async fn should_accept_unknown_server_channel(&mut self, _id: ChannelId, _kind: &str) -> bool {
        self.refuse_channel().is_err()
    }

    async fn server_channel_open_unknown(
        &mut self,
        _channel: Channel<client::Msg>,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.refuse_channel()
    }
}

impl Verifier {
    /// Count a channel that the server tries to open. An error, which closes the connection, once they are too many: our
    /// refusals would fill the memory if the server did not read them.
    fn refuse_channel(&mut self) -> Result<(), russh::Error> {
        self.opened = self.opened.saturating_add(1);
        if self.opened > MAX_OPENED { Err(russh::Error::Inconsistent) } else { Ok(()) }
    }
}

fn fingerprint(key: &PublicKey) -> String {
    // The name of an algorithm that we do not know is the server's to choose.
    text::line(format!("{} {}", key.algorithm(), key.fingerprint(HashAlg::Sha256)), text::LIMIT)
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

/// Open an SSH connection over `stream`.
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

/// As [`connect`], over a TCP connection that is made first, to each of the name's addresses within that bound.
///
/// # Errors
/// As [`connect`]; [`SshError::Io`] if the name does not resolve or nobody answers.
pub async fn connect_tcp(host: &str, port: u16, target: &Target) -> Result<Connection, SshError> {
    let seconds = target.timeout.as_secs();
    let timeout = |_| SshError::Timeout(seconds);
    let found =
        tokio::time::timeout(target.timeout, tokio::net::lookup_host((host, port))).await.map_err(timeout)??;
    let mut why = SshError::Io(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    for address in found {
        let began = Instant::now();
        match tokio::time::timeout(target.timeout, TcpStream::connect(address)).await.map_err(timeout) {
            Ok(Ok(socket)) => {
                // Nagle's algorithm would hold small frames back until the last ones are acknowledged.
                socket.set_nodelay(true)?;
                let left = target.timeout.saturating_sub(began.elapsed());
                return tokio::time::timeout(left, open(socket, target)).await.map_err(timeout)?;
            }
            Ok(Err(error)) => why = error.into(),
            Err(error) => why = error,
        }
    }
    Err(why)
}

async fn open<S>(stream: S, target: &Target) -> Result<Connection, SshError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut preferred = target.algorithms.preferred()?;
    if target.algorithms.host_key.is_empty() && !target.host_keys.is_empty() {
        preferred.key = Cow::Owned(algorithms(&target.host_keys));
    }
    let config = client::Config { window_size: CHANNEL_WINDOW, preferred, ..client::Config::default() };
    let shown = Arc::<Mutex<HostKeyVerdict>>::default();
    let verifier = Verifier {
        expected: target.host_keys.clone(),
        revoked: target.revoked.clone(),
        accept_new: target.accept_new,
        shown: Arc::clone(&shown),
        opened: 0,
    };
    let connected =
        client::connect_stream(Arc::new(config), BufferedWrites::new(stream, Some(PEER_TIMEOUT)), verifier).await;
    let seen = std::mem::take(&mut *lock(&shown));
    let mut handle = match (connected, seen) {
        (_, HostKeyVerdict::Bad(got)) => return Err(SshError::HostKey { got, expected: expected(target) }),
        (Ok(handle), HostKeyVerdict::Good(host_key)) => Connection { handle, host_key },
        (Ok(_), HostKeyVerdict::Nothing) => return Err(SshError::Protocol("the host showed no key".to_owned())),
        // Only the types of the known keys were offered: the host has none of these.
        (Err(russh::Error::NoCommonAlgo { kind: russh::AlgorithmKind::Key, theirs, .. }), _) => {
            let got = text::line(theirs.join(", "), text::LIMIT);
            return Err(SshError::HostKey { got, expected: expected(target) });
        }
        // Without a word: a server that is asked too often, or that is only starting.
        (Err(russh::Error::Disconnect), HostKeyVerdict::Nothing) => {
            return Err(SshError::HungUp("end of stream".to_owned()));
        }
        (Err(russh::Error::IO(error)), HostKeyVerdict::Nothing) => return Err(SshError::HungUp(error.to_string())),
        (Err(error), _) => return Err(error.into()),
    };
    handle.authenticate(target).await?;
    Ok(handle)
}

fn expected(target: &Target) -> String {
    let all = target.host_keys.iter().map(fingerprint).collect::<Vec<_>>().join(", ");
    if all.is_empty() { "none".to_owned() } else { all }
}

impl Connection {
    async fn authenticate(&mut self, target: &Target) -> Result<(), SshError> {
        let mut tried = Vec::new();
        let mut accepts = String::new();
        match self.try_all(target, &mut tried, &mut accepts).await {
            Ok(true) => return Ok(()),
            Err(why) if tried.is_empty() => return Err(why),
            Err(why) => {
                accepts = format!(
                    "nothing more: it hung up ({why}). Servers allow few keys (MaxAuthTries): \
                     name the right one with IdentityFile and IdentitiesOnly yes"
                );
            }
            Ok(false) => {}
        }
        let tried = if tried.is_empty() { "no key to try".to_owned() } else { tried.join(", ") };
        Err(SshError::Authentication { user: target.user.clone(), tried, accepts })
    }

    async fn try_all(
        &mut self,
        target: &Target,
        tried: &mut Vec<String>,
        accepts: &mut String,
    ) -> Result<bool, SshError> {
        let mut offered = Vec::new();
        for identity in &target.identities {
            match identity {
                Identity::Key(key) => {
                    if self.authenticate_with(&target.user, key, None, accepts).await? {
                        return Ok(true);
                    }
                    tried.push(fingerprint(key.public_key()));
                }
                Identity::File(path, certificate) => {
                    let key = match load_secret_key(path, None) {
                        Ok(key) => Arc::new(key),
                        Err(russh::keys::Error::IO(e)) if e.kind() == io::ErrorKind::NotFound => continue,
                        Err(russh::keys::Error::KeyIsEncrypted) => {
                            // Its public half can be read: the agent's key, if it has that, was refused already.
                            let locked = PrivateKey::read_openssh_file(path);
                            if locked.is_ok_and(|key| offered.contains(key.public_key().key_data())) {
                                continue;
                            }
                            tried.push(format!("{0} has a passphrase: `ssh-add {0}` first", path.display()));
                            continue;
                        }
                        Err(why) => {
                            tried.push(format!("{} is not readable: {why}", path.display()));
                            continue;
                        }
                    };
                    let certificate = certificate.as_ref().and_then(|path| identities::certificate(path));
                    for certificate in certificate.into_iter().map(Some).chain([None]) {
                        if self.authenticate_with(&target.user, &key, certificate, accepts).await? {
                            return Ok(true);
                        }
                    }
                    tried.push(format!("{} ({})", path.display(), fingerprint(key.public_key())));
                }
                Identity::Agent { socket, wanted, only, certificates } => {
                    let Ok(mut agent) = AgentClient::connect_uds(socket).await else {
                        tried.push(format!("no agent answers at {}", socket.display()));
                        continue;
                    };
                    let held = match identities::held(socket).await {
                        Ok(held) => held,
                        Err(why) => {
                            tried.push(format!("the agent at {} failed: {why}", socket.display()));
                            continue;
                        }
                    };
                    for (certificate, key) in offers(&held, wanted, *only, certificates) {
                        let name = fingerprint(&key);
                        offered.push(key.key_data().clone());
                        let hash = self.hash(key.algorithm()).await?;
                        let (with, what) = if let Some(certificate) = certificate {
                            let mut signer = OfAgent { agent: &mut agent, held: &held };
                            let user = &target.user;
                            let with = self.handle.authenticate_certificate_with(user, certificate, hash, &mut signer);
                            (with.await, "a certificate for ")
                        } else {
                            let with = self.handle.authenticate_publickey_with(&target.user, key, hash, &mut agent);
                            (with.await, "")
                        };
                        match with.map(|result| passed(result, accepts)) {
                            Ok(true) => return Ok(true),
                            Ok(false) => tried.push(format!("{what}{name} of the agent")),
                            Err(why) => tried.push(format!("{what}{name} of the agent, which failed: {why}")),
                        }
                        if self.handle.is_closed() {
                            return Err(SshError::Protocol("the connection was closed".to_owned()));
                        }
                    }
                }
            }
        }
        Ok(false)
    }

    async fn authenticate_with(
        &mut self,
        user: &str,
        key: &Arc<PrivateKey>,
        certificate: Option<Certificate>,
        accepts: &mut String,
    ) -> Result<bool, SshError> {
        let hash = self.hash(key.algorithm()).await?;
        let result = if let Some(certificate) = certificate {
            // russh's own way to sign for a certificate with a key names SHA-1 if that is an RSA key.
            let mut signer = OfKey(key);
            match self.handle.authenticate_certificate_with(user, certificate, hash, &mut signer).await {
                Ok(AuthResult::Failure { .. }) | Err(AgentAuthError::Send(_)) if self.handle.is_closed() => {
                    return Err(SshError::Protocol("the connection was closed".to_owned()));
                }
                result => result.map_err(|why| SshError::Key(why.to_string()))?,
            }
        } else {
            let key = PrivateKeyWithHashAlg::new(Arc::clone(key), hash);
            self.handle.authenticate_publickey(user, key).await?
        };
        Ok(passed(result, accepts))
    }

    /// The hash with which a key of this kind signs. With RSA never SHA-1, as OpenSSH: a server that does not say what it
    /// takes may take SHA-512.
    async fn hash(&self, algorithm: Algorithm) -> Result<Option<HashAlg>, SshError> {
        if !algorithm.is_rsa() {
            return Ok(None);
        }
        Ok(Some(self.handle.best_supported_rsa_hash().await?.flatten().unwrap_or(HashAlg::Sha512)))
    }

    async fn begin(&self, command: &str) -> Result<Channel<client::Msg>, SshError> {
        // Where only one session is allowed (MaxSessions) the last one may not be over yet for the server.
        let mut again = 10;
        let mut channel = loop {
            match self.handle.channel_open_session().await {
                Err(russh::Error::ChannelOpenFailure(_)) if again > 0 => again -= 1,
                opened => break opened?,
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
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

    /// Run a command and talk with it: its standard input and output.
    ///
    /// # Errors
    /// [`SshError::Exec`] if the server refuses.
    pub async fn exec(&self, command: &str) -> Result<ChannelStream<client::Msg>, SshError> {
        Ok(self.begin(command).await?.into_stream())
    }

    /// Run a command to its end, with `input` as its standard input. Of each of its streams [`MAX_OUTPUT`] bytes are
    /// kept.
    ///
    /// # Errors
    /// [`SshError::Exec`] if the server refuses.
    pub async fn run(&self, command: &str, input: Bytes) -> Result<Output, SshError> {
        let (mut from, to) = self.begin(command).await?.split();
        let send = async {
            let mut left = input;
            // A command that has ended takes no more, and its status says why.
            while !left.is_empty() && to.data_bytes(left.split_to(left.len().min(WRITE))).await.is_ok() {}
            drop(to.eof().await);
        };
        let receive = async {
            let mut output = Output::default();
            while let Some(message) = from.wait().await {
                match message {
                    ChannelMsg::Data { data } => keep(&mut output.stdout, &data),
                    ChannelMsg::ExtendedData { data, .. } => keep(&mut output.stderr, &data),
                    ChannelMsg::ExitStatus { exit_status } => output.status = Some(exit_status),
                    _ => {}
                }
            }
            output
        };
        tokio::pin!(send, receive);
        tokio::select! {
            output = &mut receive => Ok(output),
            () = &mut send => Ok(receive.await),
        }
    }
}

fn keep(kept: &mut Vec<u8>, data: &[u8]) {
    let room = MAX_OUTPUT.saturating_sub(kept.len()).min(data.len());
    kept.extend_from_slice(data.get(..room).unwrap_or_default());
}

/// What an agent has to offer, in the order in which it is: before each key the certificates for it.
fn offers(
    held: &[AgentIdentity],
    wanted: &[PublicKey],
    only: bool,
    certificates: &[PathBuf],
) -> Vec<(Option<Certificate>, PublicKey)> {
    let files: Vec<_> = certificates.iter().filter_map(|path| identities::certificate(path)).collect();
    let mut keys: Vec<PublicKey> = Vec::new();
    for key in held.iter().map(|identity| identity.public_key().into_owned()) {
        if keys.iter().all(|other| other.key_data() != key.key_data()) {
            keys.push(key);
        }
    }
    let place = |key: &PublicKey| wanted.iter().position(|w| w.key_data() == key.key_data());
    keys.retain(|key| !only || place(key).is_some());
    keys.sort_by_key(|key| place(key).unwrap_or(usize::MAX));
    let mut all = Vec::new();
    for key in keys {
        // With `only`, certificates are wanted by their files, as by ssh.
        let its_own = held.iter().filter_map(|identity| match identity {
            AgentIdentity::Certificate { certificate, .. } if !only => Some(certificate),
            _ => None,
        });
        for certificate in its_own.chain(&files).filter(|c| c.public_key() == key.key_data()) {
            all.push((Some(certificate.clone()), key.clone()));
        }
        if held.iter().any(|i| matches!(i, AgentIdentity::PublicKey { key: k, .. } if k.key_data() == key.key_data())) {
            all.push((None, key));
        }
    }
    all
}

/// An agent that signs for a certificate with what it has: this certificate, or its key alone.
struct OfAgent<'a, S: AsyncRead + AsyncWrite + Unpin + Send> {
    agent: &'a mut AgentClient<S>,
    held: &'a [AgentIdentity],
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Signer for OfAgent<'_, S> {
    type Error = AgentAuthError;

    async fn auth_sign(
        &mut self,
        identity: &AgentIdentity,
        hash: Option<HashAlg>,
        data: Vec<u8>,
    ) -> Result<Vec<u8>, Self::Error> {
        let key = identity.public_key();
        let same = |i: &&AgentIdentity| i.public_key().key_data() == key.key_data();
        let with = self.held.iter().filter(same).max_by_key(|i| matches!(i, AgentIdentity::PublicKey { .. }));
        self.agent.auth_sign(with.unwrap_or(identity), hash, data).await
    }
}

/// A private key that signs for its certificate.
struct OfKey<'a>(&'a PrivateKey);

impl Signer for OfKey<'_> {
    type Error = AgentAuthError;

    async fn auth_sign(
        &mut self,
        _identity: &AgentIdentity,
        hash: Option<HashAlg>,
        mut data: Vec<u8>,
    ) -> Result<Vec<u8>, Self::Error> {
        let signed = match self.0.key_data() {
            KeypairData::Rsa(pair) => (pair, hash).try_sign(&data),
            pair => pair.try_sign(&data),
        };
        let signature = signed.map_err(Error::from).and_then(Vec::try_from).map_err(russh::keys::Error::from)?;
        signature.encode(&mut data).map_err(russh::keys::Error::from)?;
        Ok(data)
    }
}

fn passed(result: AuthResult, accepts: &mut String) -> bool {
    match result {
        AuthResult::Success => true,
        AuthResult::Failure { remaining_methods, .. } => {
            *accepts = remaining_methods.iter().map(<&str>::from).collect::<Vec<_>>().join(", ");
            false
        }
    }
}

/// Bytes that are kept for a socket before its owner waits: more than the windows of the SSH channels, so only a server gets
/// there that has russh answer without end, or that grants windows without measure.
const MAX_KEPT: usize = 32 * 1024 * 1024;

/// A stream whose writes do not wait: what the socket does not take at once is kept and sent while reading.
///
/// russh writes inside the loop that also reads. Two such ends whose socket buffers are both full wait for each
/// other for ever; over this stream each goes on reading, until [`MAX_KEPT`] bytes are kept. A socket that takes nothing
/// for a set time is an error, which russh has no bound for.
#[derive(Debug)]
pub struct BufferedWrites<S> {
    inner: S,
    kept: BytesMut,
    /// Slices of time for which the socket took nothing, of at most so many.
    stuck: u32,
    bound: Option<u32>,
    slice: Pin<Box<Sleep>>,
}

impl<S> BufferedWrites<S> {
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

impl<S: AsyncWrite + Unpin> BufferedWrites<S> {
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

impl<S: AsyncWrite + Unpin> AsyncWrite for BufferedWrites<S> {
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
        if self.kept.len() >= MAX_KEPT {
            // The drain above wakes the caller when the socket takes something, or fails at the bound.
            return Poll::Pending;
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

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for BufferedWrites<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(Err(e)) = self.drain(cx) {
            return Poll::Ready(Err(e));
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}
