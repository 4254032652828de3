//! The two ends of a session that outlives its connections, and connections that carry what a script lets them carry and are
//! cut where it says: in a frame, in a handshake, with bytes under way in both directions, of which any number has arrived.
//! Each frame must arrive once, with its bytes, and control frames in their order.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use skyward_lite::error::SessionError;
use skyward_lite::wire::{ArrivedBlocks, Attempt, Body, Control, Event, EventReader, FrameSender, Message, greet};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Runtime;

use super::script::Script;

const MAX_MESSAGE: usize = 64 << 20;
/// Bytes that one direction of a connection holds.
const PIPE: usize = 1 << 18;
/// When a report is due at the latest.
const REPORT: Duration = Duration::from_millis(2);
/// Bytes of all messages of a run: more takes long, and finds nothing else.
const MOST: usize = 2 << 20;

thread_local! {
    /// Time limits are made in it. They end only while it runs.
    static RUNTIME: Runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
}

/// One direction of a connection.
#[derive(Default)]
struct Pipe {
    under_way: BytesMut,
    arrived: BytesMut,
}

impl Pipe {
    /// Let so many bytes arrive, at most.
    fn carry(&mut self, most: usize) {
        let count = most.min(self.under_way.len());
        self.arrived.extend_from_slice(&self.under_way.split_to(count));
    }
}

#[derive(Clone, Default)]
struct Handle(Rc<RefCell<Pipe>>);

impl AsyncRead for Handle {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let arrived = &mut self.0.borrow_mut().arrived;
        let count = buffer.remaining().min(arrived.len());
        if count == 0 {
            return Poll::Pending;
        }
        buffer.put_slice(&arrived.split_to(count));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Handle {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let under_way = &mut self.0.borrow_mut().under_way;
        let count = bytes.len().min(PIPE.saturating_sub(under_way.len()));
        if count == 0 {
            return Poll::Pending;
        }
        under_way.extend_from_slice(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

type Writing = Pin<Box<dyn Future<Output = Result<(), SessionError>>>>;

/// Do what can be done now. Return the outcome if that is all of it.
fn poll<T>(work: &mut (impl Future<Output = T> + Unpin)) -> Option<T> {
    match Pin::new(work).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(done) => Some(done),
        Poll::Pending => None,
    }
}

/// As [`poll`], for work that is given up if it is not done now.
fn now<T>(work: impl Future<Output = T>) -> Option<T> {
    poll(&mut std::pin::pin!(work))
}

/// Return whether these are bytes of the message or blob of this number.
fn is_of(number: u64, bytes: &[u8]) -> bool {
    bytes == vec![number.to_le_bytes()[0]; bytes.len()]
}

/// What has arrived at one end.
#[derive(Default)]
struct Seen {
    pulses: Vec<u64>,
    /// The size of each message, by its number.
    messages: BTreeMap<u64, usize>,
    /// How much of each blob has arrived, of how much.
    blobs: BTreeMap<u64, (BTreeMap<u64, usize>, u64)>,
}

impl Seen {
    fn take(&mut self, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            match event {
                Event::Control(Control::Pulse { nonce }) => self.pulses.push(nonce),
                Event::Message(_, message) => {
                    let number = message.id.task;
                    assert!(message.parts.iter().all(|part| is_of(number, part)));
                    assert!(self.messages.insert(number, message.size()).is_none(), "message {number} came twice");
                }
                Event::Chunk(chunk) => {
                    assert!(is_of(chunk.number, &chunk.bytes));
                    let (chunks, total) = self.blobs.entry(chunk.number).or_default();
                    *total = chunk.total;
                    assert!(chunks.insert(chunk.offset, chunk.bytes.len()).is_none(), "a chunk came twice");
                }
                other => panic!("nobody sent {other:?}"),
            }
        }
    }
}

struct End {
    link: Arc<FrameSender>,
    reader: EventReader<Handle>,
    /// `None` while there is no connection.
    writing: Option<Writing>,
    /// What it writes to, and what it reads from.
    to: Handle,
    from: Handle,
    seen: Seen,
    pulses: u64,
}

impl End {
    fn new(kind: &str) -> Self {
        let link = Arc::new(FrameSender::default());
        let from = Handle::default();
        let mut first = from.clone();
        now(greet(&mut first, Control::Hello(Bytes::from(kind.to_owned())))).unwrap().unwrap();
        from.0.borrow_mut().carry(usize::MAX);
        let mut reader = EventReader::of_session(from.clone(), MAX_MESSAGE, Arc::clone(&link));
        now(reader.greeting(&mut Vec::new())).expect("the hello has arrived").unwrap();
        reader.begin_stream().unwrap();
        link.begin_stream(true);
        Self { link, reader, writing: None, to: Handle::default(), from, seen: Seen::default(), pulses: 0 }
    }

