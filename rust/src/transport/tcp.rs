//! TCP connections to hosts, and what the kernel is to find out about them by itself.
//!
//! The heartbeats of a session find a lost host first, within ten seconds. These options are for a connection without a
//! session: a command that prints nothing for minutes, as the installation of a package, and the end of a connection whose
//! last bytes were never acknowledged. For example: a host loses its power while a command runs. It is asked after 10, 15,
//! 20 and 25 s of silence, answers none of the four, and the connection ends after 30 s. Without these options it would
//! stay for ever.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::TcpStream;

/// Silence after which the kernel asks the host for a sign of life.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
/// How long the kernel waits for the host's answer before it asks again.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How long bytes that were sent, or questions for a sign of life, may stay without an answer before the connection ends. As
/// several of [`KEEPALIVE_INTERVAL`] fit in it, a few lost packets end no connection.
const UNACKNOWLEDGED_TIMEOUT: Duration = Duration::from_secs(30);
/// Questions that may stay unanswered, where the system counts them in place of [`UNACKNOWLEDGED_TIMEOUT`].
const KEEPALIVE_QUESTIONS: u32 = 4;

/// Make a TCP connection.
///
/// # Errors
/// What the system reports.
pub(super) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpStream::connect(address).await?;
    // Nagle's algorithm would hold small frames back until the last ones are acknowledged.
    socket.set_nodelay(true)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(&socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(&socket, KEEPALIVE_QUESTIONS)?;
    #[cfg(target_os = "linux")]
    sockopt::set_tcp_user_timeout(&socket, u32::try_from(UNACKNOWLEDGED_TIMEOUT.as_millis()).unwrap_or(u32::MAX))?;
    Ok(socket)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The socket of a connection has all options, and the times fit one another.
    #[tokio::test]
    async fn a_connection_has_its_options() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = connect(listener.local_addr().unwrap()).await.unwrap();
        assert!(socket.nodelay().unwrap() && sockopt::socket_keepalive(&socket).unwrap());
        assert_eq!(sockopt::tcp_keepidle(&socket).unwrap(), KEEPALIVE_IDLE);
        assert_eq!(sockopt::tcp_keepintvl(&socket).unwrap(), KEEPALIVE_INTERVAL);
        assert_eq!(sockopt::tcp_keepcnt(&socket).unwrap(), KEEPALIVE_QUESTIONS);
        #[cfg(target_os = "linux")]
        assert_eq!(u128::from(sockopt::tcp_user_timeout(&socket).unwrap()), UNACKNOWLEDGED_TIMEOUT.as_millis());
        assert_eq!(UNACKNOWLEDGED_TIMEOUT, KEEPALIVE_IDLE + KEEPALIVE_INTERVAL * KEEPALIVE_QUESTIONS);
    }
}
