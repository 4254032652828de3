"""The processes of this test run: to list them and to wait for them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import skyward_lite as sky

MARK = "SKYWARD_TEST_RUN"
os.environ[MARK] = str(os.getpid())


def ours() -> dict[int, str]:
    """Return the agents and workers that this test run started: process id → command line."""
    found = {}
    mark = f"{MARK}={os.environ[MARK]}".encode()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes()
            if (b"skyward_lite." in command or b"fake_agent" in command) and mark in (
                directory / "environ"
            ).read_bytes():
                found[int(directory.name)] = command.replace(b"\0", b" ").decode()
        except OSError:
            continue  # it ended meanwhile
    return found


def parent(pid: int) -> int:
    """Return a process's parent; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def children(pid: int) -> dict[int, str]:
    """Return the children of a process, adopted ones included: process id → name, or Z if it has ended."""
    found = {}
    for directory in Path(f"/proc/{pid}/task").glob("*"):
        try:
            for child in (directory / "children").read_text().split():
                name, _, rest = Path(f"/proc/{child}/stat").read_text().partition("(")[2].rpartition(") ")
                found[int(child)] = "Z" if rest.startswith("Z") else name
        except OSError:
            continue  # it ended meanwhile
    return found


def has_ended(pid: int) -> bool:
    """Return whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def eventually(true: Callable[[], object], seconds: float) -> bool:
    """Wait until `true()`, for at most `seconds`. Return whether it became true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.01)
    return bool(true())


def refusal_in_a_fork(use: Callable[[], object]) -> str:
    """Fork, and return the text of the PoolClosedError that `use()` raises in the child; empty if it raises none."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            use()
        except sky.PoolClosedError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


CLIENT = """
import sys, time, operator, subprocess, skyward_lite as sky
def spawn():
    # A daemon: it has left the worker's group and session, and its parent has ended.
    code = "import os, time"
    code += "\\nfor leave in (os.setsid, lambda: None): os.fork() and os._exit(0); leave()"
    code += "\\nprint(os.getpid(), flush=True); os.closerange(0, 99); time.sleep(300)"
    return int(subprocess.check_output([sys.executable, "-c", code, "skyward_lite.grandchild"]))
pool = sky.pool(lease={lease}, worker=sky.Worker(concurrency=2), plugins=[]).__enter__()
print(pool.nodes()[0].pid, pool.submit(spawn).result(), flush=True)
pool.submit(time.sleep, 300)
time.sleep(300)
"""


def client_with_a_grandchild(directory: Path, lease: float) -> tuple[subprocess.Popen[str], int, int]:
    """Start a client with a pool, a task and a daemon of it. Return it, and the ids of its agent and the daemon."""
    script = directory / "client.py"
    script.write_text(CLIENT.format(lease=lease))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    agent, grandchild = map(int, process.stdout.readline().split())
    assert {agent, grandchild} <= set(ours())
    return process, agent, grandchild
