"""What `skyward check` does: each machine is asked, step by step, for what a pool would need of it.

The way to a machine depends on its kind (check_ssh.py); from its shell on the steps are the same (inspection.py).
Nothing is built: the command leaves only the cache directory behind.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Generator, Sequence
from typing import Any

from .. import _core
from .._version import PYTHON, __version__
from ..distributions import installed
from ..providers import Provider
from ..providers.command import Exec
from ..providers.slurm import Slurm
from ..providers.ssh import SSH
from . import check_command, check_slurm, check_ssh
from .hosts import in_order
from .inspection import PACKAGES, Inspection
from .report import Report


def check(provider: Provider, *, as_json: bool = False) -> int:
    """Check the provider's machines, print the reports, and return the exit status: 0 if all can be used, else 1."""
    core = _core.Core(1, 1 << 20)
    reports = []
    try:
        with contextlib.closing(_reports(provider, core)) as found:
            for report in found:
                reports.append(report)
                if not as_json:
                    print(report.lines(), flush=True)
    finally:
        core.close()
    if as_json:
        ours = {"python": PYTHON} | {name: installed(name) for name in PACKAGES} | {"skyward_lite": __version__}
        print(json.dumps({"client": ours, "hosts": [report.fields() for report in reports]}, indent=2))
    return 0 if all(report.usable for report in reports) else 1


def _reports(provider: Provider, core: _core.Core) -> Generator[Report]:
    """Inspect the provider's machines, many at once, and yield their reports in order."""
    measuring = threading.Lock()
    inspections: Sequence[Inspection[Any]]
    if isinstance(provider, SSH):
        inspections = check_ssh.inspections(provider, core, measuring)
    elif isinstance(provider, Exec):
        inspections = check_command.inspections(provider, core, measuring)
    else:
        assert isinstance(provider, Slurm)
        yield from check_slurm.reports(provider, core, measuring)
        return
    yield from in_order([inspection.run for inspection in inspections])
