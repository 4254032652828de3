//! The user's keys and certificates as OpenSSH stores them: what an ssh-agent lists, and a certificate's file.
//!
//! Both carry comments, which may be in any encoding and which nobody reads. russh's own readers take each comment for
//! UTF-8: if the comment of one key is not, they fail for all keys of the ssh-agent.

use std::io;
use std::path::Path;

use russh::keys::agent::AgentIdentity;
use russh::keys::{Certificate, PublicKey};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Message numbers of the ssh-agent's protocol (draft-ietf-sshm-ssh-agent, section 5.1).
const REQUEST_IDENTITIES: u8 = 11;
const IDENTITIES_ANSWER: u8 = 12;
/// Largest answer of an ssh-agent, in bytes; OpenSSH has the same bound.
const MAX_ANSWER: u32 = 256 * 1024;
/// The end of every certificate type's name.
const CERTIFICATE_SUFFIX: &[u8] = b"-cert-v01@openssh.com";
/// Certificates that one blob may have within another, itself included.
const MAX_NESTED_CERTIFICATES: usize = 8;

/// Ask the ssh-agent at this socket for its keys and certificates. Keys of an unknown type are left out.
///
/// # Errors
/// The socket's errors; [`io::ErrorKind::InvalidData`] for an answer that is no list of keys.
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

/// Return the certificate in a file; `None` if there is none.
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
    // A certificate names the key of its authority, which may be a certificate in turn: russh decodes them by recursion
    // without a bound on the depth, so a blob with too many is left out.
    let certificates = blob.windows(CERTIFICATE_SUFFIX.len()).filter(|part| *part == CERTIFICATE_SUFFIX).count();
    if string(&mut &*blob)?.ends_with(CERTIFICATE_SUFFIX) {
        (certificates <= MAX_NESTED_CERTIFICATES).then(|| Certificate::from_bytes(blob).ok())?.map(AgentIdentity::from)
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
    use crate::transport::auth::new_key;

    fn answer(entries: &[(&[u8], &[u8])]) -> Vec<u8> {
        let mut all = vec![IDENTITIES_ANSWER];
        all.extend(u32::try_from(entries.len()).unwrap().to_be_bytes());
        for part in entries.iter().flat_map(|(key, comment)| [key, comment]) {
            all.extend(u32::try_from(part.len()).unwrap().to_be_bytes());
            all.extend(*part);
        }
        all
    }

    /// Comments of any bytes do no harm, nor does a key of an unknown type: the other keys are listed.
    #[test]
    fn keys_are_listed_whatever_is_beside_them() {
        let key = new_key().unwrap().public_key().to_bytes().unwrap();
        let all = listed(&answer(&[(b"", b""), (b"\0\0\0\x01x", b"x"), (&key, b"b\xfcro\x85"), (&key, b"")])).unwrap();
        assert_eq!(all.iter().filter(|i| i.public_key().to_bytes().unwrap() == key).count(), 2);
    }

    /// An answer that is cut anywhere, or that is another message, is no list.
    #[test]
    fn broken_answers_are_refused() {
        let key = new_key().unwrap().public_key().to_bytes().unwrap();
        let whole = answer(&[(&key, b"comment")]);
        assert!((0..whole.len()).all(|end| listed(whole.get(..end).unwrap()).is_none()));
        assert!(listed(&[5]).is_none());
        assert!(listed(&[IDENTITIES_ANSWER, 255, 255, 255, 255]).is_none());
    }

    /// Certificates that are nested deeply are left out before they are decoded.
    #[test]
    fn nested_certificates_are_not_decoded() {
        let name = [&b"ssh-ed25519"[..], CERTIFICATE_SUFFIX].concat();
        let mut blob = [&u32::try_from(name.len()).unwrap().to_be_bytes()[..], &name].concat();
        blob.extend(name.repeat(100_000));
        assert!(identity(&blob).is_none());
    }
}
