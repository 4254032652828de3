//! The agent: one process per pool and node. It runs no user code, so nothing that user code does can stop its heartbeat.
//!
//! Here it greets the client, waits for the client, the workers and the clock, tells the decider in `state.rs` what
//! happened, and carries out what that decides. It ends with everything that it started when the client says goodbye, is
//! gone, or has let its lease run out.

use std::io;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use rustix::process::Pid;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tracing::{debug, info, warn};

use crate::error::{AgentError, FrameError, SessionError};
use crate::locks::lock;
use crate::node::actions::{Action, Input};
use crate::node::blob_files::{BlobFiles, Progress};
pub use crate::node::greeting::AgentSpec;
use crate::node::greeting::{answer, cores, differences, refusal};
use crate::node::limits::raise_open_files;
use crate::node::process_group::{adopt_orphans, end_adopted};
use crate::node::state::{Settings, State, TICK};
use crate::node::stripes::{self, StripeListener};
use crate::node::supervisor::{EXIT_TIMEOUT, Observer, Supervisor};
use crate::queue::PeerId;
use crate::timing::{HEARTBEAT, LEAST_MESSAGE, Timing};
use crate::wire::{
    AgentHello, Body, ClientHello, Control, Event, EventReader, FrameSender, MAX_REASON, Offer, WorkerHello, hello,
    read_hello,
};

/// How long the client's hello is awaited.
const GREETING_TIMEOUT: Duration = Timing::DEFAULT.hello;
/// How long the goodbye to the client may take, until it has read it and closed its end.
const GOODBYE_TIMEOUT: Duration = Timing::DEFAULT.agent_goodbye;
/// Pause between two looks whether all workers have ended.
const EXIT_POLL: Duration = Duration::from_millis(1);

/// The agent that this process is, while it serves its client.
static SERVING: Mutex<Weak<Agent>> = Mutex::new(Weak::new());

/// The decider, and the processes that it decides about.
struct Inner {
    state: State,
    supervisor: Supervisor,
    blobs: BlobFiles,
    /// The actions that were decided and are carried out before the lock is released. Empty between two inputs; a field so
    /// that its memory is reused.
    actions: Vec<Action>,
    /// Why the session is to end. Set once, by [`Action::Stop`].
    stop: Option<String>,
}

struct Agent {
    /// To the client.
    link: Arc<FrameSender>,
    inner: Mutex<Inner>,
    /// Notified by [`Action::ReadWorkers`].
    backlog_drained: Notify,
    /// Notified by [`Action::Stop`].
    stopped: Notify,
}

/// The stream from the client, and the task that writes the one to it.
struct Session<R> {
    reader: EventReader<R>,
    writer: JoinHandle<Result<(), SessionError>>,
    link: Arc<FrameSender>,
    stripes: Option<StripeListener>,
}

/// Serve one client on a stream until it is done with us, then end everything that was started. `stripes` takes further
/// streams of the client.
///
/// # Errors
/// [`AgentError::Refused`] if the client's Python does not fit; [`AgentError::Session`] if it was lost.
pub async fn run<R, W>(from: R, to: W, spec: AgentSpec, stripes: Option<StripeListener>) -> Result<(), AgentError>
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
{
    raise_open_files();
    adopt_orphans();
    let link = Arc::new(FrameSender::default());
    let writer = tokio::spawn({
        let link = Arc::clone(&link);
        // No bound on a write: a client that takes nothing is waited for until its lease ends.
        async move { link.run(to, None).await }
    });
    let reader = EventReader::of_session(from, usize::MAX, Arc::clone(&link));
    let mut session = Session { reader, writer, link, stripes };
    let mut events = Vec::new();
    let client = session.greet(&spec, &mut events).await?;
    let agent = Arc::new(Agent::new(client, spec, Arc::clone(&session.link)));
    agent.handle(Input::Begin);
    let _serving = Serving::new(&agent);
    let ended = session.serve(&agent, events).await;
    agent.kill_workers().await;
    ended
}

impl<R: AsyncRead + Unpin> Session<R> {
    /// Wait for the client's hello and answer it. What came with it is in `events` then.
    async fn greet(&mut self, spec: &AgentSpec, events: &mut Vec<Event>) -> Result<ClientHello, AgentError> {
        let greeting = tokio::time::timeout(GREETING_TIMEOUT, self.reader.greeting(events)).await;
        let body = greeting.map_err(|_| SessionError::NotReady(GREETING_TIMEOUT.as_secs()))??;
        let client: ClientHello = read_hello(&body)?;
        let max_message = client.worker.max_payload.max(LEAST_MESSAGE);
        self.reader.set_max_message(max_message);
        let differences = differences(&client, spec);
        if let Some(why) = refusal(&client, spec, &differences) {
            self.say_goodbye(&why).await;
            return Err(AgentError::Refused(why));
        }
        let stripes = self.stripes.as_mut().and_then(|stripes| stripes.greeted(&spec.epoch, max_message));
        let answer = hello(&AgentHello { stripes, ..answer(spec, differences) })?;
        self.link.send(|o| o.control(answer));
        info!(node = %client.node, lease_ms = client.lease_ms, "hello of the client");
        Ok(client)
    }

