//! What the user's process has of the core: [`Core`], the nodes of one pool.

// pyo3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

use crate::client::packages::Packages;
use crate::client::pool::{Lines, NodeSpec, Pool};
use crate::python::buffer::{Blob, task_parts, to_python};
use crate::python::connection::{self, Connection, EndpointArgument, IdentityArgument, public_keys};
use crate::python::convert::{PoolClosedError, from_dataclass, seconds};
use crate::python::log;
use crate::python::rows::{NodeRow, TotalsRow};
use crate::timing::Timing;
use crate::transport::command::CommandConnection;
use crate::transport::connection as transport;
use crate::transport::host_key::HostKeys;
use crate::transport::ssh::{RekeyLimits, Target};
use crate::wire::{Attempt, ClientHello, MAX_BODY, MAX_NOTE, Message};

#[pyclass(frozen, module = "skyward_lite._core")]
pub(super) struct Core {
    pool: Arc<Pool>,
}

impl Core {
    /// Return the pool. Raise `PoolClosedError` in a forked child, which has neither the pool's thread nor its locks.
    fn owned(&self) -> PyResult<&Pool> {
        if self.pool.is_forked() {
            let text = "this process was forked from the one that opened the pool: open a pool of its own";
            return Err(PoolClosedError::new_err(text));
        }
        Ok(&self.pool)
    }
}

#[pymethods]
impl Core {
    #[new]
    #[pyo3(signature = (attempts, max_payload, timing=None, *, start_timeout=None))]
    fn new(
        attempts: u16,
        max_payload: usize,
        timing: Option<(f64, f64, f64)>,
        start_timeout: Option<f64>,
    ) -> PyResult<Self> {
        log::start();
        let timing = match timing {
            Some((heartbeat, answer, drain)) => Timing {
                heartbeat: seconds(heartbeat)?,
                answer: seconds(answer)?,
                drain: seconds(drain)?,
                ..Timing::DEFAULT
            },
            None => Timing::default(),
        };
        let replacement = start_timeout.map_or(Ok(timing.replacement), seconds)?;
        let timing = Timing { replacement, ..timing };
        let pool = Pool::with_timing(attempts, max_payload, timing).map_err(PyOSError::new_err)?;
        Ok(Self { pool: Arc::new(pool) })
    }

    #[getter]
    fn is_forked(&self) -> bool {
        self.pool.is_forked()
    }

    fn check_owner(&self) -> PyResult<()> {
        self.owned().map(drop)
    }

    #[pyo3(signature = (name, returns=false))]
    fn add_node(&self, name: String, returns: bool) -> usize {
        self.pool.add_node(name, returns)
    }

    fn returns(&self, node: usize) -> bool {
        self.pool.node(node).is_some_and(|node| node.returns)
    }

    fn give_up(&self, py: Python<'_>, node: usize) {
        py.detach(|| self.pool.give_up(node));
    }

    fn resume_node(&self, py: Python<'_>, node: usize, connection: &Connection) -> PyResult<()> {
        let (pool, connection) = (self.owned()?, connection.shared());
        py.detach(|| pool.resume_node(node, connection)).map_err(Into::into)
    }

    fn expect(&self, py: Python<'_>, count: usize) {
        py.detach(|| self.pool.expect(count));
    }

    #[allow(clippy::too_many_arguments)] // keyword arguments in Python
    #[pyo3(signature = (*, endpoint, user, host_keys, revoked, accept_new, identities, timeout, algorithms = None, rekey = None))]
    fn connect(
        &self,
        py: Python<'_>,
        endpoint: EndpointArgument,
        user: String,
        host_keys: Vec<String>,
        revoked: Vec<String>,
        accept_new: bool,
        identities: Vec<IdentityArgument>,
        timeout: f64,
        algorithms: Option<HashMap<String, Vec<String>>>,
        rekey: Option<(usize, f64)>,
    ) -> PyResult<Connection> {
        let endpoint = endpoint.endpoint()?;
        let rekey = match rekey {
            Some((bytes, time)) => RekeyLimits { bytes, time: seconds(time)? },
            None => RekeyLimits::default(),
        };
        let target = Target {
            user,
            host_keys: HostKeys { known: public_keys(&host_keys)?, revoked: public_keys(&revoked)?, accept_new },
            algorithms: connection::algorithms(algorithms.unwrap_or_default()),
            identities: identities.into_iter().map(IdentityArgument::identity).collect::<PyResult<_>>()?,
            rekey,
            timeout: seconds(timeout)?,
        };
        let pool = self.owned()?;
        let connection = py.detach(|| pool.connect(endpoint, target))?;
        Ok(Connection::new(connection, Arc::clone(&self.pool)))
    }

