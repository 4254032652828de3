"""A program on a real terminal, by tmux: what is on its screen now, and what scrolled away above."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import eventually

SECONDS = 20.0
"""Bound on each wait for something on the screen."""
ENDED = "the program ended with status"

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux: `make system` installs it")


class Screen:
    """A terminal on which one program runs, by a tmux server of its own."""

    def __init__(self, directory: Path, columns: int = 100, rows: int = 24) -> None:
        self._server = ["tmux", "-u", "-f", "/dev/null", "-L", f"skyward-{uuid.uuid4().hex[:8]}"]
        self._size = ["-x", str(columns), "-y", str(rows)]
        self._directory = directory

    def run(self, program: str, redirections: str = "", **environment: str) -> None:
        """Run a Python program whose streams are the terminal, but for those that the shell redirects."""
        path = self._directory / "program.py"
        path.write_text(program)
        variables = {"PYTHONPATH": str(Path(__file__).parent), "LC_ALL": "C.UTF-8", **environment}
        # The shell is to outlive Ctrl-C.
        lines = ["trap : INT", *(f"export {name}={shlex.quote(value)}" for name, value in variables.items())]
        lines.append(f"{shlex.quote(sys.executable)} {shlex.quote(str(path))} {redirections}")
        lines.append(f'echo "{ENDED} $?"; read end')
        script = self._directory / "program.sh"
        script.write_text("\n".join(lines))
        self._tmux("new-session", "-d", *self._size, f"cd {shlex.quote(str(self._directory))}; exec sh {script}")

    def text(self, colours: bool = False) -> str:
        """Return what is on the screen and above, without spaces at the ends of lines; perhaps with colours."""
        captured = self._tmux("capture-pane", "-p", "-S", "-", *(["-e"] if colours else []))
        return "\n".join(line.rstrip() for line in captured.split("\n")).rstrip("\n")

    def wait(self, seen: Callable[[str], object], seconds: float = SECONDS) -> str:
        """Wait until `seen` is true of the text, and return the text."""
        found = ""

        def looked() -> bool:
            nonlocal found
            found = self.text()
            return bool(seen(found))

        assert eventually(looked, seconds), found
        return found

    def end(self) -> list[str]:
        """Wait for the program's end, and return all lines."""
        return self.wait(lambda text: ENDED in text).split("\n")

    def press(self, *keys: str) -> None:
        """Press keys, by tmux's names: `C-c`."""
        self._tmux("send-keys", *keys)

    def resize(self, columns: int, rows: int) -> None:
        """Change the terminal's size."""
        self._tmux("resize-window", "-x", str(columns), "-y", str(rows))

    def close(self) -> None:
        """End the terminal and its program."""
        subprocess.run([*self._server, "kill-server"], capture_output=True, check=False)

    def _tmux(self, *arguments: str) -> str:
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        environment.pop("TMUX", None)
        done = subprocess.run([*self._server, *arguments], capture_output=True, text=True, check=True, env=environment)
        return done.stdout
