"""joblib's backend contract on a `ComputePool`.

    Parallel  →  submit(batch, callback)  →  ComputePool  →  resolve  →  callback(call)  →  retrieve_result_callback

`submit` runs under joblib's lock and never waits. The callback runs on a thread of the call's own, its lane's; it
retrieves the result and dispatches the next batch from there, for which it reads the call's input.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import pickle
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from joblib import parallel_config, register_parallel_backend
from joblib.parallel import AutoBatchingMixin, FallbackToBackend, ParallelBackendBase, SequentialBackend

from .. import _core, checks
from ..errors import PayloadTooLargeError, PoolClosedError, SkywardError
from ..node.batch import NAME
from ..pickling import payload
from ..pickling.pickler import Shared
from . import joblib_batches as batches
from .completions import CompletionQueue
from .pool import ComputePool, outcome

log = logging.getLogger("skyward_lite")

CALLBACK = 1.0
"""Bound on waiting for one of joblib's callbacks at the end of a call."""
SPARE = 4
"""Automatic batches keep to this fraction of the largest payload: later tasks may be larger than those before."""

_open: list[ComputePool] = []
"""The pools whose block is entered, innermost last.

`backend="skyward"` means the last one that the calling thread entered, or the last of all if it entered none.
"""

_said: weakref.WeakKeyDictionary[ComputePool, set[str]] = weakref.WeakKeyDictionary()
"""What the log has been told of each pool."""


def _say_once(pool: ComputePool, text: str) -> None:
    said = _said.setdefault(pool, set())
    if text not in said:
        said.add(text)
        log.info(text)


class _NoSharedMemory:
    """False, as the backend's `supports_sharedmem`. joblib asks for its truth only where a call requires it."""

    def __init__(self, pool: ComputePool) -> None:
        self.pool = pool

    def __bool__(self) -> bool:
        _say_once(self.pool, 'Parallel(require="sharedmem") runs in threads of this process: joblib\'s choice')
        return False


class _Call:
    """What one call of `Parallel` has in flight. Batches of an aborted call stay its own and hinder no later one."""

    def __init__(self, cap: int, parallel: Any = None) -> None:
        self.cap = cap
        """Batches that may be at the workers at once; 0 for no cap."""
        self.running: set[_Batch] = set()
        self.held: collections.deque[_Batch] = collections.deque()
        self.shared = Shared()
        self.submitted = 0
        """Calls that joblib has submitted, in batches."""
        self.aborted = False
        self.left = False
        """It was aborted because the pool's block was left."""
        self._begun = False
        self.over = False
        """joblib has ended it: of what comes now it is not told, as it would take that for the next call's."""
        self.lock = threading.Lock()
        self._telling = threading.Lock()
        self._parallel = parallel
        self._thread = threading.current_thread()
        """The one that asked for results, or before that the one that will probably do so."""
        self.lane: CompletionQueue | None = None

    def open(self, pool: ComputePool) -> None:
        """Open its lane, if it has none, with the first batch: joblib ends only calls that have got so far."""
        if self.lane is None:
            self.lane = pool._open_queue(self.abandon)

    def begin_retrieval(self) -> None:
        """Note that the calling thread asks for results."""
        self._begun = True
        self._thread = threading.current_thread()

    def tell(self, batch: _Batch) -> None:
        """Tell joblib how a batch ended. It dispatches the next one meanwhile."""
        with self._telling:
            if batch.callback is not None and not self.over:
                batch.callback(batch)

    def stop(self) -> None:
        """Let go of what later calls do not need, and of joblib.

        A callback that is running is waited for, but not one that waits for the input.
        """
        self.over = True
        self.shared = Shared()
        if self.lane is not None:
            self.lane.stop()
            if not self.lane.is_current() and self._telling.acquire(timeout=CALLBACK):
                self._telling.release()

    def abandon(self, leaving: set[threading.Thread]) -> bool:
        """End a call that takes more input if its thread cannot ask for results before these have left; true if ended.

        A generator that was not begun is not ended: it may be what comes after the block.
        """
        parallel = self._parallel
        if self.over:
            return True
        if parallel is None or parallel._original_iterator is None:
            return False
        alone = self._thread in leaving or not self._thread.is_alive()
        if alone and (self._begun or not parallel.return_generator):
            self.left = True
            self.abort()
        return self.left

    def abort(self) -> None:
        """Drop what has not started and end what is running."""
        with self.lock:
            self.aborted = True
            self.held.clear()
            running = list(self.running)
        for batch in running:
            assert self.lane is not None
            self.lane.abort(batch.task)

    def begin(self, batch: _Batch) -> bool:
        """Count a batch as running; false if it is held because of the cap."""
        with self.lock:
            if self.cap and len(self.running) >= self.cap:
                self.held.append(batch)
                return False
            self.running.add(batch)
            return True

    def replace(self, batch: _Batch, part: _Batch) -> None:
        """Count a part as running in the place of its batch, which was not sent."""
        with self.lock:
            self.running.discard(batch)
            self.running.add(part)

    def end(self, batch: _Batch) -> _Batch | None:
        """Count a batch as ended, and the held one that may run in its place as running."""
        with self.lock:
            self.running.discard(batch)
            if not self.held:
                return None
            following = self.held.popleft()
            self.running.add(following)
            return following


