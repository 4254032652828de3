"""A call becomes a task, and the task's end becomes a value or an error.

                 any thread                                   one thread per completion queue
    +--------+              +---------+                   +-----------------+             +----------------+
    | submit | => Tasks  => | pending | => CompletionQueue| core.finished() | => resolve  | Future, Batch  |
    | map    |    pickles   |         |      .send        |                 |   outcome   | value or error |
    | @ >> > |              +---------+         |         +-----------------+             +----------------+
    | joblib |                                  v                  ^
    +--------+                          _core: a queue of tasks, nodes, ended tasks

Submitting pickles the call on the caller's thread, appends it to the queue in the Rust core and returns at once. The
core sends it to a node. Its end comes out of `core.finished` on the thread of its completion queue, which resolves the
future, or the batch of joblib, that waits for it.
"""

from __future__ import annotations

import collections
import itertools
import pickle
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Any, Final, NoReturn, TypeVar

from .. import _core
from ..errors import PoolClosedError
from ..pickling import batches, blame, modules, payload
from ..pickling.handles import Handles
from ..pickling.modules import Modules
from ..pickling.pickler import Shared
from ..pickling.route import Route
from ..pickling.streams import Triple
from .completions import CLOSED, AbandonHook, CompletionQueue, Completions
from .function_names import FunctionNames
from .lifecycle import Lifecycle, Stage
from .nodes import Nodes
from .outcomes import About, outcome
from .output import Printer
from .settings import Settings

T = TypeVar("T")

EncodedCall = tuple[bytes, payload.Buffers, int, int]
"""A call as it is sent, the generation of the user's modules with which it is to run, and its function's name."""

CANCEL_MS: Final = 1_000
"""Bound on waiting for a node's answer whether a task could still be cancelled."""

_OPEN: Final = Stage.OPEN
_RELEASING: Final = Stage.RELEASING


class PoolFuture(Future[T]):
    """A future whose `cancel` reaches the task wherever it waits. `queue` is the one that all futures share."""

    def __init__(self, queue: CompletionQueue, about: About) -> None:
        super().__init__()
        self.task = 0
        """The task's number; set once, when the task has been sent."""
        self._queue = queue
        self._about = about

    def __reduce__(self) -> NoReturn:
        raise pickle.PicklingError(
            "a future of a pool means something in this process only: send what its result() gives"
        )

    def result(self, timeout: float | None = None) -> T:
        """Return what the call returned, or raise what became of it; `TimeoutError` after `timeout` seconds."""
        __tracebackhide__ = True
        try:
            return super().result(timeout)
        except BaseException as error:
            # Without the frames of earlier calls of this method, and of the standard library.
            raise BaseException.with_traceback(error, None)  # noqa: B904
        finally:
            # The error's traceback refers to this frame, which must not refer back to the error by the future.
            del self

    def cancel(self) -> bool:
        """Cancel the task if it has not started: true if so.

        Waits for the answer of the node that has it, a round trip; but not in callbacks and on the thread of a running
        asyncio loop, where false may become true later.
        """
        if not self.done():
            must_not_wait = _on_an_event_loop() or self._queue.is_current()
            self._queue.cancel(self.task, 0 if must_not_wait else CANCEL_MS)
        return self.cancelled()

    def cancel_later(self) -> None:
        """Cancel the task if it has not started, without waiting for the answer of the node that has it."""
        self._queue.cancel(self.task)

    def running(self) -> bool:
        """Return whether the task runs now: true from some tenths of a second after it began, until it ends."""
        return super().running() or (not self.done() and self._queue.is_running(self.task))

    def resolve(self, code: int, nanos: int, pickled: Any, buffers: Any) -> None:
        """Set the result or the exception, from how the task ended."""
        if code == _core.CANCELLED:
            super().cancel()
            self.set_running_or_notify_cancel()
            return
        try:
            value = outcome(code, pickled, buffers, self._about)
        except BaseException as error:
            self._queue.failures.add(error)
            # The traceback that the user sees begins where the result is asked for.
            self.set_exception(BaseException.with_traceback(error, None))
        else:
            self.set_result(value)


