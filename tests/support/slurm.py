"""A real Slurm cluster for the tests: its own daemons, as any user, on free ports, with everything in one directory.

Several nodes run on this machine (`slurmd -N node1`). Nothing of a cluster or of a munge that this machine may have is
used or disturbed: `SLURM_CONF` leads to this one, and its daemons have sockets and keys of their own.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import pytest
from processes import eventually

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "salloc")
SBIN = "/usr/sbin:/sbin"
ONE_PARTITION = ("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",)
PREEMPTION = (
    "PreemptType=preempt/partition_prio",
    "PreemptMode=REQUEUE",
    "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1",
    "PartitionName=gentle Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=5",
    "PartitionName=harsh Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0",
    "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF",
)
"""Lines of a slurm.conf: jobs in "urgent" preempt those in "gentle" after a while, and those in "harsh" at once."""
STARTS = 3
"""Attempts to start a cluster: a port that was free may be taken before a daemon listens on it."""


def missing() -> str:
    """Return the names of Slurm's programs that this machine lacks."""
    return " ".join(name for name in PROGRAMS if _program(name) is None)


def require() -> None:
    """Skip the tests of a file that needs a cluster, where there are no programs for one."""
    lacking = missing()
    if lacking:
        pytest.skip(f"no {lacking} here: `make system` installs them as root", allow_module_level=True)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SBIN}")


