//! The user's keys and certificates as OpenSSH keeps them: what an agent lists, and a certificate's file.
//!
//! Both carry comments, which may be in any encoding and which nobody reads. russh's own readers take them for UTF-8,
//! and fail for all keys of the agent if the comment of one is not.

use std::io;
use std::path::Path;

use russh::keys::agent::AgentIdentity;
use russh::keys::{Certificate, PublicKey};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Message numbers of the agent's protocol.
const REQUEST_IDENTITIES: u8 = 11;
const IDENTITIES_ANSWER: u8 = 12;
/// Bytes that an answer of the agent may have, as for OpenSSH.
const MAX_ANSWER: u32 = 256 * 1024;
/// What the names of all types of certificates end with.
const CERTIFICATE: &[u8] = b"-cert-v01@openssh.com";

/// Ask the agent at this socket for its keys and certificates. Those of an unknown kind are left out.
///
/// # Errors
/// What the socket reports; [`io::ErrorKind::InvalidData`] for an answer that is no list of keys.
pub async fn held(socket: &Path) -> io::Result<Vec<AgentIdentity>> {
    let mut agent = UnixStream::connect(socket).await?;
    agent.write_all(&[0, 0, 0, 1, REQUEST_IDENTITIES]).await?;
    let length = agent.read_u32().await?;
    let mut answer = Vec::new();
    if length <= MAX_ANSWER {
        answer.resize(usize::try_from(length).unwrap_or_default(), 0);
        agent.read_exact(&mut answer).await?;
    }
    listed(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it does not list its keys"))
}

/// Read a certificate's file; `None` if it has none.
#[must_use]
pub fn certificate(file: &Path) -> Option<Certificate> {
    let data = std::fs::read(file).ok()?;
    let line = data.split(|b| *b == b'\n').find(|line| !matches!(line.first(), None | Some(b'#')))?;
    let mut words = line.split(|b| matches!(b, b' ' | b'\t')).filter(|word| !word.is_empty());
    let (kind, blob) = (str::from_utf8(words.next()?).ok()?, str::from_utf8(words.next()?.trim_ascii()).ok()?);
    Certificate::from_openssh(&format!("{kind} {blob}")).ok()
}

fn listed(answer: &[u8]) -> Option<Vec<AgentIdentity>> {
    let mut rest = answer.strip_prefix(&[IDENTITIES_ANSWER])?;
    let count = number(&mut rest)?;
    let mut all = Vec::new();
    for _ in 0..count {
        let (key, _comment) = (string(&mut rest)?, string(&mut rest)?);
        all.extend(identity(key));
    }
    Some(all)
}

fn identity(blob: &[u8]) -> Option<AgentIdentity> {
    // A certificate's own authority is decoded by recursion, without a bound on the depth.
    let certificates = blob.windows(CERTIFICATE.len()).filter(|part| *part == CERTIFICATE).count();
    if string(&mut &*blob)?.ends_with(CERTIFICATE) {
        (certificates <= 8).then(|| Certificate::from_bytes(blob).ok())?.map(AgentIdentity::from)
    } else {
        PublicKey::from_bytes(blob).ok().map(AgentIdentity::from)
    }
}

fn number(rest: &mut &[u8]) -> Option<u32> {
    let (head, tail) = rest.split_first_chunk()?;
    *rest = tail;
    Some(u32::from_be_bytes(*head))
}

fn string<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(number(rest)?).ok()?;
    let (head, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    Some(head)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::transport::ssh::new_key;

    fn answer(entries: &[(&[u8], &[u8])]) -> Vec<u8> {
        let mut all = vec![IDENTITIES_ANSWER];
        all.extend(u32::try_from(entries.len()).unwrap().to_be_bytes());
        for part in entries.iter().flat_map(|(key, comment)| [key, comment]) {
            all.extend(u32::try_from(part.len()).unwrap().to_be_bytes());
            all.extend(*part);
        }
        all
    }

    /// Comments of any bytes do no harm, nor does a key of an unknown kind: the other keys are there.
    #[test]
    fn keys_are_listed_whatever_is_beside_them() {
        let key = new_key().unwrap().public_key().to_bytes().unwrap();
        let all = listed(&answer(&[(b"", b""), (b"\0\0\0\x01x", b"x"), (&key, b"b\xfcro\x85"), (&key, b"")])).unwrap();
        assert_eq!(all.iter().filter(|i| i.public_key().to_bytes().unwrap() == key).count(), 2);
    }

    /// An answer that ends anywhere within, or that is another message, is no list.
    #[test]
    fn broken_answers_are_refused() {
        let key = new_key().unwrap().public_key().to_bytes().unwrap();
        let whole = answer(&[(&key, b"comment")]);
        assert!((0..whole.len()).all(|end| listed(whole.get(..end).unwrap()).is_none()));
        assert!(listed(&[5]).is_none());
        assert!(listed(&[IDENTITIES_ANSWER, 255, 255, 255, 255]).is_none());
    }

    /// A certificate within a certificate, and so on, is left out before it is decoded.
    #[test]
    fn nested_certificates_are_not_decoded() {
        let name = [&b"ssh-ed25519"[..], CERTIFICATE].concat();
        let mut blob = [&u32::try_from(name.len()).unwrap().to_be_bytes()[..], &name].concat();
        blob.extend(name.repeat(100_000));
        assert!(identity(&blob).is_none());
    }
}
