"""The agent process of one node.

`python -m skyward_lite.node.agent stdio` serves the client at its standard input and output, and is started by sshd.
With `--alive` and `--spot` it also does what an EC2 instance's agent has to do (`ec2_watch.py`).
`python -m skyward_lite.node.agent embedded` has an SSH server of its own, behind the socket at its standard input.

This module starts the agent. What an agent does is written in Rust (`rust/src/node/agent.rs`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import signal
import sys
import threading
import time

from .. import _core
from .._version import PYTHON, __version__
from ..nesting import AGENT
from . import take_socket

USE_MARK_SECONDS = 300.0
"""Between two marks of use: a small part of the days for which an unused environment stays on a host."""

_DISTRIBUTION = re.compile(r"(.+?)-([^-]+)(?:-.*)?\.(?:dist-info|egg-info)")


def packages() -> dict[str, str]:
    """Return the distributions that this interpreter finds: normalized name → version.

    They are read off the names of their directories: reading each one's metadata takes longer than all the rest of the
    agent's start.
    """
    found: dict[str, str] = {}
    for directory in sys.path:
        try:
            names = os.listdir(directory or ".")
        except OSError:
            continue
        for name in names:
            match = _DISTRIBUTION.fullmatch(name)
            if match is not None:
                # As `image.canonical`, a module that an agent starts sooner without.
                found.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), match[2])
    return found


def spec() -> _core.AgentSpec:
    """Return what the agent must be told because it cannot find it out by itself."""
    options = ["-P"]
    if hasattr(sys.flags, "context_aware_warnings"):
        # From Python 3.14 on: what task_warnings.py does for earlier versions.
        options += ["-X", "context_aware_warnings=1", "-X", "thread_inherit_context=1"]
    return {
        "worker": [sys.executable, *options, "-m", "skyward_lite.node.worker"],
        "version": __version__,
        "python": PYTHON,
        "epoch": os.urandom(16).hex(),
        "packages": packages(),
    }


def embedded() -> None:
    """Serve one client over standard input, which is a socket. The keys come first, as one line of JSON."""
    fd = take_socket()
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte:
            sys.exit("the client left before it sent its keys")
        line += byte
    keys = json.loads(line)
    _core.serve_embedded(
        spec(),
        fd=fd,
        host_key=keys["host_key"],
        authorized_key=keys["authorized_key"],
        timeout=keys["timeout"],
    )


def stdio(alive: str | None = None, spot: bool = False) -> None:
    """Serve one client over standard input and output."""
    if alive is not None:
        # Not at the module's head: its HTTP client would make up a good part of every other agent's start.
        from . import ec2_watch

        ec2_watch.begin(alive, spot=spot)
    mark = pathlib.Path(sys.prefix, "ready")
    if mark.is_file():
        threading.Thread(target=_mark_use, args=(mark,), name="mark", daemon=True).start()
    writing = os.dup(1)
    # Whatever prints in this process must not get between the frames.
    os.dup2(2, 1)
    _core.serve(spec(), reading=take_socket(), writing=writing)


def _mark_use(mark: pathlib.Path) -> None:
    """Show by the time of a file, for as long as this process lives, that its environment is in use."""
    while True:
        with contextlib.suppress(OSError):
            os.utime(mark)
        time.sleep(USE_MARK_SECONDS)


def main() -> None:
    """Be the agent that the command line asks for."""
    os.environ.pop(AGENT, None)
    match sys.argv[1:]:
        case ["embedded"]:
            serve = embedded
        case ["stdio"]:
            serve = stdio
        case ["stdio", "--alive", alive, *spot] if spot in ([], ["--spot"]):
            serve = functools.partial(stdio, alive, bool(spot))
        case wrong:
            sys.exit(f"usage: python -m skyward_lite.node.agent embedded | stdio [--alive FILE [--spot]] (got {wrong})")
    # The client handles Ctrl-C and the like. The agent ends when the client tells it to, or is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        serve()
    except _core.CoreError as error:
        sys.exit(f"skyward_lite agent: {error}")


if __name__ == "__main__":
    main()
