//! Frames and messages, and a byte stream that carries them. Both ends of a session use it, and so do an agent and its
//! workers.
//!
//! | file | what it promises |
//! |---|---|
//! | `header.rs` | the preamble, the frame header, and the caps of both |
//! | `blob.rs` | bytes that travel apart from the messages that name them |
//! | `block.rs` | blocks of frames, compressed where that pays |
//! | `message.rs` | tasks, results and notes, cut into chunks and joined |
//! | `control.rs` | every other frame, written and read side by side |
//! | `decoder.rs` | bytes in, events out |
//! | `hello.rs` | what the ends tell of themselves |
//! | `outbox.rs`, `large.rs` | what is sent first; what is sent in chunks |
//! | `pace.rs` | how much bulk may be under way, so that small messages do not wait |
//! | `flood.rs` | output that waits, bounded: of too much the middle is left out |
//! | `stream.rs` | an outbox that is emptied into a byte stream |
//! | `reader.rs` | the events that come out of a byte stream |
//! | `checked.rs` | chunks with a hash, where nothing else protects the stream |
//! | `resume.rs` | what was written to a stream, until the other end has it |
//! | `stripe.rs`, `stripe_blocks.rs` | further streams that take blobs from the same outbox; their blocks until they have arrived |

mod blob;
mod block;
pub mod checked;
mod control;
mod decoder;
pub mod flood;
mod header;
mod hello;
mod large;
mod message;
mod outbox;
pub mod pace;
mod reader;
pub mod resume;
mod stream;
mod stripe;
mod stripe_blocks;

pub use blob::{BlobChunk, BlobPart, Content, MAX_BLOBS, OutgoingBlob, in_places};
pub use block::{MAX_BLOCK, Packer};
pub use control::{Control, MAX_REASON};
pub use decoder::{Admit, Decoder, Event, MAX_UNFINISHED, Offer};
pub use header::{Attempt, MAGIC, MAX_BODY, MAX_CHUNK, MAX_NOISE, PROTOCOL, put_preamble};
pub use hello::{AgentHello, Attach, ClientHello, WorkerHello, WorkerSpec, attach, hello, read_hello};
pub use message::{ASKS, Body, MAX_NOTE, MAX_PARTS, Message, Outcome, Outgoing, SLOT_BITS, TELLS, slot_number};
pub use outbox::{LEFT_OUT, MAX_OUTPUT_FRAME, MAX_SMALL_MESSAGE, Outbox, STDERR, STDOUT};
pub use reader::EventReader;
pub(crate) use stream::MAX_WRITE;
pub use stream::{FrameSender, greet};
pub use stripe::Stripe;
pub use stripe_blocks::ArrivedBlocks;
