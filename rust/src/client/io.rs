//! The lock around the decider, and what carries its actions out: on callers' threads, and on the I/O thread with its ticks
//! and the nodes' sessions.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};
use tracing::{debug, info, warn};

use crate::client::completions::{Completions, Ended};
use crate::client::contents::Contents;
use crate::client::dispatch::{Action, Dispatch};
use crate::client::inbox::Inbox;
use crate::client::node::NodeState;
use crate::client::packages::{Packages, unfit};
use crate::client::reattach::{Offers, OtherConnection};
use crate::client::session::{self, NodeSpec, Sink};
use crate::error::{FrameError, SessionError};
use crate::locks::lock;
use crate::queue::PeerId;
use crate::text;
use crate::timing::Timing;
use crate::wire::{AgentHello, Body, ClientHello, Event, FrameSender, Offer, Outbox};

/// Actions for which the buffer keeps memory: as many as come of the events of one read from a node.
const KEPT_ACTIONS: usize = 4 * 1024;

/// What the callers' threads and the I/O thread share.
#[derive(Debug)]
pub(super) struct Shared {
    pub state: Mutex<State>,
    /// Notified when a node changed its state, or when a cancel that a caller waits for was answered.
    pub changed: Condvar,
    pub completions: Completions,
    pub inbox: Inbox,
    /// The large buffers of tasks.
    pub contents: Contents,
    /// The distributions without which a node is lost as soon as it greets. Set by the pool's owner; empty if none is refused.
    pub required: Mutex<Packages>,
    /// Ends the I/O thread.
    pub close: Notify,
    /// Most bytes of a result.
    pub max_message: usize,
}

/// The decider, and what its actions need. Owned by the lock around it.
#[derive(Debug)]
pub(super) struct State {
    pub dispatch: Dispatch,
    /// What is sent to each node, by its number.
    pub senders: Vec<Arc<FrameSender>>,
    /// Where other connections to each node are offered, by its number; `None` before its first session.
    pub offers: Vec<Option<mpsc::Sender<OtherConnection>>>,
    /// The buffer that actions are passed in; empty but while they are carried out.
    pub actions: Vec<Action>,
    /// The state of each node that was logged last, by its number. Changed when a node's state has changed.
    pub logged: Vec<&'static str>,
}

impl Shared {
    /// Hand an event to the decider, and carry out what it decides. Return the decider's answer.
    pub fn decide<T>(&self, event: impl FnOnce(&mut Dispatch, &mut Vec<Action>) -> T) -> T {
        let mut state = lock(&self.state);
        let State { dispatch, actions, .. } = &mut *state;
        let answer = event(dispatch, actions);
        self.carry_out(state);
        answer
    }

    /// Carry out what was decided: frames are put into outboxes under the lock, which keeps their order; ends of tasks are
    /// handed out after it. Return false if one of these ends will never be taken.
    pub fn carry_out(&self, mut state: MutexGuard<'_, State>) -> bool {
        let ended = self.send(&mut state);
        drop(state);
        ended.is_empty() || self.completions.add(ended)
    }

    /// Carry out all actions but the ends of tasks, which are returned.
    pub fn send(&self, state: &mut State) -> Vec<Ended> {
        let State { dispatch, senders, actions, logged, .. } = state;
        let mut ended = Vec::new();
        for action in actions.drain(..) {
            match action {
                Action::Send(id, task) => put(senders, id, |o| o.message(Body::Task, task)),
                Action::Answer(id, answer) => put(senders, id, |o| o.message(Body::Answer, answer)),
                Action::SendBlob(id, number, bytes) => put(senders, id, |o| o.blob(number, bytes)),
                Action::Forget(id, blobs) => put(senders, id, |o| o.forget(blobs)),
                Action::Tell(id, control) => put(senders, id, |o| o.control(control)),
                Action::Acknowledge(id, result) => put(senders, id, |o| o.acknowledge([result])),
                Action::Goodbye(id, why) => put(senders, id, |o| o.close(why)),
                Action::Wake(id) => {
                    if let Some(sender) = senders.get(id) {
                        sender.flush();
                    }
                }
                Action::Complete(from, message) => ended.push((from, message)),
                Action::Note(from, note) => self.inbox.add_note(from, note),
                Action::Print(id, stream, text) => {
                    if let Some(node) = dispatch.node(id) {
                        self.inbox.add_output(&node.name, stream, text);
                    }
                }
                Action::Notify => {
                    log_states(dispatch, logged);
                    self.changed.notify_all();
                }
            }
        }
        actions.shrink_to(KEPT_ACTIONS);
        ended
    }

