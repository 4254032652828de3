//! Results whose large parts a worker hands over as files in memory, at the agent.
//!
//! Ahead of such a result the worker sends the descriptor of each of its blobs, whose frame has the task's number. Here the
//! files are mapped and become parts of the message like any other. So the rest of the agent, and the client, know
//! nothing of how these bytes came from the worker.
//!
//! A task can write to its worker's socket. What contradicts this order is an error, for which the worker is ended.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use crate::error::FrameError;
use crate::locks::lock;
use crate::node::descriptors::Received;
use crate::node::memory_file::{FreedAside, SharedFile};
use crate::wire::{Body, Control, Event, Message, in_places};

/// Descriptors without their frames, and files without their results, that a worker may have sent. A worker sends a few
/// hundred ahead at most.
const MAX_UNCLAIMED: usize = 2048;

/// A blob of a result.
#[derive(Debug)]
struct Handed {
    size: usize,
    /// `None` if this process could not map the file.
    bytes: Option<Bytes>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Handover {
    received: Arc<Mutex<Received>>,
    /// Bytes of the largest result.
    max_message: usize,
    /// The files that were sent ahead, by the task's number.
    handed: HashMap<u64, Vec<Handed>>,
    /// How many files `handed` has.
    unclaimed: usize,
    /// The bytes of all files that have come from this worker.
    pub bytes: u64,
}

impl Handover {
    #[must_use]
    pub fn new(received: Arc<Mutex<Received>>, max_message: usize) -> Self {
        Self { received, max_message, handed: HashMap::new(), unclaimed: 0, bytes: 0 }
    }

    /// Put the files into the results to which they belong, and take the frames about them out.
    ///
    /// # Errors
    /// A [`FrameError`] if this is not what a worker sends; the events before it are left.
    pub fn resolve(&mut self, events: &mut Vec<Event>) -> Result<(), FrameError> {
        let is_about_files = |event: &Event| match event {
            Event::Control(control) => matches!(control, Control::Descriptor { .. }),
            Event::Message(_, message) => !message.blobs.is_empty(),
            Event::Chunk(_) | Event::Skipped(..) | Event::NoMemory(..) => false,
        };
        if self.unclaimed > 0 || events.iter().any(is_about_files) {
            for event in std::mem::take(events) {
                events.extend(self.take(event)?);
            }
        }
        let received = lock(&self.received);
        if received.incomplete {
            return Err(FrameError::BadSequence("descriptors that are too many at once, or for which none is free"));
        }
        if received.count() + self.unclaimed > MAX_UNCLAIMED {
            return Err(FrameError::BadSequence("too many descriptors without a result"));
        }
        Ok(())
    }

    fn take(&mut self, event: Event) -> Result<Option<Event>, FrameError> {
        match event {
            Event::Control(Control::Descriptor { number, size }) => self.hand(number, size).map(|()| None),
            Event::Message(Body::Result, result) => self.complete(result).map(Some),
            Event::Message(_, message) if !message.blobs.is_empty() => {
                Err(FrameError::BadSequence("a blob in a message that has none"))
            }
            Event::Skipped(Body::Result, id) | Event::NoMemory(Body::Result, id, _) => {
                drop(self.claim(id.task));
                Ok(Some(event))
            }
            other => Ok(Some(other)),
        }
    }

    fn hand(&mut self, task: u64, size: u64) -> Result<(), FrameError> {
        let descriptor = lock(&self.received).pop();
        let descriptor = descriptor.ok_or(FrameError::BadSequence("the frame of a descriptor that did not come"))?;
        let file = SharedFile::sealed(descriptor, size);
        let file = file.ok_or(FrameError::BadSequence("a descriptor that is not of a sealed file of its size"))?;
        self.bytes = self.bytes.saturating_add(size);
        self.unclaimed += 1;
        let bytes = file.map().ok().map(|mapping| Bytes::from_owner(FreedAside::from(mapping)));
        self.handed.entry(task).or_default().push(Handed { size: file.size(), bytes });
        Ok(())
    }

    fn claim(&mut self, task: u64) -> Vec<Handed> {
        let files = self.handed.remove(&task).unwrap_or_default();
        self.unclaimed -= files.len();
        files
    }

