"""A process that imports as a worker does: its requests go to the test's process, which answers as a client does.

Reads lines of Python from its standard input, runs each, and writes a line with what it evaluates to, or the exception.
A request is a line that begins with "?", the answer to it the next line of input, both in hexadecimal.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skyward_lite.client.sources import Sources

WORKER = r"""
import sys, types
requests = []
class Core:
    node, lease_ms, generation, directory = "n1", 1000, int(sys.argv[2]), sys.argv[1]
    @staticmethod
    def request(pickled, bound_ms):
        assert bound_ms >= 600_000
        requests.append(pickled.decode().split("\n")[1])
        print("?" + pickled.hex(), flush=True)
        answer = sys.stdin.readline().strip()
        return None if answer == "none" else bytes.fromhex(answer)
from skyward_lite.node import importer
importer.install(Core)
names = {"requests": requests, "importer": importer}
for line in iter(sys.stdin.readline, ""):
    try:
        shown = "="
        try:
            shown += repr(eval(line, names))
        except SyntaxError:
            exec(line.replace("\t", "\n"), names)
    except BaseException as error:
        shown = f"!{type(error).__name__}: {error} {getattr(error, '__notes__', '')}".replace("\n", " ")
    print(shown, flush=True)
"""


class Worker:
    """The process. `run` runs a line there; `answer` answers its requests."""

    def __init__(self, served: Sources, directory: Path | None, generation: int = 0) -> None:
        self.answer: Callable[[bytes], bytes | None] = served.answer
        command = [sys.executable, "-P", "-c", WORKER, str(directory or ""), str(generation)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=directory
        )

    def run(self, line: str) -> Any:
        """Return the value of a line, or "Error: its text" for one that raises. Newlines are written as tabs."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        while True:
            self._process.stdin.flush()
            shown = self._process.stdout.readline().rstrip("\n")
            if shown.startswith("?"):
                answer = self.answer(bytes.fromhex(shown[1:]))
                self._process.stdin.write(("none" if answer is None else answer.hex()) + "\n")
                continue
            assert shown, "the process has ended"
            return shown[1:] if shown[0] == "!" else eval(shown[1:] or "None")

    def close(self) -> None:
        """End it, and wait for its end."""
        self._process.communicate(timeout=10)
