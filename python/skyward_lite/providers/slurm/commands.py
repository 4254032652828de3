"""Slurm's own programs as they are run here: with which environment, for how long, and what an error of theirs says."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ... import _core
from ..._signals import held
from ...errors import NodeStartError

COMMAND_SECONDS = 30.0
"""Bound on one of Slurm's programs. Without their controller they give up after 9 s by themselves."""
MAX_SHOWN = 1000
"""Characters that are shown of what a program of Slurm's printed."""

_OF_A_JOB = ("SLURM_", "SRUN_", "SQUEUE_", "SCANCEL_")
"""What variables begin with that would change what Slurm's programs do. A job's processes inherit many of them."""
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"})
"""Variables by which Slurm's programs find their cluster, and prove who they are."""
_OURS = frozenset({"SBATCH_ARRAY_INX", "SBATCH_WAIT", "SBATCH_SIGNAL", "SBATCH_REQUEUE", "SBATCH_CLUSTERS"})
"""Variables by which sbatch would submit another kind of job than the one that it is asked for."""
_PASSING = (
    *("Unable to contact slurm controller", "Socket timed out", "Connection reset", "Connection refused"),
    *("Zero Bytes were transmitted", "standby mode", "temporarily unable", "Resource temporarily unavailable"),
    *("Message receive failure", "Message send failure", "Communication connection failure", "try again"),
)
"""What Slurm's programs say while the controller is restarted, or has too much to do."""


class PassingError(NodeStartError):
    """Raised when one of Slurm's programs failed for a reason that time alone may mend."""


class Answer(NamedTuple):
    """How a program ended."""

    status: int
    stdout: str
    stderr: str

    def reason(self, program: str) -> str:
        """Return the program's own words for its failure, in one line."""
        lines = [line.strip() for line in (self.stderr or self.stdout).splitlines()]
        words = [line.removeprefix(f"{program}: ").removeprefix("error: ") for line in lines]
        words = [word for word in words if word and not word.startswith("Try ")]
        return _core.printable("; ".join(dict.fromkeys(words)), MAX_SHOWN) or f"status {self.status}, without a word"


def environment(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for Slurm's programs: this process's, without what belongs to a job around it."""
    return {
        name: value
        for name, value in variables.items()
        if name in _KEPT or not (name.startswith(_OF_A_JOB) or name in _OURS)
    }


def run(words: Sequence[str], bound: float = COMMAND_SECONDS, stdin: bytes = b"") -> Answer:
    """Run one of Slurm's programs to its end, whatever its exit status.

    Raises `NodeStartError` if it is not here, `PassingError` if it does not end within `bound` seconds.
    """
    program = words[0]
    # A Ctrl-C must not end sbatch between its submission and its answer.
    with held():
        try:
            return _run(words, bound, stdin)
        except FileNotFoundError:
            raise NodeStartError(
                f"there is no {program} here: run this where jobs are submitted from, which is a login node of the "
                "cluster, or within a job"
            ) from None
        except subprocess.TimeoutExpired as error:
            # sbatch waits by itself while the queue takes no more jobs, and says so.
            printed = Answer(0, "", (error.stderr or b"").decode(errors="replace"))
            why = f": {printed.reason(program)}" if printed.stderr.strip() else ""
            raise PassingError(f"{program} has not answered within {bound:.0f} s{why}") from None
        except OSError as error:
            raise NodeStartError(f"{program} does not run here: {error}") from error


def _run(words: Sequence[str], bound: float, stdin: bytes) -> Answer:
    """Run a program to its end. Raises `OSError`, or `subprocess.TimeoutExpired` with what it has printed."""
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, env=environment(), process_group=0) as process:
        try:
            stdout, stderr = process.communicate(stdin, bound)
        except BaseException:
            # With all that it has started: a site's sbatch may be a script that runs the real one, which would submit a
            # job after all.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return Answer(process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace"))


def require_configuration() -> None:
    """Raise `NodeStartError` if SLURM_CONF names no file: Slurm's programs would wait for it, each for a minute."""
    path = os.environ.get("SLURM_CONF")
    if path and not os.path.exists(path):
        raise NodeStartError(
            f"SLURM_CONF is {_core.printable(path)} here, and there is no such file: Slurm's programs find their "
            "cluster by it"
        )


def is_passing(answer: Answer) -> bool:
    """Return whether a failed program may succeed later, as when the controller is being restarted."""
    return any(words in answer.stderr for words in _PASSING)


def failure(program: str, answer: Answer) -> NodeStartError:
    """Return the error for a program that has failed."""
    kind = PassingError if is_passing(answer) else NodeStartError
    return kind(f"{program} has failed: {answer.reason(program)}")