class Cluster:
    """A running cluster. Use as a context manager: leaving it ends all jobs and daemons."""

    def __init__(
        self,
        directory: Path,
        nodes: int = 2,
        cpus: int = 4,
        partitions: Sequence[str] = ONE_PARTITION,
        options: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self.conf = directory / "slurm.conf"
        self.names = [f"node{number + 1}" for number in range(nodes)]
        self._cpus = cpus
        self._lines = [*options, *partitions]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        scrubbed = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.env = {**scrubbed, "SLURM_CONF": str(self.conf)}

    # -------------------------------------------------------------------------------------------- its daemons

    def __enter__(self) -> Self:
        for folder in ("log", "state", "spool", "munge"):
            (self.directory / folder).mkdir(parents=True)
        # munged wants its key's directory to be private, slurmd one that jobs may pass through.
        (self.directory / "munge").chmod(0o700)
        self.directory.chmod(0o755)
        key = self.directory / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for last in (*[False] * (STARTS - 1), True):
            try:
                self._start()
            except RuntimeError:
                self._end_daemons()
                if last:
                    raise
            else:
                break
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.cancel_all()
        finally:
            self._end_daemons()

    def _start(self) -> None:
        self._configure(_free_ports(1 + len(self.names)))
        socket_path, munge = self.directory / "munge.socket", self.directory / "munge"
        where = (f"--key-file={munge}/key", f"--socket={socket_path}", f"--pid-file={munge}/pid")
        self._run_daemon("munged", "--foreground", "--force", *where, f"--seed-file={munge}/seed")
        if not eventually(socket_path.exists, 10):
            raise RuntimeError(f"munged does not start:\n{self.logs()}")
        self.start_controller(clean=True)
        for name in self.names:
            self._run_daemon("slurmd", "-D", "-N", name, log=name)
        if not eventually(self._is_up, 20):
            raise RuntimeError(f"the nodes are not up:\n{self.logs()}")

    def _configure(self, ports: Sequence[int]) -> None:
        user, host = getpass.getuser(), socket.gethostname().partition(".")[0]
        at = self.directory
        lines = [
            *("ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={ports[0]}"),
            *(f"SlurmUser={user}", f"SlurmdUser={user}", "AuthType=auth/munge", "CredType=cred/munge"),
            *(f"AuthInfo=socket={at}/munge.socket", f"StateSaveLocation={at}/state", f"SlurmdSpoolDir={at}/spool/%n"),
            *(f"SlurmctldPidFile={at}/slurmctld.pid", f"SlurmdPidFile={at}/slurmd.%n.pid"),
            # No cgroups, no accounting, no second machine: what any user can have.
            *("ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "JobAcctGatherType=jobacct_gather/none"),
            *("AccountingStorageType=accounting_storage/none", "JobCompType=jobcomp/none", "SwitchType=switch/none"),
            *("SelectType=select/cons_tres", "SelectTypeParameters=CR_CPU", "MpiDefault=none", "ReturnToService=2"),
            *("SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1", "MailProg=/bin/true"),
            *("SlurmdParameters=config_overrides", "KillWait=5", "MinJobAge=300", "InactiveLimit=0"),
        ]
        for name, port in zip(self.names, ports[1:], strict=True):
            lines.append(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self._cpus} "
                "RealMemory=2000 State=UNKNOWN"
            )
        self.conf.write_text("\n".join([*lines, *self._lines, ""]))

    def _run_daemon(self, program: str, *arguments: str, log: str = "") -> None:
        name = log or program
        with (self.directory / "log" / name).open("ab") as file:
            # A session of its own: Ctrl-C in a terminal is not for it.
            self._daemons[name] = subprocess.Popen(
                [_program(program) or program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self.env,
                start_new_session=True,
            )

    def start_controller(self, clean: bool = False) -> None:
        """Start slurmctld, again after `kill_controller`."""
        self._run_daemon("slurmctld", "-D", "-i", *(["-c"] if clean else []))

    def kill_controller(self) -> None:
        """End slurmctld by force, but first wait until it has saved what it knows, which takes it some seconds."""
        saved, asked = self.directory / "state/job_state", time.time()
        for job in self.jobs():
            self.run("scontrol", "update", f"jobid={job}", "comment=saved")
        assert eventually(lambda: saved.exists() and saved.stat().st_mtime > asked, 20), self.logs()
        self._daemons["slurmctld"].kill()
        self._daemons["slurmctld"].wait(10)

    def _is_up(self) -> bool:
        if any(process.poll() is not None for process in self._daemons.values()):
            raise RuntimeError(f"a daemon has ended:\n{self.logs()}")
        return set(self.idle_nodes()) == set(self.names)

    def _end_daemons(self) -> None:
        # munged is last: the others need it to the end.
        for process in reversed(self._daemons.values()):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        self._daemons.clear()
        for pid in self.processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        ends = []
        for path in sorted((self.directory / "log").iterdir()):
            lines = path.read_text(errors="replace").splitlines()[-25:]
            ends.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(ends)

    # -------------------------------------------------------------------------------------------- its jobs

    def run(self, *command: str, timeout: float = 30, env: Mapping[str, str] | None = None) -> str:
        """Run one of Slurm's commands, and return what it printed."""
        done = subprocess.run(
            command, env=env or self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stderr}{self.logs()}")
        return done.stdout.strip()

    def idle_nodes(self) -> list[str]:
        """Return the names of the nodes that have nothing to do; none if there is no slurmctld."""
        try:
            return self.run("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").split()
        except RuntimeError:
            return []

    def answers(self) -> bool:
        """Return whether slurmctld answers."""
        with contextlib.suppress(RuntimeError):
            self.run("scontrol", "ping")
            self.run("squeue")
            return True
        return False

    def jobs(self, state: str = "") -> dict[str, str]:
        """Return the jobs that have not ended: id → state; those in one state only, if it is given."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        found = dict(line.split() for line in lines)
        return {job: its for job, its in found.items() if state in ("", its)}

    def submit(self, script: str, *options: str) -> str:
        """Submit a job of another user's kind, and return its number."""
        return self.run("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}")

    def fill(self, node: str, *options: str) -> str:
        """Submit a job that takes a whole node; return its number when it runs."""
        job = self.submit("sleep 600", "--exclusive", f"--nodelist={node}", *options)
        assert eventually(lambda: self.jobs().get(job) == "RUNNING", 20), (self.jobs(), self.logs())
        return job

    def cancel_all(self) -> None:
        """End all jobs, and wait until they are gone."""
        jobs = self.jobs()
        if jobs:
            # Not by scancel's first signal, which a job may ignore for KillWait.
            with contextlib.suppress(RuntimeError):
                self.run("scancel", "--full", "--signal=KILL", *jobs)
            self.run("scancel", *jobs)
        assert eventually(lambda: not self.jobs(), 20), (self.jobs(), self.logs())

    def processes(self) -> dict[int, str]:
        """Return the processes of jobs, and of commands that reach into jobs: process id → command line."""
        mark, found = f"SLURM_CONF={self.conf}".encode(), {}
        daemons = {process.pid for process in self._daemons.values()}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                pid, command = int(directory.name), (directory / "cmdline").read_bytes()
                if command and pid not in daemons and mark in (directory / "environ").read_bytes().split(b"\0"):
                    found[pid] = command.replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it ended meanwhile
        # slurmctld has a process of its own for scripts.
        return {p: c for p, c in found.items() if p != os.getpid() and not c.startswith("slurmctld: ")}

    def leftovers(self) -> tuple[dict[str, str], dict[int, str]]:
        """Return the jobs in the queue and the processes that there are because of jobs."""
        return self.jobs(), self.processes()

    def is_empty(self) -> bool:
        """Return whether nothing is left of any job, neither in the queue nor on the nodes."""
        return self.leftovers() == ({}, {})


def _free_ports(number: int) -> list[int]:
    """Return ports that nothing listens on. They are held until all are chosen, so that no two are the same."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def submission_environment(cluster: Cluster) -> Iterator[None]:
    """Let this process's own commands reach the cluster, as in the shell of a user of it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("SLURM_", "SBATCH_", "SQUEUE_")):
                patch.delenv(name)
        patch.setenv("SLURM_CONF", str(cluster.conf))
        yield
