"""Tasks that are cancelled, aborted, or exceed `Worker(task_timeout=)`."""

from __future__ import annotations

import multiprocessing
import operator
import os
import signal
import threading
import time

import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from processes import eventually, ours
from skyward_lite.client.tasks import Tasks
from task_functions import hold_the_gil, wait_for


def mark_and_sleep(path):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(300)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_abort_kills_running_tasks_of_a_parallel_call(tmp_path, executor):
    """After an error in one task of a `Parallel` call, the other tasks' processes are gone within 5 s, and the pool
    goes on.
    """
    log = tmp_path / "log"

    def fail():
        while not log.exists():
            time.sleep(0.01)
        raise LookupError

    with sky.pool(worker=sky.Worker(concurrency=2, executor=executor)) as pool:
        calls = [delayed(mark_and_sleep)(str(log)), delayed(fail)(), *[delayed(mark_and_sleep)(str(log))] * 5]
        with pytest.raises(LookupError):
            Parallel(n_jobs=-1, batch_size=1, pre_dispatch="all")(calls)
        pids = [int(line) for line in log.read_text().split()]
        assert eventually(lambda: not set(pids) & set(ours()), 5), (pids, ours())
        assert Parallel(n_jobs=-1)(delayed(operator.neg)(i) for i in range(20)) == [-i for i in range(20)]
        assert eventually(lambda: Tasks.of(pool).core.counts()[0] == 0, 5)
        # The tasks that waited never started.
        assert len(log.read_text().split()) <= 2


@pytest.mark.slow
def test_abort_reruns_other_tasks_of_the_killed_process(tmp_path):
    """Other tasks in the process that is replaced for an aborted one end in time, or run again."""
    gate = tmp_path / "gate"
    with sky.pool(worker=sky.Worker(concurrency=3)) as pool:
        before = pool.submit(os.getpid).result(20)
        long = pool.submit(wait_for, str(gate))
        with pytest.raises((TimeoutError, multiprocessing.TimeoutError)):
            Parallel(n_jobs=2, timeout=0.1)(delayed(time.sleep)(300) for _ in range(2))
        # All slots are taken until the process is replaced.
        assert pool.submit(os.getpid).result(20) != before
        assert not long.done()
        gate.touch()
        assert long.result(20) == str(gate)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_task_timeout_is_enforced(executor):
    """A task that exceeds `task_timeout` fails, whatever it does, and other tasks do not."""
    worker = sky.Worker(concurrency=2, executor=executor, task_timeout=1.0)
    with sky.pool(worker=worker, plugins=[]) as pool:
        late = pool.submit(hold_the_gil, 300)
        with pytest.raises(sky.TaskTimeoutError, match=r"node local-0: .*task_timeout=1"):
            late.result(20)
        assert pool.submit(operator.neg, 1).result(20) == -1


@pytest.mark.slow
def test_task_timeout_applies_to_each_call_of_a_batch():
    """Ten calls of a batch may together take longer than `task_timeout`."""
    with sky.pool(worker=sky.Worker(concurrency=1, task_timeout=1.0)):
        assert Parallel(n_jobs=2, batch_size=10)(delayed(time.sleep)(0.25) for _ in range(10)) == [None] * 10


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_task_timeout_includes_cleanup_after_a_task(executor):
    """A worker that clears up behind a task for too long is replaced, and the tasks that wait behind it run in another
    one.
    """

    # A local class, which arrives at once: the import of this file would count against the limit.
    class Stays:
        """Arrives as a number, and its destructor never returns in the worker."""

        def __reduce__(self):
            return int, ()

        def __del__(self):
            threading.Event().wait()

    with sky.pool(worker=sky.Worker(concurrency=1, executor=executor, task_timeout=1.0), plugins=[]) as pool:
        assert pool.submit(Stays).result(20) == 0
        assert pool.submit(operator.neg, 1).result(20) == -1


def test_cancel_of_a_task_that_waits_on_its_node(tmp_path):
    """`Future.cancel()` is true wherever the task waits, and false once it runs."""
    gate, log = tmp_path / "gate", tmp_path / "log"

    def start_and_wait():
        log.touch()
        return wait_for(str(gate))

    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        running = pool.submit(start_and_wait)
        assert eventually(log.exists, 20)
        queued = [pool.submit(wait_for, "/") for _ in range(10)]
        assert all(future.cancel() for future in queued)
        assert all(future.cancelled() for future in queued)
        assert not running.cancel()
        assert not running.cancelled()
        gate.touch()
        assert running.result(20) == str(gate)
        assert not running.cancel()


@pytest.mark.slow
def test_abort_that_crosses_a_recall(tmp_path):
    """If an aborted task has just been given back by its node, no process is killed for it there."""

    def quick(i):
        time.sleep(0.25)

    def slow(i):
        (tmp_path / f"{i}-{time.monotonic()}").touch()
        time.sleep(5)

    with sky.pool(nodes=2, worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        first, _ = sky.compute(os.getpid)() @ pool
        os.kill(first, signal.SIGSTOP)
        futures = [pool.submit(quick, i) for i in range(8)]
        # The other node ends its own tasks, and recalls the tasks that the first node has not started.
        assert eventually(lambda: sum(future.done() for future in futures) >= 4, 10)
        time.sleep(0.5)
        for future in futures:
            Tasks.of(pool).completions.futures.abort(future.task)
        os.kill(first, signal.SIGCONT)
        for future in [pool.submit(slow, i) for i in range(4)]:
            future.result(30)
    assert len(list(tmp_path.iterdir())) == 4
