"""One batch of a `Parallel` call, or of `map`, on the worker: its calls run one after another."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from time import perf_counter_ns
from typing import Any

from ..pickling.payload import BACKEND_NAME
from .thread_limits import limited

Function = Callable[..., Any]
Triple = tuple[Function, tuple[Any, ...], dict[str, Any]]
"""A call: function, arguments, keyword arguments."""


def run_batch(calls: Iterable[Triple], values: list[Any], limit: int | None = None) -> None:
    """Run the calls, with `Parallel` calls in them being sequential, one level below the client's.

    Each value is appended to `values`: when a call raises, the list has the values of the calls before it. Once the
    batch has run for `limit` nanoseconds no further call begins: then there are fewer values than calls.
    """
    with _nested()():
        end = None if limit is None else perf_counter_ns() + limit
        for function, args, kwargs in calls:
            values.append(function(*args, **kwargs))
            if end is not None and perf_counter_ns() > end:
                break


def run_limited(threads: int, calls: Iterable[Triple], values: list[Any], limit: int | None = None) -> None:
    """Run the calls as `run_batch` does, with at most so many threads in each BLAS and OpenMP library.

    Raises `ModuleNotFoundError` without threadpoolctl.
    """
    with limited(threads):
        run_batch(calls, values, limit)


@functools.cache
def _nested() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return what makes the context in which `Parallel` calls are sequential.

    On a node without joblib, where no call of `Parallel` is possible, that context does nothing. A task may name our
    backend, as it may at the client: within a task that name means the sequential backend, too.
    """
    # `preload` has imported joblib before, which takes 0.1–0.4 s; and only workers that get batches come here.
    try:
        from joblib import parallel_config, register_parallel_backend
        from joblib.parallel import SequentialBackend
    except ModuleNotFoundError as error:
        if error.name != "joblib":
            raise
        return contextlib.nullcontext
    register_parallel_backend(BACKEND_NAME, SequentialBackend)
    return lambda: parallel_config(backend=SequentialBackend(nesting_level=1))
