"""`pool()` and the class behind it: nodes up, tasks out, results in, nodes down.

submit / map / backend.py          any thread: pickles, appends to the queue in Rust, returns at once
lane.py                            one thread for futures, one for each call of Parallel: takes batches of finished
                                   tasks from Rust, settles what waits for them
messages.py                        one thread: gives what tasks send home to its listeners
printer.py                         one thread: writes what tasks printed to this process's streams
_bring_up                          one thread for each node until it is started; _watch tells the log of their fates
"""

from __future__ import annotations

import atexit
import base64
import collections
import contextlib
import dataclasses
import functools
import importlib
import itertools
import logging
import os
import pickle
import signal
import sys
import threading
import time
import types
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from typing import Any, Literal, NoReturn, ParamSpec, Self, TypeVar

from .. import (
    _core,
    checks,
    credentials,
    messages,
    nesting,
    plugins,
)
from .._signals import held
from .._version import PYTHON, __version__
from ..errors import (
    NodeLostError,
    NodeStartError,
    PoolClosedError,
    RemoteError,
    TaskTimeoutError,
    WorkerCrashedError,
)
from ..hello import ClientHello, WorkerSettings
from ..image import Image, canonical
from ..pickling import blame, modules, payload
from ..pickling.modules import Modules
from ..pickling.pickler import Shared
from ..pickling.route import Route
from ..plugins import Plugin
from ..providers import Cost, Machine, NodeRequest, Provider
from ..providers.local import Local
from .completions import CLOSED, LANES, AbandonHook, CompletionQueue
from .output import Printer

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("skyward_lite")

MAX_PAYLOAD = 1 << 40
"""Largest `Worker(max_payload=)`, in bytes: more than a machine's memory."""
WATCH_MS = 1_000
"""Bound on one wait for a node's fate; closing wakes the waiting thread at once."""
POLL_MS = 50
"""Bound on one wait for a node's state, so that Ctrl-C is heard."""
LEAVE = 5.0
"""Bound on writing what tasks printed, when the pool is left."""
REPLACEMENTS = 3
"""How many nodes may be asked for in the place of lost ones and of those that did not come up, per wanted one."""
CANCEL_MS = 1_000
"""Bound on waiting for a node's word whether a task could still be cancelled."""
MAX_TEXT = 16_000
"""Bytes of why a node does not start, and of what a node says of the end of a task, which may tell of several nodes."""
MAX_SETUP = _core.MAX_BODY // 2
"""Largest plugin hooks, pickled, in bytes: a hello, with all else that it has, must fit one frame."""
MAX_SIZE = 1_000_000
"""Largest `pool(vcpus=)` and `pool(memory_gb=)`."""


@dataclasses.dataclass(frozen=True)
class Worker:
    """How each node runs tasks.

    `concurrency`: tasks at once on a node, at most 4,096; None means one per core of the node.
    `executor`: "thread" for one process of so many threads, "process" for so many processes, each of which runs its
    tasks on its main thread. A process of several threads runs no task on its main thread, so signal handlers cannot
    be set there; what its tasks share, and what they do not, is in the README.
    `retries`: how often a task may be tried again after its node was lost.
    `task_timeout`: seconds that one call may run before its node ends it, with its process, and it fails with
    `TaskTimeoutError`; None for no limit. Looked at five times a second. Other tasks of that process run on for up to
    3 s, and those that do not end in that time run again.
    `max_payload`: largest pickled task or result, in bytes; at most 1 TiB.
    """

    concurrency: int | None = None
    executor: Literal["thread", "process"] = "thread"
    retries: int = 3
    max_payload: int = 4 << 30
    task_timeout: float | None = None

    def __post_init__(self) -> None:
        if self.concurrency is not None:
            most = checks.MAX_CONCURRENCY
            slots = checks.whole("Worker", "concurrency", self.concurrency, 1, most, "None for one per core")
            object.__setattr__(self, "concurrency", slots)
        if self.executor not in ("thread", "process"):
            raise ValueError(f'Worker(executor={checks.shown(self.executor)}): "thread" or "process"')
        object.__setattr__(self, "retries", checks.whole("Worker", "retries", self.retries, 0, 1000))
        most = checks.whole("Worker", "max_payload", self.max_payload, 1, MAX_PAYLOAD)
        object.__setattr__(self, "max_payload", most)
        if self.task_timeout is not None:
            object.__setattr__(self, "task_timeout", checks.seconds("Worker", "task_timeout", self.task_timeout))


