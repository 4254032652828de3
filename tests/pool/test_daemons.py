"""Daemons that tasks start: they live as long as their worker, and not longer, whatever ends it."""

from __future__ import annotations

import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from lab import Lab
from processes import children, eventually, has_ended, parent

ROUNDS = int(os.environ.get("SKYWARD_TEST_ROUNDS", "1"))
"""Rounds of tasks with daemons, aborted calls and killed workers, of 40 tasks each."""

DAEMON = """
import os, signal, sys
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child:
    print(os.getpid(), child, flush=True)
os.closerange(0, 256)
os.chdir("/")
os.execve(sys.executable, ["daemon", "-I", "-S", "-c", "import time; time.sleep(600)"], {})
"""
"""A program that becomes a daemon, keeps nothing of where it came from, and has a child that ignores SIGTERM."""

BOMB = """
import os, sys
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.closerange(0, log)
while True:
    os.write(log, b"x")
    if os.fork():
        os._exit(0)
    os.setsid()
"""
"""A program that becomes a daemon, which goes on forever by leaving a new one behind and ending. Each writes a byte."""

MIXED = """
import os, signal
for number in range(300):
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            if number % 3 == 0:
                os.write(1, b"%d\\n" % os.getpid())
                os.closerange(0, 256)
                signal.pause()
        os._exit(0)
    os.wait()
"""
"""A program that starts three hundred daemons, of which two thirds end at once."""


def run(program, *arguments):
    """Run a program that leaves daemons behind. Return what it printed."""
    command = [sys.executable, "-S", "-c", program, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def start(directory=None, number=0):
    """Start a daemon, once another task has begun in another worker. Return this worker, its agent and its daemons."""
    if directory is not None:
        Path(directory, f"begun-{number}").touch()
        assert eventually(lambda: len(list(Path(directory).glob("begun-*"))) == 2, 20)
    daemons = [int(pid) for pid in run(DAEMON).split()]
    assert len(daemons) == 2
    assert not any(map(has_ended, daemons))
    return os.getpid(), os.getppid(), daemons


def all_have_ended(pids):
    return all(map(has_ended, pids))


def abort_all():
    """Abort a call that keeps two slots busy."""
    with pytest.raises((TimeoutError, multiprocessing.TimeoutError)):
        Parallel(n_jobs=2, timeout=0.1)(delayed(time.sleep)(60) for _ in range(2))


def keep_status():
    """Start a child that ends long before it is waited for, while daemons come and go."""
    child = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(7)"])
    many = [int(pid) for pid in run(MIXED).split()]
    assert len(many) == 100
    pid, _, daemons = start()
    time.sleep(0.6)
    status = child.wait()
    try:
        os.wait()
    except ChildProcessError:
        return status, pid, daemons + many
    raise AssertionError("a daemon is a child of the worker")


def test_daemons_end_with_their_own_worker(tmp_path):
    """A daemon outlives its task and is there for the next one; it ends with its worker, and no other worker's does."""
    with sky.pool(worker=sky.Worker(concurrency=2, executor="process")) as pool:
        (first, agent, of_first), (second, _, of_second) = pool.map(start, [str(tmp_path)] * 2, range(2))
        assert first != second
        assert eventually(lambda: {parent(of_first[0]), parent(of_second[0])} == {agent}, 20)
        status, third, of_third = pool.submit(keep_status).result(20)
        assert status == 7
        assert not any(map(has_ended, of_first + of_second + of_third))
        os.kill(first, signal.SIGKILL)
        assert eventually(lambda: all_have_ended(of_first + (of_third if third == first else [])), 20)
        assert not any(map(has_ended, of_second))
        abort_all()
        assert eventually(lambda: all_have_ended(of_second + of_third), 20)
        # Nothing that was adopted is left, ended or not.
        assert eventually(lambda: "Z" not in children(agent).values(), 20), children(agent)
        assert not set(children(agent)) & {*of_first, *of_second, *of_third}
        last, _, of_last = pool.submit(start).result(20)
    assert all_have_ended([last, *of_last])


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_daemons_end_with_their_agent(signal_number):
    """Daemons end when the agent is killed, also where their worker is stopped at that moment."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        worker, agent, daemons = pool.submit(start).result(20)
        os.kill(worker, signal.SIGSTOP)
        os.kill(agent, signal_number)
        assert eventually(lambda: all_have_ended([worker, *daemons]), 20)


@pytest.mark.slow
def test_daemons_of_a_worker_that_died_with_its_agent_end(tmp_path):
    """Another worker of a killed agent ends the daemons of a worker that was killed at the same moment."""
    with sky.pool(worker=sky.Worker(concurrency=2, executor="process"), plugins=[]) as pool:
        (first, agent, of_first), (second, _, of_second) = pool.map(start, [str(tmp_path)] * 2, range(2))
        os.kill(agent, signal.SIGSTOP)
        os.kill(first, signal.SIGKILL)
        os.kill(agent, signal.SIGKILL)
        assert eventually(lambda: all_have_ended([*of_first, *of_second, second]), 20)


def open_another_pool():
    """Start a daemon in a worker of a pool that this worker opens, and has open for as long as it lives."""
    inner = sky.pool(worker=sky.Worker(concurrency=1), plugins=[])
    pools.append(inner)
    worker, agent, daemons = inner.__enter__().submit(start).result(20)
    return [agent, worker, *daemons]


pools: list[sky.ComputePool] = []


@pytest.mark.slow
@pytest.mark.parametrize("killed", [[1], [2, 1, 0]])
def test_daemons_of_a_pool_within_a_task_end(killed):
    """Daemons of a pool that a task has opened end with the task's worker, or with any process of the inner pool."""
    with sky.pool(worker=sky.Worker(concurrency=1, executor="process"), plugins=[]) as pool:
        worker = pool.submit(os.getpid).result(20)
        inner = pool.submit(open_another_pool).result(20)
        for number in killed:
            os.kill([worker, *inner][number], signal.SIGKILL)
        assert eventually(lambda: all_have_ended(inner if 0 in killed else inner[1:]), 20)


@pytest.mark.slow
def test_daemons_that_go_on_starting_others_end(tmp_path):
    """A chain of daemons, each of which starts the next one and ends, ends with its worker."""
    log = tmp_path / "log"

    def grows():
        size = log.stat().st_size
        time.sleep(0.3)
        return log.stat().st_size > size

    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pid = pool.submit(os.getpid).result(20)
        pool.submit(run, BOMB, str(log)).result(20)
        assert grows()
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not grows(), 20)
        pool.submit(run, BOMB, str(log)).result(20)
        assert grows()
    assert not grows()