    fn disconnect(&mut self) {
        self.writing = None;
        self.reader.disconnect();
    }

    /// Have the connection that reads from one pipe and writes to the other.
    fn connect(&mut self, from: &Handle, to: &Handle, rest: &[u8]) {
        (self.from, self.to) = (from.clone(), to.clone());
        self.reader.resume(from.clone(), rest);
        let (link, to) = (Arc::clone(&self.link), to.clone());
        self.writing = Some(Box::pin(async move { link.run(to, None).await }));
    }

    /// Read all that has arrived.
    fn read(&mut self) {
        let mut events = Vec::new();
        while self.writing.is_some()
            && let Some(read) = now(self.reader.read(&mut events))
        {
            read.unwrap();
            self.seen.take(&mut events);
        }
    }

    fn write(&mut self) {
        if let Some(writing) = &mut self.writing {
            assert!(poll(writing).is_none(), "the stream has ended");
        }
    }
}

/// A stripe: what writes to it, the pipe, and what reads from it.
struct Stripe {
    writing: Writing,
    pipe: Handle,
    reader: EventReader<Handle>,
}

impl Stripe {
    fn new(near: &End, far: &End) -> Self {
        let (pipe, link) = (Handle::default(), Arc::clone(&near.link));
        let to = pipe.clone();
        let writing = Box::pin(async move { link.stripe().run(to, None).await.map(|never| match never {}) });
        let reader = EventReader::of_session(pipe.clone(), MAX_MESSAGE, Arc::clone(&far.link));
        Self { writing, pipe, reader }
    }

    fn read(&mut self, seen: &mut Seen) {
        let mut events = Vec::new();
        while let Some(read) = now(self.reader.read(&mut events)) {
            read.unwrap();
            seen.take(&mut events);
        }
    }
}

struct World {
    near: End,
    far: End,
    stripes: Vec<Stripe>,
    last: u64,
    bytes: usize,
    sizes: [BTreeMap<u64, usize>; 2],
    blobs: BTreeMap<u64, usize>,
}

/// Let a script happen.
///
/// # Panics
/// If a frame does not arrive exactly once.
pub fn run(bytes: &[u8]) {
    RUNTIME.with(|runtime| {
        let _time = runtime.enter();
        let mut script = Script::new(bytes);
        let mut world = World {
            near: End::new("near"),
            far: End::new("far"),
            stripes: Vec::new(),
            last: 0,
            bytes: 0,
            sizes: [BTreeMap::new(), BTreeMap::new()],
            blobs: BTreeMap::new(),
        };
        while !script.is_over() {
            world.step(&mut script);
        }
        world.finish(runtime);
    });
}

impl World {
    /// Cut the connection: what is under way is lost. Each end may notice later than the other one.
    fn cut(&mut self, both: bool) {
        if both {
            self.far.disconnect();
        }
        self.near.disconnect();
        self.stripes.iter_mut().for_each(|stripe| stripe.read(&mut self.far.seen));
        self.stripes.clear();
    }

    /// Exchange what both ends have, and go on; `stage` of the handshake is as far as it comes before another cut.
    fn attach(&mut self, stage: u8) {
        // The client: it looks for a connection because its own is cut.
        self.cut(false);
        let mine = (self.near.reader.reached(), self.near.link.arrived_blocks());
        if stage == 0 {
            return;
        }
        // The agent, when the client's attach has arrived.
        self.far.disconnect();
        let theirs: (u64, ArrivedBlocks) = (self.far.reader.reached(), self.far.link.arrived_blocks());
        self.far.link.resume(mine.0, &mine.1).unwrap();
        let (up, down) = (Handle::default(), Handle::default());
        self.far.connect(&up, &down, &[]);
        self.far.write();
        if stage == 1 {
            return;
        }
        // The client, when the agent's answer has arrived, and perhaps bytes of the stream with it.
        self.near.link.resume(theirs.0, &theirs.1).unwrap();
        let mut pipe = down.0.borrow_mut();
        let count = usize::from(stage).min(pipe.under_way.len());
        let rest = pipe.under_way.split_to(count);
        drop(pipe);
        self.near.connect(&down, &up, &rest);
    }

