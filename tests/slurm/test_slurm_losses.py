"""Jobs that end while tasks run: cancelled, orphaned, and with a controller that is gone for a while.

`Worker(retries=0)` shows that a loss was announced: tasks of a node that is lost without a word would be lost with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import skyward_lite as sky
from processes import eventually
from skyward_lite.client import returning

pytestmark = pytest.mark.usefixtures("functions_by_value")
STRICT = sky.Worker(concurrency=2, retries=0)


def double(x):
    time.sleep(0.02)
    return 2 * x


class Run:
    """Tasks that run in a pool from now on: `reaches(n)` waits until so many of them have ended."""

    def __init__(self, pool, number):
        self.number = number
        self.futures = [pool.submit(double, i) for i in range(number)]

    def reaches(self, number):
        assert eventually(lambda: sum(future.done() for future in self.futures) >= number, 30)

    def is_right(self):
        return [future.result(30) for future in self.futures] == [2 * i for i in range(self.number)]


def jobs_by_node(cluster):
    """Return the pool's jobs: the name of the node → the job's id."""
    return {f"slurm-{job}": job for job in cluster.jobs("RUNNING")}


def states(pool):
    return {node.name: node.state for node in pool.nodes()}


def test_jobs_that_are_cancelled_by_hand(cluster, caplog):
    """A cancelled job costs no retry, and is not replaced while the pool has another one; the last one is."""
    caplog.set_level("INFO", "skyward_lite")
    with sky.pool(sky.Slurm(partition="main", cpus_per_task=2), nodes=2, worker=STRICT, plugins=[]) as pool:
        run = Run(pool, 400)
        run.reaches(40)
        first, second = jobs_by_node(cluster).items()
        cluster.run("scancel", first[1])
        assert eventually(lambda: states(pool)[first[0]] == "lost", 10), states(pool)
        assert run.is_right()
        assert eventually(lambda: f"node {first[0]} is not replaced" in caplog.text, 15), caplog.text
        assert states(pool) == {first[0]: "lost", second[0]: "ready"}
        run = Run(pool, 300)
        run.reaches(20)
        cluster.run("scancel", second[1])
        assert run.is_right()
        assert eventually(lambda: [*states(pool).values()].count("ready") == 1, 15), states(pool)
        assert len(states(pool)) == 3
        for job in (first[1], second[1]):
            assert eventually(lambda: f"job {job} was cancelled" in caplog.text, 10), caplog.text
        assert f"To end it all, end this process: kill {os.getpid()}" in caplog.text
    assert eventually(lambda: not cluster.jobs(), 8)


def test_all_jobs_cancelled_at_once(cluster, caplog):
    """If all jobs of a pool that is open are cancelled in mid-run, one takes their place, and no task is lost."""
    caplog.set_level("INFO", "skyward_lite")
    with sky.pool(sky.Slurm(partition="main", cpus_per_task=2), nodes=2, worker=STRICT, plugins=[]) as pool:
        run = Run(pool, 400)
        run.reaches(40)
        cluster.run("scancel", *jobs_by_node(cluster).values())
        assert run.is_right()
        gone = [node for node in pool.nodes() if node.state in ("draining", "lost")]
        assert len(gone) == 2
        assert eventually(lambda: "is not replaced" in caplog.text, 15), caplog.text
        assert len(pool.nodes()) == 3
    assert eventually(lambda: not cluster.jobs(), 8)


def test_an_srun_that_dies_is_started_anew_in_the_same_job(cluster):
    """A stream that is cut while its job goes on costs that job's tasks an attempt, and no job."""
    worker = sky.Worker(concurrency=2, retries=1)
    with sky.pool(sky.Slurm(partition="main", cpus_per_task=2), nodes=1, worker=worker, plugins=[]) as pool:
        run = Run(pool, 200)
        run.reaches(20)
        before = jobs_by_node(cluster)
        for pid in sruns(cluster):
            os.kill(pid, signal.SIGKILL)
        assert run.is_right()
        assert jobs_by_node(cluster) == before
        assert eventually(lambda: [*states(pool).values()].count("ready") == 1, 15), states(pool)


def test_what_becomes_of_an_arrays_last_job_is_not_done_to_the_others(cluster):
    """The number of an array's last job is also that of the array: a step of it that is lost ends no other job's."""
    with sky.pool(sky.Slurm(partition="main", cpus_per_task=2), nodes=2, plugins=[]) as pool:
        first, last = jobs_by_node(cluster)
        array = last.removeprefix("slurm-").partition("_")[0]
        for pid, command in cluster.processes().items():
            if command.startswith("srun ") and f"--jobid={array} " in command:
                os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: states(pool).get(f"{last}-2") == "ready", 15), states(pool)
        assert states(pool)[first] == "ready"
        assert list(pool.map(abs, range(-20, 0))) == [*range(20, 0, -1)]


