"""Nodes that a real Slurm grants: jobs of a pool's own, and the job that a program is in."""

from __future__ import annotations

import json
import multiprocessing
import operator
import os
import subprocess
import sys
import time

import pytest
import skyward_lite as sky
import slurm_client
from joblib import Parallel, delayed
from processes import eventually
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC
from slurm_client import slow_task

pytestmark = pytest.mark.usefixtures("functions_by_value")
CORES = os.cpu_count() or 1
CLIENT = slurm_client.__file__


def variables(_=None):
    return {name: value for name, value in os.environ.items() if name.startswith(("SLURM", "OMP_NUM"))}


def ended_by_terminate(_):
    """Start a program and fork a child, end both by SIGTERM at once, and return their exit statuses."""
    program = subprocess.Popen(["sleep", "60"])
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    for process in (program, child):
        process.terminate()
    child.join(20)
    return program.wait(20), child.exitcode


# ------------------------------------------------------------------------------------------------ submitted jobs


def test_the_example_and_a_search_on_submitted_nodes(cluster):
    """2,000 tasks and a grid search on 2 submitted nodes have the serial run's results; slots are those of the jobs."""
    x, y = load_iris(return_X_y=True)
    serial = GridSearchCV(SVC(), {"C": [0.1, 1, 10]}, cv=5, n_jobs=1).fit(x, y)
    with sky.pool(sky.Slurm(partition="main", time="10:00", cpus_per_task=4, job_name="example"), nodes=2) as pool:
        assert Parallel(n_jobs=-1)(delayed(slow_task)(i) for i in range(2000)) == [i * 2 for i in range(2000)]
        grid = GridSearchCV(SVC(), {"C": [0.1, 1, 10]}, cv=5, n_jobs=-1).fit(x, y)
        assert [*grid.cv_results_["mean_test_score"]] == [*serial.cv_results_["mean_test_score"]]
        assert grid.best_params_ == serial.best_params_
        # Each of the cluster's nodes has 4 CPUs, but a task can use only cores that are there.
        assert [node.slots for node in pool.nodes()] == [min(4, CORES)] * 2
        found = list(pool.map(variables, range(40)))
        assert {each["SLURMD_NODENAME"] for each in found} == {"node1", "node2"}
        assert set(pool.map(ended_by_terminate, range(4))) == {(-15, -15)}
        assert list(cluster.jobs().values()) == ["RUNNING"] * 2
    assert eventually(lambda: not cluster.jobs(), 5)


def test_slots_are_the_jobs_cpus_unless_the_worker_says_otherwise(cluster):
    """A job of one CPU has one slot on a node of more; `Worker(concurrency=)` goes before."""
    with sky.pool(sky.Slurm(cpus_per_task=1), nodes=2, plugins=[]) as pool:
        assert [node.slots for node in pool.nodes()] == [1, 1]
        many = sky.Worker(concurrency=3, executor="process")
        with sky.pool(sky.Slurm(partition="main"), nodes=1, vcpus=2, worker=many, plugins=[]) as other:
            assert other.slots() == 3
            assert other.submit(variables).result()["SLURM_CPUS_ON_NODE"] == "2"
            assert list(other.map(operator.neg, range(9))) == [-i for i in range(9)]
        assert list(pool.map(abs, range(-9, 0))) == [*range(9, 0, -1)]
    assert eventually(lambda: not cluster.jobs(), 5)


def test_variables_of_an_outer_job_and_of_the_user_change_nothing(cluster, monkeypatch):
    """A submission from within a job, by a user with settings of their own, has only what it says itself."""
    outer = {
        "SLURM_JOB_ID": "999999",
        "SLURM_JOBID": "999999",
        "SLURM_JOB_NODELIST": "nowhere[1-9]",
        "SLURM_NNODES": "9",
        "SLURM_NTASKS": "7",
        "SLURM_CPUS_PER_TASK": "3",
        "SLURM_MEM_PER_NODE": "900000",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_OVERLAP": "0",
        "SLURM_EXACT": "1",
        "SLURM_LABELIO": "1",
        "SLURM_CPU_BIND": "verbose",
        "SRUN_CPUS_PER_TASK": "3",
        "SLURM_EXCLUSIVE": "user",
        "SLURM_HINT": "nomultithread",
        "SQUEUE_FORMAT": "%j",
        "SQUEUE_STATES": "SUSPENDED",
        "SQUEUE_USERS": "nobody",
        "SQUEUE_PARTITION": "none",
        "SQUEUE_SORT": "-i",
        "SQUEUE_ARRAY": "0",
        "SLURM_TIME_FORMAT": "relative",
        "SLURM_BITSTR_LEN": "0",
        "SCANCEL_INTERACTIVE": "1",
        "SCANCEL_STATE": "SUSPENDED",
        "SCANCEL_NAME": "nothing",
        "SLURM_CLUSTERS": "x",
        "SBATCH_ARRAY_INX": "0-5",
        "SBATCH_WAIT": "1",
        "SBATCH_REQUEUE": "1",
        "SBATCH_SIGNAL": "TERM@1",
        "SBATCH_TIMELIMIT": "20:00",
        "SLURM_OPEN_MODE": "a",
        "SLURM_UNBUFFEREDIO": "0",
        "SBATCH_DEBUG": "5",
    }
    for name, value in outer.items():
        monkeypatch.setenv(name, value)
    with sky.pool(sky.Slurm(cpus_per_task=2), nodes=2, plugins=[]) as pool:
        assert list(pool.map(abs, range(-20, 0))) == [*range(20, 0, -1)]
        found = pool.submit(variables).result()
        assert found["SLURM_JOB_ID"] != "999999"
        assert found["SLURM_CPUS_PER_TASK"] == "2"
        assert found["SLURM_NNODES"] == "1"
        assert not {"SLURM_HINT", "SLURM_EXACT"} & found.keys()
        # What a user sets for sbatch, as an account or a time limit, is meant for it.
        limits = cluster.run("squeue", "--noheader", "--array", "--format=%l").split()
        assert limits == ["20:00"] * 2


