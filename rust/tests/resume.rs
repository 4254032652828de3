//! A resumable stream: whatever is cut, each frame arrives exactly once and in its order.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use skyward_lite::error::SessionError;
use skyward_lite::wire::resume::ResendBuffer;
use skyward_lite::wire::{
    ArrivedBlocks, Attach, Attempt, Body, Control, Event, EventReader, FrameSender, Message, attach, greet,
};
use tokio::io::{AsyncWrite, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::Semaphore;

const MAX_MESSAGE: usize = 64 << 20;

/// Takes so many bytes, and is broken then.
struct Cut {
    to: WriteHalf<DuplexStream>,
    left: usize,
}

impl AsyncWrite for Cut {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let room = bytes.len().min(self.left);
        if room == 0 {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let written = std::task::ready!(Pin::new(&mut self.to).poll_write(cx, &bytes[..room]))?;
        self.left -= written;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.to).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.to).poll_shutdown(cx)
    }
}

/// One end of a session.
struct End {
    link: Arc<FrameSender>,
    reader: EventReader<ReadHalf<DuplexStream>>,
    seen: Vec<Event>,
}

impl End {
    async fn greeted(stream: DuplexStream) -> Self {
        let (from, mut to) = tokio::io::split(stream);
        greet(&mut to, Control::Hello(Bytes::new())).await.unwrap();
        let link = Arc::new(FrameSender::default());
        let mut reader = EventReader::of_session(from, MAX_MESSAGE, Arc::clone(&link));
        let mut seen = Vec::new();
        reader.greeting(&mut seen).await.unwrap();
        reader.begin_stream().unwrap();
        link.begin_stream(true);
        Self { link, reader, seen }
    }

    /// Exchange what both ends have on a new connection, and go on with it. The handshake is no part of the stream.
    async fn resume(&mut self, stream: DuplexStream) -> WriteHalf<DuplexStream> {
        self.reader.disconnect();
        let (from, mut to) = tokio::io::split(stream);
        let (received, blocks) = (self.reader.reached(), self.link.arrived_blocks());
        let mine = Attach { epoch: "e".to_owned(), received, number: 1, blocks, boot: String::new() };
        greet(&mut to, attach(&mine).unwrap()).await.unwrap();
        let mut reader = EventReader::new(from, 0);
        let other = reader.attached().await.unwrap();
        let (from, rest) = reader.into_parts().unwrap();
        self.link.resume(other.received, &other.blocks).unwrap();
        self.reader.resume(from.unwrap(), &rest);
        to
    }

    /// Read and write until the connection is cut. `complete` gets a permit when as many messages as this have arrived.
    async fn follow(&mut self, to: Cut, expected: usize, complete: &Semaphore) -> SessionError {
        let link = Arc::clone(&self.link);
        let writing = link.run(to, None);
        tokio::pin!(writing);
        let mut told = false;
        loop {
            if !told && self.messages().len() == expected && self.controls().len() == expected {
                told = true;
                complete.add_permits(1);
            }
            tokio::select! {
                read = self.reader.read(&mut self.seen) => if let Err(why) = read { return why },
                sent = &mut writing => return sent.unwrap_err(),
            }
        }
    }

    /// Return the messages that have arrived, by their numbers.
    fn messages(&self) -> Vec<(u64, Bytes)> {
        let message = |event: &Event| match event {
            Event::Message(_, message) => Some((message.id.task, message.parts.concat().into())),
            _ => None,
        };
        self.seen.iter().filter_map(message).collect()
    }

    fn controls(&self) -> Vec<&Control> {
        self.seen
            .iter()
            .filter_map(|event| if let Event::Control(control) = event { Some(control) } else { None })
            .collect()
    }
}

fn content(number: u64, size: usize) -> Bytes {
    (0..size as u64).map(|n| (n * 7 + number) as u8).collect()
}

fn message(number: u64, size: usize) -> Message {
    Message { id: Attempt { task: number, attempt: 0 }, parts: vec![content(number, size)], ..Message::default() }
}