    fn send(&mut self, script: &mut Script<'_>) {
        let size = match script.byte() % 8 {
            0 => 0,
            1..6 => usize::from(script.byte()),
            _ => usize::from(script.byte()) << (script.byte() % 12),
        };
        if self.bytes + size > MOST {
            return;
        }
        self.last += 1;
        self.bytes += size;
        let number = self.last;
        let content = Bytes::from(vec![number.to_le_bytes()[0]; size]);
        let message =
            Message { id: Attempt { task: number, attempt: 0 }, parts: vec![content.clone()], ..Message::default() };
        match script.byte() % 4 {
            0 | 1 => {
                self.near.link.send(|o| o.message(Body::Task, message));
                self.sizes[0].insert(number, size);
            }
            2 => {
                self.far.link.send(|o| o.message(Body::Result, message));
                self.sizes[1].insert(number, size);
            }
            _ if size > 0 => {
                self.near.link.send(|o| o.blob(number, content));
                self.blobs.insert(number, size);
            }
            _ => {}
        }
    }

    fn step(&mut self, script: &mut Script<'_>) {
        let step = script.byte();
        let is_near = script.rarely(2);
        let amount = usize::from(script.byte()) << (script.byte() % 14);
        let Self { near, far, .. } = self;
        let end = if is_near { &mut *near } else { &mut *far };
        match step % 20 {
            0..4 => self.send(script),
            4 => {
                end.pulses += 1;
                let nonce = end.pulses;
                end.link.send(|o| o.control(Control::Pulse { nonce }));
            }
            5..8 => end.write(),
            8..11 => end.from.0.borrow_mut().carry(amount),
            11..14 => end.read(),
            14 => end.reader.tell_reached(),
            15 => {
                if near.writing.is_some() && far.writing.is_some() && self.stripes.len() < 3 {
                    self.stripes.push(Stripe::new(near, far));
                }
            }
            16 | 17 => {
                for stripe in &mut self.stripes {
                    assert!(poll(&mut stripe.writing).is_none(), "a stripe has ended");
                    stripe.pipe.0.borrow_mut().carry(amount);
                    stripe.read(&mut far.seen);
                }
            }
            18 => self.cut(is_near),
            _ => self.attach(script.byte() % 8),
        }
    }

    /// Let everything arrive.
    fn finish(&mut self, runtime: &Runtime) {
        self.attach(u8::MAX);
        for round in 1..2_000 {
            if round % 20 == 0 {
                // A report may be due, which the clock alone brings.
                runtime.block_on(tokio::time::sleep(REPORT));
            }
            for end in [&mut self.near, &mut self.far] {
                end.reader.tell_reached();
                end.write();
                end.from.0.borrow_mut().carry(usize::MAX);
                end.read();
            }
            let [tasks, results] = &self.sizes;
            let arrived = |chunks: &BTreeMap<u64, usize>| chunks.values().sum::<usize>();
            let blobs = self.far.seen.blobs.iter().map(|(number, (chunks, _))| (*number, arrived(chunks)));
            let complete = (&self.far.seen.messages, &self.near.seen.messages) == (tasks, results)
                && blobs.eq(self.blobs.iter().map(|(number, size)| (*number, *size)))
                && self.far.seen.pulses.len() as u64 == self.near.pulses
                && self.near.seen.pulses.len() as u64 == self.far.pulses;
            if complete {
                let in_order = |pulses: &[u64]| pulses.iter().copied().eq(1..=pulses.len() as u64);
                assert!(
                    in_order(&self.near.seen.pulses) && in_order(&self.far.seen.pulses),
                    "control frames in disorder"
                );
                return;
            }
        }
        let (near, far) = (&self.near.seen, &self.far.seen);
        panic!(
            "a frame never arrives: tasks {:?} of {:?}, results {:?} of {:?}, blobs {:?} of {:?}, pulses {:?} of {} and {:?} of {}",
            far.messages,
            self.sizes[0],
            near.messages,
            self.sizes[1],
            far.blobs,
            self.blobs,
            far.pulses,
            self.near.pulses,
            near.pulses,
            self.far.pulses
        );
    }
}
