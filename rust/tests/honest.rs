//! Honest nodes, whatever is asked of them and in whatever order it reaches them: none may be taken for a hostile one.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use skyward_lite::client::liveness::{Ask, Liveness, may_end};
use skyward_lite::error::SessionError;
use skyward_lite::queue::{Cancelled, PeerId, Queue};
use skyward_lite::timing::Timing;
use skyward_lite::wire::{Attempt, Message, Outcome};

const TIMING: Timing = Timing {
    heartbeat: Duration::from_secs(2),
    answer: Duration::from_secs(20),
    drain: Duration::from_secs(600),
    ..Timing::DEFAULT
};
/// Heartbeats within which an honest agent has the answer of its worker: fewer than are in the bound.
const PATIENCE: u64 = 5;

enum Told {
    Ask(Ask, Attempt),
    Heartbeat(u64),
}

enum Said {
    Pulse(u64),
    Returned(Attempt),
    Kept(Attempt),
    End(Message),
}

/// An honest agent with the way to it and back: control frames keep their order, and overtake tasks.
#[derive(Default)]
struct Agent {
    told: VecDeque<Told>,
    arriving: VecDeque<Attempt>,
    said: VecDeque<Said>,
    waiting: Vec<Attempt>,
    running: Vec<Attempt>,
    /// Dropped before it arrived.
    early: HashSet<Attempt>,
    /// Asked of the worker that has the task, in which heartbeat: it will answer, once.
    asked: BTreeMap<(u64, u16), u64>,
    dropped: HashSet<Attempt>,
    aborted: HashSet<Attempt>,
    beats: u64,
}

fn key(id: Attempt) -> (u64, u16) {
    (id.task, id.attempt)
}

impl Agent {
    fn end(&mut self, id: Attempt, code: Outcome) {
        self.waiting.retain(|one| *one != id);
        self.running.retain(|one| *one != id);
        self.asked.remove(&key(id));
        self.said.push_back(Said::End(Message { id, code: code as u8, nanos: 0, parts: Vec::new() }));
    }

    /// Read a control frame. `near`: what waits is at the agent, not in a worker.
    fn hear(&mut self, near: bool) {
        match self.told.pop_front() {
            Some(Told::Heartbeat(nonce)) => {
                self.beats += 1;
                self.said.push_back(Said::Pulse(nonce));
                let late = |since: &u64| since + PATIENCE < self.beats;
                let late: Vec<_> = self.asked.iter().filter(|(_, since)| late(since)).map(|(id, _)| *id).collect();
                for (task, attempt) in late {
                    self.answer(Attempt { task, attempt });
                }
                let doomed: Vec<_> = self.aborted.iter().filter(|id| self.running.contains(id)).copied().collect();
                for id in doomed {
                    self.end(id, Outcome::Cancelled);
                }
            }
            Some(Told::Ask(ask, id)) => {
                let waits = self.waiting.contains(&id);
                match ask {
                    Ask::Recall if waits && near => {
                        self.waiting.retain(|one| *one != id);
                        self.asked.remove(&key(id));
                        self.said.push_back(Said::Returned(id));
                    }
                    Ask::Recall if waits || self.running.contains(&id) => drop(self.asked.insert(key(id), self.beats)),
                    Ask::Recall => self.said.push_back(Said::Kept(id)),
                    Ask::Cancel | Ask::Abort if waits && near => self.end(id, Outcome::Cancelled),
                    Ask::Cancel | Ask::Abort if waits || self.running.contains(&id) => {
                        self.dropped.insert(id);
                        if ask == Ask::Abort {
                            self.aborted.insert(id);
                        }
                        if ask == Ask::Cancel || waits {
                            self.asked.insert(key(id), self.beats);
                        }
                    }
                    Ask::Cancel | Ask::Abort => drop(self.early.insert(id)),
                }
            }
            None => {}
        }
    }