    /// Return a result with all of its parts, or that there is no memory for it.
    fn complete(&mut self, mut result: Message) -> Result<Event, FrameError> {
        let files = self.claim(result.id.task);
        if files.len() != result.blobs.len() {
            return Err(FrameError::BadSequence("a result without the descriptors of its blobs"));
        }
        if files.is_empty() {
            return Ok(Event::Message(Body::Result, result));
        }
        let size = files.iter().fold(result.size(), |sum, file| sum.saturating_add(file.size));
        if size > self.max_message {
            return Err(FrameError::TooLong { what: "message", len: size, cap: self.max_message });
        }
        let Some(mapped) = files.into_iter().map(|file| file.bytes).collect::<Option<Vec<_>>>() else {
            return Ok(Event::NoMemory(Body::Result, result.id, size));
        };
        let places = result.blobs.drain(..).map(|blob| blob.place);
        result.parts = in_places(result.parts, places.zip(mapped));
        Ok(Event::Message(Body::Result, result))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::node::descriptors::write_all;
    use crate::wire::{Attempt, BlobPart};

    const SIZE: u64 = 5000;

    struct Worker {
        handover: Handover,
        ours: UnixStream,
        theirs: UnixStream,
    }

    impl Worker {
        fn new() -> Self {
            let (ours, theirs) = UnixStream::pair().unwrap();
            Self { handover: Handover::new(Arc::default(), 20_000), ours, theirs }
        }

        fn sends(&mut self, file: impl Into<OwnedFd>) {
            write_all(&self.theirs, b"x", &[file.into()]).unwrap();
            assert_eq!(lock(&self.handover.received).read(&self.ours, &mut [0; 1]).unwrap(), 1);
        }

        fn resolve(&mut self, events: Vec<Event>) -> Result<Vec<Event>, FrameError> {
            let mut events = events;
            self.handover.resolve(&mut events).map(|()| events)
        }
    }

    fn file(byte: u8) -> SharedFile {
        SharedFile::of(&[byte; 5000]).unwrap()
    }

    fn frame(number: u64, size: u64) -> Event {
        Event::Control(Control::Descriptor { number, size })
    }

    fn id(task: u64) -> Attempt {
        Attempt { task, attempt: 0 }
    }

    fn result(task: u64, parts: &[&'static [u8]], places: &[u16]) -> Event {
        let parts = parts.iter().map(|part| Bytes::from_static(part)).collect();
        let blob = |place: &u16| BlobPart { place: *place, number: task, fresh: false, content: None };
        let blobs = places.iter().map(blob).collect();
        Event::Message(Body::Result, Message { id: id(task), parts, blobs, ..Message::default() })
    }

    /// Files become parts of their results, in their places; results in between have none.
    #[test]
    fn files_become_parts() {
        let mut worker = Worker::new();
        (1..=3).for_each(|byte| worker.sends(file(byte)));
        let events = vec![frame(7, SIZE), frame(8, SIZE), frame(7, SIZE), result(6, &[b"a"], &[])];
        assert_eq!(worker.resolve(events).unwrap(), [result(6, &[b"a"], &[])]);
        let events = worker.resolve(vec![result(7, &[b"p", b"q"], &[1, 3]), result(8, &[], &[0])]).unwrap();
        let parts = |event: &Event| match event {
            Event::Message(_, message) if message.blobs.is_empty() => message.parts.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!(parts(&events[0]), [&b"p"[..], &[1; 5000], b"q", &[3; 5000]]);
        assert_eq!(parts(&events[1]), [&[2; 5000][..]]);
        assert_eq!((worker.handover.unclaimed, worker.handover.bytes), (0, 15_000));
    }

    /// The files of a result that is not stored are freed with it.
    #[test]
    fn files_of_skipped_results_are_freed() {
        let mut worker = Worker::new();
        (1..=2).for_each(|byte| worker.sends(file(byte)));
        let skipped = || vec![Event::Skipped(Body::Result, id(7)), Event::NoMemory(Body::Result, id(8), 9)];
        let events = [frame(7, SIZE), frame(8, SIZE)].into_iter().chain(skipped()).collect();
        assert_eq!(worker.resolve(events).unwrap(), skipped());
        assert_eq!(worker.handover.unclaimed, 0);
    }

    /// A frame without a descriptor, a descriptor without a frame, a file that could still change, one of another size, a
    /// result without its files or with more of them, one that is too large, a note with a blob: each is an error, and
    /// what came before it counts.
    #[test]
    fn contradictions_are_errors() {
        let note = Message {
            blobs: vec![BlobPart { place: 0, number: 1, fresh: false, content: None }],
            ..Message::default()
        };
        let cases: Vec<(Vec<OwnedFd>, Vec<Event>)> = vec![
            (vec![], vec![frame(1, SIZE)]),
            (vec![UnixStream::pair().unwrap().0.into()], vec![frame(1, SIZE)]),
            (vec![std::fs::File::open("/dev/zero").unwrap().into()], vec![frame(1, SIZE)]),
            (vec![file(1).into()], vec![frame(1, SIZE + 1)]),
            (vec![file(1).into()], vec![frame(1, 0)]),
            (vec![file(1).into()], vec![frame(1, SIZE), result(1, &[], &[])]),
            (vec![], vec![result(1, &[], &[0])]),
            ((0..5).map(|_| file(1).into()).collect(), {
                (0..5).map(|_| frame(1, SIZE)).chain([result(1, &[], &[0, 1, 2, 3, 4])]).collect()
            }),
            (vec![], vec![Event::Message(Body::Note, note)]),
        ];
        for (files, events) in cases {
            let mut worker = Worker::new();
            for file in files {
                worker.sends(file);
            }
            let mut all: Vec<_> = [result(9, &[b"a"], &[])].into_iter().chain(events.clone()).collect();
            assert!(worker.handover.resolve(&mut all).is_err(), "{events:?}");
            assert_eq!(all, [result(9, &[b"a"], &[])], "{events:?}");
        }
        let mut worker = Worker::new();
        let file = file(1);
        for _ in 0..=MAX_UNCLAIMED {
            worker.sends(file.as_fd().try_clone_to_owned().unwrap());
        }
        assert!(worker.resolve(vec![]).is_err());
    }
}
