//! Further channels of a node's SSH connection, over which blobs cross beside the session's own channel: stripes.
//!
//! A server lets a client send only so many bytes on a channel before they have arrived and it grants more: OpenSSH's window
//! is 2 MiB. That makes 2 GB/s at a round trip of 1 ms, but 26 MB/s at 80 ms, whatever the link could carry. So where the
//! round trip is long and much waits, a session opens stripes, once and all at the same time. From then on blobs cross over
//! them alone, and the session's channel is free for all that is small.
//!
//! A stripe is a command on the host that hands its standard streams to the agent, which greets the client over it; before
//! that nothing is sent. A server that refuses the channel or the command costs speed and nothing else. A chunk that was sent
//! on a stripe counts as sent, so when such a stripe ends, the session does, too.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tracing::{debug, info};

use crate::error::SessionError;
use crate::timing::{MAX_STRIPES, PEER_TIMEOUT};
use crate::transport::connection::Connection;
use crate::wire::{AgentHello, EventReader, FrameSender};

/// Bytes that OpenSSH's server takes on one channel before they have arrived and it grants more.
const CHANNEL_WINDOW_BYTES: f64 = 2.0 * 1024.0 * 1024.0;
/// The rate that the stripes of a node together are to allow, in bytes per second.
const WANTED_RATE: f64 = 250e6;
/// With a shorter round trip no stripe is opened: one channel allows 210 MB/s at 10 ms.
const MIN_ROUND_TRIP: Duration = Duration::from_millis(10);
/// Bytes of blobs that wait before stripes are opened. Opening them takes two round trips and the start of a small command,
/// in which one channel carries some MB.
pub const MIN_WAITING_BYTES: usize = 8 * 1024 * 1024;
/// How often the round trip is measured when a session begins.
const ANSWERS: usize = 5;
/// Bound on the opening of a stripe.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the end of a stripe waits for the end of the session, which knows the reason better.
const REASON_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes of the longest path of an agent's socket, as Unix has it.
const MAX_PATH_BYTES: usize = 107;

/// Return how many stripes a node with this round trip is to have.
///
/// For example: 250 MB/s are 20 MB in 80 ms, which are ten windows of 2 MiB: the most, 8, are opened. At 20 ms they are 5 MB
/// and 3 windows, and at 5 ms a single one, which the session's own channel has.
#[must_use]
pub fn stripes(round_trip: Duration) -> usize {
    if round_trip < MIN_ROUND_TRIP {
        return 0;
    }
    let windows = (WANTED_RATE * round_trip.as_secs_f64() / CHANNEL_WINDOW_BYTES).ceil();
    (2..MAX_STRIPES)
        .find(|count| f64::from(u32::try_from(*count).unwrap_or(u32::MAX)) >= windows)
        .unwrap_or(MAX_STRIPES)
}

/// How stripes are opened to a node. Made when its agent has greeted.
#[derive(Clone)]
pub(super) struct StripeSpec {
    /// The node's present connection.
    pub(super) connection: Arc<Connection>,
    /// Runs on the host.
    command: String,
    /// The agent's, which it tells on each stripe.
    epoch: String,
}

impl StripeSpec {
    /// Return how stripes are opened to an agent; `None` if it takes none. `program`: see
    /// [`NodeSpec::stripe`](super::session::NodeSpec::stripe).
    pub fn new(connection: &Arc<Connection>, program: Option<&str>, agent: &AgentHello) -> Option<Self> {
        let command = format!("{} {}", program?, socket(agent)?);
        Some(Self { connection: Arc::clone(connection), command, epoch: agent.epoch.clone() })
    }
}

/// Return the path of an agent's socket if it can be a word of a command, for any login shell.
pub(super) fn socket(agent: &AgentHello) -> Option<&str> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte);
    let is_usable = |path: &&str| path.starts_with('/') && path.len() <= MAX_PATH_BYTES && path.bytes().all(is_plain);
    agent.socket.as_deref().filter(is_usable)
}

/// Open stripes as soon as they pay, and send blobs over them. `round_trip` returns the node's round-trip time, as its
/// heartbeats have it.
///
/// # Errors
/// Why a stripe has ended on which blobs were sent: they may be lost.
pub(super) async fn serve(
    spec: Option<StripeSpec>,
    sender: &Arc<FrameSender>,
    round_trip: impl Fn() -> Duration,
) -> Result<Infallible, SessionError> {
    let Some(spec) = spec else { return std::future::pending().await };
    let answered = shortest_answer(&spec.connection).await;
    if stripes(answered) == 0 {
        return std::future::pending().await;
    }
    sender.blobs_wait(MIN_WAITING_BYTES).await;
    let shortest = answered.min(round_trip());
    let count = stripes(shortest);
    info!(count, round_trip_ms = shortest.as_millis(), "stripes");
    let mut opened = JoinSet::new();
    for _ in 0..count {
        opened.spawn(stripe(spec.clone(), Arc::clone(sender)));
    }
    while let Some(ended) = opened.join_next().await {
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(why)) => {
                tokio::time::sleep(REASON_TIMEOUT).await;
                return Err(why);
            }
            Err(_) => return Err(SessionError::Stripe("it panicked".to_owned())),
        }
    }
    std::future::pending().await
}

/// Return how long the host's server takes to answer, which is the round trip if neither end is busy: so the shortest of
/// [`ANSWERS`] counts, or the first one that is too short for stripes. The server itself answers, as the agent is busy with the
/// start of its workers.
async fn shortest_answer(connection: &Connection) -> Duration {
    let mut shortest = Duration::MAX;
    for _ in 0..ANSWERS {
        let Some(answered) = connection.round_trip().await else { return Duration::ZERO };
        shortest = shortest.min(answered);
        if stripes(shortest) == 0 {
            break;
        }
    }
    shortest
}

/// Open a stripe, and send blobs over it until the session ends. Return at once if it does not open.
///
/// # Errors
/// Why the stripe has ended, if blobs were sent on it.
async fn stripe(spec: StripeSpec, sender: Arc<FrameSender>) -> Result<(), SessionError> {
    let mut events = Vec::new();
    let opened = tokio::time::timeout(OPEN_TIMEOUT, async {
        let (from, to) = spec.connection.exec_once(&spec.command).await?;
        let mut from = EventReader::new(from, 0);
        let epoch = from.greeting(&mut events).await?;
        if epoch == spec.epoch.as_bytes() { Ok((from, to)) } else { Err(SessionError::BadHello(String::new()).into()) }
    });
    let (mut from, to) = match opened.await {
        Ok(Ok(streams)) => streams,
        Ok(Err(why)) => {
            let why: crate::error::NodeError = why;
            debug!(%why, "a stripe is refused");
            return Ok(());
        }
        Err(_) => {
            debug!("a stripe does not open");
            return Ok(());
        }
    };
    let mut stripe = sender.stripe();
    let end = tokio::select! {
        sent = stripe.run(to, Some(PEER_TIMEOUT)) => sent.map(|never| match never {}),
        // An agent sends nothing more on a stripe.
        Err(why) = async {
            while events.is_empty() {
                from.read(&mut events).await?;
            }
            Err::<Infallible, _>(SessionError::Unasked("sent something on a stripe"))
        } => Err(why),
    };
    match end {
        Err(why) if stripe.is_used() => Err(SessionError::Stripe(why.to_string())),
        _ => Ok(()),
    }
}
