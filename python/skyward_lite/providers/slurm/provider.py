"""`Slurm()`: nodes that a Slurm cluster grants, or those of the job that this process is in.

The rooms, each using those below it:

provider.py     what a pool calls: start, replace, retire, stop
machine.py      srun → environment → agent
run.py          the jobs of one pool: submitted, watched, cancelled
submission.py   sbatch, scancel; guard_job.sh, the batch script; canceller.sh, which outlives a client that dies
own_job.py      the job that this process is in
queue.py        squeue, and what its answer means for a node
options.py      sbatch's options
commands.py     how Slurm's programs are run
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from ... import checks, keywords
from ..._signals import held
from ...errors import NodeStartError
from .. import Machine, NodeRequest, Provider
from ..remote import checked_python
from . import commands, own_job
from . import options as sbatch
from .machine import OwnMachine, SlurmMachine
from .run import Run

log = logging.getLogger("skyward_lite")


@keywords.explained("Slurm")
class Slurm(Provider):
    """Nodes that a Slurm cluster grants: a job for each, or the job that this process is in. No port is opened.

    With options, each node gets a job of its own, which is submitted by `sbatch` with these options and begins when its
    turn comes; `pool(nodes=(2, 20))` starts with 2 of 20. Some time before its job's time limit a node takes no more
    tasks, and another job takes its place; so it is when a job is preempted or its node fails. A job that was cancelled
    by `scancel` is not replaced, as long as the pool has another one. Without options, which is for programs that run
    within `sbatch` or `salloc`, the nodes are those of this very job.

    `pool(vcpus=, memory_gb=)` become `cpus_per_task` and `mem`. A node runs as many tasks at once as its job has CPUs.

    Parameters
    ----------
    python : str or path, optional
        An interpreter on the nodes that is used as it is: it is verified, and nothing is installed. None, the default,
        for this process's own, if it is there as well and meets `pool(image=)`, else for an environment that is made.
    grace : float, default 60
        Seconds before a job's time limit from which on its node takes no more tasks: longer than most tasks take.
    orphan_timeout : float, default 120
        Seconds after which a job ends itself that no agent is in any more, as when this process was killed.
    **options : str, int, bool or list
        The long options of `sbatch`, with `_` for `-`, passed as they are: `time="2:00:00"`, `exclusive=True`,
        `gres=["gpu:1"]`. They are those of one node's job.

    Raises
    ------
    TypeError, ValueError
        If a value is of a wrong type, or an option is one that the pool decides; the text says what to write instead.

    See Also
    --------
    Exec : other batch systems, by the command that leads to the nodes of a job.

    Examples
    --------
    >>> provider = sky.Slurm(partition="cpu", time="2:00:00", cpus_per_task=16, mem="32G")
    >>> with sky.pool(provider, nodes=(2, 20)):  # doctest: +SKIP
    ...     results = Parallel(n_jobs=-1)(delayed(abs)(i) for i in range(100))
    """

    outlives_client = True

    def __init__(
        self,
        *,
        python: str | os.PathLike[str] | None = None,
        grace: float = 60.0,
        orphan_timeout: float = 120.0,
        **options: Any,
    ) -> None:
        self.python = checked_python("Slurm", python)
        self.grace = checks.seconds("Slurm", "grace", grace)
        self.orphan_timeout = checks.seconds("Slurm", "orphan_timeout", orphan_timeout, least=10.0)
        self.options = sbatch.checked(options)
        self.job = None if self.options else own_job.job()
        """The job that this process is in, if its nodes are the pool's."""
        if not self.options and self.job is None:
            raise ValueError(
                "Slurm() without options takes the nodes of the job that it runs in, and this process is in none: "
                'write what each node is to have, as in Slurm(partition="cpu", time="2:00:00", cpus_per_task=16), or '
                "run this within sbatch or salloc"
            )
        self.nodes = None if self.job is None else own_job.count()

    def __repr__(self) -> str:
        if self.job is not None:
            return f"Slurm(): job {self.job}"
        options = ", ".join(f"{name}={True if value is None else value!r}" for name, value in self.options.items())
        return f"Slurm({options})"

    def start(self, wanted: NodeRequest, machines: list[Machine]) -> None:
        commands.require_configuration()
        if self.job is not None:
            self._start_in(self.job, wanted, machines)
            return
        run = Run(self.options, self.grace, self.orphan_timeout, wanted)
        try:
            with held(insist=True) as signals:
                jobs = run.submit(wanted.nodes, time.monotonic() + wanted.start_timeout, signals=signals)
                machines.extend(SlurmMachine(run, job, wanted, self.python) for job in jobs)
        except BaseException:
            with held():
                run.end(time.monotonic() + self.leave)
            raise
        submitted = "1 job is submitted" if len(jobs) == 1 else f"{len(jobs)} jobs are submitted"
        log.info("%s: %s", submitted, " ".join(["sbatch", *run.words]))

    def _start_in(self, job: str, wanted: NodeRequest, machines: list[Machine]) -> None:
        """Use the nodes of the job that this process is in."""
        nodes = own_job.nodes()
        for node in nodes:
            if node.cpus is not None and node.cpus < (wanted.vcpus or 0):
                log.info("vcpus=%s was asked for; job %s has %d on %s", wanted.vcpus, job, node.cpus, node.name)
        machines.extend(OwnMachine(job, node, wanted, self.python) for node in nodes[: wanted.nodes])

    def replace(self, machine: Machine, machines: list[Machine]) -> None:
        assert isinstance(machine, SlurmMachine)
        run, job = machine.run, machine.job
        if machine.reuses_job:
            job.restarts += 1
            machines.append(SlurmMachine(run, job, machine.wanted, machine.python))
            return
        machine.drained = True
        fate = run.find_fate(job)
        if not fate.by_hand or job.cancelled:
            self._append_another(machine, machines)
            return
        with run.replacing:
            if run.others(job):
                raise NodeStartError(f"its job {job.id} was cancelled by hand, and the pool has other jobs")
            log.warning(
                "job %s was cancelled by hand, and was the last one of a pool that is open: a new job is submitted. "
                "To end it all, end this process: kill %d",
                job.id,
                os.getpid(),
            )
            self._append_another(machine, machines)

    def _append_another(self, machine: SlurmMachine, machines: list[Machine]) -> None:
        """Append a machine with a new job, which is submitted as soon as Slurm takes it."""
        for job in machine.run.submit(1, float("inf"), patient=True):
            machines.append(SlurmMachine(machine.run, job, machine.wanted, machine.python))

    def retire(self, machine: Machine) -> None:
        assert isinstance(machine, SlurmMachine)
        machine.leave_job()

    def stop(self, machines: list[Machine], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for run in {id(machine.run): machine.run for machine in machines if isinstance(machine, SlurmMachine)}.values():
            run.end(deadline)
