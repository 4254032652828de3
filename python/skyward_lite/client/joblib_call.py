"""One call of `Parallel`, and its batches: what is in flight, what waits because of `n_jobs`, and how each ended."""

from __future__ import annotations

import collections
import functools
import operator
import queue
import threading
from collections.abc import Callable
from typing import Any, Final

from .. import _core
from ..errors import PoolClosedError
from ..pickling import payload
from ..pickling.handles import Calls
from ..pickling.pickler import Shared
from .completions import CompletionQueue
from .function_names import FunctionNames
from .joblib_batches import Parts
from .joblib_unread import Unread, Values
from .outcomes import outcome
from .tasks import Tasks

CALLBACK_SECONDS: Final = 1.0
"""Bound on waiting for one of joblib's callbacks at the end of a call."""


class ParallelCall:
    """What one call of `Parallel` has in flight. Batches of an aborted call stay its own and hinder no later call."""

    def __init__(self, cap: int, parallel: Any = None) -> None:
        self.cap = cap
        """Batches that may be at the workers at once; 0 for no cap."""
        self.queue: CompletionQueue | None = None
        """Where its batches' ends come out; opened with the first batch."""
        self.generation = 0
        """That of the user's modules with which its tasks run; set with the first batch."""
        self.names = FunctionNames()
        """The pool's; set with the first batch."""
        self.shared = Shared()
        """What its tasks have in common, pickled once. Dropped when the call has ended."""
        self.shared.waiting = self.waiting
        self.submitted = 0
        """Calls that joblib has submitted, in batches."""
        self.aborted = False
        self.left = False
        """Whether it was aborted because the pool's block was left before its input was exhausted."""
        self.over = False
        """Whether joblib has ended it. joblib is then told of no batch, which it would take for the next call's."""
        self._running: set[Batch] = set()
        self._held: collections.deque[Batch] = collections.deque()
        """Batches that wait because `cap` of them are at the workers."""
        self._held_calls = 0
        """The calls of all of these: a display asks for them several times a second, and there may be a million."""
        self._lock = threading.Lock()
        """Guards the three fields above, and `aborted`."""
        self._telling = threading.Lock()
        """Held while joblib is told how a batch ended."""
        self.last: Batch | None = None
        """The batch of which joblib was told last, until joblib asks how long it ran."""
        self._parallel = parallel
        is_generator = parallel is not None and parallel.return_generator
        # joblib 1.3 has ordered generators only.
        self._unread: Unread[Batch] | None = Unread(getattr(parallel, "return_ordered", True)) if is_generator else None
        """What a generator's consumer has not read; None for a call that returns a list."""
        self._consumer = threading.current_thread()
        """The thread that asked for results, or before that the one that will probably do so."""
        self._consumed = False
        """Whether a thread has asked for results."""

    def open(self, tasks: Tasks) -> None:
        """Open its completion queue, with the first batch: joblib ends only calls that have got so far."""
        if self.queue is None:
            self.names = tasks.names
            self.generation = tasks.begin_call()
            self.queue = tasks.open_queue(self.abandon, self._tell_due)
            self.queue.input = self

    def waiting(self) -> list[Calls]:
        """Return the calls of each batch that joblib has drawn from its input and that is not sent yet."""
        with self._lock:
            held = [getattr(batch.func, "items", None) for batch in self._held]
        return [calls for calls in [*held, *self._ready()] if calls is not None]

    def _ready(self) -> list[Calls]:
        """Return the calls of each batch that joblib holds; it holds few."""
        # joblib's own, and not part of its contract: without it, each batch's data is looked at by itself.
        ready = getattr(self._parallel, "_ready_batches", None)
        if not isinstance(ready, queue.Queue):
            return []
        with ready.mutex:
            return [batch.items for batch in ready.queue]

    def waiting_calls(self) -> int | None:
        """Return how many calls are still to be submitted; None if the input does not tell."""
        parallel = self._parallel
        rest = getattr(parallel, "_original_iterator", None)
        # joblib keeps no iterator for pre_dispatch="all". It has read all when the results are asked for.
        if rest is None and getattr(parallel, "pre_dispatch", None) == "all" and not self._consumed:
            return None
        # Lists and ranges tell how many are left, generators do not.
        left = 0 if rest is None or self.over or self.aborted else operator.length_hint(rest, -1)
        return None if left < 0 else left + self._held_calls + sum(map(len, self._ready()))

    def begin_retrieval(self) -> None:
        """Note that the calling thread asks for results."""
        self._consumed = True
        self._consumer = threading.current_thread()

    def tell(self, batch: Batch) -> None:
        """Call joblib back with a batch that has ended, at once or as soon as it is due."""
        if self._unread is None or batch.has_failed:
            self._tell(batch)
            return
        assert self.queue is not None
        self._unread.hold(batch)
        self.queue.held += 1
        self._tell_due()

    def _tell_due(self) -> None:
        """Call joblib back with the held batches that are due."""
        assert self._unread is not None
        assert self.queue is not None
        while (batch := self._unread.take_due()) is not None:
            try:
                self._tell(batch)
            finally:
                # Not before: joblib has dispatched the next batch by now, so that the queue was busy all the time.
                self.queue.held -= 1

    def _tell(self, batch: Batch) -> None:
        """Call joblib back. It dispatches the next batch meanwhile, on this thread."""
        with self._telling:
            if batch.callback is not None and not self.over:
                self.last = batch
                batch.callback(batch)

    def values(self, batch: Batch) -> list[Any]:
        """Return the values of a batch's calls, or raise what became of the batch. They can be read once."""
        values: list[Any] = batch.result()
        if self._unread is None:
            return values
        return Values(values, functools.partial(self._on_read, batch))

    def _on_read(self, batch: Batch) -> None:
        assert self._unread is not None
        if self._unread.read(batch):
            self._wake()

    def _hold_nothing(self) -> None:
        """Let joblib be told of all that has ended and will end."""
        if self._unread is not None:
            self._unread.release()
            self._wake()

    def _wake(self) -> None:
        if self.queue is not None:
            self.queue.wake()

    def stop(self) -> None:
        """End the call, and drop what later calls do not need.

        Waits for a callback that is running, but not for one that waits for the call's input.
        """
        self.over = True
        self.shared = Shared()
        self._hold_nothing()
        if self.queue is not None:
            self.queue.stop()
            if not self.queue.is_current() and self._telling.acquire(timeout=CALLBACK_SECONDS):
                self._telling.release()

    def abandon(self, leaving: set[threading.Thread]) -> bool:
        """Abort this call if its input is not exhausted and its consumer is gone. Return whether it was aborted.

        The consumer is gone if its thread is dead, or is one of `leaving`, which wait for the pool's block to end. A
        generator that nobody has started is left alone, because it may be read after the block.
        """
        parallel = self._parallel
        # A thread that leaves the block waits for the tasks and reads nothing meanwhile.
        self._hold_nothing()
        if self.over:
            return True
        if parallel is None or parallel._original_iterator is None:
            return False
        is_gone = self._consumer in leaving or not self._consumer.is_alive()
        if is_gone and (self._consumed or not parallel.return_generator):
            self.left = True
            self.abort()
        return self.left

    def abort(self) -> None:
        """Drop the batches that have not started, and end those that are running."""
        with self._lock:
            self.aborted = True
            self._held.clear()
            self._held_calls = 0
            running = list(self._running)
        self._hold_nothing()
        for batch in running:
            assert self.queue is not None
            self.queue.abort(batch.task)

    def begin(self, batch: Batch) -> bool:
        """Count a batch as running and return true, or hold it because of the cap and return false."""
        with self._lock:
            if self.cap and len(self._running) >= self.cap:
                self._held.append(batch)
                self._held_calls += batch.calls
                return False
            self._running.add(batch)
            return True

    def replace(self, batch: Batch, part: Batch) -> None:
        """Count a part as running in the place of its batch, which was not sent."""
        with self._lock:
            self._running.discard(batch)
            self._running.add(part)

    def end(self, batch: Batch) -> Batch | None:
        """Count a batch as ended. Return the held batch that may run in its place, counted as running."""
        with self._lock:
            self._running.discard(batch)
            if not self._held:
                return None
            following = self._held.popleft()
            self._held_calls -= following.calls
            self._running.add(following)
            return following


