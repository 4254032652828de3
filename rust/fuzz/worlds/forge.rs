//! Frames that a peer may send, and those that only a broken one does.

use skyward_lite::error::FrameError;
use skyward_lite::wire::{
    Admit, Attempt, Control, Decoder, Event, MAX_BLOCK, MAX_CHUNK, Outcome, Packer, put_preamble,
};

use super::script::Script;

/// The kinds of frames that have a form of their own.
const HELLO: u8 = 1;
const HEARTBEAT: u8 = 3;
const ACKNOWLEDGE: u8 = 6;
const TASK: u8 = 11;
const RESULT: u8 = 12;
const OUTPUT: u8 = 14;
const DRAIN: u8 = 15;
const NOTE: u8 = 16;
const NOTE_ANSWER: u8 = 17;
const BLOB_CHUNK: u8 = 18;
const FORGET: u8 = 19;
const DESCRIPTOR: u8 = 22;
const BLOCKS_ARRIVED: u8 = 26;
const ANSWER: u8 = 27;
const RUNNING: u8 = 28;
/// Kinds up to here are tried; the last ones are unknown.
const KINDS: u8 = 30;
/// Events, and bytes of them, that a session handles at once: as in `wire/stream.rs`.
const EVENTS_PER_READ: usize = 1024;
const BYTES_PER_READ: usize = 1024 * 1024;

/// A stream from a peer: what it has sent, as far as it has arrived, and the decoder of its reader.
pub struct Stream {
    decoder: Decoder,
    packer: Packer,
    /// Bytes that were sent and have not arrived.
    under_way: Vec<u8>,
    /// The hello has arrived.
    pub greeted: bool,
}

/// What a peer's reader found: events, or an error that ends the session.
pub type Read = Result<Vec<Event>, FrameError>;

impl Stream {
    pub fn new(max_message: usize, script: &mut Script<'_>) -> Self {
        let mut under_way = if script.breaks(16) { script.bytes(40).to_vec() } else { Vec::new() };
        put_preamble(&mut under_way);
        Self { decoder: Decoder::new(max_message), packer: Packer::default(), under_way, greeted: false }
    }

    /// Send these frames as one block, or what becomes of a block on a broken way.
    pub fn send(&mut self, raw: &[u8], script: &mut Script<'_>) {
        let begin = self.under_way.len();
        if raw.is_empty() || raw.len() > MAX_BLOCK {
            return;
        }
        self.packer.pack(raw, &mut self.under_way);
        if !script.breaks(32) {
            return;
        }
        let at = begin + usize::from(script.byte()) % (self.under_way.len() - begin);
        match script.byte() % 4 {
            0 => self.under_way[at] ^= script.byte() | 1,
            1 => self.under_way.truncate(at),
            // A block that claims to be compressed and to be large.
            2 => {
                let bytes = script.bytes(64);
                let wire = u32::try_from(bytes.len()).unwrap() | 1 << 31;
                self.under_way.truncate(begin);
                self.under_way.extend(wire.to_le_bytes());
                self.under_way.extend(u32::try_from(MAX_BLOCK).unwrap().to_le_bytes());
                self.under_way.extend(bytes);
            }
            _ => self.under_way.extend(script.bytes(24)),
        }
    }

    /// Send one control frame.
    pub fn control(&mut self, control: &Control, script: &mut Script<'_>) {
        let mut raw = Vec::new();
        if control.put(&mut raw).is_ok() {
            self.send(&raw, script);
        }
    }

    /// Let bytes arrive: all of them, or some.
    pub fn arrive(&mut self, script: &mut Script<'_>) {
        let count = if script.rarely(8) { usize::from(script.byte()) } else { self.under_way.len() };
        let later = self.under_way.split_off(count.min(self.under_way.len()));
        self.decoder.buffer().extend_from_slice(&std::mem::replace(&mut self.under_way, later));
    }

    /// Return as many events as a session reads at once; an empty list when more bytes are needed.
    pub fn read(&mut self, admit: &mut Admit<'_>) -> Read {
        let (mut events, mut bytes) = (Vec::new(), 0);
        let most = if self.greeted { EVENTS_PER_READ } else { 1 };
        while events.len() < most && bytes < BYTES_PER_READ {
            match self.decoder.next_admitted(admit) {
                Ok(Some(Event::Control(Control::Received { .. }))) if self.greeted => {}
                Ok(Some(event)) => {
                    bytes += event.size();
                    events.push(event);
                }
                Ok(None) => break,
                // What came before the error counts.
                Err(_) if !events.is_empty() => break,
                Err(why) => {
                    assert!(!why.to_string().is_empty());
                    return Err(why);
                }
            }
        }
        Ok(events)
    }
}

