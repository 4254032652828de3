//! The embedded SSH server: one connection, one user key, one command, over a socket that the caller hands in.
//!
//! The server is the far end of `Local()`: no port is opened, and both keys are made for this run. The client goes through
//! the same key exchange, authentication and channel as with OpenSSH.

use std::sync::Arc;
use std::time::Duration;

use russh::keys::{PrivateKey, PublicKey};
use russh::server::{self, Auth, ChannelOpenHandle, Msg, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, ChannelStream, MethodKind, MethodSet};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;

use crate::error::SshError;
use crate::transport::buffered::BufferedWrites;
use crate::transport::ssh::{CHANNEL_WINDOW, RekeyLimits, preferred};

struct Server {
    /// The only key that may log in.
    authorized: PublicKey,
    /// The session's channel, from its opening until its command is asked for.
    channel: Option<Channel<Msg>>,
    /// Takes the channel once its command is asked for, which happens once.
    started: Option<oneshot::Sender<Channel<Msg>>>,
}

impl server::Handler for Server {
    type Error = russh::Error;

    async fn auth_publickey(&mut self, _user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, russh::Error> {
        Ok(if key.public_key.key_data() == self.authorized.key_data() { Auth::Accept } else { Auth::reject() })
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), russh::Error> {
        // There is one channel: dropping the handle of a second one refuses it.
        if self.started.is_some() && self.channel.is_none() {
            self.channel = Some(channel);
            reply.accept().await;
        }
        Ok(())
    }

    async fn exec_request(
        &mut self,
        id: ChannelId,
        _command: &[u8],
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        match (self.channel.take(), self.started.take()) {
            (Some(channel), Some(started)) if channel.id() == id => {
                session.channel_success(id)?;
                // The receiver is gone only when the agent is ending.
                drop(started.send(channel));
                Ok(())
            }
            _ => session.channel_failure(id),
        }
    }
}

/// An accepted connection. Dropping it closes the connection.
pub struct Accepted {
    _handle: server::Handle,
    pub stream: ChannelStream<Msg>,
}

/// Serve one client on `stream` until it has asked for a command. Its text does not matter: only the agent is here. `rekey`:
/// when this end asks for new keys.
///
/// # Errors
/// [`SshError::Timeout`] if that takes longer than `timeout`; what russh reports otherwise.
pub async fn accept<S>(
    stream: S,
    host_key: PrivateKey,
    authorized: PublicKey,
    rekey: RekeyLimits,
    timeout: Duration,
) -> Result<Accepted, SshError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let config = server::Config {
        methods: MethodSet::from(&[MethodKind::PublicKey][..]),
        keys: vec![host_key],
        window_size: CHANNEL_WINDOW,
        event_buffer_size: 64,
        preferred: preferred(),
        limits: rekey.into(),
        // russh's default of 600 s would end a quiet session in which one long task runs.
        inactivity_timeout: None,
        ..server::Config::default()
    };
    let (started, channel) = oneshot::channel();
    let handler = Server { authorized, channel: None, started: Some(started) };
    // Writes have no bound: the agent waits for a client that was stopped until the client's lease ends.
    let serve = async {
        let session = server::run_stream(Arc::new(config), BufferedWrites::new(stream, None), handler).await?;
        let handle = session.handle();
        let channel = tokio::select! {
            channel = channel => channel.map_err(|_| SshError::Protocol("the client left".to_owned()))?,
            ended = session => {
                ended?;
                return Err(SshError::Protocol("the client left before it asked for a command".to_owned()));
            }
        };
        Ok(Accepted { _handle: handle, stream: channel.into_stream() })
    };
    tokio::time::timeout(timeout, serve).await.map_err(|_| SshError::Timeout(timeout.as_secs()))?
}
