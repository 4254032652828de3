//! The agent's session with its client, which outlives the connection where the agent has a socket (`arrivals.rs`).
//!
//! While the connection is cut the workers go on, and what is to be sent is kept. The client comes back with another connection
//! and both ends go on where they were (`wire/resume.rs`), or the lease ends. A client that begins a new session has given the
//! old one up: then this agent ends, and another one takes its place.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::error::{AgentError, FrameError, SessionError};
use crate::node::actions::Input;
use crate::node::agent::{Agent, Serving};
use crate::node::arrivals::{Arrival, Arrivals, Reading, Streams, Writing};
pub use crate::node::greeting::AgentSpec;
use crate::node::greeting::{answer, boot, refusal};
use crate::node::limits::raise_open_files;
use crate::node::process_group::adopt_orphans;
use crate::node::state::TICK;
use crate::node::stripes::{Stripes, closed};
use crate::timing::{HEARTBEAT, LEAST_MESSAGE, Timing};
use crate::wire::{
    AgentHello, ArrivedBlocks, Attach, Body, ClientHello, Control, Event, EventReader, FrameSender, Offer, attach,
    greet, hello, read_hello,
};

/// How long the client's hello is awaited.
const GREETING_TIMEOUT: Duration = Timing::DEFAULT.hello;
/// How long an agent without a session waits for another client after one that was told that the agent it looks for is not here,
/// or whose connection was cut before its hello: it may have gone. A client that comes later starts another agent.
const RETURN_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the goodbye to the client may take, until it has read it and closed its end.
const GOODBYE_TIMEOUT: Duration = Timing::DEFAULT.agent_goodbye;
/// Heartbeats that an agent sends in the time of a lease, at least.
const HEARTBEATS_PER_LEASE: u32 = 4;

/// Serve one client until it is done with us, then end everything that was started. The client comes on `first`, or with one of
/// `arrivals`, which come at this path. With these it may come back after its connection was cut.
///
/// # Errors
/// [`AgentError::Refused`] if the client's Python does not fit; [`AgentError::Session`] if it was lost.
pub async fn run(
    first: Option<Streams>,
    arrivals: Arrivals,
    socket: Option<String>,
    spec: AgentSpec,
) -> Result<(), AgentError> {
    raise_open_files();
    adopt_orphans();
    let mut events = Vec::new();
    let (mut session, client) = Session::open(arrivals, first, socket, &spec, &mut events).await?;
    let agent = Arc::new(Agent::new(client, spec, Arc::clone(&session.link)));
    agent.handle(Input::Begin);
    let _serving = Serving::new(&agent);
    let ended = session.serve(&agent, events).await;
    agent.kill_workers().await;
    ended
}

/// A connection: what writes to it, and the end of the command that handed it over.
struct Connection {
    writer: JoinHandle<Result<(), SessionError>>,
    closed: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// See the file's text.
struct Session {
    reader: EventReader<Reading>,
    link: Arc<FrameSender>,
    /// `None` while the connection is cut.
    connection: Option<Connection>,
    arrivals: Arrivals,
    stripes: Stripes,
    epoch: String,
    /// Whether the client may come back.
    is_resumable: bool,
    /// The number of the client's last try to go on, see [`Attach::number`].
    last_try: u64,
    /// Between two heartbeats.
    interval: Duration,
}

impl Session {
    /// Wait for a client, and greet it. `socket`: the path at which `arrivals` come; `None` if none do. What came behind the
    /// greeting is in `events` then.
    ///
    /// # Errors
    /// [`AgentError::Refused`] if the client's Python does not fit; [`AgentError::Session`] if no client came, or it was lost
    /// before the greeting was over.
    async fn open(
        mut arrivals: Arrivals,
        mut first: Option<Streams>,
        socket: Option<String>,
        spec: &AgentSpec,
        events: &mut Vec<Event>,
    ) -> Result<(Self, ClientHello), AgentError> {
        let mut patience = GREETING_TIMEOUT;
        loop {
            let streams = match first.take() {
                Some(streams) => streams,
                None => await_client(&mut arrivals, spec, patience).await?,
            };
            patience = RETURN_TIMEOUT;
            let bound = GREETING_TIMEOUT;
            let greeted = tokio::time::timeout(bound, greet_client(streams, socket.clone(), spec, events)).await;
            match greeted.unwrap_or_else(|_| Err(SessionError::NotReady(bound.as_secs()).into())) {
                Ok(greeted) => return Ok(Self::new(greeted, arrivals, spec)),
                // The connection was cut in the greeting: the client comes again.
                Err(AgentError::Session(why)) if socket.is_some() && why.is_cut() => info!(%why, "no greeting"),
                Err(why) => return Err(why),
            }
        }
    }

