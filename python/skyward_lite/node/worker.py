"""The worker process: takes tasks from the agent at its standard input and runs them. User code lives only here."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import io
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter_ns
from typing import Any, NoReturn

from .. import _core, messages, nesting
from ..pickling import blame, classes, payload, script
from ..pickling.route import Route
from ..plugins import WorkerInfo
from . import first_imports, main_thread, task_warnings, worker_exit
from .batch import Function, Triple, run_batch, run_limited
from .stdin import take_socket

Decorator = Callable[[Function], Function]

WAIT_MS = 60_000
"""Bound on one wait for a task. Nothing depends on it: the process ends when its agent does."""
HEAVY = 1 << 20
"""Bytes of a pickle from which on what is left of its task is not left to chance."""
MOST_STRAYS = 1_000
"""Exceptions without a task in between after which this process gives up."""


def take_tasks(worker: _core.WorkerRuntime, slot: int, decorate: Decorator | None) -> None:
    """Run tasks on this thread until the process is to end.

    What is raised while a task runs is the task's. But a task can leave behind an alarm, or a thread that raises
    something in this one, between two others: that is nobody's, and each step here can be taken again after it.
    """
    settings = worker.settings
    encoder = payload.encoder(settings.max_payload, Route(settings.shares_files, to_client=True))
    node = worker.node
    take, finish, rebuild = worker.take, worker.finish, payload.rebuild
    process = os.getpid()
    several = worker.slots > 1
    if several:
        timer = functools.partial(worker.pause, slot), functools.partial(worker.restart, slot)
        first_imports.enter(None if settings.task_timeout_ms is None else timer)
    warned = task_warnings.enter() if several else task_warnings.Scope()
    names = script.names()
    taken: list[Any] = []
    """The task that was taken and not yet unpickled."""
    begun: Any = None
    """The task, and the attempt at it, whose end has not been handed in."""
    answer: Any = None
    """How it ended."""
    stray: BaseException | None = None
    strays = 0
    call: Any = None
    value: Any = None
    values: list[Any] = []
    """Of a batch, the values of the calls that have returned."""
    returned = heavy = False
    try:
        while True:
            try:
                # Whatever is raised in here goes no further than this.
                while True:
                    if begun is None:
                        if not taken:
                            take(slot, WAIT_MS, taken)
                            if not taken:
                                if worker.over:
                                    return
                                continue
                        task, attempt, kind, _, pickled, buffers = taken[0]
                        start = perf_counter_ns()
                        heavy = buffers is not None or len(pickled) > HEAVY
                        try:
                            begun = task, attempt
                            # A finalizer that ran between two tasks may have used the filters.
                            warned.view = None
                            call = rebuild(pickled, buffers)
                            # What is running must not keep the memory that it was read from.
                            taken.clear()
                            del pickled, buffers
                            start = perf_counter_ns()
                            if kind == payload.BATCH:
                                threads, limit, call = call if isinstance(call, tuple) else (None, None, call)
                                asked = len(call)
                                run = call if decorate is None else decorated(call, decorate)
                                if several and asked > 1:
                                    run = warned.each(run)
                                if threads is None:
                                    run_batch(run, values, limit)
                                else:
                                    run_limited(threads, run, values, limit)
                                value = values
                            else:
                                function, args, kwargs = call
                                if decorate is not None:
                                    function = decorate(function)
                                value = function(*args, **kwargs)
                                del function, args, kwargs
                            nanos = perf_counter_ns() - start
                            returned = True
                            calls = len(values) if kind == payload.BATCH else 1
                            tag = _core.PARTIAL if kind == payload.BATCH and calls < asked else _core.RETURNED
                            answer = tag, nanos, *encoder.dumps(value, None, calls)
                        except BaseException as error:
                            # Also SystemExit and KeyboardInterrupt: they are the task's, as in concurrent.futures.
                            if os.getpid() != process:
                                end_child(error)
                            nanos = perf_counter_ns() - start
                            main_thread.explain(error)
                            skip = 2 if kind == payload.BATCH else 1
                            if returned and isinstance(error, Exception):
                                place = blame.place_of_result(error, node, kind, call, value, encoder)
                            else:
                                place = blame.place(node, kind, call, len(values))
                            answer = _core.RAISED, nanos, *payload.dump_exception(encoder, error, skip, place)
                    elif answer is None and stray is not None:
                        # It came before the task's own exception was pickled.
                        place = blame.place(node, kind, call, max(0, len(values) - 1))
                        answer = _core.RAISED, 0, *payload.dump_exception(encoder, stray, 1, place)
                    if os.getpid() != process:
                        # A child that the task forked has come this far. The answer is its parent's to give.
                        end_child(None)
                    flush()
                    finish(*begun, *answer)
                    # While this thread waits for its next task it must not keep the last one's memory.
                    taken.clear()
                    call = value = run = function = args = kwargs = pickled = buffers = None
                    answer = begun = stray = None
                    values = []
                    returned = False
                    warned.view = None
                    names.clear()
                    if heavy and classes.calls.made_fresh:
                        # Otherwise the interpreter would wait for many more of them.
                        classes.calls.made_fresh = False
                        gc.collect()
                    strays = 0
            except BaseException as error:
                # No call in here: the next one would be raised there.
                stray = error
                strays += 1
                if strays == MOST_STRAYS:
                    raise
    finally:
        if not worker.over:
            # Nobody would run this slot's tasks any more: the agent is to know.
            try:
                traceback.print_exc()
            finally:
                os._exit(1)


def end_child(error: BaseException | None) -> NoReturn:
    """End a process that a task forked, as the interpreter would."""
    code = 0 if error is None else 1
    if isinstance(error, SystemExit):
        code = (error.code or 0) if isinstance(error.code, int | None) else 1
    flush()
    os._exit(code)


def flush() -> None:
    """Hand on what was printed without the end of a line: a process that is replaced is killed, not finalized."""
    for stream in (sys.stdout, sys.stderr):
        # A task may have closed them, or put anything in their place. Not `suppress`, which takes longer than the rest.
        try:  # noqa: SIM105
            stream.flush()
        except Exception:
            pass


def decorated(calls: Iterable[Triple], decorate: Decorator) -> Iterator[Triple]:
    """Return the calls of a batch with their functions decorated, each when it is its turn."""
    for function, args, kwargs in calls:
        yield decorate(function), args, kwargs


def decorator(worker: _core.WorkerRuntime, slot: int, decorators: list[Decorator]) -> Decorator | None:
    """Give what is done to each function that this slot runs; None for nothing."""
    is_timed = worker.settings.task_timeout_ms is not None
    if not decorators and not is_timed:
        return None

    def decorate(function: Function) -> Function:
        for plugin in reversed(decorators):
            function = plugin(function)
        return functools.partial(timed, function) if is_timed else function

    def timed(function: Function, /, *args: Any, **kwargs: Any) -> Any:
        # The limit is for one call, and a batch has several.
        worker.restart(slot)
        return function(*args, **kwargs)

    return decorate


def main() -> None:
    """Connect to the agent and serve until it ends this process, or asks for its end."""
    fd = take_socket()
    # What a task printed must not sit in a buffer, because this process may be killed. It reaches the client as UTF-8
    # whatever this node's locale is; programs that a task starts have the node's locale.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    with contextlib.suppress(Exception):
        # So must what C libraries print.
        libc = ctypes.CDLL(None)
        libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, 1, 0)
    # Resource trackers clean up when this process has been killed. That is how it may end, and nobody's leak.
    trackers = ("multiprocessing", "loky.backend", "joblib.externals.loky.backend")
    filters = [f"ignore::UserWarning:{package}.resource_tracker" for package in trackers]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), *filters)))
    # Ctrl-C is the client's to handle. What tasks start must not ignore it, as it would if this process did.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    # The end of standard error is part of the error that names the death of this process.
    faulthandler.enable(all_threads=False)
    script.install()
    worker = _core.WorkerRuntime(fd)
    settings = worker.settings
    messages.be_worker(worker)
    if settings.sys_path:
        sys.path[:] = settings.sys_path
    sys.argv[:] = nesting.take_arguments()
    for module in settings.preload:
        # What is missing here is the task's error to report, not the worker's.
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    worker_exit.prepare()
    hooks = pickle.loads(base64.b64decode(settings.setup)) if settings.setup else []
    decorators = [decorate for _, decorate in hooks if decorate is not None]
    info = WorkerInfo(node=worker.node, pid=os.getpid(), slots=worker.slots)
    with contextlib.ExitStack() as stack:
        for around, _ in hooks:
            if around is not None:
                stack.enter_context(around(info))
        loops = [
            functools.partial(take_tasks, worker, slot, decorator(worker, slot, decorators))
            for slot in range(worker.slots)
        ]
        if worker.slots > 1:
            task_warnings.install()
            first_imports.install()
            main_thread.run_slots(worker, loops)
        else:
            worker.ready()
            loops[0]()
    # The interpreter ends now as any other does: see worker_exit.py.


if __name__ == "__main__":
    main()
