"""How a worker's thread takes tasks, runs them and hands in how they ended.

A task goes through four states, and each step of `TaskLoop` leads from one to the next:

    WAITING ── _take ──▶ TAKEN ── _run ──▶ RUNNING ── _run ──▶ ENDED ── _hand_in, _forget ──▶ WAITING

An exception that comes while a task runs, its own or one from outside, is how the task ends. But a task may leave an
alarm or a thread behind that raises an exception in this thread later, between two tasks. Such an exception belongs to
no task: it is dropped, and the loop goes on from the state that it has reached. So every step may be interrupted
anywhere, and may safely be repeated:

WAITING   The core appends the next task to a list, rather than return it, and no task is asked for while the list has
          one. So a task that was taken just before the exception is not lost.
TAKEN     Nothing of the task has run: `_run` enters the next state before it rebuilds the call. The task is run.
RUNNING   `_run` catches the exception and pickles it as the task's end. If a second exception interrupts the pickling,
          the second one becomes the end (`_end_interrupted`). The task is not run again.
ENDED     The end is handed in again. The core ignores an end that it has already.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from time import perf_counter_ns
from typing import Any, Final, NoReturn

from .. import _core
from ..pickling import batches, blame, classes, exceptions, payload, script, streams
from ..pickling.route import Route
from . import first_imports, task_warnings
from .batch import Function, Triple, run_batch, run_limited
from .context import Context

Decorator = Callable[[Function], Function]

WAITING: Final = 0
TAKEN: Final = 1
RUNNING: Final = 2
ENDED: Final = 3

TASK_WAIT_MS: Final = 60_000
"""Bound on one wait for a task. Nothing depends on it: the process ends when its agent does."""
HEAVY_PICKLE_BYTES: Final = 1 << 20
"""A task with a larger pickle, or with buffers beside it, may leave much garbage behind: see `_forget`."""
MAX_STRAYS: Final = 1_000
"""Exceptions that belong to no task, without a task's end between them, after which this process gives up."""
MAIN_THREAD_NOTE: Final = (
    "this task ran on a thread, as those of Worker(concurrency=2 or more) do: "
    'with Worker(executor="process") each task has the main thread of its process'
)


def take_tasks(worker: _core.WorkerRuntime, slot: int, decorators: list[Decorator], context: Context) -> None:
    """Run this slot's tasks on the calling thread, until the process is to end."""
    TaskLoop(worker, slot, decorators, context).run_tasks()


