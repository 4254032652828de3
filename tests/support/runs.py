"""Runs of pools that never were: for reports and traces of any size."""

from __future__ import annotations

import heapq
import random
from typing import Any

from skyward_lite import _core
from skyward_lite.client.failures import Failure
from skyward_lite.client.node_state import Node, Status
from skyward_lite.client.records import Record
from skyward_lite.client.run import Ready, Run
from skyward_lite.providers import Cost

SECOND = 1_000_000_000
NAMES = ["", "jobs.fit", "jobs.score", "</script><b>&"]


def node(name: str = "lab0", **fields: Any) -> Node:
    """Return a ready node of eight slots that has done nothing, but for the given fields."""
    counts = dict.fromkeys(
        ("running", "queued", "done", "failed", "rerun", "bytes_sent", "bytes_received", "cached_bytes"), 0
    )
    usual = {"state": "ready", "reason": "", "slots": 8, "rtt": 0.0004, "pid": 1, "since": 0.0}
    return Node(**{"name": name, **usual, **counts, **fields})


def status(nodes: list[Node], **fields: Any) -> Status:
    """Return the status of a pool of these nodes, whose counts are added up, but for the given fields."""
    names = ("slots", "running", "queued", "done", "failed", "rerun", "bytes_sent", "bytes_received")
    sums = {name: sum(getattr(each, name) for each in nodes) for name in names}
    usual = {"pending": 0, "cost": None, "payload_sent": 0, "payload_received": 0, "seconds": 0.0}
    return Status(**{"nodes": nodes, **usual, **sums, **fields})


def run(tasks: int, nodes: int = 2, slots: int = 4, seconds: float = 1.0, seed: int = 0, **fields: Any) -> Run:
    """Return a closed pool's run of so many tasks, of which 1 in 50 failed; but for the given fields."""
    chance = random.Random(seed)
    free = [(int((0.8 + 0.5 * number) * SECOND), number, slot) for number in range(nodes) for slot in range(slots)]
    heapq.heapify(free)
    records = []
    for task in range(tasks):
        start, number, slot = heapq.heappop(free)
        name = chance.choice([1, 1, 1, 2, 3])
        duration = int(chance.lognormvariate(0, 0.5) * seconds * SECOND * (2.5 if name == 2 else 0.7))
        outcome = _core.RAISED if task % 50 == 7 else _core.RETURNED
        sent, received = chance.randrange(1_000, 400_000), chance.randrange(100, 900_000)
        records.append(Record(start, duration, sent, received, 1, name, slot, number, outcome))
        heapq.heappush(free, (start + duration + int(0.02 * seconds * SECOND), number, slot))
    end = max((record.end for record in records), default=0) + SECOND // 2
    done = [sum(record.node == number for record in records) for number in range(nodes)]
    failed = [sum(record.node == n and record.outcome != _core.RETURNED for record in records) for n in range(nodes)]
    all_nodes = [
        node(f"lab{n}", state="closed", slots=slots, done=done[n], failed=failed[n], bytes_sent=10**6)
        for n in range(nodes)
    ]
    usual: dict[str, Any] = {
        "program": "train.py",
        "provider": "SSH('lab0', 'lab1')",
        "versions": "skyward_lite 0.1.0, Python 3.11.2, joblib 1.5.1, Linux x86_64",
        "zero": 1_700_000_000.0,
        "begin": SECOND // 10,
        "end": end,
        "stage": "closed",
        "status": status(all_nodes, slots=0, cost=Cost(0.36, 0.0123), seconds=end / SECOND),
        "names": NAMES,
        "records": records,
        "dropped": 0,
        "ready": [Ready(n, slots, int((0.7 + 0.5 * n) * SECOND), end) for n in range(nodes)],
        "failures": [
            Failure(1.0, "ValueError", f"no such <depth>: {task}", f"node lab1, task {task}: score({task})")
            for task in range(min(sum(failed), 5))
        ],
        "failed_calls": sum(failed),
    }
    return Run(**{**usual, **fields})
