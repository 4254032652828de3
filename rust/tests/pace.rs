//! How much bulk is under way on streams of all kinds, which are simulated: no clock, no socket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, clippy::cast_sign_loss)]

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use skyward_lite::wire::pace::{Allowance, FIRST_UNDER_WAY, LEAST_UNDER_WAY, MAX_SMALL_CHUNK, Pace, SLACK, bulk};

const CHUNK: u64 = 32 * 1024;
const MB: f64 = 1e6;

fn ms(ms: f64) -> Duration {
    Duration::from_secs_f64(ms / 1e3)
}

/// A stream with this rate and delay, whose receiver reports each chunk.
struct Stream {
    begun: Instant,
    now: Instant,
    pace: Pace,
    /// Bytes per second.
    rate: f64,
    /// From the end of the queue to the report.
    round_trip: Duration,
    /// When the queue in front of the slowest place is empty.
    free_at: Instant,
    /// When each chunk's report comes, and what it says.
    reports: VecDeque<(Instant, u64)>,
    sent: u64,
    /// The longest time that a small message would have waited in the queue.
    longest_wait: Duration,
}

impl Stream {
    fn new(megabytes: f64, round_trip_ms: f64) -> Self {
        let now = Instant::now();
        Self {
            begun: now,
            now,
            pace: Pace::new(now),
            rate: megabytes * MB,
            round_trip: ms(round_trip_ms),
            free_at: now,
            reports: VecDeque::new(),
            sent: 0,
            longest_wait: Duration::ZERO,
        }
    }

    /// Send without a pause for a time. Return the share of the stream's rate at which chunks were reported.
    fn run(&mut self, time: Duration) -> f64 {
        let (until, before) = (self.now + time, self.pace.reported());
        self.longest_wait = Duration::ZERO;
        while self.now < until {
            while self.pace.room() > 0 {
                self.sent += CHUNK;
                let begins = self.free_at.max(self.now);
                self.free_at = begins + Duration::from_secs_f64(CHUNK as f64 / self.rate);
                self.longest_wait = self.longest_wait.max(self.free_at - self.now);
                self.reports.push_back((self.free_at + self.round_trip, self.sent));
                self.pace.on_sent(CHUNK, true, self.now);
            }
            let (at, bytes) = self.reports.pop_front().expect("something is under way");
            self.now = at;
            self.pace.on_received(bytes, self.now);
        }
        (self.pace.reported() - before) as f64 / time.as_secs_f64() / self.rate
    }
}

#[test]
fn a_stream_is_full_and_its_queue_short() {
    //      MB/s  round trip   longest wait in ms
    for (rate, round_trip, bound) in [
        (700.0, 0.1, 9.0),
        (100.0, 1.0, 10.0),
        (25.0, 20.0, 17.0),
        (25.0, 80.0, 32.0),
        (200.0, 80.0, 32.0),
        // The two chunks that may always be under way take longer than the slack.
        (5.0, 10.0, 23.0),
        (1.0, 50.0, 100.0),
    ] {
        let mut stream = Stream::new(rate, round_trip);
        stream.run(Duration::from_secs(3));
        let share = stream.run(Duration::from_secs(5));
        let wait = stream.longest_wait;
        assert!(share > 0.97 && wait < ms(bound), "{rate} MB/s, {round_trip} ms: {share:.2}, {wait:?}");
    }
}

#[test]
fn the_rate_of_a_long_way_is_found_within_some_round_trips() {
    let mut stream = Stream::new(100.0, 80.0);
    stream.run(ms(900.0));
    let share = stream.run(ms(500.0));
    assert!(share > 0.9, "{share}");
}

