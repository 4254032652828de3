//! A byte stream in chunks with a hash each, for ways that do not protect what they carry, as SSH does: the standard streams of
//! any command. A chunk that was changed, lost or doubled on its way ends the stream with an error, and the session goes on over
//! another one with what has not arrived.
//!
//! A chunk is its [`MARK`], the number of its bytes, their hash, and the bytes. The hash depends on the chunk's place in the
//! stream. The client begins, and its agent answers alike: it knows the stream by the first mark, see [`answer`].
//!
//! A reader that has waited for the rest of a chunk for [`REST_PAUSE`] has an empty chunk sent. Slurm's srun before 24.05 holds
//! the rest of a message back until the other end acknowledges its beginning, which TCP does after 40 ms, or at once together
//! with whatever is sent the other way.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};
use twox_hash::XxHash3_64;

use crate::locks::lock;

/// Begins each chunk. It is no text, so no banner has it.
const MARK: [u8; 4] = [0xf5, b'S', b'k', 0xf8];
/// Bytes of a chunk's head: the mark, the number of its bytes and the hash.
const HEAD: usize = 16;
/// Bytes of a chunk, at most.
const MAX_BYTES: usize = 32 * 1024;
/// Bytes per read.
const READ_BYTES: usize = 64 * 1024;

/// For so long a reader waits for the rest of a chunk before it has something sent the other way.
const REST_PAUSE: Duration = Duration::from_millis(1);

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
pub fn ask<R, W>(reading: R, writing: W) -> (CheckedReader<R, W>, CheckedWriter<W>) {
    pair(reading, writing, Mode::Noise)
}

/// Return the streams of an agent, which writes as its client does: in chunks, or as it is.
pub fn answer<R, W>(reading: R, writing: W) -> (CheckedReader<R, W>, CheckedWriter<W>) {
    pair(reading, writing, Mode::Unknown)
}

fn pair<R, W>(reading: R, writing: W, mode: Mode) -> (CheckedReader<R, W>, CheckedWriter<W>) {
    let is_checked = Arc::new(AtomicBool::new(mode == Mode::Noise));
    let sending = Arc::new(Mutex::new(Sending { stream: writing, pending: BytesMut::new(), chunks: 0 }));
    let reader = CheckedReader {
        stream: reading,
        mode,
        is_checked: Arc::clone(&is_checked),
        space: vec![0; READ_BYTES].into_boxed_slice(),
        raw: BytesMut::new(),
        ready: BytesMut::new(),
        chunks: 0,
        sending: Arc::downgrade(&sending),
        may_hurry: false,
        pause: None,
    };
    (reader, CheckedWriter { sending, is_checked })
}

/// Takes the bytes out of chunks.
#[derive(Debug)]
pub struct CheckedReader<R, W> {
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
    /// The other direction, for as long as its writer is there.
    sending: Weak<Mutex<Sending<W>>>,
    /// Whether bytes have come since an empty chunk was sent last.
    may_hurry: bool,
    /// Runs while the rest of a chunk is waited for.
    pause: Option<Pin<Box<Sleep>>>,
}

impl<R, W> CheckedReader<R, W> {
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

impl<R, W: AsyncWrite + Unpin> CheckedReader<R, W> {
    /// Have an empty chunk sent if the rest of a chunk is late. Nothing more can be read now.
    fn hurry(&mut self, cx: &mut Context<'_>) {
        if self.mode != Mode::Chunks || self.raw.is_empty() || !self.may_hurry {
            return;
        }
        if self.pause.get_or_insert_with(|| Box::pin(sleep(REST_PAUSE))).as_mut().poll(cx).is_ready() {
            self.pause = None;
            self.may_hurry = false;
            if let Some(sending) = self.sending.upgrade() {
                let mut sending = lock(&sending);
                // What is on its way already serves as well. The writer's own waker must not be replaced then.
                if sending.pending.is_empty() {
                    sending.put(&[]);
                    // An error is the writer's to report, when it writes or flushes next.
                    let _ = sending.poll_send(cx);
                }
            }
        }
    }
}

fn changed() -> io::Error {
    let why = "bytes were changed, lost or doubled on their way, by the command that leads to the machine or behind it";
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> AsyncRead for CheckedReader<R, W> {
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
            let Poll::Ready(read) = Pin::new(&mut this.stream).poll_read(cx, &mut space) else {
                this.hurry(cx);
                return Poll::Pending;
            };
            (this.may_hurry, this.pause) = (true, None);
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

/// The direction to the other end.
#[derive(Debug)]
struct Sending<W> {
    stream: W,
    /// Chunks that are not sent yet.
    pending: BytesMut,
    /// Chunks so far.
    chunks: u64,
}

impl<W> Sending<W> {
    /// Append a chunk to what is to be sent.
    fn put(&mut self, bytes: &[u8]) {
        self.pending.reserve(HEAD + bytes.len());
        self.pending.put_slice(&MARK);
        self.pending.put_u32_le(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.pending.put_u64_le(XxHash3_64::oneshot_with_seed(self.chunks, bytes));
        self.pending.put_slice(bytes);
        self.chunks += 1;
    }
}

impl<W: AsyncWrite + Unpin> Sending<W> {
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

/// Puts bytes into chunks. What was written is sent at the latest when it is flushed.
#[derive(Debug)]
pub struct CheckedWriter<W> {
    sending: Arc<Mutex<Sending<W>>>,
    is_checked: Arc<AtomicBool>,
}

impl<W: AsyncWrite + Unpin> AsyncWrite for CheckedWriter<W> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let mut sending = lock(&self.sending);
        ready!(sending.poll_send(cx))?;
        if !self.is_checked.load(Relaxed) {
            return Pin::new(&mut sending.stream).poll_write(cx, buf);
        }
        let bytes = buf.get(..MAX_BYTES).unwrap_or(buf);
        sending.put(bytes);
        if let Poll::Ready(Err(error)) = sending.poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut sending = lock(&self.sending);
        ready!(sending.poll_send(cx))?;
        Pin::new(&mut sending.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut sending = lock(&self.sending);
        ready!(sending.poll_send(cx))?;
        Pin::new(&mut sending.stream).poll_shutdown(cx)
    }
}
