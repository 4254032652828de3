//! The embedded SSH server in front of any command, for the tests: its standard input and output are the channel.
//!
//! Standard input is the socket to the client, and has the keys first, as one line of JSON: as an agent that is started
//! as `embedded`. The arguments are the command.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use russh::keys::{PrivateKey, PublicKey};
use serde::Deserialize;
use skyward_lite::transport::server;
use skyward_lite::transport::ssh::RekeyLimits;
use tokio::process::Command;

#[derive(Deserialize)]
struct Keys {
    host_key: String,
    authorized_key: String,
    timeout: f64,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") {
        socket.read_exact(&mut byte)?;
        line.extend(byte);
    }
    let keys: Keys = serde_json::from_slice(&line)?;
    let host_key = PrivateKey::from_openssh(&keys.host_key)?;
    let authorized = PublicKey::from_openssh(&keys.authorized_key)?;
    let mut arguments = std::env::args().skip(1);
    let program = arguments.next().ok_or("usage: embedded_server COMMAND [ARGUMENT ...]")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        socket.set_nonblocking(true)?;
        let socket = tokio::net::UnixStream::from_std(socket)?;
        let timeout = Duration::from_secs_f64(keys.timeout);
        let accepted = server::accept(socket, host_key, authorized, RekeyLimits::default(), timeout).await?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let (mut from, mut to) = tokio::io::split(accepted.stream);
        let (mut stdin, mut stdout) = (child.stdin.take().ok_or("stdin")?, child.stdout.take().ok_or("stdout")?);
        // Either end ends both: the channel, or the command.
        tokio::select! {
            ended = tokio::io::copy(&mut from, &mut stdin) => ended?,
            ended = tokio::io::copy(&mut stdout, &mut to) => ended?,
        };
        drop(stdin);
        drop(tokio::time::timeout(Duration::from_secs(1), child.wait()).await);
        Ok(())
    })
}
