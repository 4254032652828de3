"""Clients that are killed, stopped or interrupted leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import eventually, ours

CLIENT = """
import sys, time, operator, subprocess, skyward_lite as sky
def spawn():
    # A grandchild in the worker's group. Its command line is sure to be there when it speaks: Popen returns earlier.
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(300)", "skyward_lite.grandchild"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process.pid
pool = sky.pool(lease={lease}, worker=sky.Worker(concurrency=2), plugins=[]).__enter__()
print(pool.nodes()[0].pid, pool.submit(spawn).result(), flush=True)
pool.submit(time.sleep, 300)
time.sleep(300)
"""


def client(tmp_path, lease):
    """A client process with a pool, a task and a grandchild; its pid and theirs."""
    script = tmp_path / "client.py"
    script.write_text(CLIENT.format(lease=lease))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    agent, grandchild = map(int, process.stdout.readline().split())
    assert {agent, grandchild} <= set(ours())
    return process, agent, grandchild


def test_killed_client_leaves_no_process(tmp_path):
    """After kill -9 of the client, the agent, workers and grandchildren end at once."""
    process, agent, grandchild = client(tmp_path, 60)
    with process:
        process.kill()
        process.wait()
    assert eventually(lambda: not {agent, grandchild} & set(ours()), 5), ours()


@pytest.mark.slow
def test_stopped_client_loses_its_nodes_when_the_lease_ends(tmp_path):
    """After SIGSTOP of the client, the agent, workers and grandchildren end when the lease does."""
    process, agent, grandchild = client(tmp_path, 3)
    with process:
        process.send_signal(signal.SIGSTOP)
        try:
            assert eventually(lambda: not {agent, grandchild} & set(ours()), 10), ours()
        finally:
            process.kill()


@pytest.mark.slow
def test_client_stopped_within_its_lease_loses_nothing(tmp_path):
    """A client stopped for longer than a node may be silent gets what came meanwhile, and loses nothing."""
    script = tmp_path / "stopped.py"
    script.write_text(
        "import operator, skyward_lite as sky\n"
        "with sky.pool(plugins=[]) as pool:\n"
        "    print(pool.submit(operator.neg, 1).result(), flush=True)\n"
        "    input()\n"
        "    print(pool.submit(operator.neg, 2).result(), pool.nodes()[0].state, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "-1\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(13)
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate("\n", timeout=20)
        assert out == "-2 ready\n"


@pytest.mark.slow
def test_workers_of_a_stopped_agent_end_with_the_lease(tmp_path):
    """If the agent is stopped, the workers' own watchdogs end them and grandchildren when the lease is over."""
    process, agent, grandchild = client(tmp_path, 3)
    with process:
        os.kill(agent, signal.SIGSTOP)
        process.send_signal(signal.SIGSTOP)
        try:
            assert eventually(lambda: set(ours()) & {agent, grandchild} == {agent}, 10), ours()
        finally:
            os.kill(agent, signal.SIGKILL)
            process.kill()


def test_ctrl_c_during_parallel_leaves_the_block(tmp_path):
    """SIGINT during a `Parallel` call raises KeyboardInterrupt; the program exits within seconds and leaves nothing."""
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import time, skyward_lite as sky\n"
        "from joblib import Parallel, delayed\n"
        "with sky.pool(worker=sky.Worker(concurrency=2)) as pool:\n"
        "    print(pool.nodes()[0].pid, flush=True)\n"
        "    Parallel(n_jobs=-1)(delayed(time.sleep)(300) for _ in range(10))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        agent = int(process.stdout.readline())
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) != 0
        assert "KeyboardInterrupt" in process.stderr.read()
    assert eventually(lambda: agent not in ours(), 5)
