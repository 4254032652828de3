//! Locks that outlive a panic of their holder.
//!
//! A thread that panics poisons the standard library's locks. Our state is valid between any two statements, so the
//! next holder may go on with it: a panic costs its own thread and not the pool.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Lock, also if a thread panicked while it held the lock.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