    fn new(greeted: Greeted, arrivals: Arrivals, spec: &AgentSpec) -> (Self, ClientHello) {
        let Greeted { client, reader, writing, link, relay, max_message, is_resumable } = greeted;
        let lease = Duration::from_millis(client.lease_ms);
        let session = Self {
            connection: Some(connect(Arc::clone(&link), writing, relay)),
            reader,
            arrivals,
            stripes: Stripes::new(spec.epoch.clone(), max_message, Arc::clone(&link)),
            link,
            epoch: spec.epoch.clone(),
            is_resumable,
            last_try: 0,
            interval: HEARTBEAT.min(lease / HEARTBEATS_PER_LEASE).max(Duration::from_millis(1)),
        };
        (session, client)
    }

    /// Wait for the client and the clock until the session is to end, and end the workers in order if nobody is lost.
    async fn serve(&mut self, agent: &Arc<Agent>, mut events: Vec<Event>) -> Result<(), AgentError> {
        let parent = rustix::process::getppid();
        // An agent whose session can go on is on its own.
        let is_alone = self.is_resumable;
        let mut tick = tokio::time::interval(TICK);
        // Silence is counted in ticks: after a stop of our own, one of them says enough.
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut heartbeat = tokio::time::interval(self.interval);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut handled = Ok(());
        loop {
            if !events.is_empty() {
                handled = agent.on_client(&mut events);
            }
            if let Err(broken) = handled {
                warn!(why = %broken, "the client is broken");
                self.say_goodbye(&broken.to_string()).await;
                return Err(SessionError::Frame(broken).into());
            }
            if let Some(why) = agent.take_stop() {
                info!(%why, "goodbye");
                agent.dismiss_workers().await;
                agent.kill_workers().await;
                self.say_goodbye(&why).await;
                return Ok(());
            }
            let Self { reader, connection, arrivals, stripes, .. } = &mut *self;
            tokio::select! {
                heard = hear(reader, connection, &mut events) => match heard {
                    Heard::Read => {}
                    Heard::Left => return Ok(()),
                    Heard::Cut(why) => self.on_cut(why).await?,
                },
                broken = stripes.broken() => handled = Err(broken),
                arrival = arrivals.next() => match arrival {
                    // Its client left before the stream came here: it is not the one that has a session since.
                    Arrival::New(mut streams) if streams.is_left => drop(streams.take().await),
                    Arrival::New(_) => {
                        info!("the client begins a new session");
                        return Ok(());
                    }
                    Arrival::Again(streams, wanted, rest) => self.resume(streams, &wanted, &rest).await?,
                    Arrival::Stripe(streams) => {
                        let agent = Arc::clone(agent);
                        stripes.add(streams, move |events| agent.on_client(events));
                    }
                },
                () = agent.stopped() => {}
                _ = tick.tick() => agent.on_tick(!is_alone && rustix::process::getppid() != parent),
                // The client's own may wait behind what it uploads: we live all the same.
                _ = heartbeat.tick() => self.beat(agent),
            }
        }
    }

    fn beat(&mut self, agent: &Agent) {
        if self.connection.is_some() {
            self.reader.tell_reached();
            let nonce = agent.clock();
            self.link.send(|o| o.control(Control::Heartbeat { nonce, lease_ms: 0, echo: 0 }));
        }
    }

