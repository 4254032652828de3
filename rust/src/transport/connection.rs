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
use crate::transport::command::CommandConnection;
use crate::transport::output::CommandOutput;
use crate::transport::ssh::SshConnection;
use crate::wire::checked;

/// What comes from a command.
pub type Reading = Box<dyn AsyncRead + Unpin + Send>;
/// What goes to a command.
pub type Writing = Box<dyn AsyncWrite + Unpin + Send>;

/// An open connection to a machine. Dropping it closes the connection.
pub enum Connection {
    Ssh(Box<SshConnection>),
    /// Nothing is open between two commands.
    Command(CommandConnection),
}

impl Connection {
    /// Return the key that the host showed; `None` if it is reached otherwise than by SSH.
    #[must_use]
    pub fn host_key(&self) -> Option<&PublicKey> {
        match self {
            Self::Ssh(ssh) => Some(&ssh.host_key),
            Self::Command(_) => None,
        }
    }

    /// Return the command that leads to the machine, as it is shown; `None` if it is reached by SSH.
    #[must_use]
    pub fn program(&self) -> Option<String> {
        match self {
            Self::Ssh(_) => None,
            Self::Command(command) => Some(command.shown()),
        }
    }

    /// Return false if it is known to have ended.
    #[must_use]
    pub fn is_open(&self) -> bool {
        match self {
            Self::Ssh(ssh) => ssh.is_open(),
            Self::Command(_) => true,
        }
    }

    /// Start a command, and return its standard output and input. Nothing but the command's program protects the bytes of a
    /// machine behind a command, so they travel in chunks with a hash; the agent answers alike.
    ///
    /// # Errors
    /// [`SshError::Exec`] if the server refuses, [`SshError::Program`] if no process can be started here.
    pub async fn exec(&self, command: &str) -> Result<(Reading, Writing), SshError> {
        match self {
            Self::Ssh(ssh) => Ok(split(ssh.exec(command).await?)),
            Self::Command(here) => here.exec(command).map(|(from, to)| {
                let (from, to) = checked::ask(from, to);
                (Box::new(from) as _, Box::new(to) as _)
            }),
        }
    }

    /// As [`Connection::exec`], without another try if the server does not open a channel.
    ///
    /// # Errors
    /// As [`Connection::exec`], and [`SshError::Protocol`] for a channel that is refused.
    pub async fn exec_once(&self, command: &str) -> Result<(Reading, Writing), SshError> {
        match self {
            Self::Ssh(ssh) => Ok(split(ssh.exec_once(command).await?)),
            Self::Command(_) => self.exec(command).await,
        }
    }

    /// Return how long the server takes to answer; `None` if the connection has ended, or has no server of its own. Waits as
    /// long as that takes.
    pub async fn round_trip(&self) -> Option<Duration> {
        match self {
            Self::Ssh(ssh) => ssh.round_trip().await,
            Self::Command(_) => None,
        }
    }

    /// Run a command to its end, with `input` as its standard input.
    ///
    /// # Errors
    /// As [`Connection::exec`].
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
            Self::Command(here) => here.run_into(command, input, output).await,
        }
    }
}

/// Return both directions of a stream, each on its own.
fn split(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> (Reading, Writing) {
    let (from, to) = tokio::io::split(stream);
    (Box::new(from), Box::new(to))
}
