"""The machines of a pool: they become nodes, are watched, brought back or replaced, and released.

Each machine has a thread of its own until it is a node or has failed, and while it is away or is replaced.
One more thread, `skyward-watch`, looks what becomes of the nodes: it has that written into the log (`node_log.py`),
those that are away brought back (`returning.py`), and lost ones replaced.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .. import _core
from ..errors import NodeStartError
from ..hello import ClientHello
from ..image import Image
from ..providers import Cost, Machine, NodeRequest
from .comparison import Comparison
from .display import Display
from .lifecycle import Lifecycle, Stage
from .node_log import NodeLog
from .node_state import Node, NodeState, Status, ready_slots
from .returning import Returning
from .settings import Settings

log = logging.getLogger("skyward_lite")

WATCH_MS = 1_000
"""Bound on one wait for a change of any node's state; closing the pool wakes the waiting thread at once."""
START_POLL_MS = 50
"""Bound on one wait for nodes while the pool starts, so that Ctrl-C is handled between two waits."""
SHOWN_NAMES = 3
"""So many names of nodes that wait for the same are shown."""
REPLACEMENTS_PER_NODE = 3
"""Machines that a pool may ask for in the place of lost and failed ones, for each node that it wants."""
MAX_REASON = 16_000
"""Bytes of the reason why a node does not start."""
MIN_RELEASE_SECONDS = 0.5
"""What the provider gets to release its machines, however long the steps of leaving before that took."""


MAX_CHANGES = 100_000
"""Changes of nodes' states that are kept, the latest ones."""


class NodeChange(NamedTuple):
    """A node came into a state, at this Unix time, and had so many slots then."""

    number: int
    state: str
    since: float
    slots: int


