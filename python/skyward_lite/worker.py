"""The worker process: takes tasks from the agent at its standard input and runs them. User code lives only here."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import threading
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

from . import _core, payload
from ._stdin import take_socket

Triple = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

WAIT_MS = 60_000
"""Bound on one wait for a task. Nothing depends on it: the process ends when its agent does."""


def take_tasks(worker: _core.Worker) -> None:
    """Run tasks for ever, on this thread."""
    encoder = payload.encoder(worker.max_payload)
    take, finish, loads = worker.next, worker.finish, payload.loads
    call: Any
    value: Any
    encoded: Any
    while True:
        item = take(WAIT_MS)
        if item is None:
            continue
        task, attempt, kind, _, head, buffers = item
        start = perf_counter_ns()
        try:
            call = loads(head, buffers)
            # What is running must not keep the memory that it was read from.
            del item, head, buffers
            start = perf_counter_ns()
            if kind == payload.BATCH:
                value = run_batch(call)
            else:
                function, args, kwargs = call
                value = function(*args, **kwargs)
                del function, args, kwargs
            nanos = perf_counter_ns() - start
            tag, encoded = payload.RETURNED, encoder.dumps(value)
        except BaseException as error:
            # Also SystemExit and KeyboardInterrupt: they are the task's, as in concurrent.futures, not the worker's.
            nanos = perf_counter_ns() - start
            skip = 2 if kind == payload.BATCH else 1
            tag, encoded = payload.RAISED, payload.dump_exception(encoder, error, skip)
        finish(task, attempt, tag, nanos, *encoded)
        # While this thread waits for its next task it must not keep the last one's memory.
        item = call = value = encoded = None


def run_batch(items: list[Triple]) -> list[Any]:
    """Run joblib's triples with nested `Parallel` calls being sequential, as joblib does in its own workers."""
    # Imported before by `preload` (it takes 0.1–0.4 s), and only where joblib's batches come.
    from joblib import parallel_config

    with parallel_config(backend="sequential"):
        return [function(*args, **kwargs) for function, args, kwargs in items]


def main() -> None:
    """Connect to the agent and serve until it ends this process."""
    fd = take_socket()
    # The process is killed, not finalized: what a task printed must not sit in a buffer.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    worker = _core.Worker(fd)
    if worker.sys_path:
        sys.path[:] = worker.sys_path
    for module in worker.preload:
        # What is missing here is the task's error to report, not the worker's.
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for number in range(1, worker.slots):
        threading.Thread(target=take_tasks, args=(worker,), name=f"skyward-{number}", daemon=True).start()
    worker.ready()
    take_tasks(worker)


if __name__ == "__main__":
    main()