    #[pyo3(signature = (words, environment=None))]
    fn command(&self, words: Vec<String>, environment: Option<HashMap<String, String>>) -> PyResult<Connection> {
        let ending = self.owned()?.ending.clone();
        let environment = environment.map(|variables| variables.into_iter().collect());
        let command = CommandConnection::new(words, environment, ending);
        Ok(Connection::new(transport::Connection::Command(command), Arc::clone(&self.pool)))
    }

    #[allow(clippy::too_many_arguments)] // as above
    #[pyo3(signature = (node, connection, command, hello, ready_timeout, stripe=None, again=None))]
    fn start_node(
        &self,
        node: usize,
        connection: &Connection,
        command: String,
        hello: &Bound<'_, PyAny>,
        ready_timeout: f64,
        stripe: Option<String>,
        again: Option<String>,
    ) -> PyResult<()> {
        let hello: ClientHello = from_dataclass(hello)?;
        let connection = connection.shared();
        let ready_timeout = seconds(ready_timeout)?;
        self.pool.start_node(node, NodeSpec { connection, command, again, stripe, hello, ready_timeout });
        Ok(())
    }

    fn notices(&self, node: usize) -> Option<Vec<String>> {
        self.pool.node(node)?.hello.map(|hello| hello.notices.clone())
    }

    fn packages(&self, node: usize) -> Option<Packages> {
        self.pool.node(node)?.hello.map(|hello| hello.packages.clone())
    }

    fn require(&self, packages: Packages) {
        self.pool.require(packages);
    }

    fn fail_node(&self, py: Python<'_>, node: usize, why: String) {
        py.detach(|| self.pool.fail_node(node, why));
    }

    fn nodes(&self) -> PyResult<Vec<NodeRow>> {
        Ok(self.owned()?.report().into_iter().map(NodeRow::from).collect())
    }

    #[pyo3(signature = (seen, bound_ms))]
    fn wait_for_change(&self, py: Python<'_>, seen: Vec<String>, bound_ms: u64) {
        py.detach(|| self.pool.wait_for_change(&seen, Duration::from_millis(bound_ms)));
    }

    #[allow(clippy::too_many_arguments)] // a flat call is what the hot path wants
    #[pyo3(signature = (task, kind, pickled, buffers, node, nanos, generation, calls, name))]
    fn submit(
        &self,
        task: u64,
        kind: u8,
        pickled: &Bound<'_, PyAny>,
        buffers: Option<Vec<Bound<'_, PyAny>>>,
        node: Option<usize>,
        nanos: u64,
        generation: u32,
        calls: u32,
        name: u32,
    ) -> PyResult<bool> {
        // Without a check of the owner, which takes a system call: `check_owner` comes before a task is pickled.
        let (parts, blobs) = task_parts(pickled, buffers, self.pool.contents())?;
        let id = Attempt { task, attempt: 0 };
        let task = Message { id, code: kind, generation, slot: 0, calls, nanos, name, parts, blobs };
        Ok(self.pool.submit(task, node))
    }

    fn blob(&self, data: &Bound<'_, PyAny>) -> PyResult<Blob> {
        Blob::new(data, self.owned()?.contents())
    }

    fn end(&self, task: u64) -> PyResult<bool> {
        Ok(self.owned()?.end(Attempt { task, attempt: 0 }))
    }

    #[pyo3(signature = (task, bound_ms))]
    fn cancel(&self, py: Python<'_>, task: u64, bound_ms: u64) -> PyResult<bool> {
        let pool = self.owned()?;
        Ok(py.detach(|| pool.cancel(task, Duration::from_millis(bound_ms))))
    }

