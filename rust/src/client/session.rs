//! The session with one node, from the first byte to the last: its agent is started and greeted, what it sends is handed
//! on, and silence ends its connection. What a session brings is for a [`Sink`] to decide on.
//!
//! Where the agent has a socket, the session outlives its connection (`reattach.rs`).

use std::convert::Infallible;
use std::io::ErrorKind;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::client::reattach::{self, Offers};
use crate::client::stripes::{self, StripeSpec};
use crate::error::{FrameError, NodeError, SessionError};
use crate::text;
use crate::timing::{LEAST_MESSAGE, PEER_TIMEOUT, Timing};
use crate::transport::connection::{Connection, Reading, Writing};
use crate::transport::output::shown;
use crate::wire::{AgentHello, ClientHello, Event, EventReader, FrameSender, MAGIC, Offer, greet, hello, read_hello};

/// Bound on finding out why an agent did not start.
const START_DIAGNOSIS_TIMEOUT: Duration = Duration::from_secs(10);
/// Bound on telling an agent that its session is over, for a reason that is not the connection's.
const FAREWELL_TIMEOUT: Duration = Timing::DEFAULT.agent_goodbye;

/// How to open a session with a node that is connected to.
pub struct NodeSpec {
    pub connection: Arc<Connection>,
    /// What to run there: it speaks our protocol over its standard input and output.
    pub command: String,
    /// What to run there to go on with the session on another connection: it gets the path of the agent's socket as one more
    /// word. `None` if the session ends with its connection.
    pub again: Option<String>,
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
    ///
    /// # Errors
    /// If the node was given up meanwhile, or is not to be used.
    fn greeted(&self, client: &ClientHello, agent: AgentHello) -> Result<Duration, SessionError>;

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

    /// Note that the node's connection is lost, and why. The session may go on over another one.
    ///
    /// # Errors
    /// If the node was given up meanwhile.
    fn away(&self, why: &SessionError) -> Result<(), SessionError>;

    /// Note that the session goes on.
    ///
    /// # Errors
    /// If the node was given up meanwhile.
    fn back(&self) -> Result<(), SessionError>;

    /// Return until when the node's agent may go on without this client, and for how many seconds nothing was heard from it.
    fn lease(&self) -> (Instant, u64);
}

/// Run the session to its end. Return without an error if this end closed it, with a goodbye. Other threads put what the
/// node is to be sent into `sender`. Messages of more than `max_message` bytes are refused. `offers` brings other connections.
///
/// # Errors
/// [`NodeError`]: why the node could not be used, or is lost.
pub async fn run(
    mut spec: NodeSpec,
    sender: &Arc<FrameSender>,
    max_message: usize,
    sink: &impl Sink,
    mut offers: Offers,
) -> Result<(), NodeError> {
    spec.hello.resumable = spec.again.is_some();
    let bound = spec.ready_timeout;
    let ready_by = Instant::now() + bound;
    let mut events = Vec::new();
    let opened = tokio::time::timeout(bound, open(&mut spec, sender, max_message, &mut events)).await;
    let (to, mut source, agent) = opened.map_err(|_| SessionError::NotReady(bound.as_secs()))??;
    let known = reattach::Known::new(&agent);
    let mut stripes = StripeSpec::new(&spec.connection, spec.stripe.as_deref(), &agent);
    let (interval, mut to) = begin(sink, &spec.hello, agent, sender, to, &mut source).await?;
    let unready = Unready { ready_by, bound };
    loop {
        let is_over = |why: &SessionError| known.is_none() || spec.again.is_none() || !why.is_cut();
        let why = {
            let has_ended = AtomicBool::new(false);
            let sending = async {
                let sent = sender.run(to, Some(PEER_TIMEOUT)).await;
                has_ended.store(true, Relaxed);
                sent
            };
            let striping = stripes::serve(stripes.clone(), sender, || sink.round_trip());
            let (mut sending, striping) = (std::pin::pin!(sending), std::pin::pin!(striping));
            let senders = (sending.as_mut(), striping);
            let end = follow(sink, sender, senders, &mut source, &mut events, interval, &unready).await;
            let Err(why) = end else { return Ok(()) };
            if is_over(&why) {
                if !has_ended.load(Relaxed) {
                    // Without it the agent would go on until its lease ends.
                    sender.send(|o| o.close(&why.to_string()));
                    drop(tokio::time::timeout(FAREWELL_TIMEOUT, until_it_ends(sending, &mut source)).await);
                }
                return Err(why.into());
            }
            why
        };
        let (Some(known), Some(again)) = (&known, &spec.again) else { return Err(why.into()) };
        sink.away(&why)?;
        source.disconnect();
        let received = source.reached();
        // On a connection that is silent another command would be, too.
        let present = (!matches!(why, SessionError::Silent(_))).then_some(&spec.connection);
        let found = reattach::find(present, again, known, received, || sink.lease(), &mut offers).await?;
        sender.resume(found.attach.received, &found.attach.blocks).map_err(SessionError::Frame)?;
        spec.connection = found.connection;
        if let Some(stripes) = &mut stripes {
            stripes.connection = Arc::clone(&spec.connection);
        }
        source.resume(found.from, &found.rest);
        to = found.to;
        sink.back()?;
    }
}

