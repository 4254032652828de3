"""Nodes that drain: they announce that they will soon be gone, as spot instances do."""

from __future__ import annotations

import logging
import operator
import os
import signal
import threading
import time

import joblib
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from processes import eventually
from skyward_lite.client.tasks import Tasks
from skyward_lite.providers.local import LocalMachine

AGENT = """
import os, sys, threading, time
from skyward_lite import _core
from skyward_lite.node import agent

def watch(notice):
    assert not _core.drain("nobody is there yet")
    while not os.path.exists(notice):
        time.sleep(0.01)
    while not _core.drain("notice"):
        time.sleep(0.01)
    assert _core.drain("another notice")

threading.Thread(target=watch, args=(sys.argv.pop(1),), daemon=True).start()
agent.main()
"""


class Doomed(LocalMachine):
    """A node of this machine that gets its notice when a file exists, and is gone when it is lost."""

    returns = False

    def __init__(self, name, timeout, notice):
        self.notice = notice
        self.program = ("-c", AGENT, str(notice))
        super().__init__(name, timeout)


class DoomedNodes(sky.Local):
    """Local nodes, each with a notice of its own; more of them can join a running pool."""

    def __init__(self, directory):
        super().__init__()
        self.directory = directory

    def start(self, wanted, machines):
        machines.extend(self.make(number, wanted.connect_timeout) for number in range(wanted.nodes))

    def make(self, number, timeout=20):
        return Doomed(f"local-{number}", timeout, self.directory / f"notice-{number}")

    def join(self, pool):
        """Add a node."""
        machine = self.make(len(Tasks.of(pool).nodes.machines))
        Tasks.of(pool).nodes.join([machine])
        assert eventually(lambda: pool.nodes()[-1].state != "connecting", 20)


class Gate:
    """Delays tasks until it is opened, and records the node of each task."""

    def __init__(self, directory):
        self.directory = directory
        self.open = directory / "gate"

    def __call__(self, i):
        (self.directory / f"runs-{i}-{os.getppid()}").touch()
        while not self.open.exists():
            time.sleep(0.01)
        return os.getppid()

    def running(self, agent):
        return sum(1 for _ in self.directory.glob(f"runs-*-{agent}"))


def agent_of(_):
    time.sleep(0.01)
    return os.getppid()


def drain(pool, number):
    Tasks.of(pool).nodes.machines[number].notice.touch()
    assert eventually(lambda: pool.nodes()[number].state == "draining", 10), pool.nodes()
    assert pool.nodes()[number].reason == "notice"


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_queued_tasks_of_a_draining_node_run_on_another(tmp_path, executor, caplog):
    """Tasks that wait on a draining node run on another one, running tasks end there, and its slots no longer count."""
    provider, gate = DoomedNodes(tmp_path), Gate(tmp_path)
    worker = sky.Worker(concurrency=2, executor=executor)
    with caplog.at_level(logging.INFO, "skyward_lite"), sky.pool(provider, 1, worker=worker) as pool:
        drained = pool.nodes()[0].pid
        running = [pool.submit(gate, i) for i in range(2)]
        assert eventually(lambda: gate.running(drained) == 2, 10)
        waiting = [pool.submit(agent_of, i) for i in range(50)]
        drain(pool, 0)
        assert pool.slots() == 0
        provider.join(pool)
        others = {future.result(20) for future in waiting}
        assert others == {pool.nodes()[1].pid}
        assert pool.slots() == joblib.effective_n_jobs(-1) == 2
        assert set(Parallel(n_jobs=-1)(delayed(agent_of)(i) for i in range(20))) == others
        assert not any(future.done() for future in running)
        gate.open.touch()
        assert [future.result(20) for future in running] == [drained] * 2
        assert pool.nodes()[0].state == "draining"
        assert "node local-0 takes no more tasks, what it has not started runs elsewhere: notice" in caplog.text


def test_lost_draining_node_costs_no_retries(tmp_path):
    """With `retries=0` the tasks of a draining node that is lost run on another node in their places."""
    provider = DoomedNodes(tmp_path)

    def slow_neg(i):
        time.sleep(0.02)
        return -i

    with sky.pool(provider, 2, worker=sky.Worker(concurrency=2, retries=0), plugins=[]) as pool:
        gate = Gate(tmp_path)
        drained = pool.nodes()[0].pid
        held = [pool.submit(gate, i) for i in range(4)]
        assert eventually(lambda: gate.running(drained) == 2, 10)
        futures = [pool.submit(slow_neg, i) for i in range(60)]
        drain(pool, 0)
        os.kill(drained, signal.SIGKILL)
        assert eventually(lambda: pool.nodes()[0].state == "lost", 15)
        assert "it was draining: notice" in pool.nodes()[0].reason
        gate.open.touch()
        assert {future.result(20) for future in held} == {pool.nodes()[1].pid}
        assert [future.result(20) for future in futures] == [-i for i in range(60)]


