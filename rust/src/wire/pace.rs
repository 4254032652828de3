//! How many bytes of bulk may be under way on a stream, so that a small message never waits long behind them. Pure.
//!
//! Bulk are the chunks of large messages and of blobs. Their receiver tells how many bytes of them have arrived so far
//! ([`super::Control::Received`]), and from this the sender measures two things: the rate at which bulk arrives, and the
//! shortest time from the sending of a chunk to the report of it. What is under way at this rate for this time is what the
//! stream holds by itself; all that is sent beyond it waits in a buffer somewhere between the two ends. So the sender has
//! under way what arrives in the shortest round trip and [`SLACK`] more, which keeps the stream busy. These are the two
//! estimates of the congestion control BBR.
//!
//! For example: chunks arrive at 25 MB/s, and the shortest round trip is 80 ms. Then 2.1 MB are under way at most: 2 MB fill
//! the stream, and a small message waits 4 ms behind the other 0.1 MB.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A chunk whose body is larger, in bytes, is bulk. The others are counted at neither end: they do not wait for anything.
pub const MAX_SMALL_CHUNK: usize = 16 * 1024;
/// Bytes that may always be under way: two chunks, one of which the receiver need not have reported yet.
pub const LEAST_UNDER_WAY: u64 = 64 * 1024;
/// Bytes that may be under way before anything was measured.
pub const FIRST_UNDER_WAY: u64 = 256 * 1024;
/// How long bulk may wait between the two ends, beyond the shortest round trip. The rate is measured over at least as
/// long, because over a shorter time it is that of a buffer which is emptied at once.
pub const SLACK: Duration = Duration::from_millis(4);
/// In each eighth interval of measurement so much longer: otherwise bulk that is under way for longer than the shortest
/// round trip says, as in a wireless network, would never arrive at the full rate, and the rate would be taken for lower
/// and lower.
const PROBE_SLACK: Duration = Duration::from_millis(4);
/// See [`PROBE_SLACK`].
const PROBE_EVERY: u32 = 8;
/// Intervals of measurement whose highest rate counts, of those in which as much was under way as might be.
const RATES: usize = 10;
/// How long a shortest round trip counts. After that it is measured anew, with as little under way as may be: else the
/// wait in buffers would be taken for a part of it.
const ROUND_TRIP_AGE: Duration = Duration::from_secs(10);
/// At the beginning of a stream twice as much as was measured is under way, until the rate has not grown by a quarter in so
/// many intervals one after another.
const FLAT_INTERVALS: u8 = 3;

/// The bulk of one block: how much may be put in, and how much is.
#[derive(Debug, Clone, Copy)]
pub struct Allowance {
    /// Bytes that may still be put in. A chunk may be begun if it is more than none.
    pub room: u64,
    /// Bytes that were put in.
    pub taken: u64,
    /// Whether messages may be put in at all; else only control frames.
    pub messages: bool,
}

impl Allowance {
    /// Any number of bytes.
    #[must_use]
    pub fn unlimited() -> Self {
        Self { room: u64::MAX, taken: 0, messages: true }
    }

    /// Control frames, and nothing else.
    #[must_use]
    pub fn control() -> Self {
        Self { room: 0, taken: 0, messages: false }
    }

    /// Note that a chunk with a body of so many bytes is put in.
    pub fn take(&mut self, body: usize) {
        let bulk = bulk(body);
        self.taken += bulk;
        self.room = self.room.saturating_sub(bulk);
    }
}

/// Return how many bytes of bulk a chunk with a body of so many bytes is.
#[must_use]
pub fn bulk(body: usize) -> u64 {
    if body > MAX_SMALL_CHUNK { body as u64 } else { 0 }
}

/// What the sender is doing.
#[derive(Debug)]
enum Phase {
    /// It looks for the highest rate. `best`: the highest so far, in bytes per second; `flat`: intervals since it has grown.
    Starting { best: f64, flat: u8 },
    /// It keeps the rate.
    Steady,
    /// It measures the round trip anew. `behind`: what was sent before, which does not count.
    Measuring { behind: u64 },
}

/// An interval in which the rate of arrival is measured.
#[derive(Debug)]
struct Interval {
    number: u32,
    begun: Instant,
    /// What had arrived at its begin.
    received: u64,
    /// Whether bulk had to wait because enough was under way: else the interval says nothing of what the stream can do.
    limited: bool,
}

/// See the file's text.
#[derive(Debug)]
pub struct Pace {
    /// Bytes of bulk that were ever sent, and those that the receiver has reported.
    sent: u64,
    received: u64,
    /// What `sent` was after each block that is not reported yet, and when the block was sent.
    marks: VecDeque<(u64, Instant)>,
    /// The last [`RATES`] measured rates, in bytes per second.
    rates: VecDeque<f64>,
    /// The shortest round trip, and when it was measured.
    round_trip: Option<(Duration, Instant)>,
    interval: Interval,
    phase: Phase,
    /// Whether more bulk was to be sent after the last block.
    busy: bool,
}

