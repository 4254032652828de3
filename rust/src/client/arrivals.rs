//! The part of the decider that nodes drive: what they send, and whether they do in time what they were asked to. See
//! `dispatch.rs`.

use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::client::dispatch::{Action, Dispatch};
use crate::client::liveness::{Liveness, Request, check_outcome};
use crate::client::node::{NodeState, Session, note_sender, session};
use crate::error::{FrameError, SessionError};
use crate::queue::PeerId;
use crate::text;
use crate::timing::CREDIT;
use crate::wire::{Attempt, Body, Control, Event, Message, Offer, Outcome};

impl Dispatch {
    /// Return whether a message of a node is to be stored, now that its first chunk is here: a result is, if the node holds
    /// its task.
    ///
    /// # Errors
    /// [`FrameError`] if the node may not send the message: the session ends.
    pub fn admit(&self, from: PeerId, offer: &Offer) -> Result<bool, FrameError> {
        let len = offer.unfinished.saturating_add(offer.size);
        match offer.body {
            Body::Task | Body::Answer => Err(FrameError::BadSequence("a task or an answer from a node")),
            Body::Note => {
                let record = self.nodes.get(from);
                record.map_or(Ok(()), |record| record.notes.check(offer.unfinished, offer.size)).map(|()| true)
            }
            // A late or doubled result is counted and acknowledged when all of it has arrived.
            Body::Result if !self.queue.holds(from, offer.id) => Ok(false),
            Body::Result if offer.unfinished > 0 && len > CREDIT => {
                Err(FrameError::TooLong { what: "unfinished results", len, cap: CREDIT })
            }
            Body::Result => Ok(true),
        }
    }

    /// Take what a node sent, in the order in which it was sent. The events before one that ends the session count, those
    /// after it are dropped.
    ///
    /// # Errors
    /// [`SessionError`] if the node ended the session or sent what it may not send: [`Dispatch::lost`] must follow.
    pub fn received(
        &mut self,
        from: PeerId,
        events: &mut Vec<Event>,
        now: Instant,
        out: &mut Vec<Action>,
    ) -> Result<(), SessionError> {
        let mut notify = !self.pending_cancels.is_empty();
        let mut end = Ok(());
        for event in events.drain(..) {
            let changes_node = matches!(event, Event::Control(Control::Ready { .. } | Control::Drain(_)));
            end = self.on_event(from, event, now, out);
            if end.is_err() {
                break;
            }
            notify |= changes_node;
        }
        self.complete_cancelled(out);
        self.assign(now, out);
        self.wake(out);
        if notify {
            out.push(Action::Notify);
        }
        debug_assert!(self.is_consistent());
        end
    }

    fn on_event(
        &mut self,
        from: PeerId,
        event: Event,
        now: Instant,
        out: &mut Vec<Action>,
    ) -> Result<(), SessionError> {
        match event {
            Event::Message(Body::Result, result) => self.on_result(from, result, now, out)?,
            Event::NoMemory(Body::Result, id, size) => self.on_lost_result(from, id, size, now, out),
            Event::Skipped(Body::Result, id) => self.on_stale(from, id, out),
            Event::Message(Body::Note, note) => {
                if let Some(record) = self.nodes.get_mut(from) {
                    record.notes.take(&note)?;
                    out.push(Action::Note(note_sender(from, record.session_number), note));
                }
            }
            Event::NoMemory(Body::Note, note, size) => {
                let error = Bytes::from(format!("the client has no memory for a message of {size} bytes"));
                self.send(from, Action::Tell(from, Control::NoteAnswer { note: note.task, error }), out);
            }
            Event::Control(control) => self.on_control(from, control, now, out)?,
            Event::Skipped(..) | Event::NoMemory(..) => {}
            Event::Message(..) | Event::Chunk(_) => return Err(SessionError::Unasked("sent what a client sends")),
        }
        Ok(())
    }