class Batch:
    """One batch of a `Parallel` call: joblib's job, and one task of the pool.

    `on_end(batch)` is called, on the thread of the call's completion queue, when the task has ended.
    """

    __slots__ = (
        *(
            "buffers",
            "call",
            "callback",
            "calls",
            "code",
            "error",
            "first",
            "func",
            "items",
            "name",
            "nanos",
            "on_end",
            "parts",
        ),
        *("pickled", "size", "task", "values", "whole"),
    )

    def __init__(
        self,
        call: ParallelCall,
        on_end: Callable[[Batch], None],
        func: Any,
        callback: Callable[[Batch], object] | None,
    ) -> None:
        self.call = call
        self.on_end = on_end
        self.func = func
        """joblib's batch, until it is sent."""
        self.callback = callback
        """joblib's, for a batch that joblib made; None for a part of one."""
        self.first = call.submitted
        """The place of its first call among those of the call of `Parallel`."""
        self.calls = 1
        """How many calls it has."""
        self.name = 0
        """The number of its first function's name; set when it is sent."""
        self.task = 0
        """The task's number; 0 before it is sent."""
        self.size = 0
        """Bytes of the payload that was sent, or of the result if that is larger."""
        self.code = _core.RETURNED
        """How the task ended, with its result in `pickled` and `buffers` until that is read."""
        self.nanos = 0
        self.pickled: Any = None
        self.buffers: Any = None
        self.error: BaseException | None = None
        """Why it could not be sent, or why one of its parts failed."""
        self.items: Any = None
        """The calls of an automatic batch that has several, until it has ended: they may be sent again."""
        self.whole: Batch | None = None
        """The batch of which this is a part; None for those that joblib made."""
        self.parts: Parts | None = None
        """What has become of the parts of a whole batch; set once the batch travels in parts."""
        self.values: list[Any] | None = None
        """The values of a whole batch that travelled in parts, until they are read."""

    def part(self, first: int, items: Any) -> Batch:
        """Return the calls `items` of this batch or part, from its call `first` on, as a task of its own."""
        part = Batch(self.call, self.on_end, None, None)
        part.whole, part.first, part.items = self.whole or self, self.first + first, items
        part.calls = len(items)
        return part

    def resolve(self, code: int, nanos: int, pickled: Any, buffers: Any) -> None:
        """Take the task's end."""
        self.code, self.nanos, self.pickled, self.buffers = code, nanos, pickled, buffers
        self.size = max(self.size, payload.size(pickled, buffers))
        self.on_end(self)

    @property
    def has_failed(self) -> bool:
        """Whether joblib gets an exception instead of values."""
        return self.error is not None or self.code not in (_core.RETURNED, _core.PARTIAL)

    def result(self) -> Any:
        """Return the values of the batch's calls, or raise what became of the batch. They can be read once."""
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
        about = self.call.names, self.name, self.first, self.calls
        try:
            return outcome(_core.RETURNED if self.code == _core.PARTIAL else self.code, pickled, buffers, about)
        except Exception as error:
            if self.call.queue is not None:
                self.call.queue.failures.add(error)
            raise
