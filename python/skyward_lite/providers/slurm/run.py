"""The jobs of one pool, from their submission to the last scancel."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from ...backoff import Backoff
from ...errors import NodeStartError
from .. import NodeRequest
from . import commands, options, submission
from .queue import GOING, WAITING, Fate, Queue, Row, fate

log = logging.getLogger("skyward_lite")

QUEUE_PAUSES = (0.25, 10.0)
"""First and longest pause between two looks into the queue, in seconds, while a job waits."""
RETRY_PAUSES = (0.5, 30.0)
"""First and longest pause between two attempts at what the controller did not answer."""
SIGNAL_POLL_SECONDS = 0.2
"""Between two looks whether a signal has come, in these pauses."""
FATE_SECONDS = 2.0
"""For how long Slurm is asked what ends a job before that is taken for a scancel by hand."""
FATE_POLL_SECONDS = 0.5
MAX_RESTARTS = 3
"""How often another step is started in a job whose step was lost, before the job is given up for a new one."""
NEVER = frozenset({"PartitionConfig", "BadConstraints"})
"""Reasons of jobs that ask for more than the nodes of their partition have."""
_FULL = ("QOS policy", "submit limit", "MaxSubmit", "MaxJob")
"""What sbatch says while a user has too many jobs: those that end make room for their successors."""


@dataclasses.dataclass
class Job:
    """A job of one node."""

    id: str
    """As scancel takes it: "58_0"."""
    number: str = ""
    """As srun takes it; "" until it runs."""
    user: object = None
    """The machine that it is now the job of."""
    restarts: int = 0
    """How often another step was started in it."""
    cancelled: bool = False
    """Whether it was cancelled by us."""
    fate: Fate | None = None
    """What became of it, once that is known."""

    @property
    def base(self) -> str:
        """The number by which squeue finds it, together with the others of its array."""
        return self.id.partition("_")[0]


class Run:
    """What one pool has in Slurm."""

    def __init__(self, given: Mapping[str, str | None], grace: float, orphan_timeout: float, wanted: NodeRequest):
        self.key = os.urandom(6).hex()
        """Nobody else can know it before the jobs run."""
        self.grace = grace
        self.closing = threading.Event()
        """Set when the pool is being left."""
        self.entered = threading.Event()
        """Set when the first job has become a node."""
        self.queue = Queue(self._bases)
        self._wanted = wanted
        merged = options.with_request(given, wanted)
        # By a name that nobody else has the jobs are found even if the answer to their submission was lost.
        self._name = "" if "job_name" in merged else f"skyward-{self.key}"
        self.words = options.words({**merged, **({"job_name": self._name} if self._name else {})})
        """The options as words of sbatch's command line."""
        self.memory_bytes = options.memory_bytes(merged.get("mem"))
        self.replacing = threading.Lock()
        """Held while it is decided whether a job that was cancelled by hand is replaced: of several, one is."""
        self._script = submission.guard(self.key, orphan_timeout)
        self._asking = threading.Lock()
        """Held while Slurm is asked whether the jobs can begin."""
        self._never: str | None = None
        """Why they cannot; "" if they can, None before Slurm has said so."""
        self._lock = threading.Lock()
        """Guards the fields below."""
        self._jobs: list[Job] = []
        self._canceller: submission.Canceller | None = None
        self._answer_lost = False
        """Whether a submission may have succeeded without our knowing it."""

    # ------------------------------------------------------------------------------------------------ submission

    def submit(
        self, count: int, deadline: float, *, signals: Sequence[int] | None = None, patient: bool = False
    ) -> list[Job]:
        """Submit jobs of one node each. While the controller does not answer, try again until `deadline`.

        Not after a signal, which appears in `signals`. With `patient` also while the user has too many jobs. Raises
        `NodeStartError`.
        """
        with self._lock:
            # Not after `end`, which has taken the canceller away.
            if self._canceller is None and not self.closing.is_set():
                self._canceller = submission.Canceller(self._name)
        backoff = self._backoff(*RETRY_PAUSES, deadline=deadline, signals=signals)
        level = logging.WARNING
        while True:
            if self.closing.is_set():
                raise NodeStartError("the pool is closed")
            try:
                jobs = [Job(job) for job in submission.submit(self.words, self._script, count)]
                break
            except NodeStartError as error:
                passing = isinstance(error, commands.PassingError)
                self._answer_lost |= passing or isinstance(error, submission.NoNumberError)
                if not passing and not (patient and any(words in str(error) for words in _FULL)):
                    raise
                if signals:
                    raise
                log.log(level, "%s: it is tried again", error)
                level = logging.INFO
                if not backoff.pause():
                    raise NodeStartError(f"{error}. pool(start_timeout=) is over, a longer one waits on") from None
        with self._lock:
            self._jobs += jobs
            if self._canceller is not None:
                self._canceller.tell([job.id for job in jobs])
        if self.closing.is_set():
            # The pool was left meanwhile, and may have cancelled its jobs before these were among them.
            for job in jobs:
                self.cancel(job)
            raise NodeStartError("the pool is closed")
        return jobs

    def _bases(self) -> list[str]:
        """Return what squeue is asked for."""
        with self._lock:
            return list(dict.fromkeys(job.base for job in self._jobs if job.fate is None or job.fate.goes_on))

    def _backoff(
        self, first: float, longest: float, deadline: float = float("inf"), signals: Sequence[int] | None = None
    ) -> Backoff:
        """Return pauses that end when the pool is being left, or a signal has come."""
        if signals is None:
            return Backoff(first, longest=longest, deadline=deadline, sleep=self.closing.wait)

        def sleep(seconds: float) -> bool:
            until = time.monotonic() + seconds
            while not signals and (left := until - time.monotonic()) > 0:
                if self.closing.wait(min(left, SIGNAL_POLL_SECONDS)):
                    return True
            return bool(signals)

        return Backoff(first, longest=longest, deadline=deadline, sleep=sleep)

    # ------------------------------------------------------------------------------------------------ the queue

    def await_running(self, job: Job, tell: Callable[[str], None]) -> Row:
        """Wait until a job has its node. `tell` gets what it waits for. Raises `NodeStartError` if it has ended."""
        first, longest = QUEUE_PAUSES
        pause = first
        unknown = 0
        while True:
            try:
                row = self.queue.rows(pause / 2).get(job.id)
            except NodeStartError as error:
                # Slurm's controller may be restarted: the job is in its queue as before.
                tell(f"its job waits: {error}")
            else:
                if row is not None and row.state in GOING:
                    job.number = row.number
                    return row
                # The controller may not tell of a job at once.
                unknown = unknown + 1 if row is None else 0
                if row is None and unknown < 5:
                    pass
                elif row is None or row.state not in WAITING:
                    raise NodeStartError(f"its job {job.id} {self.note_fate(job, row).text}")
                else:
                    tell(f"its job waits: {row.described()}")
                    if row.reason in NEVER and (why := self._why_never()):
                        raise NodeStartError(f"its job {job.id} can never begin: {row.described()}: {why}")
            if self.closing.wait(pause):
                raise NodeStartError("the pool is closed")
            pause = min(longest, pause * 1.3)

    def _why_never(self) -> str:
        """Return why jobs with these options can never begin; "" if they can. Slurm is asked once."""
        with self._asking:
            if self._never is None:
                with contextlib.suppress(NodeStartError):
                    self._never = submission.why_never(self.words, self._script)
            return self._never or ""

    def note_fate(self, job: Job, row: Row | None) -> Fate:
        """Return what becomes of a job by its row in the queue, and remember it if it is final."""
        if job.fate is None:
            known = fate(row)
            if known.goes_on or not known.is_certain:
                return known
            if known.by_hand and job.cancelled:
                known = Fate(False, "was cancelled with its node")
            job.fate = known
            if not job.cancelled and not self.closing.is_set():
                log.log(logging.INFO if known.as_planned else logging.WARNING, "job %s %s", job.id, known.text)
        return job.fate

    def find_fate(self, job: Job, patience: float = FATE_SECONDS) -> Fate:
        """Ask Slurm what becomes of a job. While its controller does not answer, ask again until the pool is left.

        Raises `NodeStartError` if that cannot be known.
        """
        deadline = time.monotonic() + patience
        backoff = self._backoff(*RETRY_PAUSES)
        while job.fate is None:
            try:
                row = self.queue.rows().get(job.id)
            except NodeStartError:
                if not backoff.pause():
                    raise
                continue
            known = self.note_fate(job, row)
            if known.goes_on or time.monotonic() > deadline:
                return known
            if job.fate is None and self.closing.wait(FATE_POLL_SECONDS):
                return known
        return job.fate

    def others(self, job: Job) -> bool:
        """Return whether another job of the pool runs or waits in the queue."""
        # Not an earlier answer: it would lack the job that has just replaced another one.
        rows = self.queue.rows()
        for other in self._known():
            row = rows.get(other.id)
            if other is not job and not other.cancelled and row is not None and fate(row).goes_on:
                return True
        return False

    def _known(self) -> list[Job]:
        with self._lock:
            return [*self._jobs]

    # ------------------------------------------------------------------------------------------------ the end

    def cancel(self, job: Job) -> None:
        """Cancel one job, in the time that it takes; a failure is written into the log."""
        if job.cancelled or (job.fate is not None and job.fate.is_over):
            return
        job.cancelled = True
        try:
            submission.end([job.id], [job.id] if job.number else [], commands.COMMAND_SECONDS)
        except NodeStartError as error:
            log.warning("job %s could not be cancelled, and ends by itself when nothing uses it: %s", job.id, error)

    def end(self, deadline: float) -> None:
        """Cancel all jobs. What cannot be cancelled by the deadline is left to the canceller. Idempotent."""
        self.closing.set()
        with self._lock:
            jobs = [job for job in self._jobs if job.fate is None or not job.fate.is_over]
            canceller, self._canceller = self._canceller, None
        if canceller is None:
            return
        cancelled = False

        def left() -> float:
            return max(0.5, deadline - time.monotonic())

        try:
            mine = [f"--name={self._name}", f"--user={os.getuid()}"]
            if self._name and any(not job.number for job in jobs):
                # First those that wait: they would begin in the place of the others.
                submission.cancel([*mine, "--state=PENDING"], left())
            # Whole arrays by their one number.
            if jobs:
                running = [job.id for job in jobs if job.number]
                submission.end(list(dict.fromkeys(job.base for job in jobs)), running, left())
            if self._answer_lost and self._name:
                submission.cancel(mine, left())
            cancelled = True
        except NodeStartError as error:
            names = ", ".join(dict.fromkeys(job.base for job in jobs)) or "that may have been submitted"
            log.warning(
                "the jobs %s could not be cancelled yet (%s): a process in the background goes on trying, and the jobs "
                "end by themselves when nothing uses them",
                names,
                error,
            )
        finally:
            with contextlib.suppress(OSError):
                canceller.leave(cancelled=cancelled)