    fn on_control(
        &mut self,
        from: PeerId,
        control: Control,
        now: Instant,
        out: &mut Vec<Action>,
    ) -> Result<(), SessionError> {
        match control {
            Control::GivenBack(id) => {
                if let Some(session) = session(&mut self.nodes, from) {
                    session.life.on_given_back(&mut self.queue, from, id)?;
                }
            }
            Control::RecallRefused(id) => {
                if let Some(session) = session(&mut self.nodes, from)
                    && session.life.on_recall_refused(&mut self.queue, from, id)?
                {
                    self.pending_cancels.remove(&id.task);
                }
            }
            Control::BlobLost { number } => {
                if number > self.last_blob {
                    return Err(SessionError::Unasked("lost a blob that it was not sent"));
                }
                if let Some(record) = self.nodes.get_mut(from) {
                    record.blobs.lost(number);
                }
            }
            Control::Running(ids) => ids.into_iter().for_each(|id| self.queue.set_running(from, id)),
            Control::Output { stream, text } => out.push(Action::Print(from, stream, text)),
            Control::Pulse { nonce } => self.on_pulse(from, nonce, now)?,
            Control::Ready { slots } => self.on_ready(from, slots, now)?,
            Control::Drain(why) => self.on_drain(from, &why, now, out)?,
            Control::Goodbye(why) => return Err(SessionError::Goodbye(text::lines(why, text::LIMIT))),
            Control::Heartbeat { nonce, .. } => {
                self.require(from, Liveness::heartbeat, "sent more heartbeats than it has time for")?;
                if let Some(session) = session(&mut self.nodes, from)
                    && nonce > session.stamp
                {
                    (session.stamp, session.heard) = (nonce, now);
                }
            }
            _ => return Err(SessionError::Unasked("sent what a client sends")),
        }
        Ok(())
    }

    /// End a task with its result; a result that is late or doubled is acknowledged and counted.
    fn on_result(
        &mut self,
        from: PeerId,
        result: Message,
        now: Instant,
        out: &mut Vec<Action>,
    ) -> Result<(), SessionError> {
        let record = self.nodes.get(from);
        let has_task_timeout = record.and_then(|r| r.session.as_ref()).is_some_and(|s| s.has_task_timeout);
        check_outcome(&self.queue, from, &result, has_task_timeout)?;
        let id = result.id;
        // A machine that shuts down ends its workers, perhaps before its agent: the task is not to blame.
        let is_draining = record.is_some_and(|r| matches!(r.node.state, NodeState::Draining(_)));
        if result.code == Outcome::Crashed as u8 && is_draining && self.queue.given_back(from, id) {
            self.send(from, Action::Acknowledge(from, id), out);
        } else if let Some(task) = self.ends(from, id, now) {
            self.activity.ended(from, &task, &result, now);
            if result.code == Outcome::Cancelled as u8 && self.answer_cancel(id) {
                self.send(from, Action::Acknowledge(from, id), out);
            } else {
                out.push(Action::Complete(Some(from), result));
            }
        } else {
            if let Some(session) = session(&mut self.nodes, from) {
                session.life.stale(result.cost());
            }
            self.on_stale(from, id, out);
        }
        Ok(())
    }

    /// End a task for whose result this process had no memory.
    fn on_lost_result(&mut self, from: PeerId, id: Attempt, size: usize, now: Instant, out: &mut Vec<Action>) {
        let Some(task) = self.ends(from, id, now) else { return self.on_stale(from, id, out) };
        let name = self.nodes.get(from).map_or("", |record| &record.node.name);
        let text = format!(
            "node {name}: the task has ended, but this process has no memory for its result of {size} bytes: free memory, \
             raise the limit (ulimit -v), or return less"
        );
        let end = Message::text(id, Outcome::Crashed, text);
        self.activity.ended(from, &task, &end, now);
        out.push(Action::Complete(Some(from), end));
    }

    /// Acknowledge and count a result that is late or doubled.
    fn on_stale(&mut self, from: PeerId, id: Attempt, out: &mut Vec<Action>) {
        self.stale += 1;
        self.send(from, Action::Acknowledge(from, id), out);
    }

    /// Take an attempt out of the queue that this node has ended; return `None` if the node does not hold it.
    fn ends(&mut self, from: PeerId, id: Attempt, now: Instant) -> Option<Message> {
        let task = self.queue.done(from, id, now);
        if task.is_some()
            && let Some(session) = session(&mut self.nodes, from)
        {
            session.life.helped();
        }
        task
    }

    /// Note the round-trip time of a heartbeat, which is numbered by the microseconds of the session when it was sent.
    fn on_pulse(&mut self, from: PeerId, nonce: u64, now: Instant) -> Result<(), SessionError> {
        self.require(from, |life| life.pulse(nonce), "answered a heartbeat that it was not sent")?;
        let Some(record) = self.nodes.get_mut(from) else { return Ok(()) };
        let Some(session) = &record.session else { return Ok(()) };
        let rtt = now.saturating_duration_since(session.since).saturating_sub(Duration::from_micros(nonce));
        // The smallest of all, let rise slowly: a heartbeat behind a burst tells nothing about the network.
        record.node.rtt = rtt.min(record.node.rtt.saturating_mul(2));
        self.queue.set_rtt(from, record.node.rtt);
        Ok(())
    }

