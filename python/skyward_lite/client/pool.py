"""The pool: opened, given tasks, and left.

`ComputePool` makes its parts and owns them; they work on each other, and on the Rust core:

    settings.py      what the user asked for                    hello.py         what a node is told first
    nodes.py         machines become nodes                      tasks.py         calls become tasks, and ends values
    completions.py   takes the ends of tasks from the core      output.py        writes what tasks print
    inbox.py         takes the messages that tasks send home    lifecycle.py     how far the pool has come

Threads of a pool: one for futures and one for each call of Parallel (`skyward-resolve-…`), one each for messages, for
output and for watching the nodes, and one for each machine until it is a node, and while it is away.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import logging
import pickle
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NoReturn, ParamSpec, Self, TypeVar

from .. import _core, checks, keywords, nesting
from .._signals import held, install_signal_handlers, remove_signal_handlers
from ..errors import PoolClosedError
from ..hooks import Plugin
from ..image import Image
from ..pickling.modules import Modules
from ..pickling.route import Route
from ..providers import Provider
from . import answers, inbox, joblib_plugin, settings
from .completions import Completions
from .hello import Greeting, pickled_hooks
from .lifecycle import Lifecycle, Stage
from .node_state import Node, Status
from .nodes import Nodes
from .output import Printer
from .settings import Worker
from .tasks import Tasks

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger("skyward_lite")

LEAVE_POLL_SECONDS = 0.05
"""Bound on one wait of a thread that leaves the pool, so that Ctrl-C is noticed."""
JOIN_SECONDS = 5.0
"""Bound on waiting, when the pool is left, for callbacks of futures, and for the writing of what tasks printed."""


@keywords.explained("pool")
class ComputePool(Executor):
    """All workers on all nodes, as a `concurrent.futures.Executor` and as joblib's default backend.

    `with pool(...) as p:` starts its nodes and makes it joblib's default backend. A clean exit waits for pending
    futures, an exception cancels them; both end every process that was started.

    `provider`: where nodes come from; `Local()` by default.
    `nodes`: how many; `(least, wanted)` starts as soon as `least` are ready, the others join.
    `vcpus`, `memory_gb`: what each node must have at least, where the provider chooses machines by size; `Local()` and
    hosts that exist already are used as they are.
    `worker`: how each node runs tasks. `image`: what its environment must have.
    `plugins`: `[plugins.joblib()]` by default.
    `lease`: seconds for which a node whose connection is cut goes on working, and keeps its tasks, until this process
    has reached it again. Hours let a laptop sleep.
    `connect_timeout`: seconds for connection, key exchange and authentication of one node.
    `start_timeout`: seconds until the least number of nodes must be ready, and for which tasks wait for lost nodes that
    may come back, if no other node can run them.
    `strict_env`: whether nodes must have the packages that calls, and the modules of yours that they use, name, in this
    process's versions. A call that names one which a node lacks, or has in another version, then raises
    `EnvironmentMismatchError` and is not sent, nor is any later one while that node is in the pool; nodes that come
    later and differ are left out. Otherwise differences are a warning in the log.
    `ship_modules`: whether workers on other machines import your own modules from this process, as they are when a call
    begins: modules beside the script, and projects that are installed in place. If false, what a call uses of them
    travels by value with the call, and a task cannot import them.

    Raises `NodeStartError` on entry if too few nodes become ready, `ValueError` for parameters out of range.
    """

    def __init__(
        self,
        provider: Provider | None = None,
        nodes: int | tuple[int, int] | list[int] | None = None,
        *,
        vcpus: int | None = None,
        memory_gb: float | None = None,
        worker: Worker | None = None,
        image: Image | None = None,
        plugins: Sequence[Plugin] | None = None,
        lease: float = 120.0,
        connect_timeout: float = 20.0,
        start_timeout: float = 600.0,
        strict_env: bool = False,
        ship_modules: bool = True,
    ) -> None:
        self._settings = checked = settings.checked(
            provider,
            nodes,
            vcpus=vcpus,
            memory_gb=memory_gb,
            worker=worker,
            image=image,
            plugins=[joblib_plugin.joblib()] if plugins is None else plugins,
            lease=lease,
            connect_timeout=connect_timeout,
            start_timeout=start_timeout,
            strict_env=strict_env,
            ship_modules=ship_modules,
        )
        self.provider, self.worker, self.image = checked.provider, checked.worker, checked.image
        self.min_nodes, self.nodes_wanted = checked.min_nodes, checked.wanted_nodes
        self.vcpus, self.memory_gb, self.plugins = checked.vcpus, checked.memory_gb, checked.plugins
        self._core = core = _core.Core(
            self.worker.retries + 1, self.worker.max_payload, start_timeout=checked.start_timeout
        )
        self._lifecycle = lifecycle = Lifecycle()
        self._printer = Printer(core)
        completions = Completions(core, self.worker.task_timeout, lifecycle)
        self._nodes = Nodes(core, checked, lifecycle, completions.has_waiters)
        self._tasks = Tasks(core, checked, lifecycle, completions, self._nodes, self._printer)
        self._tasks.belong_to(self)
        self._plugin_contexts = contextlib.ExitStack()
        """The plugins' `around_client`, entered and left on one thread: joblib's configuration is a thread's own."""
        self._entered_by: threading.Thread | None = None
        """The thread that entered the block; set when the nodes are ready."""
        self._handled_signals: list[int] = []

    def __reduce__(self) -> NoReturn:
        raise pickle.PicklingError(
            "the pool itself would be sent to its workers, and it exists in this process only: a task that uses it "
            "must run here, or open a pool of its own"
        )

    def __repr__(self) -> str:
        return f"<ComputePool of {self.nodes_wanted} × {self.provider!r}, {self._lifecycle.stage.word}>"

    # ------------------------------------------------------------------------------------------------ opening

    def __enter__(self) -> Self:
        stage = self._lifecycle.stage
        if stage is not Stage.NEW:
            raise PoolClosedError(f"a pool starts once, and this one is {stage.word}: make a new one with sky.pool()")
        nesting.check()
        try:
            self._start()
            self._entered_by = threading.current_thread()
            # A context that was entered must get onto the stack. A plugin that takes long yields to a second Ctrl-C.
            with held(insist=True):
                for plugin in self.plugins:
                    if plugin.around_client is not None:
                        self._plugin_contexts.enter_context(plugin.around_client(self))
        except BaseException:
            self._leave(True, *sys.exc_info())
            raise
        return self

    def _start(self) -> None:
        """Bring the nodes up. Raise `NodeStartError` if fewer than the minimum become ready."""
        image = self.image
        for plugin in self.plugins:
            if plugin.transform is not None:
                image = plugin.transform(image)
                if not isinstance(image, Image):
                    raise TypeError(f"plugin {plugin.name!r}: its transform gave {image!r}: return the sky.Image")
        sources = None
        if self._settings.ship_modules and not self.provider.shares_files:
            # Not at the module's head: most pools have no use for it.
            from .sources import Sources

            sources = Sources(image.includes, image.packages())
        completions = self._tasks.completions
        modules = Modules(
            self.provider.shares_files,
            image.includes,
            image.packages(),
            sources=sources,
            is_idle=lambda: not completions.count(),
        )
        self._tasks.use(modules)
        setup = pickled_hooks(self.plugins, self._tasks.encode_hooks)
        greeting = Greeting(self._settings, uuid.uuid4().hex, image, modules, setup)
        self._nodes.comparison.begin(modules)
        if not self._lifecycle.advance(Stage.OPEN):
            raise PoolClosedError("this pool was closed while it started: make a new one with sky.pool()")
        if self.provider.outlives_client:
            # A signal that ended this process at once would leave the machines running.
            install_signal_handlers(self._handled_signals)
        _open_pools.add(self)
        self._tasks.completions.futures.start()
        self._printer.start()
        inbox.start_taking(self._core, self._tasks.completions.is_pending)
        if modules.sources is not None:
            answers.start_answering(self._core, modules.sources)
        machines = self._nodes.start(image, greeting.for_machine)
        # All machines of a pool are of one kind, and so are those that take their place.
        self._tasks.route = Route(all(machine.shares_files for machine in machines), to_client=False)
        self._preload()
        self._nodes.await_ready()

    def _preload(self) -> None:
        """Import here, too, what the plugins want the workers to import, while the nodes start."""
        for module in (module for plugin in self.plugins for module in plugin.preload):
            try:
                importlib.import_module(module)
            except ImportError:
                pass
            except Exception as error:
                error.add_note(f"It was raised by `import {module}`, which a plugin's preload asks for.")
                raise

    # ------------------------------------------------------------------------------------------------ leaving

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._leave(kind is not None, kind, error, trace)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Close the pool, as `Executor.shutdown`.

        With `wait=False` this returns at once, and the nodes are released when the pending futures are done. A
        future's callback that calls it does not wait either: the thread that runs callbacks cannot wait for futures.
        """
        if wait and not self._tasks.completions.runs_this_thread():
            self._leave(cancel_futures)
        elif not self._core.is_forked:
            # Once a thread has begun to leave the pool it must get as far as starting the thread that closes it.
            with held(insist=True):
                if self._begin_to_leave(cancel_futures):
                    try:
                        self._leave_plugins()
                    finally:
                        threading.Thread(target=self._close, name="skyward-shutdown").start()

    def _leave(self, cancel: bool, *error: Any) -> None:
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
            lambda: remove_signal_handlers(self._handled_signals),
            lambda: _open_pools.discard(self),
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
        if self._entered_by is threading.current_thread():
            self._plugin_contexts.__exit__(*(error or (None, None, None)))

    def _release(self) -> None:
        """Cancel what has not ended, end the sessions with the nodes, and release the machines."""
        deadline = time.monotonic() + self.provider.leave
        self._lifecycle.advance(Stage.RELEASING)
        try:
            self._core.close()
            # The threads of calls of Parallel are not waited for: they end when the calls' input lets them.
            if not self._tasks.completions.futures.join(JOIN_SECONDS):
                log.warning("a callback of a future has not returned, and is left alone")
            self._printer.join(JOIN_SECONDS)
        finally:
            self._nodes.release(deadline)

    # ------------------------------------------------------------------------------------------------ tasks

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `fn(*args, **kwargs)` on some worker.

        Raises at once what pickling the call raises; nothing is sent then. The future raises what `fn` raised, with
        the remote traceback as its `__cause__`; `WorkerCrashedError` if its process died, `NodeLostError` if its
        node went away too often.
        """
        checks.callee("submit", fn)
        tasks = self._tasks
        return tasks.submit(*tasks.encode_call(fn, args, kwargs))

    @keywords.explained("map")
    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Run `fn` over the iterables, as `Executor.map`: results in order, errors where they are reached.

        `chunksize` calls travel as one task. At most `buffersize` results are computed ahead of the consumer (None:
        all). `timeout` counts from this call, in seconds; `TimeoutError` afterwards.
        """
        checks.callee("map", fn)
        checks.iterables("map", iterables)
        if timeout is not None and timeout != 0:
            # 0 is the standard library's too: raise unless the results are there.
            timeout = checks.seconds("map", "timeout", timeout)
        chunksize = checks.whole("map", "chunksize", chunksize, 1, sys.maxsize)
        if buffersize is not None:
            buffersize = checks.whole("map", "buffersize", buffersize, 1, sys.maxsize, "None for all results")
        return self._tasks.map(fn, iterables, timeout, chunksize, buffersize)

    def nodes(self) -> list[Node]:
        """Return how each node stands, in the order in which they were started."""
        return self._nodes.snapshot()

    def slots(self) -> int:
        """Return the number of tasks that can run at once: the sum of `concurrency` over the ready nodes."""
        return self._nodes.slots()

    def status(self) -> Status:
        """Return how the pool stands, and what it costs."""
        return self._nodes.status()


pool = ComputePool

_open_pools: set[ComputePool] = set()
"""The pools that were started and not closed, whether or not the program still refers to them."""


@atexit.register
def _close_open_pools() -> None:
    with contextlib.ExitStack() as stack:
        # The stack goes on with the other pools after an exception, which it raises at the end.
        for open_pool in list(_open_pools):
            stack.callback(open_pool._leave, True)
