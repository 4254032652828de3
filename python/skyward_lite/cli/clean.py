"""What `skyward clean` does: hosts remove the environments and files that pools left there for later.

Whenever a host has built an environment, it removes by itself what nothing has used for 30 days.
"""

from __future__ import annotations

import functools
import sys
import time

from .. import _core
from ..environment import build, scripts
from ..errors import NodeStartError
from ..providers.ssh import SSH, Host, SSHMachine
from .hosts import default_request, in_order
from .report import CacheEntry, CleanReport


def clean(provider: SSH, *, everything: bool, dry_run: bool) -> int:
    """Clean the provider's hosts, and print what was found: 0 if nothing is left that should be removed, else 1.

    `everything` also removes what was used lately, but not within the last hour: a running agent marks its environment
    more often than that.
    """
    seconds = build.RECENT_SECONDS if everything else build.UNUSED_SECONDS
    core, status = _core.Core(1, 1 << 20), 0
    try:
        jobs = [functools.partial(_clean_host, core, host, provider, seconds, dry_run) for host in provider.hosts]
        for report in in_order(jobs):
            for problem in report.problems:
                print(f"{report.host}: {_core.printable(problem)}", file=sys.stderr)
            for entry in report.entries:
                print(f"{report.host}: {entry.line(dry_run=dry_run)}", flush=True)
            if not report.entries and not report.problems:
                print(f"{report.host}: nothing of skyward_lite's", flush=True)
            if not report.complete:
                status = 1
    finally:
        core.close()
    return status


def _clean_host(core: _core.Core, host: Host, provider: SSH, seconds: int, dry_run: bool) -> CleanReport:
    machine = SSHMachine(host, provider, default_request(provider))
    try:
        script = build.clean_script(seconds, dry_run=dry_run)
        report, status, printed = machine.run_script(machine.connect(core), script, build.CLEAN_SECONDS)
    except NodeStartError as error:
        return CleanReport(host.address, problems=(str(error),))
    except _core.CoreError as error:
        return CleanReport(host.address, problems=(str(error),))
    finally:
        machine.end(time.monotonic() + 1.0)
    entries = [CacheEntry.parse(key, line) for key in ("gone", "kept", "stuck") for line in report.get(key, [])]
    problems = list(report.get("unsafe", []))
    if any(len(lines) == scripts.MAX_VALUES for lines in report.values()):
        problems.append(f"there are more than the {scripts.MAX_VALUES} that are listed: clean it again")
    if status or None in entries:
        problems.append(f"it could not be cleaned (status {status}): {printed[-1000:] or 'no reason'}")
    parsed = sorted(filter(None, entries), key=lambda entry: entry.path)
    return CleanReport(host.address, tuple(parsed), tuple(problems))
