"""What `python -m skyward_lite clean` does: hosts remove the environments and files that pools left there for later.

A host does the same by itself whenever it has built an environment: with what nothing has used for 30 days.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import time

from .. import _core
from ..environment import build as bootstrap
from ..errors import NodeStartError
from ..providers.ssh import SSH, Host, SSHMachine
from . import check as doctor


@dataclasses.dataclass(frozen=True)
class Found:
    """An environment, or a file that was sent, and what was decided of it."""

    kind: str
    """"gone" (or would be), "kept", or "stuck": it could not be removed."""
    path: str
    size_kb: int
    unused_seconds: int

    def line(self, *, dry_run: bool) -> str:
        """Return what is printed of it."""
        if self.kind == "kept":
            decided = "kept"
        elif self.kind == "stuck":
            decided = "could not be removed"
        else:
            decided = "would be removed" if dry_run else "removed"
        return f"{self.path}: {self.size_kb / 1024:,.1f} MB, used {_ago(self.unused_seconds)} ago: {decided}"


@dataclasses.dataclass(frozen=True)
class Cleaned:
    """What became of one host: what was found there, or why it could not be looked at."""

    host: str
    found: tuple[Found, ...] = ()
    problems: tuple[str, ...] = ()


def clean(provider: SSH, *, everything: bool, dry_run: bool) -> int:
    """Clean the provider's hosts, and print what was found: 0 if nothing is left that should be removed, else 1.

    `everything` removes what was used lately, too, but not within the last hour: a running agent shows itself so.
    """
    seconds = bootstrap.RECENT_SECONDS if everything else bootstrap.UNUSED_SECONDS
    core, status = _core.Core(1, 1 << 20), 0
    try:
        jobs = [functools.partial(_one, core, host, provider, seconds, dry_run) for host in provider.hosts]
        for cleaned in doctor.in_order(jobs):
            for problem in cleaned.problems:
                print(f"{cleaned.host}: {_core.printable(problem)}", file=sys.stderr)
            for found in cleaned.found:
                print(f"{cleaned.host}: {found.line(dry_run=dry_run)}", flush=True)
            if not cleaned.found and not cleaned.problems:
                print(f"{cleaned.host}: nothing of skyward_lite's", flush=True)
            if cleaned.problems or any(found.kind == "stuck" for found in cleaned.found):
                status = 1
    finally:
        core.close()
    return status


def _one(core: _core.Core, host: Host, provider: SSH, seconds: int, dry_run: bool) -> Cleaned:
    """Clean one host."""
    machine = SSHMachine(host, provider, doctor.wanted(provider))
    try:
        script = bootstrap.clean(seconds, dry_run=dry_run)
        said, status, printed = machine._run(machine.connect(core), script, bootstrap.CLEAN_SECONDS)
    except NodeStartError as error:
        return Cleaned(host.address, problems=(str(error),))
    except _core.CoreError as error:
        return Cleaned(host.address, problems=(str(error),))
    finally:
        machine.end(time.monotonic() + 1.0)
    found = [_found(kind, line) for kind in ("gone", "kept", "stuck") for line in said.get(kind, [])]
    problems = said.get("unsafe", [])
    if any(len(lines) == bootstrap.MOST_VALUES for lines in said.values()):
        problems = [
            *problems,
            f"there are more than the {bootstrap.MOST_VALUES} that are listed: clean it again",
        ]
    if status or None in found:
        problems = [*problems, f"it could not be cleaned (status {status}): {printed[-1000:] or 'no reason'}"]
    return Cleaned(host.address, tuple(sorted(filter(None, found), key=lambda one: one.path)), tuple(problems))


def _found(kind: str, line: str) -> Found | None:
    """Read a line of the script; None if it is none."""
    match = re.fullmatch(r"([0-9]{0,15}) (-?[0-9]{1,15}) (/.+)", line)
    return None if match is None else Found(kind, match[3], int(match[1] or 0), max(0, int(match[2])))


def _ago(seconds: int) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} seconds"
