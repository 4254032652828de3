//! What one end sends first, and what it does when the other end does not read.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, clippy::cast_possible_truncation)]

use bytes::Bytes;
use skyward_lite::error::SessionError;
use skyward_lite::timing::{MAX_ANSWERS, OUTPUT_HEAD, OUTPUT_TAIL};
use skyward_lite::wire::flood::{Flood, Piece};
use skyward_lite::wire::{
    Attempt, Body, Control, Decoder, Event, EventReader, FrameSender, LEFT_OUT, MAX_BODY, MAX_CHUNK, MAX_OUTPUT_FRAME,
    MAX_UNFINISHED, Message, Outbox, Outgoing, Packer,
};

#[path = "support/wire.rs"]
mod wire;
use wire::{CAP, decode, frame, message, preamble, send};

/// More acknowledgements than fit a frame arrive all the same.
#[test]
fn many_acknowledgements_become_several_frames() {
    let ids: Vec<_> = (0..20_000).map(|task| Attempt { task, attempt: 0 }).collect();
    let wire = send(|o| o.acknowledge(ids.clone()));
    let mut seen = Vec::new();
    for event in decode(&wire, 4096).unwrap() {
        let Event::Control(Control::Acknowledge(taken)) = event else { panic!("{event:?}") };
        seen.extend(taken);
    }
    assert_eq!(seen, ids);
}

/// A small task that is queued after a large one arrives long before it; a control frame before both.
#[test]
fn small_messages_overtake_large_ones() {
    let wire = send(|o| {
        o.message(Body::Task, message(1, &[vec![0; 8 << 20]]));
        o.message(Body::Task, message(2, &[vec![0; 100]]));
        o.control(Control::Pulse { nonce: 1 });
    });
    let order: Vec<_> = decode(&wire, 4096)
        .unwrap()
        .into_iter()
        .map(|event| match event {
            Event::Message(_, m) => m.id.task,
            _ => 0,
        })
        .collect();
    assert_eq!(order, [0, 2, 1]);
}

/// Two large messages share the line: the shorter one is not behind all of the longer one.
#[test]
fn large_messages_are_interleaved() {
    let wire = send(|o| {
        o.message(Body::Task, message(1, &[vec![0; 8 << 20]]));
        o.message(Body::Task, message(2, &[vec![0; 1 << 20]]));
    });
    let Event::Message(_, first) = &decode(&wire, 4096).unwrap()[0] else { panic!() };
    assert_eq!(first.id.task, 2);
}

/// A blob that is forgotten before its first chunk is not sent, and neither is the frame about it; of a blob that is under
/// way the receiver is told.
#[test]
fn what_is_forgotten_in_time_is_not_sent() {
    let mut outbox = Outbox::default();
    (1..=5).for_each(|number| outbox.blob(number, Bytes::from(vec![0; 200_000])));
    let mut wire = Vec::new();
    outbox.fill(&mut wire).unwrap(); // chunks of the first ones
    outbox.forget(vec![5, 1]);
    while !outbox.is_empty() {
        outbox.fill(&mut wire).unwrap();
    }
    assert_eq!(outbox.bytes(), 0);
    let mut arrived = [0; 6];
    let mut forgotten = Vec::new();
    for event in decode(&wire, 4096).unwrap() {
        match event {
            Event::Chunk(chunk) => arrived[chunk.number as usize] += chunk.bytes.len(),
            Event::Control(Control::Forget(blobs)) => forgotten.extend(blobs),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((arrived, forgotten), ([0, 200_000, 200_000, 200_000, 200_000, 0], vec![1]));
}

/// However many large messages wait, no more are under way at once than the receiver takes, and all arrive.
#[test]
fn many_large_messages_take_turns() {
    let part = Bytes::from(vec![0; MAX_CHUNK + 1]);
    let count = MAX_UNFINISHED as u64 + 1;
    let wire = send(|o| {
        (0..count).for_each(|n| o.message(Body::Task, Message { parts: vec![part.clone()], ..message(n, &[]) }));
    });
    let mut decoder = Decoder::new(CAP);
    decoder.buffer().extend_from_slice(&wire);
    let mut came = 0;
    while let Some(event) = decoder.next().unwrap() {
        assert!(matches!(event, Event::Message(_, message) if message.id.task == came && message.parts[0] == part));
        came += 1;
    }
    assert_eq!(came, count);
}

/// A message is cut so that no chunk makes others wait for more than 32 KiB.
#[test]
fn chunks_are_at_most_32_kib() {
    let mut outgoing = Outgoing::new(Body::Task, message(1, &[vec![1; 1 << 20]]));
    loop {
        let mut raw = Vec::new();
        let last = outgoing.put_chunk(&mut raw);
        assert!(raw.len() <= 32 * 1024, "{}", raw.len());
        if last {
            break;
        }
    }
}

/// One read returns a bounded batch of events, the next ones the others, and none is lost or waits for more bytes.
#[test]
fn events_come_in_batches() {
    let frames = frame(0, 4, 0, &[]).repeat(16_000);
    let mut wire = preamble();
    (0..4).for_each(|_| Packer::default().pack(&frames, &mut wire));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let mut source = EventReader::new(&wire[..], CAP);
        let (mut events, mut seen) = (Vec::new(), 0);
        while seen < 64_000 {
            source.read(&mut events).await.unwrap();
            assert!(events.len() <= 1024, "{}", events.len());
            seen += events.len();
            events.clear();
        }
        assert!(matches!(source.read(&mut events).await, Err(SessionError::Ended(_))));
        assert!(seen == 64_000 && events.is_empty());
    });
}

