"""What `skyward check` does: each machine is asked, step by step, for what a pool would need of it.

The way to a machine depends on its kind (check_ssh.py); from its shell on the steps are the same (inspection.py).
Nothing is built: the command leaves only the cache directory behind.
"""

from __future__ import annotations

import json
import threading

from .. import _core
from .._version import PYTHON, __version__
from ..distributions import installed
from ..providers.ssh import SSH
from .check_ssh import HostCheck
from .hosts import InspectedHost, default_request, in_order
from .inspection import PACKAGES


def check(provider: SSH, *, as_json: bool = False) -> int:
    """Check the provider's hosts, print the reports, and return the exit status: 0 if all hosts can be used, else 1."""
    core, measuring = _core.Core(1, 1 << 20), threading.Lock()
    request = default_request(provider)
    reports = []
    try:
        checks = [HostCheck(InspectedHost(host, provider, request), core, measuring) for host in provider.hosts]
        for report in in_order([host_check.run for host_check in checks]):
            reports.append(report)
            if not as_json:
                print(report.lines(), flush=True)
    finally:
        core.close()
    if as_json:
        ours = {"python": PYTHON} | {name: installed(name) for name in PACKAGES} | {"skyward_lite": __version__}
        print(json.dumps({"client": ours, "hosts": [report.fields() for report in reports]}, indent=2))
    return 0 if all(report.usable for report in reports) else 1