class TaskLoop:
    """The tasks of one slot. Made on the thread that runs them: it prepares that thread."""

    def __init__(self, worker: _core.WorkerRuntime, slot: int, decorators: list[Decorator], context: Context) -> None:
        settings = worker.settings
        self._worker = worker
        self._decorate = decorator(worker, slot, decorators)
        self._encoder = payload.encoder(settings.max_payload, Route(settings.shares_files, to_client=True))
        self._process = os.getpid()
        """The worker's process: a child that a task forks has another one."""
        self._several = worker.slots > 1
        if self._several:
            first_imports.enter()
        if settings.task_timeout_ms is not None:
            first_imports.time_by((functools.partial(worker.pause, slot), functools.partial(worker.restart, slot)))
        self._warnings = task_warnings.enter() if self._several else task_warnings.Scope()
        self._apply_context = context.for_thread()
        self._names = script.names()
        """What the running task has entered into the script's `__main__`."""

        self._state = WAITING
        self._taken: list[Any] = []
        """The task that was taken, until its call has been rebuilt."""
        self._take_one = functools.partial(worker.take, slot, TASK_WAIT_MS, self._taken)
        self._finish = functools.partial(worker.finish, slot)
        self._begun: tuple[int, int] = (0, 0)
        """The task's number and the number of this attempt at it."""
        self._kind = payload.CALL
        self._heavy = False
        """Whether the task may leave much garbage behind."""
        self._call: Any = None
        """The call, or the batch of calls, as it was rebuilt. Errors name it."""
        self._value: Any = None
        """The value that the task returned, until its end is handed in: freeing it may run code of the user's."""
        self._values: list[Any] = []
        """Of a batch, the values of the calls that have returned."""
        self._answer: Any = None
        """The attempt and how it ended, as `WorkerRuntime.finish` takes it; set just before the state becomes ENDED."""
        self._stray: BaseException | None = None
        """The last exception that interrupted a step."""
        self._strays = 0
        """How many exceptions have interrupted steps since the last task ended."""

    def run_tasks(self) -> None:
        """Run tasks until the process is to end."""
        try:
            while True:
                try:
                    while True:
                        if self._state == WAITING and not self._take():
                            return
                        if self._state == TAKEN:
                            self._run()
                        elif self._state == RUNNING:
                            self._end_interrupted()
                        self._hand_in()
                        self._forget()
                except BaseException as error:
                    # Call nothing in this handler: the next asynchronous exception could be raised inside that call
                    # and escape the loop.
                    self._stray = error
                    self._strays += 1
                    if self._strays == MAX_STRAYS:
                        raise
        finally:
            if not self._worker.over:
                # Without this thread nothing would run the slot's tasks. The agent notices that a process has ended.
                try:
                    traceback.print_exc()
                finally:
                    os._exit(1)

    def _take(self) -> bool:
        """Wait for a task. Return False if the process is to end instead."""
        taken = self._taken
        while not taken:
            self._take_one()
            if not taken and self._worker.over:
                return False
        self._state = TAKEN
        return True

    def _run(self) -> None:
        """Rebuild the call, run it and pickle its value. An exception meanwhile is pickled as the task's end."""
        task, attempt, kind, _, pickled, buffers = self._taken[0]
        self._begun = task, attempt
        self._kind = kind
        self._heavy = buffers is not None or len(pickled) > HEAVY_PICKLE_BYTES
        self._answer = value = None
        returned = False
        start = perf_counter_ns()
        try:
            self._state = RUNNING
            # A finalizer that ran between two tasks may have used the filters.
            self._warnings.view = None
            call = self._call = first_imports.loads(pickled, buffers)
            if self._apply_context is not None:
                self._apply_context()
            # While the task runs, this thread must not keep the memory from which its call was read.
            self._taken.clear()
            del pickled, buffers
            start = perf_counter_ns()
            if kind == payload.BATCH:
                code, value = self._run_batch(call)
            else:
                function, args, kwargs = call
                if self._decorate is not None:
                    function = self._decorate(function)
                code, value = _core.RETURNED, function(*args, **kwargs)
            nanos = perf_counter_ns() - start
            self._value = value
            returned = True
            calls = len(self._values) if kind == payload.BATCH else 1
            pickled, buffers = self._encoder.dumps(streams.result_beside(value, kind == payload.BATCH), None, calls)
            self._answer = task, attempt, code, calls, nanos, pickled, buffers
        except BaseException as error:
            # SystemExit and KeyboardInterrupt are the task's as well, as in concurrent.futures.
            if os.getpid() != self._process:
                end_child(error)
            nanos = perf_counter_ns() - start
            for add_note in NOTES:
                add_note(error)
            # The outermost frames are of this method and, for a batch, of `_run_batch` and `run_batch`.
            skip = 3 if kind == payload.BATCH else 1
            if returned and isinstance(error, Exception):
                place = blame.place_of_result(error, self._worker.node, kind, self._call, value, self._encoder)
            else:
                place = blame.place(self._worker.node, kind, self._call, len(self._values))
            dumped = exceptions.dump(self._encoder, error, skip, place)
            self._answer = task, attempt, _core.RAISED, len(self._values) + 1, nanos, *dumped
        self._state = ENDED

    def _run_batch(self, batch: Any) -> tuple[int, list[Any]]:
        """Run the calls of a batch. Return whether all of them have run, and their values."""
        threads, limit, calls = batch if isinstance(batch, tuple) else (None, None, batch)
        self._call = calls
        count = len(calls)
        if count > 1 and isinstance(calls, batches.Calls):
            calls.loads = first_imports.loads
        if self._decorate is not None:
            calls = decorated(calls, self._decorate)
        if count > 1 and self._several:
            calls = self._warnings.each(calls)
        if threads is None:
            run_batch(calls, self._values, limit)
        else:
            run_limited(threads, calls, self._values, limit)
        return _core.PARTIAL if len(self._values) < count else _core.RETURNED, self._values

    def _end_interrupted(self) -> None:
        """End a task with the exception that came before the task's own one was pickled."""
        if self._answer is None and self._stray is not None:
            place = blame.place(self._worker.node, self._kind, self._call, max(0, len(self._values) - 1))
            dumped = exceptions.dump(self._encoder, self._stray, 2, place)
            self._answer = *self._begun, _core.RAISED, len(self._values) + 1, 0, *dumped
        self._state = ENDED

    def _hand_in(self) -> None:
        """Hand in how the task ended, unless the core has that already."""
        if os.getpid() != self._process:
            # A child that the task forked has returned from it. The parent hands in the task's end.
            end_child(None)
        flush()
        self._finish(*self._answer)

    def _forget(self) -> None:
        """Forget the task: while this thread waits for the next one, it must not keep the last one's memory."""
        self._taken.clear()
        self._call = self._value = self._stray = None
        self._values = []
        self._warnings.view = None
        self._names.clear()
        self._state = WAITING
        self._answer = None
        if self._heavy and classes.thread_state.made_fresh:
            # Classes that were made for this call alone are garbage in cycles, with all that they refer to. Python's
            # own collector would wait for many more of them.
            classes.thread_state.made_fresh = False
            gc.collect()
        self._strays = 0


def add_main_thread_note(error: BaseException) -> None:
    """Add a note to an exception which says that something works on the main thread only, if the task ran elsewhere."""
    if not isinstance(error, ValueError | RuntimeError) or threading.current_thread() is threading.main_thread():
        return
    with suppress(Exception):
        text = str(error)
        if "main thread" in text or text.startswith("There is no current event loop in thread"):
            error.add_note(MAIN_THREAD_NOTE)


NOTES: Final[list[Callable[[BaseException], None]]] = [add_main_thread_note]
"""Each may add a note to an exception that a task has raised. A worker adds to them before its first task."""


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
        # A task may have closed a stream, or put anything in its place. `suppress` takes longer than all the rest.
        try:  # noqa: SIM105
            stream.flush()
        except Exception:
            pass


def decorated(calls: Iterable[Triple], decorate: Decorator) -> Iterator[Triple]:
    """Return the calls of a batch with their functions decorated, each when it is its turn."""
    for function, args, kwargs in calls:
        yield decorate(function), args, kwargs


def decorator(worker: _core.WorkerRuntime, slot: int, decorators: list[Decorator]) -> Decorator | None:
    """Return what is done to each function that this slot runs; None for nothing."""
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
