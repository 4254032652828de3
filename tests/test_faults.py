"""What happens when something dies. A hang is never an outcome."""

from __future__ import annotations

import operator
import os
import signal
import subprocess
import sys
import time

import pytest
import skyward_lite as sky
from conftest import MARK, eventually, ours
from joblib import Parallel, delayed


def die(how):
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), how)
    time.sleep(60)


@pytest.mark.parametrize("executor", ["thread", "process"])
@pytest.mark.parametrize(
    ("how", "says"), [("exit", "status 3"), (signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")]
)
def test_a_dead_worker_is_named_and_replaced(executor, how, says):
    """The task that was running fails with what happened; the next one runs."""
    with sky.pool(worker=sky.Worker(concurrency=1, executor=executor), plugins=[]) as pool:
        with pytest.raises(sky.WorkerCrashedError, match=says):
            pool.submit(die, how).result(20)
        assert pool.submit(operator.neg, 1).result(20) == -1


def fork_and_die():
    if os.fork() == 0:
        time.sleep(300)  # it holds a copy of its parent's socket
    os._exit(3)


def test_a_dead_worker_is_found_whatever_it_forked():
    """Its end of the socket lives on in a forked child: the exit status tells all the same, and the child is ended."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        with pytest.raises(sky.WorkerCrashedError, match="status 3"):
            pool.submit(fork_and_die).result(20)
        assert pool.submit(operator.neg, 1).result(20) == -1


def test_a_dead_worker_fails_the_parallel_call():
    """joblib gets the error, never None."""
    with sky.pool(worker=sky.Worker(concurrency=2)), pytest.raises(sky.WorkerCrashedError):
        Parallel(n_jobs=-1)(delayed(die)("exit") for _ in range(4))


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
    import ctypes

    # Unlike CDLL, PyDLL does not release the GIL around its calls.
    ctypes.PyDLL(None).sleep(seconds)
    return "held"


def test_a_task_that_holds_the_gil_is_no_lost_node():
    """For longer than a node may be silent: heartbeats need no GIL, neither there nor here."""
    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        future = pool.submit(hold_the_gil, 13)
        hold_the_gil(13)
        assert future.result(20) == "held"
        assert [node.state for node in pool.nodes()] == ["ready"]


CLIENT = """
import sys, time, operator, subprocess, skyward_lite as sky
def spawn():
    # A grandchild in the worker's group.
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", "skyward_lite.grandchild"]).pid
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


def test_a_killed_client_leaves_nothing(tmp_path):
    """kill -9: agent, workers and grandchildren end at once."""
    process, agent, grandchild = client(tmp_path, 60)
    with process:
        process.kill()
        process.wait()
    assert eventually(lambda: not {agent, grandchild} & set(ours()), 5), ours()


def test_a_stopped_clients_lease_ends(tmp_path):
    """SIGSTOP: agent, workers and grandchildren end when the lease does."""
    process, agent, grandchild = client(tmp_path, 3)
    with process:
        process.send_signal(signal.SIGSTOP)
        try:
            assert eventually(lambda: not {agent, grandchild} & set(ours()), 10), ours()
        finally:
            process.kill()


def test_a_client_stopped_within_its_lease_goes_on(tmp_path):
    """SIGSTOP for longer than a node may be silent: the client hears what came meanwhile and loses nothing."""
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


def test_a_stopped_agent_cannot_keep_its_workers(tmp_path):
    """The workers' own watchdogs end them when the lease is over, grandchildren included."""
    process, agent, grandchild = client(tmp_path, 3)
    with process:
        os.kill(agent, signal.SIGSTOP)
        process.send_signal(signal.SIGSTOP)
        try:
            assert eventually(lambda: set(ours()) & {agent, grandchild} == {agent}, 10), ours()
        finally:
            os.kill(agent, signal.SIGKILL)
            process.kill()


def test_ctrl_c_leaves_the_block(tmp_path):
    """SIGINT in the middle of a Parallel call: KeyboardInterrupt, exit within seconds, nothing left."""
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


def test_the_interpreter_that_cannot_start_is_named(monkeypatch, capfd):
    """An agent that ends at once fails the start, with what it printed on standard error."""
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    monkeypatch.setenv(MARK, os.environ[MARK])
    with pytest.raises(sky.NodeStartError, match="local-0 is lost"), sky.pool(plugins=[]):
        pass
    assert "PYTHONHOME" in capfd.readouterr().err
