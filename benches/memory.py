"""The most memory that a node's processes take together: `memory.py AGENT_PID`, until standard input ends.

Prints a JSON object of bytes. The agent, its workers and their children are looked at many times a second. What is
shared counts once: a memory file by its blocks, be it mapped or only open; other memory by each process's share.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from pathlib import Path

SECONDS = 0.02
"""Between two looks."""


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    pids = [pid]
    for one in pids:
        with contextlib.suppress(OSError):
            for children in Path(f"/proc/{one}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    pids += [int(child) for child in children.read_text().split()]
    return pids


def shares(pid: int) -> dict[str, int]:
    """Return the process's share of the memory of each kind that it maps, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    rows = [line.split() for line in lines if line.startswith("Pss_")]
    return {row[0]: int(row[1]) * 1024 for row in rows}


def memory_files(pid: int) -> dict[tuple[int, int], int]:
    """Return the bytes in the files without a name that the process has open or mapped, by (device, inode)."""
    files = {}
    for where in ("fd", "map_files"):  # only root may look at the second
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/{where}").iterdir():
                with contextlib.suppress(OSError):
                    if str(link.readlink()).endswith(" (deleted)"):
                        status = link.stat()
                        files[status.st_dev, status.st_ino] = status.st_blocks * 512
    return files


def look(agent: int) -> dict[str, int]:
    """Return what the node takes now."""
    own = 0
    files: dict[tuple[int, int], int] = {}
    for pid in family(agent):
        with contextlib.suppress(OSError):  # it has just ended
            share = shares(pid)
            own += share["Pss_Anon:"] + share["Pss_File:"]
            files |= memory_files(pid)
    # The processes' shares of these files do not count: they change while they are being added up.
    return {"node": own + sum(files.values()), "own": own, "shared": sum(files.values())}


def main() -> None:
    """Look until standard input ends; print the look with the most memory."""
    agent, most = int(sys.argv[1]), {"node": 0}
    while not select.select([sys.stdin], [], [], SECONDS)[0]:
        most = max(most, look(agent), key=lambda each: each["node"])
    print(json.dumps({**most, "pid": os.getpid()}))


if __name__ == "__main__":
    main()
