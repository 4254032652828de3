"""joblib's backend contract on a pool.

    Parallel  →  submit(batch, callback)  →  Tasks  →  resolve  →  callback(batch)  →  retrieve_result_callback

`submit` runs under joblib's lock and never waits. The callback runs on the thread of the call's own completion queue;
it retrieves the result and dispatches the next batch from there, for which it reads the call's input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pickle
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from queue import Queue
from typing import Any, Final

from joblib import parallel_config, register_parallel_backend
from joblib.parallel import AutoBatchingMixin, FallbackToBackend, ParallelBackendBase, SequentialBackend

from .. import _core, checks
from ..errors import PayloadTooLargeError, PoolClosedError, SkywardError
from ..pickling import payload
from . import folding, joblib_batches
from .joblib_call import Batch, ParallelCall
from .tasks import Tasks

log = logging.getLogger("skyward_lite")

NAME: Final = payload.BACKEND_NAME
PAYLOAD_SHARE: Final = 4
"""Automatic batches are made for at most 1/4 of the largest payload: later tasks may be larger than those before."""


@dataclasses.dataclass(eq=False)
class _Entered:
    pool: Executor
    thread: threading.Thread
    """The one that entered the pool's block."""
    config: Any = None
    """joblib's configuration of that thread inside the block."""


_entered: list[_Entered] = []
"""The pools whose block is entered, innermost last.

`backend="skyward"` means the last one that the calling thread entered, or the last of all if it entered none.
"""

_logged: weakref.WeakKeyDictionary[Executor, set[str]] = weakref.WeakKeyDictionary()
"""The messages that the log has for each pool already."""


def _log_once(pool: Executor, message: str) -> None:
    logged = _logged.setdefault(pool, set())
    if message not in logged:
        logged.add(message)
        log.info(message)


