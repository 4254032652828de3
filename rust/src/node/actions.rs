//! The values that go into the agent's decider ([`Input`]) and come out of it ([`Action`]).
//!
//! `agent.rs` gathers the inputs and carries the actions out in their order; `state.rs` turns the one into the other.

use std::time::Duration;

use crate::queue::PeerId;
use crate::wire::{Attempt, Body, Control, Event, Message};

/// Something that happened, with all that the decider has to know of it and cannot see for itself.
pub enum Input<'a> {
    /// The agent has answered the client's hello: the workers are to be started.
    Begin,
    /// What the client sent, as read at once, in its order. The buffer is emptied and stays the caller's.
    Client(&'a mut Vec<Event>),
    /// What this worker sent, as read at once, in its order. The buffer is emptied and stays the caller's.
    Worker(PeerId, &'a mut Vec<Event>),
    /// This worker's process could not be started; the reason.
    NotStarted(PeerId, String),
    /// This worker's process has ended, and all that it had sent was handed in before.
    Exited(PeerId, Exit),
    /// The time has gone on by one [`TICK`](crate::node::state::TICK).
    Tick {
        /// The process that started the agent is gone.
        orphaned: bool,
        /// How long the machine was suspended since the agent began. The clock of the other times stood still meanwhile.
        slept: Duration,
        /// Returns which tasks a worker runs, and for how long. Asked only if tasks have a time limit.
        running: &'a dyn Fn(PeerId) -> Vec<(Attempt, Duration)>,
    },
    /// This blob has arrived in full.
    BlobComplete(u64),
    /// This blob could not be stored; why, in words that follow the node's name.
    BlobFailed(u64, String),
    /// The node will soon be gone; the reason, of at most [`MAX_REASON`](crate::wire::MAX_REASON) bytes.
    Drain(String),
    /// The session with the client is over: workers that may have something to write are to be asked to end.
    Dismiss,
    /// All workers are to be killed now.
    KillAll,
}

/// How a worker's process ended, as the supervisor saw it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exit {
    /// The process's number.
    pub pid: u32,
    /// How it ended, in words that follow its name: "exited with status 3". Empty if `unreadable` says why it was ended.
    pub how: String,
    /// The end of its standard error.
    pub stderr_tail: String,
    /// Why the bytes that it sent could not be read, if it was ended for that. A task can write to its worker's socket.
    pub unreadable: Option<String>,
    /// The tasks that its slot table shows as begun, and how long ago each began.
    pub running: Vec<(Attempt, Duration)>,
}

/// Something that is to be done, in the order of the decisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send the client a control frame.
    Reply(Control),
    /// Send the client a result or a note.
    Deliver(Body, Message),
    /// Send a worker a task.
    Assign(PeerId, Message),
    /// Send a worker what a note of its asked the client for.
    Answer(PeerId, Message),
    /// Send a worker the descriptor of this blob.
    Pass(PeerId, u64),
    /// Free this blob. If it has not arrived in full, the rest of it is to be read over.
    DropBlob(u64),
    /// Send a worker a control frame.
    Tell(PeerId, Control),
    /// Start a worker process that has this number from now on.
    Start(PeerId),
    /// Kill a worker's process. [`Input::Exited`] follows.
    Kill(PeerId),
    /// Read from the workers again: fewer bytes than the limit wait for the client's credit.
    ReadWorkers,
    /// End the session with the client, for this reason.
    Stop(String),
}
