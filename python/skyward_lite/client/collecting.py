"""What reports and traces show of a pool, collected from its parts."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Executor
from importlib import metadata
from typing import Final

from .. import credentials
from .._version import __version__
from .lifecycle import Stage
from .node_state import NodeState, Status
from .nodes import NodeChange
from .records import NANOS_PER_SECOND, decode
from .run import Ready, Run
from .tasks import Tasks

WORKING: Final = frozenset({NodeState.READY, NodeState.DRAINING, NodeState.RECONNECTING})
"""The states of a node that runs tasks. One whose connection is cut works on."""


def collect(pool: Executor, provider: str) -> Run:
    """Return the run of a pool so far. `provider`: how its nodes' provider is written."""
    tasks = Tasks.of(pool)
    core, lifecycle, failures = tasks.core, tasks.completions.lifecycle, tasks.completions.failures
    core.check_owner()
    status = tasks.nodes.status()
    totals = core.totals()
    # The records' time begins when the core was made; all other times are converted to it.
    zero = time.monotonic() - totals["seconds"]
    unix_zero = time.time() - totals["seconds"]
    stage = lifecycle.stage
    end = lifecycle.reached[Stage.CLOSED] - zero if stage is Stage.CLOSED else totals["seconds"]
    begin = lifecycle.reached[Stage.OPEN] - zero if Stage.OPEN in lifecycle.reached else end
    first, packed = core.records(0)
    nanos_end = int(end * NANOS_PER_SECOND)
    return Run(
        program=program(),
        provider=credentials.mask(provider),
        versions=versions(),
        zero=unix_zero,
        begin=int(begin * NANOS_PER_SECOND),
        end=nanos_end,
        stage=stage.word,
        status=status,
        names=list(tasks.names.names),
        records=decode(packed),
        dropped=first,
        ready=ready_times(status, tasks.nodes.changes.copy(), unix_zero, int(begin * NANOS_PER_SECOND), nanos_end),
        failures=list(failures.latest.copy()),
        failed_calls=failures.count,
    )


def ready_times(status: Status, changes: Iterable[NodeChange], zero: float, begin: int, end: int) -> list[Ready]:
    """Return when each node was there, at most from `begin` to `end`, which are counted from the Unix time `zero`."""
    begun: dict[int, tuple[int, int]] = {}
    times = []
    for change in changes:
        at = min(max(begin, int((change.since - zero) * NANOS_PER_SECOND)), end)
        if change.state in WORKING:
            begun.setdefault(change.number, (at, change.slots))
        elif change.number in begun:
            start, slots = begun.pop(change.number)
            times.append(Ready(change.number, slots, start, at))
    times += [Ready(number, slots, start, end) for number, (start, slots) in begun.items()]
    # A pool may be closed before the thread that watches its nodes has seen that they are ready.
    seen = {ready.node for ready in times}
    unseen = (number for number, node in enumerate(status.nodes) if node.slots and number not in seen)
    times += [Ready(number, status.nodes[number].slots, begin, end) for number in unseen]
    return sorted(times, key=lambda ready: (ready.start, ready.node))


def program() -> str:
    """Return the name of the program that runs: its script's or its notebook's."""
    main = sys.modules.get("__main__")
    notebook = os.environ.get("JPY_SESSION_NAME") or getattr(main, "__vsc_ipynb_file__", "")
    if notebook:
        return os.path.basename(str(notebook))
    if "ipykernel" in sys.modules:
        return "notebook"
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    script = str(getattr(main, "__file__", "") or sys.argv[0])
    return os.path.basename(script) if script not in ("", "-c") else "interactive session"


def versions() -> str:
    """Return what runs here: our version, Python's and joblib's, and the system."""
    ours = f"skyward_lite {__version__}, Python {platform.python_version()}, joblib {metadata.version('joblib')}"
    return f"{ours}, {platform.system()} {platform.machine()}"
