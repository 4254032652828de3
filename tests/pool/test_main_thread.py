"""The main thread of a worker: it runs the tasks if there is one slot, and no task if there are several."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import skyward_lite as sky
from processes import eventually


def on_main_thread():
    return threading.current_thread() is threading.main_thread()


def all_slots(_):
    """Hold a slot until each of three has a task."""
    time.__dict__.setdefault("_skyward_slots", threading.Barrier(3)).wait(20)
    return on_main_thread(), threading.current_thread().name


def set_alarm():
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def get_loop():
    return asyncio.get_event_loop()


def test_main_thread_runs_no_task_of_several_slots():
    """With several slots all are alike: no task runs on the main thread."""
    with sky.pool(worker=sky.Worker(concurrency=3), plugins=[]) as pool:
        got = [future.result(20) for future in [pool.submit(all_slots, i) for i in range(3)]]
    assert sorted(got) == [(False, f"skyward-{slot}") for slot in range(3)]


@pytest.mark.parametrize("worker", [sky.Worker(concurrency=2, executor="process"), sky.Worker(concurrency=1)])
def test_main_thread_runs_tasks_of_a_single_slot(worker):
    """A worker of one slot runs tasks on its main thread, where signal handlers can be set."""
    with sky.pool(worker=worker, plugins=[]) as pool:
        assert pool.submit(on_main_thread).result(20)
        assert pool.submit(set_alarm).result(20) is None


@pytest.mark.parametrize(("task", "kind"), [(set_alarm, ValueError), (get_loop, RuntimeError)])
def test_main_thread_errors_have_a_note(task, kind):
    """An exception of code that needs the main thread has a note with the remedy, also in the node's traceback."""
    with sky.pool(worker=sky.Worker(concurrency=3), plugins=[]) as pool:
        for future in [pool.submit(task) for _ in range(6)]:
            with pytest.raises(kind) as caught:
                future.result(20)
            assert any('executor="process"' in note for note in caught.value.__notes__)
            assert 'executor="process"' in str(caught.value.__cause__)


def test_main_thread_note_is_not_on_other_exceptions():
    """Other exceptions of the same types get no note."""

    def fail():
        raise ValueError("no main course")

    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        error = pool.submit(fail).exception(20)
        assert isinstance(error, ValueError)
        assert error.__notes__ == ["node local-0: fail()"]


def test_main_thread_runs_signal_handlers_during_tasks(tmp_path):
    """Signal handlers that a plugin set on the main thread run during tasks, and one that raises has no effect
    on them.
    """
    heard = tmp_path / "heard"

    @contextlib.contextmanager
    def around(info):
        def note(number, frame):
            with heard.open("a") as file:
                file.write(f"{number} {threading.current_thread() is threading.main_thread()}\n")
            raise LookupError

        signal.signal(signal.SIGUSR1, note)
        yield

    def interrupt(count):
        os.kill(os.getpid(), signal.SIGUSR1)
        while not heard.exists() or len(heard.read_text().splitlines()) < count:
            time.sleep(0.01)
        return os.getpid()

    plugin = sky.Plugin("signals", around_worker=around)
    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[plugin]) as pool:
        pids = [pool.submit(interrupt, count).result(20) for count in (1, 2, 3)]
    assert len(set(pids)) == 1
    assert heard.read_text() == f"{int(signal.SIGUSR1)} True\n" * 3


def test_main_thread_leaves_worker_hooks(tmp_path):
    """The main thread leaves the plugins' worker contexts when the pool closes, though a task's thread is still
    busy.
    """
    log = tmp_path / "log"

    @contextlib.contextmanager
    def around(info):
        with log.open("a") as file:
            file.write(f"entered {on_main_thread()}\n")
        yield
        with log.open("a") as file:
            file.write(f"left {on_main_thread()}\n")

    def begin():
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return os.getpid()

    with sky.pool(worker=sky.Worker(concurrency=3), plugins=[sky.Plugin("noting", around_worker=around)]) as pool:
        pid = pool.submit(begin).result(20)
    assert eventually(lambda: "left" in log.read_text(), 10)
    assert log.read_text() == "entered True\nleft True\n"
    assert eventually(lambda: not Path(f"/proc/{pid}").exists(), 10)
