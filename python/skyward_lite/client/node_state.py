"""How the nodes of a pool stand: what `pool.nodes()` and `pool.status()` return."""

from __future__ import annotations

import dataclasses
import enum

from ..providers import Cost


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
    """What is known of a node: its name, its slots and its round-trip time in seconds.

    `state` is one of "connecting", "ready", "reconnecting", "draining", "lost" and "closed"; `since` is the Unix time
    since which the node is in that state. The connection to a node that is reconnecting was cut: the node works on, and
    keeps its tasks. A draining node will soon be gone: it ends what it runs and takes nothing more. A lost node has no
    tasks any more; it becomes "connecting" and "ready" again where its machine can come back. `reason` says why it is
    reconnecting, draining or lost; where those are the node's own words, they can be shown on any terminal.
    """

    name: str
    state: str
    reason: str
    slots: int
    rtt: float | None
    pid: int | None
    since: float
    running: int = 0
    """Tasks that run there now. A batch of `Parallel` runs one call after another, and is one task."""
    queued: int = 0
    """Tasks that were sent there and wait."""
    done: int = 0
    """Calls that have ended there, also those of a batch; with those that failed."""
    failed: int = 0
    """Calls that ended there with an exception, a crash or by the time limit."""
    rerun: int = 0
    """Calls that ran there when the node was lost, and run again."""
    bytes_sent: int = 0
    """Bytes on the wire, from here to there: compressed, without SSH's own."""
    bytes_received: int = 0
    """The same, from there to here."""
    cached_bytes: int = 0
    """Bytes of data that tasks share and that the node keeps: see `Worker(cache_gb=)`."""


@dataclasses.dataclass(frozen=True)
class Status:
    """How a pool stands: its nodes, the tasks that can run at once, those that have not ended, and what it costs.

    `cost` is None where nodes cost nothing, or their price is not known.
    """

    nodes: list[Node]
    slots: int
    pending: int
    """Calls that have not ended. Of a running call of `Parallel`, joblib has submitted some calls only."""
    cost: Cost | None
    running: int = 0
    """Tasks that run now, on all nodes."""
    queued: int = 0
    """Calls that wait: at this process, on nodes, or in a batch behind a call that runs."""
    done: int = 0
    """Calls that have ended, with those that failed."""
    failed: int = 0
    """Calls that ended with an exception, a crash, by the time limit or with their node."""
    rerun: int = 0
    """Calls that ran on nodes which were lost, and run again."""
    bytes_sent: int = 0
    """Bytes on the wire, to all nodes: compressed, without SSH's own."""
    bytes_received: int = 0
    """The same, from all nodes."""
    payload_sent: int = 0
    """Bytes of all tasks that were sent: pickled, not compressed. Data that tasks share counts once."""
    payload_received: int = 0
    """Bytes of all results: pickled, not compressed."""
    seconds: float = 0.0
    """Since the pool was opened."""
