//! SSH keys in OpenSSH's formats: made, and read.

use pyo3::prelude::*;
use russh::keys::ssh_key::LineEnding;
use russh::keys::{PrivateKey, PublicKey};

use crate::python::convert::core_error;
use crate::transport::auth::new_key;

/// Make an Ed25519 key: (private, public), in OpenSSH's formats.
#[pyfunction]
pub(super) fn generate_key() -> PyResult<(String, String)> {
    let key = new_key().map_err(core_error)?;
    let private = key.to_openssh(LineEnding::LF).map_err(core_error)?;
    let public = key.public_key().to_openssh().map_err(core_error)?;
    Ok((private.to_string(), public))
}

/// Return the public half of a private key in OpenSSH's format, which no passphrase hides; `None` if it is not readable.
#[pyfunction]
pub(super) fn public_half(private: &[u8]) -> Option<String> {
    // As OpenSSH, and unlike russh's parser: blanks, empty lines and text after the key do not matter.
    let text = String::from_utf8_lossy(private);
    let base64: String = text.split("-----").nth(2)?.split_whitespace().collect();
    let whole = format!("-----BEGIN OPENSSH PRIVATE KEY-----\n{base64}\n-----END OPENSSH PRIVATE KEY-----\n");
    let key = PublicKey::from(PrivateKey::from_openssh(whole).ok()?.public_key().key_data().clone());
    key.to_openssh().ok()
}
