"""First imports of a worker's tasks, one at a time.

Tasks that begin in several threads of a fresh process import the same packages at once. Python's locks are one for
each module: threads that enter a package by different modules find modules half imported, or a deadlock. So a thread
that runs tasks holds one more lock, for all modules, while it imports a module that is not there yet.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from . import task_warnings

T = TypeVar("T")

WAIT_SECONDS = 60.0
"""How long an import waits for another thread's. After that it goes on, as it would without us."""

_HALF = ("partially initialized", "cannot import name", "Can't get attribute")
"""What Python says of a module that lacks what it will have once its import has ended."""

_bootstrap: Any = importlib._bootstrap
_find_and_load: Callable[[str, Any], ModuleType] | None = getattr(_bootstrap, "_find_and_load", None)
_lock = threading.RLock()


class _Own(threading.local):
    runs_tasks = False
    """Threads that tasks start do not take the lock: a module may wait for those that it has started."""
    importing = False
    timer: tuple[Callable[[], None], Callable[[], None]] | None = None


_own = _Own()


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
            return _find_and_load(name, import_)
    finally:
        own.importing = False
        if held:
            lock.release()


def _acquire(lock: Any) -> bool:
    """Take the lock and return True, or False if that takes too long. The task's time limit does not count the wait."""
    if lock.acquire(blocking=False):
        return True
    pause, restart = _own.timer or (_nothing, _nothing)
    pause()
    try:
        return bool(lock.acquire(timeout=WAIT_SECONDS))
    finally:
        restart()


def _nothing() -> None: ...


def _renew() -> None:
    """Forget the lock in a forked child: the thread that held it is not there."""
    global _lock
    _lock = threading.RLock()


def install() -> None:
    """Allow first imports to one thread at a time, of those that call `enter`.

    Do nothing where importlib is not as we know it.
    """
    if _find_and_load is None:
        return
    # Python leaves the frames of importlib out of tracebacks, and out of the count of `warn(stacklevel=)`.
    _load_alone.__code__ = _load_alone.__code__.replace(co_filename=_bootstrap._gcd_import.__code__.co_filename)
    # C looks this function up for each module that is not in `sys.modules`, and only then.
    _bootstrap._find_and_load = _load_alone
    os.register_at_fork(after_in_child=_renew)


def enter(timer: tuple[Callable[[], None], Callable[[], None]] | None = None) -> None:
    """Count the calling thread among those that run tasks.

    `timer`: what stops the time of the task that the thread runs, and what lets it begin anew; None if tasks have no
    limit.
    """
    _own.runs_tasks = True
    _own.timer = timer


def is_half_import(error: Exception) -> bool:
    """Return whether another thread's import may be the reason for an error. The lock does not cover all threads."""
    if isinstance(error, ImportError | AttributeError):
        return any(words in str(error) for words in _HALF)
    return isinstance(error, getattr(_bootstrap, "_DeadlockError", ()))


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """Return `function(*arguments)`, while no other thread that runs tasks does a first import."""
    lock = _lock
    held = _acquire(lock)
    try:
        return function(*arguments)
    finally:
        if held:
            lock.release()
