"""How the nodes of a pool stand: what `pool.nodes()` and `pool.status()` return, and how it is displayed."""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from ..providers import Cost
from . import figures

MAX_NODES: Final = 12
"""Nodes of a pool that are shown one by one. Of more, those that are not ready come first, the others are counted."""
MAX_REASON: Final = 160
"""Characters of the reason why a node is not ready."""


class NodeState(enum.StrEnum):
    """The values of `Node.state`."""

    CONNECTING = "connecting"
    READY = "ready"
    RECONNECTING = "reconnecting"
    DRAINING = "draining"
    LOST = "lost"
    CLOSED = "closed"


@dataclasses.dataclass(frozen=True)
class Node:
    """How a node stands: what is known of it, and what it has done so far.

    The connection to a node that is reconnecting was cut: the node works on, and keeps its tasks. A draining node will
    soon be gone: it ends what it runs and takes nothing more. A lost node has no tasks any more; it becomes
    "connecting" and "ready" again where its machine can come back.

    Parameters
    ----------
    name : str
        Its name.
    state : str
        "connecting", "ready", "reconnecting", "draining", "lost" or "closed".
    reason : str
        Why it is reconnecting, draining or lost; while it is connecting, what it does, such as what its job waits for;
        else empty. Where those are the node's own words, they can be shown on any terminal.
    slots : int
        Tasks that it can run at once.
    rtt : float or None
        Its round-trip time in seconds; None before the first one was measured.
    pid : int or None
        The process id of its agent there; None while there is none.
    since : float
        The Unix time since which it is in its state.
    running : int
        Tasks that run there now. A batch of `Parallel` runs one call after another, and is one task.
    queued : int
        Tasks that were sent there and wait.
    done : int
        Calls that have ended there, also those of a batch; with those that failed.
    failed : int
        Calls that ended there with an exception, a crash or by the time limit.
    rerun : int
        Calls that ran there when the node was lost, and run again.
    bytes_sent : int
        Bytes on the wire, from here to there: compressed, without SSH's own.
    bytes_received : int
        The same, from there to here.
    cached_bytes : int
        Bytes of data that tasks share and that the node keeps: see `Worker(cache_gb=)`.
    """

    name: str
    state: str
    reason: str
    slots: int
    rtt: float | None
    pid: int | None
    since: float
    running: int = 0
    queued: int = 0
    done: int = 0
    failed: int = 0
    rerun: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    cached_bytes: int = 0

    def __repr__(self) -> str:
        return node_line(self)

    def _repr_html_(self) -> str:
        return node_html(self)


@dataclasses.dataclass(frozen=True)
class Status:
    """How a pool stands: its nodes, its tasks, its data and what it costs.

    Parameters
    ----------
    nodes : list of Node
        How each node stands.
    slots : int
        Tasks that can run at once: the sum over the ready nodes.
    pending : int
        Calls that have not ended. Of a running call of `Parallel`, joblib has submitted some calls only.
    cost : Cost or None
        Dollars; None where nodes cost nothing, or their price is not known.
    running : int
        Tasks that run now, on all nodes.
    queued : int
        Calls that wait: at this process, on nodes, or in a batch behind a call that runs.
    done : int
        Calls that have ended, with those that failed.
    failed : int
        Calls that ended with an exception, a crash, by the time limit or with their node.
    rerun : int
        Calls that ran on nodes which were lost, and run again.
    bytes_sent : int
        Bytes on the wire, to all nodes: compressed, without SSH's own.
    bytes_received : int
        The same, from all nodes.
    payload_sent : int
        Bytes of all tasks that were sent: pickled, not compressed. Data that tasks share counts once for
        each node.
    payload_received : int
        Bytes of all results: pickled, not compressed.
    seconds : float
        Seconds since the pool was opened, until it was closed.
    """

    nodes: list[Node]
    slots: int
    pending: int
    cost: Cost | None
    running: int = 0
    queued: int = 0
    done: int = 0
    failed: int = 0
    rerun: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    payload_sent: int = 0
    payload_received: int = 0
    seconds: float = 0.0

    def __repr__(self) -> str:
        return status_lines(self)

    def _repr_html_(self) -> str:
        return status_html(self)


def ready_slots(nodes: Iterable[Node]) -> int:
    """Return the number of tasks that can run at once: the sum over the ready nodes."""
    return sum(node.slots for node in nodes if node.state == NodeState.READY)


def node_line(node: Node) -> str:
    """Return a node in one line."""
    parts = [node.state + (f" ({reason(node)})" if node.reason else "")]
    parts += [figures.count(node.slots, "slot"), *_tasks(node)]
    if node.rtt is not None:
        parts.append(f"{figures.duration(node.rtt)} round trip")
    return f"<Node {node.name}: {', '.join(parts)}>"


def reason(node: Node) -> str:
    """Return the first line of why a node is not ready, shortened."""
    first, _, rest = node.reason.partition("\n")
    return first if len(first) <= MAX_REASON and not rest else f"{first[:MAX_REASON]} …"