/// Start the agent and exchange the greetings. What came behind the agent's is in `events` then.
async fn open(
    spec: &mut NodeSpec,
    sender: &Arc<FrameSender>,
    max_message: usize,
    events: &mut Vec<Event>,
) -> Result<(Writing, EventReader<Reading>, AgentHello), NodeError> {
    let (from, mut to) = spec.connection.exec(&spec.command).await?;
    greet(&mut to, hello(&spec.hello)?).await?;
    let mut source = EventReader::of_session(from, max_message.max(LEAST_MESSAGE), Arc::clone(sender));
    let answer = match source.greeting(events).await {
        Ok(answer) => answer,
        Err(why) => return Err(why_not_started(spec, why).await),
    };
    let agent: AgentHello = read_hello(&answer)?;
    let is_resumable = agent.socket.is_some() && spec.again.is_some();
    if is_resumable {
        source.begin_stream().map_err(SessionError::Frame)?;
    }
    sender.begin_stream(is_resumable);
    if let (Some(again), Some(socket)) = (&mut spec.again, stripes::socket(&agent)) {
        // So the agent is found where its directory is, whatever TMPDIR the next login has.
        again.push(' ');
        again.push_str(socket);
    }
    Ok((to, source, agent))
}

/// Hand the agent's greeting on. Return the interval between heartbeats, and where the session is written to. An agent that is
/// not to be used is told so, and has read it when this returns: otherwise it would wait for its lease to end.
async fn begin(
    sink: &impl Sink,
    client: &ClientHello,
    agent: AgentHello,
    sender: &FrameSender,
    to: Writing,
    source: &mut EventReader<Reading>,
) -> Result<(Duration, Writing), SessionError> {
    let why = match sink.greeted(client, agent) {
        Ok(interval) => return Ok((interval, to)),
        Err(why) => why,
    };
    sender.send(|o| o.close(&why.to_string()));
    let sending = sender.run(to, Some(PEER_TIMEOUT));
    drop(tokio::time::timeout(FAREWELL_TIMEOUT, until_it_ends(sending, source)).await);
    Err(why)
}

/// Send the goodbye, and wait until the agent has read it: the agent closes its end then. If the connection were closed at
/// once, the agent might see the cut first, and wait for this client until its lease ends.
async fn until_it_ends(sending: impl Future<Output = Result<(), SessionError>>, source: &mut EventReader<Reading>) {
    if sending.await.is_ok() {
        while source.read_admitted(&mut Vec::new(), |_| Ok(false)).await.is_ok() {}
    }
}

/// Until when the node's workers must take tasks, and the bound that was given for it.
struct Unready {
    ready_by: Instant,
    bound: Duration,
}

/// Hand on what the node sends until the session ends, or its connection. `sending` and `striping` send what is in the outbox.
async fn follow(
    sink: &impl Sink,
    sender: &FrameSender,
    (mut sending, mut striping): (
        Pin<&mut impl Future<Output = Result<(), SessionError>>>,
        Pin<&mut impl Future<Output = Result<Infallible, SessionError>>>,
    ),
    source: &mut EventReader<Reading>,
    events: &mut Vec<Event>,
    interval: Duration,
    unready: &Unready,
) -> Result<(), SessionError> {
    let mut heartbeat = tokio::time::interval(interval);
    heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // Silence is counted in heartbeats, not by the clock: a client that was stopped itself first hears what came meanwhile.
    let mut silent = Duration::ZERO;
    let mut said_goodbye = false;
    loop {
        sink.received(events)?;
        tokio::select! {
            read = source.read_admitted(events, |offer| sink.admit(offer)) => {
                if let Err(why) = read {
                    // Results that came before the broken frame count.
                    sink.received(events)?;
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
                source.tell_reached();
                sink.beat(sender.is_busy(), source.results())?;
            }
        }
    }
}

/// Return why an agent ended before it greeted. Its standard error is not followed, so it is started once more, without
/// anything to read: what kept it from starting does so again.
async fn why_not_started(spec: &NodeSpec, why: SessionError) -> NodeError {
    let has_ended = match &why {
        SessionError::Ended(_) => true,
        SessionError::Io(error) => error.kind() == ErrorKind::UnexpectedEof,
        _ => false,
    };
    if !has_ended {
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
        // It ended by itself and never spoke our protocol: this was no cut, after which another try may do. Of a command, whose
        // status need not be the agent's, that is not known.
        Ok(Ok(output))
            if output.status.is_some()
                && spec.connection.program().is_none()
                && !output.stdout.windows(MAGIC.len()).any(|part| part == MAGIC) =>
        {
            let (status, agent) = (output.status.unwrap_or_default(), shown(&spec.command));
            NodeError::Other(format!("{why}. `{agent}` ended with status {status} and is no agent of ours"))
        }
        _ => why.into(),
    }
}
