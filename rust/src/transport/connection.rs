//! The one type for a way to a machine: commands run there, whatever carries their standard streams.
//!
//! An enum rather than a trait object, as in the crate `openssh`: callers match nothing, and each kind of connection stays
//! a plain struct in a file of its own.

use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use russh::keys::PublicKey;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::error::SshError;
use crate::locks::lock;
use crate::transport::output::CommandOutput;
use crate::transport::ssh::SshConnection;

/// An open connection to a machine. Dropping it closes the connection.
pub enum Connection {
    Ssh(SshConnection),
}

impl Connection {
    /// Return the key that the host showed.
    #[must_use]
    pub fn host_key(&self) -> &PublicKey {
        match self {
            Self::Ssh(ssh) => &ssh.host_key,
        }
    }

    /// Return false if it is known to have ended.
    #[must_use]
    pub fn is_open(&self) -> bool {
        match self {
            Self::Ssh(ssh) => ssh.is_open(),
        }
    }

    /// Start a command, and return its standard input and output as one stream.
    ///
    /// # Errors
    /// [`SshError::Exec`] if the server refuses.
    pub async fn exec(&self, command: &str) -> Result<impl AsyncRead + AsyncWrite + Unpin + Send + use<>, SshError> {
        match self {
            Self::Ssh(ssh) => ssh.exec(command).await,
        }
    }

    /// As [`Connection::exec`], without another try if the server does not open a channel.
    ///
    /// # Errors
    /// As [`Connection::exec`], and [`SshError::Protocol`] for a channel that is refused.
    pub async fn exec_once(
        &self,
        command: &str,
    ) -> Result<impl AsyncRead + AsyncWrite + Unpin + Send + use<>, SshError> {
        match self {
            Self::Ssh(ssh) => ssh.exec_once(command).await,
        }
    }

    /// Return how long the server takes to answer; `None` if the connection has ended. Waits as long as that takes.
    pub async fn round_trip(&self) -> Option<Duration> {
        match self {
            Self::Ssh(ssh) => ssh.round_trip().await,
        }
    }

    /// Run a command to its end, with `input` as its standard input.
    ///
    /// # Errors
    /// [`SshError::Exec`] if the server refuses.
    pub async fn run(&self, command: &str, input: Bytes) -> Result<CommandOutput, SshError> {
        let output = Mutex::default();
        self.run_into(command, input, &output).await?;
        Ok(std::mem::take(&mut *lock(&output)))
    }

    /// As [`Connection::run`]; `output` has what the command has printed, as it comes.
    ///
    /// # Errors
    /// As [`Connection::run`].
    pub async fn run_into(&self, command: &str, input: Bytes, output: &Mutex<CommandOutput>) -> Result<(), SshError> {
        match self {
            Self::Ssh(ssh) => ssh.run_into(command, input, output).await,
        }
    }
}