    /// Wait for the client and the clock until the session is to end, and end the workers in order if nobody is lost.
    async fn serve(&mut self, agent: &Arc<Agent>, mut events: Vec<Event>) -> Result<(), AgentError> {
        let parent = rustix::process::getppid();
        let mut tick = tokio::time::interval(TICK);
        // Silence is counted in ticks: after a stop of our own, one of them says enough.
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        let for_stripes = Arc::clone(agent);
        let stripes =
            stripes::serve(self.stripes.take(), Arc::clone(&self.link), move |events| for_stripes.on_client(events));
        let mut stripes = std::pin::pin!(stripes);
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
            let stop = lock(&agent.inner).stop.take();
            if let Some(why) = stop {
                info!(%why, "goodbye");
                agent.dismiss_workers().await;
                agent.kill_workers().await;
                self.say_goodbye(&why).await;
                return Ok(());
            }
            tokio::select! {
                read = self.reader.read_admitted(&mut events, admit_task) => if let Err(e) = read {
                    warn!(why = %e, "the client is lost");
                    // The client learns the reason if it can still read.
                    self.say_goodbye(&e.to_string()).await;
                    return Err(e.into());
                },
                sent = &mut self.writer => return match sent {
                    Ok(Err(e)) => Err(e.into()),
                    _ => Ok(()),
                },
                broken = &mut stripes => handled = Err(broken),
                () = agent.stopped.notified() => {}
                _ = tick.tick() => agent.on_tick(parent),
                // The client's own may wait behind what it uploads: we live all the same.
                _ = heartbeat.tick() => self.link.send(|o| o.control(Control::Heartbeat { nonce: 0, lease_ms: 0 })),
            }
        }
    }

    /// Send the goodbye, and wait until the client has read it: the client closes its end then.
    async fn say_goodbye(&mut self, why: &str) {
        self.link.send(|o| o.close(why));
        let both = async {
            drop((&mut self.writer).await);
            while self.reader.read_admitted(&mut Vec::new(), |_| Ok(false)).await.is_ok() {}
        };
        drop(tokio::time::timeout(GOODBYE_TIMEOUT, both).await);
    }
}

/// Send the client of this process's agent the notice that the node will soon be gone, and why (at most [`MAX_REASON`]
/// bytes of it): tasks that do not run yet go elsewhere. Only the first call counts. Return false if no client is served.
#[must_use]
pub fn drain(reason: &str) -> bool {
    let Some(agent) = lock(&SERVING).upgrade() else { return false };
    let mut reason = reason.to_owned();
    while reason.len() > MAX_REASON {
        reason.pop();
    }
    info!(%reason, "drain");
    agent.handle(Input::Drain(reason));
    true
}

/// Lets [`drain`] find the agent for as long as this lives.
struct Serving;

impl Serving {
    fn new(agent: &Arc<Agent>) -> Self {
        *lock(&SERVING) = Arc::downgrade(agent);
        Self
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        *lock(&SERVING) = Weak::new();
    }
}

/// Return whether a client's message is to be stored, now that its first chunk is here.
fn admit_task(offer: &Offer) -> Result<bool, FrameError> {
    if offer.body == Body::Task { Ok(true) } else { Err(FrameError::BadSequence("a result or a note from a client")) }
}

impl Agent {
    fn new(client: ClientHello, spec: AgentSpec, link: Arc<FrameSender>) -> Self {
        let cores = cores();
        let tasks = client.worker.concurrency.unwrap_or(cores).max(1);
        let (processes, slots) = if client.worker.processes { (tasks, 1) } else { (1, tasks) };
        let settings = Settings {
            node: client.node.clone(),
            processes,
            slots,
            cores,
            task_timeout: client.worker.task_timeout_ms.map(Duration::from_millis),
            unwind: client.worker.unwind,
        };
        let state = State::new(settings, Instant::now() + Duration::from_millis(client.lease_ms));
        let greeting = WorkerHello { node: client.node, slots, lease_ms: client.lease_ms, work: client.worker };
        let supervisor = Supervisor::new(spec.worker, greeting, (cores / tasks).max(1), Arc::clone(&link));
        let inner =
            Mutex::new(Inner { state, supervisor, blobs: BlobFiles::default(), actions: Vec::new(), stop: None });
        Self { link, inner, backlog_drained: Notify::new(), stopped: Notify::new() }
    }

    /// Hand the decider what happened, and carry out what it decides.
    fn handle(self: &Arc<Self>, input: Input<'_>) {
        let mut inner = lock(&self.inner);
        let Inner { state, actions, .. } = &mut *inner;
        state.handle(input, Instant::now(), actions);
        self.carry_out(&mut inner);
    }

