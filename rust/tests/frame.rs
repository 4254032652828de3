//! The codec: what goes in comes out, and what is malformed is named before memory is spent on it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::expect_used, clippy::panic)]
#![allow(clippy::cast_possible_truncation)]

use bytes::Bytes;
use proptest::prelude::*;
use skyward_lite::error::FrameError;
use skyward_lite::wire::{
    ArrivedBlocks, Attach, Attempt, BlobChunk, BlobPart, Body, Control, Decoder, Event, MAGIC, MAX_BLOCK, MAX_BODY,
    MAX_NOISE, MAX_NOTE, MAX_REASON, Message, Outcome, PROTOCOL, Packer, attach,
};

#[path = "support/wire.rs"]
mod wire;
use wire::{CAP, FIRST, LAST, RESULT, TASK, block, decode, frame, head, message, message_frame, preamble, send};

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Messages of any sizes come out whole and equal, however the stream is cut.
    #[test]
    fn messages_survive_the_wire(
        sizes in prop::collection::vec(prop::collection::vec(0_usize..100_000, 0..4), 1..6),
        step in 1_usize..70_000,
        seed in any::<u8>(),
    ) {
        let messages: Vec<_> = sizes.iter().zip(1_u64..).map(|(parts, task)| {
            let parts: Vec<Vec<u8>> = parts.iter().map(|&n| {
                (0..n).map(|i| (i as u8).wrapping_mul(seed).wrapping_add((i >> 8) as u8)).collect()
            }).collect();
            message(task, &parts)
        }).collect();
        let wire = send(|o| for m in &messages { o.message(Body::Task, m.clone()); });
        let mut seen: Vec<_> = decode(&wire, step).unwrap().into_iter().map(|event| match event {
            Event::Message(Body::Task, message) => message,
            other => panic!("{other:?}"),
        }).collect();
        seen.sort_by_key(|m| m.id);
        prop_assert_eq!(seen, messages);
    }

    /// A blob comes out as it went in, in chunks that say where they belong, beside a message that is not held up by it.
    #[test]
    fn blobs_survive_the_wire(size in 1_usize..200_000, step in 1_usize..70_000, seed in any::<u8>()) {
        let bytes: Vec<u8> = (0..size).map(|i| (i as u8).wrapping_mul(seed) ^ (i >> 8) as u8).collect();
        let named = Message { blobs: vec![blob_part(1, 77)], ..message(1, &[b"pickle".to_vec(), b"buffer".to_vec()]) };
        let wire = send(|o| {
            o.blob(77, Bytes::from(bytes.clone()));
            o.message(Body::Task, named.clone());
        });
        let mut events = decode(&wire, step).unwrap();
        prop_assert_eq!(events.remove(0), Event::Message(Body::Task, named));
        let mut seen = vec![0; size];
        let mut arrived = 0;
        for event in events {
            let Event::Chunk(BlobChunk { number: 77, offset, total, bytes }) = event else { panic!("{event:?}") };
            prop_assert_eq!(total as usize, size);
            seen[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
            arrived += bytes.len();
        }
        prop_assert_eq!(arrived, size);
        prop_assert_eq!(seen, bytes);
    }

    /// No bytes whatever make the decoder panic or take memory that did not arrive.
    #[test]
    fn noise_is_an_error_or_nothing(noise in prop::collection::vec(any::<u8>(), 0..4096), step in 1_usize..512) {
        let mut wire = preamble();
        wire.extend(&noise);
        drop(decode(&wire, step));
        drop(decode(&noise, step));
        drop(decode(&block(&noise), step));
    }

    /// A valid stream with one byte changed ends in an error or in events, never in a panic.
    #[test]
    fn one_changed_byte_does_no_harm(at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let mut wire = send(|o| {
            o.control(Control::Heartbeat { nonce: 1, lease_ms: 2, echo: 0 });
            o.message(Body::Result, message(1, &[vec![1; 3000], vec![2; 70_000]]));
        });
        let at = at.index(wire.len());
        wire[at] = to;
        drop(decode(&wire, 1000));
    }
}

