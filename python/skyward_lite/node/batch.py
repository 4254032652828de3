"""One batch of a `Parallel` call, on the worker.

`run_batch` is all that most batches need; `run_limited` is for those of a call with `inner_max_num_threads`.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter_ns
from typing import Any

from ..pickling.payload import BACKEND_NAME

Function = Callable[..., Any]
Triple = tuple[Function, tuple[Any, ...], dict[str, Any]]


def run_batch(items: Iterable[Triple], values: list[Any], limit: int | None = None) -> None:
    """Run joblib's triples with nested `Parallel` calls being sequential, one level below the client's.

    Each value is appended to `values`: where one raises, these are the values of the calls before it. No call is begun
    when the batch has run for `limit` nanoseconds: then there are fewer values than triples.
    """
    with _nested()():
        end = None if limit is None else perf_counter_ns() + limit
        for function, args, kwargs in items:
            values.append(function(*args, **kwargs))
            if end is not None and perf_counter_ns() > end:
                break


@functools.cache
def _nested() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Give what makes nested calls sequential: nothing on a node without joblib, where there can be none.

    A task may ask for us by name, as it may at the client: that is sequential, too.
    """
    # Imported before by `preload` (it takes 0.1–0.4 s), and only where batches come.
    try:
        from joblib import parallel_config, register_parallel_backend
        from joblib.parallel import SequentialBackend
    except ModuleNotFoundError as error:
        if error.name != "joblib":
            raise
        return contextlib.nullcontext
    register_parallel_backend(BACKEND_NAME, SequentialBackend)
    return lambda: parallel_config(backend=SequentialBackend(nesting_level=1))


def run_limited(threads: int, items: Iterable[Triple], values: list[Any], limit: int | None = None) -> None:
    """Run joblib's triples, as `run_batch` does, with at most so many threads in each BLAS and OpenMP library.

    Raises `ModuleNotFoundError` without threadpoolctl.
    """
    with _limited(threads):
        run_batch(items, values, limit)


# A library keeps its limit in one of two ways: OpenMP for each thread that calls it, the others for the process. The
# first is each thread's own business. Of the second the strictest limit among the running batches holds, and the last
# batch to end restores what was before the first.


@dataclasses.dataclass
class _Limited:
    """A library under a limit: the threads that it had before, and those that it has now."""

    library: Any
    before: int
    now: int


class _Own(threading.local):
    """What a thread keeps while it runs a limited batch."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self.libraries: dict[str, _Limited] = {}
        self.modules = 0
        """Modules that were imported when libraries were last looked for."""
        self.busy = False
        """An import is going on."""


_own = _Own()
_lock = threading.RLock()
_running: list[int] = []
"""Limits of the batches that are running in this process."""
_shared: dict[str, _Limited] = {}
"""The libraries whose limit is the process's, by file."""
_import = builtins.__import__


@contextlib.contextmanager
def _limited(threads: int) -> Iterator[None]:
    with _lock:
        _running.append(threads)
        builtins.__import__ = _limiting_import
    _own.limit = threads
    try:
        _limit_all(threads)
        yield
    finally:
        _own.limit = None
        for limited in _own.libraries.values():
            limited.library.set_num_threads(limited.before)
        _own.libraries.clear()
        with _lock:
            _running.remove(threads)
            for limited in _shared.values():
                _set_shared(limited, min(_running, default=limited.before))
            if not _running:
                _shared.clear()
                builtins.__import__ = _import


def _limit_all(threads: int) -> None:
    """Limit every library that is loaded by now."""
    _own.modules = len(sys.modules)
    for library in _libraries(_own.modules):
        if library.user_api == "openmp" or getattr(library, "threading_layer", "") == "openmp":
            if library.filepath not in _own.libraries:
                _own.libraries[library.filepath] = _Limited(library, library.num_threads, threads)
                library.set_num_threads(threads)
        else:
            with _lock:
                before = library.num_threads
                _set_shared(_shared.setdefault(library.filepath, _Limited(library, before, before)), min(_running))


def _set_shared(limited: _Limited, threads: int) -> None:
    """Set a library of the whole process, unless that is what it has been set to: a task may have set it since."""
    if limited.now == threads:
        return
    limited.now = threads
    # threadpoolctl 3.8 hears only the thread that was first to limit OpenBLAS. Here it is the lock that keeps order.
    take_over = getattr(limited.library, "clear_controlling_thread", None)
    if take_over is not None:
        take_over(force=True)
    limited.library.set_num_threads(threads)
    if take_over is not None:
        take_over()


@functools.lru_cache(1)
def _libraries(modules: int) -> list[Any]:
    """Find the loaded BLAS and OpenMP libraries: 2 ms, so only when there are other modules than the last time."""
    try:
        from threadpoolctl import ThreadpoolController
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "inner_max_num_threads needs threadpoolctl on the node, which lacks it: install it there, or ask for it "
            'with Image(pip=["threadpoolctl"])',
            name=error.name,
        ) from None
    return list(ThreadpoolController().lib_controllers)


def _limiting_import(*args: Any, **kwargs: Any) -> Any:
    """Import as usual, then limit what the import loaded: a task may be the first to import numpy."""
    own = _own
    if own.busy or own.limit is None:
        return _import(*args, **kwargs)
    # The libraries are looked for at the end of an import, not after each module within it.
    own.busy = True
    try:
        module = _import(*args, **kwargs)
        if len(sys.modules) != own.modules:
            _limit_all(own.limit)
        return module
    finally:
        own.busy = False
