"""Runs its argument, or as a forced command what an SSH session asks for, and then ends whatever that has started.

So do servers under systemd's `KillUserProcesses=yes`, and containers that end with the connection.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_CHILD_SUBREAPER = 36


def children() -> list[int]:
    """Return the children of this process. Whatever a child leaves behind is a child of this process, too."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(word) for word in file.read().split()]


def main() -> None:
    """Run the session's command, and end its processes."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    command = sys.argv[1] if len(sys.argv) > 1 else os.environ["SSH_ORIGINAL_COMMAND"]
    try:
        sys.exit(subprocess.call(["/bin/sh", "-c", command]))
    finally:
        while children():
            for pid in children():
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.001)


if __name__ == "__main__":
    main()
