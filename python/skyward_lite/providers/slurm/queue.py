"""What Slurm's queue says of a pool's jobs, and what that means for a node.

One `squeue` answers for all jobs of a pool: a thread that asks shortly after another one gets the same answer.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...errors import NodeStartError
from . import commands, options

_FIELDS = (
    *("ArrayJobID:24", "ArrayTaskID:24", "JobID:24", "State:24", "Reason:200", "TimeLeft:24", "TimeLimit:24"),
    *("NumCPUs:16", "NodeList:256", "tres-alloc:200", "PreemptTime:32"),
)
"""What is asked of each job, each with its greatest length."""
COLUMNS = ",".join(f"{field}|" for field in _FIELDS)

WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
"""States of a job that has no nodes yet."""
GOING = frozenset({"RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"})
"""States of a job that has its nodes."""
ENDING = "COMPLETING"
"""The state of a job whose processes are being ended, whichever state it will have afterwards."""


class Row(NamedTuple):
    """One job, as squeue describes it."""

    id: str
    """As scancel and squeue take it, and as it is shown: "58", or "58_0" for a job of an array."""
    number: str
    """As srun takes it, once the job runs."""
    state: str
    reason: str
    """Why it waits, or ended; "" for none."""
    seconds_left: float | None
    """Until its time limit; None if it has none."""
    cpus: int
    nodes: str
    """The name of its node; "" before it runs."""
    memory_bytes: int | None
    """What it has of its node's memory; None where Slurm does not count memory."""
    preempted: bool

    def described(self) -> str:
        """Return its state with the reason, as "PENDING (Resources)"."""
        return f"{self.state} ({self.reason})" if self.reason else self.state


def parse(text: str) -> dict[str, Row]:
    """Return the jobs of squeue's output by their ids; lines that are none are left out."""
    rows = {}
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|")]
        if len(fields) != len(_FIELDS) + 1 or not fields[0].isdecimal():
            continue
        base, index, number, state, reason, left, limit, cpus, nodes, tres, preempted = fields[:-1]
        job = f"{base}_{index}" if index.isdecimal() else base
        rows[job] = Row(
            job,
            number,
            state,
            "" if reason in ("None", "(null)") else reason,
            seconds_left(left, limit),
            int(cpus) if cpus.isdecimal() else 1,
            "" if nodes == "(null)" else nodes,
            _memory_bytes(tres),
            preempted not in ("", "N/A", "None", "NONE", "Unknown"),
        )
    return rows


def seconds_left(left: str, limit: str) -> float | None:
    """Return the seconds that are left of a time limit, as in "1-02:03:04", "2:03:04" or "0:08"; None for no limit.

    Slurm writes "INVALID" for a time that is over, but also for one of more than a year, be it a limit.
    """
    if left == "INVALID":
        return None if limit == "INVALID" else 0.0
    return _seconds(left)


def _seconds(text: str) -> float | None:
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _memory_bytes(tres: str) -> int | None:
    """Return the memory of "cpu=3,mem=500M,node=1"."""
    match = re.search(r"(?:^|,)mem=([^,]*)", tres)
    found = None if match is None else options.memory_bytes(match[1])
    return None if found is None else int(found)


class Fate(NamedTuple):
    """What becomes of a job."""

    goes_on: bool
    text: str
    """As in "job 58_0 … "; "" if nothing is to be said."""
    by_hand: bool = False
    """Whether a person cancelled it."""
    as_planned: bool = False
    """Whether Slurm ends it as it announced: at its time limit, or for a job of a higher priority."""
    by_cluster: bool = False
    """Whether the cluster ended it, and another job may do better."""
    is_certain: bool = True
    """Whether Slurm has said so; else it is what remains when Slurm gives no other reason yet."""
    has_node: bool = False
    """Whether the job may still have its node, as a preempted one in its GraceTime."""

    @property
    def is_over(self) -> bool:
        """Return whether nothing is left of the job that could be cancelled."""
        return not self.goes_on and not self.has_node