def test_worker_death_on_a_draining_node_costs_no_retries(tmp_path):
    """A machine's shutdown may kill a worker before its agent: the task runs on another node, where a crash of its own
    counts.
    """
    provider, gate = DoomedNodes(tmp_path), Gate(tmp_path)
    with sky.pool(provider, 1, worker=sky.Worker(concurrency=1, retries=0), plugins=[]) as pool:
        drained = pool.nodes()[0].pid

        def dies(i):
            gate(i)
            os.kill(os.getpid(), signal.SIGKILL)

        futures = [pool.submit(dies, 0)]
        assert eventually(lambda: gate.running(drained) == 1, 10)
        drain(pool, 0)
        gate.open.touch()
        provider.join(pool)
        with pytest.raises(sky.WorkerCrashedError, match="local-1"):
            futures[0].result(20)
        assert gate.running(pool.nodes()[1].pid) == 1


@pytest.mark.slow
def test_joining_node_takes_over_from_draining_nodes(tmp_path):
    """A call that began on two nodes ends on a third, while the first two drain."""
    provider = DoomedNodes(tmp_path)
    with sky.pool(provider, 2, worker=sky.Worker(concurrency=2, retries=0)) as pool:
        drained = {node.pid for node in pool.nodes()}

        def replace():
            time.sleep(0.3)
            drain(pool, 0)
            drain(pool, 1)
            Tasks.of(pool).core.expect(1)
            for pid in drained:
                os.kill(pid, signal.SIGKILL)
            assert eventually(lambda: [node.state for node in pool.nodes()] == ["lost", "lost"], 15)
            provider.join(pool)
            Tasks.of(pool).core.expect(0)

        replacer = threading.Thread(target=replace)
        replacer.start()
        agents = Parallel(n_jobs=-1, batch_size=1)(delayed(agent_of)(i) for i in range(300))
        replacer.join(20)
        assert pool.nodes()[2].pid in set(agents) <= {node.pid for node in pool.nodes()}
        assert len(agents) == 300


def test_tasks_fail_without_an_eligible_or_expected_node(tmp_path):
    """Tasks wait while a node drains or is expected, and then fail."""
    provider = DoomedNodes(tmp_path)
    with sky.pool(provider, 1, worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        drain(pool, 0)
        future = pool.submit(operator.neg, 1)
        Tasks.of(pool).core.expect(1)
        os.kill(pool.nodes()[0].pid, signal.SIGKILL)
        assert eventually(lambda: pool.nodes()[0].state == "lost", 15)
        with pytest.raises(TimeoutError):
            future.result(0.5)
        Tasks.of(pool).core.expect(0)
        with pytest.raises(sky.NodeLostError, match="no node is left"):
            future.result(5)
        with pytest.raises(sky.NodeLostError, match="no node is left"):
            pool.submit(operator.neg, 1).result(5)
        provider.join(pool)
        assert pool.submit(operator.neg, 1).result(20) == -1


def test_pinned_tasks_stay_on_a_draining_node(tmp_path):
    """Tasks pinned to a draining node run there; a new `@` runs on the nodes that are ready."""
    provider, gate = DoomedNodes(tmp_path), Gate(tmp_path)
    where = sky.compute(agent_of)
    with sky.pool(provider, 2, worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pids = [node.pid for node in pool.nodes()]
        running = Tasks.of(pool).submit(*Tasks.of(pool).encode_call(gate, (0,), {}), 0)
        waiting = Tasks.of(pool).submit(*Tasks.of(pool).encode_call(agent_of, (0,), {}), 0)
        assert eventually(lambda: gate.running(pids[0]) == 1, 10)
        drain(pool, 0)
        late = Tasks.of(pool).submit(*Tasks.of(pool).encode_call(agent_of, (0,), {}), 0)
        assert where(0) @ pool == [pids[1]]
        assert not waiting.done()
        gate.open.touch()
        assert [future.result(20) for future in (running, waiting, late)] == [pids[0]] * 3


def test_leaving_waits_for_tasks_of_a_draining_node(tmp_path):
    """Leaving the block waits for the running tasks of a draining node as for those of any other."""
    provider, gate = DoomedNodes(tmp_path), Gate(tmp_path)
    with sky.pool(provider, 1, worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        drained = pool.nodes()[0].pid
        future = pool.submit(gate, 0)
        assert eventually(lambda: gate.running(drained) == 1, 10)
        drain(pool, 0)
        threading.Timer(0.5, gate.open.touch).start()
    assert future.result(0) == drained
    assert pool.nodes()[0].state == "closed"
