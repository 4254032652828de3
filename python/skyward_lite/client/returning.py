"""Nodes that are away: their connections are made anew, and machines that were lost are opened again.

reconnecting   the connection was cut: `machine.reconnect` → `core.resume_node`, until the node is in another state
lost           of a machine that `returns`: `machine.open` → `core.start_node`, for as long as the pool lives

A node that is away has one thread, `skyward-back-NAME`, which ends when the node is in another state.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from .. import _core
from ..backoff import Backoff
from ..errors import NodeStartError
from ..providers import Machine, MachineGoneError
from .lifecycle import Lifecycle, Stage
from .node_state import Node, NodeState

log = logging.getLogger("skyward_lite")

RECONNECT_SECONDS = (0.2, 15.0)
"""First and longest pause between attempts to connect to a node whose connection was cut."""
OPEN_SECONDS = (1.0, 60.0)
"""First and longest pause before attempts to open a machine that was lost."""
DRAINED_SECONDS = 30.0
"""Pause before the first attempt to open a machine that had announced that it will be gone: it may not be gone yet, and
would take tasks into its end. Pods and containers get 30 s at most to end, unless they are told otherwise."""
PERMANENT_SECONDS = 60.0
"""Pause after a failure that time alone does not mend. A server may ban an address for a while after a few of them."""
MAX_PERMANENT = 3
"""After so many of them a machine that was lost is given up."""
MAX_STARTS = 4
"""How often a machine that never was a node is opened again whose connection is cut as it begins to be one."""
SAME_SECONDS = 0.05
"""Moments that are not further apart are the same moment."""
JITTER = (0.5, 1.5)
"""A pause is multiplied by a random number between these: nodes that were cut at once do not come back at once."""


class Returning:
    """The nodes of one pool that are away.

    `start(number, machine)` opens a machine and begins a session. `start_thread` starts a thread that is waited for
    when the pool is left.
    """

    def __init__(
        self,
        core: _core.Core,
        start: Callable[[int, Machine], None],
        start_thread: Callable[..., None],
        lifecycle: Lifecycle,
    ) -> None:
        self._core = core
        self._start = start
        self._start_thread = start_thread
        self._lifecycle = lifecycle
        self._changed = threading.Condition()
        """Guards the fields below. Notified when a node's state has changed, and when the pool is left."""
        self._states: dict[int, tuple[str, float]] = {}
        """The state of each node, and since when it has it, as any thread has seen it last."""
        self._attended: dict[int, tuple[str, float]] = {}
        """The nodes that have a thread, and in which state their thread has seen them last."""
        self._backoffs: dict[int, Backoff] = {}
        """The pauses before attempts to open the machines that were lost, until they are ready."""
        self._permanent: dict[int, int] = {}
        """How often each of these has failed for a reason that time alone does not mend."""
        self._drained: set[int] = set()
        """The nodes that announced that they will be gone, until they are opened again."""
        self._was_ready: set[int] = set()
        """The nodes that were ready at any time."""
        self._starts: dict[int, int] = {}
        """How often each of the others was opened again."""
        self._left = False
        """Set when the core has been closed: no connection can be made any more."""
        self._why: dict[int, str] = {}
        """Why the last attempt to reach each node failed, until it is ready. The log has each reason once."""

    # ------------------------------------------------------------------------------------------------ watching

    def attend(self, nodes: Sequence[Node], machines: Sequence[Machine]) -> None:
        """Note how the nodes stand, and start a thread for each that is away and has none."""
        with self._changed:
            for number, (node, machine) in enumerate(zip(nodes, machines, strict=False)):
                self._states[number] = node.state, node.since
                if node.state == NodeState.DRAINING:
                    self._drained.add(number)
                if node.state == NodeState.READY:
                    self._was_ready.add(number)
                    for memory in (self._backoffs, self._permanent, self._why):
                        memory.pop(number, None)
                elif self.is_away(number, node.state, machine) and number not in self._attended:
                    try:
                        self._start_thread(f"skyward-back-{machine.name}", self._bring_back, number, machine)
                    except RuntimeError as error:
                        # This process has too many threads. The next look tries again.
                        self._note_failure(number, machine, error)
                        continue
                    self._attended[number] = self._states[number]
            self._changed.notify_all()

    def leave(self) -> None:
        """End the threads, now that the core has been closed."""
        with self._changed:
            self._left = True
            self._changed.notify_all()

    def is_away(self, number: int, state: str, machine: Machine) -> bool:
        """Return whether a node that is not ready is to be ready again, and something can be done for it."""
        if state == NodeState.RECONNECTING:
            return True
        return state == NodeState.LOST and machine.returns and self._core.returns(number)

    def why(self, number: int) -> str:
        """Return why the last attempt to reach a node failed; empty if none did since it was ready."""
        return self._why.get(number, "")

    # ------------------------------------------------------------------------------------------------ a node's thread

    def _bring_back(self, number: int, machine: Machine) -> None:
        """Try to reach a node until it is in a state in which nothing is to be done."""
        try:
            while True:
                seen = self._now(number)
                if not self.is_away(number, seen[0], machine) or self._is_over(seen[0]):
                    return
                with self._changed:
                    # The watching thread may not have seen this state yet.
                    self._states[number] = self._attended[number] = seen
                if seen[0] == NodeState.RECONNECTING:
                    self._reconnect(number, machine)
                elif self._await_attempt(number, machine) and self._may_start(number, machine):
                    self._open(number, machine)
        except Exception:
            # What becomes of the machines while the pool is being closed may break anything here.
            if not self._is_over():
                raise
        finally:
            with self._changed:
                self._attended.pop(number, None)

    def _reconnect(self, number: int, machine: Machine) -> None:
        """Make connections to a node whose connection was cut, until it has one or is in another state."""
        backoff = self._new_backoff(number, *RECONNECT_SECONDS)
        # Also while the pool is being left: an agent that hears no goodbye goes on until its lease ends.
        while not self._left:
            try:
                self._core.resume_node(number, machine.reconnect(self._core))
                return
            except MachineGoneError as error:
                self._core.fail_node(number, _core.printable(str(error)))
                return
            except (NodeStartError, _core.CoreError, OSError) as error:
                if not is_same(self._now(number), self._attended[number]):
                    return
                self._note_failure(number, machine, error)
                if not backoff.pause(PERMANENT_SECONDS if is_permanent(error) else None):
                    return

    def _await_attempt(self, number: int, machine: Machine) -> bool:
        """Wait before a machine that was lost is opened again. Return False if it is not to be opened any more."""
        is_drained = number in self._drained
        self._drained.discard(number)
        if is_drained and machine.may_linger:
            # The pauses after it begin as small as ever: the machine may come back at any moment then.
            return self._new_backoff(number, DRAINED_SECONDS, DRAINED_SECONDS).pause()
        return self._backoff_of(number).pause()

    def _may_start(self, number: int, machine: Machine) -> bool:
        """Return whether a machine is to be opened again; give it up if it never was a node in several attempts."""
        if number in self._was_ready:
            return True
        self._starts[number] = self._starts.get(number, 0) + 1
        if self._starts[number] <= MAX_STARTS:
            return True
        self._why.setdefault(number, "its connection is cut whenever it begins to be a node")
        self._give_up(number, machine)
        return False

    def _open(self, number: int, machine: Machine) -> None:
        """Try once to open a machine that was lost, and to begin a session there."""
        try:
            self._start(number, machine)
        except (NodeStartError, _core.CoreError, OSError) as error:
            self._note_failure(number, machine, error)
            if isinstance(error, MachineGoneError):
                self._give_up(number, machine)
            elif is_permanent(error):
                self._permanent[number] = self._permanent.get(number, 0) + 1
                if self._permanent[number] >= MAX_PERMANENT:
                    self._give_up(number, machine)

    def _give_up(self, number: int, machine: Machine) -> None:
        if not self._is_over():
            log.warning("node %s is given up: %s", machine.name, self._why.get(number))
            self._core.give_up(number)

    def _note_failure(self, number: int, machine: Machine, error: Exception) -> None:
        """Write into the log why a node could not be reached, unless that is what the log says last."""
        why = _core.printable(str(error))
        if self._why.get(number) != why and not self._is_over():
            self._why[number] = why
            level = logging.WARNING if is_permanent(error) else logging.INFO
            log.log(level, "node %s cannot be reached yet: %s", machine.name, why)

    # ------------------------------------------------------------------------------------------------ pauses

    def _is_over(self, state: str = NodeState.LOST) -> bool:
        """Return whether nothing is to be done any more for a node in this state, because the pool is being left."""
        return self._left or (state != NodeState.RECONNECTING and self._lifecycle.stage >= Stage.CANCELLING)

    def _now(self, number: int) -> tuple[str, float]:
        row = self._core.nodes()[number]
        return row["state"], row["since"]

    def _new_backoff(self, number: int, first: float, longest: float) -> Backoff:
        """Return pauses that end early when the node is no longer as its thread has seen it."""
        return Backoff(first, factor=2.0, longest=longest, jitter=JITTER, sleep=lambda s: self._sleep(number, s))

    def _backoff_of(self, number: int) -> Backoff:
        """Return the pauses before a lost machine is opened: they go on growing until the node is ready."""
        if number not in self._backoffs:
            self._backoffs[number] = self._new_backoff(number, *OPEN_SECONDS)
        return self._backoffs[number]

    def _sleep(self, number: int, seconds: float) -> bool:
        """Wait until the node is in another state, at most `seconds`. Return whether it is."""

        def has_changed() -> bool:
            seen = self._attended[number]
            return self._is_over(seen[0]) or not is_same(self._states[number], seen)

        with self._changed:
            return self._changed.wait_for(has_changed, seconds)


def is_same(state: tuple[str, float], other: tuple[str, float]) -> bool:
    """Return whether a node has not changed its state between two looks. Its time is as exact as the clock is even."""
    return state[0] == other[0] and abs(state[1] - other[1]) < SAME_SECONDS


def is_permanent(error: Exception) -> bool:
    """Return whether time alone does not mend a failure to connect: the host refuses us, or is not the host."""
    causes = (error, error.__cause__)
    return any(isinstance(cause, _core.AuthenticationError | _core.HostKeyError) for cause in causes)
