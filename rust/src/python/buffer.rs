//! Payloads and descriptors across the border: the only file here with unsafe code.
//!
//! A payload crosses as a pickle and a list of out-of-band buffers. Up to [`INLINE`] bytes are copied while the GIL is held,
//! more bytes without the GIL.

// The buffer protocol and descriptors that are handed over as numbers are unsafe by nature; each use says why it is sound.
#![allow(unsafe_code)]
// pyo3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]

use std::collections::TryReserveError;
use std::convert::Infallible;
use std::ffi::c_int;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyMemoryError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyMemoryView, PyTuple};

use crate::client::contents::{Contents, Found};
use crate::node::memory_file::SharedFile;
use crate::node::worker::Answer;
use crate::node::worker::blobs::{MappedBlob, Part, Task};
use crate::pages::prefer_huge;
use crate::timing::BLOB_BYTES;
use crate::wire::{Attempt, BlobPart, Content, MAX_BLOBS, MAX_PARTS, Message};

/// Bytes up to which a payload is copied without releasing the GIL: releasing it takes longer than the copy.
const INLINE: usize = 32 * 1024;

/// Where a buffer's bytes are.
enum Memory {
    /// In memory of their own.
    Own(BytesMut),
    /// In a file that tasks share. What is written to the buffer stays here.
    Mapped(MappedBlob),
}

/// Memory received from the wire: writable, without a copy, through the buffer protocol.
#[pyclass(module = "skyward_lite._core")]
pub(super) struct Buffer {
    memory: Memory,
}

#[pymethods]
impl Buffer {
    fn __len__(&self) -> usize {
        match &self.memory {
            Memory::Own(bytes) => bytes.len(),
            Memory::Mapped(blob) => blob.memory.len(),
        }
    }

    fn copy(&self, py: Python<'_>) -> PyResult<Self> {
        let memory = match &self.memory {
            Memory::Own(bytes) => Memory::Own(py.detach(|| BytesMut::from(&bytes[..]))),
            Memory::Mapped(blob) => {
                let mapped = MappedBlob::new(Arc::clone(&blob.file));
                Memory::Mapped(mapped.map_err(|error| PyMemoryError::new_err(error.to_string()))?)
            }
        };
        Ok(Self { memory })
    }

    /// # Safety
    /// Called by the interpreter with a valid `view`.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let mut this = slf.borrow_mut();
        let len = ffi::Py_ssize_t::try_from(this.__len__()).map_err(|e| PyBufferError::new_err(e.to_string()))?;
        let start = match &mut this.memory {
            Memory::Own(bytes) => bytes.as_mut_ptr(),
            Memory::Mapped(blob) => blob.memory.as_ptr(),
        };
        let start = start.cast();
        // SAFETY: the memory lives as long as the object, to which the view holds a reference; nothing in this class
        // ever moves or resizes the memory. A mapped blob may be written to.
        if unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start, len, 0, flags) } == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}

