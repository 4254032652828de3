//! What nodes owe the client, without a socket and without a clock.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use skyward_lite::client::liveness::{Liveness, Oldest, Request};
use skyward_lite::error::SessionError;
use skyward_lite::timing::Timing;
use skyward_lite::wire::Attempt;

const TIMING: Timing = Timing {
    heartbeat: Duration::from_secs(2),
    answer: Duration::from_secs(60),
    drain: Duration::from_secs(600),
    ..Timing::DEFAULT
};
/// Heartbeats in the bound on an answer.
const ANSWER: u64 = 30;
const ID: Attempt = Attempt { task: 7, attempt: 0 };

/// A node that answers each heartbeat before the next one.
struct Node {
    life: Liveness,
    nonce: u64,
    results: u64,
    oldest: Option<Oldest>,
    uploading: bool,
}

impl Node {
    fn new() -> Self {
        let life = Liveness::new(TIMING, Duration::from_secs(60));
        Self { life, nonce: 0, results: 0, oldest: None, uploading: false }
    }

    /// So many heartbeats are sent, and answered if `answered`.
    fn beats(&mut self, count: u64, answered: bool) -> Result<(), SessionError> {
        for _ in 0..count {
            self.life.check(self.oldest, self.uploading, self.results, |_, _| true)?;
            self.nonce += 1;
            self.life.beat(self.nonce);
            if answered {
                assert!(self.life.pulse(self.nonce));
            }
        }
        Ok(())
    }
}

/// The heartbeats are answered in order, each once, and no others are.
#[test]
fn only_what_was_sent_is_answered() {
    let mut life = Node::new().life;
    assert!(!life.pulse(0));
    (1..4).for_each(|nonce| life.beat(nonce));
    assert!(!life.pulse(2));
    assert!(life.pulse(1) && life.pulse(2) && !life.pulse(2) && life.pulse(3));
    assert!(!life.pulse(3));
}

/// A node that answers no heartbeat is lost after twice the bound, or twice its lease if that is longer.
#[test]
fn heartbeats_must_be_answered() {
    let mut node = Node::new();
    node.beats(2 * ANSWER, false).unwrap();
    assert!(matches!(node.beats(1, false), Err(SessionError::Unanswered(120))));
    let mut patient = Node { life: Liveness::new(TIMING, Duration::from_secs(120)), ..Node::new() };
    patient.beats(4 * ANSWER, false).unwrap();
    assert!(patient.beats(1, false).is_err());
    let mut bounded = Node { life: Liveness::new(TIMING, Duration::from_secs(86_400)), ..Node::new() };
    bounded.beats(600, false).unwrap();
    assert!(matches!(bounded.beats(1, false), Err(SessionError::Unanswered(1200))));
}

/// Answers that wait behind results on a slow link are not overdue while those arrive, and for the bound after that.
#[test]
fn answers_may_wait_behind_results() {
    let mut node = Node::new();
    for _ in 0..3 * ANSWER {
        node.results += 16 * 1024;
        node.beats(1, false).unwrap();
    }
    node.beats(2 * ANSWER - 1, false).unwrap();
    assert!(matches!(node.beats(1, false), Err(SessionError::Unanswered(120))));
    let mut trickling = Node::new();
    for _ in 0..2 * ANSWER {
        trickling.results += 16 * 1024 - 1;
        trickling.beats(1, false).unwrap();
    }
    assert!(trickling.beats(1, false).is_err());
}

/// Each request has a bound that is counted in answered heartbeats.
#[test]
fn requests_must_be_answered() {
    for request in [Request::Recall, Request::Cancel, Request::Abort] {
        let mut node = Node::new();
        node.beats(3, true).unwrap();
        node.life.ask(request, ID);
        // While nothing is answered, nothing shows that the request was read.
        node.beats(ANSWER - 1, false).unwrap();
        (4..3 + ANSWER).for_each(|nonce| assert!(node.life.pulse(nonce)));
        node.beats(1, true).unwrap();
        assert!(matches!(node.beats(1, true), Err(SessionError::NoAnswer { seconds: 60, .. })), "{request:?}");
    }
}