    /// Go on without a connection, if the client can come back.
    ///
    /// # Errors
    /// Why the session is over.
    async fn on_cut(&mut self, why: SessionError) -> Result<(), AgentError> {
        if self.is_resumable && why.is_cut() {
            info!(%why, "the connection is cut");
            self.disconnect().await;
            return Ok(());
        }
        warn!(%why, "the client is lost");
        // The client learns the reason if it can still read.
        self.say_goodbye(&why.to_string()).await;
        Err(why.into())
    }

    /// Close the connection, and the stripes of the same SSH connection.
    async fn disconnect(&mut self) {
        self.reader.disconnect();
        if let Some(mut connection) = self.connection.take() {
            connection.writer.abort();
            join(&mut connection.writer).await;
        }
        self.stripes.end().await;
    }

    /// Go on with this connection, whether or not the present one is known to be broken. `rest` was read behind `wanted`.
    ///
    /// # Errors
    /// [`AgentError::Session`] if the client cannot have what it says that it has.
    async fn resume(&mut self, mut streams: Streams, wanted: &Attach, rest: &BytesMut) -> Result<(), AgentError> {
        if wanted.epoch != self.epoch {
            // It looks for an agent that was here before.
            drop(refuse(&mut streams, &self.epoch).await);
            return Ok(());
        }
        if wanted.number <= self.last_try {
            info!("a try to go on comes late: the client goes on by a later one");
            return Ok(());
        }
        self.last_try = wanted.number;
        self.disconnect().await;
        let (received, blocks) = (self.reader.reached(), self.link.arrived_blocks());
        self.link.resume(wanted.received, &wanted.blocks).map_err(SessionError::Frame)?;
        let mine = attach(&Attach { epoch: self.epoch.clone(), received, number: 0, blocks, boot: boot() })?;
        match greet(&mut streams.writing, mine).await {
            Ok(()) => {
                info!("the client is back");
                let Streams { reading, writing, relay, .. } = streams;
                self.reader.resume(reading, rest);
                self.connection = Some(connect(Arc::clone(&self.link), writing, relay));
                Ok(())
            }
            Err(why) => self.on_cut(why).await,
        }
    }

