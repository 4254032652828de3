//! The nodes of one pool, as Python calls them.
//!
//! All I/O runs on one thread of its own. Callers' threads only append tasks and take what has ended; a task that a node
//! has room for is put into that node's outbox at once, on the caller's thread. Every decision is made in `dispatch.rs`,
//! and carried out in `io.rs`.

use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::net::UnixStream;
use tokio::runtime;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};
use tracing::{debug, info};

use crate::client::completions::Completions;
pub use crate::client::completions::QUEUE_SHIFT;
use crate::client::contents::Contents;
use crate::client::dispatch::Dispatch;
use crate::client::inbox::Inbox;
pub use crate::client::inbox::Lines;
use crate::client::io::{self, Shared, State};
pub use crate::client::node::{Node, NodeState};
use crate::client::packages::Packages;
use crate::client::reattach::OtherConnection;
pub use crate::client::session::NodeSpec;
use crate::error::{NodeError, SshError};
use crate::locks::{lock, wait_timeout_while};
use crate::queue::{Cancelled, PeerId};
use crate::timing::Timing;
use crate::transport::command::Ending;
use crate::transport::connection::Connection;
use crate::transport::ssh::{self, Target};
use crate::wire::{Attempt, Message, Outcome};

/// Pause between two looks whether a node that another connection was offered for is still away.
const OFFER_POLL: Duration = Duration::from_millis(100);

/// How long the processes of commands may take to end when the pool is closed, after their nodes' goodbyes.
const COMMANDS_TIMEOUT: Duration = Duration::from_millis(500);

/// Where a node's SSH server is.
#[derive(Debug)]
pub enum Endpoint {
    /// At the other end of this socket: an embedded server, or a proxy command.
    Socket(StdUnixStream),
    /// At this host name or address and port.
    Address(String, u16),
}

/// The nodes of one pool.
#[derive(Debug)]
pub struct Pool {
    pub(super) shared: Arc<Shared>,
    runtime: runtime::Handle,
    /// The I/O thread, until the pool is closed.
    thread: Mutex<Option<JoinHandle<()>>>,
    /// The process that has the I/O thread: a forked child has not.
    owner: u32,
    /// Processes of commands that lead to machines, and that are being ended.
    pub ending: Ending,
}

impl Pool {
    /// Return a pool without nodes. A task runs at most `attempts` times; results over `max_message` bytes are refused.
    ///
    /// # Errors
    /// When the I/O thread cannot be started.
    pub fn new(attempts: u16, max_message: usize) -> std::io::Result<Self> {
        Self::with_timing(attempts, max_message, Timing::default())
    }

