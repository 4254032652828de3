"""A run as reports show it: everything that was known of a pool at one moment, as plain values."""

from __future__ import annotations

import dataclasses
from typing import Final, NamedTuple

from .. import _core
from .failures import Failure
from .node_state import Status
from .records import Record

OUTCOMES: Final = {
    _core.RETURNED: "returned",
    _core.PARTIAL: "returned in part",
    _core.RAISED: "raised an exception",
    _core.CRASHED: "worker process died",
    _core.NODE_LOST: "node was lost",
    _core.TIMED_OUT: "ran for too long",
    _core.CANCELLED: "cancelled",
}
"""How an attempt at a task ended, in words."""
FAILED: Final = frozenset({_core.RAISED, _core.CRASHED, _core.NODE_LOST, _core.TIMED_OUT})
"""The outcomes that are failures of the attempt; after a lost node the task may have run again."""
USEFUL: Final = frozenset({_core.RETURNED, _core.PARTIAL, _core.RAISED})
"""The outcomes of attempts whose time was not lost: the function has come to its own end."""


class Ready(NamedTuple):
    """So many slots of a node were there from one moment to another, in nanoseconds since the core was made."""

    node: int
    slots: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What reports and traces show. Times are nanoseconds since the core was made, at the Unix time `zero`."""

    program: str
    """The name of the script or the notebook."""
    provider: str
    """How the nodes' provider is written."""
    versions: str
    zero: float
    begin: int
    """When the nodes began to start."""
    end: int
    """When the pool was closed, or now."""
    stage: str
    """How far the pool had come: "new", "open", "closing" or "closed"."""
    status: Status
    names: list[str]
    records: list[Record]
    dropped: int
    """Records of earlier attempts, which are no longer kept."""
    ready: list[Ready]
    failures: list[Failure]
    """The latest errors of calls."""
    failed_calls: int
    """All errors of calls; as many as `failures`, or more."""

    def name_of(self, record: Record) -> str:
        """Return the name of a record's function."""
        return (self.names[record.name] if record.name < len(self.names) else "") or "(unnamed)"

    def node_of(self, record: Record) -> str:
        """Return the name of a record's node."""
        nodes = self.status.nodes
        return nodes[record.node].name if record.node < len(nodes) else f"node {record.node}"
