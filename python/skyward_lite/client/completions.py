"""Lanes: what was submitted together, and the thread that settles it.

Futures share one. Each call of `Parallel` has its own, because joblib reads the call's input in its callbacks: that may
wait for what other lanes bring, and holds nobody else up.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from .. import _core
from ..errors import PoolClosedError
from ..pickling import managers, payload

if TYPE_CHECKING:
    from .pool import ComputePool

log = logging.getLogger("skyward_lite")

LANES: Final = 1 << 24
"""Lanes that a pool can have at once."""
CLOSED: Final = "this pool is closed: tasks are sent inside its with block"
MAX_NANOS: Final = 2**63
"""Bound on what a task is said to run for, in nanoseconds; it fits the wire."""
RESOLVE_MS: Final = 1_000
"""Bound on one wait for finished tasks; closing wakes the waiting thread at once."""


AbandonHook = Callable[[set[threading.Thread]], bool]


class Call(Protocol):
    """A submitted task, at the client."""

    def resolve(self, tag: int, nanos: int, pickled: Any, buffers: Any) -> None:
        """Take the task's end. Called once, on the lane's thread or the one that cancels; must not raise."""


class CompletionQueue:
    """Tasks, and the thread that settles their calls.

    `abandon` is called when the pool's block is left, with the threads that wait for that: if nobody else can wait for
    this lane's tasks it ends them, and says so by true.
    """

    def __init__(self, pool: ComputePool, number: int, abandon: AbandonHook | None = None) -> None:
        self.calls: dict[int, Call] = {}
        """What has not ended: task number → its call."""
        self.left = False
        """Nobody waits for it any more."""
        self._pool = pool
        self._number = number
        self._abandon = abandon
        self._nanos = int((pool.worker.task_timeout or 0) * 1e9)
        # 0 is the task of what has none yet.
        self._tasks = itertools.count((number << _core.QUEUE_SHIFT) + 1)
        self._over = False
        self._thread = threading.Thread(target=self._settle, name=f"skyward-resolve-{number}", daemon=True)

    def start(self) -> None:
        """Begin to resolve. From now on tasks may be sent."""
        self._pool._core.open_queue(self._number)
        self._pool._lanes[self._number] = self
        try:
            self._thread.start()
        except BaseException:
            self._close()
            raise

    def stop(self) -> None:
        """Let the thread end with the last task. Nothing is sent any more but from its callbacks."""
        self._over = True
        self._pool._core.wake(self._number)

    def join(self, seconds: float) -> bool:
        """Wait until everything is settled; true if it is, or if this is the thread that settles."""
        if self.is_current() or not self._thread.is_alive():
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def is_current(self) -> bool:
        """Say whether the calling thread settles this lane."""
        return threading.current_thread() is self._thread

    def is_awaited(self, leaving: set[threading.Thread]) -> bool:
        """Say whether something has not ended that others than these threads wait for, or cannot be done without."""
        if self.calls and not self.left and self._abandon is not None:
            self.left = self._abandon(leaving)
        return bool(self.calls) and not self.left

    def send(
        self,
        call: Call,
        kind: int,
        pickled: bytes,
        buffers: payload.Buffers,
        node: int | None = None,
        calls: int = 1,
    ) -> int:
        """Append a task of so many calls to the queue; its number. `node`: that one's number in `nodes()`, or any."""
        task = next(self._tasks)
        self.calls[task] = managers.Keeping(call) if managers.unclaimed else call
        nanos = self._nanos and min(self._nanos * calls, MAX_NANOS)
        self._accepted(task, self._pool._core.submit(task, kind, pickled, buffers, node, nanos))
        return task

    def end(self, call: Call) -> None:
        """Let a call that cannot be sent be settled like one that was."""
        task = next(self._tasks)
        self.calls[task] = call
        self._accepted(task, self._pool._core.end(task))

    def _accepted(self, task: int, accepted: bool) -> None:
        if not accepted:
            del self.calls[task]
            raise PoolClosedError(CLOSED)

    def cancel(self, task: int, bound_ms: int = 0) -> None:
        """Drop a task that has not started; the call is settled now or when its node has answered."""
        if self._pool._core.cancel(task, bound_ms):
            self.calls[task].resolve(_core.CANCELLED, 0, b"", None)
            del self.calls[task]

    def abort(self, task: int) -> None:
        """Drop a task, or end it if it is running. Never settles its call itself."""
        self._pool._core.abort(task)

    def _settle(self) -> None:
        calls, core = self.calls, self._pool._core
        call: Call | None
        pickled: Any
        buffers: Any
        while (calls or not self._over) and (ended := core.finished(self._number, RESOLVE_MS)) is not None:
            for task, _, tag, nanos, pickled, buffers in ended:
                call = calls.get(task)
                if call is None:
                    continue
                try:
                    call.resolve(tag, nanos, pickled, buffers)
                except BaseException:
                    # Nobody is left to tell, and the other tasks must not suffer.
                    log.exception("a callback of task %d failed", task)
                # Not before: while it settles it may submit, and whoever waits for the last call waits for that too.
                del calls[task]
            # What was settled is its receiver's: nothing here keeps it while waiting.
            del ended
            call = pickled = buffers = None
            if not calls:
                self._pool._wake_leavers()
        self._close()

    def _close(self) -> None:
        self._pool._core.close_queue(self._number)
        del self._pool._lanes[self._number]
