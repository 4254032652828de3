//! Stripes, at the agent: further streams from the client, which bring blobs. See `client/stripes.rs`.
//!
//! The end of a stripe is no event here: the client notices it, and sends again what did not arrive.

use std::sync::Arc;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tracing::debug;

use crate::error::{FrameError, SessionError};
use crate::node::arrivals::Streams;
use crate::timing::MAX_STRIPES;
use crate::wire::{Control, Event, EventReader, FrameSender, greet};

/// The stripes of a session. They end when this is dropped.
pub struct Stripes {
    running: JoinSet<Result<(), SessionError>>,
    /// The agent's, which it tells on each stripe.
    epoch: String,
    /// The most bytes of a blob.
    max_blob: usize,
    /// The sender of the session.
    link: Arc<FrameSender>,
}

impl Stripes {
    #[must_use]
    pub fn new(epoch: String, max_blob: usize, link: Arc<FrameSender>) -> Self {
        Self { running: JoinSet::new(), epoch, max_blob, link }
    }

    /// Read from a stripe from now on, unless there are [`MAX_STRIPES`]. The chunks that it brings go to `take`.
    pub fn add<F>(&mut self, streams: Streams, take: F)
    where
        F: Fn(&mut Vec<Event>) -> Result<(), FrameError> + Send + 'static,
    {
        if self.running.len() < MAX_STRIPES {
            self.running.spawn(run(streams, self.epoch.clone(), self.max_blob, Arc::clone(&self.link), take));
        }
    }

    /// Wait until the client breaks the protocol on a stripe. Return how.
    pub async fn broken(&mut self) -> FrameError {
        while let Some(ended) = self.running.join_next().await {
            match ended {
                Ok(Err(SessionError::Frame(why))) => return why,
                Ok(Err(why)) => debug!(%why, "a stripe has ended"),
                Ok(Ok(())) | Err(_) => {}
            }
        }
        std::future::pending().await
    }

    /// End all stripes. Nothing of them is taken afterwards.
    pub async fn end(&mut self) {
        self.running.shutdown().await;
    }
}

async fn run(
    Streams { reading, mut writing, relay, .. }: Streams,
    epoch: String,
    max_blob: usize,
    link: Arc<FrameSender>,
    take: impl Fn(&mut Vec<Event>) -> Result<(), FrameError>,
) -> Result<(), SessionError> {
    greet(&mut writing, Control::Hello(epoch.into_bytes().into())).await?;
    let mut from = EventReader::of_session(reading, max_blob, link);
    let mut events = Vec::new();
    let ended = closed(relay);
    tokio::pin!(ended);
    loop {
        tokio::select! {
            // First: what has arrived of a block is taken to its end.
            biased;
            read = from.read(&mut events) => read?,
            // The server drops what comes for a command that has ended.
            () = &mut ended => return Ok(()),
        }
        if events.iter().any(|event| !matches!(event, Event::Chunk(_))) {
            return Err(FrameError::BadSequence("something else than blobs on a stripe").into());
        }
        take(&mut events)?;
    }
}

/// Wait until the command that handed a stream over has ended; for ever if there is none. It says nothing before.
pub async fn closed(relay: Option<UnixStream>) {
    match relay {
        Some(mut relay) => drop(relay.read(&mut [0]).await),
        None => std::future::pending().await,
    }
}
