"""An agent that is killed, stopped or cannot start, and nodes that are lost."""

from __future__ import annotations

import ctypes
import operator
import os
import resource
import signal
import subprocess
import time

import pytest
import skyward_lite as sky
from processes import MARK, eventually


def test_a_killed_agents_tasks_run_elsewhere():
    """The list equals a serial run's although one of two nodes was killed."""
    with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=2)) as pool:
        futures = [pool.submit(slow_neg, i) for i in range(40)]
        os.kill(pool.nodes()[0].pid, signal.SIGKILL)
        assert [f.result(30) for f in futures] == [-i for i in range(40)]
        assert eventually(lambda: [n.state for n in pool.nodes()] == ["lost", "ready"], 20), pool.nodes()


def slow_neg(i):
    time.sleep(0.02)
    return -i


def test_without_nodes_tasks_fail_with_the_reason():
    """The last node is gone: pending and new tasks get an error, none hangs."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        futures = [pool.submit(time.sleep, 60) for _ in range(5)]
        os.kill(pool.nodes()[0].pid, signal.SIGKILL)
        for future in futures:
            with pytest.raises(sky.NodeLostError, match="local-0"):
                future.result(20)
        with pytest.raises(sky.NodeLostError):
            pool.submit(operator.neg, 1).result(20)


def test_no_retries_means_no_retries():
    """`Worker(retries=0)`: a task whose node was lost is not run again."""
    with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=1, retries=0), plugins=[]) as pool:
        futures = [pool.submit(time.sleep, 0.5) for _ in range(2)]
        os.kill(pool.nodes()[0].pid, signal.SIGKILL)
        ends = [future.exception(20) for future in futures]
        assert sorted(type(e) for e in ends if e is not None) == [sky.NodeLostError], ends


@pytest.mark.slow
def test_a_stopped_agent_is_found_lost():
    """SIGSTOP: the socket lives, our heartbeat does not. Found within 10 s and a heartbeat."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pid = pool.nodes()[0].pid
        future = pool.submit(time.sleep, 60)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(sky.NodeLostError, match="no sign of life"):
                future.result(20)
        finally:
            os.kill(pid, signal.SIGCONT)


def hold_the_gil(seconds):

    # Unlike CDLL, PyDLL does not release the GIL around its calls.
    ctypes.PyDLL(None).sleep(seconds)
    return "held"


@pytest.mark.slow
def test_a_task_that_holds_the_gil_is_no_lost_node():
    """For longer than a node may be silent: heartbeats need no GIL, neither there nor here."""
    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        future = pool.submit(hold_the_gil, 13)
        hold_the_gil(13)
        assert future.result(20) == "held"
        assert [node.state for node in pool.nodes()] == ["ready"]


def test_the_interpreter_that_cannot_start_is_named(monkeypatch, capfd):
    """An agent that ends at once fails the start, with what it printed on standard error."""
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    monkeypatch.setenv(MARK, os.environ[MARK])
    with pytest.raises(sky.NodeStartError, match="local-0 is lost"), sky.pool(plugins=[]):
        pass
    assert "PYTHONHOME" in capfd.readouterr().err


def test_why_a_node_cannot_start_its_workers_is_said(monkeypatch):
    """Here it may have few files open."""
    start = subprocess.Popen

    def limited(*args, **kwargs):
        few = (40, 40)
        return start(*args, **kwargs, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, few))

    monkeypatch.setattr(subprocess, "Popen", limited)
    with pytest.raises(sky.NodeStartError, match="cannot start a worker: Too many open files"):
        sky.pool(worker=sky.Worker(concurrency=40, executor="process"), plugins=[]).__enter__()