/// What a peer knows, so that its frames are about something.
#[derive(Default)]
pub struct Known {
    pub ids: Vec<Attempt>,
    pub numbers: Vec<u64>,
    /// The kinds that this peer sends when it is honest.
    pub kinds: &'static [u8],
}

fn frame(raw: &mut Vec<u8>, kind: u8, flags: u8, id: Attempt, body: &[u8]) {
    raw.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
    raw.extend([kind, flags]);
    raw.extend(id.attempt.to_le_bytes());
    raw.extend(id.task.to_le_bytes());
    raw.extend(body);
}

fn id(known: &Known, script: &mut Script<'_>) -> Attempt {
    if script.breaks(16) {
        return Attempt { task: script.u64(), attempt: u16::from(script.byte()) };
    }
    let mut id = script.pick(&known.ids).unwrap_or_default();
    if script.breaks(16) {
        id.attempt ^= 1;
    }
    id
}

fn number(known: &Known, script: &mut Script<'_>) -> u64 {
    if script.breaks(8) {
        return if script.rarely(2) { script.u64() } else { u64::from(script.byte()) };
    }
    script.pick(&known.numbers).unwrap_or(1)
}

/// Return a length that a peer declares: mostly a small one.
fn length(script: &mut Script<'_>) -> u64 {
    if !script.breaks(10) {
        return u64::from(script.byte() % 32);
    }
    match script.byte() % 3 {
        0 => script.u64(),
        1 => 1 << (script.byte() % 64),
        _ => u64::from(script.byte()) * 1024,
    }
}

/// Append a chunk of a message, which is mostly the only one.
fn message(raw: &mut Vec<u8>, kind: u8, known: &Known, script: &mut Script<'_>) {
    let id = if matches!(kind, NOTE | ANSWER) {
        Attempt { task: number(known, script), attempt: 0 }
    } else {
        id(known, script)
    };
    let flags = if script.breaks(4) { script.byte() % 8 } else { 3 };
    let mut body = Vec::new();
    let mut payload = 0;
    if flags & 1 != 0 {
        let code = if script.breaks(4) { script.byte() } else { script.byte() % 2 };
        let (parts, blobs) = (script.below(4), script.below(8).saturating_sub(5) * usize::from(kind == TASK));
        let lengths: Vec<u64> = (0..parts).map(|_| length(script)).collect();
        payload = lengths.iter().fold(0, |sum: u64, length| sum.saturating_add(*length));
        body.extend([code, u8::try_from(blobs).unwrap()]);
        body.extend(u16::try_from(parts).unwrap().to_le_bytes());
        body.extend(u32::from(script.byte() % 2).to_le_bytes());
        body.extend(u32::from(script.byte()).to_le_bytes());
        body.extend(u32::from(script.byte()).to_le_bytes());
        body.extend((u64::from(script.byte()) << 20).to_le_bytes());
        body.extend(lengths.iter().flat_map(|length| length.to_le_bytes()));
        for place in 0..blobs {
            body.extend(u16::try_from(place).unwrap().to_le_bytes());
            body.extend(number(known, script).to_le_bytes());
        }
    }
    let room = usize::try_from(payload).unwrap_or(usize::MAX).min(MAX_CHUNK);
    let bytes = if script.breaks(8) { usize::from(script.byte()) } else { room };
    body.resize(body.len() + bytes, 7);
    frame(raw, kind, flags, id, &body);
}