    /// Add a node's slots to the queue. The node offers as many as it was asked for, or fewer if its workers could not all
    /// be started. A node that offers none or more is broken, and its count could be anything.
    fn on_ready(&mut self, from: PeerId, offered: u64, now: Instant) -> Result<(), SessionError> {
        let Some(record) = self.nodes.get_mut(from) else { return Ok(()) };
        let max_slots = record.max_slots;
        let slots = usize::try_from(offered).unwrap_or(usize::MAX);
        if !(1..=max_slots).contains(&slots) {
            return Err(SessionError::Slots { offered, asked: max_slots });
        }
        if record.node.slots > 0 {
            return Err(SessionError::Unasked("became ready twice"));
        }
        let is_draining = matches!(record.node.state, NodeState::Draining(_));
        if record.node.state == NodeState::Connecting || is_draining {
            record.node.slots = slots;
            (record.was_ready, record.lost_since) = (true, None);
            if let Some(session) = &mut record.session {
                session.life.ready();
            }
            if record.dismissed_since.is_some() {
                return Ok(());
            }
            self.queue.add_peer(from, slots, now);
            if is_draining {
                self.queue.close_peer(from);
            } else {
                record.set_state(NodeState::Ready, now);
            }
        }
        Ok(())
    }

    /// Stop sending tasks to a node that announced that it will soon be gone, and ask for its tasks back.
    fn on_drain(&mut self, from: PeerId, why: &[u8], now: Instant, out: &mut Vec<Action>) -> Result<(), SessionError> {
        self.require(from, Liveness::drains, "said twice that it will soon be gone")?;
        if let Some(record) = self.nodes.get_mut(from)
            && matches!(record.node.state, NodeState::Connecting | NodeState::Ready)
        {
            record.set_state(NodeState::Draining(text::lines(why, text::LIMIT)), now);
            record.draining_since = Some(now);
            let tasks = self.queue.close_peer(from);
            self.recall(from, tasks, out);
        }
        Ok(())
    }

    /// Refuse what a node may not send now, as its session's record has it.
    fn require(
        &mut self,
        from: PeerId,
        is_allowed: impl Fn(&mut Liveness) -> bool,
        what: &'static str,
    ) -> Result<(), SessionError> {
        let session = session(&mut self.nodes, from);
        let wrong = session.is_some_and(|session| !is_allowed(&mut session.life));
        if wrong { Err(SessionError::Unasked(what)) } else { Ok(()) }
    }

    /// Send the next heartbeat to a node that did in time what it was asked to. `uploading`: whether tasks are on their way
    /// to it; `results`: the bytes of results that ever came from it.
    ///
    /// # Errors
    /// What the node did not do in time: [`Dispatch::lost`] must follow.
    pub fn beat(
        &mut self,
        id: PeerId,
        uploading: bool,
        results: u64,
        now: Instant,
        out: &mut Vec<Action>,
    ) -> Result<(), SessionError> {
        let queue = &self.queue;
        let session = session(&mut self.nodes, id);
        let Some(Session { life, since, lease_ms, stamp, .. }) = session else { return Ok(()) };
        let oldest = queue.oldest(id).map(|(number, nanos)| (number, Duration::from_nanos(nanos)));
        life.check(oldest, uploading, results, |attempt, request| match request {
            Request::Recall => queue.is_asked_back(id, attempt),
            Request::Cancel | Request::Abort => queue.is_to_drop(id, attempt),
        })?;
        let nonce = u64::try_from(now.saturating_duration_since(*since).as_micros()).unwrap_or(u64::MAX);
        life.beat(nonce);
        let heartbeat = Control::Heartbeat { nonce, lease_ms: *lease_ms, echo: *stamp };
        out.extend([Action::Tell(id, heartbeat), Action::Wake(id)]);
        Ok(())
    }

    /// Note for the caller that waits in `cancel` that this task was dropped; return false if no caller waits.
    fn answer_cancel(&mut self, id: Attempt) -> bool {
        self.pending_cancels.get_mut(&id.task).is_some_and(|dropped| {
            *dropped = true;
            true
        })
    }

    /// End the cancelled tasks that came back unstarted, but for those whose caller waits in `cancel`.
    pub(super) fn complete_cancelled(&mut self, out: &mut Vec<Action>) {
        for id in self.queue.take_cancelled() {
            if !self.answer_cancel(id) {
                out.push(Action::Complete(None, Message::cancelled(id)));
            }
        }
    }
}
