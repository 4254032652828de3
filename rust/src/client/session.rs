//! The session with one node, from the first byte to the last: its agent is started and greeted, what it sends is handed
//! on, and silence ends it. What a session brings is for a [`Sink`] to decide on.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::AsyncRead;

use crate::client::stripes::{self, StripeSpec};
use crate::error::{FrameError, NodeError, SessionError};
use crate::text;
use crate::timing::{LEAST_MESSAGE, PEER_TIMEOUT};
use crate::transport::connection::Connection;
use crate::transport::output::shown;
use crate::wire::{AgentHello, ClientHello, Event, EventReader, FrameSender, Offer, hello, read_hello};

/// Bound on finding out why an agent did not start.
const START_DIAGNOSIS_TIMEOUT: Duration = Duration::from_secs(10);

/// How to open a session with a node that is connected to.
pub struct NodeSpec {
    pub connection: Arc<Connection>,
    /// What to run there: it speaks our protocol over its standard input and output.
    pub command: String,
    /// What to run there to open a stripe (see `stripes.rs`): it gets the path of the agent's socket as one more word, and
    /// hands its standard input and output to the agent. `None` if no stripes are opened.
    pub stripe: Option<String>,
    pub hello: ClientHello,
    /// Bound on everything until the node's workers take tasks.
    pub ready_timeout: Duration,
}

/// Who decides on what the session brings.
pub trait Sink: Sync {
    /// Take what the agent told of itself. Return the interval between heartbeats.
    fn greeted(&self, client: &ClientHello, agent: AgentHello) -> Duration;

    /// Take what the node sent, in its order; `events` is empty afterwards.
    ///
    /// # Errors
    /// What ends the session.
    fn received(&self, events: &mut Vec<Event>) -> Result<(), SessionError>;

    /// Return whether a message of several chunks is to be stored, see [`Offer`].
    ///
    /// # Errors
    /// [`FrameError`] if the node may not send it.
    fn admit(&self, offer: &Offer) -> Result<bool, FrameError>;

    /// Return whether the node's workers take tasks.
    fn is_ready(&self) -> bool;

    /// Return the node's round-trip time; [`Duration::MAX`] until it is known.
    fn round_trip(&self) -> Duration;

    /// Send a heartbeat. `uploading`: whether tasks are on their way to the node; `results`: the bytes of results that ever
    /// came from it.
    ///
    /// # Errors
    /// What the node did not do in time.
    fn beat(&self, uploading: bool, results: u64) -> Result<(), SessionError>;
}

/// Run the session to its end. Return without an error if this end closed it, with a goodbye. Other threads put what the
/// node is to be sent into `sender`. Messages of more than `max_message` bytes are refused.
///
/// # Errors
/// [`NodeError`]: why the node could not be used, or is lost.
pub async fn run(
    spec: NodeSpec,
    sender: &Arc<FrameSender>,
    max_message: usize,
    sink: &impl Sink,
) -> Result<(), NodeError> {
    let bound = spec.ready_timeout;
    let ready_by = Instant::now() + bound;
    let stream = tokio::time::timeout(bound, spec.connection.exec(&spec.command)).await;
    let stream = stream.map_err(|_| SessionError::NotReady(bound.as_secs()))??;
    let (from, to) = tokio::io::split(stream);
    let greeting = hello(&spec.hello)?;
    sender.send(|o| o.control(greeting));
    let sending = sender.run(to, Some(PEER_TIMEOUT));
    tokio::pin!(sending);
    let mut source = EventReader::of_session(from, max_message.max(LEAST_MESSAGE), Arc::clone(sender));
    let mut events = Vec::new();
    let answer = tokio::select! {
        answer = source.greeting(&mut events) => match answer {
            Ok(answer) => answer,
            Err(why) => return Err(why_not_started(&spec, why).await),
        },
        sent = &mut sending => return Ok(sent?),
        () = tokio::time::sleep(bound) => return Err(SessionError::NotReady(bound.as_secs()).into()),
    };
    let agent: AgentHello = read_hello(&answer)?;
    let stripes = StripeSpec::new(&spec.connection, spec.stripe.as_deref(), &agent);
    let interval = sink.greeted(&spec.hello, agent);
    let striping = stripes::serve(stripes, sender, || sink.round_trip());
    tokio::pin!(striping);
    let unready = Unready { ready_by, bound };
    Ok(follow(sink, sender, (sending, striping), source, events, interval, unready).await?)
}

/// Until when the node's workers must take tasks, and the bound that was given for it.
struct Unready {
    ready_by: Instant,
    bound: Duration,
}

/// Hand on what the node sends until the session ends. `sending` and `striping` send what is in the outbox.
async fn follow(
    sink: &impl Sink,
    sender: &FrameSender,
    (mut sending, mut striping): (
        Pin<&mut impl Future<Output = Result<(), SessionError>>>,
        Pin<&mut impl Future<Output = Result<Infallible, SessionError>>>,
    ),
    mut source: EventReader<impl AsyncRead + Unpin>,
    mut events: Vec<Event>,
    interval: Duration,
    unready: Unready,
) -> Result<(), SessionError> {
    let mut heartbeat = tokio::time::interval(interval);
    heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // Silence is counted in heartbeats, not by the clock: a client that was stopped itself first hears what came meanwhile.
    let mut silent = Duration::ZERO;
    let mut said_goodbye = false;
    loop {
        sink.received(&mut events)?;
        tokio::select! {
            read = source.read_admitted(&mut events, |offer| sink.admit(offer)) => {
                if let Err(why) = read {
                    // Results that came before the broken frame count.
                    sink.received(&mut events)?;
                    return Err(why);
                }
                silent = Duration::ZERO;
            }
            // The goodbye was sent. Not the end: what tasks wrote is still to come, and then the node's own goodbye.
            sent = &mut sending, if !said_goodbye => {
                sent?;
                said_goodbye = true;
            }
            ended = &mut striping, if !said_goodbye => match ended? {},
            _ = heartbeat.tick() => {
                if silent > PEER_TIMEOUT {
                    return Err(SessionError::Silent(PEER_TIMEOUT.as_secs()));
                }
                silent += interval;
                if Instant::now() > unready.ready_by && !sink.is_ready() {
                    return Err(SessionError::NotReady(unready.bound.as_secs()));
                }
                sink.beat(sender.is_busy(), source.results())?;
            }
        }
    }
}

/// Return why an agent ended before it greeted. Its standard error is not followed, so it is started once more, without
/// anything to read: what kept it from starting does so again.
async fn why_not_started(spec: &NodeSpec, why: SessionError) -> NodeError {
    if !matches!(why, SessionError::Ended(_)) {
        return why.into();
    }
    match tokio::time::timeout(START_DIAGNOSIS_TIMEOUT, spec.connection.run(&spec.command, Bytes::new())).await {
        Ok(Ok(output)) if output.status.is_some_and(|status| status != 0) && !output.stderr.is_empty() => {
            let (status, agent) = (output.status.unwrap_or_default(), shown(&spec.command));
            let printed = text::lines(output.stderr.trim_ascii(), text::LIMIT);
            NodeError::Other(format!(
                "{why}. Its agent does not start: `{agent}` ended with status {status}: {printed}"
            ))
        }
        _ => why.into(),
    }
}
