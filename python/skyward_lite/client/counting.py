"""How many calls of a pool have ended, run and wait, and whether more are to come."""

from __future__ import annotations

from .. import _core
from .completions import Completions
from .nodes import Nodes
from .task_view import Counts
from .tasks import Tasks


def count_calls(core: _core.Core, completions: Completions, nodes: Nodes, tasks: Tasks) -> Counts:
    """Return how the calls of a pool stand."""
    totals = core.totals()
    inputs = [queue.input for queue in list(completions.queues.values()) if queue.input is not None]
    waiting = [one.waiting_calls() for one in inputs]
    return Counts(
        submitted=totals["pending"] + totals["done"] + sum(calls or 0 for calls in waiting),
        done=totals["done"],
        failed=totals["failed"],
        rerun=totals["rerun"],
        is_complete=None not in waiting and not tasks.unread,
        nodes=nodes.snapshot(),
    )
