"""What the log says of a pool's nodes: each change of a node's state, and each minute what tasks wait for."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from .. import _core
from .figures import count
from .node_state import Node, NodeState

log = logging.getLogger("skyward_lite")

WAITING_SECONDS = 60.0
"""Between two lines of the log that say what tasks wait for."""


class NodeLog:
    """The log of one pool's nodes. Used by the thread that watches them."""

    def __init__(self, core: _core.Core, start_timeout: float) -> None:
        self._core = core
        self._start_timeout = start_timeout
        self._once_ready: set[int] = set()
        self._lost_since: dict[int, float] = {}
        """Since when (Unix time) each node is lost, attempts to start it anew included, until it is ready."""
        self._none_since: float | None = None
        """Since when (`time.monotonic`) no node is usable while tasks wait; None while one is, or no task waits."""
        self._next_line = 0.0
        """When the log is to say so next."""

    def changed(self, number: int, node: Node, old: str) -> None:
        """Write that a node's state is another than `old`."""
        if node.state == NodeState.LOST:
            self._lost_since.setdefault(number, node.since)
        elif node.state != NodeState.CONNECTING:
            self._lost_since.pop(number, None)
        if node.state == NodeState.READY:
            self._log_ready(number, node, old)
            self._once_ready.add(number)
        elif node.state == NodeState.RECONNECTING:
            log.warning("node %s: its connection was cut, what runs there goes on: %s", node.name, node.reason)
        elif node.state == NodeState.DRAINING:
            log.warning(
                "node %s takes no more tasks, what it has not started runs elsewhere: %s", node.name, node.reason
            )
        elif node.state == NodeState.LOST and old == NodeState.CONNECTING:
            left_out = "did not come back" if number in self._once_ready else "is left out"
            log.warning("node %s %s: %s", node.name, left_out, node.reason)
        elif node.state == NodeState.LOST:
            self._once_ready.add(number)
            if node.reason.startswith(_core.LAST_TASK_DONE):
                log.info("node %s has left: %s", node.name, node.reason)
                return
            log.warning("node %s is lost, what it had not finished runs elsewhere: %s", node.name, node.reason)

    def _log_ready(self, number: int, node: Node, old: str) -> None:
        if old == NodeState.RECONNECTING:
            log.info("node %s is connected again", node.name)
            return
        again = " again" if number in self._once_ready else ""
        log.info("node %s is ready%s with %s", node.name, again, count(node.slots, "slot"))
        for notice in self._core.notices(number) or ():
            log.warning("node %s: %s", node.name, notice)

    def waiting(self, nodes: Sequence[Node], failures: Sequence[str]) -> None:
        """Write each minute that tasks wait and no node is usable. `failures`: why each could not be reached last."""
        now = time.monotonic()
        usable = any(node.state in (NodeState.READY, NodeState.DRAINING) for node in nodes)
        if usable or not self._core.counts()[0]:
            self._none_since = None
            return
        if self._none_since is None:
            self._none_since, self._next_line = now, now + WAITING_SECONDS
        if now < self._next_line:
            return
        self._next_line = now + WAITING_SECONDS
        log.warning("no node is usable, and tasks wait: %s. %s", self._shown(nodes, failures), self._until(nodes))

    def _shown(self, nodes: Sequence[Node], failures: Sequence[str]) -> str:
        parts = []
        for node, failure in zip(nodes, failures, strict=True):
            why = failure or node.reason
            parts.append(f"{node.name} is {node.state} since {_clock(node.since)}" + (f" ({why})" if why else ""))
        return "; ".join(parts)

    def _until(self, nodes: Sequence[Node]) -> str:
        """Return until when the tasks wait."""
        if any(node.state in (NodeState.RECONNECTING, NodeState.CONNECTING) for node in nodes):
            return f"They wait as long as a node may still answer, and for {self._start_timeout:.0f} s after that"
        lost = max(self._lost_since.values(), default=time.time())
        return f"They fail at {_clock(lost + self._start_timeout)} unless a node is back"


def _clock(moment: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(moment))
