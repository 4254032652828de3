"""Processes that tasks start: forks, subprocesses, loky, and the trackers of shared memory."""

from __future__ import annotations

import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from processes import eventually, has_ended


def nested_loky():
    return Parallel(n_jobs=2, backend="loky")(delayed(os.getpid)() for _ in range(4))


def test_process_executor_runs_loky_in_a_task():
    """With `executor="process"` a task runs on the main thread of a process that is no daemon, so loky works in it."""

    def where():
        import multiprocessing

        return threading.current_thread() is threading.main_thread(), multiprocessing.current_process().daemon

    with sky.pool(worker=sky.Worker(concurrency=1, executor="process"), plugins=[]) as pool:
        assert pool.submit(where).result(20) == (True, False)
        pids = pool.submit(nested_loky).result(40)
        assert pool.submit(os.getpid).result(20) not in pids


segments = []


def share():
    """Make shared memory that this process's resource tracker removes when the process has ended."""
    segments.append(shared_memory.SharedMemory(create=True, size=1000))
    return segments[-1].name, resource_tracker._resource_tracker._pid, os.getppid()


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["thread", "process"])
@pytest.mark.parametrize("end", ["leave", "crash", "agent", "abort"])
def test_shared_memory_of_tasks_is_unlinked(end, executor):
    """Shared memory of a task is removed however its process ends: the resource tracker does its work and ends."""
    with sky.pool(worker=sky.Worker(concurrency=1, executor=executor)) as pool:
        name, tracker, agent = pool.submit(share).result(20)
        assert Path(f"/dev/shm/{name}").exists()
        if end == "crash":
            with pytest.raises(sky.WorkerCrashedError):
                pool.submit(os._exit, 1).result(20)
        elif end == "agent":
            os.kill(agent, signal.SIGKILL)
        elif end == "abort":
            with pytest.raises((TimeoutError, multiprocessing.TimeoutError)):
                Parallel(n_jobs=2, timeout=0.1)(delayed(time.sleep)(60) for _ in range(2))
        if end != "leave":
            assert eventually(lambda: not Path(f"/dev/shm/{name}").exists(), 20)
    assert eventually(lambda: not Path(f"/dev/shm/{name}").exists(), 20)
    assert eventually(lambda: has_ended(tracker), 20)


def nest():
    results = Parallel(n_jobs=2, backend="loky")(delayed(operator.neg)(i) for i in range(4))
    return results, os.getpid()


def test_nested_loky_leaves_no_processes_or_semaphores(capsys):
    """loky in a task leaves neither processes nor semaphores, and prints no warning about them."""
    # An earlier process with the same number may have left semaphores.
    before = set(Path("/dev/shm").iterdir())

    def semaphores(pid):
        return set(Path("/dev/shm").glob(f"sem.loky-{pid}-*")) - before

    with sky.pool(worker=sky.Worker(concurrency=1, executor="process")) as pool:
        results, pid = pool.submit(nest).result(30)
        assert results == [0, -1, -2, -3]
        assert semaphores(pid)
    assert eventually(lambda: not semaphores(pid), 20)
    assert "resource_tracker" not in capsys.readouterr().err


@pytest.mark.parametrize(("code", "status"), [(0, 0), (3, 3), ("text", 1), (None, 0)])
def test_forked_child_of_a_task_exits_with_its_status(code, status):
    """A child that a task forks exits with its own status, and the task goes on."""

    def fork():
        pid = os.fork()
        if pid == 0:
            sys.exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    with sky.pool(worker=sky.Worker(concurrency=1, executor="process"), plugins=[]) as pool:
        assert pool.submit(fork).result(20) == status


def test_subprocess_whose_main_thread_has_ended_is_killed():
    """A task's subprocess whose first thread has ended looks like a zombie but runs, and is ended all the same."""
    code = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)"
    )

    def start():
        return subprocess.Popen([sys.executable, "-c", code]).pid

    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pid = pool.submit(start).result(20)
        assert eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z", 20)
    assert eventually(lambda: len(list(Path(f"/proc/{pid}/task").glob("*"))) < 2, 20)


def start_session():
    """Start a process that has a session of its own, and a child there."""
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {'import time; time.sleep(600)'!r}])"
    return subprocess.Popen([sys.executable, "-c", script], start_new_session=True).pid, os.getppid()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["leave", "agent", "abort"])
def test_subprocesses_in_their_own_session_are_killed(end):
    """Subprocesses in sessions of their own (`timeout`, `setsid`) are found by their parents and ended."""
    with sky.pool(worker=sky.Worker(concurrency=1)) as pool:
        pid, agent = pool.submit(start_session).result(20)
        children = Path(f"/proc/{pid}/task/{pid}/children")
        assert eventually(lambda: children.read_text().split(), 20)
        child = int(children.read_text())
        if end == "agent":
            os.kill(agent, signal.SIGKILL)
        elif end == "abort":
            with pytest.raises((TimeoutError, multiprocessing.TimeoutError)):
                Parallel(n_jobs=2, timeout=0.1)(delayed(time.sleep)(60) for _ in range(2))
        if end != "leave":
            assert eventually(lambda: has_ended(pid) and has_ended(child), 20)
    assert eventually(lambda: has_ended(pid) and has_ended(child), 20)
