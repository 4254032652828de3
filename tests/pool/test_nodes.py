"""Nodes that differ, come late, fail, or are lost."""

from __future__ import annotations

import logging
import operator
import os
import signal
import threading
import time
from pathlib import Path

import joblib
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from lab import Lab
from processes import eventually, has_ended
from skyward_lite.client.nodes import _reasons
from skyward_lite.client.tasks import Tasks
from skyward_lite.providers.local import LocalMachine


class Gated(sky.Local):
    """Local nodes of which all but the first wait for the gate to open."""

    def __init__(self, fails=False, **kwargs):
        super().__init__(**kwargs)
        self.gate = threading.Event()
        self.fails = fails

    def start(self, wanted, machines):
        super().start(wanted, machines)
        for machine in machines[1:]:
            machine.open = self.late(machine)

    def late(self, machine):
        def open_late(core):
            self.gate.wait(30)
            if self.fails:
                raise sky.NodeStartError("it has no power")
            return LocalMachine.open(machine, core)

        return open_late

    def stop(self, machines, timeout):
        self.gate.set()
        super().stop(machines, timeout)


def pid(_):
    return os.getpid()


def test_pool_starts_with_the_minimum_of_nodes():
    """With `nodes=(1, 3)` a pool starts with one node; negative n_jobs count all nodes that are wanted."""
    provider = Gated()
    with sky.pool(provider, (1, 3), worker=sky.Worker(concurrency=2)) as pool:
        assert [node.state for node in pool.nodes()] == ["ready", "connecting", "connecting"]
        assert pool.slots() == 2
        assert joblib.effective_n_jobs(-1) == 6
        provider.gate.set()
        assert eventually(lambda: pool.slots() == 6, 20)


def test_a_pool_that_does_not_start_in_time_says_which_nodes_are_late():
    """The first node is ready at once, or nearly; the second one never connects."""
    why = r"2 ready nodes are needed, but local-0 is [a-z]+; local-1 is connecting.*pool\(start_timeout=1\) is over"
    with pytest.raises(sky.NodeStartError, match=why):
        sky.pool(Gated(), 2, plugins=[], start_timeout=1.0).__enter__()


def test_nodes_that_wait_for_the_same_are_told_once():
    """A hundred jobs in a full queue are one sentence; a reason of several lines stays with its node."""
    row = dict.fromkeys(sky.Node.__dataclass_fields__)
    states = [
        ("connecting", "its job waits"),
        ("lost", "gone"),
        ("lost", "gone"),
        *[("connecting", "its job waits")] * 4,
    ]
    nodes = [sky.Node(**row | {"name": f"n{i}", "state": s, "reason": r}) for i, (s, r) in enumerate(states)]
    told = _reasons(nodes)
    assert told == ["each of n0, n3 and 3 more is connecting: its job waits", "n1 is lost: gone", "n2 is lost: gone"]


@pytest.mark.slow
def test_late_nodes_are_used_by_a_running_call(tmp_path):
    """A call that began on one node ends on two."""
    provider = Gated()
    gate = tmp_path / "gate"

    def wait_and_tell(i):
        if i == 0:
            gate.touch()
        time.sleep(0.05)
        return os.getppid()

    with sky.pool(provider, (1, 2), worker=sky.Worker(concurrency=1, executor="process")) as pool:
        opener = threading.Thread(target=lambda: eventually(gate.exists, 20) and provider.gate.set())
        opener.start()
        agents = Parallel(n_jobs=-1, batch_size=1)(delayed(wait_and_tell)(i) for i in range(100))
        opener.join(20)
        assert set(agents) == {node.pid for node in pool.nodes()}


def test_late_node_that_fails_is_left_out(caplog):
    """A late node that fails is logged with its reason, and the others go on."""
    provider = Gated(fails=True)
    with caplog.at_level(logging.INFO, "skyward_lite"), sky.pool(provider, (1, 2), plugins=[]) as pool:
        provider.gate.set()
        assert eventually(lambda: "local-1 is left out: it has no power" in caplog.text, 10), caplog.text
        assert pool.nodes()[1].state == "lost"
        assert pool.submit(operator.neg, 1).result(20) == -1


def test_too_few_nodes_fail_the_pool():
    """Below the minimum of nodes the pool does not start, and each node is named with its reason."""
    provider = Gated(fails=True)
    provider.gate.set()
    with pytest.raises(
        sky.NodeStartError, match="2 ready nodes are needed, but .*local-1 is lost: it has no power"
    ) as why:
        sky.pool(provider, 2, plugins=[]).__enter__()
    # The other node may have been on its way.
    assert str(why.value).endswith((". pool(nodes=(1, 2)) starts with those that are ready", "it has no power"))