    /// The worker that has a task answers.
    fn answer(&mut self, id: Attempt) {
        if self.asked.remove(&key(id)).is_none() {
            return;
        }
        if self.running.contains(&id) {
            if !self.aborted.contains(&id) {
                self.dropped.remove(&id);
            }
            self.said.push_back(Said::Kept(id));
        } else if self.dropped.contains(&id) {
            self.end(id, Outcome::Cancelled);
        } else {
            self.waiting.retain(|one| *one != id);
            self.said.push_back(Said::Returned(id));
        }
    }

    fn arrive(&mut self) {
        let Some(id) = self.arriving.pop_front() else { return };
        if self.early.remove(&id) {
            self.end(id, Outcome::Cancelled);
        } else {
            self.waiting.push(id);
        }
    }
}

/// The client, as `pool.rs` is: the queue, and what each node owes.
#[derive(Default)]
struct Client {
    queue: Queue,
    lives: BTreeMap<PeerId, (Liveness, Agent)>,
    nodes: PeerId,
    tasks: u64,
    ended: u64,
    nonce: u64,
}

impl Client {
    fn add(&mut self, slots: usize, now: Instant) {
        self.nodes += 1;
        let life = Liveness::new(TIMING, Duration::from_secs(60));
        self.lives.insert(self.nodes, (life, Agent::default()));
        self.queue.add_peer(self.nodes, slots, now);
    }

    fn ask(&mut self, node: PeerId, ask: Ask, id: Attempt) {
        let (life, agent) = self.lives.get_mut(&node).unwrap();
        life.ask(ask, id);
        agent.told.push_back(Told::Ask(ask, id));
    }

    fn pump(&mut self, now: Instant) {
        while let Some((node, message)) = self.queue.assign() {
            self.lives.get_mut(&node).unwrap().1.arriving.push_back(message.id);
        }
        while let Some((node, id)) = self.queue.steal(now) {
            self.ask(node, Ask::Recall, id);
        }
        self.ended += self.queue.take_cancelled().len() as u64;
    }

    fn hear(&mut self, node: PeerId, now: Instant) -> Result<(), SessionError> {
        let (life, agent) = self.lives.get_mut(&node).unwrap();
        match agent.said.pop_front() {
            Some(Said::Pulse(nonce)) if !life.pulse(nonce) => return Err(SessionError::Unasked("pulse")),
            Some(Said::Returned(id)) => {
                life.returned(&mut self.queue, node, id)?;
                self.ended += self.queue.take_cancelled().len() as u64;
            }
            Some(Said::Kept(id)) => drop(life.keeps(&mut self.queue, node, id)?),
            Some(Said::End(result)) => {
                may_end(&self.queue, node, &result, false)?;
                self.ended += u64::from(self.queue.done(node, result.id, now));
            }
            _ => {}
        }
        Ok(())
    }

    fn beat(&mut self, node: PeerId) -> Result<(), SessionError> {
        let (life, agent) = self.lives.get_mut(&node).unwrap();
        life.check(
            self.queue.oldest(node).map(|(n, _)| (n, Duration::ZERO)),
            !agent.arriving.is_empty(),
            0,
            |id, ask| {
                if ask == Ask::Recall { self.queue.is_asked_back(node, id) } else { self.queue.is_to_drop(node, id) }
            },
        )?;
        self.nonce += 1;
        life.beat(self.nonce);
        agent.told.push_back(Told::Heartbeat(self.nonce));
        Ok(())
    }

    fn drop_task(&mut self, task: u64, ask: Ask) {
        match self.queue.cancel(task) {
            Cancelled::Dropped => self.ended += 1,
            Cancelled::Held(node) => {
                let id = self.queue.attempt(task).unwrap();
                self.ask(node, ask, id);
            }
            Cancelled::Unknown => {}
        }
    }