_tasks_of_pools: weakref.WeakKeyDictionary[Executor, Tasks] = weakref.WeakKeyDictionary()


def _on_an_event_loop() -> bool:
    # A program that never imported asyncio runs no loop.
    asyncio = sys.modules.get("asyncio")
    try:
        return asyncio is not None and asyncio.get_running_loop() is not None
    except RuntimeError:
        return False


class Unread:
    """Stands for an input of `map` that is read as its results are. Lives as long as the iterator of these."""


class Tasks:
    """The tasks of one pool: what the pool's own methods, lazy calls and joblib's backend submit with.

    Made by the pool, and usable from its start on. `nodes` and `completions` are the pool's too.
    """

    def __init__(
        self,
        core: _core.Core,
        settings: Settings,
        lifecycle: Lifecycle,
        completions: Completions,
        nodes: Nodes,
        printer: Printer,
    ) -> None:
        self.core = core
        self.completions = completions
        self.nodes = nodes
        self.max_payload = settings.worker.max_payload
        """Bytes of the largest payload."""
        self.route = Route(shares_files=False, to_client=False)
        """Where payloads go; set again by the pool as soon as it knows its machines."""
        self.names = FunctionNames()
        self.unread: weakref.WeakSet[Unread] = weakref.WeakSet()
        """The inputs of `map` that were not read to their end, unless their results are no longer asked for."""
        self._lifecycle = lifecycle
        self._printer = printer
        self._futures = completions.futures
        self._modules: Modules
        """What the workers can import; set by `use`."""

    @staticmethod
    def of(pool: Executor) -> Tasks:
        """Return the tasks of a pool. They are no attribute of the pool, because its attributes are public."""
        return _tasks_of_pools[pool]

    def belong_to(self, pool: Executor) -> None:
        """Make these the tasks of a pool. Called once, by the pool."""
        _tasks_of_pools[pool] = self

    def use(self, modules: Modules) -> None:
        """Pickle for workers that can import what `modules` says. Called once, before anything is encoded."""
        self._modules = modules

    def submit(
        self,
        pickled: bytes,
        buffers: payload.Buffers,
        generation: int,
        name: int,
        node: int | None = None,
        kind: int = payload.CALL,
        first: int | None = None,
        calls: int = 1,
    ) -> PoolFuture[Any]:
        """Send an encoded call, to the node of that number or to whichever is free; return its future."""
        future: PoolFuture[Any] = PoolFuture(self._futures, (self.names, name, first, calls))
        future.task = self._futures.send(future, kind, pickled, buffers, generation, name, node, calls)
        return future

    def map(
        self,
        fn: Callable[..., T],
        iterables: tuple[Iterable[Any], ...],
        timeout: float | None,
        chunksize: int,
        buffersize: int | None,
    ) -> Iterator[T]:
        """Submit `fn` over the iterables in chunks, and return an iterator over the results: see `ComputePool.map`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        calls = zip(*iterables, strict=False)
        chunks: Iterator[tuple[tuple[Any, ...], ...]] = iter(lambda: tuple(itertools.islice(calls, chunksize)), ())
        ahead = None if buffersize is None else max(1, buffersize // chunksize)
        firsts = itertools.count(0, chunksize)
        generation = self.begin_call()
        name = self.names.number(fn)

        def submit(chunk: tuple[tuple[Any, ...], ...]) -> PoolFuture[list[T]]:
            # As a batch, in which each call is a task's to plugins and to the time limit.
            self.check_submit()
            encoded = self.encode_batch(generation, [(fn, args, {}) for args in chunk])
            return self.submit(*encoded, generation, name, kind=payload.BATCH, first=next(firsts), calls=len(chunk))

        pending = collections.deque(map(submit, itertools.islice(chunks, ahead)))
        unread = Unread()
        if ahead is not None:
            self.unread.add(unread)

        def results() -> Iterator[T]:
            __tracebackhide__ = True
            try:
                while pending:
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    values = pending[0].result(left)
                    pending.popleft()
                    for chunk in itertools.islice(chunks, 1):
                        pending.append(submit(chunk))
                        break
                    else:
                        self.unread.discard(unread)
                    yield from values
            finally:
                self.unread.discard(unread)
                for future in pending:
                    future.cancel_later()

        return results()

    def open_queue(self, abandon: AbandonHook, resume: Callable[[], None]) -> CompletionQueue:
        """Open a completion queue for one call of `Parallel`. Raise `PoolClosedError` if the pool is closed."""
        self.check_not_closed()
        self._printer.call_made()
        return self.completions.open(abandon, resume)

    def begin_call(self, sparing: bool = False) -> int:
        """Return the generation of the user's modules with which all tasks of a call run that begins now.

        `sparing`: do not look for changes now if the last look is so short a time ago that looks would take more than
        5 % of the program's time; for calls of one task.
        """
        # In a pool that has not started, it cannot be sent either.
        return 0 if self._lifecycle.stage is Stage.NEW else self._modules.generations.begin(sparing)

    def encode_call(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], generation: int | None = None
    ) -> EncodedCall:
        """Check that the pool is open, and return a call as it is sent, of this generation or of one that begins."""
        self.check_submit()
        own = self.begin_call(sparing=True) if generation is None else generation
        return *self.encode(own, fn, args, kwargs), own, self.names.number(fn)

    def encode(
        self, generation: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> payload.Encoded:
        """Return a call as it is sent. Raise what pickling it raises, with a note on what it is about."""
        self.check_not_closed()
        encoder = self._encoder()
        before = self._modules.begin(generation)
        try:
            encoded = batches.dump_call(encoder, (fn, args, kwargs))
        except Exception as error:
            blame.explain(error, blame.of_calls([(fn, args, kwargs)]), encoder)
            modules.explain(error)
            raise
        finally:
            modules.end(before)
        self.nodes.comparison.look()
        return encoded

    def encode_batch(
        self,
        generation: int,
        calls: Sequence[Triple],
        shared: Shared | None = None,
        threads: int | None = None,
        nanos: int | None = None,
    ) -> payload.Encoded:
        """Return a batch of calls as it is sent; as for `encode`.

        `shared` is what the batches of one call of `Parallel` have in common, `threads` their
        `inner_max_num_threads`, and `nanos` the time after which the worker gives back the calls that it has not begun.
        """
        self.check_not_closed()
        encoder = self._encoder()
        if shared is not None and threads is nanos is None and batches.is_small(calls, shared):
            # Pickling so small a batch cannot fail, and asks for no module that the workers may lack.
            return encoder.dumps(self._modules.with_path(calls), shared, 1, shared.functions)
        if shared is not None and shared.handles is None:
            shared.handles = Handles(self.core.blob, shared.waiting)
        handles = None if shared is None else shared.handles
        before = self._modules.begin(generation)
        try:
            if handles is not None:
                handles.begin(calls)
            encoded = batches.dump(encoder, calls, shared, threads, nanos)
        except Exception as error:
            blame.explain(error, blame.of_calls(calls), encoder)
            modules.explain(error)
            raise
        finally:
            if handles is not None:
                handles.end(calls)
            modules.end(before)
        self.nodes.comparison.look()
        return encoded

    def encode_hooks(self, hooks: object) -> payload.Encoded:
        """Return plugins' hooks as they are sent, in a hello: to workers of all generations."""
        before = self._modules.begin(0)
        try:
            return self._encoder().dumps(hooks)
        finally:
            modules.end(before)

    def _encoder(self) -> payload.Encoder:
        return payload.encoder(self.max_payload, self.route)

    def check_submit(self) -> None:
        """Raise `PoolClosedError` if the pool is not open, and note which notebook cell submits."""
        self._printer.call_made()
        stage = self._lifecycle.stage
        if stage is not _OPEN:
            raise PoolClosedError(
                "this pool has not started: use it as `with sky.pool(...) as pool:`, or call pool.start()"
                if stage is Stage.NEW
                else f"this pool is {stage.word}: submit inside its with block"
            )

    def check_not_closed(self) -> None:
        """Raise `PoolClosedError` where no task can be sent. A pool that is being left still takes joblib's."""
        if self._lifecycle.stage >= _RELEASING:
            raise PoolClosedError(CLOSED)
        self.core.check_owner()