def status_lines(status: Status) -> str:
    """Return how a pool stands: a line about all of it, one for each node, one about data and one about costs."""
    shown, others = _shown(status.nodes)
    names = max((len(node.name) for node in shown), default=0)
    states = max((len(node.state) for node in shown), default=0)
    slots = max((len(figures.count(node.slots, "slot")) for node in shown), default=0)
    tasks = max((len(", ".join(_tasks(node))) for node in shown if not node.reason), default=0)
    lines = [f"<Status: {_summary(status)}"]
    for node in shown:
        head = (
            f"  {node.name.ljust(names)}  {node.state.ljust(states)}  {figures.count(node.slots, 'slot').rjust(slots)}"
        )
        if node.reason:
            lines.append(f"{head}  {', '.join(_tasks(node))}: {reason(node)}")
            continue
        rest = [", ".join(_tasks(node)).ljust(tasks)]
        rest += [] if node.rtt is None else [f"{figures.duration(node.rtt)} round trip"]
        rest += [f"{figures.size(node.cached_bytes)} cached"] if node.cached_bytes else []
        lines.append(f"{head}  {'  '.join(rest)}".rstrip())
    lines += [f"  {text}" for text in (others, *_totals(status)) if text]
    return "\n".join(lines) + ">"


def status_html(status: Status, title: str = "") -> str:
    """Return the same as a small table, in the notebook's own colours. Everything is escaped."""
    # Not at the module's head: it takes 3 ms, and programs outside of notebooks have no use for it.
    from html import escape

    shown, others = _shown(status.nodes)
    cell = "text-align:right;white-space:nowrap;padding:2px 12px 2px 0"
    left = "text-align:left;padding:2px 12px 2px 0"
    heads = (
        *("Node", "State", "Slots", "Running", "Queued", "Done", "Failed", "Re-run"),
        *("Sent", "Received", "Cached", "Round trip"),
    )
    rows = [
        (
            node.name,
            node.state + (f": {reason(node)}" if node.reason else ""),
            *(f"{each:,}" for each in (node.slots, node.running, node.queued, node.done, node.failed, node.rerun)),
            *(figures.size(each) for each in (node.bytes_sent, node.bytes_received, node.cached_bytes)),
            "–" if node.rtt is None else figures.duration(node.rtt),
        )
        for node in shown
    ]
    head = "".join(f'<th style="{left if n < 2 else cell}">{text}</th>' for n, text in enumerate(heads))
    cells = (
        "".join(f'<td style="{left if n < 2 else cell}">{escape(text)}</td>' for n, text in enumerate(row))
        for row in rows
    )
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
    below = "".join(f'<div style="opacity:0.75">{escape(text)}</div>' for text in (others, *_totals(status)) if text)
    name = f"<code>{escape(title)}</code><br>" if title else ""
    return f"<div><div>{name}<b>{escape(_summary(status))}</b></div>{table}{below}</div>"


def node_html(node: Node) -> str:
    """Return a node's line as HTML."""
    from html import escape

    return f"<code>{escape(node_line(node))}</code>"


def _tasks(of: Node | Status) -> list[str]:
    """Return the counts of tasks; those of queued, failed and re-run ones if there are any."""
    counts = [f"{of.running:,} running"]
    counts += [f"{of.queued:,} queued"] if of.queued else []
    counts += [f"{of.done:,} done"]
    counts += [f"{of.failed:,} failed"] if of.failed else []
    return counts + ([f"{of.rerun:,} re-run"] if of.rerun else [])


def _summary(status: Status) -> str:
    """Return how many nodes and slots there are, and the tasks of all of them."""
    states = Counter(str(node.state) for node in status.nodes)
    nodes = ", ".join(f"{number:,} {state}" for state, number in states.items())
    if len(states) == 1:
        nodes = f"{figures.count(len(status.nodes), 'node')} {next(iter(states))}"
    elif states:
        nodes = f"{figures.count(len(status.nodes), 'node')} ({nodes})"
    parts = [nodes or "no nodes", figures.count(status.slots, "slot"), *_tasks(status)]
    if status.seconds:
        age = figures.duration(status.seconds)
        parts.append(f"ran for {age}" if set(states) == {NodeState.CLOSED} else f"started {age} ago")
    return ", ".join(parts)


def _totals(status: Status) -> list[str]:
    """Return the sentences about data and about costs, where there are any."""
    lines = []
    if status.bytes_sent or status.bytes_received:
        reached = sum(node.bytes_sent > 0 for node in status.nodes)
        to = f", to {reached:,} nodes" if reached > 1 else ""
        lines.append(
            f"sent {figures.size(status.payload_sent)} ({figures.size(status.bytes_sent)} on the wire{to}), "
            f"received {figures.size(status.payload_received)} ({figures.size(status.bytes_received)} on the wire)"
        )
    if status.cost is not None:
        total, hourly = figures.dollars(status.cost.total), figures.dollars(status.cost.hourly)
        lines.append(f"cost {total} so far, {hourly} per hour")
    return lines


def _shown(nodes: Sequence[Node]) -> tuple[Sequence[Node], str]:
    """Return the nodes that are shown one by one, and a sentence about the others."""
    if len(nodes) <= MAX_NODES:
        return nodes, ""
    chosen = sorted(range(len(nodes)), key=lambda number: (nodes[number].state == "ready", number))[:MAX_NODES]
    shown = [nodes[number] for number in sorted(chosen)]
    states = Counter(str(node.state) for number, node in enumerate(nodes) if number not in set(chosen))
    return shown, f"and {len(nodes) - MAX_NODES:,} more nodes: " + ", ".join(
        f"{n:,} {state}" for state, n in states.items()
    )
