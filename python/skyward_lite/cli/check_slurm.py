"""What `skyward check --slurm` does: the cluster is asked step by step, and then one real job of one node.

the cluster   programs → controller → options (sbatch --test-only), or the job that this process is in
each node     job (it waits, and then runs) → command → exit status → … (check_command.py)

Nothing is left: the job is cancelled at the end, also after Ctrl-C.
"""

from __future__ import annotations

import concurrent.futures
import re
import shutil
import threading
import time
from collections.abc import Generator

from .. import _core, nesting
from ..environment import probe
from ..errors import NodeStartError
from ..providers import Machine
from ..providers.slurm import Slurm, commands, own_job, submission
from ..providers.slurm.machine import SlurmMachine, StepMachine
from ..providers.slurm.options import words
from . import survival
from .check_command import CommandCheck
from .hosts import default_request, in_order
from .report import Report

QUEUE_SECONDS = 60.0
"""For so long the job may wait in the queue; then the rest is not checked."""
STOP_SECONDS = 10.0
"""Within this time the job is cancelled."""
FOR_JOBS = ("sbatch", "scancel")
"""Programs that submit jobs and end them."""
FOR_NODES = ("srun", "squeue", "scontrol")
"""Programs that lead to the nodes of a job."""


class ClusterCheck:
    """The steps for the cluster, before any node of it is looked at."""

    def __init__(self, provider: Slurm) -> None:
        self.provider = provider
        self.submits = provider.job is None
        """Whether jobs are submitted: not from within a job whose nodes are meant."""
        self.report = Report(_core.printable(repr(provider)))

    def run(self) -> Report:
        """Take the steps until one fails, and return the report."""
        try:
            if self._find_programs() and self._ask_controller():
                if self.submits:
                    self._test_options()
                else:
                    self._own_job()
        except NodeStartError as error:
            self.report.fail("cluster", str(error), "")
        return self.report

    def _find_programs(self) -> bool:
        needed = (*FOR_JOBS, *FOR_NODES) if self.submits else FOR_NODES
        missing = [name for name in needed if shutil.which(name) is None]
        if missing:
            self.report.fail(
                "programs",
                f"there is no {', '.join(missing)} here",
                "run this where jobs are submitted from, which is a login node of the cluster, or within a job",
            )
            return False
        try:
            commands.require_configuration()
            version = commands.run(["srun", "--version"]).stdout.strip()
        except NodeStartError as error:
            self.report.fail("programs", str(error), "SLURM_CONF, or /etc/slurm/slurm.conf, must lead to the cluster")
            return False
        self.report.ok("programs", f"{', '.join(needed)}: {version}", version=version)
        return True

    def _ask_controller(self) -> bool:
        answer = commands.run(["scontrol", "ping"])
        lines = [line.strip() for line in answer.stdout.splitlines() if " is " in line]
        text = _core.printable("; ".join(lines) or answer.reason("scontrol"))
        if not any(line.endswith("UP") for line in lines):
            self.report.fail("controller", text, "no job starts while slurmctld is down: ask those who run the cluster")
            return False
        self.report.ok("controller", text)
        return True

    def _test_options(self) -> None:
        given = words(self.provider.options)
        answer = commands.run(["sbatch", "--test-only", *given, *submission.ONE_NODE], stdin=b"#!/bin/sh\n")
        if answer.status:
            fix = "correct them: `sinfo` shows the partitions and what their nodes have, `man sbatch` the options"
            self.report.fail("options", f"sbatch: {answer.reason('sbatch')}", fix)
            return
        started = re.search(r"to start at \S+ .*", answer.stderr + answer.stdout)
        text = f"a job is {_core.printable(started[0])}" if started else "sbatch takes them"
        self.report.ok("options", text)

    def _own_job(self) -> None:
        nodes = own_job.nodes()
        names = ", ".join(f"{node.name} with {node.cpus} CPUs" for node in nodes)
        self.report.ok("job", f"this process is in job {own_job.job()}: {names}", nodes=len(nodes))