impl Buffer {
    fn new(py: Python<'_>, part: Part) -> PyResult<Bound<'_, Self>> {
        let memory = match part {
            // A large part owns its memory, so this is no copy. A small part is a slice of its block.
            Part::Inline(bytes) if bytes.len() <= INLINE => Memory::Own(BytesMut::from(&bytes[..])),
            Part::Inline(bytes) => Memory::Own(py.detach(|| BytesMut::from(bytes))),
            Part::Mapped(blob) => Memory::Mapped(blob),
        };
        Bound::new(py, Self { memory })
    }
}

/// Return a message as the stub's `Message`: `(task, attempt, code, nanos, pickled, buffers)`.
pub(super) fn to_python(py: Python<'_>, message: Message) -> PyResult<Bound<'_, PyTuple>> {
    let Message { id, code, nanos, parts, .. } = message;
    with_parts(py, id, code, nanos, parts.into_iter().map(Part::Inline))
}

/// Return a task as the stub's `Message`, or why its blobs cannot be mapped.
pub(super) fn task_to_python(py: Python<'_>, task: Task) -> io::Result<PyResult<Bound<'_, PyTuple>>> {
    if task.is_inline() {
        return Ok(to_python(py, task.message));
    }
    let Message { id, code, nanos, .. } = task.message;
    Ok(with_parts(py, id, code, nanos, task.into_parts()?.into_iter()))
}

fn with_parts(
    py: Python<'_>,
    id: Attempt,
    code: u8,
    nanos: u64,
    mut parts: impl ExactSizeIterator<Item = Part>,
) -> PyResult<Bound<'_, PyTuple>> {
    let pickled = match parts.next() {
        None => PyBytes::new(py, &[]).into_any(),
        Some(Part::Inline(pickled)) if pickled.len() <= INLINE => PyBytes::new(py, &pickled).into_any(),
        Some(pickled) => Buffer::new(py, pickled)?.into_any(),
    };
    let buffers = if parts.len() == 0 {
        py.None().into_bound(py)
    } else {
        let buffers = parts.map(|part| Buffer::new(py, part)).collect::<PyResult<Vec<_>>>()?;
        PyList::new(py, buffers)?.into_any()
    };
    (id.task, id.attempt, code, nanos, pickled, buffers).into_pyobject(py)
}

/// Return a copy of a bytes-like object's content.
pub(super) fn snapshot(object: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    snapshot_or::<Infallible>(object, |_| None).map(|copy| match copy {
        Ok(bytes) => bytes,
    })
}

/// Return a copy of a bytes-like object's content; or, of more than [`INLINE`] bytes, what `instead` makes of them, if
/// anything.
fn snapshot_or<T: Send>(
    object: &Bound<'_, PyAny>,
    instead: impl FnOnce(&[u8]) -> Option<T> + Send,
) -> PyResult<Result<Bytes, T>> {
    let py = object.py();
    if let Ok(bytes) = object.cast::<PyBytes>()
        && bytes.as_bytes().len() <= INLINE
    {
        return Ok(Ok(Bytes::copy_from_slice(bytes.as_bytes())));
    }
    let view = PyBuffer::<u8>::get(object)?;
    if !view.is_c_contiguous() {
        return Err(not_contiguous());
    }
    let (start, len) = (view.buf_ptr() as usize, view.len_bytes());
    if len == 0 {
        return Ok(Ok(Bytes::new()));
    }
    // SAFETY: `view` lives until this function returns; it keeps the memory alive and its size fixed. If another thread
    // writes to the array meanwhile, the copy is torn, as any pickler's copy would be.
    let bytes = unsafe { std::slice::from_raw_parts(start as *const u8, len) };
    let copy = if len <= INLINE {
        copied(bytes).map(Ok)
    } else {
        py.detach(|| instead(bytes).map_or_else(|| copied(bytes).map(Ok), |instead| Ok(Err(instead))))
    };
    copy.map_err(|_| no_memory(len))
}

fn copied(bytes: &[u8]) -> Result<Bytes, TryReserveError> {
    let mut copy = Vec::new();
    copy.try_reserve_exact(bytes.len())?;
    prefer_huge(&mut copy);
    copy.extend_from_slice(bytes);
    Ok(Bytes::from(copy))
}

fn no_memory(len: usize) -> PyErr {
    PyMemoryError::new_err(format!("no memory to send {len} bytes"))
}

fn not_contiguous() -> PyErr {
    PyValueError::new_err("payload buffers must be C-contiguous bytes (see PickleBuffer.raw())")
}

fn check_count(buffers: &[Bound<'_, PyAny>]) -> PyResult<()> {
    if buffers.len() < MAX_PARTS {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("more than {} buffers in one message", MAX_PARTS - 1)))
}

/// Return copies of a pickle and its buffers, as a message's parts.
pub(super) fn parts(pickled: &Bound<'_, PyAny>, buffers: Option<Vec<Bound<'_, PyAny>>>) -> PyResult<Vec<Bytes>> {
    let Some(buffers) = buffers else { return Ok(vec![snapshot(pickled)?]) };
    check_count(&buffers)?;
    std::iter::once(pickled).chain(buffers.iter()).map(snapshot).collect()
}

/// Return a result whose parts are a pickle and its buffers: copies, or files in memory for the large ones. A part for
/// which there is no such file is copied.
pub(super) fn answer(
    head: Message,
    pickled: &Bound<'_, PyAny>,
    buffers: Option<Vec<Bound<'_, PyAny>>>,
) -> PyResult<Answer> {
    let buffers = buffers.unwrap_or_default();
    check_count(&buffers)?;
    let mut answer = Answer::from(head);
    for (place, part) in (0..).zip(std::iter::once(pickled).chain(&buffers)) {
        let may_be_file = answer.files.len() < MAX_BLOBS;
        let file = |bytes: &[u8]| if bytes.len() < BLOB_BYTES { None } else { SharedFile::of(bytes).ok() };
        match snapshot_or(part, |bytes| if may_be_file { file(bytes) } else { None })? {
            Ok(copy) => answer.message.parts.push(copy),
            Err(file) => {
                answer.message.blobs.push(BlobPart { place, number: 0, fresh: false, content: None });
                answer.files.push(file);
            }
        }
    }
    Ok(answer)
}

/// Large data that several tasks may have: its content is hashed and kept once, when this is made.
#[pyclass(frozen, module = "skyward_lite._core")]
pub(super) struct Blob {
    content: Arc<Content>,
    /// Whether the content was copied for this, and no task has taken it yet.
    fresh: AtomicBool,
}

impl Blob {
    pub fn new(data: &Bound<'_, PyAny>, contents: &Contents) -> PyResult<Self> {
        content(data, contents).map(|(content, fresh)| Self { content, fresh: AtomicBool::new(fresh) })
    }
}

#[pymethods]
impl Blob {
    fn __len__(&self) -> usize {
        self.content.bytes.len()
    }
}

/// The memory of a `bytes` object, which never changes: read in place, without a copy.
struct BytesInPlace {
    start: usize,
    len: usize,
    /// Keeps the memory. May be dropped without the GIL: pyo3 then drops the object when it next has the GIL.
    _object: Py<PyBytes>,
}

impl AsRef<[u8]> for BytesInPlace {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the memory is that of a `bytes` object, which lives as long as this, and which nothing may change.
        unsafe { std::slice::from_raw_parts(self.start as *const u8, self.len) }
    }
}

/// Return the memory of a `bytes` object, or of a contiguous view of one; `None` for other objects.
fn in_place(data: &Bound<'_, PyAny>) -> PyResult<Option<Bytes>> {
    let bytes = if let Ok(bytes) = data.cast_exact::<PyBytes>() {
        bytes.clone()
    } else if let Ok(view) = data.cast_exact::<PyMemoryView>()
        && let Ok(bytes) = view.getattr("obj")?.cast_into_exact::<PyBytes>()
    {
        bytes
    } else {
        return Ok(None);
    };
    let view = PyBuffer::<u8>::get(data)?;
    if !view.is_c_contiguous() {
        return Ok(None);
    }
    let (start, len) = (view.buf_ptr() as usize, view.len_bytes());
    Ok(Some(Bytes::from_owner(BytesInPlace { start, len, _object: bytes.unbind() })))
}

/// Return the content of a large buffer, and whether no task has it that has not ended.
fn content(data: &Bound<'_, PyAny>, contents: &Contents) -> PyResult<Found> {
    let (py, now) = (data.py(), Instant::now());
    if let Some(bytes) = in_place(data)? {
        return Ok(py.detach(|| contents.of_bytes(bytes, now)));
    }
    let view = PyBuffer::<u8>::get(data)?;
    if !view.is_c_contiguous() {
        return Err(not_contiguous());
    }
    let (start, len) = (view.buf_ptr() as usize, view.len_bytes());
    // SAFETY: as in `snapshot_or`: `view` keeps the memory alive and its size fixed. If another thread writes to the memory
    // while it is hashed, the hash may be that of a mixture, which is no known content: then the buffer is copied.
    let bytes = unsafe { std::slice::from_raw_parts(start as *const u8, len) };
    py.detach(|| contents.of_buffer(bytes, now, || copied(bytes))).map_err(|_| no_memory(len))
}

/// Return the parts of a task, whose large buffers are contents that other tasks may have, too.
pub(super) fn task_parts(
    pickled: &Bound<'_, PyAny>,
    buffers: Option<Vec<Bound<'_, PyAny>>>,
    contents: &Contents,
) -> PyResult<(Vec<Bytes>, Vec<BlobPart>)> {
    let Some(buffers) = buffers else {
        // Most tasks are a small pickle and nothing else.
        if let Ok(small) = pickled.cast_exact::<PyBytes>()
            && small.as_bytes().len() < BLOB_BYTES
        {
            return Ok((vec![snapshot(pickled)?], Vec::new()));
        }
        return task_parts(pickled, Some(Vec::new()), contents);
    };
    check_count(&buffers)?;
    let (mut parts, mut blobs) = (Vec::new(), Vec::new());
    for (place, data) in (0_u16..).zip(std::iter::once(pickled).chain(buffers.iter())) {
        let found = if let Ok(blob) = data.cast_exact::<Blob>() {
            let Blob { content, fresh } = blob.get();
            Some((Arc::clone(content), fresh.swap(false, Ordering::Relaxed)))
        } else if blobs.len() < MAX_BLOBS && data.len()? >= BLOB_BYTES {
            Some(content(data, contents)?)
        } else {
            None
        };
        match found {
            None => parts.push(snapshot(data)?),
            Some((content, _)) if blobs.len() >= MAX_BLOBS || content.bytes.len() < BLOB_BYTES => {
                parts.push(content.bytes.clone());
            }
            Some((content, fresh)) => blobs.push(BlobPart { place, number: 0, fresh, content: Some(content) }),
        }
    }
    Ok((parts, blobs))
}

/// Return where the memory of a bytes-like object begins.
#[pyfunction]
pub(super) fn address(data: &Bound<'_, PyAny>) -> PyResult<usize> {
    Ok(PyBuffer::<u8>::get(data)?.buf_ptr() as usize)
}

/// Own the descriptor that Python code detached from its socket or file.
pub(super) fn owned(fd: c_int) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(PyValueError::new_err(format!("{fd} is no file descriptor")));
    }
    // SAFETY: the stub of each function that calls this says that the descriptor is given away.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