    fn lose(&mut self, node: PeerId) {
        self.lives.remove(&node);
        for task in self.queue.remove_peer(node).into_iter().rev() {
            if !self.queue.retry(task, 3) {
                self.queue.remove(task).unwrap();
                self.ended += 1;
            }
        }
        self.ended += self.queue.take_cancelled().len() as u64;
    }

    /// Let everything that is on its way arrive, and what it leads to.
    fn settle(&mut self, now: Instant) -> Result<(), SessionError> {
        for _ in 0..100_000 {
            if self.queue.is_empty() {
                return Ok(());
            }
            self.pump(now);
            for node in self.lives.keys().copied().collect::<Vec<_>>() {
                self.beat(node)?;
                let agent = &mut self.lives.get_mut(&node).unwrap().1;
                while !agent.told.is_empty() {
                    agent.hear(false);
                }
                while !agent.arriving.is_empty() {
                    agent.arrive();
                }
                let waiting = std::mem::take(&mut agent.waiting);
                agent.running.extend(waiting);
                if let Some(&id) = agent.running.first() {
                    agent.end(id, Outcome::Returned);
                }
                while !self.lives[&node].1.said.is_empty() {
                    self.hear(node, now)?;
                }
            }
        }
        Err(SessionError::Unasked("never ended its tasks"))
    }
}

/// How many cases there are; the environment can ask for more.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(200)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    /// Each task ends once, and no node is lost for what it did or did not do.
    #[test]
    fn honest_nodes_are_not_accused(steps in prop::collection::vec((0_u8..32, any::<u8>()), 0..400)) {
        let start = Instant::now();
        let mut client = Client::default();
        client.add(2, start);
        for (i, (step, pick)) in steps.into_iter().enumerate() {
            let now = start + Duration::from_millis(i as u64);
            let pick = usize::from(pick);
            let Some(&node) = client.lives.keys().nth(pick % client.lives.len().max(1)) else {
                client.add(1 + pick % 3, now);
                continue;
            };
            let task = (pick as u64) % client.tasks.max(1);
            let fine = |done: Result<(), SessionError>| prop::test_runner::TestCaseResult::from(
                done.map_err(|why| TestCaseError::fail(why.to_string()))
            );
            let agent = &mut client.lives.get_mut(&node).unwrap().1;
            match step {
                0..=2 => for _ in 0..=pick % 6 {
                    let id = Attempt { task: client.tasks, attempt: 0 };
                    client.queue.push(Message { id, code: 0, nanos: 0, parts: Vec::new() });
                    client.tasks += 1;
                },
                3..=5 => client.pump(now),
                6..=9 => agent.hear(pick % 3 == 0),
                10..=12 => agent.arrive(),
                13..=15 => if let Some(id) = agent.waiting.pop() { agent.running.push(id) },
                16 | 17 => if let Some(&id) = agent.running.get(pick % agent.running.len().max(1)) {
                    agent.end(id, if agent.aborted.contains(&id) { Outcome::Cancelled } else { Outcome::Returned });
                },
                18 | 19 => if let Some(&(task, attempt)) = agent.asked.keys().nth(pick % agent.asked.len().max(1)) {
                    agent.answer(Attempt { task, attempt });
                },
                20..=24 => fine(client.hear(node, now))?,
                25 => fine(client.beat(node))?,
                26 | 27 => client.drop_task(task, Ask::Cancel),
                28 => client.drop_task(task, Ask::Abort),
                29 => for id in if pick % 8 == 0 { client.queue.close_peer(node) } else { client.queue.recall_all(node) } {
                    client.ask(node, Ask::Recall, id);
                },
                30 => if client.lives.len() < 4 { client.add(1 + pick % 3, now) },
                _ => if pick % 4 == 0 { client.lose(node) },
            }
            client.ended += client.queue.take_cancelled().len() as u64;
        }
        client.add(2, start);
        prop_assert!(client.settle(start).map_err(|why| why.to_string()) == Ok(()), "an honest node was lost");
        prop_assert_eq!(client.ended, client.tasks);
    }
}