/// Append a frame of the body that belongs to its kind; rarely one of another body.
fn control(raw: &mut Vec<u8>, kind: u8, known: &Known, script: &mut Script<'_>) {
    let about = id(known, script);
    let mut body = Vec::new();
    match kind {
        HEARTBEAT => {
            body.extend(number(known, script).to_le_bytes());
            body.extend(number(known, script).to_le_bytes());
        }
        DESCRIPTOR => body.extend(number(known, script).to_le_bytes()),
        ACKNOWLEDGE | RUNNING => {
            for _ in 0..script.below(6) {
                let id = id(known, script);
                body.extend(id.task.to_le_bytes());
                body.extend(id.attempt.to_le_bytes());
            }
        }
        FORGET | BLOCKS_ARRIVED => (0..script.below(4)).for_each(|_| body.extend(number(known, script).to_le_bytes())),
        OUTPUT | DRAIN | NOTE_ANSWER => body.extend(script.some(12)),
        BLOB_CHUNK => {
            let (offset, total) = (length(script), length(script));
            body.extend(offset.to_le_bytes());
            body.extend(total.max(offset).to_le_bytes());
            let rest = usize::try_from(total.saturating_sub(offset)).unwrap_or(usize::MAX);
            body.resize(16 + rest.min(MAX_CHUNK), 5);
        }
        _ => {}
    }
    let number_is_id =
        matches!(kind, HEARTBEAT | OUTPUT | NOTE_ANSWER | BLOB_CHUNK | DESCRIPTOR | 2 | 4 | 20 | 21 | 24 | 25);
    let about = if number_is_id { Attempt { task: number(known, script), attempt: 0 } } else { about };
    if script.breaks(64) {
        body.extend(script.bytes(12));
    }
    frame(raw, kind, u8::from(script.breaks(64)), about, &body);
}

/// Return the frames of these controls.
pub fn controls(controls: impl IntoIterator<Item = Control>) -> Vec<u8> {
    let mut raw = Vec::new();
    controls.into_iter().for_each(|control| control.put(&mut raw).unwrap());
    raw
}

/// Return the frame of a task that names these blobs, as an honest client sends it.
pub fn task(id: Attempt, generation: u32, blobs: &[u64]) -> Vec<u8> {
    let mut body = vec![0, u8::try_from(blobs.len()).unwrap(), 0, 0];
    body.extend(generation.to_le_bytes());
    body.resize(24, 0);
    for (place, number) in (0_u16..).zip(blobs) {
        body.extend(place.to_le_bytes());
        body.extend(number.to_le_bytes());
    }
    let mut raw = Vec::new();
    frame(&mut raw, TASK, 3, id, &body);
    raw
}

/// Return the frame of an answer to a note.
pub fn answer(note: u64) -> Vec<u8> {
    let mut raw = Vec::new();
    frame(&mut raw, ANSWER, 3, Attempt { task: note, attempt: 0 }, &[0; 24]);
    raw
}

/// Return the frame of a chunk of a blob: as many bytes as `bytes` from `offset` on.
pub fn chunk(number: u64, offset: u64, total: u64, bytes: &[u8]) -> Vec<u8> {
    let mut body = offset.to_le_bytes().to_vec();
    body.extend(total.to_le_bytes());
    body.extend(bytes);
    let mut raw = Vec::new();
    frame(&mut raw, BLOB_CHUNK, 0, Attempt { task: number, attempt: 0 }, &body);
    raw
}

/// Return the frame of a result as an honest node sends it.
pub fn result(id: Attempt, outcome: Outcome, bytes: usize) -> Vec<u8> {
    let mut body = vec![outcome as u8, 0, 1, 0];
    body.extend(0_u32.to_le_bytes());
    body.extend(0_u64.to_le_bytes());
    body.extend((bytes as u64).to_le_bytes());
    body.resize(body.len() + bytes, b'x');
    let mut raw = Vec::new();
    frame(&mut raw, RESULT, 3, id, &body);
    raw
}

/// Forge the frames of one block.
pub fn frames(known: &Known, script: &mut Script<'_>) -> Vec<u8> {
    let mut raw = Vec::new();
    for _ in 0..=script.below(4) {
        let kind = if script.breaks(12) { script.byte() % KINDS } else { script.pick(known.kinds).unwrap_or_default() };
        match kind {
            TASK | RESULT | NOTE | ANSWER => message(&mut raw, kind, known, script),
            HELLO => frame(&mut raw, HELLO, 0, Attempt::default(), script.some(40)),
            _ => control(&mut raw, kind, known, script),
        }
    }
    if script.breaks(64) && !raw.is_empty() {
        // Few bytes on the wire, many frames behind lz4.
        let times = (MAX_BLOCK / raw.len()).min(1 << (script.byte() % 14));
        raw = raw.repeat(times.max(1));
    }
    raw
}
