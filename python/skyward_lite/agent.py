"""The agent process of one node: `python -m skyward_lite.agent embedded`, with the client's socket as standard input.

The work is done in Rust (`agent.rs`); this is how it is started.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from . import _core
from ._stdin import take_socket
from ._version import PYTHON, __version__

WORKER = [sys.executable, "-P", "-m", "skyward_lite.worker"]


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
    # Ctrl-C and the like are the client's to handle; the agent ends when the client says so, or is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _core.serve_embedded(
            fd=fd,
            host_key=keys["host_key"],
            authorized_key=keys["authorized_key"],
            timeout=keys["timeout"],
            worker=WORKER,
            version=__version__,
            python=PYTHON,
            epoch=os.urandom(16).hex(),
        )
    except _core.CoreError as error:
        sys.exit(f"skyward_lite agent: {error}")


def main() -> None:
    """Do what the command line says."""
    match sys.argv[1:]:
        case ["embedded"]:
            embedded()
        case other:
            sys.exit(f"usage: python -m skyward_lite.agent embedded (got {other})")


if __name__ == "__main__":
    main()
