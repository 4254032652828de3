"""Workers of a pool that is left in order end as interpreters do, in bounded time."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import skyward_lite as sky
from lab import Lab
from processes import eventually, has_ended

MODULE = """
import atexit, os, tempfile, threading, weakref

lock = threading.Lock()
directory = None

def note(what):
    with open(f"{directory}/{what}-{os.getpid()}", "x") as file:
        file.write(what)

class Sample:
    def __init__(self, path):
        self.path = path
        self.itself = self

    def __del__(self, symlink=os.symlink):
        # Few other globals are left at this moment.
        symlink("deleted", self.path)

def begin(where):
    "Open, register and keep what an interpreter sees to when it ends, once for each process."
    global directory, file, temporary, sample, finalized
    with lock:
        if directory is None:
            directory = where
            file = open(f"{where}/file-{os.getpid()}", "w")
            file.write("x" * 100)
            temporary = tempfile.TemporaryDirectory(dir=where, prefix="temporary")
            sample = Sample(f"{where}/deleted-{os.getpid()}")
            finalized = lambda: None
            weakref.finalize(finalized, note, "finalized")
            atexit.register(note, "atexit")
    return os.getpid(), os.path.isdir(temporary.name)
"""

EXECUTORS = pytest.mark.parametrize("executor", ["thread", "process"])


@pytest.fixture
def where(tmp_path, monkeypatch):
    """Return an empty directory, beside a module that workers can import and whose objects are cleaned up at exit."""
    (tmp_path / "keeper.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    directory = tmp_path / "where"
    directory.mkdir()
    return directory


def begin(pool, where, workers):
    """Create objects to clean up in `workers` worker processes. Return the processes' ids."""
    pids: set[int] = set()

    def keep(where):
        # The worker imports the module; it is not sent.
        import keeper

        return keeper.begin(where)

    def all_have_begun():
        for pid, temporary in pool.map(keep, [str(where)] * 4 * workers):
            assert temporary
            pids.add(pid)
        return len(pids) == workers

    assert eventually(all_have_begun, 20)
    return pids


def assert_ended_in_order(where, pids):
    """Check that each process deleted its files and ran its callbacks."""
    for pid in pids:
        assert (where / f"file-{pid}").read_text() == "x" * 100
        for what in ("atexit", "finalized"):
            assert (where / f"{what}-{pid}").read_text() == what
        assert (where / f"deleted-{pid}").is_symlink()
    assert not list(where.glob("temporary*"))


@EXECUTORS
def test_workers_exit_as_interpreters_do(where, executor):
    """Workers write open files, run exit callbacks and finalizers and remove temporary directories, on every node."""
    with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=2, executor=executor), plugins=[]) as pool:
        pids = begin(pool, where, 2 if executor == "thread" else 4)
    assert_ended_in_order(where, pids)


@EXECUTORS
def test_workers_on_an_ssh_host_exit_as_interpreters_do(where, tmp_path, executor):
    """The connection to an SSH host stays until its workers have exited in order."""
    lab = Lab(tmp_path)
    image = sky.Image(env={"PYTHONPATH": f"{Path(sky.__file__).parent.parent}:{tmp_path}"})
    try:
        lab.host(name="far").make_environment(image)
        worker = sky.Worker(concurrency=2, executor=executor)
        with sky.pool(sky.SSH("far", config=lab.config), worker=worker, image=image, plugins=[]) as pool:
            pids = begin(pool, where, 1 if executor == "thread" else 2)
    finally:
        lab.close()
    assert_ended_in_order(where, pids)


@EXECUTORS
def test_output_at_exit_arrives(capfd, executor):
    """Output of `atexit` callbacks, and what is in the buffer of a closed stream, reaches the client."""

    def register():
        atexit.register(print, "printed at exit")
        atexit.register(os.write, 2, b"written at exit")

    with sky.pool(worker=sky.Worker(concurrency=1, executor=executor), plugins=[]) as pool:
        pool.submit(register).result(20)
    out, err = capfd.readouterr()
    assert out == "[local-0] printed at exit\n"
    assert err == "[local-0] written at exit\n"


@EXECUTORS
@pytest.mark.parametrize("slots", [1, 2])
def test_exit_waits_for_threads_of_tasks(tmp_path, executor, slots):
    """Workers wait at exit for threads of tasks that are no daemons, whichever slot their task ran in."""
    gate = tmp_path / "gate"

    def leave_a_thread_behind(number):
        def work():
            while not gate.exists():
                time.sleep(0.01)
            (tmp_path / f"done-{number}").touch()

        threading.Thread(target=work).start()

    def open_the_gate():
        # While the block is being left.
        assert eventually(lambda: "closed" in repr(pool), 20)
        gate.touch()

    with sky.pool(worker=sky.Worker(concurrency=slots, executor=executor), plugins=[]) as pool:
        list(pool.map(leave_a_thread_behind, range(8)))
        threading.Thread(target=open_the_gate).start()
    assert len(list(tmp_path.glob("done-*"))) == 8


@pytest.mark.slow
@EXECUTORS
def test_worker_that_does_not_exit_is_killed(tmp_path, executor):
    """An exit callback that hangs, or a thread that does not end, delays leaving for a bounded time."""

    def hang():
        atexit.register(time.sleep, 300)
        threading.Thread(target=time.sleep, args=(300,)).start()
        return os.getpid()

    with sky.pool(worker=sky.Worker(concurrency=2, executor=executor), plugins=[]) as pool:
        pid = pool.submit(hang).result(20)
    assert has_ended(pid)


@EXECUTORS
def test_busy_worker_is_killed_when_an_exception_leaves_the_block(tmp_path, executor):
    """An exception that leaves the block cancels running tasks, and their workers are killed."""

    def run_on():
        atexit.register((tmp_path / "atexit").touch)
        (tmp_path / "running").touch()
        time.sleep(300)

    def register():
        atexit.register((tmp_path / "atexit").touch)
        return os.getpid()

    with (
        pytest.raises(KeyboardInterrupt),
        sky.pool(worker=sky.Worker(concurrency=1, executor=executor), plugins=[]) as pool,
    ):
        pid = pool.submit(register).result(20)
        pool.submit(run_on)
        assert eventually((tmp_path / "running").exists, 20)
        raise KeyboardInterrupt
    assert has_ended(pid)
    assert not (tmp_path / "atexit").exists()


def test_idle_workers_exit_in_order_when_an_exception_leaves_the_block(where):
    """Workers without tasks exit in order when an exception leaves the block, so files of earlier tasks are written."""
    with pytest.raises(ZeroDivisionError), sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        pids = begin(pool, where, 1)
        raise ZeroDivisionError
    assert_ended_in_order(where, pids)


def start_in_its_own_session(path):
    script = f"open({path!r}, 'w').close(); import time; time.sleep(300)"
    return subprocess.Popen([sys.executable, "-c", script], start_new_session=True).pid


@EXECUTORS
def test_processes_of_tasks_end_with_their_worker(tmp_path, executor):
    """Processes that tasks started end with their worker, also in a session of their own."""
    with sky.pool(worker=sky.Worker(concurrency=1, executor=executor), plugins=[]) as pool:
        pid = pool.submit(start_in_its_own_session, str(tmp_path / "started")).result(20)
        assert eventually((tmp_path / "started").exists, 20)
    assert eventually(lambda: has_ended(pid), 5)