/// A peer that goes on asking and does not read is given up with an error, and takes a bounded memory until then. Every
/// peer may be owed an answer for each of many tasks.
#[test]
fn answers_that_nobody_reads_are_bounded() {
    type Add = fn(&mut Outbox, u64);
    let id = |task| Attempt { task, attempt: 0 };
    let adds: [(&str, u64, Add); 5] = [
        ("acknowledge", 1_000_000, |o, n| o.acknowledge([Attempt { task: n, attempt: 0 }])),
        ("refused", 150_000, |o, n| o.control(Control::RecallRefused(Attempt { task: n, attempt: 0 }))),
        ("recall", 150_000, |o, n| o.control(Control::Recall(Attempt { task: n, attempt: 0 }))),
        ("pulse", 150_000, |o, n| o.control(Control::Pulse { nonce: n })),
        ("answer", 240, |o, n| o.control(Control::NoteAnswer { note: n, error: Bytes::from(vec![b'x'; MAX_BODY]) })),
    ];
    for (name, honest, add) in adds {
        let mut outbox = Outbox::default();
        (0..honest).for_each(|n| add(&mut outbox, n));
        let mut wire = Vec::new();
        while !outbox.is_empty() {
            outbox.fill(&mut wire).unwrap();
        }
        (0..honest).for_each(|n| add(&mut outbox, n));
        assert!(!outbox.is_empty(), "{name}: what was sent does not count any more");
        (0..honest * 8).for_each(|n| add(&mut outbox, n));
        outbox.message(Body::Task, message(1, &[vec![0; 100]]));
        outbox.output(1, Bytes::from_static(b"line\n"));
        assert!(outbox.is_empty() && outbox.bytes() == 0, "{name}: nothing is kept for a peer that is given up");
        let why = outbox.fill(&mut Vec::new()).unwrap_err().to_string();
        assert!(why.contains(&format!("does not read: answers of more than {} MiB", MAX_ANSWERS >> 20)), "{why}");
    }
    // Frames that this end sends unasked do not count.
    let mut outbox = Outbox::default();
    (0..1_000_000).for_each(|n| outbox.control(Control::Abort(id(n))));
    assert!(outbox.fill(&mut Vec::new()).unwrap());
}

/// The loop that sends to a peer that reads slowly ends with the error, and not only when the peer has read.
#[test]
fn a_link_to_a_deaf_peer_ends() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (far, near) = tokio::io::duplex(1 << 20);
        let link = FrameSender::default();
        // It ends after the link, and gives back what it took part in.
        let _stripe = link.stripe();
        let asking = async {
            loop {
                link.send(|o| o.acknowledge((0..10_000).map(|task| Attempt { task, attempt: 0 })));
                tokio::task::yield_now().await;
            }
        };
        let slowly = async {
            let (mut from, _to) = tokio::io::split(far);
            let mut some = [0; 1000];
            loop {
                tokio::io::AsyncReadExt::read(&mut from, &mut some).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let ended = tokio::select! {
            ended = link.run(near, None) => ended,
            () = asking => unreachable!(),
            () = slowly => unreachable!(),
        };
        assert!(matches!(ended, Err(SessionError::Deaf(MAX_ANSWERS))), "{ended:?}");
    });
}

