//! The boundary: the only file that names pyo3. Arguments are converted first, then the GIL is released.
//!
//! Payloads cross as a pickle (`pickled`) and a list of out-of-band buffers. Up to [`INLINE`] bytes are copied while the
//! GIL is held, more without it. Docstrings for users of this module are in `_core.pyi`.

// The buffer protocol and descriptors handed over as numbers are unsafe by nature; each use says why it is sound.
#![allow(unsafe_code)]
// pyo3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_int;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyMemoryError, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyString, PyTuple};
use pyo3::{create_exception, ffi};
use russh::keys::ssh_key::LineEnding;
use russh::keys::{PrivateKey, PublicKey};

use crate::client::pool::{self, Endpoint, Node, NodeSpec, NodeState};
use crate::error::{AgentError, NodeError, SessionError, SshError};
use crate::node::agent::{self, AgentSpec};
use crate::node::worker;
use crate::text;
use crate::timing::Timing;
use crate::transport::server;
use crate::transport::ssh::{self, Algorithms, Identity, Target, new_key};
use crate::wire::{Attempt, MAX_BODY, MAX_PARTS, Message, PROTOCOL};
use crate::wire::{ClientHello, WorkerHello};

/// How long a thread that waits for the answer to a note may be deaf to signals.
const SLICE: Duration = Duration::from_millis(100);
/// Bytes up to which a payload is copied without releasing the GIL.
const INLINE: usize = 32 * 1024;

create_exception!(skyward_lite._core, CoreError, PyRuntimeError);

/// Memory received from the wire: writable, without a copy, through the buffer protocol.
#[pyclass(module = "skyward_lite._core")]
struct Buffer {
    data: BytesMut,
}

#[pymethods]
impl Buffer {
    fn __len__(&self) -> usize {
        self.data.len()
    }

    fn copy(&self, py: Python<'_>) -> Self {
        let data = &self.data;
        Self { data: py.detach(|| BytesMut::from(&data[..])) }
    }

    /// # Safety
    /// Called by the interpreter with a valid `view`.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let mut this = slf.borrow_mut();
        let len = ffi::Py_ssize_t::try_from(this.data.len()).map_err(|e| PyBufferError::new_err(e.to_string()))?;
        let start = this.data.as_mut_ptr().cast();
        // SAFETY: the memory lives as long as the object, to which the view holds a reference; nothing in this class
        // ever moves or resizes it.
        if unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start, len, 0, flags) } == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}