/// Every control frame comes out as it went in.
#[test]
fn control_frames_survive_the_wire() {
    let id = Attempt { task: u64::MAX, attempt: u16::MAX };
    let all = vec![
        Control::Hello(Bytes::from_static(b"{}")),
        Control::Ready { slots: 7 },
        Control::Heartbeat { nonce: 3, lease_ms: u64::MAX, echo: 1 << 50 },
        Control::Pulse { nonce: 3 },
        Control::Acknowledge(vec![id, Attempt { task: 0, attempt: 0 }]),
        Control::Cancel(id),
        Control::Abort(id),
        Control::Output { stream: 2, text: Bytes::from_static(b"line\n") },
        Control::Recall(id),
        Control::GivenBack(id),
        Control::RecallRefused(id),
        Control::Drain(Bytes::from(vec![b'x'; MAX_REASON])),
        Control::NoteAnswer { note: u64::MAX, error: Bytes::from_static(b"no listener") },
        Control::NoteAnswer { note: 1, error: Bytes::new() },
        Control::Forget(vec![1, u64::MAX]),
        Control::Received { bytes: u64::MAX },
        Control::BlobLost { number: 7 },
        Control::Descriptor { number: 7, size: 1 << 40 },
        Control::Attach(Bytes::from_static(b"{}")),
        Control::Reached { bytes: u64::MAX },
        Control::StripeBlock { number: u64::MAX },
        Control::BlocksArrived(vec![1, u64::MAX]),
        Control::Goodbye(Bytes::from_static(b"why")),
    ];
    let wire = send(|o| all.iter().for_each(|c| o.control(c.clone())));
    let events = decode(&wire, 5).unwrap();
    assert_eq!(events, all.into_iter().map(Event::Control).collect::<Vec<_>>());
}

/// A reason that is too long is refused where it is written, too.
fn blob_part(place: u16, number: u64) -> BlobPart {
    BlobPart { place, number, fresh: false, content: None }
}

/// A chunk that does not lie within its blob, a blob over the cap and a blob at no place of its message are refused.
#[test]
fn blobs_are_checked() {
    let chunk = |offset: u64, total: u64, bytes: &[u8]| {
        let body = [&offset.to_le_bytes()[..], &total.to_le_bytes(), bytes].concat();
        decode(&block(&frame(u32::try_from(body.len()).unwrap(), 18, 0, &body)), 9)
    };
    let whole = BlobChunk { number: 9, offset: 1, total: 4, bytes: Bytes::from_static(b"abc") };
    assert_eq!(chunk(1, 4, b"abc").unwrap(), [Event::Chunk(whole)]);
    for (offset, total, bytes) in [(2, 4, &b"abc"[..]), (u64::MAX, 4, b"abc"), (0, 0, b""), (1, 4, b"")] {
        assert!(matches!(chunk(offset, total, bytes), Err(FrameError::BadBody(_))), "{offset} {total}");
    }
    assert!(matches!(chunk(0, u64::MAX, b"abc"), Err(FrameError::TooLong { what: "blob", .. })));
    assert!(matches!(decode(&block(&frame(3, 18, 0, b"abc")), 9), Err(FrameError::Truncated(_))));
    for places in [&[3][..], &[1, 1], &[2, 0]] {
        let blobs = places.iter().map(|place| blob_part(*place, 5)).collect();
        let wire = send(|o| o.message(Body::Task, Message { blobs, ..message(1, &[b"pickle".to_vec()]) }));
        assert!(matches!(decode(&wire, 9), Err(FrameError::BadSequence(_))), "{places:?}");
    }
}

#[test]
fn a_long_reason_is_not_sent() {
    let long = Control::Drain(Bytes::from(vec![b'x'; MAX_REASON + 1]));
    assert!(matches!(long.put(&mut Vec::new()), Err(FrameError::TooLong { what: "reason", .. })));
}

/// A task, a result and a note of the same number are three messages, also while their chunks alternate.
#[test]
fn notes_are_messages_of_their_own() {
    let all = [(Body::Task, 1_u8), (Body::Result, 2), (Body::Note, 3)];
    let part = |byte| message(1, &[vec![byte; 10], vec![byte; 1 << 20]]);
    let wire = send(|o| all.iter().for_each(|(body, byte)| o.message(*body, part(*byte))));
    let events = decode(&wire, 4096).unwrap();
    assert_eq!(events, all.map(|(body, byte)| Event::Message(body, part(byte))));
}