/// Both ends send messages of these sizes and a control frame with each, over connections that are cut after so many bytes in
/// either direction. Bytes that are under way are lost. The last connection is not cut.
async fn exchange(sizes: &[usize], cuts: &[(usize, usize)]) {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let (mut near, mut far) = tokio::join!(End::greeted(ours), End::greeted(theirs));
    let uncut = (usize::MAX, usize::MAX);
    let mut left = (1_u64..).zip(sizes).collect::<Vec<_>>();
    left.reverse();
    for (round, (up, down)) in cuts.iter().chain([&uncut]).enumerate() {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let (near_to, far_to) = tokio::join!(near.resume(ours), far.resume(theirs));
        // Some are sent before this cut, the others after it.
        let now = if round == cuts.len() { left.len() } else { left.len() / 2 };
        for (number, size) in left.split_off(left.len() - now).into_iter().rev() {
            near.link.send(|o| o.message(Body::Task, message(number, *size)));
            near.link.send(|o| o.control(Control::Pulse { nonce: number }));
            far.link.send(|o| o.message(Body::Result, message(number, *size)));
            far.link.send(|o| o.control(Control::Pulse { nonce: number }));
        }
        let (near_to, far_to) = (Cut { to: near_to, left: *up }, Cut { to: far_to, left: *down });
        let complete = Semaphore::new(0);
        let longest = Duration::from_millis(if round < cuts.len() { 10 } else { 60_000 });
        tokio::select! {
            _ = near.follow(near_to, sizes.len(), &complete) => assert!(round < cuts.len()),
            _ = far.follow(far_to, sizes.len(), &complete) => assert!(round < cuts.len()),
            _ = complete.acquire_many(2) => {}
            // A cut that is not reached: this connection is cut here.
            () = tokio::time::sleep(longest) => assert!(round < cuts.len(), "not complete"),
        }
    }
    for end in [near, far] {
        let mut messages = end.messages();
        messages.sort();
        let expected: Vec<_> = (1..).zip(sizes).map(|(number, size)| (number, content(number, *size))).collect();
        assert!(messages == expected, "messages");
        let pulses = (1..=sizes.len() as u64).map(|nonce| Control::Pulse { nonce });
        assert!(end.controls().into_iter().eq(pulses.collect::<Vec<_>>().iter()), "in their order");
        assert!(end.link.kept_bytes() < 1 << 20, "what is reported is not kept");
    }
}

fn run(sizes: &[usize], cuts: &[(usize, usize)]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(exchange(sizes, cuts));
}

#[test]
fn a_stream_that_is_never_cut_arrives() {
    run(&[0, 1, 100, 5_000_000, 20], &[]);
}

/// Cut after each of the first bytes: in a block's header, in a frame's, in a body.
#[test]
fn a_stream_that_is_cut_after_any_byte_arrives() {
    let cuts: Vec<_> = (0..150).map(|bytes| (bytes, 149 - bytes)).collect();
    run(&[0, 1, 100, 700_000, 20], &cuts);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn a_stream_that_is_cut_anywhere_arrives(
        sizes in proptest::collection::vec(prop_oneof![0..2000_usize, 0..400_000_usize], 0..30),
        cuts in proptest::collection::vec((0..300_000_usize, 0..300_000_usize), 0..12),
    ) {
        run(&sizes, &cuts);
    }
}

/// A receiver cannot have more than was sent, or less than it had.
#[test]
fn a_wrong_count_is_an_error() {
    let link = FrameSender::default();
    assert!(link.resume(0, &ArrivedBlocks::default()).is_err(), "a stream that cannot go on");
    link.begin_stream(true);
    assert!(link.resume(1, &ArrivedBlocks::default()).is_err());
    assert!(link.resume(0, &ArrivedBlocks::default()).is_ok());
}

#[derive(Debug, Clone)]
enum Step {
    Push(usize),
    Acknowledge(f64),
    Resume(f64),
    WriteAgain(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..700_000_usize).prop_map(Step::Push),
        (0.0..=1.0).prop_map(Step::Acknowledge),
        (0.0..=1.0).prop_map(Step::Resume),
        (1..400_000_usize).prop_map(Step::WriteAgain),
    ]
}