fn buffer(py: Python<'_>, part: Bytes) -> PyResult<Bound<'_, Buffer>> {
    // A large part owns its memory: no copy. A small one is a slice of its block.
    let data = if part.len() <= INLINE { BytesMut::from(&part[..]) } else { py.detach(|| BytesMut::from(part)) };
    Bound::new(py, Buffer { data })
}

/// `(task, attempt, code, nanos, pickled, buffers)`
fn to_python(py: Python<'_>, message: Message) -> PyResult<Bound<'_, PyTuple>> {
    let mut parts = message.parts.into_iter();
    let pickled = parts.next().unwrap_or_default();
    let pickled =
        if pickled.len() <= INLINE { PyBytes::new(py, &pickled).into_any() } else { buffer(py, pickled)?.into_any() };
    let buffers = if parts.len() == 0 {
        py.None().into_bound(py)
    } else {
        let buffers = parts.map(|part| buffer(py, part)).collect::<PyResult<Vec<_>>>()?;
        PyList::new(py, buffers)?.into_any()
    };
    (message.id.task, message.id.attempt, message.code, message.nanos, pickled, buffers).into_pyobject(py)
}

/// A snapshot of a bytes-like object.
fn snapshot(object: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    let py = object.py();
    if let Ok(bytes) = object.cast::<PyBytes>()
        && bytes.as_bytes().len() <= INLINE
    {
        return Ok(Bytes::copy_from_slice(bytes.as_bytes()));
    }
    let view = PyBuffer::<u8>::get(object)?;
    if !view.is_c_contiguous() {
        return Err(PyValueError::new_err("payload buffers must be C-contiguous bytes (see PickleBuffer.raw())"));
    }
    let (start, len) = (view.buf_ptr() as usize, view.len_bytes());
    if len == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: `view` keeps the memory alive and its size fixed until it is dropped below. Another thread that writes
    // to the array meanwhile races with us as it would with any pickler that copies it.
    let copy = move || {
        let mut copy = Vec::new();
        copy.try_reserve_exact(len)?;
        copy.extend_from_slice(unsafe { std::slice::from_raw_parts(start as *const u8, len) });
        Ok(Bytes::from(copy))
    };
    let copied: Result<_, std::collections::TryReserveError> = if len <= INLINE { copy() } else { py.detach(copy) };
    copied.map_err(|_| PyMemoryError::new_err(format!("no memory to send {len} bytes")))
}

fn parts(pickled: &Bound<'_, PyAny>, buffers: Option<Vec<Bound<'_, PyAny>>>) -> PyResult<Vec<Bytes>> {
    let Some(buffers) = buffers else { return Ok(vec![snapshot(pickled)?]) };
    if buffers.len() >= MAX_PARTS {
        return Err(PyValueError::new_err(format!("more than {} buffers in one message", MAX_PARTS - 1)));
    }
    std::iter::once(pickled).chain(buffers.iter()).map(snapshot).collect()
}

/// Where the memory of a bytes-like object begins.
#[pyfunction]
fn address(data: &Bound<'_, PyAny>) -> PyResult<usize> {
    Ok(PyBuffer::<u8>::get(data)?.buf_ptr() as usize)
}

/// What a node or a cloud says, as it may be shown.
#[pyfunction]
#[pyo3(signature = (said, limit=text::LIMIT, *, lines=true))]
fn printable(said: &Bound<'_, PyAny>, limit: usize, lines: bool) -> PyResult<String> {
    let show = if lines { text::lines::<&[u8]> } else { text::line::<&[u8]> };
    Ok(match said.cast::<PyString>() {
        Ok(said) => show(said.to_string_lossy().as_bytes(), limit),
        Err(_) => show(said.extract::<&[u8]>()?, limit),
    })
}

fn core_error(error: impl std::fmt::Display) -> PyErr {
    CoreError::new_err(error.to_string())
}

/// Own the descriptor that Python code detached from its socket.
fn owned(fd: c_int) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(PyValueError::new_err(format!("{fd} is no file descriptor")));
    }
    // SAFETY: the stub says that the descriptor is given away.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn socket(fd: c_int) -> PyResult<UnixStream> {
    owned(fd).map(UnixStream::from)
}

fn private_key(text: &str) -> PyResult<PrivateKey> {
    PrivateKey::from_openssh(text).map_err(|e| core_error(SshError::Key(e.to_string())))
}

fn public_key(text: &str) -> PyResult<PublicKey> {
    PublicKey::from_openssh(text).map_err(|e| core_error(SshError::Key(e.to_string())))
}

/// A fresh Ed25519 key: (private, public), in OpenSSH's formats.
#[pyfunction]
fn generate_key() -> PyResult<(String, String)> {
    let key = new_key().map_err(core_error)?;
    let private = key.to_openssh(LineEnding::LF).map_err(core_error)?;
    let public = key.public_key().to_openssh().map_err(core_error)?;
    Ok((private.to_string(), public))
}

fn seconds(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|e| PyValueError::new_err(e.to_string()))
}

/// Where an SSH server is: a socket, or a host and a port.
#[derive(FromPyObject)]
enum At {
    Socket(c_int),
    Address(String, u16),
}

/// What to prove with who we are: a private key; a file with one, and one with its certificate; an agent's socket, the
/// keys wanted first, whether only these, and files with certificates for its keys.
#[derive(FromPyObject)]
enum Proof {
    Key(String),
    Agent(String, Vec<String>, bool, Vec<String>),
    File(String, Option<String>),
}

#[pyclass(frozen, module = "skyward_lite._core")]
struct Connection {
    inner: Arc<ssh::Connection>,
    pool: Py<Pool>,
}

#[pymethods]
impl Connection {
    #[getter]
    fn host_key(&self) -> PyResult<String> {
        self.inner.host_key.to_openssh().map_err(core_error)
    }

