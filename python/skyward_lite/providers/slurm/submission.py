"""The jobs of a pool: submitted by sbatch, one node each, and cancelled by scancel."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import IO

from ... import _core
from ...environment import scripts
from ...errors import NodeStartError
from . import commands

ONE_NODE = ("--parsable", "--nodes=1", "--ntasks=1", "--no-requeue", "--output=/dev/null")
"""What sbatch is told of each job beside the user's options."""

SIGNAL_SECONDS = 1.0
"""Bound on a signal that only makes the jobs' end quicker."""

_NUMBER = re.compile(r"^(\d+)(?:;.*)?$", re.MULTILINE)
"""The job's number as `sbatch --parsable` prints it, with the cluster's name in a federation. A site's plugins may
print further lines."""
_UNKNOWN_OPTION = re.compile(r"(?:unrecognized|invalid|ambiguous) option '?-*([A-Za-z0-9-]+)")


class NoNumberError(NodeStartError):
    """Raised when jobs were submitted, but it is not known which ones."""


def guard(key: str, orphan_timeout: float) -> bytes:
    """Return the batch script of a node's job."""
    text = scripts.read("guard_job.sh", __file__)
    return b"#!/bin/sh\n" + scripts.compose(text, KEY=key, ORPHAN=max(1, round(orphan_timeout)))


def guard_directory(key: str, number: str) -> str:
    """Return the directory on the node in which the guard of a job looks for signs of life."""
    return f"/tmp/skyward_lite-{key}-{number}"


def submit(options: Sequence[str], script: bytes, count: int) -> list[str]:
    """Submit jobs of one node each, as one array if there are several; return their ids.

    Raises `NodeStartError` with Slurm's own words, `PassingError` if it may succeed later.
    """
    if count > 1:
        try:
            number = _sbatch([*ONE_NODE, f"--array=0-{count - 1}"], options, script)
            return [f"{number}_{index}" for index in range(count)]
        except commands.PassingError:
            raise
        except NodeStartError as error:
            if "array" not in str(error):
                raise
    # A cluster may allow no arrays, or none of this size.
    jobs: list[str] = []
    try:
        jobs.extend(_sbatch(ONE_NODE, options, script) for _ in range(count))
    except NodeStartError:
        if jobs:
            with contextlib.suppress(NodeStartError):
                cancel(jobs, commands.COMMAND_SECONDS)
        raise
    return jobs


def _sbatch(ours: Sequence[str], options: Sequence[str], script: bytes) -> str:
    """Return the number of a job that was submitted. Raises `NodeStartError`."""
    # Ours come last: of two that exclude each other, the later one counts.
    answer = commands.run(["sbatch", *options, *ours], stdin=script)
    numbers = _NUMBER.findall(answer.stdout)
    if not answer.status:
        if not numbers:
            raise NoNumberError(f"sbatch has ended without an error, but named no job: {answer.reason('sbatch')}")
        return str(numbers[-1])
    if commands.is_passing(answer):
        raise commands.failure("sbatch", answer)
    shown = _core.printable(" ".join(options), commands.MAX_SHOWN)
    unknown = _UNKNOWN_OPTION.search(answer.stderr)
    named = f"Slurm({unknown[1].replace('-', '_')}=...) cannot be used, as " if unknown else ""
    raise NodeStartError(
        f"{named}sbatch has failed: {answer.reason('sbatch')}" + (f". It was given {shown}" if shown else "")
    )


def why_never(options: Sequence[str], script: bytes) -> str:
    """Return why a job that waits can never begin, in Slurm's own words; "" if it can, or Slurm does not know.

    sbatch takes some jobs that no node of the cluster is large enough for, and refuses them if it is only asked. Raises
    `NodeStartError` if it does not answer.
    """
    answer = commands.run(["sbatch", *options, *ONE_NODE, "--test-only"], stdin=script)
    return answer.reason("sbatch") if answer.status and not commands.is_passing(answer) else ""


def cancel(jobs: Sequence[str], bound: float) -> None:
    """Cancel jobs; those that have ended or do not exist are passed over. Raises `NodeStartError`."""
    answer = commands.run(["scancel", *jobs], bound)
    if answer.status and "Invalid job id" not in answer.stderr:
        raise commands.failure("scancel", answer)


def end(jobs: Sequence[str], running: Sequence[str], bound: float) -> None:
    """Cancel jobs, `running` of which have begun and have no agent any more. Raises `NodeStartError`.

    All are named by their ids: the number of an array's last job is that of the whole array.
    """
    deadline = time.monotonic() + bound
    # Without the signal the guard would look for some seconds whether its agent has gone, and the job would hold its
    # node. A job that waits cannot be sent a signal, and scancel would go on trying.
    if running:
        with contextlib.suppress(commands.PassingError):
            commands.run(["scancel", "--batch", "--signal=USR1", *running], min(SIGNAL_SECONDS, bound / 2))
    cancel(jobs, max(1.0, deadline - time.monotonic()))


def cancel_steps(job: str) -> None:
    """End what srun has started in a job, but not the job. Raises `NodeStartError`.

    By the job's id: the number of an array's last job stands for all jobs of the array.
    """
    answer = commands.run(["squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%i"])
    steps = [step for step in answer.stdout.split() if re.fullmatch(r"[0-9_]+\.[0-9]+", step)]
    if steps:
        cancel(steps, commands.COMMAND_SECONDS)


class Canceller:
    """A process in a session of its own that cancels the jobs if this process dies. `name` is what the jobs are called.

    `name` is "" if other jobs may be called so, too.
    """

    def __init__(self, name: str) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", scripts.read("canceller.sh", __file__), "skyward_lite", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=commands.environment(),
            cwd="/",
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._pipe: IO[bytes] = self._process.stdin

    def tell(self, words: Sequence[str]) -> None:
        """Name jobs."""
        with contextlib.suppress(OSError, ValueError):
            os.write(self._pipe.fileno(), "".join(f"{word}\n" for word in words).encode())

    def leave(self, *, cancelled: bool) -> None:
        """Have it end; unless the jobs were cancelled, it cancels them first, and takes its time. Idempotent."""
        if self._pipe.closed:
            return
        if cancelled:
            self.tell(["done"])
        with contextlib.suppress(OSError):
            self._pipe.close()
        # It may take its time until the process has ended; without this it would stay as a zombie.
        waiting = threading.Thread(target=self._process.wait, name="skyward-canceller", daemon=True)
        waiting.start()
        if cancelled:
            waiting.join(5.0)
