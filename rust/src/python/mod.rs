//! The border with Python: the only folder that names pyo3. Arguments are converted first, then the GIL is released.
//!
//! Docstrings for the module's users are in `_core.pyi`.

mod buffer;
mod client;
mod connection;
mod convert;
mod keys;
mod log;
mod node;
mod rows;

use pyo3::prelude::*;

use crate::client::node::LAST_TASK_DONE;
use crate::client::{activity, pool};
use crate::timing::Timing;
use crate::wire;
use crate::wire::Outcome;

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::buffer::{Blob, Buffer, address};
    #[pymodule_export]
    use super::client::Core;
    #[pymodule_export]
    use super::connection::Connection;
    #[pymodule_export]
    use super::convert::{
        AuthenticationError, ClosedError, ConnectTimeoutError, CoreError, HostKeyError, HungUpError,
        RevokedHostKeyError, UnreachableError, printable,
    };
    #[pymodule_export]
    use super::keys::{generate_key, public_half};
    #[pymodule_export]
    use super::node::{WorkerRuntime, drain, listen, serve, serve_embedded};

    #[pymodule_export]
    const RETURNED: u8 = super::Outcome::Returned as u8;
    #[pymodule_export]
    const RAISED: u8 = super::Outcome::Raised as u8;
    #[pymodule_export]
    const CRASHED: u8 = super::Outcome::Crashed as u8;
    #[pymodule_export]
    const CANCELLED: u8 = super::Outcome::Cancelled as u8;
    #[pymodule_export]
    const NODE_LOST: u8 = super::Outcome::NodeLost as u8;
    #[pymodule_export]
    const TIMED_OUT: u8 = super::Outcome::TimedOut as u8;
    #[pymodule_export]
    const PARTIAL: u8 = super::Outcome::Partial as u8;

    #[pymodule_export]
    const QUEUE_SHIFT: u32 = super::pool::QUEUE_SHIFT;
    #[pymodule_export]
    const LEAVE_SECONDS: f64 = super::Timing::DEFAULT.provider_leave.as_secs_f64();
    #[pymodule_export]
    const LAST_TASK_DONE: &str = super::LAST_TASK_DONE;
    #[pymodule_export]
    const MAX_PARTS: usize = super::wire::MAX_PARTS;
    #[pymodule_export]
    const MAX_NOTE: usize = super::wire::MAX_NOTE;
    #[pymodule_export]
    const MAX_BODY: usize = super::wire::MAX_BODY;
    #[pymodule_export]
    const MAX_RECORDS: usize = super::activity::MAX_RECORDS;
    #[pymodule_export]
    const SLOT_BITS: u32 = super::wire::SLOT_BITS;
}