def test_leaving_does_not_wait_for_late_nodes():
    """Leaving the block gives up nodes that were not started yet."""
    provider = Gated()
    with sky.pool(provider, (1, 2), plugins=[]) as pool:
        assert pool.submit(operator.neg, 1).result(20) == -1
        provider.gate.set()


def test_lost_node_is_logged(caplog):
    """A lost node is logged with its name and the reason."""
    with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        os.kill(pool.nodes()[0].pid, signal.SIGKILL)
        assert eventually(lambda: "node local-0 is lost" in caplog.text, 10)
        assert pool.submit(operator.neg, 1).result(20) == -1


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Two hosts that share a cache, so that their environment is made once."""
    directory = tmp_path_factory.mktemp("nodes")
    lab = Lab(directory)
    for _ in range(2):
        lab.host(env={"XDG_CACHE_HOME": str(directory / "shared")})
    yield lab
    lab.close()


@pytest.mark.slow
def test_host_concurrency(lab):
    """`Host(concurrency=)` sets how many tasks run at once on that host."""
    one, two = lab.hosts
    provider = sky.SSH(sky.Host(one.name, concurrency=3), two.name, config=lab.config)
    with sky.pool(provider, worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        assert [(node.name, node.slots) for node in pool.nodes()] == [(one.name, 3), (two.name, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["agent", "host"])
def test_tasks_of_a_lost_host_run_on_another(lab, what):
    """If a host's agent is killed, or a host cannot be reached for the lease, the list equals a serial run's."""
    third = lab.host(env={"XDG_CACHE_HOME": str(Path(lab.directory, "shared"))})
    provider = sky.SSH(lab.hosts[0].name, third.name, config=lab.config)

    def slow_neg(i):
        import time

        time.sleep(0.02)
        return -i

    with sky.pool(provider, worker=sky.Worker(concurrency=2), plugins=[], lease=2) as pool:
        futures = [pool.submit(slow_neg, i) for i in range(60)]
        agent = pool.nodes()[1].pid
        if what == "agent":
            os.kill(agent, signal.SIGKILL)
        else:
            third.kill()
        assert [future.result(30) for future in futures] == [-i for i in range(60)]
        assert eventually(lambda: pool.nodes()[1].state == ("ready" if what == "agent" else "lost"), 15), pool.nodes()
        assert has_ended(agent)


def test_traffic_is_counted_for_each_node_and_direction(shared_pool):
    """Random bytes count once, for their node and in their direction; elsewhere next to none are sent."""
    core, size = Tasks.of(shared_pool).core, 4 << 20

    def traffic_of(function, argument):
        before = core.traffic()
        shared_pool.submit(function, argument).result(20)
        changes = [(b - a, d - c) for (a, c), (b, d) in zip(before, core.traffic(), strict=True)]
        return sorted(count for pair in changes for count in pair)

    for function, argument in [(len, os.urandom(size)), (os.urandom, size)]:
        *rest, most = traffic_of(function, argument)
        assert size <= most < size * 1.01
        assert sum(rest) < size / 100


class Replaced(sky.Local):
    """Local nodes that are replaced when they are lost, first by machines that `fail` to become nodes."""

    def __init__(self, fail):
        super().__init__()
        self.fail = fail

    def start(self, wanted, machines):
        super().start(wanted, machines)
        for machine in machines:
            machine.returns, machine.replaceable = False, True

    def replace(self, machine, machines):
        new = LocalMachine(f"{machine.name}-again", 20.0)
        new.returns, new.replaceable = False, True
        if self.fail:
            self.fail -= 1
            new.open = self.open_never
            new.failed_transiently = lambda: True
        machines.append(new)

    def open_never(self, core):
        raise sky.NodeStartError("it has no power")


def test_tasks_wait_for_the_replacement_of_a_replacement_that_fails():
    """Tasks of the only node, which is lost, wait while the machines in its place fail and are replaced in turn."""
    with sky.pool(Replaced(fail=2), 1, worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        futures = [pool.submit(time.sleep, 0.05) for _ in range(40)]
        os.kill(pool.nodes()[0].pid, signal.SIGKILL)
        assert [future.result(30) for future in futures] == [None] * 40
        assert [node.state for node in pool.nodes()] == ["lost", "lost", "lost", "ready"]
