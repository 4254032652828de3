//! What a worker writes to its standard output and standard error, on its way to the client.
//!
//! Whole lines are sent at once. The beginning of a line is held back for [`LOOK`], because most lines end soon, and is
//! then sent as far as it goes, marked with [`PAUSED`]. Of a line that is written over, as progress bars do with `\r`,
//! only the last state is sent at each of these looks. The client puts the parts of a line together again.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::Instant;

use crate::queue::PeerId;
use crate::session::{LINES, Link, lock};

/// Standard output, in the lowest bits of the number that an output frame has for its stream.
pub const STDOUT: u64 = 1;
/// Standard error.
pub const STDERR: u64 = 2;
/// The text ends within a line, and the worker has written no more for now: the line is worth showing.
pub const PAUSED: u64 = 4;
/// Above these bits stands the worker's number within its node, 0 for what is said of the node.
const WORKER_SHIFT: u32 = 3;

/// Bytes of a worker's standard error that are kept for the error that names its death.
const TAIL: usize = 2048;
/// Bytes of a line without an end that are held back.
const LINE: usize = 8 * 1024;
/// How long a line without an end is held back, and how often a line that is written over is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// Bytes per read.
const READ: usize = 64 * 1024;

/// The number that output frames have for a stream of this worker.
#[must_use]
pub fn stream(worker: PeerId, stream: u64) -> u64 {
    (worker as u64) << WORKER_SHIFT | stream
}

/// Send on what a worker writes until its last writer closes the pipe. Never makes the worker wait: what the client does
/// not take in time is left out.
pub async fn forward(mut from: impl AsyncRead + Unpin, stream: u64, to: Arc<Link>, tail: Option<Arc<Mutex<Vec<u8>>>>) {
    let mut line = BytesMut::with_capacity(READ);
    // When the beginning of a line that is held back is to be sent.
    let mut due: Option<Instant> = None;
    // The beginning of a line has been sent, and its end has not.
    let mut open = false;
    loop {
        let before = line.len();
        line.reserve(READ);
        let reading = from.read_buf(&mut line);
        let read = match due {
            Some(due) => tokio::time::timeout_at(due, reading).await,
            None => Ok(reading.await),
        };
        // By the clock: a worker that never stops writing lets no read wait.
        let paused = due.is_some_and(|due| due <= Instant::now());
        let ended = matches!(read, Ok(Ok(0) | Err(_)));
        if let (Some(tail), Some(new)) = (&tail, line.get(before..)) {
            let mut tail = lock(tail);
            tail.extend_from_slice(new);
            let excess = tail.len().saturating_sub(TAIL);
            tail.drain(..excess);
        }
        if let Some(end) = line.iter().rposition(|b| *b == b'\n') {
            send(&to, stream, line.split_to(end + 1).freeze());
            (due, open) = (None, false);
        }
        overwrite(&mut line);
        if line.is_empty() {
            due = None;
        } else if ended || line.len() > LINE || (paused && due.is_some()) {
            send(&to, if due.is_some() && paused { stream | PAUSED } else { stream }, line.split().freeze());
            (due, open) = (None, true);
        } else {
            due = due.or_else(|| Some(Instant::now() + LOOK));
        }
        if ended {
            if open {
                send(&to, stream, Bytes::from_static(b"\n"));
            }
            break;
        }
    }
}

/// Drop what a line was written over with: all that stands before the last `\r` that is followed by text.
fn overwrite(line: &mut BytesMut) {
    let end = line.iter().rposition(|b| *b != b'\r').unwrap_or_default();
    let begin = line.get(..end).and_then(|text| text.iter().rposition(|b| *b == b'\r'));
    line.advance(begin.unwrap_or_default());
}

/// Send a text in messages that are short enough, of whole lines if possible.
fn send(to: &Link, stream: u64, mut text: Bytes) {
    to.send(|outbox| {
        while !text.is_empty() {
            let piece = text.split_to(piece(&text));
            // The worker has paused where the last piece ends.
            outbox.output(if text.is_empty() { stream } else { stream & !PAUSED }, piece);
        }
    });
}

fn piece(text: &[u8]) -> usize {
    match text.get(..LINES) {
        Some(most) if most.len() < text.len() => most.iter().rposition(|b| *b == b'\n').map_or(LINES, |at| at + 1),
        _ => text.len(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing, clippy::unwrap_used)]

    use super::*;

    /// Only the last state of a line that is written over is kept, whether `\r` stands before each state or behind it.
    #[test]
    fn a_line_that_is_written_over_is_its_last_state() {
        for (written, kept) in [
            (&b"one\rtwo\rthree"[..], &b"\rthree"[..]),
            (b"\r 10%\r 20%", b"\r 20%"),
            (b"10%\r20%\r", b"\r20%\r"),
            (b"10%\r", b"10%\r"),
            (b"\r", b"\r"),
            (b"\r\r", b"\r\r"),
            (b"plain", b"plain"),
            (b"", b""),
        ] {
            let mut line = BytesMut::from(written);
            overwrite(&mut line);
            assert_eq!(&line[..], kept);
        }
    }
}
