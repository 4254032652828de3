"""Our shell scripts: read from their files, given values, run on a host; and the report that each of them prints.

A script is plain POSIX sh. The host's login shell, whichever it is, starts `sh`, which reads the script from its
standard input. A line `. ./FILE` in a script includes another file (shellcheck follows it, too). Values that Python
hands in are the variables GIVEN_NAME, assigned at the script's head. A script prints the line `REPORT_MARKER` and then
its report: lines of `key=value`.

A script runs as a whole or not at all: it stands in a subshell, `( … )`, so the shell that has read only a part of it
reports an error of syntax. Its end prints a line with its exit status. A command may end with status 0, or with one of
its own, when its connection was cut: the script counts as ended only if that line has come.
"""

from __future__ import annotations

import functools
import logging
import re
import shlex
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from .. import _core, credentials
from ..errors import NodeStartError

log = logging.getLogger("skyward_lite")

REPORT_MARKER = "== skyward_lite =="
"""The line before a script's report, written out in each script. What the login shell printed before it is skipped."""

SHELL = "exec sh -s"
"""The command that runs a script at its standard input. dash, bash, zsh, fish and tcsh understand it alike."""

PATH_KEYS = frozenset({"root", "machine", "python", "uv"})
"""Keys of a report whose values become parts of commands that the host is sent later."""

RERUN_PAUSES_SECONDS = (0.3, 1.0)
"""Pauses before a script is run again of which a command has lost the end. All our scripts may be run again."""
MAX_OUTPUT_BYTES = 1 << 20
"""Bytes of each stream that `Connection.run` returns, the first ones."""

MAX_VALUES = 1000
"""Values of one key that are read from a report; a host may print a report without an end."""

_SAY_END = 'ended=$?; echo; echo "== skyward_lite ended $ended =="; exit "$ended"'
"""Prints the line with which a script or a command of ours ends."""
_END = re.compile(rb"\n== skyward_lite ended ([0-9]{1,3}) ==\n")
_INCLUDE = re.compile(r"^\. (\.\.?/\S+\.sh)$", re.MULTILINE)


class ScriptResult(NamedTuple):
    """How a script ended on a host."""

    report: dict[str, list[str]]
    """The values of each key, in the order in which the script printed them."""
    status: int
    """The exit status; 255 for a script that has none, as one that a signal ended."""
    printed: str
    """Standard error, fit to be shown."""


@functools.cache
def read(name: str, beside: str = __file__) -> str:
    """Return the text of a shell file in the directory of the Python file `beside`, with the files that it includes."""
    file = Path(beside).with_name(name)
    text = file.read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda line: read(Path(line[1]).name, str((file.parent / line[1]).resolve())), text)


def compose(*texts: str, **given: str | int) -> bytes:
    """Return a script: the assignment of GIVEN_NAME for each value `NAME=value`, then the texts."""
    assignments = [f"GIVEN_{name}={shlex.quote(str(value))}\n" for name, value in given.items()]
    return "".join((*assignments, *texts)).encode()


def command(text: str, *arguments: str) -> str:
    """Return the command that runs a script whose arguments are `arguments`, where standard input has something else.

    The script becomes one line, without its comments, in single quotes: tcsh allows no line end between quotes. So each
    of its lines must end where a blank may stand, and none may have a single quote, a backslash or an exclamation mark.
    """
    lines = [line.strip() for line in text.splitlines()]
    line = " ".join(line for line in lines if line and not line.startswith("#"))
    return f"sh -c {shlex.join([line, '--', *arguments])}"


def as_a_whole(script: bytes) -> bytes:
    """Return a script that a shell runs only if it has read all of it, and that prints how it has ended."""
    # Its standard input is empty: no program in it may read what follows.
    return b"(\n%s\n) </dev/null; %s\n" % (script, _SAY_END.encode())


class Ended(NamedTuple):
    """How a command of ours ended on a host."""

    status: int
    """Its own exit status, which it has printed; else that of what ran it, 255 if that has none."""
    stdout: bytes
    """Standard output, without the line with the status."""
    stderr: bytes
    is_complete: bool
    """Whether it has printed its status, so that nothing of its output is missing."""


def shown_program(connection: _core.Connection) -> str:
    """Return the command that leads to a machine as it may be shown, without credentials in it."""
    return f"`{credentials.mask(connection.program or SHELL)}`"


class _Finished(Exception):
    """Raised when a command has printed that it has succeeded: what starts it may never end."""


def run(
    connection: _core.Connection,
    script: bytes,
    bound: float,
    secrets: Collection[str] = (),
    watch: Callable[[bytes, bytes], object] | None = None,
) -> ScriptResult:
    """Run a script on a host, for `bound` seconds at most. `secrets` are masked in what is shown of its output.

    `watch` gets its output as it comes, as from `Connection.run`.

    Raises `NodeStartError` if the script did not come to its report, or its output was cut.
    """
    ended = _run_to_end(connection, SHELL, as_a_whole(script), bound, watch)
    report = parse_report(ended.stdout)
    if report is None or not (ended.is_complete or connection.program is None):
        raise NodeStartError(_explain(connection, ended, report is not None, secrets))
    return ScriptResult(report, ended.status, shown(ended.stderr, secrets))


