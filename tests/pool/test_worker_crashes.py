"""A worker process that dies or stops: it is named and replaced, and only the task that killed it fails."""

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


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.slow
def test_a_stopped_worker_is_found_and_replaced():
    """SIGSTOP: its watchdog's heartbeat needs no GIL, so silence means that the process does not run."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        with pytest.raises(sky.WorkerCrashedError, match="no sign of life"):
            pool.submit(stop).result(20)
        assert pool.submit(operator.neg, 1).result(20) == -1


def test_the_end_of_standard_error_is_in_the_error():
    """A fatal signal leaves Python's own words there."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        with pytest.raises(sky.WorkerCrashedError, match=r"node local-0: worker process \d+ .*SIGSEGV") as caught:
            pool.submit(die, signal.SIGSEGV).result(20)
        assert "Segmentation fault" in str(caught.value)
        assert "in die" in str(caught.value)


def wait_for(gate):
    while not os.path.exists(gate):
        time.sleep(0.01)
    return "waited"


def append(path):
    with open(path, "a") as file:
        file.write("x")
    os._exit(0)


def test_only_the_culprit_of_a_crash_fails(tmp_path):
    """The others that ran in the same process run again, alone; the culprit runs twice and no more."""
    gate, log = tmp_path / "gate", tmp_path / "log"
    with sky.pool(worker=sky.Worker(concurrency=4), plugins=[]) as pool:
        waiting = [pool.submit(wait_for, str(gate)) for _ in range(3)]
        culprit = pool.submit(append, str(log))
        with pytest.raises(sky.WorkerCrashedError, match=r"exited with status 0 while it ran this task again, alone"):
            culprit.result(20)
        assert not any(future.done() for future in waiting)
        gate.touch()
        assert [future.result(20) for future in waiting] == ["waited"] * 3
    assert log.read_text() == "xx"


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


@pytest.mark.slow
def test_few_processes_are_started_for_those_who_ran_beside_a_crash(tmp_path):
    """Each gets one for itself, a few at a time, also where a worker takes long to start; none is started in vain."""
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
        # One, its spare, those for six suspects at most, and what replaces the culprit's and the spare.
        assert len(starts.read_text()) <= 10


def test_suspects_end_where_no_second_worker_can_start(tmp_path):
    """A setup that works once per node. Whoever gets it, spare or successor, the tasks end and say why."""

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

    with sky.pool(worker=sky.Worker(concurrency=3), plugins=[sky.Plugin("once", around_worker=once)]) as pool:
        for future in [pool.submit(task, i) for i in range(3)]:
            with pytest.raises(
                (sky.WorkerCrashedError, sky.NodeLostError), match=r"no other could be started|workers in a row ended"
            ):
                future.result(40)


def test_a_worker_whose_connection_a_task_closed_says_so():
    """As daemons do, which close all that they do not know."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        with pytest.raises(sky.WorkerCrashedError, match="lost the connection to its agent, did a task close it"):
            pool.submit(os.closerange, 3, 1000).result(20)
        assert pool.submit(operator.neg, 1).result(20) == -1
