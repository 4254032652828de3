//! [`Connection`], what the user's process has of a way to a machine, and what it takes to make one.

// pyo3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]

use std::collections::HashMap;
use std::ffi::c_int;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use russh::keys::PublicKey;

use crate::client::pool::{Endpoint, Pool};
use crate::python::buffer::snapshot;
use crate::python::convert::{core_error, private_key, public_key, seconds, socket};
use crate::transport::auth::{Identity, SshAgent};
use crate::transport::connection;
use crate::transport::host_key::fingerprint;
use crate::transport::ssh::Algorithms;

/// The stub's `Endpoint`: a socket, or a host and a port.
#[derive(FromPyObject)]
pub(super) enum EndpointArgument {
    Socket(c_int),
    Address(String, u16),
}

impl EndpointArgument {
    pub(super) fn endpoint(self) -> PyResult<Endpoint> {
        Ok(match self {
            Self::Socket(fd) => Endpoint::Socket(socket(fd)?),
            Self::Address(host, port) => Endpoint::Address(host, port),
        })
    }
}

/// The stub's `Identity`: a private key; an ssh-agent's socket with the wanted keys, whether only these are tried, and files
/// with certificates; or a private key's file and its certificate's file.
#[derive(FromPyObject)]
pub(super) enum IdentityArgument {
    Key(String),
    SshAgent(String, Vec<String>, bool, Vec<String>),
    File(String, Option<String>),
}

impl IdentityArgument {
    pub(super) fn identity(self) -> PyResult<Identity> {
        Ok(match self {
            Self::Key(text) => Identity::Key(Arc::new(private_key(&text)?)),
            Self::File(path, certificate) => Identity::File(path.into(), certificate.map(Into::into)),
            Self::SshAgent(socket, wanted, only, certificates) => Identity::SshAgent(SshAgent {
                socket: socket.into(),
                wanted: public_keys(&wanted)?,
                only,
                certificates: certificates.into_iter().map(Into::into).collect(),
            }),
        })
    }
}

pub(super) fn public_keys(lines: &[String]) -> PyResult<Vec<PublicKey>> {
    lines.iter().map(|line| public_key(line)).collect()
}

pub(super) fn algorithms(mut lists: HashMap<String, Vec<String>>) -> Algorithms {
    let mut take = |kind| lists.remove(kind).unwrap_or_default();
    Algorithms { kex: take("kex"), host_key: take("host_key"), cipher: take("cipher"), mac: take("mac") }
}

#[pyclass(frozen, module = "skyward_lite._core")]
pub(super) struct Connection {
    inner: Arc<connection::Connection>,
    pool: Arc<Pool>,
}

impl Connection {
    pub(super) fn new(connection: connection::Connection, pool: Arc<Pool>) -> Self {
        Self { inner: Arc::new(connection), pool }
    }

    fn known_host_key(&self) -> PyResult<&PublicKey> {
        self.inner.host_key().ok_or_else(|| core_error("a machine behind a command shows no host key"))
    }

    pub(super) fn shared(&self) -> Arc<connection::Connection> {
        Arc::clone(&self.inner)
    }
}

#[pymethods]
impl Connection {
    #[getter]
    fn host_key(&self) -> PyResult<String> {
        self.known_host_key()?.to_openssh().map_err(core_error)
    }

    #[getter]
    fn fingerprint(&self) -> PyResult<String> {
        self.known_host_key().map(fingerprint)
    }

    #[getter]
    fn program(&self) -> Option<String> {
        self.inner.program()
    }

    #[pyo3(signature = (command, stdin, bound, watch=None))]
    fn run<'py>(
        &self,
        py: Python<'py>,
        command: String,
        stdin: &Bound<'py, PyAny>,
        bound: f64,
        watch: Option<Py<PyAny>>,
    ) -> PyResult<(Option<u32>, Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let (input, bound, connection) = (snapshot(stdin)?, seconds(bound)?, Arc::clone(&self.inner));
        let mut raised = None;
        let mut tell = |watch: &Py<PyAny>, stdout: &[u8], stderr: &[u8]| {
            Python::attach(|py| watch.call1(py, (PyBytes::new(py, stdout), PyBytes::new(py, stderr))))
                .map_err(|error| raised = Some(error))
                .is_ok()
        };
        let output = py.detach(|| match &watch {
            None => self.pool.run(connection, command, input, bound).map(Some),
            Some(watch) => self.pool.run_watched(connection, command, input, bound, |out, err| tell(watch, out, err)),
        })?;
        match (output, raised) {
            (Some(output), _) => {
                Ok((output.status, PyBytes::new(py, &output.stdout), PyBytes::new(py, &output.stderr)))
            }
            (None, raised) => Err(raised.unwrap_or_else(|| core_error("the command was given up"))),
        }
    }
}
