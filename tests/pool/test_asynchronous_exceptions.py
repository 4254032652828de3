"""Exceptions that are raised in a worker's thread from outside, during tasks and between them."""

from __future__ import annotations

import ctypes
import operator
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import skyward_lite as sky
from processes import eventually


def raise_when_idle(how, over, done):
    """Raise an exception in this task's thread after the task, while the thread waits for the next one."""
    thread = threading.get_ident()

    def raise_there():
        while not os.path.exists(over) or sys._current_frames()[thread].f_code.co_name != "_take":
            time.sleep(0.01)
        if how == "alarm":
            os.kill(os.getpid(), signal.SIGALRM)
        else:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(StopAsyncIteration))
        Path(done).touch()

    def alarm(number, frame):
        raise StopAsyncIteration

    if how == "alarm":
        signal.signal(signal.SIGALRM, alarm)
    threading.Thread(target=raise_there, daemon=True).start()
    return os.getpid()


@pytest.mark.parametrize(("executor", "how"), [("thread", "set"), ("process", "set"), ("process", "alarm")])
def test_asynchronous_exception_between_tasks_is_dropped(tmp_path, executor, how):
    """An exception that a finished task raises later in the worker's thread is dropped; the next task runs in the same
    process.
    """
    with sky.pool(worker=sky.Worker(concurrency=1, executor=executor), plugins=[]) as pool:
        for i in range(3):
            over, done = tmp_path / f"{i}-over", tmp_path / f"{i}-done"
            pid = pool.submit(raise_when_idle, how, str(over), str(done)).result(20)
            over.touch()
            assert eventually(done.exists, 20)
            assert pool.submit(os.getpid).result(20) == pid
            assert list(pool.map(operator.neg, range(3))) == [0, -1, -2]


def hammer(seconds, go):
    """Raise exceptions in this task's thread again and again, from a moment after the task on."""
    thread = threading.get_ident()

    def raise_there():
        while not os.path.exists(go):
            time.sleep(0.01)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(StopAsyncIteration))
            time.sleep(0.001)

    threading.Thread(target=raise_there, daemon=True).start()


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_asynchronous_exceptions_lose_no_task(tmp_path, executor):
    """Under a stream of asynchronous exceptions every task ends with its own value or the exception raised while it
    ran.
    """
    go = tmp_path / "go"
    with sky.pool(worker=sky.Worker(concurrency=1, executor=executor), plugins=[]) as pool:
        pool.submit(hammer, 1, str(go)).result(20)
        go.touch()
        good = 0
        for i in range(5_000):
            try:
                good += pool.submit(operator.neg, i).result(20) == -i
            except (StopAsyncIteration, sky.RemoteError, sky.WorkerCrashedError):
                continue
        assert good > 2_500