class _NoSharedMemory:
    """False, as the backend's `supports_sharedmem`. joblib tests it only for calls that require shared memory."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool

    def __bool__(self) -> bool:
        _log_once(self._pool, 'Parallel(require="sharedmem") runs in threads of this process: joblib\'s choice')
        return False


class SkywardBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs joblib's batches on the workers of a pool. Made by joblib, from the registered name "skyward".

    joblib has one instance for all `Parallel` objects of a block. In `configure` each object gets an instance of its
    own, in the way in which joblib's backends fall back to another one: no call aborts or caps another call's batches.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True
    default_n_jobs = -1

    # In seconds. joblib's own values (0.2 and 2) pay for the overhead of its process pool. Here a batch costs about
    # 50 µs, so batches can be short, and while the last ones run few workers are idle.
    MIN_IDEAL_BATCH_DURATION = 0.002
    MAX_IDEAL_BATCH_DURATION = 0.02

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        pool: Executor | None = None,
    ) -> None:
        # joblib replaces a level of None with the level of the backend around this one.
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        self.pool = _innermost() if pool is None else pool
        self.tasks = Tasks.of(self.pool)
        self.supports_sharedmem = _NoSharedMemory(self.pool)
        self.parallel: Any = None
        self.call = ParallelCall(0)
        self._heaviest = 0.0
        """Bytes per task of the heaviest batch so far."""

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return the number of workers that `n_jobs` means: -1 all, -2 all but one, n at most n."""
        workers = self._wanted(n_jobs)
        # For joblib 1 means "run it here". How many batches are in flight is capped in `submit`.
        return 1 if n_jobs == 1 else max(2, workers)

    def _wanted(self, n_jobs: int | None) -> int:
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        self.tasks.check_not_closed()
        # A running call also uses nodes that become ready meanwhile, so their slots count now.
        slots = self.tasks.nodes.wanted_slots()
        if n_jobs is None:
            return slots
        return max(1, slots + 1 + n_jobs) if n_jobs < 0 else min(n_jobs, slots)

    def configure(
        self,
        n_jobs: int | None = 1,
        parallel: Any = None,
        inner_max_num_threads: int | None = None,
        initializer: object = None,
        **kwargs: Any,
    ) -> int:
        """Prepare for a call of `Parallel`. Its parameters for memory maps and local processes mean nothing here."""
        if self.parallel is not parallel:
            own = type(self)(self.nesting_level, self.inner_max_num_threads, self.pool)
            own.parallel = parallel
            raise FallbackToBackend(own)
        if initializer is not None:
            raise TypeError(
                "the skyward backend takes no initializer: its workers run before the call. A plugin can initialize "
                "each of them: sky.Plugin(name, around_worker=...)"
            )
        workers = self._wanted(n_jobs)
        if n_jobs == 1:
            _log_once(self.pool, "Parallel(n_jobs=1) runs in this process, one task after the other: joblib's choice")
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        if inner_max_num_threads is not None:
            self.inner_max_num_threads: int | None = inner_max_num_threads
        if self.inner_max_num_threads is not None:
            inner, most = self.inner_max_num_threads, checks.MAX_CONCURRENCY
            checks.whole("Parallel", "inner_max_num_threads", inner, 1, most, "None for the cores divided by the slots")
        self.call = ParallelCall(0 if workers >= self.tasks.nodes.wanted_slots() else workers)
        rtt = max((node.rtt or 0.0 for node in self.tasks.nodes.snapshot()), default=0.0)
        # A batch should run for a round trip and a half, so that the worker has the next one when it ends.
        self.MIN_IDEAL_BATCH_DURATION = max(type(self).MIN_IDEAL_BATCH_DURATION, 1.5 * rtt)
        self.MAX_IDEAL_BATCH_DURATION = 10 * self.MIN_IDEAL_BATCH_DURATION
        return self.effective_n_jobs(n_jobs)

    def start_call(self) -> None:
        """Begin a call: inside `with Parallel()` several calls follow one `configure`."""
        self.call = ParallelCall(self.call.cap, self.parallel)
        # joblib would run in this call what an aborted call had not dispatched, and mix its values into the results. It
        # does so with its own backends, too.
        self.parallel._ready_batches = Queue()

    def stop_call(self) -> None:
        """Drop what the call's tasks shared, and end its thread."""
        self.call.stop()

    def terminate(self) -> None:
        """Reset the size of batches: the next call's tasks are others. The pool stays open."""
        self.reset_batch_stats()
        self._heaviest = 0.0

    def submit(self, func: Any, callback: Callable[[Any], object] | None = None) -> Batch:
        """Send a batch, or hold it while `n_jobs` of this call are in flight. Never waits.

        Raises `PoolClosedError` if the pool has no thread left to tell joblib the outcome.
        """
        call = self.call
        batch = Batch(call, self.batch_ended, func, callback)
        batch.calls = len(getattr(func, "items", "1"))
        call.submitted += batch.calls
        call.open(self.tasks)
        if call.begin(batch):
            self._send(batch)
        return batch

    apply_async = submit  # joblib < 1.5

    def _send(self, batch: Batch) -> None:
        tasks, queue, generation = self.tasks, batch.call.queue, batch.call.generation
        assert queue is not None
        func, batch.func = batch.func, None
        try:
            # Only the calls of joblib's batch travel, not its nested backend: the worker has its own.
            items = getattr(func, "items", batch.items)
            batch.name = name = tasks.names.number(items[0][0] if items else func)
            if items is None:
                kind = payload.CALL
                pickled, buffers = tasks.encode(generation, func, (), {})
            else:
                kind = payload.BATCH
                limit = None
                if len(items) > 1 and self.parallel.batch_size == "auto":
                    batch.items = items
                    limit = int(joblib_batches.PATIENCE * self.MAX_IDEAL_BATCH_DURATION * 1e9)
                pickled, buffers = tasks.encode_batch(
                    generation, items, batch.call.shared, self.inner_max_num_threads, limit
                )
            batch.size = payload.size(pickled, buffers)
        except BaseException as error:
            if isinstance(error, PayloadTooLargeError) and batch.items is not None and len(batch.items) > 1:
                # So that `compute_batch_size` makes smaller batches from now on.
                self._heaviest = max(self._heaviest, tasks.max_payload / len(batch.items))
                self._send_parts(batch, joblib_batches.halves(batch.items))
                return
            # joblib would hang if this were raised on the queue's thread, so the error takes the way of a result.
            batch.error = _unsendable(error, items)
            queue.end(batch)
        else:
            calls = 1 if items is None else len(items)
            batch.task = queue.send(batch, kind, pickled, buffers, generation, name, None, calls)
            if batch.call.aborted:
                # The call was aborted while this batch was pickled, and `ParallelCall.abort` found no task yet.
                queue.abort(batch.task)

    def batch_ended(self, batch: Batch) -> None:
        """Send the next held batch, then tell joblib."""
        following = batch.call.end(batch)
        if following is not None:
            self._send(following)
        if batch.whole is not None or batch.code == _core.PARTIAL:
            if not self._join_part(batch):
                return
            batch = batch.whole or batch
        batch.items = None
        batch.call.tell(batch)

    def _send_parts(self, batch: Batch, parts: Iterable[tuple[int, Any]]) -> None:
        """Send the calls of a batch that does not run itself, in parts: each counts as a batch for `n_jobs`."""
        whole = batch.whole or batch
        if whole.parts is None:
            whole.parts = joblib_batches.Parts(len(whole.items))
        made = [batch.part(*part) for part in parts]
        batch.items = None
        call, first = batch.call, made[0]
        call.replace(batch, first)
        self._send(first)
        for part in made[1:]:
            if call.begin(part):
                self._send(part)

    def _join_part(self, part: Batch) -> bool:
        """Take the end of a part, and send the calls again that it gave back. Return whether its batch has ended."""
        whole, items = part.whole or part, part.items
        if whole.parts is None:
            whole.parts = joblib_batches.Parts(len(items))
        if whole.parts.over:
            return False
        try:
            values = part.result()
        except BaseException as error:
            whole.parts.over = True
            whole.error = error
            return True
        if part is not whole:
            whole.nanos += part.nanos
            whole.size += part.size
        whole.parts.add(part.first, values)
        if whole.parts.over:
            whole.values = whole.parts.take()
        elif len(values) < len(items):
            # Measure anew: the next batches must be made for tasks that take as long as these.
            self.reset_batch_stats()
            slots = part.call.cap or self.tasks.nodes.wanted_slots()
            seconds, ideal = part.nanos / 1e9, self.MIN_IDEAL_BATCH_DURATION
            for first, rest in joblib_batches.pieces(items, len(values), seconds, ideal, slots):
                following = part.part(first, rest)
                if part.call.begin(following):
                    self._send(following)
        part.items = None
        return whole.parts.over

    def retrieve_result_callback(self, out: Batch) -> Any:
        """Return the batch's list of values, or raise."""
        return out.call.values(out)

    def batch_completed(self, batch_size: int, duration: float) -> None:
        """Take the time that a batch ran on its worker as its duration: joblib's own number includes every queue."""
        last, self.call.last = self.call.last, None
        if last is not None:
            super().batch_completed(batch_size, last.nanos / 1e9)
            self._heaviest = max(self._heaviest, last.size / batch_size)

    def compute_batch_size(self) -> int:
        """Return the number of tasks for the next batch: it should run long enough and stay far below `max_payload`."""
        size: int = super().compute_batch_size()
        if size * self._heaviest > self.tasks.max_payload / PAYLOAD_SHARE:
            size = self._effective_batch_size = max(1, int(self.tasks.max_payload / PAYLOAD_SHARE / self._heaviest))
        return size

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Drop what has not started and end what is running. Returns at once; idempotent, from any thread."""
        self.call.abort()

    @contextlib.contextmanager
    def retrieval_context(self) -> Iterator[None]:
        """Note that the call's results are asked for."""
        self.call.begin_retrieval()
        with super().retrieval_context():
            yield

    def get_nested_backend(self) -> tuple[ParallelBackendBase, int | None]:
        """Nested calls run sequentially in the worker."""
        return SequentialBackend(nesting_level=(self.nesting_level or 0) + 1), None


