"""Jobs that have to make room for more urgent ones, and jobs that reach their time limit."""

from __future__ import annotations

import time

import pytest
import skyward_lite as sky
import slurm
from processes import eventually

pytestmark = pytest.mark.usefixtures("functions_by_value")
CLUSTER = {"partitions": slurm.PREEMPTION}
STRICT = sky.Worker(concurrency=2, retries=0)


def double(x):
    time.sleep(0.02)
    return 2 * x


@pytest.mark.parametrize("partition", ["gentle", "harsh"])
def test_a_node_that_is_preempted(cluster, partition, caplog):
    """A preempted job drains, costs no retry and ends when it is idle; its successor joins when there is room again."""
    caplog.set_level("INFO", "skyward_lite")
    provider = sky.Slurm(partition=partition, exclusive=True)
    with sky.pool(provider, nodes=2, worker=STRICT, plugins=[]) as pool:
        futures = [pool.submit(double, i) for i in range(400)]
        assert eventually(lambda: sum(future.done() for future in futures) >= 40, 20)
        before = cluster.jobs()
        urgent = cluster.fill("node1", "--partition=urgent")
        # The tasks that ran have ended by themselves, and so has the job: nobody waited for its GraceTime.
        (gone,) = before.keys() - cluster.jobs("RUNNING").keys()
        assert [future.result(30) for future in futures] == [2 * i for i in range(400)]
        assert sorted(node.state for node in pool.nodes()) == ["connecting", "lost", "ready"]

        def reasons():
            return [node.reason or "" for node in pool.nodes() if node.state == "connecting"]

        assert eventually(lambda: "PENDING" in reasons()[0], 10), reasons()
        cluster.run("scancel", urgent)
        assert eventually(lambda: [node.state for node in pool.nodes()].count("ready") == 2, 20), pool.nodes()
        assert list(pool.map(double, range(40))) == [2 * i for i in range(40)]
        assert "was preempted by a job of a higher priority" in caplog.text
    assert eventually(lambda: not cluster.jobs(), 8)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_pool_outlives_the_time_limits_of_its_jobs(cluster):
    """With a limit of a minute and `grace=40` each job is replaced after 20 s; over three renewals no task is lost."""
    provider = sky.Slurm(partition="main", cpus_per_task=2, time=1, grace=40)
    with sky.pool(provider, nodes=2, worker=STRICT, plugins=[]) as pool:
        number = 0
        while sum(node.state == "lost" for node in pool.nodes()) < 6:
            wanted = range(number, number + 100)
            assert list(pool.map(double, wanted)) == [2 * i for i in wanted]
            number += 100
        assert eventually(lambda: [node.state for node in pool.nodes()].count("ready") == 2, 20), pool.nodes()
        reasons = [node.reason for node in pool.nodes() if node.state == "lost"]
        assert all("time limit" in reason for reason in reasons), reasons
        # A drained job is given back, so that the queue has no more than one job for each node.
        assert eventually(lambda: len(cluster.jobs("RUNNING")) == 2, 10), cluster.jobs()
    assert eventually(lambda: not cluster.jobs(), 8)