@dataclasses.dataclass(frozen=True)
class Node:
    """What is known of a node: its name, its slots and its round-trip time in seconds.

    `state` is one of "connecting", "ready", "draining", "lost" and "closed". A draining node will soon be gone: it ends
    what it runs and takes nothing more. `reason` says why it is draining or lost; where those are the node's own words,
    they can be shown on any terminal.
    """

    name: str
    state: str
    reason: str
    slots: int
    rtt: float | None
    pid: int | None


@dataclasses.dataclass(frozen=True)
class Status:
    """How a pool stands: its nodes, the tasks that can run at once, those that have not ended, and what it costs.

    `cost` is None where nodes cost nothing, or their price is not known.
    """

    nodes: list[Node]
    slots: int
    pending: int
    cost: Cost | None


def outcome(tag: int, pickled: Any, buffers: Any, first: int | None = None) -> Any:
    """Return a task's value, or raise what it raised or what became of it.

    `first` is the place of its first call among those that were submitted together, None for a call alone.
    """
    if tag == _core.RETURNED:
        try:
            return payload.loads(pickled, buffers)
        except Exception as why:
            reason = _core.printable(f"{type(why).__name__}: {why}")
            raise RemoteError(f"the task's result cannot be rebuilt here: {reason}") from why
    if tag == _core.RAISED:
        raise payload.load_exception(pickled, buffers, first)
    if tag == _core.CANCELLED:
        raise CancelledError("the task was cancelled")
    # The node's own words, as those of `NodeLostError` may be, too.
    raise _ENDS.get(tag, RemoteError)(_core.printable(bytes(pickled), MAX_TEXT))


_ENDS = {
    _core.CRASHED: WorkerCrashedError,
    _core.NODE_LOST: NodeLostError,
    _core.TIMED_OUT: TaskTimeoutError,
}


class _PoolFuture(Future[T]):
    """A future whose `cancel` reaches the task wherever it waits."""

    def __init__(self, pool: ComputePool, first: int | None) -> None:
        super().__init__()
        self._pool = pool
        self._task = 0
        self._first = first

    def __reduce__(self) -> NoReturn:
        raise pickle.PicklingError(
            "a future of a pool means something in this process only: send what its result() gives"
        )

    def cancel(self) -> bool:
        """Cancel the task if it has not started: true if so.

        Waits for the word of the node that has it, a round trip; but not in callbacks and on the thread of a running
        asyncio loop, where false may become true later.
        """
        if not self.done():
            futures = self._pool._futures
            hurry = _on_an_event_loop() or futures.is_current()
            futures.cancel(self._task, 0 if hurry else CANCEL_MS)
        return self.cancelled()

    def resolve(self, tag: int, nanos: int, pickled: Any, buffers: Any) -> None:
        if tag == _core.CANCELLED:
            super().cancel()
            self.set_running_or_notify_cancel()
            return
        try:
            value = outcome(tag, pickled, buffers, self._first)
        except BaseException as error:
            self.set_exception(error)
        else:
            self.set_result(value)


def _on_an_event_loop() -> bool:
    # Who never imported it runs no loop.
    asyncio = sys.modules.get("asyncio")
    try:
        return asyncio is not None and asyncio.get_running_loop() is not None
    except RuntimeError:
        return False


