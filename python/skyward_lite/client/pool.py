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
import logging
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NoReturn, ParamSpec, Self, TypeVar

from .. import _core, checks, keywords, nesting
from .._signals import held
from ..errors import PoolClosedError
from ..hooks import Plugin
from ..image import Image
from ..providers import Provider
from . import figures, folding, innermost, joblib_plugin, settings, unentered
from .completions import Completions
from .counting import count_calls
from .display import Display
from .leaving import Leaving
from .lifecycle import Lifecycle, Stage
from .node_state import Node, Status
from .nodes import Nodes
from .opening import Opening
from .output import Printer
from .reporting import Reporting
from .settings import Worker
from .tasks import Tasks

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger("skyward_lite")


@keywords.explained("pool")
class ComputePool(Reporting):
    """All workers on all nodes, as a `concurrent.futures.Executor` and as joblib's default backend.

    `with pool(...) as p:` starts its nodes and makes it joblib's default backend. A clean exit waits for pending
    futures, an exception cancels them; both end every process that was started.

    Parameters
    ----------
    provider : Provider, optional
        Where nodes come from: `Local()`, the default, `SSH(...)` or `AWS(...)`.
    nodes : int or (int, int), optional
        How many nodes. `(least, wanted)` starts as soon as `least` are ready, and the others join. The default is the
        provider's number, or one.
    vcpus : int, optional
        Cores that each node must have at least, where the provider chooses machines by size; `Local()` and hosts that
        exist already are used as they are.
    memory_gb : float, optional
        GB of memory that each node must have at least, likewise.
    worker : Worker, optional
        How each node runs tasks.
    image : Image, optional
        What the nodes' environment must have.
    plugins : sequence of Plugin, optional
        `[plugins.joblib()]` by default.
    lease : float, default 120
        Seconds for which a node whose connection is cut goes on working, and keeps its tasks, until this process has
        reached it again. Hours let a laptop sleep.
    connect_timeout : float, default 20
        Seconds for connection, key exchange and authentication of one node.
    start_timeout : float, default 600
        Seconds until the least number of nodes must be ready, and for which tasks wait for lost nodes that may come
        back, if no other node can run them.
    strict_env : bool, default False
        Whether nodes must have the packages that calls, and the modules of yours that they use, name, in this process's
        versions. A call that names one which a node lacks, or has in another version, then raises
        `EnvironmentMismatchError` and is not sent, nor is any later one while that node is in the pool; nodes that come
        later and differ are left out. Otherwise differences are a warning in the log.
    ship_modules : bool, default True
        Whether workers on other machines import your own modules from this process, as they are when a call begins:
        modules beside the script, and projects that are installed in place. If false, what a call uses of them travels
        by value with the call, and a task cannot import them.
    progress : bool, optional
        What is shown on a terminal or in a notebook. None, the default: how the nodes start, if that takes longer than
        half a second. True: the tasks as well, as by `sky.progress()`, for as long as the pool is open. False: nothing.
        Where there is neither a terminal nor a notebook, nothing is shown.

    Raises
    ------
    NodeStartError
        On entry, if too few nodes become ready.
    TypeError, ValueError
        If a value is of a wrong type or out of range; the text names the parameter.

    See Also
    --------
    Local, SSH, AWS : where nodes come from.

    Examples
    --------
    >>> with sky.pool(nodes=2, worker=sky.Worker(concurrency=2)) as pool:
    ...     print(Parallel(n_jobs=-1)(delayed(abs)(i) for i in range(-3, 0)))
    ...     print(pool.submit(abs, -4).result(), pool.slots())
    [3, 2, 1]
    4 4
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
        progress: bool | None = None,
    ) -> None:
        folding.install()
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
            progress=progress,
        )
        self.provider, self.worker, self.image = checked.provider, checked.worker, checked.image
        self.min_nodes, self.nodes_wanted = checked.min_nodes, checked.wanted_nodes
        self.vcpus, self.memory_gb, self.plugins = checked.vcpus, checked.memory_gb, checked.plugins
        self._core = core = _core.Core(
            self.worker.retries + 1, self.worker.max_payload, start_timeout=checked.start_timeout
        )
        self._lifecycle = lifecycle = Lifecycle()
        self._display = display = Display(checked.progress)
        self._printer = Printer(core, display.call_made)
        completions = Completions(core, self.worker.task_timeout, lifecycle)
        self._nodes = Nodes(core, checked, lifecycle, completions.has_waiters, display)
        self._tasks = Tasks(core, checked, lifecycle, completions, self._nodes, self._printer)
        self._tasks.belong_to(self)
        display.counts = lambda: count_calls(core, completions, self._nodes, self._tasks)
        self._was_started = False
        """Whether it was opened by `start`."""
        if any(plugin.name in ("joblib", "sklearn") for plugin in self.plugins):
            unentered.made(self)
        self._leaving = Leaving(
            *(core, self.provider, lifecycle, self._tasks, self._nodes, self._printer, display),
            forget=self._forget,
        )

    def __reduce__(self) -> NoReturn:
        raise pickle.PicklingError(
            "the pool itself would be sent to its workers, and it exists in this process only: a task that uses it "
            "must run here, or open a pool of its own"
        )

    def __repr__(self) -> str:
        stage = self._lifecycle.stage
        state = "not started: use it in a with statement, or call start()" if stage is Stage.NEW else stage.word
        return f"<ComputePool: {self.provider!r}, {figures.count(self.nodes_wanted, 'node')}, {state}>"

    # ------------------------------------------------------------------------------------------------ opening

    def __enter__(self) -> Self:
        stage = self._lifecycle.stage
        if stage is Stage.OPEN and self._was_started:
            return self
        unentered.entered(self)
        if stage is Stage.OPEN:
            raise PoolClosedError("this pool is open already: use it inside its own block, or make another one")
        if stage is not Stage.NEW:
            raise PoolClosedError(f"a pool starts once, and this one is {stage.word}: make a new one with sky.pool()")
        nesting.check()
        try:
            Opening(
                *(self._settings, self._core, self._lifecycle, self._tasks, self._nodes, self._printer, self._display),
                leaving=self._leaving,
                remember=lambda: _open_pools.add(self),
            ).run()
            self._leaving.entered_by = threading.current_thread()
            innermost.enter(self, self._display)
            # A context that was entered must get onto the stack. A plugin that takes long yields to a second Ctrl-C.
            with held(insist=True):
                for plugin in self.plugins:
                    if plugin.around_client is not None:
                        self._leaving.plugin_contexts.enter_context(plugin.around_client(self))
        except BaseException:
            self._leaving.leave(True, *sys.exc_info())
            raise
        return self

    def start(self) -> Self:
        """Open the pool without a `with` block, as in a notebook, and return it. `close` ends it.

        Until then it is joblib's default backend in this thread. A pool that nobody closes is closed as this program
        ends. A pool that is open already stays as it is.

        Returns
        -------
        ComputePool
            The pool itself.

        Raises
        ------
        NodeStartError
            If too few nodes become ready, and what else entering a `with` block raises.

        Examples
        --------
        >>> pool = sky.pool().start()
        >>> pool.submit(abs, -1).result()
        1
        >>> pool.close()
        """
        if self._lifecycle.stage is not Stage.OPEN:
            others = [other for other in _open_pools.copy() if other._was_started]
            self.__enter__()
            self._was_started = True
            if others:
                log.warning(
                    "start() opened another pool earlier, which keeps its nodes until close() ends it; %d are open",
                    len(others) + 1,
                )
        return self

    # ------------------------------------------------------------------------------------------------ leaving

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._leaving.leave(kind is not None, kind, error, trace)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Close the pool, as `Executor.shutdown`.

        A future's callback that calls it does not wait: the thread that runs callbacks cannot wait for futures.

        Parameters
        ----------
        wait : bool, default True
            Whether to wait for the end. If false this returns at once, and the nodes are released when the pending
            futures are done.
        cancel_futures : bool, default False
            Whether futures that are pending are cancelled.
        """
        if wait and not self._tasks.completions.runs_this_thread():
            self._leaving.leave(cancel_futures)
        else:
            self._leaving.leave_later(cancel_futures)

    def _forget(self) -> None:
        """Forget the pool, which is nearly closed."""
        unentered.entered(self)
        _open_pools.discard(self)
        innermost.leave(self)

    def close(self) -> None:
        """Close the pool: wait for pending futures, end all workers and release the machines.

        It is what leaving the `with` block does, for a pool that was opened by `start`. A pool that was never started,
        or is closed already, stays as it is.
        """
        self._leaving.leave(False)

    # ------------------------------------------------------------------------------------------------ tasks

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `fn(*args, **kwargs)` on some worker.

        Parameters
        ----------
        fn : callable
            The function.
        *args, **kwargs
            Its arguments.

        Returns
        -------
        concurrent.futures.Future
            It raises what `fn` raised, with the remote traceback as its `__cause__`; `WorkerCrashedError` if its
            process died, `NodeLostError` if its node went away too often.

        Raises
        ------
        PoolClosedError
            If the pool is not open; and at once what pickling the call raises. Then nothing is sent.
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

        Parameters
        ----------
        fn : callable
            The function.
        *iterables : iterable
            Its arguments: the n-th call gets the n-th of each.
        timeout : float, optional
            Seconds from this call on; afterwards the iterator raises `TimeoutError`.
        chunksize : int, default 1
            Calls that travel as one task.
        buffersize : int, optional
            How many results are computed ahead of the consumer at most; None, the default, for all.

        Returns
        -------
        iterator
            The results.

        Examples
        --------
        >>> with sky.pool() as pool:
        ...     list(pool.map(pow, [2, 3], [5, 2]))
        [32, 9]
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
        """Return how each node stands, in the order in which they were started.

        Returns
        -------
        list of Node
        """
        return self._nodes.snapshot()

    def slots(self) -> int:
        """Return the number of tasks that can run at once: the sum of `concurrency` over the ready nodes.

        Returns
        -------
        int
        """
        return self._nodes.slots()

    def status(self) -> Status:
        """Return how the pool stands, and what it costs.

        Returns
        -------
        Status
        """
        return self._nodes.status()


pool = ComputePool

_open_pools: set[ComputePool] = set()
"""The pools that were started and not closed, whether or not the program still refers to them."""


@atexit.register
def _close_open_pools() -> None:
    with contextlib.ExitStack() as stack:
        # The stack goes on with the other pools after an exception, which it raises at the end.
        for open_pool in list(_open_pools):
            stack.callback(open_pool._leaving.leave, True)
