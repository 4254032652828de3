"""Who this process is, in a tag: so that another one can tell whether it still lives."""

from __future__ import annotations

import functools
import getpass
import hashlib
import os
import re
import socket
import subprocess
import uuid
from pathlib import Path
from typing import Literal


def name() -> str:
    """Give user and host, for people."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"[:256]


def process() -> str:
    """Give this process: machine, process id and time of its start."""
    return f"{machine()} {os.getpid()} {_started(os.getpid())}"


def fate(tag: str) -> Literal["lives", "gone", "unknown"]:
    """Return what became of the process of a tag, as far as that is certain: it is for those of this very machine.

    Whoever may tag can write anything into a tag: one that `process` would not have written says nothing.
    """
    found = re.fullmatch(r"([0-9a-f]{16}) ([1-9][0-9]{0,8}) (\S*)", tag)
    if found is None or found[1] != machine():
        return "unknown"
    pid, started = int(found[2]), found[3]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except OSError:
        pass  # somebody else's: the id was given anew, perhaps
    now = _started(pid)
    # Where a start could not be told, the process that has the number now may be the same one.
    if "" in (now, started):
        return "unknown"
    return "lives" if now == started else "gone"


@functools.cache
def machine() -> str:
    """Name this machine as those see it who share its processes, its host name and its cache directory.

    A host name alone would do for too many: of two laptops, of containers.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skyward_lite"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = cache / "machine-id"
        try:
            with file.open("x") as new:
                new.write(uuid.uuid4().hex)
        except FileExistsError:
            pass
        own = file.read_text()
    except OSError:
        own = uuid.uuid4().hex
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return hashlib.sha256("\n".join([own, socket.gethostname(), processes]).encode()).hexdigest()[:16]


def _started(pid: int) -> str:
    """Say when a process started; empty if that cannot be said."""
    try:
        # Between parentheses is the program's name, in whatever bytes.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode("ascii").split()
    except OSError:
        if os.path.isdir("/proc/self"):
            return ""
        plain = {**os.environ, "TZ": "UTC", "LC_ALL": "C"}
        asked = ["ps", "-o", "lstart=", "-p", str(pid)]
        done = subprocess.run(asked, capture_output=True, text=True, check=False, env=plain)
        return "-".join(done.stdout.split())
    # A zombie has ended; field 20 after the name is the start, in ticks since the boot.
    return "ended" if fields[0] in "ZX" else fields[19]