/// A refused recall answers a cancel, too, but no abort; asked again, the node owes another answer.
#[test]
fn a_refused_recall_is_an_answer() {
    let mut node = Node::new();
    node.life.ask(Request::Recall, ID);
    node.life.ask(Request::Cancel, ID);
    node.beats(20, true).unwrap();
    assert!(node.life.recall_refused(ID));
    node.life.ask(Request::Recall, ID);
    node.beats(20, true).unwrap();
    assert!(node.life.recall_refused(ID));
    node.beats(100, true).unwrap();
    node.life.ask(Request::Abort, ID);
    assert!(!node.life.recall_refused(ID));
    node.beats(ANSWER, true).unwrap();
    assert!(node.beats(1, true).is_err());
}

/// There are no more answers than requests, and heartbeats do not come in floods.
#[test]
fn answers_are_counted() {
    let mut node = Node::new();
    assert!(!node.life.answer());
    node.life.ask(Request::Recall, ID);
    node.life.ask(Request::Cancel, ID);
    assert!(node.life.answer() && node.life.answer() && !node.life.answer());
    assert!((0..1 << 16).all(|_| node.life.heartbeat()));
    assert!(!node.life.heartbeat());
    node.beats(1, true).unwrap();
    assert!(node.life.heartbeat());
}

/// A request that was answered by the end of its task is owed no more.
#[test]
fn what_ended_is_not_owed() {
    let mut node = Node::new();
    node.life.ask(Request::Abort, ID);
    node.life.check(None, false, 0, |_, _| false).unwrap();
    node.beats(10 * ANSWER, true).unwrap();
}

/// Bytes on their way in either direction may be what an answer waits behind; a recall is read ahead of tasks.
#[test]
fn a_busy_link_is_waited_for() {
    let mut node = Node::new();
    node.life.ask(Request::Recall, ID);
    node.life.ask(Request::Abort, ID);
    for _ in 0..3 * ANSWER {
        node.results += 20_000;
        node.beats(1, true).unwrap();
    }
    assert!(node.life.recall_refused(Attempt { task: 9, attempt: 0 }));
    node.life.recall_refused(ID);
    node.uploading = true;
    node.beats(3 * ANSWER, true).unwrap();
    node.life.ask(Request::Recall, Attempt { task: 8, attempt: 0 });
    assert!(node.beats(ANSWER + 1, true).is_err());
}

/// A node is lost that ends nothing for twice as long as its oldest task may run, and an answer takes; not without limit.
#[test]
fn tasks_must_end() {
    let limit = Duration::from_secs(100);
    let bound = 2 * 50 + ANSWER;
    let mut node = Node::new();
    node.oldest = Some((1, Duration::ZERO));
    node.beats(10 * bound, true).unwrap();
    node.oldest = Some((2, limit));
    node.beats(bound, true).unwrap();
    node.life.helped();
    node.beats(bound, true).unwrap();
    node.oldest = Some((3, limit));
    node.beats(bound, true).unwrap();
    node.uploading = true;
    node.beats(bound, true).unwrap();
    node.uploading = false;
    node.oldest = None;
    node.beats(bound, true).unwrap();
    node.oldest = Some((4, limit));
    node.beats(bound, true).unwrap();
    assert!(matches!(node.beats(1, true), Err(SessionError::NoResult { seconds: 260, .. })));
}

/// Results that nobody waits for are no progress.
#[test]
fn stale_results_are_not_waited_for() {
    let mut node = Node::new();
    node.life.ask(Request::Recall, ID);
    let late = (0..=ANSWER).find_map(|_| {
        node.results += 20_000;
        node.life.stale(20_000);
        node.beats(1, true).err()
    });
    assert!(matches!(late, Some(SessionError::NoAnswer { .. })));
}

/// A node whose workers take long to start may take as long to replace them.
#[test]
fn slow_starts_are_waited_for() {
    let mut node = Node::new();
    node.beats(90, true).unwrap();
    node.life.ready();
    node.oldest = Some((1, Duration::from_secs(10)));
    node.beats(2 * (5 + 90) + ANSWER, true).unwrap();
    assert!(matches!(node.beats(1, true), Err(SessionError::NoResult { seconds: 440, .. })));
}

/// A node that announced that it will soon be gone is lost if it still has tasks after the bound, and left alone if not.
#[test]
fn a_draining_node_ends() {
    let mut node = Node::new();
    assert!(node.life.drains());
    assert!(!node.life.drains(), "it says so once");
    node.beats(1000, true).unwrap();
    node.oldest = Some((1, Duration::ZERO));
    assert!(matches!(node.beats(1, true), Err(SessionError::StillThere(600))));
}