    /// Send the goodbye, and wait until the client has read it: the client closes its end then.
    async fn say_goodbye(&mut self, why: &str) {
        self.link.send(|o| o.close(why));
        let Some(connection) = &mut self.connection else { return };
        let both = async {
            join(&mut connection.writer).await;
            while self.reader.read_admitted(&mut Vec::new(), |_| Ok(false)).await.is_ok() {}
        };
        drop(tokio::time::timeout(GOODBYE_TIMEOUT, both).await);
    }
}

/// Wait for the end of a writer, if it has not ended.
async fn join(writer: &mut JoinHandle<Result<(), SessionError>>) {
    if !writer.is_finished() {
        drop(writer.await);
    }
}

/// Wait until the writer has ended, or nothing that it writes arrives any more; for ever without a connection.
async fn ended(connection: &mut Option<Connection>) -> Result<(), SessionError> {
    let Some(Connection { writer, closed }) = connection else { return std::future::pending().await };
    tokio::select! {
        sent = writer => sent.unwrap_or(Ok(())),
        () = closed => Err(SessionError::Ended(String::new())),
    }
}

/// What is heard of a connection.
enum Heard {
    /// Events, or a part of one.
    Read,
    /// Everything that this agent had to send, its goodbye included, is sent.
    Left,
    Cut(SessionError),
}

/// Wait for events, or the end of the connection. What arrived before the end comes first: it may be the client's goodbye.
async fn hear(
    reader: &mut EventReader<Reading>,
    connection: &mut Option<Connection>,
    events: &mut Vec<Event>,
) -> Heard {
    tokio::select! {
        biased;
        read = reader.read_admitted(events, admit_task) => read.map_or_else(Heard::Cut, |()| Heard::Read),
        ended = ended(connection) => ended.map_or_else(Heard::Cut, |()| Heard::Left),
    }
}

/// Write to a connection what is to be sent from now on.
fn connect(link: Arc<FrameSender>, writing: Writing, relay: Option<tokio::net::UnixStream>) -> Connection {
    // No bound on a write: a client that takes nothing is waited for until its lease ends.
    let writer = tokio::spawn(async move { link.run(writing, None).await });
    Connection { writer, closed: Box::pin(closed(relay)) }
}

/// Wait for a client that begins a session, for so long at first. One that looks for an earlier agent is told that it is not here.
async fn await_client(arrivals: &mut Arrivals, spec: &AgentSpec, first: Duration) -> Result<Streams, AgentError> {
    let mut patience = first;
    loop {
        let arrived = tokio::time::timeout(patience, arrivals.next()).await;
        let arrival = arrived.map_err(|_| SessionError::NotReady(patience.as_secs()))?;
        patience = RETURN_TIMEOUT;
        match arrival {
            Arrival::New(mut streams) => {
                if streams.take().await.is_ok() {
                    return Ok(streams);
                }
            }
            Arrival::Again(mut streams, ..) => drop(refuse(&mut streams, &spec.epoch).await),
            Arrival::Stripe(_) => {}
        }
    }
}

/// Tell a client that wants to go on with a session of another agent whose epoch this agent has.
async fn refuse(streams: &mut Streams, epoch: &str) -> Result<(), SessionError> {
    let answer =
        Attach { epoch: epoch.to_owned(), received: 0, number: 0, blocks: ArrivedBlocks::default(), boot: boot() };
    greet(&mut streams.writing, attach(&answer)?).await?;
    // The client closes its end when it has read the answer.
    drop(tokio::time::timeout(GOODBYE_TIMEOUT, tokio::io::AsyncReadExt::read(&mut streams.reading, &mut [0])).await);
    Ok(())
}

/// What the greeting brought.
struct Greeted {
    client: ClientHello,
    reader: EventReader<Reading>,
    writing: Writing,
    link: Arc<FrameSender>,
    relay: Option<tokio::net::UnixStream>,
    max_message: usize,
    is_resumable: bool,
}

/// Wait for the client's hello and answer it. What came with it is in `events` then.
async fn greet_client(
    streams: Streams,
    socket: Option<String>,
    spec: &AgentSpec,
    events: &mut Vec<Event>,
) -> Result<Greeted, AgentError> {
    let Streams { reading, mut writing, relay, .. } = streams;
    let link = Arc::new(FrameSender::default());
    let mut reader = EventReader::of_session(reading, usize::MAX, Arc::clone(&link));
    let client: ClientHello = read_hello(&reader.greeting(events).await?)?;
    let max_message = client.worker.max_payload.max(LEAST_MESSAGE);
    reader.set_max_message(max_message);
    if let Some(why) = refusal(&client, spec) {
        greet(&mut writing, Control::Goodbye(why.clone().into())).await?;
        let rest = async { while reader.read(&mut Vec::new()).await.is_ok() {} };
        drop(tokio::time::timeout(GOODBYE_TIMEOUT, rest).await);
        return Err(AgentError::Refused(why));
    }
    let is_resumable = socket.is_some() && client.resumable;
    if is_resumable {
        reader.begin_stream().map_err(SessionError::Frame)?;
    }
    link.begin_stream(is_resumable);
    let answer = hello(&AgentHello { socket, ..answer(spec) })?;
    greet(&mut writing, answer).await?;
    info!(node = %client.node, lease_ms = client.lease_ms, "hello of the client");
    Ok(Greeted { client, reader, writing, link, relay, max_message, is_resumable })
}

/// Return whether a client's message is to be stored, now that its first chunk is here.
fn admit_task(offer: &Offer) -> Result<bool, FrameError> {
    match offer.body {
        Body::Task | Body::Answer => Ok(true),
        Body::Result | Body::Note => Err(FrameError::BadSequence("a result or a note from a client")),
    }
}
