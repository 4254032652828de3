//! A sender and a reader on one stream: what they count of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::sync::Arc;
use std::time::Duration;

use skyward_lite::wire::{Body, Event, EventReader, FrameSender};
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
