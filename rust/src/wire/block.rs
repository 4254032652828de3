//! Blocks: the raw bytes of whole frames, compressed with lz4 where that pays. Written and read.

use bytes::{Buf, Bytes, BytesMut};
use lz4_flex::block as lz4;

use crate::error::FrameError;

/// Cap of a block's decompressed size, in bytes; bounds what a declared size can make us allocate.
pub const MAX_BLOCK: usize = 256 * 1024;
/// A block of fewer bytes is sent raw: setting up lz4's table costs more than compression saves.
const MIN_COMPRESSED: usize = 512;
/// At most this many blocks are sent raw without a new try at compression, after a run of incompressible ones.
const MAX_SKIPPED_BLOCKS: u32 = 63;

const BLOCK_HEADER: usize = 8;
const LZ4_BIT: u32 = 1 << 31;

/// Wraps raw bytes into blocks, compressing while that pays.
///
/// A block that lz4 cannot shrink by an eighth is sent raw, and the next 1, 3, 7 … 63 blocks are sent raw without a
/// try.
#[derive(Default)]
pub struct Packer {
    table: lz4::CompressTable,
    /// Blocks that are still to be sent without a try.
    skip: u32,
    /// What `skip` began with after the last try; 0 after one that succeeded.
    backoff: u32,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").field("skip", &self.skip).finish_non_exhaustive()
    }
}

impl Packer {
    /// Append `raw` (at most [`MAX_BLOCK`] bytes of whole frames) to `out` as one block.
    pub fn pack(&mut self, raw: &[u8], out: &mut Vec<u8>) {
        let raw_len = u32::try_from(raw.len()).unwrap_or(u32::MAX).to_le_bytes();
        let at = out.len();
        if raw.len() >= MIN_COMPRESSED {
            if self.skip > 0 {
                self.skip -= 1;
            } else {
                out.resize(at + BLOCK_HEADER + lz4::get_maximum_output_size(raw.len()), 0);
                let room = out.get_mut(at + BLOCK_HEADER..).unwrap_or_default();
                let packed = lz4::compress_into_with_table(raw, room, &mut self.table).unwrap_or(usize::MAX);
                if packed < raw.len() - raw.len() / 8 {
                    self.backoff = 0;
                    out.truncate(at + BLOCK_HEADER + packed);
                    let wire = u32::try_from(packed).unwrap_or(0) | LZ4_BIT;
                    let header = wire.to_le_bytes().into_iter().chain(raw_len);
                    for (to, from) in out.iter_mut().skip(at).zip(header) {
                        *to = from;
                    }
                    return;
                }
                out.truncate(at);
                self.backoff = (self.backoff * 2 + 1).min(MAX_SKIPPED_BLOCKS);
                self.skip = self.backoff;
            }
        }
        out.extend_from_slice(&raw_len);
        out.extend_from_slice(&raw_len);
        out.extend_from_slice(raw);
    }
}

/// Take the next block off `input` and return its raw bytes; `None` if it has not arrived in full.
pub fn unpack(input: &mut BytesMut) -> Result<Option<Bytes>, FrameError> {
    let mut header = input.as_ref();
    if header.len() < BLOCK_HEADER {
        return Ok(None);
    }
    let wire = header.get_u32_le();
    let raw_len = header.get_u32_le() as usize;
    let packed = wire & LZ4_BIT != 0;
    let wire_len = (wire & !LZ4_BIT) as usize;
    if raw_len > MAX_BLOCK || raw_len == 0 {
        return Err(FrameError::TooLong { what: "block", len: raw_len, cap: MAX_BLOCK });
    }
    if wire_len > raw_len || (!packed && wire_len != raw_len) {
        return Err(FrameError::BadBlock { wire_len, raw_len });
    }
    if input.len() < BLOCK_HEADER + wire_len {
        input.reserve(BLOCK_HEADER + wire_len - input.len());
        return Ok(None);
    }
    input.advance(BLOCK_HEADER);
    let wire = input.split_to(wire_len);
    if !packed {
        return Ok(Some(wire.freeze()));
    }
    let mut raw = vec![0; raw_len];
    let unpacked = lz4::decompress_into(&wire, &mut raw).map_err(|e| FrameError::Lz4(e.to_string()))?;
    if unpacked != raw_len {
        return Err(FrameError::Lz4(format!("{unpacked} bytes where {raw_len} were declared")));
    }
    Ok(Some(Bytes::from(raw)))
}