def _unsendable(error: BaseException, items: Any) -> BaseException:
    """Return what a call raises whose batch cannot be pickled: as with loky, a PicklingError with its cause."""
    wrong = joblib_batches.not_a_call(items)
    if wrong is not None:
        return TypeError(wrong)
    if isinstance(error, (SkywardError, pickle.PicklingError)) or not isinstance(error, Exception):
        return error
    why = pickle.PicklingError(f"Could not pickle the task to send to the workers: {type(error).__name__}: {error}")
    why.__cause__ = error
    return why


def _innermost() -> Executor:
    if not _entered:
        folding.install()
        raise PoolClosedError(
            f'backend="{NAME}" needs an open pool: call Parallel inside `with sky.pool(...):`, or after `pool.start()`'
        )
    own = (entry.pool for entry in reversed(_entered) if entry.thread is threading.current_thread())
    return next(own, _entered[-1].pool)


@contextlib.contextmanager
def as_default_backend(pool: Executor) -> Iterator[None]:
    """Make `pool` joblib's default backend on this thread for the length of the block."""
    register_parallel_backend(NAME, SkywardBackend)
    entry = _Entered(pool, threading.current_thread())
    _entered.append(entry)
    try:
        entry.config = parallel_config(backend=NAME)
        yield
    finally:
        _entered.remove(entry)
        if entry.config is not None:
            _undo(entry)


def _undo(entry: _Entered) -> None:
    """Undo the configuration of a pool, also below that of a pool which was opened later by `start` and is open."""
    for later in _entered:
        if later.config is not None and later.config.old_parallel_config is entry.config.parallel_config:
            later.config.old_parallel_config = entry.config.old_parallel_config
            return
    entry.config.unregister()