    fn run<'py>(
        &self,
        py: Python<'py>,
        command: String,
        stdin: &Bound<'py, PyAny>,
        bound: f64,
    ) -> PyResult<(Option<u32>, Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let (input, bound, connection) = (snapshot(stdin)?, seconds(bound)?, Arc::clone(&self.inner));
        let pool = self.pool.get();
        let output = py.detach(|| pool.inner.run(connection, command, input, bound)).map_err(core_error)?;
        Ok((output.status, PyBytes::new(py, &output.stdout), PyBytes::new(py, &output.stderr)))
    }
}

#[pyclass(frozen, module = "skyward_lite._core")]
struct Pool {
    inner: pool::Pool,
}

fn describe<'py>(py: Python<'py>, nodes: &[Node]) -> PyResult<Bound<'py, PyList>> {
    let rows = nodes.iter().map(|n| {
        let why = match &n.state {
            NodeState::Draining(why) | NodeState::Lost(why) => why.as_str(),
            NodeState::Connecting | NodeState::Ready | NodeState::Closed => "",
        };
        let rtt = (n.rtt != Duration::MAX).then_some(n.rtt.as_secs_f64());
        let pid = n.hello.as_ref().map(|h| h.pid);
        (n.name.as_str(), n.state.name(), why, n.slots, rtt, pid)
    });
    PyList::new(py, rows.collect::<Vec<_>>())
}

#[pymethods]
impl Pool {
    #[new]
    #[pyo3(signature = (attempts, max_payload, timing=None))]
    fn new(attempts: u16, max_payload: usize, timing: Option<(f64, f64, f64)>) -> PyResult<Self> {
        let timing = match timing {
            Some((heartbeat, answer, drain)) => Timing {
                heartbeat: seconds(heartbeat)?,
                answer: seconds(answer)?,
                drain: seconds(drain)?,
                ..Timing::DEFAULT
            },
            None => Timing::default(),
        };
        let inner = pool::Pool::with_timing(attempts, max_payload, timing).map_err(PyOSError::new_err)?;
        Ok(Self { inner })
    }

    fn add_node(&self, name: String) -> usize {
        self.inner.add_node(name)
    }

    fn expect(&self, py: Python<'_>, count: usize) {
        py.detach(|| self.inner.expect(count));
    }

    #[allow(clippy::too_many_arguments)] // keyword arguments in Python
    #[pyo3(signature = (*, endpoint, user, host_keys, revoked, accept_new, identities, timeout, algorithms = None))]
    fn connect(
        slf: Bound<'_, Self>,
        endpoint: At,
        user: String,
        host_keys: Vec<String>,
        revoked: Vec<String>,
        accept_new: bool,
        identities: Vec<Proof>,
        timeout: f64,
        algorithms: Option<HashMap<String, Vec<String>>>,
    ) -> PyResult<Connection> {
        let keys = |lines: Vec<String>| lines.iter().map(|k| public_key(k)).collect::<PyResult<Vec<_>>>();
        let endpoint = match endpoint {
            At::Socket(fd) => Endpoint::Socket(socket(fd)?),
            At::Address(host, port) => Endpoint::Address(host, port),
        };
        let proof = |proof| {
            Ok(match proof {
                Proof::Key(text) => Identity::Key(Arc::new(private_key(&text)?)),
                Proof::File(path, certificate) => Identity::File(path.into(), certificate.map(Into::into)),
                Proof::Agent(socket, wanted, only, certificates) => Identity::Agent {
                    socket: socket.into(),
                    wanted: keys(wanted)?,
                    only,
                    certificates: certificates.into_iter().map(Into::into).collect(),
                },
            })
        };
        let mut lists = algorithms.unwrap_or_default();
        let mut named = |kind| lists.remove(kind).unwrap_or_default();
        let algorithms =
            Algorithms { kex: named("kex"), host_key: named("host_key"), cipher: named("cipher"), mac: named("mac") };
        let target = Target {
            user,
            host_keys: keys(host_keys)?,
            revoked: keys(revoked)?,
            accept_new,
            algorithms,
            identities: identities.into_iter().map(proof).collect::<PyResult<_>>()?,
            timeout: seconds(timeout)?,
        };
        let pool = slf.get();
        let connection = slf.py().detach(|| pool.inner.connect(endpoint, target)).map_err(|error| {
            let about = match &error {
                NodeError::Ssh(SshError::HostKey { .. }) => "host key",
                NodeError::Ssh(SshError::Authentication { .. }) => "authentication",
                NodeError::Ssh(SshError::Io(_)) => "unreachable",
                NodeError::Ssh(SshError::HungUp(_)) => "hung up",
                NodeError::Ssh(SshError::Timeout(_)) => "timeout",
                NodeError::Closed => "closed",
                _ => "",
            };
            CoreError::new_err((error.to_string(), about))
        })?;
        Ok(Connection { inner: Arc::new(connection), pool: slf.unbind() })
    }

