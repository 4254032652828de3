//! Streams of frames: honest ones, from an outbox, and such as their sender would have to lie to make.
#![allow(dead_code)] // not every test needs all of it

use bytes::Bytes;
use skyward_lite::error::FrameError;
use skyward_lite::wire::{Attempt, Decoder, Event, Message, Outbox, Packer, put_preamble};

pub const CAP: usize = 64 << 20;
pub const TASK: u8 = 11;
pub const RESULT: u8 = 12;
pub const FIRST: u8 = 1;
pub const LAST: u8 = 2;

/// A message of these parts.
pub fn message(task: u64, parts: &[Vec<u8>]) -> Message {
    let parts = parts.iter().map(|p| Bytes::from(p.clone())).collect();
    Message { id: Attempt { task, attempt: 1 }, nanos: 7, parts, ..Message::default() }
}

/// The bytes that an outbox sends that was filled so.
pub fn send(fill: impl FnOnce(&mut Outbox)) -> Vec<u8> {
    let mut outbox = Outbox::default();
    fill(&mut outbox);
    let mut wire = Vec::new();
    while !outbox.is_empty() {
        outbox.fill(&mut wire).unwrap();
    }
    wire
}

/// The events of a stream that arrives in pieces of `step` bytes.
pub fn decode(wire: &[u8], step: usize) -> Result<Vec<Event>, FrameError> {
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

pub fn preamble() -> Vec<u8> {
    let mut wire = Vec::new();
    put_preamble(&mut wire);
    wire
}

/// A stream of one block.
pub fn block(raw: &[u8]) -> Vec<u8> {
    let mut wire = preamble();
    Packer::default().pack(raw, &mut wire);
    wire
}

/// A frame as its sender would have to lie to make it.
pub fn frame(len: u32, kind: u8, flags: u8, body: &[u8]) -> Vec<u8> {
    let mut raw = len.to_le_bytes().to_vec();
    raw.extend([kind, flags, 0, 0]);
    raw.extend(9_u64.to_le_bytes());
    raw.extend(body);
    raw
}

/// The head of a message with parts of these lengths.
pub fn head(code: u8, lens: &[u64]) -> Vec<u8> {
    let mut head = vec![code, 0];
    head.extend(u16::try_from(lens.len()).unwrap().to_le_bytes());
    head.extend([0; 20]);
    for len in lens {
        head.extend(len.to_le_bytes());
    }
    head
}

/// A chunk of the message 9.
pub fn message_frame(kind: u8, flags: u8, body: &[u8]) -> Vec<u8> {
    frame(u32::try_from(body.len()).unwrap(), kind, flags, body)
}
