"""Completion queues: tasks that were submitted together, and the thread that takes their ends from the Rust core.

All futures of a pool share one queue. Each call of `Parallel` has its own, because joblib reads the call's input in its
callbacks: reading may wait for what other queues bring, and must hold nobody else up.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol

from .. import _core
from ..errors import PoolClosedError
from ..pickling import managers, payload
from .failures import Failures
from .lifecycle import Lifecycle

log = logging.getLogger("skyward_lite")

CLOSED: Final = "this pool is closed: tasks are sent inside its with block"
MAX_NANOS: Final = 2**63
"""Bound on the time limit of one task, in nanoseconds; it fits the wire."""
TAKE_MS: Final = 1_000
"""Bound on one wait for ended tasks; closing the pool wakes the waiting thread at once."""
FUTURES: Final = 0
"""The number of the queue that all futures of a pool share: the core has it open from the start."""

AbandonHook = Callable[[set[threading.Thread]], bool]


class Pending(Protocol):
    """A submitted task, at the client: a future or a batch of joblib."""

    def resolve(self, code: int, nanos: int, pickled: Any, buffers: Any) -> None:
        """Take the task's end. Called once, on the queue's thread or on the one that cancels; must not raise."""


class Input(Protocol):
    """What the tasks of a call of `Parallel` are made from."""

    def waiting_calls(self) -> int | None:
        """Return how many calls are still to be submitted; None if that is not known."""


class Completions:
    """All completion queues of one pool."""

    def __init__(self, core: _core.Core, task_timeout: float | None, lifecycle: Lifecycle) -> None:
        self.core = core
        self.lifecycle = lifecycle
        self.failures = Failures()
        self.call_nanos = int((task_timeout or 0) * 1e9)
        """The time limit of one call, in nanoseconds; 0 for none."""
        self.queues: dict[int, CompletionQueue] = {}
        """The queues whose threads run, by number; each enters and removes itself."""
        self.futures = CompletionQueue(self, FUTURES)
        """The queue that all futures share. It is open as long as the pool is."""

    def open(self, abandon: AbandonHook, resume: Callable[[], None]) -> CompletionQueue:
        """Open a queue for one call of `Parallel`, which neither waits for nor holds up what else is submitted."""
        queue = CompletionQueue(self, self.core.open_queue(), abandon, resume)
        queue.start()
        return queue

    def count(self) -> int:
        """Return how many tasks have not ended."""
        return sum(len(queue.pending) for queue in list(self.queues.values()))

    def is_pending(self, task: int) -> bool:
        """Return whether the task of this number has not ended."""
        queue = self.queues.get(task >> _core.QUEUE_SHIFT)
        return queue is not None and task in queue.pending

    def runs_this_thread(self) -> bool:
        """Return whether the calling thread is that of a queue: then it runs a callback, and cannot wait for others."""
        return any(queue.is_current() for queue in list(self.queues.values()))

    def has_waiters(self) -> bool:
        """Return whether any thread that is not leaving the pool waits for tasks, or needs their ends.

        Every queue is asked, because a queue that nobody waits for abandons its tasks when it is asked.
        """
        waited_for = [queue for queue in list(self.queues.values()) if queue.has_waiters(self.lifecycle.leaving)]
        return bool(waited_for)


class CompletionQueue:
    """Tasks that have not ended, and the thread that resolves them.

    `abandon` is called when the pool's block is left, with the threads that wait for the block's end. If no other
    thread can wait for this queue's tasks, it aborts them and returns true. `resume` goes on with tasks that are held;
    it is called on the queue's thread soon after `wake`.
    """

    def __init__(
        self,
        completions: Completions,
        number: int,
        abandon: AbandonHook | None = None,
        resume: Callable[[], None] | None = None,
    ) -> None:
        self.pending: dict[int, Pending] = {}
        """Task number → what waits for the task's end. An entry is removed when its `resolve` has returned."""
        self.input: Input | None = None
        """What the tasks are made from; None for futures."""
        self.held = 0
        """Tasks that have ended, and whose resolution goes on later. Changed on the queue's thread."""
        self._abandoned = False
        self._completions = completions
        self._core = completions.core
        self.failures = completions.failures
        self._number = number
        self._abandon = abandon
        self._resume = resume
        self._call_nanos = completions.call_nanos
        # From 1 on, because 0 stands for a batch that has no task yet.
        self._tasks = itertools.count((number << _core.QUEUE_SHIFT) + 1)
        self._stopped = False
        self._thread = threading.Thread(target=self._resolve_all, name=f"skyward-resolve-{number}", daemon=True)

    def start(self) -> None:
        """Start the thread. From now on tasks may be sent."""
        self._completions.queues[self._number] = self
        try:
            self._thread.start()
        except BaseException:
            self._close()
            raise

    def stop(self) -> None:
        """End the thread after the last task. Only callbacks of this queue's tasks may send tasks from now on."""
        self._stopped = True
        self.wake()

    def wake(self) -> None:
        """Have `resume` called, if tasks are held."""
        self._core.wake(self._number)

    def join(self, seconds: float) -> bool:
        """Wait until every task is resolved. Return whether they are, or whether the calling thread resolves them."""
        if self.is_current() or not self._thread.is_alive():
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def is_current(self) -> bool:
        """Return whether the calling thread is the one that resolves this queue's tasks."""
        return threading.current_thread() is self._thread

    def has_waiters(self, leaving: set[threading.Thread]) -> bool:
        """Return whether a task has not ended that threads other than `leaving` wait for, or must not lose.

        If there is none such task, the tasks that are left are abandoned.
        """
        if self.is_busy() and not self._abandoned and self._abandon is not None:
            self._abandoned = self._abandon(leaving)
        return self.is_busy() and not self._abandoned

    def send(
        self,
        waiter: Pending,
        kind: int,
        pickled: bytes,
        buffers: payload.Buffers,
        generation: int,
        name: int,
        node: int | None = None,
        calls: int = 1,
    ) -> int:
        """Submit a task to the node of this number in `pool.nodes()`, or to any; return the task's number.

        It has so many `calls`. `generation` is that of the user's modules with which it runs, `name` the number of its
        function's name. Raise `PoolClosedError` if the pool is closed.
        """
        task = next(self._tasks)
        self.pending[task] = managers.CallWithProxies(waiter) if managers.unclaimed else waiter
        nanos = self._call_nanos and min(self._call_nanos * calls, MAX_NANOS)
        if not self._core.submit(task, kind, pickled, buffers, node, nanos, generation, calls, name):
            self._refuse(task)
        return task

    def end(self, waiter: Pending) -> None:
        """Have a task that cannot be sent resolved on the queue's thread, like one that was sent."""
        task = next(self._tasks)
        self.pending[task] = waiter
        if not self._core.end(task):
            self._refuse(task)

    def _refuse(self, task: int) -> None:
        del self.pending[task]
        raise PoolClosedError(CLOSED)

    def cancel(self, task: int, bound_ms: int = 0) -> None:
        """Drop a task that has not started. It is resolved now, or when the node that has it has answered."""
        if self._core.cancel(task, bound_ms):
            self.pending[task].resolve(_core.CANCELLED, 0, b"", None)
            del self.pending[task]

    def is_running(self, task: int) -> bool:
        """Return whether the task's node has reported that it runs."""
        return self._core.is_running(task)

    def abort(self, task: int) -> None:
        """Drop a task, or end it if it is running. It is resolved later, on the queue's thread."""
        self._core.abort(task)

    def is_busy(self) -> bool:
        """Return whether a task is not resolved."""
        return bool(self.pending or self.held)

    def _resolve_held(self) -> None:
        try:
            assert self._resume is not None
            self._resume()
        except BaseException:
            # As for one that was not held.
            log.exception("a callback failed")

    def _resolve_all(self) -> None:
        pending, core = self.pending, self._core
        waiter: Pending | None
        pickled: Any
        buffers: Any
        while (self.is_busy() or not self._stopped) and (ended := core.finished(self._number, TAKE_MS)) is not None:
            for task, _, code, nanos, pickled, buffers in ended:
                waiter = pending.get(task)
                if waiter is None:
                    continue
                try:
                    waiter.resolve(code, nanos, pickled, buffers)
                except BaseException:
                    # Nobody waits for this callback's end, and the other tasks' must not suffer.
                    log.exception("a callback of task %d failed", task)
                # Removed only after its callback has returned: the callback may submit further tasks, and a
                # thread that leaves the pool must wait for those as well.
                del pending[task]
            # A result belongs to its receiver: nothing in this frame keeps it while the thread waits for the next.
            del ended
            waiter = pickled = buffers = None
            if self.held:
                self._resolve_held()
            if not self.is_busy():
                self._completions.lifecycle.notify()
        self._close()

    def _close(self) -> None:
        # In this order: the core may give the number of a closed queue to another one at once.
        del self._completions.queues[self._number]
        self._core.close_queue(self._number)
