"""A node behind srun: in a job that was submitted for it, or in the job that this process is in.

open                       on the machine's own thread
  await_running              the job has its node; meanwhile the reason why it waits is shown
  connect                    each script, and the agent, is a step of the job: srun ... sh -c ...
  interpreter                the client's own, if it is there and fits, else the image's environment
  agent_options              the job's CPUs, and when its time limit is near
"""

from __future__ import annotations

import logging
import re
import time

from ... import _core, nesting
from ...environment import build, scripts
from ...errors import NodeStartError
from .. import MachineGoneError, NodeRequest, PreparedMachine
from ..command import CommandMachine
from . import commands, submission
from .own_job import OwnNode
from .queue import Queue, Row
from .queue import fate as fate_of
from .run import MAX_RESTARTS, Job, Run

log = logging.getLogger("skyward_lite")

_EXITED = re.compile(r"\W*srun: error: .*: Exited with exit code \d+$")
"""What srun prints of each command that has failed."""

_TOO_MANY_CPUS = ("More processors requested than permitted", "Requested node configuration is not available")
"""What srun says when a step asks for more CPUs than its job has for it."""

CACHE_SHARE = 4
"""Data that tasks share takes at most 1/4 of a job's memory, unless the user said otherwise."""
PLANNED_SECONDS = 2.0
"""An announcement by so much before the planned moment counts as planned: clocks differ in speed, not by more."""


class StepMachine(CommandMachine):
    """A node whose processes are steps of a job."""

    reattaches = False
    number = ""
    """The job's number, as srun takes it."""
    cpus: int | None = None
    """The job's CPUs on this node; None if Slurm does not say."""
    node = ""
    """The node's name in Slurm, if the job has several nodes."""

    def __init__(self, name: str, wanted: NodeRequest, python: str | None) -> None:
        super().__init__(name, wanted, python)
        self.environment = commands.environment()
        self._takes_all = False
        """Whether its steps do not say how many CPUs they need."""

    def argv(self) -> list[str]:
        # Buffered output would stay on the node until a line ends. Steps share the job's resources (--overlap). What a
        # step gets is said anew: since Slurm 22.05 it inherits neither the job's CPUs nor a binding to some of them.
        return [
            *("srun", "--unbuffered", "--overlap", "--mpi=none", f"--jobid={self.number}"),
            *([f"--nodelist={self.node}"] if self.node else []),
            *("--nodes=1", "--ntasks=1"),
            *([] if self.cpus is None or self._takes_all else [f"--cpus-per-task={self.cpus}"]),
            *("sh", "-c"),
        ]

    def connect(self, core: _core.Core) -> _core.Connection:
        try:
            return super().connect(core)
        except NodeStartError as error:
            # A job that uses one thread of each core is counted with both, and no step may ask for as many.
            if self.cpus is None or self._takes_all or not any(words in str(error) for words in _TOO_MANY_CPUS):
                raise
            log.info("%s: its steps do not say how many CPUs they need, and get what Slurm gives: %s", self.name, error)
            self._takes_all = True
            return super().connect(core)

    def agent_options(self) -> tuple[str, ...]:
        return ("--announce", *([] if self.cpus is None else ["--cpus", str(self.cpus)]))

    def run_script(self, connection: _core.Connection, script: bytes, bound: float) -> scripts.ScriptResult:
        result = super().run_script(connection, script, bound)
        # Before the script's own words srun says that there was an exit status.
        lines = [line for line in result.printed.splitlines() if not _EXITED.match(line)]
        return result._replace(printed="\n".join(lines).removeprefix("  | "))

    def choose_python(self, connection: _core.Connection) -> tuple[str, build.Command]:
        if self.python is not None:
            return super().choose_python(connection)
        own = nesting.interpreter()
        image = self.wanted.image
        if image.apt or image.includes or image.wheelhouse or image.wheel or image.index_url:
            why = "the image has more than an interpreter can be verified for"
        else:
            try:
                return self.verify_python(connection, own), build.plain_command
            except NodeStartError as error:
                # Of an interpreter that was verified and lacks something, only this.
                why = str(error).partition("installs nothing: ")[2] or str(error)
        log.info(
            "%s: the image's environment is used, and not %s, this process's own interpreter: %s", self.name, own, why
        )
        return super().choose_python(connection)


class OwnMachine(StepMachine):
    """A node of the job that this process is in."""

    returns = True
    # Slurm knows whether its job is being ended.
    may_linger = False

    def __init__(self, job: str, node: OwnNode, wanted: NodeRequest, python: str | None) -> None:
        super().__init__(node.name, wanted, python)
        self.number = job
        self.node = node.name
        self.cpus = node.cpus
        if node.memory_bytes:
            self.cache_bytes = node.memory_bytes // CACHE_SHARE
        self._queue = Queue(lambda: [job])

    def open(self, core: _core.Core) -> PreparedMachine:
        self._check_job()
        return super().open(core)

    def _check_job(self) -> None:
        """Raise `MachineGoneError` if the job has ended: then its nodes do not return."""
        try:
            rows = self._queue.rows()
        except NodeStartError as error:
            log.info("%s: it is not known whether job %s goes on: %s", self.name, self.number, error)
            return
        known = fate_of(next((row for row in rows.values() if row.number == self.number), None))
        if not known.goes_on:
            raise MachineGoneError(f"its job {self.number} {known.text}")


