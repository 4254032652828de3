"""At most so many threads in the BLAS and OpenMP libraries while a batch runs: joblib's `inner_max_num_threads`.

A library keeps its limit in one of two ways.

- OpenMP has a limit for each thread that calls it. Each batch sets the limit of its own thread, and resets it.
- The other libraries have one limit for the process. While several batches run, the strictest of their limits holds.
  The last batch to end restores the number of threads that the library had before the first one.

  For example, a library has 8 threads. Batch A begins with a limit of 4: the library gets 4. Batch B begins beside it
  with a limit of 2: the library gets 2. B ends: it gets 4 again. A ends: it gets 8.

A task may be the first to import numpy, whose library has no limit then. So this room replaces `builtins.__import__`
while limited batches run, and looks for new libraries after each import.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import sys
import threading
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass
class _LimitedLibrary:
    """A library under a limit: the threads that it had before, and the threads that it has now."""

    library: Any
    before: int
    now: int


class _ThreadState(threading.local):
    """What one thread needs to know while it runs a limited batch."""

    def __init__(self) -> None:
        self.limit: int | None = None
        """The limit of the batch that this thread runs; None between batches."""
        self.libraries: dict[str, _LimitedLibrary] = {}
        """The libraries that this thread has limited for itself, by file."""
        self.module_count = 0
        """How many modules had been imported when this thread last looked for libraries."""
        self.importing = False
        """Whether this thread is in an import. Libraries are looked for when the outermost import ends."""


_own = _ThreadState()
_lock = threading.RLock()
"""Held while the next two names, or the limits of the process's libraries, change."""
_running: list[int] = []
"""The limits of the batches that are running in this process."""
_shared: dict[str, _LimitedLibrary] = {}
"""The libraries that have one limit for the process, by file; emptied when no limited batch runs."""
_import = builtins.__import__


@contextlib.contextmanager
def limited(threads: int) -> Iterator[None]:
    """Limit each BLAS and OpenMP library to so many threads, for the calling thread's work within the block.

    Raises `ModuleNotFoundError` without threadpoolctl.
    """
    with _lock:
        _running.append(threads)
        builtins.__import__ = _limiting_import
    _own.limit = threads
    try:
        _limit_all(threads)
        yield
    finally:
        _own.limit = None
        for library in _own.libraries.values():
            library.library.set_num_threads(library.before)
        _own.libraries.clear()
        with _lock:
            _running.remove(threads)
            for library in _shared.values():
                _set_shared(library, min(_running, default=library.before))
            if not _running:
                _shared.clear()
                builtins.__import__ = _import


def _limit_all(threads: int) -> None:
    """Limit every library that is loaded by now."""
    _own.module_count = len(sys.modules)
    for library in _libraries(_own.module_count):
        if library.user_api == "openmp" or getattr(library, "threading_layer", "") == "openmp":
            if library.filepath not in _own.libraries:
                _own.libraries[library.filepath] = _LimitedLibrary(library, library.num_threads, threads)
                library.set_num_threads(threads)
        else:
            with _lock:
                before = library.num_threads
                shared = _shared.setdefault(library.filepath, _LimitedLibrary(library, before, before))
                _set_shared(shared, min(_running))


def _set_shared(shared: _LimitedLibrary, threads: int) -> None:
    """Set the threads of a library that has one limit for the process.

    Do nothing if that is the number which this function set last: a task may have set another one since.
    """
    if shared.now == threads:
        return
    shared.now = threads
    # threadpoolctl 3.8 obeys only the thread that was the first to limit OpenBLAS. Here `_lock` keeps the order.
    take_over = getattr(shared.library, "clear_controlling_thread", None)
    if take_over is not None:
        take_over(force=True)
    shared.library.set_num_threads(threads)
    if take_over is not None:
        take_over()


@functools.lru_cache(1)
def _libraries(module_count: int) -> list[Any]:
    """Return the loaded BLAS and OpenMP libraries.

    Looking for them takes 2 ms, so it is done again only when the number of imported modules has changed.
    """
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
    """Import as `builtins.__import__` does, then limit the libraries that the import loaded."""
    own = _own
    if own.importing or own.limit is None:
        return _import(*args, **kwargs)
    own.importing = True
    try:
        module = _import(*args, **kwargs)
        if len(sys.modules) != own.module_count:
            _limit_all(own.limit)
        return module
    finally:
        own.importing = False
