"""Leaving a pool: what was submitted ends, plugins are left, sessions end, and machines are released.

One thread closes the pool, the first that begins to leave it; others wait until it is closed.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from .. import _core
from .._signals import held, remove_signal_handlers
from ..providers import Provider
from .display import Display
from .lifecycle import Lifecycle, Stage
from .nodes import Nodes
from .output import Printer
from .tasks import Tasks

log = logging.getLogger("skyward_lite")

LEAVE_POLL_SECONDS = 0.05
"""Bound on one wait of a thread that leaves the pool, so that Ctrl-C is noticed."""
TAKER_SECONDS = 1.0
"""Bound on waiting for a thread that takes messages: a listener of the user's may run on it for ever."""
JOIN_SECONDS = 5.0
"""Bound on waiting, when the pool is left, for callbacks of futures, and for the writing of what tasks printed."""


class Leaving:
    """The end of one pool. Usable from any thread, also before the pool has started.

    `forget()` is called when the pool is nearly closed: nothing of it is left then.
    """

    def __init__(
        self,
        core: _core.Core,
        provider: Provider,
        lifecycle: Lifecycle,
        tasks: Tasks,
        nodes: Nodes,
        printer: Printer,
        display: Display,
        forget: Callable[[], object],
    ) -> None:
        self._core = core
        self._provider = provider
        self._lifecycle = lifecycle
        self._tasks = tasks
        self._nodes = nodes
        self._printer = printer
        self._display = display
        self._forget = forget
        self.plugin_contexts = contextlib.ExitStack()
        """The plugins' `around_client`, entered and left on one thread: joblib's configuration is a thread's own."""
        self.entered_by: threading.Thread | None = None
        """The thread that entered the block; set by the pool when the nodes are ready."""
        self.handled_signals: list[int] = []
        self.takers: list[threading.Thread] = []
        """The threads that take messages and requests from the core until it is closed; added when the pool opens."""

    def leave(self, cancel: bool, *error: Any) -> None:
        """Close the pool, or wait until the thread that closes it has done so.

        Ctrl-C meanwhile cancels what is pending, and is raised at the end.
        """
        if self._core.is_forked:
            return  # a forked child has neither the pool's threads nor its nodes
        try:
            with held() as signals:
                self._close_or_wait(cancel, signals, error)
        except BaseException:
            # Ctrl-C may have been raised just before it was held, with the pool still open.
            with held() as signals:
                self._close_or_wait(True, signals, error)
            raise

    def leave_later(self, cancel: bool) -> None:
        """Begin to close the pool, and close it on a thread of its own."""
        if not self._core.is_forked:
            # Once a thread has begun to leave the pool it must get as far as starting the thread that closes it.
            with held(insist=True):
                if self._begin_to_leave(cancel):
                    try:
                        self._leave_plugins()
                    finally:
                        threading.Thread(target=self._close, name="skyward-shutdown").start()

    def _close_or_wait(self, cancel: bool, signals: Sequence[int], error: tuple[Any, ...]) -> None:
        if self._begin_to_leave(cancel):
            self._close(signals, error)
            return
        self._leave_plugins(*error)
        if not self._tasks.completions.runs_this_thread():
            self._wait(lambda: self._lifecycle.stage is Stage.CLOSED, signals)

    def _begin_to_leave(self, cancel: bool) -> bool:
        """Begin to leave on the calling thread. Return whether it is the first, which closes the pool."""
        self._lifecycle.leaving.add(threading.current_thread())
        first = self._lifecycle.advance(Stage.DRAINING)
        if cancel:
            self._lifecycle.advance(Stage.CANCELLING)
        return first

    def _close(self, signals: Sequence[int] = (), error: tuple[Any, ...] = ()) -> None:
        """Close the pool, in this order. Each step is taken whatever becomes of the steps before it.

        `signals` grows when Ctrl-C comes; `error` is the exception, as `sys.exc_info` returns it, that left the block.
        """
        steps: tuple[Callable[..., object], ...] = (
            lambda: self._drain(signals, error),
            self._release,
            lambda: remove_signal_handlers(self.handled_signals),
            self._forget,
            lambda: self._lifecycle.advance(Stage.CLOSED),
        )
        with contextlib.ExitStack() as stack:
            # The stack calls the last first, and goes on after an exception, which it raises at the end.
            for step in reversed(steps):
                stack.callback(step)

    def _drain(self, signals: Sequence[int], error: tuple[Any, ...]) -> None:
        """Wait until every submitted task has ended, unless the pool is left without waiting; then leave the plugins.

        The wait is bounded by the tasks themselves: each of them ends, or its node does.
        """
        has_waiters = self._tasks.completions.has_waiters
        try:
            self._wait(lambda: not has_waiters() or self._lifecycle.stage >= Stage.CANCELLING, signals)
        except BaseException:
            error = sys.exc_info()
            raise
        finally:
            self._leave_plugins(*error)

    def _wait(self, done: Callable[[], bool], signals: Sequence[int]) -> None:
        """Wait until `done()`. If a signal comes meanwhile, the pool is left without waiting for its tasks."""
        lifecycle = self._lifecycle
        with lifecycle.changed:
            while not done():
                if signals:
                    lifecycle.advance(Stage.CANCELLING)
                lifecycle.changed.wait(LEAVE_POLL_SECONDS)

    def _leave_plugins(self, *error: Any) -> None:
        """Leave the plugins' contexts, if this is the thread that entered them."""
        if self.entered_by is threading.current_thread():
            self.plugin_contexts.__exit__(*(error or (None, None, None)))

    def _release(self) -> None:
        """Cancel what has not ended, end the sessions with the nodes, and release the machines."""
        deadline = time.monotonic() + self._provider.leave
        self._lifecycle.advance(Stage.RELEASING)
        self._display.close(JOIN_SECONDS)
        try:
            self._core.close()
            # The threads of calls of Parallel are not waited for: they end when the calls' input lets them.
            if not self._tasks.completions.futures.join(JOIN_SECONDS):
                log.warning("a callback of a future has not returned, and is left alone")
            self._printer.join(JOIN_SECONDS)
            self._join_takers()
        finally:
            self._nodes.release(deadline)

    def _join_takers(self) -> None:
        """Wait for the threads that take messages and requests from the core, which is closed.

        When the interpreter ends, Python until 3.13 ends each thread that comes back from the core by unwinding its
        stack through the core's frames, which can end the process instead.
        """
        for thread in self.takers:
            if thread is not threading.current_thread():
                thread.join(TAKER_SECONDS)
