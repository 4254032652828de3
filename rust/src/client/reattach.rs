//! A session whose connection was lost goes on over another one.
//!
//! The present SSH connection is tried first: perhaps only a command on it has ended. Then other connections are awaited, which
//! Python makes (`client/returning.py`), until the node's lease is over. An agent of another epoch is proof that the session's
//! own agent is gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::sync::mpsc;
use tracing::{debug, info};

use crate::error::{NodeError, SessionError};
use crate::timing::Timing;
use crate::transport::connection::{Connection, Reading, Writing};
use crate::wire::{AgentHello, ArrivedBlocks, Attach, EventReader, attach, greet};

/// Bound on one try.
const ATTACH_TIMEOUT: Duration = Timing::DEFAULT.attach;

/// Another connection to a node, and where the end of the try with it is told.
pub struct OtherConnection {
    pub connection: Arc<Connection>,
    pub done: SyncSender<Result<(), NodeError>>,
}

/// Brings other connections to a node.
pub type Offers = mpsc::Receiver<OtherConnection>;

/// What the client knows of the agent that it has the session with.
pub(super) struct Known {
    epoch: String,
    boot: String,
    /// Tries to go on with the session so far: see [`Attach::number`].
    tries: AtomicU64,
}

impl Known {
    /// Return `None` if the agent's session ends with its connection.
    pub fn new(agent: &AgentHello) -> Option<Self> {
        agent.socket.as_ref().map(|_| Self {
            epoch: agent.epoch.clone(),
            boot: agent.boot.clone(),
            tries: AtomicU64::new(0),
        })
    }

    /// Return why the agent is gone, now that another one answers.
    fn why_gone(&self, other: &Attach) -> String {
        if self.boot != other.boot {
            return "its host was restarted".to_owned();
        }
        "it ended while the connection was cut: it was killed, or its host ends the processes of a user who logs out \
         (`python -m skyward_lite check` tells)"
            .to_owned()
    }
}

/// A connection on which the session goes on.
pub(super) struct Found {
    pub connection: Arc<Connection>,
    pub from: Reading,
    pub to: Writing,
    /// What was read behind the agent's answer.
    pub rest: BytesMut,
    /// The agent's answer.
    pub attach: Attach,
}

/// Wait for a connection on which the agent answers. `present`: the one that there was, if it may be of use yet. `command` is run
/// there; this end has `received` so many bytes. `lease` returns until when the agent may be there, and for how many seconds nothing
/// was heard from it.
///
/// # Errors
/// [`NodeError::Gone`] if the agent is not there any more, [`NodeError::Away`] if the lease is over.
pub(super) async fn find(
    present: Option<&Arc<Connection>>,
    command: &str,
    known: &Known,
    received: u64,
    lease: impl Fn() -> (Instant, u64),
    offers: &mut Offers,
) -> Result<Found, NodeError> {
    let (until, _) = lease();
    let search = async {
        if let Some(present) = present.filter(|present| present.is_open()) {
            match attempt(present, command, known, received).await {
                Err(why) if !is_final(&why) => debug!(%why, "not on the same connection"),
                found => return found,
            }
        }
        loop {
            let Some(OtherConnection { connection, done }) = offers.recv().await else {
                return Err(SessionError::GivenUp.into());
            };
            match attempt(&connection, command, known, received).await {
                Err(why) if !is_final(&why) => {
                    info!(%why, "not attached");
                    drop(done.send(Err(why)));
                }
                found => {
                    drop(done.send(Ok(())));
                    return found;
                }
            }
        }
    };
    let found = tokio::time::timeout_at(until.into(), search).await.unwrap_or_else(|_| Err(NodeError::Away(lease().1)));
    // A connection that was offered meanwhile is not needed: who waits for its end hears that nothing is to be done.
    while let Ok(other) = offers.try_recv() {
        drop(other.done.send(Ok(())));
    }
    found
}

/// Return whether the agent itself has said that the session is over: on no connection does it go on.
fn is_final(why: &NodeError) -> bool {
    matches!(why, NodeError::Gone(_) | NodeError::Session(SessionError::Goodbye(_)))
}

/// Run the command on a connection, and exchange with the agent what both have.
async fn attempt(
    connection: &Arc<Connection>,
    command: &str,
    known: &Known,
    received: u64,
) -> Result<Found, NodeError> {
    let exchange = async {
        let (from, mut to) = connection.exec(command).await?;
        let mine = Attach {
            epoch: known.epoch.clone(),
            received,
            number: known.tries.fetch_add(1, Relaxed) + 1,
            blocks: ArrivedBlocks::default(),
            boot: String::new(),
        };
        greet(&mut to, attach(&mine)?).await?;
        let mut reader = EventReader::new(from, 0);
        let attach = reader.attached().await?;
        if attach.epoch != known.epoch {
            return Err(NodeError::Gone(known.why_gone(&attach)));
        }
        let (from, rest) = reader.into_parts().map_err(SessionError::Frame)?;
        let from = from.ok_or(SessionError::Ended(String::new()))?;
        Ok(Found { connection: Arc::clone(connection), from, to, rest, attach })
    };
    let bound = ATTACH_TIMEOUT.as_secs();
    tokio::time::timeout(ATTACH_TIMEOUT, exchange).await.unwrap_or_else(|_| Err(SessionError::Silent(bound).into()))
}
