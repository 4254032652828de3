"""What is shown while tasks run: how many are done, run and wait, how fast, and what each node does.

Counted are calls: a batch of 10 calls counts 10.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import NamedTuple

from . import figures
from .figures import count
from .node_state import Node, NodeState
from .picture import Row, bar, clock

WINDOW_SECONDS = 20.0
"""The rate is that of the last 20 s, if so many tasks have ended in them that it is even."""
MIN_WINDOW_TASKS = 20
MAX_LISTED_NODES = 16
"""Of more nodes only those are listed that are away or lost, and the others are counted."""
MAX_NAME_CELLS = 24


class Counts(NamedTuple):
    """How the tasks of a pool stand, in calls, since the pool was opened."""

    submitted: int
    """All that were given to the pool, those that wait in this process included."""
    done: int
    failed: int
    """Those of the done ones that ended with an error."""
    rerun: int
    is_complete: bool
    """Whether no input is left from which further tasks come: then `submitted` is their number."""
    nodes: list[Node]


class TaskView:
    """The tasks of a pool from now on, or the first `total` of them. `counts` returns how they stand."""

    def __init__(self, counts: Callable[[], Counts], total: int | None = None) -> None:
        self._counts = counts
        self._total = total
        self._first = counts()
        self._began = self._first_seen = time.monotonic()
        """When the view began, and since when tasks run: the rate counts from there."""
        self._window: collections.deque[tuple[float, int]] = collections.deque()
        """When (`time.monotonic`) how many were done, over `WINDOW_SECONDS`."""
        self._now = self._first
        self.sample()

    def sample(self) -> None:
        """Look how the tasks stand now."""
        now, self._now = time.monotonic(), self._counts()
        if self._now.submitted == self._first.submitted:
            self._first_seen = now
        self._window.append((now, self.done))
        while self._window[0][0] < now - WINDOW_SECONDS:
            self._window.popleft()
        self._at = now

    @property
    def done(self) -> int:
        """The number of calls that have ended."""
        return self._now.done - self._first.done

    @property
    def submitted(self) -> int:
        """The number of calls that were given to the pool, whether or not they have ended."""
        # Calls that had been submitted before and end now are among those that are shown as done.
        return self._now.submitted - self._first.done

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits."""
        return self.done >= self.submitted

    @property
    def total(self) -> int | None:
        """The number of all calls; None while it is not known."""
        if self._total is not None:
            return max(self._total, self.submitted)
        return self.submitted if self._now.is_complete else None

    def rate(self) -> float:
        """Return how many calls end per second; 0.0 while that is not known."""
        then, before = self._window[0]
        if self.done - before >= MIN_WINDOW_TASKS:
            return (self.done - before) / max(1e-3, self._at - then)
        return self.done / max(1e-3, self._at - self._first_seen)

    def _bytes(self) -> tuple[int, int]:
        old = {number: (node.bytes_sent, node.bytes_received) for number, node in enumerate(self._first.nodes)}
        pairs = [
            (node.bytes_sent - old.get(number, (0, 0))[0], node.bytes_received - old.get(number, (0, 0))[1])
            for number, node in enumerate(self._now.nodes)
        ]
        return sum(sent for sent, _ in pairs), sum(received for _, received in pairs)

    def _head(self) -> Row:
        """Return what is done and what is left."""
        total, rate = self.total, self.rate()
        row: Row = []
        if total:
            row += [(f"{self.done:,} of {count(total, 'task')}", "bold"), (" done", "")]
        else:
            row += [(count(self.done, "task"), "bold"), (" done", "")]
        if not self.done:
            return [*row, (f" · {clock(self._at - self._began)}", "dim")]
        row.append((f" · {figures.rate(rate)}", ""))
        if total and total > self.done and rate:
            row.append((f" · {clock((total - self.done) / rate)} left", "bold"))
        return row

    def _details(self) -> Row:
        """Return what runs and waits, what went wrong, and the bytes."""
        running = sum(node.running for node in self._now.nodes)
        row: Row = [(f"{running:,} running", "busy" if running else "dim")]
        if waiting := max(0, self.submitted - self.done - running):
            row.append((f" · {waiting:,} waiting", ""))
        if failed := self._now.failed - self._first.failed:
            row.append((f" · {failed:,} failed", "bad"))
        if rerun := self._now.rerun - self._first.rerun:
            row.append((f" · {rerun:,} run again", "bad"))
        sent, received = self._bytes()
        return [*row, (f" · ↑ {figures.size(sent)} ↓ {figures.size(received)}", "dim")]

    def rows(self, height: int) -> list[Row]:
        """Return two rows on all tasks and one on each node, in `height` rows at most."""
        total = self.total
        first: Row = [*(bar(self.done / total) if total else []), (" " if total else "", ""), *self._head()]
        summary: list[Row] = [first, [("  ", ""), *self._details()]]
        nodes = [(number, node) for number, node in enumerate(self._now.nodes) if node.state != NodeState.CLOSED]
        room = min(height - len(summary), MAX_LISTED_NODES)
        if len(nodes) == 1 and nodes[0][1].state == NodeState.READY:
            nodes = []
        rest: list[Row] = []
        if len(nodes) > room:
            quiet = [node for _, node in nodes if node.state == NodeState.READY]
            slots = sum(node.slots for node in quiet)
            running = sum(node.running for node in quiet)
            rest = [[(f"  {count(len(quiet), 'node')} ready · {running:,} of {count(slots, 'slot')} busy", "dim")]]
            nodes = [(number, node) for number, node in nodes if node.state != NodeState.READY]
            if len(nodes) > room - 1:
                rest.append([(f"  {count(len(nodes), 'node')} not ready", "bad")])
                nodes = []
        width = max([min(MAX_NAME_CELLS, len(node.name)) for _, node in nodes], default=0)
        listed = [self._node_row(number, node, width) for number, node in nodes]
        return [*summary, *listed, *rest][: max(1, height)]

    def _node_row(self, number: int, node: Node, width: int) -> Row:
        first = self._first.nodes[number] if number < len(self._first.nodes) else None
        done = node.done - (0 if first is None else first.done)
        failed = node.failed - (0 if first is None else first.failed)
        row: Row = [(f"  {node.name[:MAX_NAME_CELLS]:{width}}  ", "")]
        if node.state == NodeState.READY:
            row.append((f"{node.running:,} of {count(node.slots, 'slot')} busy", "busy" if node.running else "dim"))
        else:
            row.append((node.state, "dim" if node.state == NodeState.CONNECTING else "bad"))
        row.append((f" · {done:,} done", ""))
        if failed:
            row.append((f" · {failed:,} failed", "bad"))
        return row

    def line(self) -> Row:
        """Return one row on all tasks, for a place with room for one only."""
        return [*self._head(), (" · ", ""), *self._details()]

    def end(self) -> str:
        """Return one line on what was done; "" if nothing was."""
        if not self.submitted:
            return ""
        seconds = self._at - self._first_seen
        total = f"{self.done:,} of " if self.done < (self.total or self.submitted) else ""
        line = f"{total}{count(self.total or self.submitted, 'task')} done in {figures.duration(seconds)}"
        if self.done:
            line += f" ({figures.rate(self.done / max(1e-3, seconds))})"
        if failed := self._now.failed - self._first.failed:
            line += f", {failed:,} failed"
        if rerun := self._now.rerun - self._first.rerun:
            line += f", {rerun:,} run again"
        sent, received = self._bytes()
        return line + f" · ↑ {figures.size(sent)} ↓ {figures.size(received)}"
