//! The standard streams of the agent, on which it talks with the client, and of its workers, whose text goes to the client.
//!
//! Whole lines are sent at once. The beginning of a line is held back for [`HOLD_BACK`], because most lines end soon, and
//! is then sent as far as it goes, marked with [`PAUSED`]. Of a line that is written over, as progress bars do with `\r`,
//! only the last state is sent, once in that time. The client puts the parts of a line together again.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use rustix::fs::FileType;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{UnixStream, unix::pipe};
use tokio::time::Instant;

use crate::locks::lock;
use crate::queue::PeerId;
use crate::wire::{FrameSender, MAX_OUTPUT_FRAME};

/// A bit of a stream's number: the text ends within a line, and the worker has written no more for now, so the line is
/// worth showing.
pub const PAUSED: u64 = 4;
/// Above these bits stands the worker's number within its node; 0 for a text about the node.
const WORKER_SHIFT: u32 = 3;

/// Bytes of a worker's standard error that are kept for the error that names the worker's death.
const TAIL_BYTES: usize = 2048;
/// Bytes of a line without an end that are held back at most.
const MAX_HELD_BACK: usize = 8 * 1024;
/// How long a line without an end is held back, and how often the state of a line that is written over is sent.
const HOLD_BACK: Duration = Duration::from_millis(500);
/// How long a text that is just being written may take to be here in full.
const WRITE_TIME: Duration = Duration::from_millis(50);
/// Moves a terminal's cursor up.
const CURSOR_UP: &[u8] = b"\x1b[A";
/// Bytes per read.
const READ_BYTES: usize = 64 * 1024;

/// Return the number that output frames have for a stream of this worker.
#[must_use]
pub fn stream(worker: PeerId, stream: u64) -> u64 {
    (worker as u64) << WORKER_SHIFT | stream
}

/// Send on the text that a worker writes, until the pipe's last writer closes it. Never makes the worker wait: text that
/// the client does not take in time is left out.
pub async fn forward(
    mut from: impl AsyncRead + Unpin,
    stream: u64,
    to: Arc<FrameSender>,
    tail: Option<Arc<Mutex<Vec<u8>>>>,
) {
    let mut text = BytesMut::with_capacity(READ_BYTES);
    // When the text that is held back is to be sent, and whether this has been put off once.
    let mut due: Option<Instant> = None;
    let mut put_off = false;
    let mut line = Sent::Whole;
    loop {
        let before = text.len();
        text.reserve(READ_BYTES);
        let reading = from.read_buf(&mut text);
        let read = match due {
            Some(due) => tokio::time::timeout_at(due, reading).await,
            None => Ok(reading.await),
        };
        // Asked of the clock, because no read waits while a worker never stops writing.
        let overdue = due.is_some_and(|due| due <= Instant::now());
        let (idle, ended) = (read.is_err(), matches!(read, Ok(Ok(0) | Err(_))));
        if let (Some(tail), Some(new)) = (&tail, text.get(before..)) {
            let mut tail = lock(tail);
            tail.extend_from_slice(new);
            let excess = tail.len().saturating_sub(TAIL_BYTES);
            tail.drain(..excess);
        }
        take_back(&mut text);
        let all = ended || (idle && put_off);
        let held = !all && line == Sent::Whole && begins_bars(&text);
        let whole = if all { last_end(&text) } else { whole_lines(&text, line) };
        if whole > 0 && !held {
            send(&to, stream, text.split_to(whole).freeze());
            (due, line) = (None, Sent::Whole);
        }
        overwrite(&mut text);
        let paused = overdue && due.is_some();
        let may_be_taken_back = last_end(&text) > 0 && text.len() <= MAX_HELD_BACK;
        if text.is_empty() {
            due = None;
        } else if paused && may_be_taken_back {
            // Perhaps the worker is just writing the "cursor up" that takes the newline back.
            (due, put_off) = (Some(Instant::now() + WRITE_TIME), true);
        } else if (paused || ended || text.len() > MAX_HELD_BACK) && !may_be_taken_back {
            let state = text.contains(&b'\r') || line == Sent::State;
            line = if state { Sent::State } else { Sent::Beginning };
            send(&to, if paused { stream | PAUSED } else { stream }, text.split().freeze());
            due = None;
        } else if due.is_none() {
            (due, put_off) = (Some(Instant::now() + HOLD_BACK), false);
        }
        if ended {
            if line != Sent::Whole {
                send(&to, stream, Bytes::from_static(b"\n"));
            }
            break;
        }
    }
}

/// How much of the line that is being written has been sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// Nothing: the line before has ended.
    Whole,
    /// The line's beginning.
    Beginning,
    /// A state of the line, which will be written over.
    State,
}

