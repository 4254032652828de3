"""The tags on everything that a run makes at EC2: whose it is, and until when.

of_run            the tags that a run writes
client_fate       whether the client that a tag names still runs, which `reap` asks
"""

from __future__ import annotations

import datetime
import functools
import getpass
import hashlib
import os
import re
import socket
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ..._version import __version__

PREFIX = "skyward-lite:"
"""Begins the names of our tags; `AWS(tags=)` may not set any of them."""
RUN, OWNER, PROCESS, EXPIRES, VERSION = (
    f"{PREFIX}{name}" for name in ("run", "owner", "process", "expires", "version")
)


def of_run(run: str, expires: datetime.datetime, more: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the tags of everything that the run with this id makes, and `more`, as EC2's API takes them."""
    tags = {
        "Name": f"skyward_lite {run[:8]}",
        RUN: run,
        OWNER: owner(),
        PROCESS: this_process(),
        EXPIRES: shown_time(expires),
        VERSION: __version__,
        **more,
    }
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def shown_time(time: datetime.datetime) -> str:
    """Return a time as the tag `EXPIRES` has it."""
    return time.isoformat(timespec="seconds")


def owner() -> str:
    """Return user and host, for people."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"[:256]


def this_process() -> str:
    """Return the tag of this process: the machine's name, the process id and the start time."""
    return f"{machine_name()} {os.getpid()} {start_time(os.getpid())}"


def client_fate(tag: str) -> Literal["lives", "gone", "unknown"]:
    """Return whether the process that a tag `PROCESS` names still runs; "unknown" for a process of another machine.

    Whoever may tag resources can write any text into the tag. A text that `this_process` would not have written is
    "unknown", too.
    """
    found = re.fullmatch(r"([0-9a-f]{16}) ([1-9][0-9]{0,8}) (\S*)", tag)
    if found is None or found[1] != machine_name():
        return "unknown"
    pid, started = int(found[2]), found[3]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except OSError:
        pass  # another user's process, which may have been given the same id later
    now = start_time(pid)
    # Without both start times, the process that has the id now may or may not be the client.
    if "" in (now, started):
        return "unknown"
    return "lives" if now == started else "gone"


@functools.cache
def machine_name() -> str:
    """Return a name that two processes share only if they share the cache directory, the host name and the process ids.

    The host name alone is not enough: two laptops can have the same one, and so can two containers.
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
        cache_id = file.read_text()
    except OSError:
        cache_id = uuid.uuid4().hex
    try:
        process_namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        process_namespace = ""
    return hashlib.sha256("\n".join([cache_id, socket.gethostname(), process_namespace]).encode()).hexdigest()[:16]


def start_time(pid: int) -> str:
    """Return when a process started, in the unit of this system; empty if the system does not tell."""
    try:
        # The program's name stands between parentheses, and may hold any bytes.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode("ascii").split()
    except OSError:
        if os.path.isdir("/proc/self"):
            return ""
        plain = {**os.environ, "TZ": "UTC", "LC_ALL": "C"}
        command = ["ps", "-o", "lstart=", "-p", str(pid)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
        return "-".join(done.stdout.split())
    # A zombie has ended. Field 20 after the name is the start time, in clock ticks since the boot.
    return "ended" if fields[0] in "ZX" else fields[19]