def leave_daemons(_):
    """Leave a daemon behind that lives, and one that ends at once."""
    subprocess.run(["sh", "-c", "setsid sleep 600 & setsid true &"], check=True)


@pytest.mark.slow
def test_agent_has_no_more_of_anything_after_many_daemons_and_deaths():
    """Tasks with daemons, aborted tasks and killed workers leave an agent no descriptors, threads and processes."""

    def held():
        return [len(list(Path(f"/proc/{agent}/{what}").iterdir())) for what in ("fd", "task")]

    with sky.pool(worker=sky.Worker(concurrency=2, executor="process")) as pool:
        agent = pool.nodes()[0].pid
        # With the spare worker, which comes a while after the others.
        assert eventually(lambda: len(children(agent)) == 3, 20)
        before = held()
        for _ in range(ROUNDS):
            list(pool.map(leave_daemons, range(30)))
            for pid in set(pool.map(lambda _: os.getpid(), range(8))):
                os.kill(pid, signal.SIGKILL)
            list(pool.map(leave_daemons, range(10)))
            abort_all()
            assert eventually(lambda: len(children(agent)) == 3, 20), children(agent)
        # A message that is under way has a descriptor.
        assert eventually(lambda: all(map(operator.le, held(), before)), 20), (before, held())


@pytest.mark.slow
def test_daemons_on_an_ssh_host_end(tmp_path):
    """Daemons on an SSH host end when their worker is killed, when the block is left, and when the agent is killed."""
    lab = Lab(tmp_path)
    image = sky.Image(env={"PYTHONPATH": f"{Path(sky.__file__).parent.parent}:{Path(__file__).parent}"})
    try:
        lab.host(name="far").make_environment(image)
        for end in ("agent", "leave"):
            worker = sky.Worker(concurrency=1)
            with sky.pool(sky.SSH("far", config=lab.config), worker=worker, image=image, plugins=[]) as pool:
                worker, agent, daemons = pool.submit(start).result(20)
                os.kill(worker, signal.SIGKILL)
                assert eventually(lambda: all_have_ended(daemons), 20)
                _, agent, daemons = pool.submit(start).result(20)
                if end == "agent":
                    os.kill(agent, signal.SIGKILL)
                    assert eventually(lambda: all_have_ended(daemons), 20)
                    # The host comes back.
                    assert pool.submit(os.getppid).result(20) != agent
            assert eventually(lambda: all_have_ended([agent, *daemons]), 20)
    finally:
        lab.close()