/// Replace each newline that is followed by "cursor up" by `\r`. Several progress bars, one below the other, write such
/// newlines; then each bar is a state of the same line.
pub fn take_back(text: &mut BytesMut) {
    // No newline stands before `first`, no "cursor up" before `from`.
    let (mut first, mut from) = (0, 0);
    while let Some(up) = text.get(from..).and_then(|rest| rest.windows(CURSOR_UP.len()).position(|w| w == CURSOR_UP)) {
        let up = from + up;
        let newline = text.get(first..up).and_then(|before| before.iter().rposition(|b| *b == b'\n'));
        for at in newline.map(|at| first + at).into_iter().chain(up..up + CURSOR_UP.len()) {
            if let Some(byte) = text.get_mut(at) {
                *byte = b'\r';
            }
        }
        if newline.is_none() {
            first = up;
        }
        from = up;
    }
}

/// Return whether a text may be the beginning of several progress bars, the second of which was drawn before the first: an
/// empty line, whose end may still be taken back, and perhaps a bar.
fn begins_bars(text: &[u8]) -> bool {
    let after = text.strip_prefix(b"\n").filter(|rest| rest.first().is_none_or(|byte| *byte == b'\r'));
    after.is_some_and(|rest| !rest.contains(&b'\n'))
}

fn last_end(text: &[u8]) -> usize {
    text.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1)
}

/// Return how many bytes of a text are lines that have ended. The last line does not count if it was written over and no
/// text follows it, because its end may still be taken back. `line` is how much of the first line has been sent.
#[must_use]
pub fn whole_lines(text: &[u8], line: Sent) -> usize {
    let end = last_end(text);
    let (lines, rest) = text.split_at(end);
    if !(rest.is_empty() || rest.starts_with(b"\r")) {
        return end;
    }
    let lines = lines.trim_ascii_end();
    let begin = last_end(lines);
    let written_over = lines.get(begin..).is_some_and(|line| line.contains(&b'\r'));
    if written_over || (begin == 0 && line == Sent::State) { begin } else { end }
}

/// Drop the earlier states of the first line: all that stands before the last `\r` that is followed by text.
pub fn overwrite(text: &mut BytesMut) {
    let line = text.get(..).and_then(|text| text.split(|b| *b == b'\n').next()).unwrap_or_default();
    let end = line.iter().rposition(|b| *b != b'\r').unwrap_or_default();
    let begin = line.get(..end).and_then(|text| text.iter().rposition(|b| *b == b'\r'));
    text.advance(begin.unwrap_or_default());
}

/// Send a text in frames that are short enough, of whole lines if possible.
fn send(to: &FrameSender, stream: u64, mut text: Bytes) {
    to.send(|outbox| {
        while !text.is_empty() {
            let piece = text.split_to(piece(&text));
            // The worker has paused where the last piece ends.
            outbox.output(if text.is_empty() { stream } else { stream & !PAUSED }, piece);
        }
    });
}

fn piece(text: &[u8]) -> usize {
    match text.get(..MAX_OUTPUT_FRAME) {
        Some(most) if most.len() < text.len() => {
            most.iter().rposition(|b| *b == b'\n').map_or(MAX_OUTPUT_FRAME, |at| at + 1)
        }
        _ => text.len(),
    }
}

/// Return an asynchronous reader of a descriptor that this process was started with: a socket or a pipe, whichever the SSH
/// server uses, or a terminal, as a command may make one.
///
/// # Errors
/// If the descriptor is none of these.
pub fn reader(fd: OwnedFd) -> io::Result<Box<dyn AsyncRead + Unpin + Send>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(match file_type(&fd)? {
        FileType::Socket => Box::new(UnixStream::from_std(fd.into())?),
        FileType::CharacterDevice => Box::new(pipe::Receiver::from_owned_fd_unchecked(fd)?),
        _ => Box::new(pipe::Receiver::from_owned_fd(fd)?),
    })
}

/// As [`reader`], for writing.
///
/// # Errors
/// As [`reader`].
pub fn writer(fd: OwnedFd) -> io::Result<Box<dyn AsyncWrite + Unpin + Send>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(match file_type(&fd)? {
        FileType::Socket => Box::new(UnixStream::from_std(fd.into())?),
        // That of srun's steps, which leaves all bytes as they are. The client has looked whether this one does.
        FileType::CharacterDevice => Box::new(pipe::Sender::from_owned_fd_unchecked(fd)?),
        _ => Box::new(pipe::Sender::from_owned_fd(fd)?),
    })
}

fn file_type(fd: &OwnedFd) -> io::Result<FileType> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode))
}