    fn start_node(
        &self,
        node: usize,
        connection: &Connection,
        command: String,
        hello: &str,
        ready_timeout: f64,
    ) -> PyResult<()> {
        let hello: ClientHello = serde_json::from_str(hello).map_err(core_error)?;
        let connection = Arc::clone(&connection.inner);
        self.inner.start_node(node, NodeSpec { connection, command, hello, ready_timeout: seconds(ready_timeout)? });
        Ok(())
    }

    /// What the node's environment has otherwise than ours, once it has greeted.
    fn differences(&self, node: usize) -> Option<Vec<String>> {
        self.inner.nodes().into_iter().nth(node)?.hello.map(|hello| hello.differences)
    }

    fn fail_node(&self, py: Python<'_>, node: usize, why: String) {
        py.detach(|| self.inner.fail_node(node, why));
    }

    fn nodes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        describe(py, &self.inner.nodes())
    }

    /// Wait until a node is no longer in the state that it had in `seen`: the states' names, in the nodes' order.
    #[pyo3(signature = (seen, bound_ms))]
    fn wait_for_change(&self, py: Python<'_>, seen: Vec<String>, bound_ms: u64) {
        py.detach(|| self.inner.wait_for_change(&seen, Duration::from_millis(bound_ms)));
    }

    #[pyo3(signature = (task, kind, pickled, buffers, node, nanos))]
    fn submit(
        &self,
        task: u64,
        kind: u8,
        pickled: &Bound<'_, PyAny>,
        buffers: Option<Vec<Bound<'_, PyAny>>>,
        node: Option<usize>,
        nanos: u64,
    ) -> PyResult<bool> {
        let parts = parts(pickled, buffers)?;
        Ok(self.inner.submit(Message { id: Attempt { task, attempt: 0 }, code: kind, nanos, parts }, node))
    }

    #[pyo3(signature = (task, bound_ms))]
    fn cancel(&self, py: Python<'_>, task: u64, bound_ms: u64) -> bool {
        py.detach(|| self.inner.cancel(task, Duration::from_millis(bound_ms)))
    }

    fn abort(&self, task: u64) {
        self.inner.abort(task);
    }

    #[pyo3(signature = (bound_ms))]
    fn output<'py>(&self, py: Python<'py>, bound_ms: u64) -> PyResult<Option<Bound<'py, PyList>>> {
        let lines = py.detach(|| self.inner.output(Duration::from_millis(bound_ms)));
        let rows = |lines: Vec<pool::Lines>| {
            let rows = lines.into_iter().map(|(node, stream, text)| (node, stream, PyBytes::new(py, &text)));
            PyList::new(py, rows.collect::<Vec<_>>())
        };
        lines.map(rows).transpose()
    }

    #[pyo3(signature = (bound_ms))]
    fn notes<'py>(&self, py: Python<'py>, bound_ms: u64) -> PyResult<Option<Bound<'py, PyList>>> {
        let Some(notes) = py.detach(|| self.inner.notes(Duration::from_millis(bound_ms))) else { return Ok(None) };
        let rows = notes.into_iter().map(|(node, note)| Ok((node, to_python(py, note)?)));
        PyList::new(py, rows.collect::<PyResult<Vec<_>>>()?).map(Some)
    }

    #[pyo3(signature = (from, note, error, /))]
    fn answer_note(&self, from: usize, note: u64, error: &[u8]) {
        let error = Bytes::copy_from_slice(error.get(..error.len().min(MAX_BODY)).unwrap_or_default());
        self.inner.answer_note(from, note, error);
    }

    fn end(&self, task: u64) -> bool {
        self.inner.end(Attempt { task, attempt: 0 })
    }

    fn open_queue(&self) -> u64 {
        self.inner.open_queue()
    }

    fn close_queue(&self, lane: u64) {
        self.inner.close_queue(lane);
    }

    fn wake(&self, lane: u64) {
        self.inner.wake(lane);
    }

    #[pyo3(signature = (lane, bound_ms))]
    fn finished<'py>(&self, py: Python<'py>, lane: u64, bound_ms: u64) -> PyResult<Option<Vec<Bound<'py, PyTuple>>>> {
        let messages = py.detach(|| self.inner.finished(lane, Duration::from_millis(bound_ms)));
        messages.map(|all| all.into_iter().map(|m| to_python(py, m)).collect()).transpose()
    }

    fn counts(&self) -> (usize, u64) {
        self.inner.counts()
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
    }
}

