"""Worker processes that die or stop: they are named and replaced, and only the task that killed one fails."""

from __future__ import annotations

import contextlib
import fcntl
import operator
import os
import signal
import time

import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from task_functions import wait_for


def die(how):
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), how)
    time.sleep(60)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["thread", "process"])
@pytest.mark.parametrize(
    ("how", "says"), [("exit", "status 3"), (signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")]
)
def test_dead_worker_is_named_and_replaced(executor, how, says):
    """The task of a worker that died fails with how it died, and the next task runs."""
    with sky.pool(worker=sky.Worker(concurrency=1, executor=executor), plugins=[]) as pool:
        with pytest.raises(sky.WorkerCrashedError, match=says):
            pool.submit(die, how).result(20)
        assert pool.submit(operator.neg, 1).result(20) == -1


def test_crash_error_has_the_end_of_standard_error():
    """The error of a crash has the end of standard error, where Python reports a fatal signal."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        with pytest.raises(sky.WorkerCrashedError, match=r"node local-0: worker process \d+ .*SIGSEGV") as caught:
            pool.submit(die, signal.SIGSEGV).result(20)
        assert "Segmentation fault" in str(caught.value)
        assert "in die" in str(caught.value)


def append(path):
    with open(path, "a") as file:
        file.write("x")
    os._exit(0)


def test_crash_fails_only_the_task_that_caused_it(tmp_path):
    """Tasks that ran beside a crash run again, alone; the one that caused it runs twice and fails."""
    gate, log = tmp_path / "gate", tmp_path / "log"
    with sky.pool(worker=sky.Worker(concurrency=4), plugins=[]) as pool:
        waiting = [pool.submit(wait_for, str(gate)) for _ in range(3)]
        culprit = pool.submit(append, str(log))
        with pytest.raises(sky.WorkerCrashedError, match=r"exited with status 0 while it ran this task again, alone"):
            culprit.result(20)
        assert not any(future.done() for future in waiting)
        gate.touch()
        assert [future.result(20) for future in waiting] == [str(gate)] * 3
    assert log.read_text() == "xx"


def fork_and_die():
    if os.fork() == 0:
        time.sleep(300)  # it holds a copy of its parent's socket
    os._exit(3)


def test_dead_worker_with_a_forked_child_is_found():
    """A dead worker is found by its exit status although a forked child holds its socket, and the child is ended."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        with pytest.raises(sky.WorkerCrashedError, match="status 3"):
            pool.submit(fork_and_die).result(20)
        assert pool.submit(operator.neg, 1).result(20) == -1


def test_crash_fails_the_parallel_call():
    """A `Parallel` call raises a crash's error, and never returns None for the task."""
    with sky.pool(worker=sky.Worker(concurrency=2)), pytest.raises(sky.WorkerCrashedError):
        Parallel(n_jobs=-1)(delayed(die)("exit") for _ in range(4))


@pytest.mark.slow
def test_crash_suspects_are_rerun_in_few_processes(tmp_path):
    """Each task beside a crash gets a process of its own, a few at a time, and no process is started in vain."""
    starts = tmp_path / "starts"

    @contextlib.contextmanager
    def slow_start(info):
        with starts.open("a") as file:
            file.write("x")
        time.sleep(0.7)
        yield

    def task(i):
        while starts.read_text() == "x":  # until the spare has begun
            time.sleep(0.01)
        time.sleep(0.2)
        if i == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(2)
        return i

    plugin = sky.Plugin("slow", around_worker=slow_start)
    with sky.pool(worker=sky.Worker(concurrency=6), plugins=[plugin]) as pool:
        futures = [pool.submit(task, i) for i in range(6)]
        assert [future.result(40) for future in futures[1:]] == [1, 2, 3, 4, 5]
        assert isinstance(futures[0].exception(1), sky.WorkerCrashedError)
        # The first worker, its spare, at most one for each of six suspects, and two in the place of culprit and spare.
        assert len(starts.read_text()) <= 10


def test_crash_suspects_fail_if_no_worker_can_start(tmp_path):
    """If a node's setup works only once, tasks beside a crash fail with the reason, whichever process they get."""

    @contextlib.contextmanager
    def once(info):
        with (tmp_path / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    def task(i):
        (tmp_path / f"began-{i}").touch()
        while len(list(tmp_path.glob("began-*"))) < 3:
            time.sleep(0.01)
        if i == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    worker = sky.Worker(concurrency=3, retries=0)
    with sky.pool(worker=worker, plugins=[sky.Plugin("once", around_worker=once)]) as pool:
        for future in [pool.submit(task, i) for i in range(3)]:
            with pytest.raises(
                (sky.WorkerCrashedError, sky.NodeLostError), match=r"no other could be started|workers in a row ended"
            ):
                future.result(40)


def test_task_that_closes_the_workers_connection():
    """A task that closes all descriptors, as daemons do, fails with an error that says so."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        with pytest.raises(sky.WorkerCrashedError, match="lost the connection to its agent, did a task close it"):
            pool.submit(os.closerange, 3, 1000).result(20)
        assert pool.submit(operator.neg, 1).result(20) == -1
