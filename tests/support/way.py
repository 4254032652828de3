"""A command that leads to a node, with a fault: `python way.py DIRECTORY FAULT NODE sh -c LINE`.

It starts its last words as a process of a session of its own, and passes bytes on in both directions, as the clients of
containers and batch systems do. When it is killed, that process lives on, with closed streams. DIRECTORY gets a file
for each of these processes, named by its process id: NODE, a blank and "agent" or "script".

FAULT is "none", or one of these, with a number N after a colon:

banner         prints lines before anything else, to both streams
noeof          never passes the end of standard input on
lingers        does not end when what it started has ended
no-input       does not pass standard input on at all
terminal       gives what it started a terminal
doubles:N      passes byte N of the output on twice
flips:N        changes byte N of the output
spoils:N       changes byte N of the input
cuts:N         ends with status 1 after byte N of the output
forgets:N      loses the last N bytes of the output, if they come just before its end, and ends with status 0
text           passes the output on as text in UTF-8
silent         prints nothing, and never ends
...@agent      only for agents;  ...@script   only for scripts (all that is no agent)
...+K          not the first K times of these
...*M          then only M times; the file DIRECTORY/times counts them
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

CHUNK = 1 << 16
END_SECONDS = 0.05
"""Output that nothing has followed for so long was not its end."""


class Way:
    """One run of the command."""

    def __init__(self, directory: Path, fault: str, node: str, words: list[str]) -> None:
        self.directory = directory
        self.kind = "agent" if "skyward_lite.node." in words[-1] else "script"
        self.fault, self.number = self._choose(fault)
        self.node = node
        self.words = words
        self.passed = 0
        """Bytes of the output that were passed on."""
        self.taken = 0
        """Bytes of the input so far."""
        self.held = b""
        """Output that may be its end."""

    def _choose(self, fault: str) -> tuple[str, int]:
        match = re.fullmatch(r"([a-z-]+)(?::(\d+))?(?:@(agent|script))?(?:\+(\d+))?(?:\*(\d+))?", fault)
        assert match, fault
        name, number, kind, first, times = match.groups()
        if kind not in (None, self.kind):
            return "none", 0
        turn = self._turn() - int(first or 0)
        if turn <= 0 or (times and turn > int(times)):
            return "none", 0
        return name, int(number or 0)

    def _turn(self) -> int:
        """Return how often the command was run so far, this time included."""
        with (self.directory / "times").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write("x")
            return file.tell()

    def run(self) -> int:
        """Pass everything on, and return the exit status."""
        mine = self.directory / str(os.getpid())
        mine.write_text(f"{self.node} {self.kind}")
        if self.fault == "silent":
            select.select([], [], [])
        if self.fault == "banner":
            print("WELCOME\r\n== to all ==", flush=True)
            print("you are being watched", file=sys.stderr, flush=True)
        child, writing, reading = self._start()
        status = self._pump(child, writing, reading)
        if self.fault == "lingers":
            select.select([], [], [])
        mine.unlink()
        return status

    def _start(self) -> tuple[subprocess.Popen[bytes], int, int]:
        if self.fault != "terminal":
            pipe = subprocess.PIPE
            child = subprocess.Popen(self.words, stdin=pipe, stdout=pipe, start_new_session=True)
            assert child.stdin is not None
            assert child.stdout is not None
            return child, child.stdin.fileno(), child.stdout.fileno()
        ours, theirs = pty.openpty()
        child = subprocess.Popen(self.words, stdin=theirs, stdout=theirs, start_new_session=True)
        os.close(theirs)
        return child, ours, os.dup(ours)

    def _pump(self, child: subprocess.Popen[bytes], writing: int, reading: int) -> int:
        sources = [0, reading]
        while reading in sources:
            ready = select.select(sources, [], [], END_SECONDS if self.held else None)[0]
            if not ready:
                write(1, self.held)
                self.held = b""
            for source in ready:
                data = b""
                with contextlib.suppress(OSError):  # of a terminal that nobody has open any more
                    data = os.read(source, CHUNK)
                if source == reading:
                    if not data:
                        sources.remove(source)
                    elif not self._pass_on(data):
                        return 1
                elif not data:
                    sources.remove(source)
                    if self.fault not in ("noeof", "terminal"):
                        os.close(writing)
                elif self.fault != "no-input":
                    with contextlib.suppress(BrokenPipeError):
                        write(writing, self._spoiled(data))
        if self.fault == "forgets":
            return 0
        return child.wait()

    def _spoiled(self, data: bytes) -> bytes:
        """Return input as it is passed on."""
        place = self.number - self.taken
        self.taken += len(data)
        if self.fault != "spoils" or not 0 <= place < len(data):
            return data
        return data[:place] + bytes([data[place] ^ 8]) + data[place + 1 :]

    def _pass_on(self, data: bytes) -> bool:
        """Write output. Return false if it is to be cut here."""
        place = self.number - self.passed
        here = 0 <= place < len(data)
        self.passed += len(data)
        if self.fault == "forgets":
            data = self.held + data
            data, self.held = data[: -self.number], data[-self.number :]
        elif self.fault == "text":
            data = data.decode(errors="replace").encode()
        elif self.fault == "doubles" and here:
            data = data[: place + 1] + data[place:]
        elif self.fault == "flips" and here:
            data = data[:place] + bytes([data[place] ^ 8]) + data[place + 1 :]
        elif self.fault == "cuts" and here:
            write(1, data[:place])
            return False
        write(1, data)
        return True


def write(fd: int, data: bytes) -> None:
    """Write all of it."""
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    sys.exit(Way(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]).run())