def run_command(
    connection: _core.Connection, text: str, *arguments: str, stdin: bytes = b"", bound: float, secrets: Collection[str]
) -> Ended:
    """Run a script with arguments, as `command` does, where standard input has something else.

    Raises `NodeStartError` if its output was cut.
    """
    ended = _run_to_end(connection, command(f"(\n{text}\n);\n{_SAY_END}", *arguments), stdin, bound)
    if not ended.is_complete and connection.program is not None:
        raise NodeStartError(_explain(connection, ended, False, secrets))
    return ended


def _run_to_end(
    connection: _core.Connection,
    line: str,
    stdin: bytes,
    bound: float,
    watch: Callable[[bytes, bytes], object] | None = None,
) -> Ended:
    """Run a command of ours. Run it again if a command that leads to the host has lost the end of the output."""
    if connection.program is None:
        # SSH loses nothing before the exit status.
        return _read_end(*connection.run(line, stdin, bound, watch))
    for pause in RERUN_PAUSES_SECONDS:
        ended = _run_once(connection, line, stdin, bound, watch)
        if ended.is_complete:
            return ended
        log.info(
            "%s has lost the end of what a script printed (status %d): it is run again",
            shown_program(connection),
            ended.status,
        )
        time.sleep(pause)
    return _run_once(connection, line, stdin, bound, watch)


def _run_once(
    connection: _core.Connection,
    line: str,
    stdin: bytes,
    bound: float,
    watch: Callable[[bytes, bytes], object] | None,
) -> Ended:
    """Run a command of ours. It has ended when it says so: what starts it may wait for more input, or hang."""
    printed = (bytearray(), bytearray())

    def look(*new: bytes) -> None:
        for stream, part in zip(printed, new, strict=True):
            stream.extend(part)
        if watch is not None:
            watch(*new)
        # What a failed one has printed to standard error may still be on its way.
        if (end := _END.search(printed[0])) and end[1] == b"0":
            raise _Finished

    try:
        return _read_end(*connection.run(line, stdin, bound, look))
    except _Finished:
        return _read_end(0, *map(bytes, printed))
    except _core.CoreError:
        ended = _read_end(None, *map(bytes, printed))
        if ended.is_complete:
            return ended
        raise


def _read_end(status: int | None, stdout: bytes, stderr: bytes) -> Ended:
    ends = list(_END.finditer(stdout))
    if ends:
        return Ended(int(ends[-1][1]), stdout[: ends[-1].start() + 1], stderr, True)
    # The line is not among what was returned of a longer output.
    return Ended(255 if status is None else status, stdout, stderr, len(stdout) >= MAX_OUTPUT_BYTES)


def _explain(connection: _core.Connection, ended: Ended, began: bool, secrets: Collection[str]) -> str:
    """Return why a script has no report, or only a part of one. `began`: the report has begun."""
    seen = shown(b"\n".join((ended.stdout, ended.stderr)), secrets, 1000) or "nothing"
    if ended.is_complete:
        return f"a script ended there with status {ended.status} before its report. It printed: {seen}"
    if connection.program is None:
        return (
            f"`{SHELL}` does not run there (status {ended.status}): the server may force a command of its "
            f"own (ForceCommand), or the account has no shell. It printed: {seen}"
        )
    times = f"{len(RERUN_PAUSES_SECONDS) + 1} times"
    if began:
        return (
            f"{shown_program(connection)} has lost the end of what a script printed, {times} (status {ended.status}). "
            f"It printed: {seen}"
        )
    return f"{shown_program(connection)} did not run a script, {times} (status {ended.status}). It printed: {seen}"


def shown(printed: bytes, secrets: Collection[str] = (), limit: int = 4000) -> str:
    """Return what a host printed as it may be shown: without credentials, and harmless to a terminal or a log."""
    # Masked before the text is cut to `limit`: half a URL would not be recognized as a URL.
    text = credentials.mask(printed.decode(errors="backslashreplace").strip(), frozenset(secrets))
    return _core.printable(text, limit)


def parse_report(stdout: bytes) -> dict[str, list[str]] | None:
    """Return a script's report, with values fit to be shown; None if the script did not come to its report.

    A last line without an end was cut off, and is left out. Raises `NodeStartError` for a value of `PATH_KEYS` that
    cannot be shown as it is: the path in a command must be the path that was shown.
    """
    _, marker, text = stdout.partition(f"{REPORT_MARKER}\n".encode())
    if not marker:
        return None
    report: dict[str, list[str]] = {}
    for line in text.split(b"\n")[:-1]:
        name, _, raw = line.partition(b"=")
        key, value = _core.printable(name, lines=False), _core.printable(raw, lines=False)
        if key in PATH_KEYS and value.encode() != raw:
            raise NodeStartError(
                f"the {key} that it names cannot be used: it is too long, or has unprintable bytes: {value}"
            )
        values = report.setdefault(key, [])
        if len(values) < MAX_VALUES:
            values.append(value)
    return report


def parse_number(text: str) -> int | None:
    """Return a number of a report as an int; None for any other text, and for a number of more than 18 digits."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None
