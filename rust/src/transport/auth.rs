//! Who are we? The user's keys, certificates and ssh-agent, tried in order until the server accepts one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use russh::client::{AuthResult, Handle};
use russh::keys::agent::AgentIdentity;
use russh::keys::agent::client::AgentClient;
use russh::keys::signature::Signer as _;
use russh::keys::ssh_encoding::Encode;
use russh::keys::ssh_key::Error;
use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};
use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Algorithm, Certificate, HashAlg, PrivateKey, PrivateKeyWithHashAlg, PublicKey, load_secret_key};
use russh::{AgentAuthError, Signer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;

use crate::error::SshError;
use crate::transport::host_key::{ConnectionHandler, fingerprint};
use crate::transport::identities;

/// A way to prove who we are.
#[derive(Clone)]
pub enum Identity {
    /// A private key.
    Key(Arc<PrivateKey>),
    /// The private key in this file, which may be missing, and the certificate in the other.
    File(PathBuf, Option<PathBuf>),
    /// The user's ssh-agent.
    SshAgent(SshAgent),
}

/// The keys and certificates that the ssh-agent at a socket holds.
#[derive(Clone)]
pub struct SshAgent {
    pub socket: PathBuf,
    /// Keys that are tried first, in this order.
    pub wanted: Vec<PublicKey>,
    /// Whether only the wanted keys are tried.
    pub only: bool,
    /// Files with certificates for keys that the ssh-agent holds.
    pub certificates: Vec<PathBuf>,
}

/// Make a fresh Ed25519 key.
///
/// # Errors
/// [`SshError::Key`] when the system has no randomness to give.
pub fn new_key() -> Result<PrivateKey, SshError> {
    let mut seed = [0_u8; 32];
    getrandom::fill(&mut seed).map_err(|e| SshError::Key(e.to_string()))?;
    Ok(PrivateKey::from(Ed25519Keypair::from_seed(&seed)))
}

/// Prove to the server that we are `user`, with the first of the identities that it accepts.
///
/// # Errors
/// [`SshError::Authentication`], which lists what was tried, if the server accepts none.
pub(super) async fn authenticate(
    handle: &mut Handle<ConnectionHandler>,
    user: &str,
    identities: &[Identity],
) -> Result<(), SshError> {
    let mut attempts = Attempts { handle, user, tried: Vec::new(), accepts: String::new(), offered: Vec::new() };
    let passed = attempts.try_all(identities).await;
    let Attempts { tried, mut accepts, .. } = attempts;
    match passed {
        Ok(true) => return Ok(()),
        Err(why) if tried.is_empty() => return Err(why),
        Err(why) => {
            accepts = format!(
                "nothing more: it hung up ({why}). Servers allow few keys (MaxAuthTries): \
                 name the right one with IdentityFile and IdentitiesOnly yes"
            );
        }
        Ok(false) => {}
    }
    let tried = if tried.is_empty() { "no key to try".to_owned() } else { tried.join(", ") };
    Err(SshError::Authentication { user: user.to_owned(), tried, accepts })
}

/// The attempts at one authentication.
struct Attempts<'a> {
    handle: &'a mut Handle<ConnectionHandler>,
    user: &'a str,
    /// What was tried in vain, a phrase each, for the error.
    tried: Vec<String>,
    /// The methods that the server accepts, as it said after the last attempt.
    accepts: String,
    /// The keys of the ssh-agent that were tried.
    offered: Vec<KeyData>,
}