_NODES_FAULTS = frozenset({"NonZeroExitCode", "JobLaunchFailure"})
"""Reasons of a job whose batch script could not begin: the script needs nothing but a directory in /tmp."""

_FATES = {
    "TIMEOUT": Fate(False, "has reached its time limit (TIMEOUT)", as_planned=True),
    "DEADLINE": Fate(False, "has reached its deadline (DEADLINE)"),
    "PREEMPTED": Fate(False, "was preempted by a job of a higher priority (PREEMPTED)", as_planned=True),
    "NODE_FAIL": Fate(False, "has lost its node, which failed (NODE_FAIL)", by_cluster=True),
    "BOOT_FAIL": Fate(False, "has lost its node, which did not boot (BOOT_FAIL)", by_cluster=True),
    "OUT_OF_MEMORY": Fate(False, "needed more memory than it was given (OUT_OF_MEMORY): ask for more with mem="),
    "CANCELLED": Fate(False, "was cancelled (CANCELLED)", by_hand=True),
    "REVOKED": Fate(False, "was revoked (REVOKED)"),
    "COMPLETED": Fate(False, "has ended (COMPLETED)", by_cluster=True),
}


def fate(row: Row | None) -> Fate:
    """Return what becomes of a job, by its row in the queue; None if Slurm does not know the job any more."""
    if row is None:
        # Or squeue's answer could not be read: so it is cancelled in any case.
        return Fate(False, "is no longer known to Slurm", by_cluster=True, has_node=True)
    if row.preempted or row.reason == "Preempted":
        return _FATES["PREEMPTED"]._replace(has_node=row.state in GOING)
    if row.state in GOING or row.state in WAITING:
        return Fate(True, "")
    if row.state == ENDING:
        # Slurm does not tell yet which state it will have. A time limit and a preemption have left traces already.
        if row.reason == "TimeLimit":
            return _FATES["TIMEOUT"]
        return _FATES["CANCELLED"]._replace(text="is being ended, probably by scancel", is_certain=False)
    known = _FATES.get(row.state)
    if known is not None:
        return known
    if row.state == "FAILED" and row.reason in _NODES_FAULTS:
        return Fate(False, f"is {row.described()}: is /tmp of {row.nodes or 'its node'} full?", by_cluster=True)
    return Fate(False, f"is {row.described()}")


class Queue:
    """The queue's view of one pool's jobs. `jobs()` returns the ids to ask for."""

    def __init__(self, jobs: Callable[[], Sequence[str]]) -> None:
        self._jobs = jobs
        self._lock = threading.Lock()
        """Held while squeue runs."""
        self._asked = float("-inf")
        """When the last answer was asked for."""
        self._rows: dict[str, Row] = {}
        self._failed = float("-inf")
        """When squeue failed last."""
        self._why: NodeStartError | None = None
        """Why it failed."""

    def rows(self, age: float = 0.0) -> dict[str, Row]:
        """Return the pool's jobs, as they were `age` seconds ago or later. Raises `NodeStartError`."""
        called = time.monotonic()
        with self._lock:
            if self._asked < called - age:
                if self._why is not None and self._failed > called:
                    # It failed while this thread waited for it. Without Slurm's controller a squeue takes 9 s, and
                    # those of many threads one after another would take minutes.
                    raise type(self._why)(str(self._why))
                asked = time.monotonic()
                try:
                    self._rows = self._ask()
                except NodeStartError as error:
                    self._why, self._failed = error, time.monotonic()
                    raise
                self._asked = asked
            return self._rows

    def _ask(self) -> dict[str, Row]:
        jobs = self._jobs()
        if not jobs:
            return {}
        words = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}", f"--Format={COLUMNS}"]
        answer = commands.run(words)
        if answer.status:
            if "Invalid job id" in answer.stderr:
                return {}
            raise commands.failure("squeue", answer)
        return parse(answer.stdout)