    /// As [`Pool::new`], with other bounds on what nodes answer.
    ///
    /// # Errors
    /// As [`Pool::new`].
    pub fn with_timing(attempts: u16, max_message: usize, timing: Timing) -> std::io::Result<Self> {
        let dispatch = Dispatch::new(attempts, timing);
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                dispatch,
                senders: Vec::new(),
                offers: Vec::new(),
                actions: Vec::new(),
                logged: Vec::new(),
            }),
            changed: Condvar::new(),
            completions: Completions::default(),
            inbox: Inbox::default(),
            contents: Contents::new()?,
            required: Mutex::default(),
            close: Notify::new(),
            max_message,
        });
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("skyward-io".to_owned()).spawn(move || {
            runtime.block_on(for_thread.housekeeping(timing));
            runtime.shutdown_timeout(timing.runtime_shutdown);
        })?;
        Ok(Self {
            shared,
            runtime: handle,
            thread: Mutex::new(Some(thread)),
            owner: std::process::id(),
            ending: Ending::default(),
        })
    }

    /// Add a node that is to be connected to, and return its number. [`Pool::nodes`] has its state. A node may be added at
    /// any time, also after all others were lost: queued tasks then wait for this one. `may_return`: when it is lost, it will be
    /// started anew by [`Pool::start_node`], or given up by [`Pool::give_up`].
    pub fn add_node(&self, name: String, may_return: bool) -> PeerId {
        let mut state = lock(&self.shared.state);
        state.senders.push(Arc::default());
        state.offers.push(None);
        state.dispatch.add_node(name, may_return, Instant::now())
    }

    /// Note that a lost node will not come back. Tasks that waited for it alone fail.
    pub fn give_up(&self, id: PeerId) {
        self.shared.decide(|dispatch, out| dispatch.give_up(id, Instant::now(), out));
    }

    /// Set how many further nodes are on their way. Lower it after [`Pool::add_node`], or as soon as a start is given up. At
    /// 0, tasks that no node can run fail with [`Outcome::NodeLost`].
    pub fn expect(&self, count: usize) {
        self.shared.decide(|dispatch, out| dispatch.expect(count, Instant::now(), out));
    }

    /// Lose each node, as soon as it greets from now on, that does not have these distributions in these versions.
    pub fn require(&self, packages: Packages) {
        *lock(&self.shared.required) = packages;
    }

    /// Open a connection. Waits for it, within the target's bound.
    ///
    /// # Errors
    /// [`NodeError::Ssh`], and [`NodeError::Closed`] if the pool is closed meanwhile.
    pub fn connect(&self, endpoint: Endpoint, target: Target) -> Result<Connection, NodeError> {
        self.wait(async move {
            debug!(?endpoint, user = target.user, "connecting");
            let connected = match endpoint {
                Endpoint::Socket(socket) => {
                    socket.set_nonblocking(true).map_err(SshError::Io)?;
                    let socket = UnixStream::from_std(socket).map_err(SshError::Io)?;
                    ssh::connect(socket, &target).await
                }
                Endpoint::Address(host, port) => ssh::connect_tcp(&host, port, &target).await,
            };
            let connection = connected.inspect_err(|why| info!(%why, "not connected"))?;
            debug!(user = target.user, "connected, and authenticated");
            Ok(Connection::Ssh(Box::new(connection)))
        })
    }

    /// Do `work` on the I/O thread, and wait for it. It has a bound of its own.
    pub(super) fn wait<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, NodeError>> + Send + 'static,
    ) -> Result<T, NodeError> {
        let (done, waiting) = std::sync::mpsc::sync_channel(1);
        self.runtime.spawn(async move { drop(done.send(work.await)) });
        // A runtime that has ended drops the work, and `done` with it.
        waiting.recv().unwrap_or(Err(NodeError::Closed))
    }

    /// Do `work` on the I/O thread. It has a bound of its own.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) -> tokio::task::JoinHandle<()> {
        self.runtime.spawn(work)
    }

    /// Begin a session with a node that was added, or that is lost and comes back.
    pub fn start_node(&self, id: PeerId, spec: NodeSpec) {
        let mut state = lock(&self.shared.state);
        if !state.dispatch.begin(id, Instant::now()) {
            return;
        }
        let State { senders, offers, .. } = &mut *state;
        let (Some(sender), Some(offers)) = (senders.get_mut(id), offers.get_mut(id)) else { return };
        *sender = Arc::new(sender.successor());
        let sender = Arc::clone(sender);
        let (offer, offered) = mpsc::channel(1);
        *offers = Some(offer);
        let session = (id, state.dispatch.session_number(id));
        drop(state);
        self.shared.changed.notify_all();
        self.runtime.spawn(io::serve(Arc::clone(&self.shared), session, spec, sender, offered));
    }

    /// Go on with the session of a node that is reconnecting, over this connection. Waits until it does, or cannot; returns at
    /// once if the node is in another state.
    ///
    /// # Errors
    /// [`NodeError`] if the session does not go on over this connection: another one may do.
    pub fn resume_node(&self, id: PeerId, connection: Arc<Connection>) -> Result<(), NodeError> {
        let is_away = |state: &State| {
            state.dispatch.node(id).is_some_and(|node| matches!(node.state, NodeState::Reconnecting(_)))
        };
        let offer = lock(&self.shared.state).offers.get(id).cloned().flatten();
        let (done, waiting) = std::sync::mpsc::sync_channel(1);
        let mut other = offer.map(|offer| (offer, OtherConnection { connection, done }));
        while is_away(&lock(&self.shared.state)) {
            // The session may still be busy with the connection that was offered before.
            if let Some((offer, connection)) = other.take() {
                match offer.try_send(connection) {
                    Err(TrySendError::Full(connection)) => other = Some((offer, connection)),
                    Err(TrySendError::Closed(_)) => return Ok(()),
                    Ok(()) => {}
                }
            }
            match waiting.recv_timeout(OFFER_POLL) {
                Ok(end) => return end,
                Err(RecvTimeoutError::Timeout) => {}
                // The session has ended, or the pool is closed, and the node's state may stay as it is.
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
        Ok(())
    }

    /// Mark a node as lost, for this reason, with which no session was begun, or whose machine is gone for good.
    pub fn fail_node(&self, id: PeerId, why: String) {
        if let Some(offers) = lock(&self.shared.state).offers.get_mut(id) {
            *offers = None;
        }
        let end = Err(NodeError::Other(why));
        self.shared.decide(|dispatch, out| dispatch.lost(id, end, Instant::now(), out));
    }

    /// Append a task, or send it to this one node. It ends with exactly one message out of [`Pool::finished`] of its
    /// completion queue, which is open. Return false if [`Pool::finished`] has already returned that no further task ends.
    /// Never waits.
    pub fn submit(&self, task: Message, node: Option<PeerId>) -> bool {
        let caller = std::thread::current().id();
        let mut state = lock(&self.shared.state);
        let State { dispatch, actions, .. } = &mut *state;
        dispatch.submit(task, node, caller, Instant::now(), actions);
        self.shared.carry_out(state)
    }

    /// Return the contents of this pool's tasks, for the large buffers of a task that is to be submitted.
    #[must_use]
    pub fn contents(&self) -> &Contents {
        &self.shared.contents
    }

    /// Drop a task that has not started, wherever it waits. Return true if it was dropped: it then has no message out of
    /// [`Pool::finished`]. Waits for the answer of the node that holds the task, at most for `bound`; after that the task
    /// may still end as cancelled.
    pub fn cancel(&self, task: u64, bound: Duration) -> bool {
        let wait = !bound.is_zero();
        match self.shared.decide(|dispatch, out| dispatch.cancel(task, wait, out)) {
            Cancelled::Dropped => true,
            Cancelled::Held(_) if wait => {
                let state = lock(&self.shared.state);
                let is_pending = |s: &mut State| s.dispatch.is_cancel_pending(task);
                wait_timeout_while(&self.shared.changed, state, bound, is_pending).dispatch.cancel_answer(task)
            }
            Cancelled::Held(_) | Cancelled::Unknown => false,
        }
    }

    /// Drop a task, or end it if it is running. Its end comes out of [`Pool::finished`], however it ended.
    pub fn abort(&self, task: u64) {
        self.shared.decide(|dispatch, out| dispatch.abort(task, out));
    }

    /// Return what tasks wrote since the last call, waiting up to `bound` for it; `None` once the pool is closed.
    #[must_use]
    pub fn output(&self, bound: Duration) -> Option<Vec<Lines>> {
        self.shared.inbox.take_output(bound)
    }

    /// Return what tasks told this process since the last call, each note with its sender's number, waiting up to `bound` for one;
    /// `None` once the pool is closed. Each note is to be answered with [`Pool::answer_note`].
    #[must_use]
    pub fn notes(&self, bound: Duration) -> Option<Vec<(u64, Message)>> {
        self.shared.inbox.take_notes(bound)
    }

    /// As [`Pool::notes`], for notes that ask for something: [`Pool::answer_request`] sends it, [`Pool::answer_note`] why not.
    #[must_use]
    pub fn requests(&self, bound: Duration) -> Option<Vec<(u64, Message)>> {
        self.shared.inbox.take_requests(bound)
    }

    /// Send the sender of a note what it asked for, at most [`MAX_NOTE`](crate::wire::MAX_NOTE) bytes.
    pub fn answer_request(&self, sender: u64, note: u64, content: Bytes) {
        self.shared.decide(|dispatch, out| dispatch.answer_request(sender, note, content, out));
    }

    /// Answer the sender of a note: it was taken, or `error` is why it was not. A node that is lost hears no answer.
    pub fn answer_note(&self, sender: u64, note: u64, error: Bytes) {
        self.shared.decide(|dispatch, out| dispatch.answer_note(sender, note, error, out));
    }

    /// Append the end of a task that was never submitted, with nothing in it. Return false as [`Pool::submit`] does.
    pub fn end(&self, id: Attempt) -> bool {
        let end = Message { id, code: Outcome::Returned as u8, ..Message::default() };
        self.shared.completions.add([(None, end)])
    }

    /// Open a completion queue and return its number; queue 0 is open from the start. The numbers of a queue's tasks begin
    /// with `(number << QUEUE_SHIFT) + 1`.
    #[must_use]
    pub fn open_queue(&self) -> u64 {
        self.shared.completions.open()
    }

    /// Forget a completion queue all of whose tasks have ended.
    pub fn close_queue(&self, queue: u64) {
        self.shared.completions.close(queue);
        lock(&self.shared.state).dispatch.close_queue(queue);
    }

    /// Wake the thread that waits for a queue's tasks: it returns, with none if none has ended.
    pub fn wake(&self, queue: u64) {
        self.shared.completions.wake(queue);
    }

    /// Return the tasks of a completion queue that ended since the last call, waiting up to `bound` for one; `None` once the
    /// pool is closed.
    #[must_use]
    pub fn finished(&self, queue: u64, bound: Duration) -> Option<Vec<Message>> {
        self.shared.decide(Dispatch::wake);
        let ended = self.shared.completions.take(queue, bound)?;
        if !ended.is_empty() {
            let caller = std::thread::current().id();
            let results = ended.iter().filter_map(|(from, message)| Some(((*from)?, message.id)));
            self.shared.decide(|dispatch, out| dispatch.taken(queue, caller, results, Instant::now(), out));
        }
        Some(ended.into_iter().map(|(_, message)| message).collect())
    }

    /// Return whether this process was forked from the one that opened the pool: it has no I/O thread, and any lock may be
    /// held for ever.
    #[must_use]
    pub fn is_forked(&self) -> bool {
        self.owner != std::process::id()
    }

    /// Leave all nodes. Tasks that have not ended are cancelled. Waits at most a few seconds; idempotent.
    pub fn close(&self) {
        if self.is_forked() {
            return;
        }
        let mut state = lock(&self.shared.state);
        let State { dispatch, actions, .. } = &mut *state;
        dispatch.close(Instant::now(), actions);
        let ended = self.shared.send(&mut state);
        // Under the lock: a second thread that closes must not end the queues before these tasks are in them.
        self.shared.completions.add(ended);
        drop(state);
        self.shared.close.notify_one();
        if let Some(thread) = lock(&self.thread).take() {
            drop(thread.join());
        }
        self.ending.finish(COMMANDS_TIMEOUT);
        self.shared.completions.finish();
        self.shared.inbox.close();
        self.shared.contents.clear();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close();
    }
}
