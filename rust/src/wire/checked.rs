//! A byte stream in chunks with a hash each, for ways that do not protect what they carry, as SSH does: the standard streams of
//! any command. A chunk that was changed, lost or doubled on its way ends the stream with an error, and the session goes on over
//! another one with what has not arrived.
//!
//! A chunk is its [`MARK`], the number of its bytes, their hash, and the bytes. The hash depends on the chunk's place in the
//! stream. The client begins, and its agent answers alike: it knows the stream by the first mark, see [`answer`].

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use twox_hash::XxHash3_64;

/// Begins each chunk. It is no text, so no banner has it.
const MARK: [u8; 4] = [0xf5, b'S', b'k', 0xf8];
/// Bytes of a chunk's head: the mark, the number of its bytes and the hash.
const HEAD: usize = 16;
/// Bytes of a chunk, at most.
const MAX_BYTES: usize = 32 * 1024;
/// Bytes per read.
const READ_BYTES: usize = 64 * 1024;

/// What a reader takes the next bytes for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// The first bytes decide whether there are chunks.
    Unknown,
    /// Before the first chunk may come what a shell prints, which is passed on as it is.
    Noise,
    Plain,
    Chunks,
}

/// Return the streams of a client, which writes in chunks and expects them.
pub fn ask<R, W>(reading: R, writing: W) -> (CheckedReader<R>, CheckedWriter<W>) {
    let is_checked = Arc::new(AtomicBool::new(true));
    (CheckedReader::new(reading, Mode::Noise, Arc::clone(&is_checked)), CheckedWriter::new(writing, is_checked))
}

/// Return the streams of an agent, which writes as its client does: in chunks, or as it is.
pub fn answer<R, W>(reading: R, writing: W) -> (CheckedReader<R>, CheckedWriter<W>) {
    let is_checked = Arc::new(AtomicBool::new(false));
    (CheckedReader::new(reading, Mode::Unknown, Arc::clone(&is_checked)), CheckedWriter::new(writing, is_checked))
}

/// Takes the bytes out of chunks.
#[derive(Debug)]
pub struct CheckedReader<R> {
    stream: R,
    mode: Mode,
    /// Set when the first chunk has come.
    is_checked: Arc<AtomicBool>,
    /// Where bytes are read to.
    space: Box<[u8]>,
    /// What was read and is not decided about.
    raw: BytesMut,
    /// What is right and was not asked for yet.
    ready: BytesMut,
    /// Chunks so far.
    chunks: u64,
}

impl<R> CheckedReader<R> {
    fn new(stream: R, mode: Mode, is_checked: Arc<AtomicBool>) -> Self {
        let space = vec![0; READ_BYTES].into_boxed_slice();
        Self { stream, mode, is_checked, space, raw: BytesMut::new(), ready: BytesMut::new(), chunks: 0 }
    }

    /// Move what is right from `raw` to `ready`. Return false if more must be read for that.
    fn decide(&mut self) -> io::Result<bool> {
        match self.mode {
            Mode::Unknown => {
                let is_mark = self.raw.iter().zip(&MARK).all(|(byte, mark)| byte == mark);
                if is_mark && self.raw.len() < MARK.len() {
                    return Ok(false);
                }
                self.is_checked.store(is_mark, Relaxed);
                self.mode = if is_mark { Mode::Chunks } else { Mode::Plain };
                if !is_mark {
                    // From now on the bytes are read to where they are wanted.
                    self.space = Box::default();
                }
                Ok(true)
            }
            Mode::Noise => {
                let mark = self.raw.windows(MARK.len()).position(|window| window == MARK);
                // Its last bytes may be the beginning of a mark.
                let begun = (1..MARK.len()).rev().find(|&count| self.raw.ends_with(MARK.get(..count).unwrap_or(&MARK)));
                let noise = mark.unwrap_or_else(|| self.raw.len() - begun.unwrap_or(0));
                self.ready = self.raw.split_to(noise);
                if mark.is_some() {
                    self.mode = Mode::Chunks;
                }
                Ok(mark.is_some() || noise > 0)
            }
            Mode::Plain => {
                self.ready = self.raw.split();
                Ok(!self.ready.is_empty())
            }
            Mode::Chunks => self.take_chunk(),
        }
    }

    fn take_chunk(&mut self) -> io::Result<bool> {
        let Some(mut head) = self.raw.get(..HEAD) else { return Ok(false) };
        let is_mark = head.starts_with(&MARK);
        head.advance(MARK.len());
        let (count, hash) = (head.get_u32_le() as usize, head.get_u64_le());
        if !is_mark || count > MAX_BYTES {
            return Err(changed());
        }
        let Some(bytes) = self.raw.get(HEAD..HEAD + count) else { return Ok(false) };
        if XxHash3_64::oneshot_with_seed(self.chunks, bytes) != hash {
            return Err(changed());
        }
        self.chunks += 1;
        self.raw.advance(HEAD);
        self.ready = self.raw.split_to(count);
        Ok(true)
    }
}

fn changed() -> io::Error {
    let why = "bytes were changed, lost or doubled on their way, by the command that leads to the machine or behind it";
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl<R: AsyncRead + Unpin> AsyncRead for CheckedReader<R> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if !this.ready.is_empty() {
                let count = this.ready.len().min(buf.remaining());
                buf.put_slice(&this.ready.split_to(count));
                return Poll::Ready(Ok(()));
            }
            if this.mode == Mode::Plain && this.raw.is_empty() {
                return Pin::new(&mut this.stream).poll_read(cx, buf);
            }
            if !this.raw.is_empty() && this.decide()? {
                continue;
            }
            let mut space = ReadBuf::new(&mut this.space);
            let read = ready!(Pin::new(&mut this.stream).poll_read(cx, &mut space));
            if read.is_err() || space.filled().is_empty() {
                // Noise to its end is passed on. Of a chunk that is not complete nothing is.
                if this.mode == Mode::Chunks || this.raw.is_empty() {
                    return Poll::Ready(read);
                }
                this.ready = this.raw.split();
                continue;
            }
            this.raw.extend_from_slice(space.filled());
        }
    }
}

/// Puts bytes into chunks. What was written is sent at the latest when it is flushed.
#[derive(Debug)]
pub struct CheckedWriter<W> {
    stream: W,
    is_checked: Arc<AtomicBool>,
    /// A chunk that is not sent yet.
    pending: BytesMut,
    /// Chunks so far.
    chunks: u64,
}

impl<W> CheckedWriter<W> {
    fn new(stream: W, is_checked: Arc<AtomicBool>) -> Self {
        Self { stream, is_checked, pending: BytesMut::new(), chunks: 0 }
    }
}

impl<W: AsyncWrite + Unpin> CheckedWriter<W> {
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.pending.is_empty() {
            let count = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.pending))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.pending.advance(count);
        }
        Poll::Ready(Ok(()))
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for CheckedWriter<W> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        ready!(this.poll_send(cx))?;
        if !this.is_checked.load(Relaxed) {
            return Pin::new(&mut this.stream).poll_write(cx, buf);
        }
        let bytes = buf.get(..MAX_BYTES).unwrap_or(buf);
        this.pending.reserve(HEAD + bytes.len());
        this.pending.put_slice(&MARK);
        this.pending.put_u32_le(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        this.pending.put_u64_le(XxHash3_64::oneshot_with_seed(this.chunks, bytes));
        this.pending.put_slice(bytes);
        this.chunks += 1;
        if let Poll::Ready(Err(error)) = this.poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