class ComputePool(Executor):
    """All workers on all nodes, as a `concurrent.futures.Executor` and as joblib's default backend.

    Use it as a context manager. A clean exit waits for pending futures, an exception cancels them; both end every
    process that was started. See `pool` for the parameters.
    """

    def __init__(
        self,
        provider: Provider | None = None,
        nodes: int | tuple[int, int] | None = None,
        *,
        vcpus: int | None = None,
        memory_gb: float | None = None,
        worker: Worker | None = None,
        image: Image | None = None,
        plugins: Sequence[Plugin] | None = None,
        lease: float = 60.0,
        connect_timeout: float = 20.0,
        start_timeout: float = 600.0,
        strict_env: bool = False,
    ) -> None:
        _check_types(provider, worker, image, plugins)
        self.provider = Local() if provider is None else provider
        self.min_nodes, self.nodes_wanted = _node_counts(nodes, self.provider)
        self.vcpus = None if vcpus is None else checks.whole("pool", "vcpus", vcpus, 1, MAX_SIZE)
        self.memory_gb = None if memory_gb is None else checks.number("pool", "memory_gb", memory_gb, MAX_SIZE, "GB")
        self.worker = Worker() if worker is None else worker
        self.image = Image() if image is None else image
        self.plugins = (_default_plugin(),) if plugins is None else tuple(plugins)
        self._lease = checks.seconds("pool", "lease", lease)
        self._connect_timeout = checks.seconds("pool", "connect_timeout", connect_timeout)
        self._start_timeout = checks.seconds("pool", "start_timeout", start_timeout)
        self._strict_env = checks.switch("pool", "strict_env", strict_env)
        self._run = uuid.uuid4().hex
        self._hash_seed = _hash_seed(self._run)
        self._core = _core.Core(self.worker.retries + 1, self.worker.max_payload)
        self._lanes: dict[int, CompletionQueue] = {}
        self._lane_numbers = itertools.count()
        self._futures = CompletionQueue(self, 0)
        self._printer = Printer(self._core)
        self._stack = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._idle = threading.Condition()
        self._state: Literal["new", "open", "closing", "closed"] = "new"
        self._machines: list[Machine] = []
        self._route = Route(shares_files=False, to_client=False)
        self._starters: list[threading.Thread] = []
        self._entered: threading.Thread | None = None
        self._leaving: set[threading.Thread] = set()
        self._expected = 0
        self._replaced = 0
        self._cared_for: set[int] = set()
        self._signals: list[int] = []
        self._give_up = False
        self._left = threading.Event()
        self._modules: Modules
        """What its workers can import; from its start on."""

    def __reduce__(self) -> NoReturn:
        raise pickle.PicklingError(
            "the pool itself would be sent to its workers, and it exists in this process only: a task that uses it "
            "must run here, or open a pool of its own"
        )

    def __repr__(self) -> str:
        return f"<ComputePool of {self.nodes_wanted} × {self.provider!r}, {self._state}>"

    # ------------------------------------------------------------------------------------------------ up and down

    def __enter__(self) -> Self:
        if self._state != "new":
            raise PoolClosedError(f"a pool starts once, and this one is {self._state}: make a new one with sky.pool()")
        nesting.check()
        try:
            self._start()
            self._entered = threading.current_thread()
            # Whatever is entered must get onto the stack. A plugin that takes long yields to a second Ctrl-C.
            with held(insist=True):
                for plugin in self.plugins:
                    if plugin.around_client is not None:
                        self._stack.enter_context(plugin.around_client(self))
        except BaseException:
            self._leave(True, *sys.exc_info())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._leave(kind is not None, kind, error, trace)

    def _start(self) -> None:
        """Bring the nodes up. Raises `NodeStartError` if fewer than the minimum become ready."""
        image = self.image
        for plugin in self.plugins:
            if plugin.transform is not None:
                image = plugin.transform(image)
                if not isinstance(image, Image):
                    raise TypeError(f"plugin {plugin.name!r}: its transform gave {image!r}: return the sky.Image")
        self._modules = Modules(self.provider.shares_files, image.includes, image.packages())
        preload = [module for plugin in self.plugins for module in plugin.preload]
        # What the provider imports, as boto3, is not the user's.
        hello = functools.partial(self._hello, image, preload, self._setup(), frozenset(sys.modules))
        self._state = "open"
        if self.provider.outlives_client:
            self._heed_signals()
        _open_pools.add(self)
        self._futures.start()
        self._printer.start()
        messages.start_taking(self)
        threading.Thread(target=self._watch, args=(hello,), name="skyward-watch", daemon=True).start()
        wanted = NodeRequest(
            nodes=self.nodes_wanted,
            least=self.min_nodes,
            image=image,
            vcpus=self.vcpus,
            memory_gb=self.memory_gb,
            connect_timeout=self._connect_timeout,
        )
        machines: list[Machine] = []
        try:
            self.provider.start(wanted, machines)
            # A pool's machines are of one kind, and so are those that take their place.
            self._route = Route(all(machine.shares_files for machine in machines), to_client=False)
            self._join(machines, hello)
        except BaseException:
            # Whatever was started is to be ended, counted in or not.
            self._machines += [machine for machine in machines if machine not in self._machines]
            raise
        for module in preload:
            try:
                importlib.import_module(module)
            except ImportError:
                pass
            except Exception as error:
                error.add_note(f"It was raised by `import {module}`, which a plugin's preload asks for.")
                raise
        self._await_nodes()

    def _hello(
        self, image: Image, preload: list[str], setup: str, modules: frozenset[str], machine: Machine
    ) -> ClientHello:
        """Return what the agent must know."""
        timeout = self.worker.task_timeout
        return ClientHello(
            version=__version__,
            run=self._run,
            node=machine.name,
            python=PYTHON,
            lease_ms=int(self._lease * 1000),
            packages={} if machine.shares_files else _imported(modules),
            strict=self._strict_env,
            worker=WorkerSettings(
                concurrency=machine.concurrency or self.worker.concurrency,
                processes=self.worker.executor == "process",
                env={"PYTHONHASHSEED": self._hash_seed, **image.env, **nesting.worker_environment()},
                shares_files=machine.shares_files,
                sys_path=list(self._modules.path) if machine.shares_files else [],
                preload=preload,
                max_payload=self.worker.max_payload,
                task_timeout_ms=None if timeout is None else max(1, int(timeout * 1000)),
                setup=setup,
                unwind=any(plugin.around_worker is not None for plugin in self.plugins),
            ),
        )

    def _join(self, machines: list[Machine], hello: Callable[[Machine], ClientHello]) -> None:
        """Count machines in, and begin to make nodes of them. Node numbers are places in `_machines`."""
        with self._lock:
            for machine in machines:
                self._machines.append(machine)
                args = (self._core.add_node(machine.name), machine, hello)
                self._starters.append(threading.Thread(target=self._bring_up, args=args, daemon=True))
                self._starters[-1].name = f"skyward-{machine.name}"
                self._starters[-1].start()

    def _bring_up(self, node: int, machine: Machine, hello: Callable[[Machine], ClientHello]) -> None:
        """Make one machine a node, on a thread of its own. What goes wrong is the node's fate."""
        try:
            opened = machine.open(self._core)
            self._core.start_node(node, opened.connection, opened.command, hello(machine), self._start_timeout)
        except (NodeStartError, _core.CoreError, OSError) as error:
            self._core.fail_node(node, _core.printable(str(error), MAX_TEXT))
        except BaseException as error:
            self._core.fail_node(node, _core.printable(f"{type(error).__name__}: {error}", MAX_TEXT))
            # What a machine is let go of under one's hands raises anything.
            if self._state == "open":
                raise

    def _watch(self, hello: Callable[[Machine], ClientHello]) -> None:
        """Tell the log what becomes of the nodes, and have lost ones replaced."""
        before: dict[int, str] = {}
        while self._state != "closed":
            nodes = self.nodes()
            for number, node in enumerate(nodes):
                was, before[number] = before.get(number, "connecting"), node.state
                if was == "connecting" and node.slots and node.state != "ready":
                    was = "ready"  # between two looks
                if node.state != was and number < len(self._machines):
                    self._care(number, was, node.state, hello)
                if node.state == "ready" and was != "ready":
                    log.info("node %s is ready with %d slots", node.name, node.slots)
                    differences = self._core.differences(number)
                    if differences:
                        log.warning(
                            "node %s has another environment than this process: %s. What one version pickled may not "
                            "work with another: Image(pip=[...]) says what a node is to have",
                            *(node.name, "; ".join(differences)),
                        )
                elif node.state == "draining" and was != "draining":
                    log.warning(
                        "node %s takes no more tasks, what it has not started runs elsewhere: %s",
                        node.name,
                        node.reason,
                    )
                elif node.state == "lost" and was == "connecting":
                    log.warning("node %s is left out: %s", node.name, node.reason)
                elif node.state == "lost" and was in ("ready", "draining"):
                    log.warning("node %s is lost, what it had not finished runs elsewhere: %s", node.name, node.reason)
            self._core.wait_for_change([node.state for node in nodes], WATCH_MS)

    def _care(self, number: int, was: str, now: str, hello: Callable[[Machine], ClientHello]) -> None:
        """Let go of a machine that is lost, and have it replaced: on a thread of its own."""
        machine = self._machines[number]
        if not machine.replaceable or now not in ("draining", "lost"):
            return
        with self._lock:
            # Also while the block is being left, for what is still to be done.
            if self._state != "open" and (self._state != "closing" or self._give_up or not self._is_awaited()):
                return
            first = number not in self._cared_for
            if first:
                self._cared_for.add(number)
                self._expected += 1
                self._core.expect(self._expected)
            args = (machine, was, now, first, hello)
            self._starters.append(threading.Thread(target=self._succeed, args=args, daemon=True))
            self._starters[-1].name = f"skyward-after-{machine.name}"
            self._starters[-1].start()

    def _succeed(
        self, machine: Machine, was: str, now: str, first: bool, hello: Callable[[Machine], ClientHello]
    ) -> None:
        try:
            # Why one never came up is asked before it is let go of.
            asks = first and (was != "connecting" or machine.unlucky())
            if now == "lost":
                self.provider.retire(machine)
            if asks and self._may_replace():
                new: list[Machine] = []
                self.provider.replace(machine, new)
                log.info("node %s is replaced by %s", machine.name, ", ".join(m.name for m in new))
                self._join(new, hello)
        except (NodeStartError, OSError) as error:
            log.warning("node %s is not replaced: %s", machine.name, error)
        finally:
            if first:
                with self._lock:
                    self._expected -= 1
                    self._core.expect(self._expected)

    def _may_replace(self) -> bool:
        with self._lock:
            self._replaced += 1
            return self._replaced <= REPLACEMENTS * self.nodes_wanted

    def _heed_signals(self) -> None:
        """Let signals that would end this process at once end it by way of the pool: its machines would go on."""
        if threading.current_thread() is not threading.main_thread():
            return

        def end(number: int, frame: types.FrameType | None) -> None:
            raise SystemExit(128 + number)

        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, end)
                self._signals.append(number)

    def _ignore_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            while self._signals:
                signal.signal(self._signals.pop(), signal.SIG_DFL)

    def _setup(self) -> str:
        """Pickle what the plugins do in the workers; empty if that is nothing."""
        hooks = [(p.around_worker, p.decorate) for p in self.plugins if p.around_worker or p.decorate]
        if not hooks:
            return ""
        before = self._modules.begin()
        try:
            pickled, buffers = self._encoder().dumps(hooks)
        finally:
            modules.end(before)
        if buffers or len(pickled) > MAX_SETUP:
            names = ", ".join(p.name for p in self.plugins if p.around_worker or p.decorate)
            raise ValueError(
                f"the hooks of {names} pickle to more than {MAX_SETUP:,} bytes: let them load large data on the node"
            )
        return base64.b64encode(pickled).decode()

    def _await_nodes(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        while True:
            with self._lock:
                nodes, hopeful = self.nodes(), self._expected
                for number, node in enumerate(nodes):
                    alive = node.state in ("ready", "connecting")
                    # What becomes of one that failed is decided in `_care`.
                    hopeful += alive or (self._machines[number].replaceable and number not in self._cared_for)
            if sum(node.state == "ready" for node in nodes) >= self.min_nodes:
                return
            if hopeful < self.min_nodes or time.monotonic() > deadline:
                whys = [f"{n.name} is {n.state}" + (f": {n.reason}" if n.reason else "") for n in nodes]
                # What follows several lines of one node begins a line of its own.
                why = ("\n" if any("\n" in why for why in whys) else "; ").join(whys)
                raise NodeStartError(f"{self.min_nodes} ready nodes are needed, but {why}")
            self._core.wait_for_change([node.state for node in nodes], POLL_MS)

    def _leave(self, cancel: bool, *error: Any) -> None:
        """End everything, once; whoever comes later waits until it is done.

        Ctrl-C meanwhile cancels what is pending, and is raised at the end.
        """
        if self._core.is_forked:
            return  # a forked child has neither the threads nor the nodes
        try:
            with held(self._hurry):
                self._leave_once(cancel, *error)
        except BaseException:
            # Perhaps Ctrl-C before it was held.
            with held(self._hurry):
                self._leave_once(True, *error)
            raise

    def _leave_once(self, cancel: bool, *error: Any) -> None:
        self._give_up |= cancel
        if self._begin_to_leave():
            self._finish(*error)
        else:
            self._unwind(*error)
            if not self._settles():
                self._left.wait()

    def _hurry(self) -> None:
        self._give_up = True

    def _settles(self) -> bool:
        """Say whether the calling thread runs callbacks of this pool."""
        return any(lane.is_current() for lane in list(self._lanes.values()))

    def _begin_to_leave(self) -> bool:
        self._leaving.add(threading.current_thread())
        with self._lock:
            first = self._state in ("new", "open")
            if first:
                self._state = "closing"
            return first

    def _unwind(self, *error: Any) -> None:
        """Leave the plugins' contexts, on the thread that entered them: joblib's configuration is a thread's own."""
        if self._entered is threading.current_thread():
            self._stack.__exit__(*(error or (None, None, None)))

    def _finish(self, *error: Any) -> None:
        with contextlib.ExitStack() as last:
            # Each of these happens whatever becomes of the others.
            last.callback(self._left.set)
            last.callback(_open_pools.discard, self)
            last.callback(self._let_go)
            try:
                self._drain()
            except BaseException:
                error = sys.exc_info()
                raise
            finally:
                self._unwind(*error)

    def _drain(self) -> None:
        """Wait until every submitted task has ended. Bounded by the tasks themselves: each ends, or its node does."""
        with self._idle:
            while self._is_awaited() and not self._give_up:
                self._idle.wait(POLL_MS / 1000)

    def _is_awaited(self) -> bool:
        # All of them are asked: those that nobody waits for are to end at once.
        awaited = [lane for lane in list(self._lanes.values()) if lane.is_awaited(self._leaving)]
        return bool(awaited)

    def _wake_leavers(self) -> None:
        with self._idle:
            self._idle.notify_all()

    def _let_go(self) -> None:
        deadline = time.monotonic() + self.provider.leave
        try:
            self._state = "closed"
            self._core.close()
            # Calls of Parallel are told on their own threads, which end when the input lets them.
            if not self._futures.join(LEAVE):
                log.warning("a callback of a future has not returned, and is left alone")
            self._printer.join(LEAVE)
        finally:
            before = self.provider.cost(self._machines)
            self.provider.stop(self._machines, max(0.5, deadline - time.monotonic()))
            for starter in self._starters:
                # What they wait for has ended with the core.
                starter.join(max(0.5, deadline - time.monotonic()))
            cost = self.provider.cost(self._machines)
            if cost is not None and before is not None:
                log.info("this pool's nodes cost about $%.4f, at last $%.4f/h", cost.total, before.hourly)
            self._ignore_signals()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Close the pool, as `Executor.shutdown`.

        With `wait=False` this returns at once and the nodes are let go when the pending futures are done. So it does
        when a future's callback calls it: the thread that runs callbacks cannot wait for further futures.
        """
        if wait and not self._settles():
            self._leave(cancel_futures)
            return
        self._give_up |= cancel_futures
        if self._begin_to_leave():
            self._unwind()
            threading.Thread(target=self._finish, name="skyward-shutdown").start()

    # ------------------------------------------------------------------------------------------------ tasks

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `fn(*args, **kwargs)` on some worker.

        Raises at once what pickling the call raises; nothing is sent then. The future raises what `fn` raised, with
        the remote traceback as its `__cause__`; `WorkerCrashedError` if its process died, `NodeLostError` if its
        node went away too often.
        """
        return self._future(*self._encode_call(fn, args, kwargs))

    def _submit_chunk(self, fn: Callable[..., T], chunk: tuple[tuple[Any, ...], ...], first: int) -> Future[list[T]]:
        """Run `fn` over a chunk of arguments, as a batch: each call is a task's to plugins and to the time limit."""
        self._check_submit()
        encoded = self._encode_batch([(fn, args, {}) for args in chunk])
        return self._future(*encoded, kind=payload.BATCH, first=first, calls=len(chunk))

    def _encode_call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> payload.Encoded:
        self._check_submit()
        return self._encode(fn, args, kwargs)

    def _check_submit(self) -> None:
        self._printer.call_made()
        if self._state != "open":
            raise PoolClosedError(
                "this pool has not started: use it as `with sky.pool(...) as pool:`"
                if self._state == "new"
                else f"this pool is {self._state}: submit inside its with block"
            )

    def _future(
        self,
        pickled: bytes,
        buffers: payload.Buffers,
        node: int | None = None,
        kind: int = payload.CALL,
        first: int | None = None,
        calls: int = 1,
    ) -> Future[Any]:
        """Send an encoded call, to the node of that number or to whichever is free; its future."""
        future: _PoolFuture[Any] = _PoolFuture(self, first)
        future._task = self._futures.send(future, kind, pickled, buffers, node, calls)
        return future

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
        chunksize = checks.whole("map", "chunksize", chunksize, 1, sys.maxsize)
        if buffersize is not None:
            buffersize = checks.whole("map", "buffersize", buffersize, 1, sys.maxsize, "None for all results")
        deadline = None if timeout is None else time.monotonic() + timeout
        calls = zip(*iterables, strict=False)
        chunks: Iterator[tuple[tuple[Any, ...], ...]] = iter(lambda: tuple(itertools.islice(calls, chunksize)), ())
        ahead = None if buffersize is None else max(1, buffersize // chunksize)
        firsts = itertools.count(0, chunksize)

        def submit(chunk: tuple[tuple[Any, ...], ...]) -> Future[list[T]]:
            return self._submit_chunk(fn, chunk, next(firsts))

        pending = collections.deque(map(submit, itertools.islice(chunks, ahead)))

        def results() -> Iterator[T]:
            try:
                while pending:
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    values = pending[0].result(left)
                    pending.popleft()
                    for chunk in itertools.islice(chunks, 1):
                        pending.append(submit(chunk))
                    yield from values
            finally:
                for future in pending:
                    # Without waiting for each.
                    assert isinstance(future, _PoolFuture)
                    self._futures.cancel(future._task)

        return results()

    def nodes(self) -> list[Node]:
        """Say how each node stands, in the order in which they were started."""
        return [Node(**row) for row in self._core.nodes()]

    def slots(self) -> int:
        """Count the tasks that can run at once: the sum of `concurrency` over the ready nodes."""
        return sum(node.slots for node in self.nodes() if node.state == "ready")

    def status(self) -> Status:
        """Say how the pool stands, and what it costs."""
        pending = sum(len(lane.calls) for lane in list(self._lanes.values()))
        return Status(self.nodes(), self.slots(), pending, self.provider.cost(self._machines))

    def _is_pending(self, task: int) -> bool:
        lane = self._lanes.get(task >> _core.QUEUE_SHIFT)
        return lane is not None and task in lane.calls

    def _wanted_slots(self) -> int:
        """Count the slots of the ready nodes, and those that nodes on their way will probably have."""
        nodes = self.nodes()
        ready = [node.slots for node in nodes if node.state == "ready"]
        usual = self.worker.concurrency or max(ready, default=1)
        late = [m.concurrency or usual for m, n in zip(self._machines, nodes, strict=False) if n.state == "connecting"]
        return sum(ready) + sum(late)

    def _encode(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> payload.Encoded:
        self._check_open()
        encoder = self._encoder()
        before = self._modules.begin()
        try:
            return encoder.dumps(self._modules.with_path((fn, args, kwargs)))
        except Exception as error:
            blame.explain(error, blame.of_calls([(fn, args, kwargs)]), encoder)
            modules.explain(error)
            raise
        finally:
            modules.end(before)

    def _encode_batch(
        self,
        calls: Sequence[payload.Triple],
        shared: Shared | None = None,
        threads: int | None = None,
        nanos: int | None = None,
    ) -> payload.Encoded:
        self._check_open()
        encoder = self._encoder()
        if shared is not None and threads is nanos is None and payload.is_small(calls, shared):
            # Nothing in it asks which modules the workers have, or can fail to be pickled.
            return encoder.dumps(self._modules.with_path(calls), None, 1, shared.functions)
        before = self._modules.begin()
        try:
            return encoder.dump_calls(calls, shared, threads, nanos)
        except Exception as error:
            blame.explain(error, blame.of_calls(calls), encoder)
            modules.explain(error)
            raise
        finally:
            modules.end(before)

    def _check_open(self) -> None:
        """Raise `PoolClosedError` where no task can be sent. A pool that is being left still takes joblib's."""
        if self._state == "closed":
            raise PoolClosedError(CLOSED)
        self._core.check_owner()

    def _encoder(self) -> payload.Encoder:
        return payload.encoder(self.worker.max_payload, self._route)

    def _open_queue(self, abandon: AbandonHook) -> CompletionQueue:
        """Give a lane of its own to what must not hold up, or be held up by, what else is submitted."""
        self._check_open()
        self._printer.call_made()
        numbers = (1 + number % (LANES - 1) for number in self._lane_numbers)
        lane = CompletionQueue(self, next(number for number in numbers if number not in self._lanes), abandon)
        lane.start()
        return lane


def _hash_seed(run: str) -> str:
    """Return what all workers of a pool have as PYTHONHASHSEED, so that the order of a set is the same in all of them.

    It is this process's own, if it was started with one.
    """
    own = os.environ.get("PYTHONHASHSEED", "")
    # 0 would mean no randomization at all; the interpreter takes numbers below 2 ** 32.
    return own if own.isdecimal() else str(int(run[:8], 16) or 1)


def _imported(modules: Iterable[str]) -> dict[str, str]:
    """Give the distributions of which something is among the modules: normalized name → version."""
    # Not at the module's top: only nodes with an environment of their own need to know.
    from importlib import metadata

    with _reading:
        homes = _distributions()
    names = {name for module in modules for name in homes.get(module, ())} | {"cloudpickle"}
    return {canonical(name): metadata.version(name) for name in names if canonical(name) != "skyward-lite"}


_reading = threading.Lock()
"""Held while the distributions are read: all nodes ask at once, and one of them does it for all."""


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    from importlib import metadata

    # It reads a file or more for each distribution there is.
    return metadata.packages_distributions()


def _check_types(provider: object, worker: object, image: object, plugins: Any) -> None:
    """Raise `TypeError` for what is not what its parameter takes, with what was probably meant."""
    if provider is not None and not isinstance(provider, Provider):
        shown = credentials.mask(repr(provider))
        raise TypeError(f"pool(provider={shown}): a provider, such as sky.Local(nodes=2) or sky.SSH('me@lab1')")
    if worker is not None and not isinstance(worker, Worker):
        raise TypeError(f"pool(worker={worker!r}): a sky.Worker, such as sky.Worker(concurrency=4)")
    if image is not None and not isinstance(image, Image):
        raise TypeError(f"pool(image={credentials.mask(repr(image))}): a sky.Image, such as sky.Image(pip=['numpy'])")
    several = plugins is None or isinstance(plugins, Sequence)
    if not several or not all(isinstance(plugin, Plugin) for plugin in plugins or ()):
        raise TypeError(f"pool(plugins={plugins!r}): a list of plugins, such as [sky.plugins.joblib()]")


def _default_plugin() -> Plugin:
    return plugins.joblib()


def _node_counts(nodes: int | tuple[int, int] | None, provider: Provider) -> tuple[int, int]:
    """Give (minimum, wanted)."""
    if nodes is None:
        nodes = provider.nodes or 1
    counts = nodes if isinstance(nodes, tuple) and len(nodes) == 2 else (nodes, nodes)
    either = "two: (least, wanted)"
    least, wanted = (checks.whole("pool", "nodes", count, 1, checks.MAX_NODES, either) for count in counts)
    if provider.nodes is not None and wanted != provider.nodes:
        raise ValueError(f"pool(nodes={nodes}) and {provider!r} disagree: say the number of nodes once")
    if least > wanted:
        raise ValueError(f"pool(nodes={nodes}): (least, wanted) with least <= wanted")
    return least, wanted


_open_pools: weakref.WeakSet[ComputePool] = weakref.WeakSet()


@atexit.register
def _close_open_pools() -> None:
    for open_pool in list(_open_pools):
        if not open_pool._core.is_forked:
            open_pool._leave(cancel=True)


def pool(
    provider: Provider | None = None,
    nodes: int | tuple[int, int] | None = None,
    *,
    vcpus: int | None = None,
    memory_gb: float | None = None,
    worker: Worker | None = None,
    image: Image | None = None,
    plugins: Sequence[Plugin] | None = None,
    lease: float = 60.0,
    connect_timeout: float = 20.0,
    start_timeout: float = 600.0,
    strict_env: bool = False,
) -> ComputePool:
    """Make a pool; `with pool(...) as p:` starts its nodes and makes it joblib's default backend.

    `provider`: where nodes come from; `Local()` by default.
    `nodes`: how many; `(least, wanted)` starts as soon as `least` are ready, the others join.
    `vcpus`, `memory_gb`: what each node must have at least, where the provider chooses machines by size; `Local()` and
    hosts that exist already are used as they are.
    `worker`: how each node runs tasks. `image`: what its environment must have.
    `plugins`: `[plugins.joblib()]` by default.
    `lease`: seconds for which a node goes on working without hearing from this process.
    `connect_timeout`: seconds for connection, key exchange and authentication of one node.
    `start_timeout`: seconds until the least number of nodes must be ready.
    `strict_env`: whether a node is left out that lacks a distribution of which this process has imported something, or
    has it in another version; otherwise that is a warning in the log.

    Raises `NodeStartError` on entry if too few nodes become ready, `ValueError` for parameters out of range.
    """
    return ComputePool(
        provider,
        nodes,
        vcpus=vcpus,
        memory_gb=memory_gb,
        worker=worker,
        image=image,
        plugins=plugins,
        lease=lease,
        connect_timeout=connect_timeout,
        start_timeout=start_timeout,
        strict_env=strict_env,
    )