/// An answer that is too long for a frame is refused where it is written, too.
#[test]
fn a_long_answer_is_not_sent() {
    let long = Control::NoteAnswer { note: 1, error: Bytes::from(vec![b'x'; MAX_BODY + 1]) };
    assert!(matches!(long.put(&mut Vec::new()), Err(FrameError::TooLong { .. })));
}

/// Compressible data shrinks on the wire; incompressible data grows by headers only.
#[test]
fn compression_is_used_where_it_pays() {
    let zeros = send(|o| o.message(Body::Task, message(1, &[vec![0; 1 << 20]])));
    assert!(zeros.len() < 1 << 14, "{}", zeros.len());
    let mut state = 1_u64;
    let random: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
    .take(1 << 20)
    .collect();
    let wire = send(|o| o.message(Body::Task, message(1, &[random])));
    assert!(wire.len() < (1 << 20) + (1 << 11), "{}", wire.len());
}

/// Text that a login shell printed before the protocol is skipped.
#[test]
fn noise_before_the_magic_is_skipped() {
    let mut wire = b"Welcome to host\nmagic \0SKYWARD-LITE? not yet\n".to_vec();
    wire.extend(send(|o| o.control(Control::Pulse { nonce: 1 })));
    assert_eq!(decode(&wire, 3).unwrap(), [Event::Control(Control::Pulse { nonce: 1 })]);
}

/// Every proper prefix of a stream yields no error and no event that is not whole.
#[test]
fn truncation_at_every_byte_waits_for_more() {
    let wire = send(|o| {
        o.control(Control::Pulse { nonce: 1 });
        o.message(Body::Task, message(1, &[b"abc".repeat(300), vec![]]));
    });
    let whole = decode(&wire, wire.len()).unwrap();
    for cut in 0..wire.len() {
        let events = decode(&wire[..cut], 64).unwrap();
        assert!(events.len() < whole.len() && whole.starts_with(&events), "cut at {cut}");
    }
}

macro_rules! malformed {
    ($($name:ident: $wire:expr => $error:pat,)*) => {
        $(
            #[test]
            fn $name() {
                let error = decode(&$wire, 1000).expect_err("accepted");
                assert!(matches!(error, $error), "{error:?}");
                assert!(!error.to_string().is_empty());
            }
        )*

        fn all_malformed() -> Vec<(&'static str, Vec<u8>)> {
            vec![$((stringify!($name), $wire)),*]
        }
    };
}

/// The fuzz target's seeds are these frames: one file each, whose first byte says how the stream is cut.
/// With `UPDATE_CORPUS=1` the files are written anew.
#[test]
fn the_corpus_is_current() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/frame");
    let mut seeds = all_malformed();
    seeds.push(("valid_small", send(|o| o.message(Body::Task, message(1, &[b"abc".to_vec(), vec![]])))));
    seeds.push(("valid_large", send(|o| o.message(Body::Result, message(1, &[vec![7; 100_000]])))));
    let partial = Message { code: Outcome::Partial as u8, ..message(1, &[b"abc".to_vec()]) };
    seeds.push(("valid_partial", send(|o| o.message(Body::Result, partial))));
    seeds.push(("valid_output", send(|o| o.output(2, Bytes::from_static(b"one\ntwo\n")))));
    seeds.push(("valid_control", send(|o| o.control(Control::Heartbeat { nonce: 1, lease_ms: 2, echo: 0 }))));
    seeds.push(("valid_drain", send(|o| o.control(Control::Drain(Bytes::from_static(b"notice"))))));
    seeds.push(("valid_note", send(|o| o.message(Body::Note, message(1, &[b"abc".to_vec()])))));
    let answer = Control::NoteAnswer { note: 1, error: Bytes::from_static(b"why not") };
    seeds.push(("valid_note_answer", send(|o| o.control(answer))));
    seeds.push(("valid_blob", send(|o| o.blob(7, Bytes::from(vec![7; 100_000])))));
    let named = Message { blobs: vec![blob_part(1, 7)], ..message(1, &[b"abc".to_vec()]) };
    seeds.push(("valid_task_with_blob", send(|o| o.message(Body::Task, named))));
    seeds.push(("valid_forget", send(|o| o.control(Control::Forget(vec![7, 8])))));
    let mine =
        Attach { epoch: "e".to_owned(), received: 3, number: 1, blocks: ArrivedBlocks::default(), boot: String::new() };
    seeds.push(("valid_attach", send(|o| o.control(attach(&mine).unwrap()))));
    seeds.push(("valid_reached", send(|o| o.reached(1 << 40))));
    seeds.push(("valid_stripe_block", send(|o| o.control(Control::StripeBlock { number: 9 }))));
    seeds.push(("valid_blocks_arrived", send(|o| o.control(Control::BlocksArrived(vec![7, 9])))));
    for (name, wire) in seeds {
        let seed = [&[250], &wire[..]].concat();
        let path = directory.join(name);
        if std::env::var_os("UPDATE_CORPUS").is_some() {
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(&path, &seed).unwrap();
        }
        let kept = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}; set UPDATE_CORPUS=1", path.display()));
        assert!(kept == seed, "{name} differs from its file: set UPDATE_CORPUS=1");
        assert_eq!(decode(&kept[1..], usize::from(kept[0]) + 1).is_ok(), name.starts_with("valid"), "{name}");
    }
}

