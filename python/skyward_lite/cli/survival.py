"""Whether a host lets a process outlive the connection that has started it, as the agent of a node does.

leave (over one connection) → close that connection → find (over another one)
"""

from __future__ import annotations

from .. import _core
from ..environment import scripts
from ..errors import NodeStartError
from ..providers.openssh import Config
from .hosts import InspectedHost
from .report import Report

COMMAND_SECONDS = 30.0
"""Bound on each of the two commands."""
SETTLE_TENTHS = 10
"""Tenths of a second for which the process must live on after the connection has ended: servers end it at once."""


def leave(machine: InspectedHost, connection: _core.Connection) -> dict[str, list[str]]:
    """Start a process on the host. Return what the script reports of it."""
    script = scripts.compose(scripts.read("leave_process.sh", __file__))
    return machine.run_script(connection, script, COMMAND_SECONDS).report


def find(machine: InspectedHost, core: _core.Core, config: Config, left: dict[str, list[str]], report: Report) -> None:
    """Connect again, and add to the report whether the process lives. The connection before must have been closed."""
    process = scripts.parse_number(left.get("process", [""])[0])
    words = left.get("stat", [""])[0].rpartition(")")[2].split()
    born = scripts.parse_number(words[19]) if len(words) > 19 else None
    if process is None or born is None:
        report.note("survival", "whether an agent outlives its connection is not known: the host has no `sleep`")
        return
    script = scripts.compose(
        scripts.read("find_process.sh", __file__), PROCESS=process, BORN=born, TENTHS=SETTLE_TENTHS
    )
    try:
        found = machine.run_script(machine.connect_to(core, config), script, COMMAND_SECONDS)
    except (NodeStartError, _core.CoreError) as error:
        report.note("survival", f"a second connection did not succeed: {error}", "see the server's log; try again")
        return
    if found.report.get("lives") == ["yes"]:
        report.ok("survival", "what a connection has started outlives it, so an agent is found again after a cut")
        return
    report.note(
        "survival",
        f"{cause(left)} ends what a connection has started when the connection ends: after a cut a new agent is "
        "started, and tasks that were running run again",
        remedy(left, config.user),
    )


def _is_logind(left: dict[str, list[str]]) -> bool:
    """Return whether systemd is set to end a user's processes at logout."""
    setting = left.get("logind", [""])[-1].partition("=")[2]
    return setting.strip().lower() in ("yes", "true", "on", "1")


def _is_service(left: dict[str, list[str]]) -> bool:
    """Return whether the session is in the control group of a service that systemd starts for each connection."""
    return any("ssh" in part and "@" in part for part in left.get("group", [""])[-1].split("/"))


def cause(left: dict[str, list[str]]) -> str:
    """Return what ended the process, by what `leave` returned."""
    if _is_logind(left):
        return "systemd (KillUserProcesses=yes in logind.conf)"
    return "systemd (the service of each connection)" if _is_service(left) else "the server"


def remedy(left: dict[str, list[str]], user: str) -> str:
    """Return what lets processes outlive their connection there, by what `leave` returned."""
    if _is_logind(left):
        return f"KillExcludeUsers={user} or KillUserProcesses=no in /etc/systemd/logind.conf"
    if _is_service(left):
        return "KillMode=process in the service's [Service]"
    return "find out what ends them: a ForceCommand, or the container's init"
