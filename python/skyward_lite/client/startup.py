"""What is shown while the nodes of a pool start: what each of them does, and in the end how many are ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..providers import Machine
from .figures import count
from .node_state import Node, NodeState, ready_slots
from .picture import SPINNER, Row

MAX_NAME_CELLS = 32
"""Of a longer name of a node the beginning is shown."""
MAX_LISTED_NODES = 8
"""Without a live part, more nodes than this are counted and not named."""
LINE_SECONDS = 2.0
"""Between two lines on the same node, or of counts, without a live part."""


class Startup:
    """The start of one pool's nodes.

    `nodes` returns how they stand, `machines` are their machines, by the same numbers.
    """

    def __init__(self, nodes: Callable[[], list[Node]], machines: Sequence[Machine], wanted: int) -> None:
        self._nodes = nodes
        self._machines = machines
        self._wanted = wanted
        self._began = time.time()
        self._phases: dict[int, tuple[str, float]] = {}
        """Node's number → what it does, and since when (`time.time`)."""
        self._told: dict[int, tuple[str, float]] = {}
        """Node's number → what was told of it last without a live part, and when (`time.time`); -1 for the counts."""

    def rows(self, height: int) -> list[Row]:
        """Return what is shown now, in `height` rows at most."""
        now, nodes = time.time(), self._nodes()
        ready, failed = _number(nodes, NodeState.READY), _number(nodes, NodeState.LOST)
        head: Row = [("Starting ", ""), (count(max(self._wanted, len(nodes)), "node"), "bold")]
        if len(nodes) > 1:
            head += [(f" · {ready} ready", "good" if ready else "dim")]
        if failed:
            head += [(f" · {failed} failed", "bad")]
        head += [(f" · {now - self._began:.0f} s", "dim")]
        listed = [*range(len(nodes))]
        room = max(1, height - 1)
        if len(listed) > room:
            # Those that can still be waited for, then the failed ones.
            order = {NodeState.LOST: 1, NodeState.READY: 2}
            listed.sort(key=lambda number: order.get(NodeState(nodes[number].state), 0))
            listed = listed[: room - 1]
        width = max([min(MAX_NAME_CELLS, len(nodes[number].name)) for number in listed], default=0)
        if not nodes:
            return [head, [(_spinner(now), "busy"), (" asking for machines", "")]]
        rows = [head] + [self._row(number, nodes[number], width, now) for number in listed]
        if len(listed) < len(nodes):
            rows.append([(f"  … and {len(nodes) - len(listed)} more", "dim")])
        return rows

    def _row(self, number: int, node: Node, width: int, now: float) -> Row:
        name = f" {node.name[:MAX_NAME_CELLS]:{width}}  "
        if node.state == NodeState.READY:
            return [
                ("✔", "good"),
                (name, ""),
                (f"ready with {count(node.slots, 'slot')}", "good"),
                (f"  {node.since - self._began:.1f} s", "dim"),
            ]
        if node.state == NodeState.LOST:
            return [("✘", "bad"), (name, ""), (_first_line(node.reason), "bad")]
        doing = self._doing(number, node)
        before, since = self._phases.get(number, ("", self._began))
        if doing != before:
            since = now if before else self._began
            self._phases[number] = doing, since
        return [(_spinner(now), "busy"), (name, ""), (doing, ""), (f"  {now - since:.0f} s", "dim")]

    def _doing(self, number: int, node: Node) -> str:
        doing = self._machines[number].doing if number < len(self._machines) else ""
        return doing or node.state

    def news(self) -> list[str]:
        """Return lines that tell what has changed, for a place without a live part."""
        now, nodes = time.time(), self._nodes()
        if len(nodes) > MAX_LISTED_NODES or not nodes:
            ready, failed = _number(nodes, NodeState.READY), _number(nodes, NodeState.LOST)
            line = f"{ready} of {count(max(self._wanted, len(nodes)), 'node')} ready"
            line += f", {failed} failed" if failed else ""
            return [f"{line} after {now - self._began:.0f} s"] if self._is_news(-1, line, now) else []
        lines = []
        for number, node in enumerate(nodes):
            is_ready = node.state == NodeState.READY
            line = f"ready with {count(node.slots, 'slot')}" if is_ready else self._doing(number, node)
            # The log tells at once why a node was left out.
            if node.state != NodeState.LOST and self._is_news(number, line, 0.0 if is_ready else now):
                after = node.since if is_ready else now
                lines.append(f"{node.name}: {line} after {after - self._began:.1f} s")
        return lines

    def _is_news(self, number: int, line: str, now: float) -> bool:
        """Note a line and return whether it is to be written. `now`: 0 for a line that does not wait."""
        told, when = self._told.get(number, ("", 0.0))
        if line == told or (now and now < when + LINE_SECONDS):
            return False
        self._told[number] = line, now
        return True

    def end(self) -> str:
        """Return one line on what became of the start."""
        nodes = self._nodes()
        ready = count(_number(nodes, NodeState.READY), "node")
        line = f"{ready} ready with {count(ready_slots(nodes), 'slot')} after {time.time() - self._began:.1f} s"
        failed, others = _number(nodes, NodeState.LOST), _number(nodes, NodeState.CONNECTING)
        line += f", {failed} failed" if failed else ""
        return line + (f", {others} still starting" if others else "")


def _number(nodes: Sequence[Node], state: NodeState) -> int:
    return sum(node.state == state for node in nodes)


def _spinner(now: float) -> str:
    return SPINNER[int(now * len(SPINNER)) % len(SPINNER)]


def _first_line(reason: str) -> str:
    return reason.split("\n", 1)[0] or "failed"