proptest! {
    #[test]
    fn what_is_written_again_is_what_the_receiver_lacks(steps in proptest::collection::vec(step(), 1..40)) {
        // The model: all bytes ever pushed, how many are acknowledged, and how many the present connection was given.
        let (mut all, mut start, mut next, mut buffer) = (Vec::<u8>::new(), 0, 0, ResendBuffer::default());
        for step in steps {
            match step {
                Step::Push(len) if next == all.len() => {
                    let bytes: Vec<u8> = (all.len()..all.len() + len).map(|n| (n / 7 % 251) as u8).collect();
                    buffer.push(&bytes);
                    all.extend(bytes);
                    next = all.len();
                }
                Step::Push(_) => {}
                Step::Acknowledge(share) => {
                    start += ((next - start) as f64 * share) as usize;
                    buffer.acknowledge(start as u64).unwrap();
                }
                Step::Resume(share) => {
                    start += ((all.len() - start) as f64 * share) as usize;
                    next = start;
                    buffer.resume(start as u64).unwrap();
                }
                Step::WriteAgain(most) => {
                    let mut out = b"before".to_vec();
                    let wrote = buffer.write_again(most, &mut out);
                    let expected = &all[next..all.len().min(next + most)];
                    prop_assert_eq!(wrote, !expected.is_empty());
                    prop_assert!(&out[6..] == expected);
                    next += expected.len();
                }
            }
            prop_assert_eq!(buffer.len(), all.len() - start);
            prop_assert_eq!(buffer.is_written(), next == all.len());
            prop_assert!(buffer.acknowledge(next as u64 + 1).is_err());
            prop_assert!(buffer.acknowledge((start as u64).saturating_sub(1)).is_ok(), "a late report");
            prop_assert_eq!(buffer.len(), all.len() - start);
            prop_assert!(start == 0 || buffer.resume(start as u64 - 1).is_err());
            prop_assert!(buffer.resume(all.len() as u64 + 1).is_err());
            prop_assert_eq!(buffer.is_written(), next == all.len(), "what is refused changes nothing");
        }
    }
}

proptest! {
    /// What has arrived is what a set of the numbers says, and what is told of it fits a frame, however much is missing.
    #[test]
    fn arrived_blocks_are_a_set(numbers in proptest::collection::vec(1..200_u64, 0..200)) {
        let (mut arrived, mut model) = (ArrivedBlocks::default(), std::collections::BTreeSet::new());
        for number in numbers {
            arrived.add(number).unwrap();
            model.insert(number);
            prop_assert!((1..202).all(|number| arrived.has(number) == model.contains(&number)));
        }
        prop_assert!(arrived.has(0) && !arrived.has(u64::MAX));
    }
}

#[test]
fn what_is_told_of_blocks_fits_a_frame() {
    let mut arrived = ArrivedBlocks::default();
    // A stripe stands still while others carry gigabytes.
    (2..100_000).for_each(|number| arrived.add(number).unwrap());
    let added = (1..2000).take_while(|n| arrived.add(u64::MAX - 2 * n).is_ok()).count();
    assert!(added < 1100, "a sender has not so many blocks under way");
    let mine = Attach { epoch: "e".to_owned(), received: 0, number: 1, blocks: arrived.clone(), boot: String::new() };
    assert!(attach(&mine).unwrap().put(&mut Vec::new()).is_ok());
    assert!(!arrived.has(1) && arrived.has(99_999) && !arrived.has(100_000));
}

/// Stripes wait for the receiver's report when it may lack too many of their blocks.
#[tokio::test]
async fn stripes_wait_for_reports() {
    let link = Arc::new(FrameSender::default());
    link.begin_stream(true);
    let (near, far) = tokio::io::duplex(1 << 16);
    let receiver = FrameSender::default();
    let mut reader = EventReader::of_session(tokio::io::split(near).0, MAX_MESSAGE, Arc::clone(&link));
    link.send(|o| o.blob(1, Bytes::from(vec![7; 100 << 20])));
    let mut stripe = link.stripe();
    let reading = async {
        let mut told = 0;
        while link.is_busy() {
            let kept = link.kept_bytes();
            assert!(kept < 100 << 20, "{kept}");
            // Of bulk, that all has arrived; and of the blocks, the first ones.
            receiver.send(|o| o.received(u64::MAX));
            if kept > 60 << 20 {
                told += 1;
                receiver.send(|o| o.control(Control::BlocksArrived((1..1500).collect())));
            }
            tokio::task::yield_now().await;
        }
        told
    };
    let taking = async {
        loop {
            reader.read(&mut Vec::new()).await.unwrap();
        }
    };
    tokio::select! {
        sent = stripe.run(tokio::io::sink(), None) => panic!("{sent:?}"),
        sent = receiver.run(far, None) => panic!("{sent:?}"),
        () = taking => {}
        told = reading => assert!(told > 0),
    }
}
