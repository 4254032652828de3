//! Streams in chunks with a hash: what comes out is what went in, or an error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::io;

use proptest::prelude::*;
use skyward_lite::wire::checked;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf, duplex, empty, sink, split};

/// Bytes that come in pieces of these lengths, over and over.
struct Pieces {
    bytes: Vec<u8>,
    lengths: Vec<usize>,
    next: usize,
}

impl Pieces {
    fn new(bytes: &[u8], lengths: &[usize]) -> Self {
        Self { bytes: bytes.to_vec(), lengths: lengths.to_vec(), next: 0 }
    }
}

impl AsyncRead for Pieces {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        let count = self.lengths[self.next % self.lengths.len()].min(self.bytes.len()).min(buf.remaining());
        self.next += 1;
        let rest = self.bytes.split_off(count);
        buf.put_slice(&self.bytes);
        self.bytes = rest;
        std::task::Poll::Ready(Ok(()))
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

/// Return the stream that a client writes.
async fn written(parts: &[Vec<u8>]) -> Vec<u8> {
    let mut stream = Vec::new();
    let (_, mut writer) = checked::ask(empty(), &mut stream);
    for part in parts {
        writer.write_all(part).await.unwrap();
        writer.flush().await.unwrap();
    }
    drop(writer);
    stream
}

/// Return what an agent reads of a stream that comes in pieces, and whether the end of it was an error.
async fn read(stream: &[u8], lengths: &[usize]) -> (Vec<u8>, bool) {
    let (mut reader, _) = checked::answer(Pieces::new(stream, lengths), sink());
    let mut got = Vec::new();
    let end = reader.read_to_end(&mut got).await;
    (got, end.is_err())
}

fn parts() -> impl Strategy<Value = Vec<Vec<u8>>> {
    prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 1..8)
}

proptest! {
    #[test]
    fn what_comes_out_is_what_went_in(parts in parts(), lengths in prop::collection::vec(1usize..300, 1..5)) {
        let got = block_on(async { read(&written(&parts).await, &lengths).await });
        prop_assert_eq!(got, (parts.concat(), false));
    }

    #[test]
    fn a_changed_stream_is_a_beginning_of_what_went_in(
        parts in parts(), place in any::<prop::sample::Index>(), kind in 0..4, bit in 0u32..8, count in 1usize..40,
    ) {
        let all = parts.concat();
        block_on(async {
            let mut stream = written(&parts).await;
            let at = place.index(stream.len());
            let piece: Vec<u8> = stream[at..].iter().copied().take(count).collect();
            match kind {
                0 => stream[at] ^= 1u8 << bit,
                1 => drop(stream.splice(at..at, piece)),
                2 => drop(stream.drain(at..at + piece.len())),
                _ => stream.truncate(at),
            }
            // A stream whose first mark is none is taken for one without chunks, which no session begins with.
            if stream.starts_with(&[0xf5, b'S', b'k', 0xf8]) {
                let (got, _) = read(&stream, &[4096]).await;
                assert!(all.starts_with(&got), "{got:?} of {all:?}");
            }
        });
    }
}

#[test]
fn a_chunk_that_comes_twice_or_not_at_all_is_an_error() {
    block_on(async {
        let parts = [vec![1; 10], vec![2; 10], vec![3; 10]];
        let stream = written(&parts).await;
        let chunk = stream.len() / 3;
        for (twice, got) in [(0, &parts[..1]), (1, &parts[..2])] {
            let doubled = [&stream[..(twice + 1) * chunk], &stream[twice * chunk..]].concat();
            assert_eq!(read(&doubled, &[7]).await, (got.concat(), true));
        }
        let lost = [&stream[..chunk], &stream[2 * chunk..]].concat();
        assert_eq!(read(&lost, &[7]).await, (parts[0].clone(), true));
    });
}

#[test]
fn noise_before_the_first_chunk_is_passed_on() {
    block_on(async {
        let stream = written(&[b"frames".to_vec()]).await;
        for noise in [&b""[..], b"WELCOME\r\n", b"\xf5S", b"\xf5Sk\xf5Sk"] {
            for length in [1, 3, 1000] {
                let all = [noise, &stream].concat();
                let (mut reader, _) = checked::ask(Pieces::new(&all, &[length]), sink());
                let mut got = Vec::new();
                reader.read_to_end(&mut got).await.unwrap();
                assert_eq!(got, [noise, b"frames"].concat());
            }
            let (mut reader, _) = checked::ask(Pieces::new(noise, &[1]), sink());
            let mut got = Vec::new();
            reader.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, noise);
        }
    });
}

#[test]
fn the_rest_of_a_chunk_that_is_late_is_asked_for() {
    block_on(async {
        let parts = [b"begun".to_vec(), b"and ended".to_vec()];
        let stream = written(&parts).await;
        let (mut there, here) = duplex(1000);
        let (reading, writing) = split(here);
        let (mut reader, mut writer) = checked::answer(reading, writing);
        there.write_all(&stream[..30]).await.unwrap();
        let (mut got, mut asked) = ([0; 5 + 9], [0; 16]);
        let (read, ()) = tokio::join!(reader.read_exact(&mut got), async {
            there.read_exact(&mut asked).await.unwrap();
            there.write_all(&stream[30..]).await.unwrap();
        });
        assert_eq!((read.unwrap(), got.to_vec()), (14, parts.concat()));
        // What asks is a chunk without bytes: the client reads what follows it.
        writer.write_all(b"an answer").await.unwrap();
        drop((reader, writer));
        let mut answered = asked.to_vec();
        there.read_to_end(&mut answered).await.unwrap();
        let (mut client, _) = checked::ask(Pieces::new(&answered, &[7]), sink());
        let mut text = Vec::new();
        client.read_to_end(&mut text).await.unwrap();
        assert_eq!(text, b"an answer");
    });
}

#[test]
fn an_agent_answers_as_its_client_writes() {
    block_on(async {
        for is_checked in [true, false] {
            let stream = if is_checked { written(&[b"hello".to_vec()]).await } else { b"hello".to_vec() };
            let mut answered = Vec::new();
            let (mut reader, mut writer) = checked::answer(Pieces::new(&stream, &[2]), &mut answered);
            let mut got = Vec::new();
            reader.read_to_end(&mut got).await.unwrap();
            writer.write_all(b"hello").await.unwrap();
            writer.shutdown().await.unwrap();
            assert_eq!((got.as_slice(), answered == stream), (&b"hello"[..], true));
        }
    });
}
