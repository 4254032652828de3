//! The codec: what goes in comes out, and what is malformed is named before memory is spent on it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::expect_used, clippy::panic)]
#![allow(clippy::cast_possible_truncation)]

use bytes::Bytes;
use proptest::prelude::*;
use skyward_lite::error::{FrameError, SessionError};
use skyward_lite::timing::{MAX_ANSWERS, OUTPUT_HEAD, OUTPUT_TAIL};
use skyward_lite::wire::flood::{Flood, Piece};
use skyward_lite::wire::{
    Attempt, Body, Control, Decoder, Event, MAGIC, MAX_BLOCK, MAX_BODY, MAX_CHUNK, MAX_NOISE, MAX_NOTE, MAX_REASON,
    MAX_UNFINISHED, Message, Outcome, Outgoing, PROTOCOL, Packer, put_preamble,
};
use skyward_lite::wire::{EventReader, FrameSender, LEFT_OUT, MAX_OUTPUT_FRAME, Outbox};

const CAP: usize = 64 << 20;

fn message(task: u64, parts: &[Vec<u8>]) -> Message {
    let parts = parts.iter().map(|p| Bytes::from(p.clone())).collect();
    Message { id: Attempt { task, attempt: 1 }, code: 0, nanos: 7, parts }
}

fn send(fill: impl FnOnce(&mut Outbox)) -> Vec<u8> {
    let mut outbox = Outbox::default();
    fill(&mut outbox);
    let mut wire = Vec::new();
    while !outbox.is_empty() {
        outbox.fill(&mut wire).unwrap();
    }
    wire
}

fn decode(wire: &[u8], step: usize) -> Result<Vec<Event>, FrameError> {
    let mut decoder = Decoder::new(CAP);
    let mut events = Vec::new();
    for piece in wire.chunks(step) {
        decoder.buffer().extend_from_slice(piece);
        while let Some(event) = decoder.next()? {
            events.push(event);
        }
    }
    Ok(events)
}

fn preamble() -> Vec<u8> {
    let mut wire = Vec::new();
    put_preamble(&mut wire);
    wire
}

fn block(raw: &[u8]) -> Vec<u8> {
    let mut wire = preamble();
    Packer::default().pack(raw, &mut wire);
    wire
}

/// A frame as its sender would have to lie to make it.
fn frame(len: u32, kind: u8, flags: u8, body: &[u8]) -> Vec<u8> {
    let mut raw = len.to_le_bytes().to_vec();
    raw.extend([kind, flags, 0, 0]);
    raw.extend(9_u64.to_le_bytes());
    raw.extend(body);
    raw
}

fn head(code: u8, lens: &[u64]) -> Vec<u8> {
    let mut head = vec![code, 0];
    head.extend(u16::try_from(lens.len()).unwrap().to_le_bytes());
    head.extend(0_u64.to_le_bytes());
    for len in lens {
        head.extend(len.to_le_bytes());
    }
    head
}

fn message_frame(kind: u8, flags: u8, body: &[u8]) -> Vec<u8> {
    frame(u32::try_from(body.len()).unwrap(), kind, flags, body)
}

const TASK: u8 = 11;
const RESULT: u8 = 12;
const FIRST: u8 = 1;
const LAST: u8 = 2;

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
            o.control(Control::Heartbeat { nonce: 1, lease_ms: 2 });
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
        Control::Heartbeat { nonce: 3, lease_ms: u64::MAX },
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
        Control::Goodbye(Bytes::from_static(b"why")),
    ];
    let wire = send(|o| all.iter().for_each(|c| o.control(c.clone())));
    let events = decode(&wire, 5).unwrap();
    assert_eq!(events, all.into_iter().map(Event::Control).collect::<Vec<_>>());
}

/// A reason that is too long is refused where it is written, too.
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
    seeds.push(("valid_control", send(|o| o.control(Control::Heartbeat { nonce: 1, lease_ms: 2 }))));
    seeds.push(("valid_drain", send(|o| o.control(Control::Drain(Bytes::from_static(b"notice"))))));
    seeds.push(("valid_note", send(|o| o.message(Body::Note, message(1, &[b"abc".to_vec()])))));
    let answer = Control::NoteAnswer { note: 1, error: Bytes::from_static(b"why not") };
    seeds.push(("valid_note_answer", send(|o| o.control(answer))));
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
