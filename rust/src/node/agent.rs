//! The agent: one process per pool and node. It runs no user code, so nothing that user code does can stop its heartbeat.
//!
//! Here it tells the decider in `state.rs` what happened, and carries out what that decides; `session.rs` waits for the client
//! and the clock. It ends with everything that it started when the client says goodbye or has let its lease run out, and
//! where it has no socket also when the connection ends.

use std::io;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tracing::{debug, info, warn};

use crate::error::FrameError;
use crate::locks::lock;
use crate::node::actions::{Action, Input};
use crate::node::blob_files::{BlobFiles, Progress};
pub use crate::node::greeting::AgentSpec;
use crate::node::greeting::cores;
use crate::node::lease::BootTime;
use crate::node::state::{Settings, State};
use crate::node::supervisor::{EXIT_TIMEOUT, Observer, Supervisor};
use crate::queue::PeerId;
use crate::timing::Timing;
use crate::wire::{ClientHello, Event, FrameSender, MAX_REASON, Offer, WorkerHello};

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

pub(super) struct Agent {
    /// When its session began, by either clock.
    begun: Instant,
    booted: BootTime,
    /// To the client.
    link: Arc<FrameSender>,
    inner: Mutex<Inner>,
    /// Notified by [`Action::ReadWorkers`].
    backlog_drained: Notify,
    /// Notified by [`Action::Stop`].
    stopped: Notify,
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
pub(super) struct Serving;

impl Serving {
    pub fn new(agent: &Arc<Agent>) -> Self {
        *lock(&SERVING) = Arc::downgrade(agent);
        Self
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        *lock(&SERVING) = Weak::new();
    }
}

impl Agent {
    pub(super) fn new(client: ClientHello, spec: AgentSpec, link: Arc<FrameSender>) -> Self {
        let cores = cores(spec.cores);
        let tasks = client.worker.concurrency.unwrap_or(cores).max(1);
        let (processes, slots) = if client.worker.processes { (tasks, 1) } else { (1, tasks) };
        let settings = Settings {
            node: client.node.clone(),
            processes,
            slots,
            cores,
            task_timeout: client.worker.task_timeout_ms.map(Duration::from_millis),
            generation: client.generation,
            unwind: client.worker.unwind,
        };
        let begun = Instant::now();
        let state = State::new(settings, begun, Duration::from_millis(client.lease_ms));
        let greeting = WorkerHello {
            node: client.node,
            number: 0,
            slots,
            lease_ms: client.lease_ms,
            generation: client.generation,
            directory: spec.directory.unwrap_or_default(),
            work: client.worker,
        };
        let supervisor = Supervisor::new(spec.worker, greeting, (cores / tasks).max(1), Arc::clone(&link));
        let inner =
            Mutex::new(Inner { state, supervisor, blobs: BlobFiles::default(), actions: Vec::new(), stop: None });
        Self { begun, booted: BootTime::now(), link, inner, backlog_drained: Notify::new(), stopped: Notify::new() }
    }

    /// Hand the decider what happened, and carry out what it decides.
    pub(super) fn handle(self: &Arc<Self>, input: Input<'_>) {
        let mut inner = lock(&self.inner);
        let Inner { state, actions, .. } = &mut *inner;
        state.handle(input, Instant::now(), actions);
        self.carry_out(&mut inner);
    }

    /// Take what the client sent, and empty the buffer: chunks of blobs go to their files, everything else to the decider.
    ///
    /// # Errors
    /// [`FrameError`] if the chunks contradict one another.
    pub(super) fn on_client(self: &Arc<Self>, events: &mut Vec<Event>) -> Result<(), FrameError> {
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

    /// Return why the session is to end, once.
    pub(super) fn take_stop(&self) -> Option<String> {
        lock(&self.inner).stop.take()
    }

    /// Wait until [`Agent::take_stop`] may have a reason.
    pub(super) async fn stopped(&self) {
        self.stopped.notified().await;
    }

    /// Return this agent's time in microseconds, more than 0: what its heartbeats tell the client.
    pub(super) fn clock(&self) -> u64 {
        u64::try_from(BootTime::now().since(self.booted).as_micros()).unwrap_or(u64::MAX).max(1)
    }

    /// `orphaned`: the process that started the agent is gone, and the agent is to end with it.
    pub(super) fn on_tick(self: &Arc<Self>, orphaned: bool) {
        let mut inner = lock(&self.inner);
        let Inner { state, supervisor, actions, .. } = &mut *inner;
        supervisor.adopted.on_tick();
        let running = |worker| supervisor.running(worker);
        let slept = BootTime::now().since(self.booted).saturating_sub(self.begun.elapsed());
        state.handle(Input::Tick { orphaned, slept, running: &running }, Instant::now(), actions);
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
                    Action::Answer(worker, answer) => supervisor.answer(worker, answer),
                    Action::Tell(worker, control) => supervisor.tell(worker, control),
                    Action::Pass(worker, blob) => {
                        if let Some(file) = blobs.get(blob) {
                            supervisor.pass(worker, blob, file);
                        }
                    }
                    Action::DropBlob(blob) => blobs.forget(blob),
                    Action::Start(worker) => {
                        let lease = state.lease_left(Instant::now());
                        let started = supervisor.start(worker, lease, state.generation(), Arc::clone(self));
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
    pub(super) async fn dismiss_workers(self: &Arc<Self>) {
        self.handle(Input::Dismiss);
        self.wait_for_workers(Timing::DEFAULT.worker_exit).await;
    }

    /// Kill all workers and what they started; no new ones are started from now on. Waits for them, so that none is left
    /// as a zombie and what they wrote has been read.
    pub(super) async fn kill_workers(self: &Arc<Self>) {
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