class _Batch:
    """One batch of a `Parallel` call: joblib's job, and the pool's call."""

    __slots__ = (
        *("backend", "buffers", "call", "callback", "error", "first", "func", "pickled", "items", "nanos", "parts"),
        *("size", "tag", "task", "values", "whole"),
    )

    def __init__(self, backend: SkywardBackend, func: Any, callback: Callable[[_Batch], object] | None) -> None:
        self.backend = backend
        self.call = backend.call
        self.func = func
        self.callback = callback
        self.first = self.call.submitted
        """The place of its first call among those of the call of `Parallel`."""
        self.task = 0
        self.size = 0
        """Bytes of the payload that was sent, or of the result if that is larger."""
        self.tag = _core.RETURNED
        self.nanos = 0
        self.pickled: Any = None
        self.buffers: Any = None
        self.error: BaseException | None = None
        self.items: Any = None
        """The calls of an automatic batch that has several, until it has ended: they may be sent again."""
        self.whole: _Batch | None = None
        """The batch of which this is a part; None for those that joblib made."""
        self.parts: batches.Parts | None = None
        """The whole batch's, once it travels in parts."""
        self.values: list[Any] | None = None
        """The values of a whole batch that travelled in parts."""

    def part(self, first: int, items: Any) -> _Batch:
        """Return a part of this batch, or of this part, as a task of its own."""
        part = _Batch(self.backend, None, None)
        part.call, part.whole, part.first, part.items = self.call, self.whole or self, self.first + first, items
        return part

    def resolve(self, tag: int, nanos: int, pickled: Any, buffers: Any) -> None:
        self.tag, self.nanos, self.pickled, self.buffers = tag, nanos, pickled, buffers
        self.size = max(self.size, payload.size(pickled, buffers))
        self.backend.settled(self)

    def result(self) -> Any:
        if self.call.left:
            raise PoolClosedError(
                "the block of the pool was left before this call of Parallel had read its whole input: finish its "
                "generator or close it inside the block"
            )
        if self.error is not None:
            raise self.error
        if self.values is not None:
            values, self.values = self.values, None
            return values
        pickled, buffers = self.pickled, self.buffers
        self.pickled = self.buffers = None
        return outcome(_core.RETURNED if self.tag == _core.PARTIAL else self.tag, pickled, buffers, self.first)


class SkywardBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs joblib's batches on the workers of a pool. Made by joblib, from the registered name "skyward".

    joblib keeps one instance for all `Parallel` objects of a block. Each gets one of its own in `configure`, by the
    same way as joblib's own backends fall back to another one: what one call aborts, batches or caps is its own.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True
    default_n_jobs = -1

    # joblib's own values (0.2 s and 2 s) pay for a process pool's overhead. Ours is some 50 µs a batch, so batches
    # stay short and the last ones do not leave the other workers idle.
    MIN_IDEAL_BATCH_DURATION = 0.002
    MAX_IDEAL_BATCH_DURATION = 0.02

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        pool: ComputePool | None = None,
    ) -> None:
        # A level of None is replaced by joblib, with that of the backend around.
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        self.pool = _innermost() if pool is None else pool
        self.supports_sharedmem = _NoSharedMemory(self.pool)
        self.parallel: Any = None
        self.call = _Call(0)
        self._last: _Batch | None = None
        self._heaviest = 0.0
        """Bytes per task of the heaviest batch so far."""

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Give the number of workers that `n_jobs` means: -1 all, -2 all but one, n at most n."""
        workers = self._wanted(n_jobs)
        # For joblib 1 means "run it here". What is really in flight is capped in `submit`.
        return 1 if n_jobs == 1 else max(2, workers)

    def _wanted(self, n_jobs: int | None) -> int:
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        self.pool._check_open()
        # Nodes that join later are used by a running call, so they count now.
        slots = self.pool._wanted_slots()
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
        """Prepare for a call of `Parallel`. What it says of memory maps and local processes means nothing here."""
        if self.parallel is not parallel:
            own = type(self)(self.nesting_level, self.inner_max_num_threads, self.pool)
            own.parallel = parallel
            raise FallbackToBackend(own)
        if initializer is not None:
            raise TypeError(
                "the skyward backend takes no initializer: its workers run before the call. What each of them is to do "
                "first is a plugin's: sky.Plugin(name, around_worker=...)"
            )
        workers = self._wanted(n_jobs)
        if n_jobs == 1:
            _say_once(self.pool, "Parallel(n_jobs=1) runs in this process, one task after the other: joblib's choice")
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        if inner_max_num_threads is not None:
            self.inner_max_num_threads: int | None = inner_max_num_threads
        if self.inner_max_num_threads is not None:
            inner, most = self.inner_max_num_threads, checks.MAX_CONCURRENCY
            checks.whole("Parallel", "inner_max_num_threads", inner, 1, most, "None for the cores divided by the slots")
        self.call = _Call(0 if workers >= self.pool._wanted_slots() else workers)
        rtt = max((node.rtt or 0.0 for node in self.pool.nodes()), default=0.0)
        # A batch should last for the way there and back, so that the next one is there when it ends.
        self.MIN_IDEAL_BATCH_DURATION = max(type(self).MIN_IDEAL_BATCH_DURATION, 1.5 * rtt)
        self.MAX_IDEAL_BATCH_DURATION = 10 * self.MIN_IDEAL_BATCH_DURATION
        return self.effective_n_jobs(n_jobs)

    def start_call(self) -> None:
        """Begin anew: inside `with Parallel()` several calls follow one `configure`."""
        self.call = _Call(self.call.cap, self.parallel)
        # joblib lets the next call run what an aborted one had not dispatched, and mixes its values into the results
        # (with its own backends, too).
        self.parallel._ready_batches = queue.Queue()

    def stop_call(self) -> None:
        """Let go of what the call's tasks shared, and of its thread."""
        self.call.stop()

    def terminate(self) -> None:
        """Forget the size of batches: the next call's tasks are others. The pool stays open."""
        self.reset_batch_stats()
        self._heaviest = 0.0

    def submit(self, func: Any, callback: Callable[[Any], object] | None = None) -> _Batch:
        """Send a batch, or hold it while `n_jobs` of this call are in flight. Never waits.

        Raises `PoolClosedError` if the pool has no thread left to tell joblib the outcome.
        """
        batch = _Batch(self, func, callback)
        batch.call.submitted += len(getattr(func, "items", "1"))
        batch.call.open(self.pool)
        if batch.call.begin(batch):
            self._send(batch)
        return batch

    apply_async = submit  # joblib < 1.5

    def _send(self, batch: _Batch) -> None:
        pool, lane = self.pool, batch.call.lane
        assert lane is not None
        func, batch.func = batch.func, None
        try:
            # The worker has its own nested backend: of joblib's batch only the calls travel.
            items = getattr(func, "items", batch.items)
            if items is None:
                kind = payload.CALL
                pickled, buffers = pool._encode(func, (), {})
            else:
                kind = payload.BATCH
                limit = None
                if len(items) > 1 and self.parallel.batch_size == "auto":
                    batch.items = items
                    limit = int(batches.PATIENCE * self.MAX_IDEAL_BATCH_DURATION * 1e9)
                pickled, buffers = pool._encode_batch(items, batch.call.shared, self.inner_max_num_threads, limit)
            batch.size = payload.size(pickled, buffers)
        except BaseException as error:
            if isinstance(error, PayloadTooLargeError) and batch.items is not None and len(batch.items) > 1:
                # The next batches are to be smaller.
                self._heaviest = max(self._heaviest, pool.worker.max_payload / len(batch.items))
                self._send_parts(batch, batches.halves(batch.items))
                return
            # joblib hangs if this is raised on the lane's thread, so it takes the way of a result.
            batch.error = _unsendable(error)
            lane.end(batch)
        else:
            batch.task = lane.send(batch, kind, pickled, buffers, None, 1 if items is None else len(items))
            if batch.call.aborted:
                # While it was pickled; whoever aborted found no task yet.
                lane.abort(batch.task)

    def settled(self, batch: _Batch) -> None:
        """Let the next held batch go, then tell joblib."""
        following = batch.call.end(batch)
        if following is not None:
            self._send(following)
        if batch.whole is not None or batch.tag == _core.PARTIAL:
            if not self._joined(batch):
                return
            batch = batch.whole or batch
        batch.items = None
        self._last = batch
        batch.call.tell(batch)

    def _send_parts(self, batch: _Batch, parts: Iterable[tuple[int, Any]]) -> None:
        """Send the calls of a batch that does not run itself, in parts: each counts as a batch for `n_jobs`."""
        whole = batch.whole or batch
        if whole.parts is None:
            whole.parts = batches.Parts(len(whole.items))
        made = [batch.part(*part) for part in parts]
        batch.items = None
        call, first = batch.call, made[0]
        call.replace(batch, first)
        self._send(first)
        for part in made[1:]:
            if call.begin(part):
                self._send(part)

    def _joined(self, part: _Batch) -> bool:
        """Take the end of a part; true if that is the end of its batch. The calls that it gave back are sent again."""
        whole, items = part.whole or part, part.items
        if whole.parts is None:
            whole.parts = batches.Parts(len(items))
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
            # The next batches are made for tasks that take as long.
            self.reset_batch_stats()
            slots = part.call.cap or self.pool._wanted_slots()
            seconds, ideal = part.nanos / 1e9, self.MIN_IDEAL_BATCH_DURATION
            for first, rest in batches.pieces(items, len(values), seconds, ideal, slots):
                following = part.part(first, rest)
                if part.call.begin(following):
                    self._send(following)
        part.items = None
        return whole.parts.over

    def retrieve_result_callback(self, out: _Batch) -> Any:
        """Give the batch's list of values, or raise."""
        return out.result()

    def batch_completed(self, batch_size: int, duration: float) -> None:
        """Tell the auto-batching how long a batch ran on its worker; joblib's own number includes every queue."""
        last, self._last = self._last, None
        if last is not None:
            super().batch_completed(batch_size, last.nanos / 1e9)
            self._heaviest = max(self._heaviest, last.size / batch_size)

    def compute_batch_size(self) -> int:
        """Give the number of tasks for the next batch: so that it takes some time, and stays far from `max_payload`."""
        size: int = super().compute_batch_size()
        if size * self._heaviest > self.pool.worker.max_payload / SPARE:
            size = self._effective_batch_size = max(1, int(self.pool.worker.max_payload / SPARE / self._heaviest))
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


def _unsendable(error: BaseException) -> BaseException:
    """Give what a call raises whose batch cannot be pickled: as with loky, a PicklingError with the reason as cause."""
    if isinstance(error, (SkywardError, pickle.PicklingError)) or not isinstance(error, Exception):
        return error
    why = pickle.PicklingError(f"Could not pickle the task to send to the workers: {type(error).__name__}: {error}")
    why.__cause__ = error
    return why


def _innermost() -> ComputePool:
    if not _open:
        raise PoolClosedError(f'backend="{NAME}" needs an open pool: call Parallel inside `with sky.pool(...):`')
    mine = (pool for pool in reversed(_open) if pool._entered is threading.current_thread())
    return next(mine, _open[-1])


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
