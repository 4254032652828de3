"""First imports of a worker's tasks, one at a time.

Tasks that begin in several threads of a fresh process import the same packages at once. Python has a lock for each
module, not one for all. So two threads that enter a package by different modules find modules half imported, or wait
for each other. Therefore a thread that runs tasks holds one more lock, for all modules, while it imports a module that
is not there yet.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from ..pickling import payload
from . import task_warnings

Timer = tuple[Callable[[], None], Callable[[], None]]
"""What stops the time of the task that a thread runs, and what lets it begin anew."""

IMPORT_WAIT_SECONDS = 60.0
"""How long an import waits for another thread's. After that it goes on without the lock, as in any Python process."""

_HALF_IMPORT = ("partially initialized", "cannot import name", "Can't get attribute")
"""Parts of Python's messages about a module that lacks names because its import has not ended."""

_bootstrap: Any = importlib._bootstrap
_find_and_load: Callable[[str, Any], ModuleType] | None = getattr(_bootstrap, "_find_and_load", None)
_lock = threading.RLock()


class _ThreadState(threading.local):
    runs_tasks = False
    """Whether the thread takes the lock. Threads that tasks start do not: a module may wait, while it is imported, for
    threads that it has started."""
    importing = False
    """Whether the thread is in an import, in which the imports of further modules are inner ones."""
    timer: Timer | None = None
    after: Callable[[], bool] | None = None
    """What is called after each first import of the thread, until it returns True."""


_own = _ThreadState()


def install() -> None:
    """Allow first imports to one thread at a time, among the threads that call `enter`.

    Do nothing where importlib lacks the function that is replaced here.
    """
    if _find_and_load is None:
        return
    # Python leaves the frames of importlib out of tracebacks, and out of the count of `warn(stacklevel=)`.
    _load_alone.__code__ = _load_alone.__code__.replace(co_filename=_bootstrap._gcd_import.__code__.co_filename)
    # C looks this function up for each module that is not in `sys.modules`, and only then.
    _bootstrap._find_and_load = _load_alone
    os.register_at_fork(after_in_child=_renew)


def enter() -> None:
    """Count the calling thread among those that run tasks."""
    _own.runs_tasks = True


def time_by(timer: Timer) -> None:
    """Note what counts the time of the tasks that the calling thread runs."""
    _own.timer = timer


def after_each(call: Callable[[], bool]) -> None:
    """Call this after each first import of the calling thread, until it returns True."""
    _own.after = call


@contextlib.contextmanager
def untimed() -> Iterator[None]:
    """Do not count the time of this block against the time limit of the task that the calling thread runs.

    After the block the time begins anew.
    """
    pause, restart = _own.timer or (_nothing, _nothing)
    pause()
    try:
        yield
    finally:
        restart()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keep other threads that run tasks from first imports, until the block is left."""
    lock = _lock
    held = _acquire(lock)
    try:
        yield
    finally:
        if held:
            lock.release()


def loads(pickled: bytes | memoryview, buffers: Sequence[Any] | None, apart: Sequence[Any] = (), flats: int = 0) -> Any:
    """Unpickle a call, as `payload.loads` does; and once more if another thread's import may be why that failed.

    A call may be unpickled twice, because nothing of it has run. The second time no other thread is in a first import.
    """
    try:
        if apart:
            return payload.loads(pickled, buffers, apart, flats)
        return pickle.loads(pickled) if buffers is None else pickle.loads(pickled, buffers=buffers)
    except Exception as error:
        if not _is_half_import(error):
            raise
    with alone():
        return payload.loads(pickled, buffers, apart, flats)


def _load_alone(name: str, import_: Any) -> ModuleType:
    """Do what importlib's `_find_and_load` does, while no other thread that runs tasks is in it."""
    assert _find_and_load is not None
    own = _own
    module = sys.modules.get(name)
    loaded = module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)
    if loaded or own.importing:
        return _find_and_load(name, import_)
    own.importing = True
    lock = _lock
    held = own.runs_tasks and _acquire(lock)
    try:
        with task_warnings.importing():
            loaded_module = _find_and_load(name, import_)
        if own.after is not None and own.after():
            own.after = None
        return loaded_module
    finally:
        own.importing = False
        if held:
            lock.release()


def _acquire(lock: Any) -> bool:
    """Take the lock; return False if that takes too long. The wait does not count against the task's time limit."""
    if lock.acquire(blocking=False):
        return True
    with untimed():
        return bool(lock.acquire(timeout=IMPORT_WAIT_SECONDS))


def _nothing() -> None: ...


def _renew() -> None:
    """Make a new lock in a forked child: the thread that held the old one is not there."""
    global _lock
    _lock = threading.RLock()


def _is_half_import(error: Exception) -> bool:
    """Return whether another thread's import may be the reason for an error: not all threads take the lock."""
    if isinstance(error, ImportError | AttributeError):
        return any(part in str(error) for part in _HALF_IMPORT)
    if isinstance(error, KeyError):
        # Python's error for a module whose import fails on another thread while this one waits for it.
        return len(error.args) == 1 and type(error.args[0]) is str and error.args[0] not in sys.modules
    return isinstance(error, getattr(_bootstrap, "_DeadlockError", ()))
