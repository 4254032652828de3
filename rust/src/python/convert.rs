//! Arguments and errors on their way across the border: one exception per cause, and the values that are no payload.

use std::ffi::c_int;
use std::fmt::Display;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use pyo3::{create_exception, import_exception};
use russh::keys::{PrivateKey, PublicKey};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{NodeError, SshError};
use crate::python::buffer::owned;
use crate::text;

create_exception!(skyward_lite._core, CoreError, PyRuntimeError);
create_exception!(skyward_lite._core, UnreachableError, CoreError);
create_exception!(skyward_lite._core, ConnectTimeoutError, CoreError);
create_exception!(skyward_lite._core, HungUpError, CoreError);
create_exception!(skyward_lite._core, HostKeyError, CoreError);
create_exception!(skyward_lite._core, RevokedHostKeyError, HostKeyError);
create_exception!(skyward_lite._core, AuthenticationError, CoreError);
create_exception!(skyward_lite._core, ClosedError, CoreError);

// The exception of the public tree that a forked child gets, in whichever method it uses the pool.
import_exception!(skyward_lite.errors, PoolClosedError);

pub(super) fn core_error(error: impl Display) -> PyErr {
    CoreError::new_err(error.to_string())
}

impl From<NodeError> for PyErr {
    /// Return the exception for the error's cause; its only argument is the error's text.
    fn from(error: NodeError) -> Self {
        let text = error.to_string();
        match error {
            NodeError::Ssh(SshError::Io(_)) => UnreachableError::new_err(text),
            NodeError::Ssh(SshError::Timeout(_)) => ConnectTimeoutError::new_err(text),
            NodeError::Ssh(SshError::HungUp(_)) => HungUpError::new_err(text),
            NodeError::Ssh(SshError::HostKey { revoked: true, .. }) => RevokedHostKeyError::new_err(text),
            NodeError::Ssh(SshError::HostKey { .. }) => HostKeyError::new_err(text),
            NodeError::Ssh(SshError::Authentication { .. }) => AuthenticationError::new_err(text),
            NodeError::Closed => ClosedError::new_err(text),
            _ => CoreError::new_err(text),
        }
    }
}

pub(super) fn seconds(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|e| PyValueError::new_err(e.to_string()))
}

pub(super) fn socket(fd: c_int) -> PyResult<UnixStream> {
    owned(fd).map(UnixStream::from)
}

pub(super) fn private_key(text: &str) -> PyResult<PrivateKey> {
    PrivateKey::from_openssh(text).map_err(|e| core_error(SshError::Key(e.to_string())))
}

pub(super) fn public_key(text: &str) -> PyResult<PublicKey> {
    PublicKey::from_openssh(text).map_err(|e| core_error(SshError::Key(e.to_string())))
}

/// Return a dataclass of `hello.py` as the struct with the same fields.
pub(super) fn from_dataclass<T: DeserializeOwned>(record: &Bound<'_, PyAny>) -> PyResult<T> {
    let py = record.py();
    let fields = py.import("dataclasses")?.call_method1("asdict", (record,))?;
    let json: String = py.import("json")?.call_method1("dumps", (fields,))?.extract()?;
    serde_json::from_str(&json).map_err(core_error)
}

/// Return a struct as the dataclass of `hello.py` that has this name and the same fields.
pub(super) fn to_dataclass(py: Python<'_>, name: &str, record: &impl Serialize) -> PyResult<Py<PyAny>> {
    let json = serde_json::to_string(record).map_err(core_error)?;
    let fields = py.import("json")?.call_method1("loads", (json,))?;
    let class = py.import("skyward_lite.hello")?.getattr(name)?;
    Ok(class.call((), Some(fields.cast::<PyDict>()?))?.unbind())
}

/// Return the text of a node or a cloud as it may be shown.
#[pyfunction]
#[pyo3(signature = (message, limit=text::LIMIT, *, lines=true))]
pub(super) fn printable(message: &Bound<'_, PyAny>, limit: usize, lines: bool) -> PyResult<String> {
    let show = if lines { text::lines::<&[u8]> } else { text::line::<&[u8]> };
    Ok(match message.cast::<PyString>() {
        Ok(message) => show(message.to_string_lossy().as_bytes(), limit),
        Err(_) => show(message.extract::<&[u8]>()?, limit),
    })
}