#[pyclass(frozen, module = "skyward_lite._core")]
struct Worker {
    inner: worker::Worker,
    hello: WorkerHello,
}

#[pymethods]
impl Worker {
    #[new]
    fn new(py: Python<'_>, fd: c_int) -> PyResult<Self> {
        let socket = socket(fd)?;
        let (inner, hello) = py.detach(|| worker::Worker::start(socket)).map_err(core_error)?;
        Ok(Self { inner, hello })
    }

    #[getter]
    fn node(&self) -> &str {
        &self.hello.node
    }

    #[getter]
    fn slots(&self) -> usize {
        self.hello.slots
    }

    #[getter]
    fn processes(&self) -> bool {
        self.hello.work.processes
    }

    #[getter]
    fn sys_path(&self) -> Vec<String> {
        self.hello.work.sys_path.clone()
    }

    #[getter]
    fn shares_files(&self) -> bool {
        self.hello.work.shares_files
    }

    #[getter]
    fn preload(&self) -> Vec<String> {
        self.hello.work.preload.clone()
    }

    #[getter]
    fn setup(&self) -> &str {
        &self.hello.work.setup
    }

    #[getter]
    fn max_payload(&self) -> usize {
        self.hello.work.max_payload
    }

    #[getter]
    fn timed(&self) -> bool {
        self.hello.work.task_timeout_ms.is_some()
    }

    #[getter]
    fn over(&self) -> bool {
        self.inner.over()
    }

    #[staticmethod]
    fn end_escaped(py: Python<'_>) {
        py.detach(worker::Worker::end_escaped);
    }

    fn ready(&self) -> PyResult<()> {
        self.inner.ready().map_err(core_error)
    }

    #[pyo3(signature = (slot, bound_ms, into))]
    fn take(&self, py: Python<'_>, slot: usize, bound_ms: u64, into: &Bound<'_, PyList>) {
        // A thread that holds the GIL and finds a task goes on without giving it up.
        let task = match self.inner.try_next(slot) {
            Some(task) => Some(task),
            None => py.detach(|| self.inner.next(slot, Duration::from_millis(bound_ms))),
        };
        if let Some(task) = task
            && let Err(error) = to_python(py, task).and_then(|task| into.append(task))
        {
            // No memory for a few bytes. The task is out of the queue, and the agent finds it where it was noted.
            error.print(py);
            std::process::abort();
        }
    }

    fn restart(&self, slot: usize) {
        self.inner.restart(slot);
    }

    fn pause(&self, slot: usize) {
        self.inner.pause(slot);
    }

    #[getter]
    fn lease_ms(&self) -> u64 {
        self.hello.lease_ms
    }

    #[staticmethod]
    fn current() -> u64 {
        worker::Worker::current()
    }