impl Attempts<'_> {
    /// Try each identity. Return whether the server accepted one.
    async fn try_all(&mut self, identities: &[Identity]) -> Result<bool, SshError> {
        for identity in identities {
            let passed = match identity {
                Identity::Key(key) => self.try_key(key).await?,
                Identity::File(path, certificate) => self.try_file(path, certificate.as_deref()).await?,
                Identity::SshAgent(agent) => self.try_ssh_agent(agent).await?,
            };
            if passed {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn try_key(&mut self, key: &Arc<PrivateKey>) -> Result<bool, SshError> {
        let passed = self.sign_with_key(key, None).await?;
        if !passed {
            self.tried.push(fingerprint(key.public_key()));
        }
        Ok(passed)
    }

    async fn try_file(&mut self, path: &Path, certificate: Option<&Path>) -> Result<bool, SshError> {
        let key = match load_secret_key(path, None) {
            Ok(key) => Arc::new(key),
            Err(russh::keys::Error::IO(e)) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(russh::keys::Error::KeyIsEncrypted) => {
                // The public half needs no passphrase. If the ssh-agent holds this key, the server has refused it already.
                let locked = PrivateKey::read_openssh_file(path);
                if !locked.is_ok_and(|key| self.offered.contains(key.public_key().key_data())) {
                    self.tried.push(format!("{0} has a passphrase: `ssh-add {0}` first", path.display()));
                }
                return Ok(false);
            }
            Err(why) => {
                self.tried.push(format!("{} is not readable: {why}", path.display()));
                return Ok(false);
            }
        };
        let certificate = certificate.and_then(identities::certificate);
        for certificate in certificate.into_iter().map(Some).chain([None]) {
            if self.sign_with_key(&key, certificate).await? {
                return Ok(true);
            }
        }
        self.tried.push(format!("{} ({})", path.display(), fingerprint(key.public_key())));
        Ok(false)
    }

    async fn try_ssh_agent(&mut self, agent: &SshAgent) -> Result<bool, SshError> {
        let socket = &agent.socket;
        let Ok(mut client) = AgentClient::connect_uds(socket).await else {
            self.tried.push(format!("no ssh-agent answers at {}", socket.display()));
            return Ok(false);
        };
        let held = match identities::held(socket).await {
            Ok(held) => held,
            Err(why) => {
                self.tried.push(format!("the ssh-agent at {} failed: {why}", socket.display()));
                return Ok(false);
            }
        };
        for (certificate, key) in offers(&held, agent) {
            let (name, what) = (fingerprint(&key), if certificate.is_some() { "a certificate for " } else { "" });
            self.offered.push(key.key_data().clone());
            match self.sign_with_ssh_agent(&mut client, &held, certificate, key).await? {
                Ok(true) => return Ok(true),
                Ok(false) => self.tried.push(format!("{what}{name} of the ssh-agent")),
                Err(why) => self.tried.push(format!("{what}{name} of the ssh-agent, which failed: {why}")),
            }
            if self.handle.is_closed() {
                return Err(closed());
            }
        }
        Ok(false)
    }

    /// Offer one key of the ssh-agent, or a certificate for it. The inner error is the ssh-agent's.
    async fn sign_with_ssh_agent(
        &mut self,
        client: &mut AgentClient<UnixStream>,
        held: &[AgentIdentity],
        certificate: Option<Certificate>,
        key: PublicKey,
    ) -> Result<Result<bool, AgentAuthError>, SshError> {
        let hash = self.hash(key.algorithm()).await?;
        let result = if let Some(certificate) = certificate {
            let mut signer = SshAgentSigner { client, held };
            self.handle.authenticate_certificate_with(self.user, certificate, hash, &mut signer).await
        } else {
            self.handle.authenticate_publickey_with(self.user, key, hash, client).await
        };
        result.map(|result| self.passed(result)).map_or_else(|why| Ok(Err(why)), |passed| passed.map(Ok))
    }

    /// Offer a private key, or a certificate for it.
    async fn sign_with_key(
        &mut self,
        key: &Arc<PrivateKey>,
        certificate: Option<Certificate>,
    ) -> Result<bool, SshError> {
        let hash = self.hash(key.algorithm()).await?;
        let result = if let Some(certificate) = certificate {
            // russh's own way to sign for a certificate with a key names SHA-1 if that is an RSA key.
            let mut signer = KeySigner(key);
            match self.handle.authenticate_certificate_with(self.user, certificate, hash, &mut signer).await {
                Ok(AuthResult::Failure { .. }) | Err(AgentAuthError::Send(_)) if self.handle.is_closed() => {
                    return Err(closed());
                }
                result => result.map_err(|why| SshError::Key(why.to_string()))?,
            }
        } else {
            let key = PrivateKeyWithHashAlg::new(Arc::clone(key), hash);
            self.handle.authenticate_publickey(self.user, key).await?
        };
        self.passed(result)
    }

    /// Return the hash with which a key of this algorithm signs. With RSA it is never SHA-1, as for OpenSSH: a server that
    /// does not list its algorithms gets SHA-512.
    async fn hash(&self, algorithm: Algorithm) -> Result<Option<HashAlg>, SshError> {
        if !algorithm.is_rsa() {
            return Ok(None);
        }
        Ok(Some(self.handle.best_supported_rsa_hash().await?.flatten().unwrap_or(HashAlg::Sha512)))
    }

    /// Return whether the server has accepted what was offered.
    fn passed(&mut self, result: AuthResult) -> Result<bool, SshError> {
        match result {
            AuthResult::Success => Ok(true),
            // A server that refuses says what it accepts instead. Without that, russh tells the end of the connection.
            AuthResult::Failure { remaining_methods, .. } if remaining_methods.is_empty() => Err(closed()),
            AuthResult::Failure { remaining_methods, .. } => {
                self.accepts = remaining_methods.iter().map(<&str>::from).collect::<Vec<_>>().join(", ");
                Ok(false)
            }
        }
    }
}

/// Return the error of a connection that ended in the authentication.
fn closed() -> SshError {
    SshError::Protocol("the connection was closed".to_owned())
}

/// Return what an ssh-agent has to offer, in the order in which it is tried: before each key the certificates for it.
fn offers(held: &[AgentIdentity], agent: &SshAgent) -> Vec<(Option<Certificate>, PublicKey)> {
    let files: Vec<_> = agent.certificates.iter().filter_map(|path| identities::certificate(path)).collect();
    let mut keys: Vec<PublicKey> = Vec::new();
    for key in held.iter().map(|identity| identity.public_key().into_owned()) {
        if keys.iter().all(|other| other.key_data() != key.key_data()) {
            keys.push(key);
        }
    }
    let place = |key: &PublicKey| agent.wanted.iter().position(|w| w.key_data() == key.key_data());
    keys.retain(|key| !agent.only || place(key).is_some());
    keys.sort_by_key(|key| place(key).unwrap_or(usize::MAX));
    let mut all = Vec::new();
    for key in keys {
        // With `only`, just the certificates of the named files are tried, as ssh does.
        let its_own = held.iter().filter_map(|identity| match identity {
            AgentIdentity::Certificate { certificate, .. } if !agent.only => Some(certificate),
            _ => None,
        });
        for certificate in its_own.chain(&files).filter(|c| c.public_key() == key.key_data()) {
            all.push((Some(certificate.clone()), key.clone()));
        }
        if held.iter().any(|i| matches!(i, AgentIdentity::PublicKey { key: k, .. } if k.key_data() == key.key_data())) {
            all.push((None, key));
        }
    }
    all
}

/// Signs for a certificate with what the ssh-agent holds: the certificate's key, or only the certificate itself.
struct SshAgentSigner<'a, S: AsyncRead + AsyncWrite + Unpin + Send> {
    client: &'a mut AgentClient<S>,
    held: &'a [AgentIdentity],
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Signer for SshAgentSigner<'_, S> {
    type Error = AgentAuthError;

    async fn auth_sign(
        &mut self,
        identity: &AgentIdentity,
        hash: Option<HashAlg>,
        data: Vec<u8>,
    ) -> Result<Vec<u8>, Self::Error> {
        let key = identity.public_key();
        let same = |i: &&AgentIdentity| i.public_key().key_data() == key.key_data();
        let with = self.held.iter().filter(same).max_by_key(|i| matches!(i, AgentIdentity::PublicKey { .. }));
        self.client.auth_sign(with.unwrap_or(identity), hash, data).await
    }
}

/// Signs for a certificate with its private key.
struct KeySigner<'a>(&'a PrivateKey);

impl Signer for KeySigner<'_> {
    type Error = AgentAuthError;

    async fn auth_sign(
        &mut self,
        _identity: &AgentIdentity,
        hash: Option<HashAlg>,
        mut data: Vec<u8>,
    ) -> Result<Vec<u8>, Self::Error> {
        let signed = match self.0.key_data() {
            KeypairData::Rsa(pair) => (pair, hash).try_sign(&data),
            pair => pair.try_sign(&data),
        };
        let signature = signed.map_err(Error::from).and_then(Vec::try_from).map_err(russh::keys::Error::from)?;
        signature.encode(&mut data).map_err(russh::keys::Error::from)?;
        Ok(data)
    }
}
