"""The worker process: takes tasks from the agent at its standard input and runs them. User code lives only here."""

from __future__ import annotations

import base64
import contextlib
import faulthandler
import functools
import importlib
import io
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

from . import _core, payload
from ._stdin import take_socket
from .batch import Function, run_batch, run_limited
from .plugins import WorkerInfo

Decorator = Callable[[Function], Function]

WAIT_MS = 60_000
"""Bound on one wait for a task. Nothing depends on it: the process ends when its agent does."""


def take_tasks(worker: _core.Worker, slot: int, decorate: Decorator | None) -> None:
    """Run tasks on this thread until the process is to end."""
    encoder = payload.encoder(worker.max_payload)
    take, finish, loads = worker.next, worker.finish, payload.loads
    process = os.getpid()
    call: Any
    value: Any
    encoded: Any
    while True:
        item = take(slot, WAIT_MS)
        if item is None:
            if worker.over:
                return
            continue
        task, attempt, kind, _, head, buffers = item
        start = perf_counter_ns()
        try:
            call = loads(head, buffers)
            # What is running must not keep the memory that it was read from.
            del item, head, buffers
            start = perf_counter_ns()
            if kind == payload.BATCH:
                threads, call = call if isinstance(call, tuple) else (None, call)
                if decorate is not None:
                    call = [(decorate(function), args, kwargs) for function, args, kwargs in call]
                value = run_batch(call) if threads is None else run_limited(threads, call)
            else:
                function, args, kwargs = call
                if decorate is not None:
                    function = decorate(function)
                value = function(*args, **kwargs)
                del function, args, kwargs
            nanos = perf_counter_ns() - start
            tag, encoded = payload.RETURNED, encoder.dumps(value)
        except BaseException as error:
            # Also SystemExit and KeyboardInterrupt: they are the task's, as in concurrent.futures, not the worker's.
            nanos = perf_counter_ns() - start
            skip = 2 if kind == payload.BATCH else 1
            tag, encoded = payload.RAISED, payload.dump_exception(encoder, error, skip)
        if os.getpid() != process:
            # A child that the task forked has come this far. The answer is its parent's to give.
            os._exit(tag)
        flush()
        finish(task, attempt, tag, nanos, *encoded)
        # While this thread waits for its next task it must not keep the last one's memory.
        item = call = value = encoded = None


def flush() -> None:
    """Hand on what was printed without the end of a line: this process is killed, not finalized."""
    for stream in (sys.stdout, sys.stderr):
        # A task may have closed them, or put anything in their place.
        with contextlib.suppress(Exception):
            stream.flush()


def decorator(worker: _core.Worker, slot: int, decorators: list[Decorator]) -> Decorator | None:
    """Give what is done to each function that this slot runs; None for nothing."""
    if not decorators and not worker.timed:
        return None

    def decorate(function: Function) -> Function:
        for plugin in reversed(decorators):
            function = plugin(function)
        return functools.partial(timed, function) if worker.timed else function

    def timed(function: Function, /, *args: Any, **kwargs: Any) -> Any:
        # The limit is for one call, and a batch has several.
        worker.restart(slot)
        return function(*args, **kwargs)

    return decorate


def main() -> None:
    """Connect to the agent and serve until it ends this process, or asks for its end."""
    fd = take_socket()
    # The process is killed, not finalized: what a task printed must not sit in a buffer.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    # Ctrl-C is the client's to handle. What tasks start must not ignore it, as it would if this process did.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    # The end of standard error is part of the error that names the death of this process.
    faulthandler.enable(all_threads=False)
    worker = _core.Worker(fd)
    if worker.sys_path:
        sys.path[:] = worker.sys_path
    for module in worker.preload:
        # What is missing here is the task's error to report, not the worker's.
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    hooks = pickle.loads(base64.b64decode(worker.setup)) if worker.setup else []
    decorators = [decorate for _, decorate in hooks if decorate is not None]
    info = WorkerInfo(node=worker.node, pid=os.getpid(), slots=worker.slots)
    with contextlib.ExitStack() as stack:
        for around, _ in hooks:
            if around is not None:
                stack.enter_context(around(info))
        for slot in range(1, worker.slots):
            args = (worker, slot, decorator(worker, slot, decorators))
            threading.Thread(target=take_tasks, args=args, name=f"skyward-{slot}", daemon=True).start()
        worker.ready()
        take_tasks(worker, 0, decorator(worker, 0, decorators))
    flush()
    # Whatever threads the tasks have started are not waited for.
    os._exit(0)


if __name__ == "__main__":
    main()