    /// Call the decider's tick until the pool is closed; then wait for the nodes' goodbyes.
    pub async fn housekeeping(&self, timing: Timing) {
        let mut tick = tokio::time::interval(timing.tick);
        loop {
            tokio::select! {
                () = self.close.notified() => break,
                _ = tick.tick() => {
                    let stuck = self.completions.take_stuck();
                    self.decide(|dispatch, out| dispatch.tick(stuck, Instant::now(), out));
                    self.contents.sweep(Instant::now(), |content| lock(&self.state).dispatch.has_blob(content));
                }
            }
        }
        // The tasks that run the nodes' sessions end by themselves when their goodbye is sent.
        let until = Instant::now() + timing.client_goodbye;
        let is_leaving = |state: &State| state.dispatch.nodes().any(|node| node.state.is_alive());
        while is_leaving(&lock(&self.state)) && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Put something into a node's outbox. The node's sender is woken by an action of its own.
fn put(senders: &[Arc<FrameSender>], id: PeerId, add: impl FnOnce(&mut Outbox)) {
    if let Some(sender) = senders.get(id) {
        sender.stage(add);
    }
}

/// Log each node whose state is not the one that was logged last.
fn log_states(dispatch: &Dispatch, logged: &mut Vec<&'static str>) {
    if !tracing::enabled!(tracing::Level::INFO) {
        return;
    }
    for (id, node) in dispatch.nodes().enumerate() {
        if logged.len() <= id {
            logged.push(NodeState::Connecting.name());
        }
        let state = node.state.name();
        let Some(last) = logged.get_mut(id).filter(|last| **last != state) else { continue };
        *last = state;
        match &node.state {
            NodeState::Connecting | NodeState::Closed => info!(node = %node.name, state),
            NodeState::Ready => info!(node = %node.name, slots = node.slots, state),
            NodeState::Reconnecting(why) => info!(node = %node.name, %why, state),
            NodeState::Draining(why) => info!(node = %node.name, %why, state),
            NodeState::Lost(why) => warn!(node = %node.name, %why, state),
        }
    }
}

/// Run the session of this number with a node to its end. What it brings is handed to the decider, and so is its end.
pub(super) async fn serve(
    shared: Arc<Shared>,
    (id, session_number): (PeerId, u32),
    spec: NodeSpec,
    sender: Arc<FrameSender>,
    offers: Offers,
) {
    let node = NodeSink { shared: &shared, id, session_number };
    let name = spec.hello.node.clone();
    debug!(node = %name, "session begins");
    let end = session::run(spec, &sender, shared.max_message, &node, offers).await;
    debug!(node = %name, "session has ended");
    drop(node.decide(|dispatch, out| dispatch.lost(id, end, Instant::now(), out)));
}

/// One node's session, as the decider is told of it.
struct NodeSink<'a> {
    shared: &'a Shared,
    id: PeerId,
    /// The session's number.
    session_number: u32,
}

impl NodeSink<'_> {
    /// As [`Shared::decide`].
    ///
    /// # Errors
    /// [`SessionError::GivenUp`] if the node was given up since the session began: it is lost already, and may have another
    /// session, which this one must not touch.
    fn decide<T>(&self, event: impl FnOnce(&mut Dispatch, &mut Vec<Action>) -> T) -> Result<T, SessionError> {
        self.shared.decide(|dispatch, out| {
            let is_current = dispatch.session_number(self.id) == self.session_number;
            if is_current { Ok(event(dispatch, out)) } else { Err(SessionError::GivenUp) }
        })
    }
}

impl Sink for NodeSink<'_> {
    fn greeted(&self, client: &ClientHello, agent: AgentHello) -> Result<Duration, SessionError> {
        let version = || text::line(&agent.version, text::LIMIT);
        debug!(node = %client.node, pid = agent.pid, cores = agent.cores, version = version(), "hello of the agent");
        let packages = agent.packages.clone();
        let interval = self.decide(|dispatch, _| dispatch.greeted(self.id, client, agent, Instant::now()))?;
        // Compared after its packages have become visible: a caller of `Pool::require` finds this node, or this finds what
        // the caller requires.
        unfit(&lock(&self.shared.required), &packages).map_or(Ok(interval), |why| Err(SessionError::Unfit(why)))
    }

    fn received(&self, events: &mut Vec<Event>) -> Result<(), SessionError> {
        if events.is_empty() {
            return Ok(());
        }
        self.decide(|dispatch, out| dispatch.received(self.id, events, Instant::now(), out))?
    }

    fn admit(&self, offer: &Offer) -> Result<bool, FrameError> {
        lock(&self.shared.state).dispatch.admit(self.id, offer)
    }

    fn is_ready(&self) -> bool {
        lock(&self.shared.state).dispatch.node(self.id).is_some_and(|node| node.slots > 0)
    }

    fn round_trip(&self) -> Duration {
        lock(&self.shared.state).dispatch.node(self.id).map_or(Duration::MAX, |node| node.rtt)
    }

    fn beat(&self, uploading: bool, results: u64) -> Result<(), SessionError> {
        self.decide(|dispatch, out| dispatch.beat(self.id, uploading, results, Instant::now(), out))?
    }

    fn away(&self, why: &SessionError) -> Result<(), SessionError> {
        self.decide(|dispatch, out| dispatch.away(self.id, why, Instant::now(), out))
    }

    fn back(&self) -> Result<(), SessionError> {
        self.decide(|dispatch, out| dispatch.back(self.id, Instant::now(), out))
    }

    fn lease(&self) -> (Instant, u64) {
        lock(&self.shared.state).dispatch.lease(self.id, Instant::now())
    }
}
