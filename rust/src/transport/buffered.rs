//! Writes to a socket that do not wait for it, which both ends put under russh.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::timing::{PEER_TIMEOUT, wait_step};

/// Bytes that wait for a socket before its writer has to wait, too. It is more than the windows of the SSH channels, so
/// only a server reaches it that makes russh answer without end, or that grants windows without measure.
const MAX_UNSENT: usize = 48 * 1024 * 1024;

/// A stream whose writes do not wait: bytes that the socket does not take at once are stored, and sent while reading.
///
/// russh (0.65.1) awaits each write between two reads. If the socket buffers of two such ends are full at the same time,
/// each end waits for ever for the other one to read. Over this stream each end goes on reading until [`MAX_UNSENT`] bytes
/// are stored. A socket that takes nothing for a set time is an error. russh's own bound on a write, `inactivity_timeout`,
/// cannot be used for that: it also ends a quiet connection on which one long task runs.
#[derive(Debug)]
pub struct BufferedWrites<S> {
    inner: S,
    /// Bytes that were written here and that the socket has not taken yet, in order.
    unsent: BytesMut,
    /// For how long the socket has taken nothing, in whole steps; 0 again whenever it takes something.
    stalled: Duration,
    /// The longest `stalled` before the stream fails; `None`: it never does.
    bound: Option<Duration>,
    /// How much `stalled` grows at once.
    step: Duration,
    /// The end of the current step.
    step_end: Pin<Box<Sleep>>,
}

impl<S> BufferedWrites<S> {
    /// Wrap a socket that may take nothing for `bound`. Must be called inside a Tokio runtime.
    pub fn new(inner: S, bound: Option<Duration>) -> Self {
        let step = wait_step(bound.unwrap_or(PEER_TIMEOUT));
        let step_end = Box::pin(tokio::time::sleep(step));
        Self { inner, unsent: BytesMut::new(), stalled: Duration::ZERO, bound, step, step_end }
    }

    fn restart_bound(&mut self) {
        self.stalled = Duration::ZERO;
        self.begin_step();
    }

    fn begin_step(&mut self) {
        self.step_end.as_mut().reset(Instant::now() + self.step);
    }
}

impl<S: AsyncWrite + Unpin> BufferedWrites<S> {
    /// Send the stored bytes. Pending while the socket takes no more.
    fn send_unsent(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.unsent.is_empty() {
            match Pin::new(&mut self.inner).poll_write(cx, &self.unsent) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(n)) => {
                    self.unsent.advance(n);
                    self.restart_bound();
                }
                Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                Poll::Pending => {
                    while self.step_end.as_mut().poll(cx).is_ready() {
                        self.stalled += self.step;
                        if self.bound.is_some_and(|bound| self.stalled >= bound) {
                            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                        }
                        self.begin_step();
                    }
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for BufferedWrites<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Err(e)) = self.send_unsent(cx) {
            return Poll::Ready(Err(e));
        }
        if self.unsent.is_empty() {
            match Pin::new(&mut self.inner).poll_write(cx, buf) {
                Poll::Ready(done) => return Poll::Ready(done),
                Poll::Pending => self.restart_bound(),
            }
        }
        if self.unsent.len() >= MAX_UNSENT {
            // `send_unsent` above has registered this task: it is woken when the socket takes bytes, or at the bound.
            return Poll::Pending;
        }
        self.unsent.extend_from_slice(buf);
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.send_unsent(cx) {
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            _ => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(self.send_unsent(cx))?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for BufferedWrites<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(Err(e)) = self.send_unsent(cx) {
            return Poll::Ready(Err(e));
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}