def test_the_job_of_a_node_that_is_left_out_is_given_back(cluster, tmp_path):
    """A node that cannot be used, when the pool has another one, keeps no job in the queue, and ends no other's."""
    python, open_now = tmp_path / "python", tmp_path / "open"
    python.write_text(
        f"#!/bin/sh\n[ $SLURMD_NODENAME = node1 ] || {{ until [ -e {open_now} ]; do sleep 0.1; done; exit 1; }}\n"
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    provider = sky.Slurm(exclusive=True, python=python)
    with sky.pool(provider, nodes=(1, 2), plugins=[]) as pool:
        before = cluster.jobs("RUNNING")
        open_now.touch()
        assert eventually(lambda: sorted(states(pool).values()) == ["lost", "ready"], 15), pool.nodes()
        assert eventually(lambda: len(cluster.jobs("RUNNING")) == 1, 15), (before, cluster.jobs())
        assert list(pool.map(abs, range(-20, 0))) == [*range(20, 0, -1)]
        assert len(pool.nodes()) == 2


def test_a_controller_that_is_gone_for_a_while_costs_nothing(cluster, caplog):
    """When slurmctld is gone in mid-run no task notices; a pool that is left meanwhile leaves nothing."""
    provider = sky.Slurm(partition="main", cpus_per_task=2)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(sky.pool(provider, nodes=2, worker=STRICT, plugins=[]))
        run = Run(pool, 1000)
        run.reaches(20)
        cluster.kill_controller()
        assert Run(pool, 200).is_right()
        cluster.start_controller()
        assert eventually(cluster.answers, 20), cluster.logs()
        assert run.is_right()
        assert [*states(pool).values()] == ["ready"] * 2
        cluster.kill_controller()
        began = time.monotonic()
        stack.close()
        assert time.monotonic() - began < 20
    cluster.start_controller()
    assert eventually(cluster.answers, 20), cluster.logs()
    assert eventually(cluster.is_empty, 30), cluster.leftovers()


def test_an_allocation_that_is_cancelled_around_its_pool(cluster, monkeypatch):
    """If the job ends whose nodes a pool uses, its tasks fail: nodes of this job cannot come back."""
    monkeypatch.setattr(returning, "DRAINED_SECONDS", 1.0)
    cluster.run("salloc", "--no-shell", "-N2", "--ntasks-per-node=1", "--cpus-per-task=2")
    (job,) = cluster.jobs()
    for name, value in (("ID", job), ("NODELIST", "node[1-2]"), ("NUM_NODES", "2"), ("CPUS_PER_NODE", "2(x2)")):
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    with sky.pool(sky.Slurm(), worker=STRICT, plugins=[]) as pool:
        run = Run(pool, 2000)
        run.reaches(40)
        cluster.run("scancel", job)
        with pytest.raises(sky.NodeLostError, match="no node is left"):
            run.is_right()
    with pytest.raises(sky.NodeStartError, match=f"its job {job} was cancelled"), sky.pool(sky.Slurm()):
        pass


CLIENT = """
import time, skyward_lite as sky
provider = sky.Slurm(partition="main", cpus_per_task=2, orphan_timeout=10)
with sky.pool(provider, nodes=2, lease=3, worker=sky.Worker(concurrency=2), plugins=[]) as pool:
    futures = [pool.submit(time.sleep, 0.05) for _ in range(10_000)]
    futures[50].result()
    print("runs", flush=True)
    time.sleep(300)
"""


def sruns(cluster):
    """Return the processes of srun, each with the shepherd that it forks."""
    return [pid for pid, command in cluster.processes().items() if command.startswith("srun ")]


def agents(cluster):
    """Return the agents and workers in the cluster's jobs."""
    return {pid: command for pid, command in cluster.processes().items() if "skyward_lite.node." in command}


@pytest.fixture
def client(cluster):
    """A client in another process, two nodes of which run tasks."""
    process = subprocess.Popen([sys.executable, "-c", CLIENT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "runs\n"
    yield process
    process.kill()
    process.communicate()


def test_a_client_that_is_killed(cluster, client):
    """When the client is killed its agents end, and its jobs are cancelled at once: the guard is not waited for."""
    assert len(sruns(cluster)) == 4
    assert len(agents(cluster)) >= 4
    client.kill()
    assert eventually(lambda: not agents(cluster), 5), agents(cluster)
    assert eventually(cluster.is_empty, 15), cluster.leftovers()


def test_a_client_that_is_killed_with_everything_beside_it(cluster, client):
    """When the client's whole machine is gone, agents end after the lease, and jobs when their guard misses them."""
    (canceller,) = [pid for pid, command in cluster.processes().items() if "scancel" in command]
    for pid in (canceller, client.pid, *sruns(cluster)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert len(cluster.jobs("RUNNING")) == 2
    assert eventually(lambda: not agents(cluster), 15), agents(cluster)
    assert eventually(cluster.is_empty, 35), cluster.leftovers()


def test_sigterm_ends_a_pool_in_order(cluster, client):
    """A client that gets SIGTERM leaves its block: nothing is left."""
    client.terminate()
    client.wait(20)
    assert eventually(cluster.is_empty, 15), cluster.leftovers()
