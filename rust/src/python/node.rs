//! What a node's processes have of the core: [`WorkerRuntime`] in each worker, and the agent's whole work.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use crate::error::{AgentError, SessionError};
use crate::node::agent;
use crate::node::arrivals::{Arrivals, Streams};
use crate::node::session::{self, AgentSpec};
use crate::node::stdio;
use crate::node::worker::{NoteAnswer, Worker};
use crate::python::buffer::{answer, owned, parts, task_to_python};
use crate::python::convert::{core_error, private_key, public_key, seconds, socket, to_dataclass};
use crate::python::log;
use crate::transport::server;
use crate::transport::ssh::RekeyLimits;
use crate::wire::{ASKS, Attempt, Message, Outcome, TELLS, WorkerHello, slot_number};

/// Longest time for which a thread that waits for the answer to a note handles no signals.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);
/// Bound on what an agent's runtime still does after the agent has ended.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(100);

#[pyclass(frozen, module = "skyward_lite._core")]
pub(super) struct WorkerRuntime {
    worker: Worker,
    hello: WorkerHello,
    settings: Py<PyAny>,
}

#[pymethods]
impl WorkerRuntime {
    #[new]
    fn new(py: Python<'_>, fd: c_int) -> PyResult<Self> {
        let socket = socket(fd)?;
        let (worker, hello) = py.detach(|| Worker::start(socket)).map_err(core_error)?;
        let settings = to_dataclass(py, "WorkerSettings", &hello.work)?;
        Ok(Self { worker, hello, settings })
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
    fn lease_ms(&self) -> u64 {
        self.hello.lease_ms
    }

    #[getter]
    fn generation(&self) -> u32 {
        self.hello.generation
    }

    #[getter]
    fn directory(&self) -> &str {
        &self.hello.directory
    }

    #[getter]
    fn settings(&self, py: Python<'_>) -> Py<PyAny> {
        self.settings.clone_ref(py)
    }

    #[getter]
    fn over(&self) -> bool {
        self.worker.over()
    }

    fn ready(&self) -> PyResult<()> {
        self.worker.ready().map_err(core_error)
    }

    #[pyo3(signature = (slot, bound_ms, into))]
    fn take(&self, py: Python<'_>, slot: usize, bound_ms: u64, into: &Bound<'_, PyList>) {
        // A thread that holds the GIL and finds a task goes on without giving the GIL up.
        let task = match self.worker.try_next(slot) {
            Some(task) => Some(task),
            None => py.detach(|| self.worker.next(slot, Duration::from_millis(bound_ms))),
        };
        let Some(task) = task else { return };
        let id = task.id();
        let task = match task_to_python(py, task) {
            Ok(task) => task,
            Err(error) => {
                let text = format!(
                    "node {}: its worker process has no memory to map data that this task needs ({error})",
                    self.hello.node
                );
                return py.detach(|| self.worker.finish(Message::text(id, Outcome::Crashed, text)));
            }
        };
        if let Err(error) = task.and_then(|task| into.append(task)) {
            // There is no memory for a few bytes. The task has left the queue: the agent learns from the slot table that
            // this process had it.
            error.print(py);
            std::process::abort();
        }
    }

    fn restart(&self, slot: usize) {
        self.worker.restart(slot);
    }

    fn pause(&self, slot: usize) {
        self.worker.pause(slot);
    }

    #[staticmethod]
    fn current() -> u64 {
        Worker::current()
    }

    #[pyo3(signature = (pickled, buffers, bound_ms))]
    fn note<'py>(
        &self,
        py: Python<'py>,
        pickled: &Bound<'py, PyAny>,
        buffers: Option<Vec<Bound<'py, PyAny>>>,
        bound_ms: u64,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let answer = self.answer(py, TELLS, parts(pickled, buffers)?, bound_ms)?;
        Ok(answer.map(|answer| PyBytes::new(py, &answer.unwrap_or_else(|error| error))))
    }