    /// Take what the client sent, and empty the buffer: chunks of blobs go to their files, everything else to the decider.
    ///
    /// # Errors
    /// [`FrameError`] if the chunks contradict one another.
    fn on_client(self: &Arc<Self>, events: &mut Vec<Event>) -> Result<(), FrameError> {
        if !events.iter().any(|event| matches!(event, Event::Chunk(_))) {
            self.handle(Input::Client(events));
            return Ok(());
        }
        let mut others = Vec::new();
        for event in events.drain(..) {
            let Event::Chunk(chunk) = event else {
                others.push(event);
                continue;
            };
            // First: one of these may tell to forget the blob.
            if !others.is_empty() {
                self.handle(Input::Client(&mut others));
            }
            let progress = lock(&self.inner).blobs.take(&chunk)?;
            match progress {
                Progress::Partly => {}
                Progress::Complete => self.handle(Input::BlobComplete(chunk.number)),
                Progress::Failed(why) => {
                    warn!(blob = chunk.number, %why, "a blob cannot be stored");
                    self.handle(Input::BlobFailed(chunk.number, why));
                }
            }
        }
        if !others.is_empty() {
            self.handle(Input::Client(&mut others));
        }
        Ok(())
    }

    fn on_tick(self: &Arc<Self>, parent: Option<Pid>) {
        end_adopted(false);
        let orphaned = rustix::process::getppid() != parent;
        let mut inner = lock(&self.inner);
        let Inner { state, supervisor, actions, .. } = &mut *inner;
        let running = |worker| supervisor.running(worker);
        state.handle(Input::Tick { orphaned, running: &running }, Instant::now(), actions);
        self.carry_out(&mut inner);
    }

    fn carry_out(self: &Arc<Self>, inner: &mut Inner) {
        let Inner { state, supervisor, blobs, actions, stop } = inner;
        let mut failed = Vec::new();
        let mut replied = false;
        while !actions.is_empty() {
            for action in actions.drain(..) {
                if replied && matches!(action, Action::Start(_) | Action::Kill(_)) {
                    // These take milliseconds, and what was decided before is not to wait for them.
                    self.link.flush();
                    replied = false;
                }
                replied |= matches!(action, Action::Reply(_) | Action::Deliver(..));
                match action {
                    Action::Reply(control) => self.link.stage(|o| o.control(control)),
                    Action::Deliver(body, message) => self.link.stage(|o| o.message(body, message)),
                    Action::Assign(worker, task) => supervisor.assign(worker, task),
                    Action::Tell(worker, control) => supervisor.tell(worker, control),
                    Action::Pass(worker, blob) => {
                        if let Some(file) = blobs.get(blob) {
                            supervisor.pass(worker, blob, file);
                        }
                    }
                    Action::DropBlob(blob) => blobs.forget(blob),
                    Action::Start(worker) => {
                        let started = supervisor.start(worker, Arc::clone(self));
                        failed.extend(started.err().map(|why| (worker, why.to_string())));
                    }
                    Action::Kill(worker) => {
                        debug!(worker, "worker is ended");
                        supervisor.kill(worker);
                    }
                    Action::ReadWorkers => self.backlog_drained.notify_waiters(),
                    Action::Stop(why) => {
                        *stop = Some(why);
                        self.stopped.notify_one();
                    }
                }
            }
            for (worker, why) in failed.drain(..) {
                state.handle(Input::NotStarted(worker, why), Instant::now(), actions);
            }
        }
        if replied {
            self.link.flush();
        }
    }

    /// Ask the workers to end in order, and wait for them, at most [`Timing::worker_exit`].
    async fn dismiss_workers(self: &Arc<Self>) {
        self.handle(Input::Dismiss);
        self.wait_for_workers(Timing::DEFAULT.worker_exit).await;
    }

    /// Kill all workers and what they started; no new ones are started from now on. Waits for them, so that none is left
    /// as a zombie and what they wrote has been read.
    async fn kill_workers(self: &Arc<Self>) {
        self.handle(Input::KillAll);
        self.wait_for_workers(EXIT_TIMEOUT).await;
        // What could not be ended until now does not have to be waited for.
        lock(&self.inner).supervisor.kill_groups();
    }

    async fn wait_for_workers(&self, bound: Duration) {
        let gone = async {
            while !lock(&self.inner).supervisor.is_empty() {
                tokio::time::sleep(EXIT_POLL).await;
            }
        };
        drop(tokio::time::timeout(bound, gone).await);
    }
}

impl Observer for Agent {
    fn admit(&self, worker: PeerId, offer: &Offer) -> Result<bool, FrameError> {
        lock(&self.inner).state.admit(worker, offer)
    }

    fn on_events(self: &Arc<Self>, worker: PeerId, events: &mut Vec<Event>) {
        self.handle(Input::Worker(worker, events));
    }

    fn is_full(&self) -> bool {
        lock(&self.inner).state.is_full()
    }

    fn backlog_drained(&self) -> &Notify {
        &self.backlog_drained
    }

    fn on_exit(self: &Arc<Self>, worker: PeerId, status: io::Result<ExitStatus>, unreadable: Option<&FrameError>) {
        let mut inner = lock(&self.inner);
        let Inner { state, supervisor, actions, .. } = &mut *inner;
        let exit = supervisor.remove(worker, !state.is_over(), status, unreadable);
        state.handle(Input::Exited(worker, exit), Instant::now(), actions);
        self.carry_out(&mut inner);
    }
}