impl Pace {
    /// Return the state of a stream on which nothing was sent yet.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            sent: 0,
            received: 0,
            marks: VecDeque::new(),
            rates: VecDeque::new(),
            round_trip: None,
            interval: Interval { number: 0, begun: now, received: 0, limited: false },
            phase: Phase::Starting { best: 0.0, flat: 0 },
            busy: false,
        }
    }

    /// Return how many bytes of bulk may be sent now. A chunk may be begun if it is more than none.
    #[must_use]
    pub fn room(&self) -> u64 {
        self.allowed().saturating_sub(self.under_way())
    }

    /// Return how many bytes of bulk may be under way.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // positive, and saturates
    pub fn allowed(&self) -> u64 {
        let rate = self.rates.iter().copied().fold(0.0, f64::max);
        let Some((round_trip, _)) = self.round_trip.filter(|_| rate > 0.0) else { return FIRST_UNDER_WAY };
        let bytes = match self.phase {
            Phase::Starting { .. } => 2.0 * rate * (round_trip + SLACK).as_secs_f64(),
            Phase::Measuring { .. } => 0.0,
            Phase::Steady if self.interval.number.is_multiple_of(PROBE_EVERY) => {
                rate * (round_trip.mul_f64(1.25) + SLACK + PROBE_SLACK).as_secs_f64()
            }
            Phase::Steady => rate * (round_trip + SLACK).as_secs_f64(),
        };
        (bytes as u64).max(LEAST_UNDER_WAY)
    }

    /// Return the bytes of bulk that have arrived, as the receiver reports.
    #[must_use]
    pub fn reported(&self) -> u64 {
        self.received
    }

    /// Return the bytes of bulk that were sent and not reported.
    #[must_use]
    pub fn under_way(&self) -> u64 {
        self.sent - self.received
    }

    /// Look for the highest rate anew: the streams of the session have become more.
    pub fn widen(&mut self, now: Instant) {
        self.phase = Phase::Starting { best: 0.0, flat: 0 };
        self.begin_interval(now);
    }

    /// Note that so many bytes of bulk are sent, and whether there is more to send.
    pub fn on_sent(&mut self, bytes: u64, more: bool, now: Instant) {
        if bytes > 0 {
            if self.under_way() == 0 && !self.busy {
                // No rate of arrival is to be measured of a time in which there was nothing to send.
                self.begin_interval(now);
            }
            self.sent += bytes;
            self.marks.push_back((self.sent, now));
        }
        self.busy = more;
        self.interval.limited |= more && self.room() == 0;
    }

    /// Note the receiver's report that so many bytes of bulk have arrived since the begin of the stream.
    pub fn on_received(&mut self, bytes: u64, now: Instant) {
        // A report of more than was sent is wrong, and one of less than before is old: streams of one session may overtake
        // one another.
        let bytes = bytes.min(self.sent);
        if bytes <= self.received {
            return;
        }
        self.received = bytes;
        let mut newest = None;
        while let Some(mark) = self.marks.front().copied().filter(|(sent, _)| *sent <= bytes) {
            newest = Some(mark);
            self.marks.pop_front();
        }
        if let Some((sent, at)) = newest {
            self.on_round_trip(sent, now.saturating_duration_since(at), now);
        }
        self.end_interval(now);
    }

    /// Note how long it took until the report came of a block that ended with the byte `sent`.
    fn on_round_trip(&mut self, sent: u64, took: Duration, now: Instant) {
        if let Phase::Measuring { behind } = self.phase {
            if sent > behind {
                self.round_trip = Some((took, now));
                self.phase = Phase::Steady;
                self.begin_interval(now);
            }
            return;
        }
        match self.round_trip {
            Some((shortest, at)) if took > shortest => {
                if now.saturating_duration_since(at) > ROUND_TRIP_AGE && self.busy {
                    self.phase = Phase::Measuring { behind: self.sent };
                }
            }
            _ => self.round_trip = Some((took, now)),
        }
    }

    fn begin_interval(&mut self, now: Instant) {
        let number = self.interval.number.wrapping_add(1);
        self.interval = Interval { number, begun: now, received: self.received, limited: false };
    }

    /// Measure the rate if the interval has lasted for long enough, and begin the next one.
    #[allow(clippy::cast_precision_loss)] // an estimate
    fn end_interval(&mut self, now: Instant) {
        let (took, at_least) = (
            now.saturating_duration_since(self.interval.begun),
            self.round_trip.map_or(SLACK, |(round_trip, _)| round_trip.max(SLACK)),
        );
        if took < at_least || matches!(self.phase, Phase::Measuring { .. }) {
            return;
        }
        let rate = (self.received - self.interval.received) as f64 / took.as_secs_f64();
        let highest = self.rates.iter().copied().fold(0.0, f64::max);
        if self.interval.limited || rate > highest {
            if self.rates.len() == RATES {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        if let Phase::Starting { best, flat } = &mut self.phase
            && self.interval.limited
        {
            if rate > *best * 1.25 {
                (*best, *flat) = (rate, 0);
            } else {
                *flat += 1;
                if *flat == FLAT_INTERVALS {
                    self.phase = Phase::Steady;
                }
            }
        }
        self.begin_interval(now);
    }
}
