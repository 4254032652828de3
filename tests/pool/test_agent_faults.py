"""Agents that are killed or cannot start, and nodes that are lost."""

from __future__ import annotations

import logging
import operator
import os
import resource
import signal
import subprocess
import time

import pytest
import skyward_lite as sky
from processes import MARK, eventually
from skyward_lite.providers.local import LocalMachine


def test_tasks_of_a_killed_agent_run_on_another_node():
    """The list is a serial run's although the agent of one of two nodes is killed; that node then comes back."""
    with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=2)) as pool:
        futures = [pool.submit(slow_neg, i) for i in range(40)]
        os.kill(pool.nodes()[0].pid, signal.SIGKILL)
        assert [f.result(30) for f in futures] == [-i for i in range(40)]
        assert eventually(lambda: [n.state for n in pool.nodes()] == ["ready", "ready"], 20), pool.nodes()


def slow_neg(i):
    time.sleep(0.02)
    return -i


def test_the_only_node_comes_back(caplog):
    """The tasks of the only node wait for it after its agent was killed; it is the same node, with another agent."""
    caplog.set_level(logging.INFO, "skyward_lite")
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        killed = pool.nodes()[0]
        futures = [pool.submit(slow_neg, i) for i in range(20)]
        os.kill(killed.pid, signal.SIGKILL)
        assert [future.result(30) for future in futures] == [-i for i in range(20)]
        (node,) = pool.nodes()
        assert (node.name, node.state, node.slots) == (killed.name, "ready", 1)
        assert node.pid != killed.pid
        assert killed.since < node.since <= time.time()
    assert "node local-0 is ready again with 1 slot" in caplog.messages


def test_tasks_fail_when_the_last_node_does_not_come_back(monkeypatch):
    """Pending and new tasks get an error with the reason `start_timeout` after the last node was lost; none hangs."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[], start_timeout=3) as pool:

        def refuse(machine, core):
            raise sky.NodeStartError("no")

        monkeypatch.setattr(LocalMachine, "open", refuse)
        futures = [pool.submit(time.sleep, 60) for _ in range(5)]
        os.kill(pool.nodes()[0].pid, signal.SIGKILL)
        for future in futures:
            with pytest.raises(sky.NodeLostError, match="local-0"):
                future.result(20)
        with pytest.raises(sky.NodeLostError):
            pool.submit(operator.neg, 1).result(20)


def test_retries_0_does_not_rerun_tasks_of_a_lost_node():
    """With `Worker(retries=0)` a task whose node was lost fails and is not run again."""
    with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=1, retries=0), plugins=[]) as pool:
        futures = [pool.submit(time.sleep, 0.5) for _ in range(2)]
        os.kill(pool.nodes()[0].pid, signal.SIGKILL)
        ends = [future.exception(20) for future in futures]
        assert sorted(type(e) for e in ends if e is not None) == [sky.NodeLostError], ends


def test_agent_that_ends_at_once_fails_the_start(monkeypatch, capfd):
    """An agent that ends at once fails the pool's start, and the error has what the agent printed on standard error."""
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    monkeypatch.setenv(MARK, os.environ[MARK])
    with pytest.raises(sky.NodeStartError, match="local-0 is lost"), sky.pool(plugins=[]):
        pass
    assert "PYTHONHOME" in capfd.readouterr().err


def test_node_that_cannot_start_workers_says_why(monkeypatch):
    """A node that may have too few open files to start its workers fails with that reason."""
    start = subprocess.Popen

    def limited(*args, **kwargs):
        few = (40, 40)
        return start(*args, **kwargs, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, few))

    monkeypatch.setattr(subprocess, "Popen", limited)
    with pytest.raises(sky.NodeStartError, match="cannot start a worker: Too many open files"):
        sky.pool(worker=sky.Worker(concurrency=40, executor="process"), plugins=[]).__enter__()
