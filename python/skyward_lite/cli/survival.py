"""Whether a host lets a process outlive the connection that has started it, as the agent of a node does.

leave (over one connection) → close that connection → find (over another one)

A command that leads to the machine is cut while it runs (`leave_and_cut`): what it does at its own end tells nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

from .. import _core
from ..environment import scripts
from ..errors import NodeStartError
from ..providers.remote import RemoteMachine
from .report import Report

Left: TypeAlias = dict[str, list[str]]
"""What leave_process.sh reports of the process that it has started, and of what may end it."""

COMMAND_SECONDS = 30.0
"""Bound on each of the two commands."""
SETTLE_TENTHS = 10
"""Tenths of a second for which the process must live on after the connection has ended: servers end it at once."""


LAST_LINE = re.compile(rb"\ngroup=.*\n")
"""The last line that leave_process.sh prints."""


class _CutError(Exception):
    """Raised to give the command up: the process that it was to start is there."""


def leave(machine: RemoteMachine, connection: _core.Connection) -> Left:
    """Start a process on the host. Return what the script reports of it."""
    script = scripts.compose(scripts.read("leave_process.sh", __file__))
    return machine.run_script(connection, script, COMMAND_SECONDS).report


def leave_and_cut(connection: _core.Connection) -> Left:
    """Start a process on a machine behind a command, and cut the command while it runs, as a failure would.

    Return what the script reports of the process. Raises `NodeStartError` if it reports nothing.
    """
    printed = bytearray()

    def watch(stdout: bytes, _: bytes) -> None:
        printed.extend(stdout)
        if LAST_LINE.search(printed):
            raise _CutError

    script = scripts.compose(scripts.read("leave_process.sh", __file__), f"exec sleep {COMMAND_SECONDS:.0f}\n")
    try:
        return scripts.run(connection, script, COMMAND_SECONDS, watch=watch).report
    except _CutError:
        return scripts.parse_report(bytes(printed)) or {}


def find(
    machine: RemoteMachine,
    connect: Callable[[], _core.Connection],
    left: Left,
    report: Report,
    blame: tuple[str, str],
) -> None:
    """Connect again, and add to the report whether the process lives. The connection before must have been closed.

    `blame`: what is said to have ended the process if it does not live, and the remedy.
    """
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
        found = machine.run_script(connect(), script, COMMAND_SECONDS)
    except (NodeStartError, _core.CoreError) as error:
        report.note("survival", f"a second connection did not succeed: {error}", "see the server's log; try again")
        return
    if found.report.get("lives") == ["yes"]:
        report.ok("survival", "what a connection has started outlives it, so an agent is found again after a cut")
        return
    who, remedy = blame
    report.note(
        "survival",
        f"{who} ends what a connection has started when the connection ends: after a cut a new agent is "
        "started, and tasks that were running run again",
        remedy,
    )


def _is_logind(left: Left) -> bool:
    """Return whether systemd is set to end a user's processes at logout."""
    setting = left.get("logind", [""])[-1].partition("=")[2]
    return setting.strip().lower() in ("yes", "true", "on", "1")


def _is_service(left: Left) -> bool:
    """Return whether the session is in the control group of a service that systemd starts for each connection."""
    return any("ssh" in part and "@" in part for part in left.get("group", [""])[-1].split("/"))


def cause(left: Left) -> str:
    """Return what ended the process, by what `leave` returned."""
    if _is_logind(left):
        return "systemd (KillUserProcesses=yes in logind.conf)"
    return "systemd (the service of each connection)" if _is_service(left) else "the server"


def remedy(left: Left, user: str) -> str:
    """Return what lets processes outlive their connection there, by what `leave` returned."""
    if _is_logind(left):
        return f"KillExcludeUsers={user} or KillUserProcesses=no in /etc/systemd/logind.conf"
    if _is_service(left):
        return "KillMode=process in the service's [Service]"
    return "find out what ends them: a ForceCommand, or the container's init"