malformed! {
    only_noise: vec![b'x'; MAX_NOISE + 64] => FrameError::NoMagic { .. },
    magic_after_too_much_noise: [vec![b'x'; MAX_NOISE + 1], preamble()].concat() => FrameError::NoMagic { .. },
    another_version: [MAGIC.to_vec(), (PROTOCOL + 1).to_le_bytes().to_vec()].concat() => FrameError::Version { .. },
    block_over_the_cap: [preamble(), vec![0xff; 8]].concat() => FrameError::TooLong { what: "block", .. },
    empty_block: [preamble(), vec![0; 8]].concat() => FrameError::TooLong { what: "block", .. },
    raw_block_of_two_lengths: [preamble(), vec![4, 0, 0, 0, 5, 0, 0, 0]].concat() => FrameError::BadBlock { .. },
    packed_block_that_grew: [preamble(), vec![9, 0, 0, 0x80, 5, 0, 0, 0]].concat() => FrameError::BadBlock { .. },
    lz4_garbage: [preamble(), vec![4, 0, 0, 0x80, 40, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]].concat() => FrameError::Lz4(_),
    lz4_offset_before_the_start:
        [preamble(), vec![4, 0, 0, 0x80, 40, 0, 0, 0, 0x10, b'a', 0xff, 0xff]].concat() => FrameError::Lz4(_),
    lz4_shorter_than_declared:
        [preamble(), vec![3, 0, 0, 0x80, 40, 0, 0, 0, 0x20, b'a', b'b']].concat() => FrameError::Lz4(_),
    lz4_bomb: {
        // One literal and a match that repeats it for ever: more than a block may have, under a small declared size.
        let mut bomb = vec![0x1f, b'a', 1, 0];
        bomb.extend(vec![0xff; 4000]);
        bomb.push(0);
        let mut wire = preamble();
        wire.extend((u32::try_from(bomb.len()).unwrap() | 1 << 31).to_le_bytes());
        wire.extend(u32::try_from(MAX_BLOCK).unwrap().to_le_bytes());
        wire.extend(bomb);
        wire
    } => FrameError::Lz4(_),
    half_a_frame_header: block(&[1, 2, 3]) => FrameError::Truncated("frame header"),
    frame_of_4_gib: block(&frame(u32::MAX, TASK, 0, &[])) => FrameError::TooLong { what: "frame", .. },
    frame_over_the_cap: block(&frame(u32::try_from(MAX_BODY).unwrap() + 1, 1, 0, &[0; 100])) => FrameError::TooLong { .. },
    frame_beyond_its_block: block(&frame(50, 1, 0, &[0; 49])) => FrameError::Truncated("frame body"),
    unknown_kind: block(&frame(0, 99, 0, &[])) => FrameError::UnknownKind(99),
    kind_zero: block(&frame(0, 0, 0, &[])) => FrameError::UnknownKind(0),
    unknown_flag: block(&frame(0, TASK, 0x80, &[])) => FrameError::BadFlags(0x80),
    flag_on_a_control_frame: block(&frame(0, 4, FIRST, &[])) => FrameError::BadFlags(FIRST),
    body_where_there_is_none: block(&frame(1, 4, 0, &[0])) => FrameError::BadBody(_),
    abort_with_a_body: block(&frame(1, 13, 0, &[0])) => FrameError::BadBody(_),
    output_over_the_cap: block(&frame(u32::try_from(MAX_BODY).unwrap() + 1, 14, 0, &[0; 100])) => FrameError::TooLong { .. },
    reason_over_the_cap: block(&frame(1025, 15, 0, &[b'x'; 1025])) => FrameError::TooLong { what: "reason", .. },
    answer_over_the_cap: block(&frame(u32::try_from(MAX_BODY).unwrap() + 1, 17, 0, &[0; 100])) => FrameError::TooLong { .. },
    flag_on_an_answer: block(&frame(0, 17, LAST, &[])) => FrameError::BadFlags(LAST),
    note_without_a_beginning: block(&message_frame(16, LAST, &[1])) => FrameError::BadSequence(_),
    note_over_the_cap: block(&message_frame(16, FIRST, &head(0, &[MAX_NOTE as u64, 1]))) => FrameError::TooLong { what: "note", .. },
    short_heartbeat: block(&frame(7, 3, 0, &[0; 7])) => FrameError::BadBody("heartbeat"),
    uneven_acknowledgement: block(&frame(11, 6, 0, &[0; 11])) => FrameError::BadBody("acknowledgement"),
    unknown_tag: block(&message_frame(RESULT, FIRST | LAST, &head(77, &[]))) => FrameError::BadOutcome(77),
    no_message_head: block(&frame(3, TASK, FIRST, &[0; 3])) => FrameError::Truncated("message head"),
    too_many_parts: block(&message_frame(TASK, FIRST, &head(0, &[0; 2000]))) => FrameError::TooLong { what: "list of parts", .. },
    missing_part_lengths: {
        let mut body = head(0, &[1, 1]);
        body.truncate(20);
        block(&message_frame(TASK, FIRST, &body))
    } => FrameError::Truncated("message head"),
    message_over_the_cap: block(&message_frame(TASK, FIRST, &head(0, &[CAP as u64, 1]))) => FrameError::TooLong { what: "message", .. },
    lengths_that_overflow: block(&message_frame(TASK, FIRST, &head(0, &[u64::MAX, 2]))) => FrameError::TooLong { .. },
    message_shorter_than_its_head: block(&message_frame(TASK, FIRST | LAST, &head(0, &[5]))) => FrameError::Truncated("message"),
    message_longer_than_its_head:
        block(&message_frame(TASK, FIRST | LAST, &[head(0, &[1]), vec![0; 2]].concat())) => FrameError::BadBody("message"),
    chunk_longer_than_its_head:
        block(&message_frame(TASK, FIRST, &[head(0, &[1]), vec![0; 2]].concat())) => FrameError::BadBody("message"),
    chunk_without_a_beginning: block(&message_frame(TASK, LAST, &[1])) => FrameError::BadSequence(_),
    message_that_begins_twice: {
        let first = message_frame(TASK, FIRST, &[head(0, &[9]), vec![0; 2]].concat());
        block(&[first.clone(), first].concat())
    } => FrameError::BadSequence(_),
    message_that_ends_early: {
        let first = message_frame(TASK, FIRST, &[head(0, &[9]), vec![0; 2]].concat());
        block(&[first, message_frame(TASK, LAST, &[0])].concat())
    } => FrameError::Truncated("message"),
    too_many_open_messages: {
        let mut wire = preamble();
        let mut packer = Packer::default();
        for task in 0..5000_u64 {
            let mut raw = message_frame(TASK, FIRST, &head(0, &[9]));
            raw[8..16].copy_from_slice(&task.to_le_bytes());
            packer.pack(&raw, &mut wire);
        }
        wire
    } => FrameError::BadSequence(_),
}