class SlurmCheck(CommandCheck):
    """The steps for one node of a job."""

    connection_remedy = "see whether the job still runs (squeue); try again"
    included = "srun's start"

    def way_in(self) -> _core.Connection | None:
        return super().way_in() if self._await_job() else None

    def leave(self, connection: _core.Connection) -> survival.Left | None:
        return None  # an agent ends with its srun, and another one is started in the same job

    def python_there(self, connection: _core.Connection, facts: probe.Facts) -> str | None:
        if self.machine.python is not None:
            return super().python_there(connection, facts)
        own = nesting.interpreter()
        try:
            path = self.machine.verify_python(connection, own)
        except NodeStartError as error:
            self.report.note("python", f"this process's own does not serve there: {error}")
            return super().python_there(connection, facts)
        self.report.ok("python", f"{own}, this process's own, is there as well, and has what is needed")
        return path

    def _await_job(self) -> bool:
        """Wait until the node's job runs, and report what it was given. False if it does not within the bound."""
        machine = self.machine
        if not isinstance(machine, SlurmMachine):
            return True
        began = time.monotonic()
        waiting: concurrent.futures.Future[None] = concurrent.futures.Future()
        threading.Thread(target=_enter, args=(machine, waiting), daemon=True).start()
        try:
            waiting.result(QUEUE_SECONDS)
        except TimeoutError:
            self.report.verdict = "could not be looked at yet"
            self.report.note(
                "job",
                f"{machine.doing or 'its job waits'}, for {QUEUE_SECONDS:.0f} s so far: no node was checked",
                "a pool waits on, for pool(start_timeout=); Slurm's reason tells what for",
            )
            return False
        except NodeStartError as error:
            self.report.fail("job", str(error), "")
            return False
        row = machine.row
        assert row is not None
        many = f"{row.cpus} CPUs, and so as many tasks at once"
        parts = ["1 CPU, and so one task at a time" if row.cpus == 1 else many]
        if row.memory_bytes:
            parts.append(f"{row.memory_bytes / 1e9:.1f} GB memory")
        if row.seconds_left is not None:
            parts.append(f"{row.seconds_left / 60:,.0f} min until its time limit")
        took = time.monotonic() - began
        self.report.ok(
            "job",
            f"{row.id} runs on {row.nodes} after {took:.1f} s: {', '.join(parts)}",
            cpus=row.cpus,
            memory_gb=None if row.memory_bytes is None else row.memory_bytes / 1e9,
            time_left_s=row.seconds_left,
            queue_s=took,
        )
        if row.seconds_left is not None and row.seconds_left <= machine.run.grace:
            self.report.note(
                "job",
                f"a node takes no more tasks {machine.run.grace:.0f} s before its time limit, which is all of its time",
                "ask for more with time=, or make Slurm(grace=) smaller",
            )
        return True


def _enter(machine: SlurmMachine, waiting: concurrent.futures.Future[None]) -> None:
    try:
        machine.enter_job()
    except BaseException as error:
        waiting.set_exception(error)
    else:
        waiting.set_result(None)


def reports(provider: Slurm, core: _core.Core, measuring: threading.Lock) -> Generator[Report]:
    """Check the cluster, then a node of it, or all nodes of the job that this process is in; yield their reports."""
    cluster = ClusterCheck(provider).run()
    machines: list[Machine] = []
    try:
        if cluster.usable:
            try:
                provider.start(default_request(provider), machines)
            except NodeStartError as error:
                cluster.fail("job", str(error), "")
        yield cluster
        checks = [SlurmCheck(machine, core, measuring) for machine in machines if isinstance(machine, StepMachine)]
        yield from in_order([check.run for check in checks]) if checks else ()
    finally:
        provider.stop(machines, STOP_SECONDS)
