//! The part of the decider that sends: tasks with the blobs that they name, requests about tasks, and acknowledgements. See
//! `dispatch.rs`.

use std::time::Instant;

use crate::client::dispatch::{Action, Dispatch};
use crate::client::liveness::Request;
use crate::client::node::session;
use crate::queue::PeerId;
use crate::wire::{Attempt, Control, Message};

impl Dispatch {
    /// Send a task to a node that has room for it, and ahead of it the blobs that the node does not have;
    /// [`Dispatch::wake`] must follow.
    pub(super) fn send_task(&mut self, node: PeerId, mut task: Message, out: &mut Vec<Action>) {
        self.activity.payload_sent += task.size() as u64;
        if !task.blobs.is_empty()
            && let Some(record) = self.nodes.get_mut(node)
        {
            let last = &mut self.last_blob;
            let missing = record.blobs.send(task.id, &mut task.blobs, || {
                *last += 1;
                *last
            });
            if !missing.is_empty() {
                self.forget_blobs_of(node, out);
            }
            self.activity.payload_sent += missing.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
            out.extend(missing.into_iter().map(|(number, bytes)| Action::SendBlob(node, number, bytes)));
        }
        self.send(node, Action::Send(node, task), out);
    }

    /// Tell a node to forget blobs that are beyond its budget; [`Dispatch::wake`] must follow.
    fn forget_blobs_of(&mut self, node: PeerId, out: &mut Vec<Action>) {
        let queue = &self.queue;
        let Some(record) = self.nodes.get_mut(node) else { return };
        let forgotten = record.blobs.evict(|task| queue.holds(node, task));
        if !forgotten.is_empty() {
            self.send(node, Action::Forget(node, forgotten), out);
        }
    }

    /// Tell all nodes to forget blobs that are beyond their budgets; [`Dispatch::wake`] must follow.
    pub(super) fn forget_blobs(&mut self, out: &mut Vec<Action>) {
        for node in 0..self.nodes.len() {
            self.forget_blobs_of(node, out);
        }
    }

    /// Return whether a node has this content, or will have it.
    #[must_use]
    pub fn has_blob(&self, content: u64) -> bool {
        self.nodes.iter().any(|record| record.blobs.has(content))
    }

    /// Append an action that puts a frame into a node's outbox; [`Dispatch::wake`] must follow.
    pub(super) fn send(&mut self, node: PeerId, action: Action, out: &mut Vec<Action>) {
        self.wakeups.add(node);
        out.push(action);
    }

    /// Send nodes the tasks that they have room for, and ask loaded nodes for tasks that idle nodes could run;
    /// [`Dispatch::wake`] must follow.
    pub(super) fn assign(&mut self, now: Instant, out: &mut Vec<Action>) {
        while let Some((node, task)) = self.queue.assign() {
            self.send_task(node, task, out);
        }
        if self.nodes.len() > 1 {
            while let Some((node, id)) = self.queue.steal(now) {
                self.ask(node, Request::Recall, id, out);
            }
        }
    }

    /// Ask a node for these tasks back; [`Dispatch::wake`] must follow. The last one is asked for first: as the tasks come
    /// back, each goes to the front of the queue, and so they end up in their old order.
    pub(super) fn recall(&mut self, node: PeerId, tasks: Vec<Attempt>, out: &mut Vec<Action>) {
        for id in tasks.into_iter().rev() {
            self.ask(node, Request::Recall, id, out);
        }
    }

    /// Send the node that holds a task a request about it, at once.
    pub(super) fn ask_about(&mut self, node: PeerId, request: Request, task: u64, out: &mut Vec<Action>) {
        if let Some(id) = self.queue.attempt(task) {
            self.ask(node, request, id, out);
            self.wake(out);
        }
    }

    /// Send a node a request about a task; the node's answer is due from now on. [`Dispatch::wake`] must follow.
    fn ask(&mut self, node: PeerId, request: Request, id: Attempt, out: &mut Vec<Action>) {
        if let Some(session) = session(&mut self.nodes, node) {
            session.life.ask(request, id);
        }
        let control = match request {
            Request::Recall => Control::Recall(id),
            Request::Cancel => Control::Cancel(id),
            Request::Abort => Control::Abort(id),
        };
        self.send(node, Action::Tell(node, control), out);
    }

    /// Acknowledge results; [`Dispatch::wake`] must follow.
    pub(super) fn acknowledge(&mut self, results: impl IntoIterator<Item = (PeerId, Attempt)>, out: &mut Vec<Action>) {
        for (node, id) in results {
            self.send(node, Action::Acknowledge(node, id), out);
        }
    }

    /// Wake the senders of all nodes for which there are frames.
    pub fn wake(&mut self, out: &mut Vec<Action>) {
        out.extend(self.wakeups.take().map(Action::Wake));
    }
}