#[test]
fn a_stream_that_changes_is_measured_anew() {
    let mut stream = Stream::new(50.0, 20.0);
    stream.run(Duration::from_secs(3));
    for (rate, round_trip) in [(5.0, 20.0), (100.0, 20.0), (100.0, 60.0), (100.0, 5.0)] {
        (stream.rate, stream.round_trip) = (rate * MB, ms(round_trip));
        stream.run(Duration::from_secs(25));
        let share = stream.run(Duration::from_secs(5));
        let wait = stream.longest_wait;
        assert!(share > 0.9 && wait < ms(70.0), "{rate} MB/s, {round_trip} ms: {share:.2}, {wait:?}");
    }
}

#[test]
fn the_wait_in_a_queue_is_not_taken_for_a_part_of_the_round_trip() {
    let mut stream = Stream::new(50.0, 10.0);
    stream.run(Duration::from_secs(120));
    assert!(stream.pace.allowed() < (0.030 * stream.rate) as u64, "{}", stream.pace.allowed());
    assert!(stream.now - stream.begun >= Duration::from_secs(120));
}

#[test]
fn a_pause_says_nothing_of_the_rate() {
    let mut stream = Stream::new(50.0, 20.0);
    stream.run(Duration::from_secs(3));
    // More, by up to four tenths, if the stream is just being probed.
    let before = stream.pace.allowed();
    for _ in 0..50 {
        // All that is under way arrives; then one small chunk is sent each second.
        while let Some((at, bytes)) = stream.reports.pop_front() {
            stream.now = stream.now.max(at);
            stream.pace.on_sent(0, false, stream.now);
            stream.pace.on_received(bytes, stream.now);
        }
        stream.now += Duration::from_secs(1);
        stream.sent += CHUNK;
        stream.pace.on_sent(CHUNK, false, stream.now);
        stream.reports.push_back((stream.now + ms(21.0), stream.sent));
    }
    assert!(stream.pace.allowed() >= before * 7 / 10, "{} of {before}", stream.pace.allowed());
}

#[test]
fn small_chunks_are_no_bulk() {
    let mut allowed = Allowance::unlimited();
    allowed.room = 40_000;
    for body in [0, 100, MAX_SMALL_CHUNK] {
        assert_eq!(bulk(body), 0);
        allowed.take(body);
    }
    assert_eq!((allowed.room, allowed.taken), (40_000, 0));
    allowed.take(32_704);
    allowed.take(32_704);
    assert_eq!((allowed.room, allowed.taken), (0, 65_408));
}

#[test]
fn reports_of_more_than_was_sent_open_no_more_than_that() {
    let begun = Instant::now();
    let mut pace = Pace::new(begun);
    pace.on_sent(CHUNK, true, begun);
    pace.on_received(u64::MAX, begun + SLACK);
    assert_eq!((pace.under_way(), pace.reported()), (0, CHUNK));
    pace.on_received(3, begun + SLACK);
    assert_eq!(pace.reported(), CHUNK);
    assert!(pace.room() >= LEAST_UNDER_WAY);
}

proptest! {
    /// Whatever the times between reports, and however many bytes each has: a sender whose receiver reports all that
    /// arrives sends on.
    #[test]
    fn a_receiver_that_reports_is_sent_more(steps in prop::collection::vec((0_u64..200_000, 0_u64..5, any::<bool>()), 1..300)) {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        assert_eq!(pace.room(), FIRST_UNDER_WAY);
        let (mut sent, mut reported) = (0, 0);
        for (micros, chunks, all) in steps {
            for _ in 0..chunks {
                if pace.room() > 0 {
                    sent += CHUNK;
                    pace.on_sent(CHUNK, true, now);
                }
            }
            now += Duration::from_micros(micros);
            reported = if all { sent } else { (reported + CHUNK).min(sent) };
            pace.on_received(reported, now);
            prop_assert_eq!(pace.under_way(), sent - reported);
            prop_assert!(pace.allowed() >= LEAST_UNDER_WAY);
        }
        pace.on_received(sent, now);
        prop_assert!(pace.room() >= LEAST_UNDER_WAY);
    }
}