    #[pyo3(signature = (pickled, buffers, bound_ms))]
    fn note<'py>(
        &self,
        py: Python<'py>,
        pickled: &Bound<'py, PyAny>,
        buffers: Option<Vec<Bound<'py, PyAny>>>,
        bound_ms: u64,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let (number, mut answer) = self.inner.send_note(parts(pickled, buffers)?);
        let until = Instant::now() + Duration::from_millis(bound_ms);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let received;
            (received, answer) = py.detach(move || (answer.recv_timeout(left.min(SLICE)), answer));
            if let Ok(error) = received {
                return Ok(Some(PyBytes::new(py, &error)));
            }
            let interrupted = py.check_signals();
            if left.is_zero() || interrupted.is_err() {
                self.inner.forget_note(number);
                return interrupted.map(|()| None);
            }
        }
    }

    #[allow(clippy::too_many_arguments)] // a flat call is what the hot path wants
    #[pyo3(signature = (task, attempt, code, nanos, pickled, buffers=None))]
    fn finish(
        &self,
        py: Python<'_>,
        task: u64,
        attempt: u16,
        code: u8,
        nanos: u64,
        pickled: &Bound<'_, PyAny>,
        buffers: Option<Vec<Bound<'_, PyAny>>>,
    ) -> PyResult<()> {
        let message = Message { id: Attempt { task, attempt }, code, nanos, parts: parts(pickled, buffers)? };
        if let Some(message) = self.inner.try_finish(message) {
            py.detach(|| self.inner.finish(message));
        }
        Ok(())
    }
}

/// What an agent must be told, as Python has it.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Spec {
    worker: Vec<String>,
    version: String,
    python: String,
    epoch: String,
    packages: BTreeMap<String, String>,
}

impl From<Spec> for AgentSpec {
    fn from(Spec { worker, version, python, epoch, packages }: Spec) -> Self {
        Self { worker, version, python, epoch, packages }
    }
}

/// Run an agent to its end.
fn block_on(py: Python<'_>, agent: impl Future<Output = Result<(), AgentError>> + Send) -> PyResult<()> {
    py.detach(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| AgentError::Session(SessionError::Io(e)))?;
        let end = runtime.block_on(agent);
        runtime.shutdown_timeout(Duration::from_millis(100));
        end
    })
    .map_err(core_error)
}

/// Be an agent for the client at the other end of the socket `fd`, behind an embedded SSH server, until it is done.
#[pyfunction]
#[pyo3(signature = (spec, *, fd, host_key, authorized_key, timeout))]
fn serve_embedded(
    py: Python<'_>,
    spec: Spec,
    fd: c_int,
    host_key: &str,
    authorized_key: &str,
    timeout: f64,
) -> PyResult<()> {
    let socket = socket(fd)?;
    let host_key = private_key(host_key)?;
    let authorized = public_key(authorized_key)?;
    let timeout = seconds(timeout)?;
    block_on(py, async move {
        socket.set_nonblocking(true).map_err(SessionError::Io)?;
        let socket = tokio::net::UnixStream::from_std(socket).map_err(SessionError::Io)?;
        let accepted = server::accept(socket, host_key, authorized, timeout).await?;
        let (from, to) = tokio::io::split(accepted.stream);
        agent::run(from, to, spec.into()).await
    })
}

/// Be an agent for the client behind these two descriptors, which are given away, until it is done.
#[pyfunction]
#[pyo3(signature = (spec, *, reading, writing))]
fn serve(py: Python<'_>, spec: Spec, reading: c_int, writing: c_int) -> PyResult<()> {
    let (reading, writing) = (owned(reading)?, owned(writing)?);
    block_on(py, async move {
        let from = agent::reader(reading).map_err(SessionError::Io)?;
        let to = agent::writer(writing).map_err(SessionError::Io)?;
        agent::run(from, to, spec.into()).await
    })
}

/// Tell the client of this process's agent that the node will soon be gone.
#[pyfunction]
fn drain(py: Python<'_>, reason: &str) -> bool {
    py.detach(|| agent::drain(reason))
}

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::{
        Buffer, Connection, CoreError, Pool, Worker, address, drain, generate_key, printable, serve, serve_embedded,
    };
    #[pymodule_export]
    const LEAVE_SECONDS: f64 = super::Timing::DEFAULT.provider_leave.as_secs_f64();
    #[pymodule_export]
    const PROTOCOL: u32 = super::PROTOCOL;
    #[pymodule_export]
    const QUEUE_SHIFT: u32 = super::pool::QUEUE_SHIFT;
}