/// Output of many streams at once, in pieces however small, is bounded in memory; pieces of one stream become one.
#[test]
fn small_pieces_of_output_count() {
    let count = |next: &mut dyn FnMut(u64) -> (u64, &'static [u8])| {
        let mut flood = Flood::default();
        for n in 0..1_000_000 {
            let (from, text) = next(n);
            flood.push(Piece { from, text: Bytes::from_static(text), left_out: 0 });
        }
        let (mut pieces, mut bytes, mut left_out) = (0, 0, 0);
        while let Some(piece) = flood.pop() {
            pieces += 1;
            bytes += piece.text.len();
            left_out += piece.left_out;
        }
        (pieces, bytes, left_out)
    };
    assert_eq!(count(&mut |n| (n, b"")), (0, 0, 0));
    let (pieces, bytes, left_out) = count(&mut |n| (n, b"x"));
    assert!(pieces <= 1 + (OUTPUT_HEAD + OUTPUT_TAIL) / 256, "{pieces}");
    assert_eq!(bytes + left_out, 1_000_000);
    let (pieces, bytes, left_out) = count(&mut |_| (1, b"x"));
    assert_eq!((bytes, left_out), (1_000_000, 0), "no more is left out than must be");
    assert!(pieces <= 1_000_000 / MAX_OUTPUT_FRAME + 1, "{pieces}");
    let (pieces, bytes, left_out) = count(&mut |_| (1, b"xxx"));
    assert!((OUTPUT_HEAD..=OUTPUT_HEAD + OUTPUT_TAIL).contains(&bytes) && pieces < 100, "{bytes} {pieces}");
    assert_eq!(bytes + left_out, 3_000_000);
}

/// Output is bounded, goes in small frames between the messages, and what is left out is its middle, and counted.
#[test]
fn output_is_bounded() {
    for close in [false, true] {
        output_is_bounded_when(close);
    }
}

fn output_is_bounded_when(close: bool) {
    let mut outbox = Outbox::default();
    (0..1000).for_each(|i| outbox.output(1, Bytes::from(vec![if i < 999 { b'x' } else { b'y' }; MAX_OUTPUT_FRAME])));
    outbox.message(Body::Result, message(1, &[vec![7; 100]]));
    if close {
        outbox.close("over");
    }
    let (mut wire, mut block) = (Vec::new(), Vec::new());
    while outbox.fill(&mut block).unwrap() {
        wire.append(&mut block);
    }
    let events = decode(&wire, 1000).unwrap();
    assert!(close || matches!(events[1], Event::Message(..)), "the message waits for one frame only");
    let texts: Vec<_> = events
        .into_iter()
        .filter_map(
            |e| if let Event::Control(Control::Output { stream, text }) = e { Some((stream, text)) } else { None },
        )
        .collect();
    let gap = texts.iter().position(|(stream, _)| *stream == LEFT_OUT).unwrap();
    let kept = texts.len() - 1;
    assert_eq!((gap * MAX_OUTPUT_FRAME, (kept - gap) * MAX_OUTPUT_FRAME), (OUTPUT_HEAD, OUTPUT_TAIL));
    assert_eq!(texts[gap].1, ((1000 - kept) * MAX_OUTPUT_FRAME).to_string());
    assert!(texts.last().unwrap().1.iter().all(|byte| *byte == b'y'), "the end is kept");
}

/// Each byte of output is taken or counted, in order, whatever is pushed and popped; also places where bytes were left
/// out.
#[test]
fn what_is_left_out_of_a_flood_is_counted() {
    let (mut flood, mut seed) = (Flood::default(), 1_u64);
    let (mut came, mut went, mut most, mut gaps) = (0, 0, 0, 0);
    for i in 0..200_000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (dice, size) = (seed >> 33, (seed >> 40) as usize % MAX_OUTPUT_FRAME);
        // There are times of more and of less than can be taken.
        if dice % 10 < if i / 5_000 % 2 == 0 { 6 } else { 4 } {
            let left_out = if dice % 97 == 0 { size } else { 0 };
            let text = if left_out == 0 { Bytes::from(vec![0; size]) } else { Bytes::new() };
            flood.push(Piece { from: came, text, left_out });
            came += size;
        } else if let Some(Piece { from, text, left_out }) = flood.pop() {
            if left_out == 0 {
                assert_eq!(from, went);
            }
            went += text.len() + left_out;
            gaps += usize::from(left_out > 0);
        }
        most = most.max(came - went);
    }
    while let Some(piece) = flood.pop() {
        went += piece.text.len() + piece.left_out;
    }
    assert!(flood.is_empty());
    assert_eq!(came, went);
    assert!(gaps > 500 && most > 2 * OUTPUT_HEAD, "{gaps} {most}");
}
