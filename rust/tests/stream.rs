//! A sender and a reader on one stream: what they count of it, and how much bulk they have under way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![allow(clippy::cast_possible_truncation)]

use std::sync::Arc;
use std::time::Duration;

use skyward_lite::error::SessionError;
use skyward_lite::wire::pace::FIRST_UNDER_WAY;
use skyward_lite::wire::{Body, Control, Event, EventReader, FrameSender};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

#[path = "support/wire.rs"]
mod support;
use support::{CAP, message};

/// Bound on everything here: a hang is a failure with a name.
const BOUND: Duration = Duration::from_secs(20);

/// Run on a runtime like the client's, at most [`BOUND`].
fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(BOUND, work).await.expect("no answer") })
}

/// Carry bytes from one stream to the other until the first ends. Return how many there were.
async fn carry(mut from: DuplexStream, mut to: DuplexStream) -> u64 {
    let (mut bytes, mut buffer) = (0, vec![0; 50_000]);
    loop {
        let n = from.read(&mut buffer).await.unwrap();
        if n == 0 {
            return bytes;
        }
        bytes += n as u64;
        to.write_all(&buffer[..n]).await.unwrap();
    }
}

#[test]
fn each_end_counts_the_bytes_that_cross_the_stream() {
    run(async {
        let (near, middle) = duplex(1 << 16);
        let (other, far) = duplex(1 << 16);
        let (sender, receiver) = (Arc::new(FrameSender::default()), Arc::new(FrameSender::default()));
        assert_eq!(sender.traffic(), (0, 0));
        // Text, which shrinks on the wire, and what does not.
        let noise = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) ^ i.rotate_left(11)).to_be_bytes()[1]);
        let noise = noise
            .scan(1_u8, |last, x| {
                Some({
                    *last = last.wrapping_mul(29) ^ x;
                    *last
                })
            })
            .collect();
        let sent = message(1, &[vec![b'a'; 1 << 20], noise]);
        sender.send(|o| o.message(Body::Task, sent.clone()));
        let carried = tokio::spawn(carry(middle, other));
        let writing = tokio::spawn({
            let sender = Arc::clone(&sender);
            async move { sender.run(near, None).await }
        });
        let mut reader = EventReader::of_session(far, CAP, Arc::clone(&receiver));
        let mut events = Vec::new();
        while events.is_empty() {
            reader.read(&mut events).await.unwrap();
        }
        assert_eq!(events, [Event::Message(Body::Task, sent)]);
        sender.send(|o| o.close("done"));
        while reader.read(&mut events).await.is_ok() {}
        writing.await.unwrap().unwrap();
        let carried = carried.await.unwrap();
        assert!((1 << 20..1_200_000).contains(&carried), "{carried}");
        assert_eq!((sender.traffic(), receiver.traffic()), ((carried, 0), (0, carried)));
    });
}

/// A session's two ends, connected by a stream that holds `buffer` bytes in each direction.
struct Session {
    links: [Arc<FrameSender>; 2],
    readers: Vec<EventReader<tokio::io::ReadHalf<DuplexStream>>>,
}

fn session(buffer: usize) -> Session {
    let links = [Arc::new(FrameSender::default()), Arc::new(FrameSender::default())];
    let (near, far) = duplex(buffer);
    let mut readers = Vec::new();
    for (stream, link) in [near, far].into_iter().zip(&links) {
        let (from, to) = tokio::io::split(stream);
        readers.push(EventReader::of_session(from, CAP, Arc::clone(link)));
        let link = Arc::clone(link);
        tokio::spawn(async move { link.run(to, None).await });
    }
    Session { links, readers }
}

#[test]
fn bulk_goes_both_ways_at_once_however_little_the_stream_holds() {
    run(async {
        let sizes = [5_000_000, 40_000, 20_000, 300_000, 16_384, 16_385, 32_704, 32_705];
        for buffer in [100, 70_000, 1 << 22] {
            let Session { links, readers } = session(buffer);
            for link in &links {
                for (task, size) in (1..).zip(sizes) {
                    link.send(|o| o.message(Body::Task, message(task, &[vec![task as u8; size]])));
                    link.send(|o| o.blob(task, vec![task as u8; size].into()));
                }
            }
            let both = &tokio::sync::Barrier::new(2);
            let read = |mut reader: EventReader<_>| async move {
                let (mut events, mut messages, mut bytes) = (Vec::new(), 0, 0);
                while messages < sizes.len() || bytes < sizes.iter().sum() {
                    reader.read(&mut events).await.unwrap();
                    for event in events.drain(..) {
                        match event {
                            Event::Message(Body::Task, task) => {
                                messages += 1;
                                assert_eq!(task.size(), sizes[task.id.task as usize - 1]);
                            }
                            Event::Chunk(chunk) => bytes += chunk.bytes.len(),
                            other => panic!("{other:?}"),
                        }
                    }
                }
                // Until the other end has all, too, it waits for reports, which are read here.
                tokio::select! {
                    _ = both.wait() => {}
                    end = async { while reader.read(&mut events).await.is_ok() {} } => panic!("{end:?}: the stream ended"),
                }
            };
            let [near, far] = readers.try_into().unwrap_or_else(|_| panic!("two readers"));
            tokio::join!(read(near), read(far));
        }
    });
}

#[test]
fn what_is_not_reported_is_not_exceeded_and_small_messages_pass_it() {
    run(async {
        let link = Arc::new(FrameSender::default());
        let (near, far) = duplex(1 << 22);
        let (from, to) = tokio::io::split(near);
        let _reader = EventReader::of_session(from, CAP, Arc::clone(&link));
        let writing = tokio::spawn({
            let link = Arc::clone(&link);
            async move { link.run(to, Some(Duration::from_secs(1))).await }
        });
        link.send(|o| o.blob(1, vec![7; 8 << 20].into()));
        // A reader that is not a session's reports nothing.
        let mut deaf = EventReader::new(far, CAP);
        let (mut events, mut bytes) = (Vec::new(), 0);
        while bytes < FIRST_UNDER_WAY {
            deaf.read(&mut events).await.unwrap();
            for event in events.drain(..) {
                let Event::Chunk(chunk) = event else { panic!("{event:?}") };
                bytes += chunk.bytes.len() as u64;
            }
        }
        link.send(|o| o.message(Body::Task, message(1, &[vec![1]])));
        link.send(|o| o.control(Control::Heartbeat { nonce: 1, lease_ms: 1, echo: 0 }));
        while events.len() < 2 {
            deaf.read(&mut events).await.unwrap();
        }
        assert!(matches!(events[..], [Event::Control(_), Event::Message(..)]), "{events:?}");
        assert!(bytes < FIRST_UNDER_WAY + (64 << 10), "{bytes}");
        // The receiver of bulk that reports nothing is as silent as one that takes nothing, whatever else it takes.
        let heartbeats = async {
            loop {
                link.send(|o| o.control(Control::Heartbeat { nonce: 2, lease_ms: 1, echo: 0 }));
                deaf.read(&mut events).await.unwrap();
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let why = tokio::select! {
            end = writing => end.unwrap().unwrap_err(),
            () = heartbeats => unreachable!(),
        };
        assert!(matches!(why, SessionError::Silent(_)), "{why}");
    });
}
