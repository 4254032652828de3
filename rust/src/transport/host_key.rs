//! Is this the host? The key that it shows against the keys that are known, and nothing but that: channels that a server
//! opens are refused.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use russh::client;
use russh::keys::{Algorithm, HashAlg, PublicKey, PublicKeyOrCertificate};
use russh::{Channel, ChannelId};
use tracing::debug;

use crate::error::SshError;
use crate::locks::lock;
use crate::text;

/// Channels that a server may try to open on one connection before the connection is closed. Each of them is refused.
const MAX_SERVER_CHANNELS: u32 = 64;

/// The host keys that a connection accepts. Set by the caller, before it connects.
#[derive(Clone, Default)]
pub struct HostKeys {
    /// The host's known keys; the host must show one of them.
    pub known: Vec<PublicKey>,
    /// Keys that are refused even if they are known.
    pub revoked: Vec<PublicKey>,
    /// Whether any key is accepted if none is known. The caller finds it in
    /// [`Connection::host_key`](crate::transport::connection::Connection::host_key).
    pub accept_new: bool,
}

impl HostKeys {
    /// Judge a key that the host shows.
    fn judge(&self, key: &PublicKey) -> HostKeyVerdict {
        let among = |keys: &[PublicKey]| keys.iter().any(|k| k.key_data() == key.key_data());
        if among(&self.revoked) {
            HostKeyVerdict::Revoked(fingerprint(key))
        } else if among(&self.known) || (self.known.is_empty() && self.accept_new) {
            HostKeyVerdict::Good(key.clone())
        } else {
            HostKeyVerdict::Unknown(fingerprint(key))
        }
    }

    /// Return the signature algorithms for the known keys, in their order: with them the host shows a key of a known type.
    pub(super) fn algorithms(&self) -> Vec<Algorithm> {
        let mut all = Vec::new();
        for key in &self.known {
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

    /// Return the error for a host that shows `got` instead of a known key.
    pub(super) fn refuse(&self, got: String, revoked: bool) -> SshError {
        let all = self.known.iter().map(fingerprint).collect::<Vec<_>>().join(", ");
        SshError::HostKey { got, revoked, expected: if all.is_empty() { "none".to_owned() } else { all } }
    }
}

/// What became of the host's key.
#[derive(Default)]
pub(super) enum HostKeyVerdict {
    /// The host has shown no key yet.
    #[default]
    NotShown,
    Good(PublicKey),
    /// The fingerprint of a key that is not among the known ones, or the name of what was shown instead of a key.
    Unknown(String),
    /// The fingerprint of a revoked key.
    Revoked(String),
}

/// russh's callbacks of one connection.
pub(super) struct ConnectionHandler {
    host_keys: HostKeys,
    /// Shared with the caller that connects: russh's own error says only that the key was refused.
    verdict: Arc<Mutex<HostKeyVerdict>>,
    /// See [`SshConnection::key_exchanges`](crate::transport::ssh::SshConnection::key_exchanges).
    key_exchanges: Arc<AtomicU64>,
    /// Channels that the server has tried to open; only grows.
    opened: u32,
}

impl ConnectionHandler {
    pub(super) fn new(host_keys: HostKeys, verdict: Arc<Mutex<HostKeyVerdict>>, key_exchanges: Arc<AtomicU64>) -> Self {
        Self { host_keys, verdict, key_exchanges, opened: 0 }
    }

    /// Count a channel that the server tries to open. Return an error, which closes the connection, once there are too
    /// many: our refusals would fill the memory if the server did not read them.
    fn refuse_channel(&mut self) -> Result<(), russh::Error> {
        self.opened = self.opened.saturating_add(1);
        if self.opened > MAX_SERVER_CHANNELS { Err(russh::Error::Inconsistent) } else { Ok(()) }
    }
}

/// Return a key's type and its SHA-256 fingerprint, as `ssh` shows them.
#[must_use]
pub fn fingerprint(key: &PublicKey) -> String {
    // The name of an unknown algorithm is the server's to choose.
    text::line(format!("{} {}", key.algorithm(), key.fingerprint(HashAlg::Sha256)), text::LIMIT)
}

impl client::Handler for ConnectionHandler {
    type Error = russh::Error;

    async fn check_server_key(&mut self, shown: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        let verdict = match shown {
            PublicKeyOrCertificate::PublicKey { key, .. } => self.host_keys.judge(key),
            // Certificates are never offered; a server that shows one all the same is refused.
            PublicKeyOrCertificate::Certificate(_) => HostKeyVerdict::Unknown("a host certificate".to_owned()),
        };
        let good = matches!(verdict, HostKeyVerdict::Good(_));
        *lock(&self.verdict) = verdict;
        Ok(good)
    }

    async fn kex_done(
        &mut self,
        _shared_secret: Option<&[u8]>,
        _names: &russh::Names,
        _session: &mut client::Session,
    ) -> Result<(), russh::Error> {
        let before = self.key_exchanges.fetch_add(1, Relaxed);
        debug!(before, "key exchange");
        Ok(())
    }

    // No server has a reason to open a channel to a client that forwards nothing, and nobody here would read it. Dropping
    // `_reply` refuses the channel. Each of these handlers is needed: russh's defaults accept all kinds but the unknown ones.

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

    /// Return false, which refuses the channel, up to the bound. Beyond the bound russh calls the handler below instead, which
    /// can close the connection.
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