class SlurmMachine(StepMachine):
    """A node with a job of its own."""

    replaceable = True

    def __init__(self, run: Run, job: Job, wanted: NodeRequest, python: str | None) -> None:
        again = f"-{job.restarts + 1}" if job.restarts else ""
        super().__init__(f"slurm-{job.id}{again}", wanted, python)
        self.run = run
        self.job = job
        job.user = self
        self.row: Row | None = None
        self.drains_at: float | None = None
        """When the agent announces that the time limit is near, by `time.monotonic`; None if there is no limit."""
        self.reuses_job = False
        """Whether its job goes on without it, and gets another step."""
        self.drained = False
        """Whether another machine takes its place, though it may have tasks left."""
        self.is_given_up = False
        """Whether it never became a node, and no other machine takes its place."""

    def enter_job(self) -> None:
        """Wait until the job has its node, and take what it was given. Raises `NodeStartError` if it has ended."""
        self.doing = "its job waits"
        self.row = self.run.await_running(self.job, self.set_doing)
        self.number = self.row.number
        self.cpus = self.row.cpus
        log.info("%s: its job runs on %s, CPUs: %d", self.name, self.row.nodes, self.cpus)
        memory = self.row.memory_bytes or self.run.memory_bytes
        if memory:
            self.cache_bytes = int(memory) // CACHE_SHARE
        directory = submission.guard_directory(self.run.key, self.number)
        self.prelude = scripts.compose(scripts.read("sign_of_life.sh"), DIRECTORY=directory)

    def open(self, core: _core.Core) -> PreparedMachine:
        self.enter_job()
        try:
            prepared = super().open(core)
        except (NodeStartError, _core.CoreError) as error:
            fate = None if self.run.closing.is_set() else self.run.find_fate(self.job)
            if fate is not None and not fate.goes_on:
                raise MachineGoneError(f"its job {self.job.id} {fate.text}") from error
            raise
        self.run.entered.set()
        return prepared

    def agent_options(self) -> tuple[str, ...]:
        alive = f"{submission.guard_directory(self.run.key, self.number)}/alive"
        return (*super().agent_options(), "--alive", alive, *self._time_limit())

    def _time_limit(self) -> list[str]:
        """Return when the agent is to announce that its job's time limit is near."""
        try:
            self.row = self.run.queue.rows().get(self.job.id, self.row)
        except NodeStartError as error:
            log.info("%s: its time limit is taken from an earlier look into the queue: %s", self.name, error)
        asked = time.monotonic()
        left = None if self.row is None else self.row.seconds_left
        if left is None:
            return []
        grace = self.run.grace
        if left <= grace:
            log.warning(
                "%s: its job has %.0f s left, and grace is %.0f s: it takes tasks for half of the time that is left. "
                "Ask for more with time=, or make grace= smaller",
                self.name,
                left,
                grace,
            )
            grace = left / 2
        self.drains_at = asked + left - grace
        return ["--drain-after", f"{left - grace:.0f}"]

    def ended_as_planned(self) -> bool:
        if self.drains_at is not None and time.monotonic() >= self.drains_at - PLANNED_SECONDS:
            return True
        try:
            # What is planned has left its trace by now.
            return self.run.find_fate(self.job, 0.0).as_planned
        except NodeStartError:
            return False

    def failed_transiently(self) -> bool:
        is_transient = self._has_lost_job()
        self.is_given_up = not is_transient
        return is_transient

    def _has_lost_job(self) -> bool:
        """Return whether its job has ended for a reason that another job may not meet."""
        try:
            fate = self.run.find_fate(self.job)
        except NodeStartError:
            return False
        # As after a node is lost: a job that a person has cancelled is replaced only if the pool has no other.
        return fate.by_cluster or fate.as_planned or (fate.by_hand and self.run.entered.is_set())

    # ------------------------------------------------------------------------------------------------ the end

    def leave_job(self) -> None:
        """Release the job of a node that is lost, unless it goes on and another step can be started in it."""
        job = self.job
        if job.user is not self:
            return
        may_reuse = not self.drained and not self.is_given_up and job.restarts < MAX_RESTARTS
        if may_reuse and self.run.entered.is_set():
            try:
                fate = self.run.find_fate(job)
                self.reuses_job = fate.goes_on and bool(self.number)
                if fate.is_over:
                    return
                if self.reuses_job:
                    # What is left of the lost step would work beside the new one.
                    submission.cancel_steps(job.id)
                    return
            except NodeStartError as error:
                self.reuses_job = False
                log.info("%s: %s", self.name, error)
        else:
            try:
                if self.run.find_fate(job, 0.0).is_over:
                    return
            except NodeStartError as error:
                log.info("%s: %s", self.name, error)
        self.run.cancel(job)
