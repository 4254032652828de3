"""Clients, agents, workers and tasks that are silent for longer than a node or a lease allows.

All of them fall silent at the same time, when the first test of this file begins; each test then waits for its own.
"""

from __future__ import annotations

import concurrent.futures
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import skyward_lite as sky
from processes import client_with_a_grandchild, eventually, ours

pytestmark = pytest.mark.slow

LONG = 13
"""Seconds: longer than a node may be silent, which is 10 s and a heartbeat."""
LEASE = 3
"""Seconds: shorter than `LONG`, so that what has no other bound ends first."""

STOPPED_CLIENT = """
import operator, skyward_lite as sky
with sky.pool(plugins=[]) as pool:
    print(pool.submit(operator.neg, 1).result(), flush=True)
    input()
    print(pool.submit(operator.neg, 2).result(), pool.nodes()[0].state, flush=True)
"""
HELD_GIL = f"""
import sys
sys.path.insert(0, {str(Path(processes.__file__).parent)!r})
import skyward_lite as sky
from task_functions import hold_the_gil
with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
    # The worker imports the function's module, for which it asks this process whether the file was edited.
    pool.submit(hold_the_gil, 0).result()
    future = pool.submit(hold_the_gil, {LONG})
    hold_the_gil({LONG})
    print(future.result(20), *[node.state for node in pool.nodes()])
"""


def started(code: str) -> subprocess.Popen[str]:
    """Start a client's script, with pipes to it and from it."""
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class Silent:
    """What is silent since `began`, a moment of `time.monotonic()`. The pools' agent, and worker, are among it."""

    def __init__(self, directory: Path, pool: sky.ComputePool, replacing: sky.ComputePool) -> None:
        # The longest first, and all that takes time to start before the first falls silent.
        self.holder, self.client = started(HELD_GIL), started(STOPPED_CLIENT)
        (directory / "one").mkdir()
        (directory / "two").mkdir()
        self.leased = client_with_a_grandchild(directory / "one", LEASE)
        self.leased_with_agent = client_with_a_grandchild(directory / "two", LEASE)
        self.lost_task: concurrent.futures.Future[None] = pool.submit(time.sleep, 60)
        self.agent = pool.nodes()[0].pid
        assert self.client.stdout is not None
        assert self.client.stdout.readline() == "-1\n"
        self.replacing = replacing
        self.began = time.monotonic()
        self.stopping = replacing.submit(lambda: os.kill(os.getpid(), signal.SIGSTOP))
        os.kill(self.agent, signal.SIGSTOP)
        self.client.send_signal(signal.SIGSTOP)
        self.leased[0].send_signal(signal.SIGSTOP)
        os.kill(self.leased_with_agent[1], signal.SIGSTOP)
        self.leased_with_agent[0].send_signal(signal.SIGSTOP)

    def until(self, seconds: float) -> float:
        """Return the seconds from now until the silence has lasted for `seconds`."""
        return max(0.0, self.began + seconds - time.monotonic())

    def close(self) -> None:
        """End what no test has ended."""
        os.kill(self.agent, signal.SIGCONT)
        if self.leased_with_agent[0].poll() is None:
            os.kill(self.leased_with_agent[1], signal.SIGKILL)
        for process in (self.holder, self.client, self.leased[0], self.leased_with_agent[0]):
            with process:
                process.kill()


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Silent]:
    """Everything that is silent in this file."""
    worker = sky.Worker(concurrency=1, retries=0)
    with sky.pool(worker=worker, plugins=[]) as pool, sky.pool(worker=worker, plugins=[]) as replacing:
        silent = Silent(tmp_path_factory.mktemp("silent"), pool, replacing)
        try:
            yield silent
        finally:
            silent.close()


def test_stopped_client_loses_its_nodes_when_the_lease_ends(silent):
    """After SIGSTOP of the client, the agent, workers and grandchildren end when the lease does."""
    _, agent, grandchild = silent.leased
    assert eventually(lambda: not {agent, grandchild} & set(ours()), silent.until(10)), ours()


def test_workers_of_a_stopped_agent_end_with_the_lease(silent):
    """If the agent is stopped, the workers' own watchdogs end them and grandchildren when the lease is over."""
    process, agent, grandchild = silent.leased_with_agent
    try:
        assert eventually(lambda: set(ours()) & {agent, grandchild} == {agent}, silent.until(10)), ours()
    finally:
        os.kill(agent, signal.SIGKILL)
        process.kill()
        process.wait()


def test_stopped_agent_is_a_lost_node(silent):
    """A stopped agent (SIGSTOP) keeps its socket but sends no heartbeat, so its node counts as lost after 10 s and a
    heartbeat.
    """
    with pytest.raises(sky.NodeLostError, match="no sign of life"):
        silent.lost_task.result(silent.until(20))


def test_stopped_worker_is_replaced(silent):
    """A stopped worker (SIGSTOP) is replaced, as its watchdog's heartbeat, which needs no GIL, is missing."""
    with pytest.raises(sky.WorkerCrashedError, match="no sign of life"):
        silent.stopping.result(silent.until(20))
    assert silent.replacing.submit(operator.neg, 1).result(20) == -1


def test_client_stopped_within_its_lease_loses_nothing(silent):
    """A client stopped for longer than a node may be silent gets what came meanwhile, and loses nothing."""
    time.sleep(silent.until(LONG))
    silent.client.send_signal(signal.SIGCONT)
    out, _ = silent.client.communicate("\n", timeout=20)
    assert out == "-2 ready\n"


def test_task_that_holds_the_gil_does_not_lose_its_node(silent):
    """A task may hold the GIL longer than a node may be silent, as heartbeats need no GIL at either end."""
    out, _ = silent.holder.communicate(timeout=40)
    assert out == "held ready\n"