    #[pyo3(signature = (request, bound_ms))]
    fn request<'py>(&self, py: Python<'py>, request: &[u8], bound_ms: u64) -> PyResult<Option<Bound<'py, PyBytes>>> {
        match self.answer(py, ASKS, vec![Bytes::copy_from_slice(request)], bound_ms)? {
            None => Ok(None),
            Some(Ok(content)) => Ok(Some(PyBytes::new(py, &content))),
            Some(Err(why)) => Err(core_error(String::from_utf8_lossy(&why))),
        }
    }

    #[allow(clippy::too_many_arguments)] // a flat call is what the hot path wants
    #[pyo3(signature = (slot, task, attempt, code, calls, nanos, pickled, buffers=None))]
    fn finish(
        &self,
        py: Python<'_>,
        slot: usize,
        task: u64,
        attempt: u16,
        code: u8,
        calls: u32,
        nanos: u64,
        pickled: &Bound<'_, PyAny>,
        buffers: Option<Vec<Bound<'_, PyAny>>>,
    ) -> PyResult<()> {
        let id = Attempt { task, attempt };
        let slot = slot_number(self.hello.number, slot);
        let head = Message { id, code, slot, calls, nanos, ..Message::default() };
        if let Some(answer) = self.worker.try_finish(answer(head, pickled, buffers)?) {
            py.detach(|| self.worker.finish(answer));
        }
        Ok(())
    }
}

impl WorkerRuntime {
    /// Send the client a note and wait for its answer, at most for `bound_ms`; `None` if none came.
    fn answer(&self, py: Python<'_>, code: u8, parts: Vec<Bytes>, bound_ms: u64) -> PyResult<Option<NoteAnswer>> {
        let (number, mut answer) = self.worker.send_note(code, parts);
        let until = Instant::now() + Duration::from_millis(bound_ms);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let received;
            (received, answer) = py.detach(move || (answer.recv_timeout(left.min(SIGNAL_INTERVAL)), answer));
            if let Ok(answer) = received {
                return Ok(Some(answer));
            }
            let interrupted = py.check_signals();
            if left.is_zero() || interrupted.is_err() {
                self.worker.forget_note(number);
                return interrupted.map(|()| None);
            }
        }
    }
}

/// The stub's `AgentSpec`, a dict.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(super) struct AgentSpecArgument {
    worker: Vec<String>,
    version: String,
    python: String,
    epoch: String,
    packages: BTreeMap<String, String>,
    notices: Vec<String>,
    directory: Option<String>,
    cores: Option<usize>,
}

impl From<AgentSpecArgument> for AgentSpec {
    fn from(spec: AgentSpecArgument) -> Self {
        let AgentSpecArgument { worker, version, python, epoch, packages, notices, directory, cores } = spec;
        Self { worker, version, python, epoch, packages, directory, notices, cores }
    }
}

/// Run an agent to its end.
fn block_on(py: Python<'_>, agent: impl Future<Output = Result<(), AgentError>> + Send) -> PyResult<()> {
    log::start();
    py.detach(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| AgentError::Session(SessionError::Io(e)))?;
        let end = runtime.block_on(agent);
        runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
        end
    })
    .map_err(core_error)
}

/// Be an agent for the client at the other end of the socket `fd`, behind an embedded SSH server, until it is done.
#[pyfunction]
#[pyo3(signature = (spec, *, fd, host_key, authorized_key, timeout))]
pub(super) fn serve_embedded(
    py: Python<'_>,
    spec: AgentSpecArgument,
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
        let accepted = server::accept(socket, host_key, authorized, RekeyLimits::default(), timeout).await?;
        let (from, to) = tokio::io::split(accepted.stream);
        session::run(Some(Streams::new(from, to)), Arrivals::none(), None, spec.into()).await
    })
}

/// Be an agent for the client behind these two descriptors, which are given away, until it is done.
#[pyfunction]
#[pyo3(signature = (spec, *, reading, writing))]
pub(super) fn serve(py: Python<'_>, spec: AgentSpecArgument, reading: c_int, writing: c_int) -> PyResult<()> {
    let (reading, writing) = (owned(reading)?, owned(writing)?);
    block_on(py, async move {
        let from = stdio::reader(reading).map_err(SessionError::Io)?;
        let to = stdio::writer(writing).map_err(SessionError::Io)?;
        session::run(Some(Streams::new(from, to)), Arrivals::none(), None, spec.into()).await
    })
}

/// Be an agent for the client whose streams come to the socket `agent` in this directory, until it is done. `fd` is that socket,
/// which listens; it is given away.
#[pyfunction]
#[pyo3(signature = (spec, *, fd, directory))]
pub(super) fn listen(py: Python<'_>, spec: AgentSpecArgument, fd: c_int, directory: &str) -> PyResult<()> {
    let path = format!("{directory}/agent");
    let listener = UnixListener::from(owned(fd)?);
    block_on(py, async move {
        let arrivals = Arrivals::of(listener).map_err(SessionError::Io)?;
        session::run(None, arrivals, Some(path), spec.into()).await
    })
}

/// Announce to the client of this process's agent that the node will soon be gone.
#[pyfunction]
pub(super) fn drain(py: Python<'_>, reason: &str) -> bool {
    py.detach(|| agent::drain(reason))
}
