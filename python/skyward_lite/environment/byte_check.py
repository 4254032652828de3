"""Whether a command passes bytes on unchanged, both ways: found out before anything else is sent through it.

A program on the machine prints a line and all 256 byte values that it was sent. What comes back tells a terminal, a
missing `-i`, and a command that runs no shell's command line from each other.
"""

from __future__ import annotations

import logging
import re
import time
from typing import NamedTuple

from .. import _core
from ..errors import NodeStartError
from . import scripts

log = logging.getLogger("skyward_lite")

ALL_BYTES = bytes(range(256))
"""What is sent. Ctrl-C is among it, which ends the program if a terminal reads it."""
ATTEMPTS = 3
"""How often a command is tried that ends without an error before all bytes are back."""
PAUSE_SECONDS = 0.3
"""Pause before another attempt."""
MAX_PRINTED = 1000
"""Characters that an error repeats of what a command printed."""

_BEGIN = re.compile(rb"== skyward_lite bytes ==(\r*)\n")
_ECHOED = b"^@^A"
"""How a terminal shows the first bytes that it is sent."""
_NO_TERMINAL = "leave out the option that asks for one (-t, --tty, or the t of -it)"
_NEEDED = (
    "a shell's command line is added as its last word, so it must end with a program that takes one, such as `sh -c`; "
    "only a command that joins its words, as `ssh` does, needs none"
)
_MISUSED = frozenset({0, 2, 126, 127})
"""Exit statuses of programs that took the shell's command line for something else, or did not find it. Others mean that
the command itself has failed, and has said why."""


class _Answer(NamedTuple):
    """What came back."""

    stdout: bytes
    stderr: bytes
    status: int | None
    seconds: float | None
    """After so many seconds it was given up; None if it has ended."""

    def echoed(self) -> bytes | None:
        """Return what came back of the bytes; None if the program that sends them back did not run."""
        begin = _BEGIN.search(self.stdout)
        return None if begin is None else self.stdout[begin.end() :]

    def is_right(self) -> bool:
        echoed = self.echoed()
        # Behind the bytes a shell may print what it prints when it ends.
        return echoed is not None and echoed.startswith(ALL_BYTES)

    def has_terminal(self) -> bool:
        begin = _BEGIN.search(self.stdout)
        return _ECHOED in self.stdout or (begin is not None and begin[1] != b"")

    def is_wrong(self) -> bool:
        """Return whether nothing that may still come makes it right."""
        echoed = self.echoed()
        return self.has_terminal() or (echoed is not None and not ALL_BYTES.startswith(echoed[: len(ALL_BYTES)]))

    def may_be_cut(self) -> bool:
        """Return whether it ended as if nothing were wrong with some of its output missing."""
        echoed = self.echoed()
        if self.seconds is not None:
            return False
        return self.status == 0 if echoed is None else ALL_BYTES.startswith(echoed) and echoed != b""


class _Decided(Exception):
    """Raised when all bytes are back, or one of them is wrong: how the command ends then does not matter."""


def check(connection: _core.Connection, bound: float) -> None:
    """Raise `NodeStartError` unless a command passes all bytes on, both ways, within `bound` seconds."""
    for _ in range(ATTEMPTS - 1):
        answer = _ask(connection, bound)
        if not answer.may_be_cut() or answer.is_right():
            break
        log.info("%s has lost bytes (status %s): it is tried again", scripts.shown_program(connection), answer.status)
        time.sleep(PAUSE_SECONDS)
    else:
        answer = _ask(connection, bound)
    if not answer.is_right():
        raise NodeStartError(f"{scripts.shown_program(connection)} {explain(answer)}")


def _ask(connection: _core.Connection, bound: float) -> _Answer:
    """Send the bytes, and return what came back."""
    stdout, stderr = bytearray(), bytearray()

    def watch(printed: bytes, complaint: bytes) -> None:
        stdout.extend(printed)
        stderr.extend(complaint)
        answer = _Answer(bytes(stdout), b"", 0, None)
        if answer.is_right() or answer.is_wrong():
            raise _Decided

    command = scripts.command(scripts.read("echo.sh"), str(len(ALL_BYTES)))
    deadline = time.monotonic() + bound
    status, seconds = None, None
    try:
        status, _, _ = connection.run(command, ALL_BYTES, bound, watch)
    except _Decided:
        pass
    except _core.CoreError:
        if time.monotonic() < deadline:
            raise
        seconds = bound
    return _Answer(bytes(stdout), bytes(stderr), status, seconds)


def explain(answer: _Answer) -> str:
    """Return what a command does that has not sent all bytes back, and the remedy."""
    echoed = answer.echoed()
    ended = f"(status {answer.status})" if answer.seconds is None else f"within {answer.seconds:g} s"
    if answer.has_terminal():
        return f"has a terminal, which changes bytes: {_NO_TERMINAL}"
    if echoed is None:
        printed = scripts.shown(answer.stdout + b"\n" + answer.stderr, limit=MAX_PRINTED)
        if not printed:
            return f"printed nothing {ended}: {_NEEDED}"
        remedy = f"\n({_NEEDED})" if answer.seconds is not None or answer.status in _MISUSED else ""
        if re.search(r"\btty\b", printed, re.IGNORECASE):
            remedy = f"\n(it must not ask for a terminal: {_NO_TERMINAL})"
        return f"did not run the command line that was added to it {ended}. It printed: {printed}{remedy}"
    if not echoed:
        return (
            f"reaches a shell, but none of its standard input arrived there {ended}: docker, podman and kubectl exec "
            "need the option -i"
        )
    if ALL_BYTES.startswith(echoed):
        return f"is cut: {len(echoed)} of {len(ALL_BYTES)} bytes came back {ended}"
    return f"changes bytes: {_difference(echoed)}. It must pass them on as they are"


def _difference(echoed: bytes) -> str:
    """Return the first byte that came back otherwise, and what came in its place."""
    place = next((n for n, byte in enumerate(ALL_BYTES) if echoed[n : n + 1] != bytes([byte])), len(ALL_BYTES))
    if place == len(ALL_BYTES):
        return f"{len(echoed)} came back for {len(ALL_BYTES)}"
    came = " ".join(f"{byte:02x}" for byte in echoed[place : place + 4]) or "nothing"
    return f"where byte {place:02x} was sent, {came} came back (hexadecimal)"