class Nodes:
    """The machines of one pool, and what they are as nodes.

    `has_waiters()` returns whether anybody still waits for tasks while the pool is being left.
    """

    def __init__(
        self,
        core: _core.Core,
        settings: Settings,
        lifecycle: Lifecycle,
        has_waiters: Callable[[], bool],
        display: Display,
    ) -> None:
        self.machines: list[Machine] = []
        """All that were started, also those that were left out or lost. A node's number is its place in here."""
        self._core = core
        self._settings = settings
        self._lifecycle = lifecycle
        self._has_waiters = has_waiters
        self.changes: collections.deque[NodeChange] = collections.deque(maxlen=MAX_CHANGES)
        """What has become of the nodes; appended by the thread that watches them."""
        self._greet: Callable[[Machine], ClientHello]
        """Returns what a machine's agent is told first; set by `start`."""
        self._lock = threading.Lock()
        """Guards the fields below and the order of `machines`."""
        self._threads: list[threading.Thread] = []
        """Those that start and replace machines; joined when the pool is left."""
        self._expected = 0
        """Replacements that were asked for and are not in `machines` yet."""
        self._replacements = 0
        """Replacements that were asked for since the pool was started."""
        self._given_up: set[int] = set()
        """Numbers of the draining, lost and failed nodes for which it was decided whether they are replaced."""
        self._undecided: set[int] = set()
        """Numbers of the nodes that were never ready and, if they fail, are perhaps replaced: tasks wait for that."""
        self._returning = Returning(core, self._begin_session, self._start_thread, lifecycle)
        self._log = NodeLog(core, settings.start_timeout)
        self._display = display
        self.comparison = Comparison(core, self.machines, settings.strict_env)

    def start(self, image: Image, greet: Callable[[Machine], ClientHello]) -> Sequence[Machine]:
        """Start the machines, each of which becomes a node in its own time, and watch them from now on. Return them.

        Raise what the provider raises; the machines that it had begun to start then are in `self.machines`.
        """
        self._greet = greet
        self._start_thread("skyward-watch", self._watch)
        settings = self._settings
        request = NodeRequest(
            nodes=settings.wanted_nodes,
            least=settings.min_nodes,
            image=image,
            vcpus=settings.vcpus,
            memory_gb=settings.memory_gb,
            connect_timeout=settings.connect_timeout,
            start_timeout=settings.start_timeout,
        )
        machines: list[Machine] = []
        try:
            settings.provider.start(request, machines)
            self.join(machines)
        except BaseException:
            # Each machine that was started must be released, whether or not it became a node.
            self.machines += [machine for machine in machines if machine not in self.machines]
            raise
        finally:
            if self._lifecycle.stage >= Stage.RELEASING:
                # Another thread closes the pool, and may have released its machines before these were among them.
                settings.provider.stop(machines, settings.provider.leave)
        return machines

    def join(self, machines: list[Machine]) -> None:
        """Add machines to the pool, and begin to make nodes of them."""
        with self._lock:
            for machine in machines:
                self.machines.append(machine)
                number = self._core.add_node(machine.name, machine.returns or machine.replaceable)
                if machine.replaceable:
                    self._undecided.add(number)
                    self._tell_expected()
                self._start_thread(f"skyward-{machine.name}", self._bring_up, number, machine)

    def _start_thread(self, name: str, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        # Those that have ended need not be waited for.
        self._threads[:] = [other for other in self._threads if other.is_alive()]
        thread.start()
        self._threads.append(thread)

    def _bring_up(self, number: int, machine: Machine) -> None:
        """Make a node of one machine. An error becomes the reason for which the node is left out."""
        core = self._core
        try:
            self._begin_session(number, machine)
        except (NodeStartError, _core.CoreError, OSError) as error:
            core.fail_node(number, _core.printable(str(error), MAX_REASON))
        except BaseException as error:
            core.fail_node(number, _core.printable(f"{type(error).__name__}: {error}", MAX_REASON))
            # While the pool is being closed its machines may end as they are opened, so any exception is expected then.
            if self._lifecycle.stage is Stage.OPEN:
                raise

    def _tell_expected(self) -> None:
        """Tell the core how many replacements are, or may be, on their way. The lock must be held."""
        self._core.expect(self._expected + len(self._undecided))

    def _begin_session(self, number: int, machine: Machine) -> None:
        """Open a machine and begin a session with its agent. Raise `NodeStartError`, `CoreError` or `OSError`."""
        opened = machine.open(self._core)
        machine.doing = "starting its workers"
        greeting = self._greet(machine)
        self._core.start_node(
            number,
            opened.connection,
            opened.command,
            greeting,
            self._settings.start_timeout,
            stripe=opened.stripe,
            again=opened.again,
        )

    def await_ready(self) -> None:
        """Wait until the least number of nodes is ready.

        Raise `NodeStartError` when too few can still become ready, or after `start_timeout`.
        """
        needed = self._settings.min_nodes
        deadline = time.monotonic() + self._settings.start_timeout
        while True:
            with self._lock:
                nodes, candidates = self.snapshot(), self._expected
                for number, node in enumerate(nodes):
                    machine = self.machines[number]
                    starts = node.state in (NodeState.READY, NodeState.CONNECTING)
                    starts = starts or self._returning.is_away(number, node.state, machine)
                    # Until `_on_node_change` has decided otherwise, a failed machine may still be replaced.
                    candidates += starts or (machine.replaceable and number not in self._given_up)
            if sum(node.state == NodeState.READY for node in nodes) >= needed:
                return
            if candidates < needed or time.monotonic() > deadline:
                reasons = _reasons(nodes)
                # After a reason of several lines the next node begins on a line of its own.
                shown = ("\n" if any("\n" in reason for reason in reasons) else "; ").join(reasons)
                nodes_are = "ready node is" if needed == 1 else "ready nodes are"
                ready = sum(node.state == NodeState.READY for node in nodes)
                less = f"pool(nodes=({ready}, {self._settings.wanted_nodes})) starts with those that are ready"
                more = f"pool(start_timeout={self._settings.start_timeout:g}) is over, a longer one waits on"
                hints = [more] * (candidates >= needed) + [less] * (ready > 0)
                shown += ("\n" if "\n" in shown else ". ") + "; ".join(hints) if hints else ""
                raise NodeStartError(f"{needed} {nodes_are} needed, but {shown}")
            self._core.wait_for_change([node.state for node in nodes], START_POLL_MS)

    def snapshot(self) -> list[Node]:
        """Return how each node stands, in the order in which they were started."""
        rows = self._core.nodes()
        for row, machine in zip(rows, self.machines, strict=False):
            if row["state"] == NodeState.CONNECTING:
                row["reason"] = machine.doing
        return [Node(**row) for row in rows]

    def status(self) -> Status:
        """Return how the pool stands, and what it costs."""
        nodes, totals = self.snapshot(), self._core.totals()
        running = sum(node.running for node in nodes)
        if self._lifecycle.stage is Stage.CLOSED:
            totals["seconds"] -= time.monotonic() - self._lifecycle.reached[Stage.CLOSED]
        return Status(
            nodes=nodes,
            slots=ready_slots(nodes),
            cost=self.cost(),
            running=running,
            queued=max(0, totals["pending"] - running),
            bytes_sent=sum(node.bytes_sent for node in nodes),
            bytes_received=sum(node.bytes_received for node in nodes),
            **totals,
        )

    def slots(self) -> int:
        """Return the number of tasks that can run at once: the sum of the ready nodes' slots."""
        return ready_slots(self.snapshot())

    def wanted_slots(self) -> int:
        """Return the number of the ready nodes' slots, and of those that other nodes will probably have.

        Counted are nodes that are connecting, and those that are away and are expected back.
        """
        nodes = self.snapshot()
        ready = [node.slots for node in nodes if node.state == NodeState.READY]
        usual = self._settings.worker.concurrency or max(ready, default=1)
        wanted = sum(ready)
        for number, (machine, node) in enumerate(zip(self.machines, nodes, strict=False)):
            if node.state == NodeState.CONNECTING or self._returning.is_away(number, node.state, machine):
                wanted += node.slots or machine.concurrency or usual
        return wanted

    def cost(self) -> Cost | None:
        """Return what the machines cost; None if they cost nothing, or their price is not known."""
        return self._settings.provider.cost(self.machines)

    def _watch(self) -> None:
        """Have all that is to be done for the nodes begun, and the log written, until the pool is closed."""
        before: dict[int, str] = {}
        while self._lifecycle.stage < Stage.RELEASING:
            nodes = self.snapshot()
            for number, node in enumerate(nodes):
                old, before[number] = before.get(number, NodeState.CONNECTING), node.state
                if node.state == old:
                    continue
                self.changes.append(NodeChange(number, node.state, node.since, node.slots))
                if old == NodeState.CONNECTING and node.slots and node.state != NodeState.READY:
                    # The node has greeted, so it was ready for a moment between two looks.
                    old = NodeState.READY
                if number < len(self.machines):
                    self._on_node_change(number, old, node.state)
                self._log.changed(number, node, old)
                self._display.node_changed(node, old)
                if node.state == NodeState.READY:
                    self.comparison.ready(number)
            with self._lock:
                machines = [*self.machines]
                if self._lifecycle.stage < Stage.RELEASING:
                    self._returning.attend(nodes, machines)
            self._log.waiting(nodes, [self._returning.why(number) for number in range(len(nodes))])
            # Without a node nothing ends the wait when the pool is closed.
            self._core.wait_for_change([node.state for node in nodes], WATCH_MS if nodes else START_POLL_MS)

    def _on_node_change(self, number: int, old: str, new: str) -> None:
        """Have a machine that is draining or lost replaced and a lost one released, on a thread of its own."""
        machine = self.machines[number]
        if not machine.replaceable or new not in (NodeState.READY, NodeState.DRAINING, NodeState.LOST):
            return
        with self._lock:
            stage = self._lifecycle.stage
            self._undecided.discard(number)
            # While the pool is being left, only tasks that somebody waits for need a replacement.
            is_left = stage is not Stage.OPEN and (stage is not Stage.DRAINING or not self._has_waiters())
            first = number not in self._given_up
            if is_left or new == NodeState.READY:
                self._tell_expected()
                return
            if first:
                self._given_up.add(number)
                self._expected += 1
            self._tell_expected()
            name = f"skyward-after-{machine.name}"
            self._start_thread(name, self._replace_machine, number, old, new, first)

    def _replace_machine(self, number: int, old: str, new: str, first: bool) -> None:
        """Release a machine that is lost. Have it replaced if `first`: a node may be draining first and lost later."""
        provider, machine = self._settings.provider, self.machines[number]
        try:
            # Asked before the release: afterwards the provider no longer knows why the machine never became a node.
            wanted = first and (old != NodeState.CONNECTING or machine.failed_transiently())
            if new == NodeState.LOST:
                provider.retire(machine)
            if wanted and (machine.ended_as_planned() or self._may_replace()):
                replacements: list[Machine] = []
                provider.replace(machine, replacements)
                log.info("node %s is replaced by %s", machine.name, ", ".join(m.name for m in replacements))
                self.join(replacements)
        except (NodeStartError, OSError) as error:
            if self._lifecycle.stage < Stage.RELEASING:
                log.warning("node %s is not replaced: %s", machine.name, error)
        finally:
            if first:
                with self._lock:
                    self._expected -= 1
                    self._tell_expected()
                # Tasks have waited for this: from now on another node is there for them, or none will be.
                self._core.give_up(number)

    def _may_replace(self) -> bool:
        with self._lock:
            self._replacements += 1
            return self._replacements <= REPLACEMENTS_PER_NODE * self._settings.wanted_nodes

    def release(self, deadline: float) -> None:
        """Release all machines, and wait for the threads that start and replace them, until `time.monotonic()`'s value.

        The core must have been closed before: what these threads wait for has ended then.
        """
        self._returning.leave()
        provider = self._settings.provider
        before = self.cost()
        provider.stop(self.machines, max(MIN_RELEASE_SECONDS, deadline - time.monotonic()))
        for thread in self._threads:
            thread.join(max(MIN_RELEASE_SECONDS, deadline - time.monotonic()))
        cost = self.cost()
        if cost is not None and before is not None:
            log.info("this pool's nodes cost about $%.4f, at last $%.4f/h", cost.total, before.hourly)


def _reasons(nodes: Sequence[Node]) -> list[str]:
    """Return how the nodes stand, for people; nodes that wait for the same, such as a full queue, share a text."""
    names: dict[tuple[str, int | None], list[str]] = {}
    for number, node in enumerate(nodes):
        alike = node.state == NodeState.CONNECTING and "\n" not in node.reason
        text = f"is {node.state}" + (f": {node.reason}" if node.reason else "")
        names.setdefault((text, None if alike else number), []).append(node.name)
    reasons = []
    for (text, _), those in names.items():
        if len(those) > SHOWN_NAMES:
            those[SHOWN_NAMES - 1 :] = [f"{len(those) - SHOWN_NAMES + 1} more"]
        each = f"each of {', '.join(those[:-1])} and {those[-1]}" if those[1:] else those[0]
        reasons.append(f"{each} {text}")
    return reasons
