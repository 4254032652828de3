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


@dataclasses.dataclass(frozen=True)
class Status:
    """How a pool stands: its nodes, the tasks that can run at once, those that have not ended, and what it costs.

    `cost` is None where nodes cost nothing, or their price is not known.
    """

    nodes: list[Node]
    slots: int
    pending: int
    cost: Cost | None