    fn abort(&self, task: u64) {
        // A forked child has nothing to abort: its copies of the parent's tasks never end.
        if !self.pool.is_forked() {
            self.pool.abort(task);
        }
    }

    #[pyo3(signature = (bound_ms))]
    fn output<'py>(&self, py: Python<'py>, bound_ms: u64) -> PyResult<Option<Bound<'py, PyList>>> {
        let lines = py.detach(|| self.pool.output(Duration::from_millis(bound_ms)));
        let rows = |lines: Vec<Lines>| {
            let rows = lines.into_iter().map(|(node, stream, text)| (node, stream, PyBytes::new(py, &text)));
            PyList::new(py, rows.collect::<Vec<_>>())
        };
        lines.map(rows).transpose()
    }

    #[pyo3(signature = (bound_ms))]
    fn notes<'py>(&self, py: Python<'py>, bound_ms: u64) -> PyResult<Option<Bound<'py, PyList>>> {
        let Some(notes) = py.detach(|| self.pool.notes(Duration::from_millis(bound_ms))) else { return Ok(None) };
        let rows = notes.into_iter().map(|(node, note)| Ok((node, to_python(py, note)?)));
        PyList::new(py, rows.collect::<PyResult<Vec<_>>>()?).map(Some)
    }

    #[pyo3(signature = (sender, note, error, /))]
    fn answer_note(&self, sender: u64, note: u64, error: &[u8]) {
        let error = Bytes::copy_from_slice(error.get(..error.len().min(MAX_BODY)).unwrap_or_default());
        self.pool.answer_note(sender, note, error);
    }

    #[pyo3(signature = (bound_ms))]
    fn requests<'py>(&self, py: Python<'py>, bound_ms: u64) -> PyResult<Option<Bound<'py, PyList>>> {
        let Some(requests) = py.detach(|| self.pool.requests(Duration::from_millis(bound_ms))) else { return Ok(None) };
        let rows = requests.into_iter().map(|(node, note)| {
            let request = note.parts.first().map_or(&[][..], |part| &part[..]);
            (node, note.id.task, PyBytes::new(py, request))
        });
        PyList::new(py, rows.collect::<Vec<_>>()).map(Some)
    }

    #[pyo3(signature = (sender, request, content, /))]
    fn answer_request(&self, sender: u64, request: u64, content: &[u8]) -> PyResult<()> {
        if content.len() > MAX_NOTE {
            return Err(PyValueError::new_err(format!("an answer of {} bytes is over the limit", content.len())));
        }
        self.pool.answer_request(sender, request, Bytes::copy_from_slice(content));
        Ok(())
    }

    fn open_queue(&self) -> u64 {
        self.pool.open_queue()
    }

    fn close_queue(&self, queue: u64) {
        self.pool.close_queue(queue);
    }

    fn wake(&self, queue: u64) {
        self.pool.wake(queue);
    }

    #[pyo3(signature = (queue, bound_ms))]
    fn finished<'py>(&self, py: Python<'py>, queue: u64, bound_ms: u64) -> PyResult<Option<Vec<Bound<'py, PyTuple>>>> {
        let messages = py.detach(|| self.pool.finished(queue, Duration::from_millis(bound_ms)));
        messages.map(|all| all.into_iter().map(|m| to_python(py, m)).collect()).transpose()
    }

    fn counts(&self) -> (usize, u64) {
        self.pool.counts()
    }

    fn traffic(&self) -> Vec<(u64, u64)> {
        self.pool.traffic()
    }

    fn totals(&self) -> PyResult<TotalsRow> {
        Ok(self.owned()?.totals().into())
    }

    fn is_running(&self, task: u64) -> bool {
        !self.pool.is_forked() && self.pool.is_running(task)
    }

    fn records<'py>(&self, py: Python<'py>, after: u64) -> PyResult<(u64, Bound<'py, PyBytes>)> {
        let pool = self.owned()?;
        let (first, packed) = py.detach(|| pool.records(after));
        Ok((first, PyBytes::new(py, &packed)))
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.pool.close());
    }
}
