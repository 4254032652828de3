"""Our shell scripts: read from their files, given values, run on a host; and the report that each of them prints.

A script is plain POSIX sh. The host's login shell, whichever it is, starts `sh`, which reads the script from its
standard input. A line `. ./FILE` in a script includes another file (shellcheck follows it, too). Values that Python
hands in are the variables GIVEN_NAME, assigned at the script's head. A script prints the line `REPORT_MARKER` and then
its report: lines of `key=value`.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from .. import _core, credentials
from ..errors import NodeStartError

REPORT_MARKER = "== skyward_lite =="
"""The line before a script's report, written out in each script. What the login shell printed before it is skipped."""

SHELL = "exec sh -s"
"""The command that runs a script at its standard input. dash, bash, zsh, fish and tcsh understand it alike."""

PATH_KEYS = frozenset({"root", "machine", "python", "uv"})
"""Keys of a report whose values become parts of commands that the host is sent later."""

MAX_VALUES = 1000
"""Values of one key that are read from a report; a host may print a report without an end."""

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


def run(
    connection: _core.Connection,
    script: bytes,
    bound: float,
    secrets: Collection[str] = (),
    watch: Callable[[bytes, bytes], object] | None = None,
) -> ScriptResult:
    """Run a script on a host, for `bound` seconds at most. `secrets` are masked in what is shown of its output.

    `watch` gets its output as it comes, as from `Connection.run`.

    Raises `NodeStartError` if the script did not come to its report.
    """
    status, stdout, stderr = connection.run(SHELL, script, bound, watch)
    report = parse_report(stdout)
    if report is None:
        seen = shown(b"\n".join((stdout, stderr)), secrets, 1000)
        raise NodeStartError(
            f"`{SHELL}` does not run there (status {status}): the server may force a command of its "
            f"own (ForceCommand), or the account has no shell. It printed: {seen or 'nothing'}"
        )
    return ScriptResult(report, 255 if status is None else status, shown(stderr, secrets))


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
