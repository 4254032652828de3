//! What begins a stream and what begins a frame: the preamble, the frame header, and the caps of both.
//!
//! ```text
//! stream  = preamble block*
//! preamble= magic (16 bytes) version (u32)      bytes before the magic are what a login shell printed
//! block   = wire_len (u32, top bit: lz4) raw_len (u32) bytes[wire_len]
//! raw     = frame*                              a frame never straddles two blocks
//! frame   = len (u32) kind (u8) flags (u8) attempt (u16) task (u64) body[len]
//! ```
//!
//! All integers are little-endian.

use bytes::{Buf, Bytes, BytesMut};

use crate::error::FrameError;
use crate::text;

/// Marks where our protocol begins in a stream that a login shell may have written to before.
pub const MAGIC: [u8; 16] = *b"\0SKYWARD-LITE\r\n\0";
/// Version of everything in this folder. Both ends must have the same.
pub const PROTOCOL: u32 = 6;
/// Bytes of banner, MOTD or `.bashrc` output that are skipped before the magic.
pub const MAX_NOISE: usize = 64 * 1024;
/// Cap of a frame's body, in bytes.
pub const MAX_BODY: usize = 64 * 1024;
/// Payload bytes in a chunk, which is what a small task may have to wait for. With the header and the head it fits the
/// packets of OpenSSH and of russh, 32 KiB.
pub const MAX_CHUNK: usize = 32 * 1024 - 64;
/// Bytes of a frame's header.
pub const FRAME_HEADER: usize = 16;
/// The flag of a message's first chunk.
pub const FIRST: u8 = 1;
/// The flag of a message's last chunk.
pub const LAST: u8 = 2;

/// Names one try at one task.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Attempt {
    pub task: u64,
    pub attempt: u16,
}

/// A frame's header but for the length of its body. Only chunks of messages have flags.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    pub kind: u8,
    pub flags: u8,
    /// In frames that are not about a task, `id.task` is a number of another meaning: see [`super::Control`].
    pub id: Attempt,
}

impl Header {
    /// Append the header of a frame whose body has `len` bytes.
    pub fn put(self, len: usize, out: &mut Vec<u8>) {
        // Every caller stays under MAX_BODY, which fits.
        out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(&[self.kind, self.flags]);
        out.extend_from_slice(&self.id.attempt.to_le_bytes());
        out.extend_from_slice(&self.id.task.to_le_bytes());
    }

    /// Correct the length and the flags of a header that was put at `at`, now that the body behind it is complete.
    pub fn complete(at: usize, flags: u8, out: &mut [u8]) {
        let len = u32::try_from(out.len() - at - FRAME_HEADER).unwrap_or(u32::MAX);
        if let Some(header) = out.get_mut(at..at + FRAME_HEADER) {
            for (to, from) in header.iter_mut().zip(len.to_le_bytes()) {
                *to = from;
            }
            if let Some(byte) = header.get_mut(5) {
                *byte = flags;
            }
        }
    }

    /// Take the next frame off a block's raw bytes: its header and its body.
    #[inline]
    pub fn read(block: &mut Bytes) -> Result<(Self, Bytes), FrameError> {
        if block.len() < FRAME_HEADER {
            return Err(FrameError::Truncated("frame header"));
        }
        let len = block.get_u32_le() as usize;
        let kind = block.get_u8();
        let flags = block.get_u8();
        let attempt = block.get_u16_le();
        let task = block.get_u64_le();
        if len > MAX_BODY {
            return Err(FrameError::TooLong { what: "frame", len, cap: MAX_BODY });
        }
        if len > block.len() {
            return Err(FrameError::Truncated("frame body"));
        }
        Ok((Self { kind, flags, id: Attempt { task, attempt } }, block.split_to(len)))
    }
}

/// Write the preamble that opens each direction of a stream.
pub fn put_preamble(out: &mut Vec<u8>) {
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&PROTOCOL.to_le_bytes());
}

/// Looks for the preamble in the first bytes of a stream.
#[derive(Debug, Default)]
pub struct PreambleReader {
    found: bool,
    /// Bytes at the beginning of the input in which the magic does not begin. Grows while the magic is looked for.
    searched: usize,
    /// The bytes before the magic, set when it was found.
    noise: Vec<u8>,
}

impl PreambleReader {
    /// Take the preamble and the noise before it off `input`. Return whether it has been found, now or before.
    pub fn read(&mut self, input: &mut BytesMut) -> Result<bool, FrameError> {
        if self.found {
            return Ok(true);
        }
        let rest = input.get(self.searched..).unwrap_or_default();
        let Some(at) = rest.windows(MAGIC.len()).position(|w| w == MAGIC).map(|at| at + self.searched) else {
            self.searched = input.len().saturating_sub(MAGIC.len() - 1);
            if input.len() > MAX_NOISE + MAGIC.len() {
                return Err(FrameError::NoMagic { skipped: input.len(), text: self.noise(input) });
            }
            return Ok(false);
        };
        if at > MAX_NOISE {
            return Err(FrameError::NoMagic { skipped: at, text: self.noise(input) });
        }
        if input.len() < at + MAGIC.len() + 4 {
            return Ok(false);
        }
        self.noise = input.split_to(at).to_vec();
        input.advance(MAGIC.len());
        let theirs = input.get_u32_le();
        if theirs != PROTOCOL {
            return Err(FrameError::Version { ours: PROTOCOL, theirs });
        }
        self.found = true;
        Ok(true)
    }

    /// Return what the peer printed before the protocol began, for error messages. `input`: what was not read yet.
    pub fn noise(&self, input: &[u8]) -> String {
        let noise = if self.found { &self.noise[..] } else { input };
        text::lines(noise.trim_ascii(), text::LIMIT)
    }
}