/// A message that declares gigabytes and sends a few bytes costs a few bytes.
#[test]
fn declared_sizes_are_not_allocated() {
    let mut decoder = Decoder::new(usize::MAX);
    for task in 0..4000_u64 {
        let mut raw = message_frame(TASK, FIRST, &[head(0, &[1 << 40]), vec![0; 1]].concat());
        raw[8..16].copy_from_slice(&task.to_le_bytes());
        if task == 0 {
            put_preamble_into(&mut decoder);
        }
        let mut wire = Vec::new();
        Packer::default().pack(&raw, &mut wire);
        decoder.buffer().extend_from_slice(&wire);
        assert_eq!(decoder.next().unwrap(), None);
    }
    // 4000 open messages of a declared terabyte each; what was set aside for them is 1 MiB of address space each.
}

fn put_preamble_into(decoder: &mut Decoder) {
    decoder.buffer().extend_from_slice(&preamble());
}

/// A message that is not admitted at its first chunk is read over, checked as any other, and named at its end.
#[test]
fn what_is_not_admitted_is_read_over() {
    let sent = [message(1, &[vec![1; 100_000], vec![]]), message(2, &[vec![2; 100_000]]), message(3, &[vec![3; 10]])];
    let wire = send(|o| sent.iter().for_each(|m| o.message(Body::Result, m.clone())));
    let (mut offers, mut events) = (Vec::new(), Vec::new());
    let mut decoder = Decoder::new(CAP);
    for piece in wire.chunks(1000) {
        decoder.buffer().extend_from_slice(piece);
        let mut admit = |offer: &skyward_lite::wire::Offer| {
            offers.push((offer.body, offer.id.task, offer.size, offer.unfinished));
            Ok(offer.id.task == 2)
        };
        while let Some(event) = decoder.next_admitted(&mut admit).unwrap() {
            events.push(event);
        }
    }
    assert_eq!(offers, [(Body::Result, 1, 100_000, 0), (Body::Result, 2, 100_000, 0)], "one chunk is not offered");
    let skipped = Event::Skipped(Body::Result, sent[0].id);
    let [_, second, third] = sent;
    let whole = |m| Event::Message(Body::Result, m);
    assert_eq!(events, [whole(third), skipped, whole(second)]);

    for (name, lens, chunks, error) in [
        ("shorter", [10_u64], [5_usize, 4], "truncated message"),
        ("longer", [10], [5, 6], "wrong length"),
        ("longer at once", [10], [11, 0], "wrong length"),
    ] {
        let first = message_frame(RESULT, FIRST, &[head(0, &lens), vec![0; chunks[0]]].concat());
        let last = message_frame(RESULT, LAST, &vec![0; chunks[1]]);
        let mut decoder = Decoder::new(CAP);
        decoder.buffer().extend_from_slice(&block(&[first, last].concat()));
        let why = decoder.next_admitted(&mut |_| Ok(false)).expect_err(name).to_string();
        assert!(why.contains(error), "{name}: {why}");
    }
}

/// An offer tells the bytes of the messages that are admitted and not complete.
#[test]
fn unfinished_messages_are_summed_up() {
    let mut decoder = Decoder::new(CAP);
    decoder.buffer().extend_from_slice(&preamble());
    let mut sums = Vec::new();
    for (task, flags, size, bytes) in
        [(1_u64, FIRST, 7, 1), (2, FIRST, 5, 1), (1, LAST, 0, 6), (3, FIRST, 1, 0), (2, LAST, 0, 4), (4, FIRST, 2, 0)]
    {
        let body = if flags == FIRST { [head(0, &[size]), vec![0; bytes]].concat() } else { vec![0; bytes] };
        let mut raw = message_frame(RESULT, flags, &body);
        raw[8..16].copy_from_slice(&task.to_le_bytes());
        let mut wire = Vec::new();
        Packer::default().pack(&raw, &mut wire);
        decoder.buffer().extend_from_slice(&wire);
        let mut admit = |offer: &skyward_lite::wire::Offer| {
            sums.push(offer.unfinished);
            Ok(true)
        };
        assert_eq!(decoder.next_admitted(&mut admit).unwrap().is_some(), flags == LAST);
    }
    assert_eq!(sums, [0, 7, 5, 1]);
}
