"""How busy processors are with each part of the way to a node: the client, what carries its bytes, and the node."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

PARTS = ("client", "carrier", "node")
CARRIERS = ("sshd", "sshd-session", "srun", "slurmstepd", "slurmd")
"""Programs that only pass bytes on."""
PR_SET_CHILD_SUBREAPER = 36
TICKS = os.sysconf("SC_CLK_TCK")


def adopt() -> None:
    """Make whatever this process starts, and that leaves its parents, a child of this process: `busy` finds it so."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _processes() -> dict[int, tuple[int, str, float]]:
    """Return all processes: process id → its parent, its program, and the seconds of processor time that it took."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            before, _, after = (directory / "stat").read_text().rpartition(")")
            words = after.split()
            found[int(directory.name)] = (int(words[1]), before.partition("(")[2], sum(map(int, words[11:13])) / TICKS)
    return found


def _times() -> dict[int, tuple[str, float]]:
    """Return this process and its descendants: process id → the part that it is of, and its processor time."""
    processes, found = _processes(), {}
    for pid, (_, program, seconds) in processes.items():
        above = pid
        while above in processes and above != os.getpid():
            above = processes[above][0]
        if above == os.getpid():
            part = "client" if pid == above else "carrier" if program in CARRIERS else "node"
            found[pid] = (part, seconds)
    return found


@contextlib.contextmanager
def busy(found: dict[str, float], name: str) -> Iterator[None]:
    """Note for each part how many processors it kept busy during the block, as "NAME, PART"."""
    before, begin = _times(), time.perf_counter()
    yield
    took, after = time.perf_counter() - begin, _times()
    for part in PARTS:
        # What has ended meanwhile is missing: no process of a pool that works ends.
        spent = sum(seconds - before.get(pid, ("", 0.0))[1] for pid, (its, seconds) in after.items() if its == part)
        found[f"{name}, {part}"] = spent / took