# ------------------------------------------------------------------------------------------------ within a job


@pytest.mark.parametrize("way", ["sbatch", "salloc"])
def test_the_jobs_own_nodes(cluster, tmp_path, way):
    """Within `sbatch -N2` and `salloc -N2` the nodes are the job's own, and nothing is submitted."""
    out, log = tmp_path / "out.json", tmp_path / "log"
    options = ("-N2", "--ntasks-per-node=1", "--cpus-per-task=2")
    if way == "salloc":
        cluster.run("salloc", *options, sys.executable, CLIENT, str(out), timeout=50)
    else:
        # Not by --wait, which looks at the job after 2, 4, 8, 16 and 32 s.
        cluster.run("sbatch", *options, f"--output={log}", f"--wrap={sys.executable} {CLIENT} {out}")
        assert eventually(lambda: not cluster.jobs(), 50)
    assert out.exists(), (log.exists() and log.read_text(), cluster.logs())
    found = json.loads(out.read_text())
    assert found["right"]
    assert found["scores"] == found["serial"]
    assert found["nodes"] == ["node1", "node2"]
    assert found["slots"] == [min(2, CORES)] * 2
    assert len(found["queue"]) == 1


def test_outside_of_a_job_options_are_needed(cluster):
    """Without options and outside of a job there are no nodes: the error says what to write."""
    with pytest.raises(ValueError, match=r"Slurm\(\).*job"):
        sky.pool(sky.Slurm())


# ------------------------------------------------------------------------------------------------ the queue


def test_a_pool_starts_with_the_node_that_fits_and_the_other_joins(cluster):
    """`nodes=(1, 2)` starts when one job runs, shows why the other waits, and takes it when there is room for it."""
    others = cluster.fill("node1")
    with sky.pool(sky.Slurm(exclusive=True), nodes=(1, 2), plugins=[]) as pool:
        assert list(pool.map(abs, range(-20, 0))) == [*range(20, 0, -1)]

        def waiting():
            return [node for node in pool.status().nodes if "PENDING (Resources)" in (node.reason or "")]

        assert eventually(waiting, 15), pool.status().nodes
        assert waiting()[0].state == "connecting"
        cluster.run("scancel", others)
        assert eventually(lambda: [node.state for node in pool.nodes()] == ["ready"] * 2, 20), pool.nodes()
    assert eventually(lambda: not cluster.jobs(), 5)


def test_why_too_few_nodes_start(cluster):
    """Where one job of two waits until `start_timeout`, the error says why, and what to do."""
    others = cluster.fill("node1")
    provider = sky.Slurm(exclusive=True)
    with pytest.raises(sky.NodeStartError) as caught, sky.pool(provider, nodes=2, start_timeout=4, plugins=[]):
        pass
    text = str(caught.value)
    assert "2 ready nodes are needed" in text
    assert "PENDING (Resources)" in text
    assert "nodes=(1, 2)" in text
    assert eventually(lambda: list(cluster.jobs()) == [others], 10), cluster.jobs()
    cluster.cancel_all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"partition": "nope"}, ("partition", "nope", "Invalid partition name specified")),
        ({"partishun": "x"}, ("Slurm(partishun=", "unrecognized option")),
        ({"mem": "900G"}, ("Requested node configuration is not available", "mem")),
        ({"gres": ["gpu:1"]}, ("Invalid generic resource",)),
        ({"time": "soon"}, ("Invalid --time specification", "soon")),
        ({"constraint": "fast"}, ("Invalid feature specification",)),
    ],
)
def test_what_slurm_refuses_is_said_in_its_own_words(cluster, options, words):
    """What sbatch refuses is an error at once, with sbatch's words and the option."""
    with pytest.raises(sky.NodeStartError) as caught, sky.pool(sky.Slurm(**options), nodes=2, plugins=[]):
        pass
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_job_that_can_never_start_is_named(cluster):
    """sbatch takes a job of more CPUs than a node has; the error after `start_timeout` has the queue's reason."""
    provider = sky.Slurm(cpus_per_task=64)
    with pytest.raises(sky.NodeStartError, match=r"PENDING \(PartitionConfig\)"), sky.pool(provider, start_timeout=2):
        pass


def test_without_slurms_programs(monkeypatch, tmp_path):
    """Without sbatch on the PATH the error says where to run it instead."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(sky.NodeStartError, match="there is no sbatch here"), sky.pool(sky.Slurm(partition="main")):
        pass


def test_leaving_while_jobs_wait(cluster):
    """A pool that is left by an exception while its jobs wait leaves none in the queue."""
    both = [cluster.fill(name) for name in cluster.names]
    script = "import skyward_lite as sky\nwith sky.pool(sky.Slurm(exclusive=True), nodes=2, plugins=[]):\n    pass\n"
    client = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert eventually(lambda: len(cluster.jobs("PENDING")) == 2, 20)
    client.send_signal(2)
    _, printed = client.communicate(timeout=20)
    assert "KeyboardInterrupt" in printed
    assert eventually(lambda: sorted(cluster.jobs()) == sorted(both), 10), cluster.jobs()
    cluster.cancel_all()
