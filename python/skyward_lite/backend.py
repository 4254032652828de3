"""joblib's backend contract on a `ComputePool`.

    Parallel  →  submit(batch, callback)  →  ComputePool  →  settle  →  callback(call)  →  retrieve_result_callback

`submit` runs under joblib's lock and never waits. The callback runs on the pool's settling thread; it retrieves the
result and dispatches the next batch from there.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from joblib import parallel_config, register_parallel_backend
from joblib.parallel import AutoBatchingMixin, ParallelBackendBase, SequentialBackend

from . import payload
from .compute_pool import ComputePool, outcome
from .errors import PoolClosedError

log = logging.getLogger("skyward_lite")

NAME = "skyward"
"""The backend's registered name."""

_open: list[ComputePool] = []
"""The pools whose block is entered, innermost last: `backend="skyward"` means that one."""


class _Batch:
    """One batch of a `Parallel` call: joblib's job, and the pool's call."""

    __slots__ = ("backend", "buffers", "callback", "error", "func", "head", "nanos", "tag", "task")

    def __init__(self, backend: SkywardBackend, func: Any, callback: Callable[[_Batch], object] | None) -> None:
        self.backend = backend
        self.func = func
        self.callback = callback
        self.task = 0
        self.tag = payload.RETURNED
        self.nanos = 0
        self.head: Any = None
        self.buffers: Any = None
        self.error: BaseException | None = None

    def settle(self, tag: int, nanos: int, head: Any, buffers: Any) -> None:
        self.tag, self.nanos, self.head, self.buffers = tag, nanos, head, buffers
        self.backend.settled(self)

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        head, buffers = self.head, self.buffers
        self.head = self.buffers = None
        return outcome(self.tag, head, buffers)


class SkywardBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs joblib's batches on the workers of a pool. Made by joblib, from the registered name "skyward"."""

    supports_retrieve_callback = True
    default_n_jobs = -1

    # joblib's own values (0.2 s and 2 s) pay for a process pool's overhead. Ours is some 50 µs a batch, so batches
    # stay short and the last ones do not leave the other workers idle.
    MIN_IDEAL_BATCH_DURATION = 0.002
    MAX_IDEAL_BATCH_DURATION = 0.02

    def __init__(self, nesting_level: int | None = 0, inner_max_num_threads: int | None = None) -> None:
        super().__init__(nesting_level=nesting_level or 0, inner_max_num_threads=inner_max_num_threads)
        self.pool = _innermost()
        self._cap = 0
        self._running: set[_Batch] = set()
        self._held: collections.deque[_Batch] = collections.deque()
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._functions: payload.Functions = {}

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Give the number of workers that `n_jobs` means: -1 all, -2 all but one, n at most n."""
        workers = self._workers(n_jobs)
        # For joblib 1 means "run it here". What is really in flight is capped in `submit`.
        return 1 if n_jobs == 1 else max(2, workers)

    def _workers(self, n_jobs: int | None) -> int:
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if self.pool._state == "closed":
            raise PoolClosedError("the pool of this Parallel is closed")
        slots = self.pool.slots()
        if n_jobs is None:
            return slots
        return max(1, slots + 1 + n_jobs) if n_jobs < 0 else min(n_jobs, slots)

    def configure(self, n_jobs: int | None = 1, parallel: Any = None, **kwargs: Any) -> int:
        """Prepare for a call of `Parallel`."""
        self.parallel = parallel
        workers = self._workers(n_jobs)
        self._cap = 0 if workers >= self.pool.slots() else workers
        rtt = max((node.rtt or 0.0 for node in self.pool.nodes()), default=0.0)
        # A batch should last for the way there and back, so that the next one is there when it ends.
        self.MIN_IDEAL_BATCH_DURATION = max(type(self).MIN_IDEAL_BATCH_DURATION, 1.5 * rtt)
        self.MAX_IDEAL_BATCH_DURATION = 10 * self.MIN_IDEAL_BATCH_DURATION
        return self.effective_n_jobs(n_jobs)

    def submit(self, func: Any, callback: Callable[[Any], object] | None = None) -> _Batch:
        """Send a batch, or hold it while `n_jobs` of this call are in flight. Never waits, never raises."""
        batch = _Batch(self, func, callback)
        with self._lock:
            if self._cap and len(self._running) >= self._cap:
                self._held.append(batch)
                return batch
            self._running.add(batch)
        self._send(batch)
        return batch

    apply_async = submit  # joblib < 1.5

    def start_call(self) -> None:
        """Forget the functions of the call before."""
        self._functions = {}

    def _send(self, batch: _Batch) -> None:
        pool = self.pool
        func, batch.func = batch.func, None
        try:
            # The worker has its own nested backend: of joblib's batch only the calls travel.
            items = getattr(func, "items", None)
            if items is None:
                kind = payload.CALL
                head, buffers = pool._encode((func, (), {}))
            else:
                kind = payload.BATCH
                functions = self._functions
                for function, _, _ in items:
                    if id(function) not in functions:
                        pool._encoder().learn(function, functions)
                head, buffers = pool._encode(items, functions)
        except BaseException as error:
            # joblib hangs if this is raised on the settling thread, so it takes the way of a result. Raises itself
            # if the pool is closed, when no settling thread is left.
            batch.error = error
            pool._end(batch)
        else:
            batch.task = pool._send(batch, kind, head, buffers)

    def settled(self, batch: _Batch) -> None:
        """Let the next held batch go, then tell joblib."""
        with self._lock:
            self._running.discard(batch)
            following = self._held.popleft() if self._held else None
            if following is not None:
                self._running.add(following)
        if following is not None:
            self._send(following)
        self._seconds = batch.nanos / 1e9
        if batch.callback is not None:
            batch.callback(batch)

    def retrieve_result_callback(self, out: _Batch) -> Any:
        """Give the batch's list of values, or raise."""
        return out.result()

    def batch_completed(self, batch_size: int, duration: float) -> None:
        """Tell the auto-batching how long a batch ran on its worker; joblib's own number includes every queue."""
        super().batch_completed(batch_size, self._seconds)

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Drop what has not started. Idempotent, from any thread."""
        with self._lock:
            self._held.clear()
            running = list(self._running)
        for batch in running:
            self.pool._cancel(batch.task)

    def get_nested_backend(self) -> tuple[ParallelBackendBase, int | None]:
        """Nested calls run sequentially in the worker."""
        return SequentialBackend(nesting_level=(self.nesting_level or 0) + 1), None


def _innermost() -> ComputePool:
    if not _open:
        raise PoolClosedError(f'backend="{NAME}" needs an open pool: call Parallel inside `with sky.pool(...):`')
    return _open[-1]


@contextlib.contextmanager
def around_client(pool: ComputePool) -> Iterator[None]:
    """Make `pool` joblib's default backend on this thread for the length of the block."""
    register_parallel_backend(NAME, SkywardBackend)
    _open.append(pool)
    try:
        with parallel_config(backend=NAME):
            yield
    finally:
        _open.remove(pool)
