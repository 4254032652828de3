"""Memory: tasks that run out of it, and objects that an idle worker must not hold."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import skyward_lite as sky
from processes import eventually


def grow():
    return [bytearray(1 << 26) for _ in range(1 << 20)]


def limit_memory():

    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))


@pytest.mark.slow
def test_memory_error_is_the_tasks():
    """A MemoryError is the task's error, and the worker lives."""
    with sky.pool(worker=sky.Worker(concurrency=1, executor="process"), plugins=[]) as pool:
        pid = pool.submit(os.getpid).result(20)
        pool.submit(limit_memory).result(20)
        with pytest.raises(MemoryError):
            pool.submit(grow).result(30)
        assert pool.submit(os.getpid).result(20) == pid


STARVED = """
import os, sys, skyward_lite as sky
open(sys.argv[1], "w").write(str(os.getpid()))
def grow():
    blocks = []
    while True:
        blocks.append(b"x" * (1 << 24))
with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
    print(pool.submit(grow).exception(40))
    print(pool.submit(abs, -1).result(20))
"""


@pytest.fixture
def small_group():
    """A control group with 400 MB, of either version of the kernel's interface."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        if not Path(root, "cgroup.procs").exists():
            continue
        group = Path(root, f"skyward-test-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(400 << 20))
            yield group
            return
        except OSError:
            pass
        finally:
            eventually(lambda group=group: not (group / "cgroup.procs").read_text(), 10)
            group.rmdir()
    pytest.skip("no memory control group can be made here")


def test_out_of_memory_killer_is_named(small_group):
    """The kernel's out-of-memory killer ends the worker, not agent or client; the error names it and the next task
    runs.
    """
    command = [sys.executable, "-c", STARVED, str(small_group / "cgroup.procs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert "node local-0" in done.stdout, done
    assert "out-of-memory killer" in done.stdout
    assert done.stdout.endswith("\n1\n")


kept = []


class Watched:
    pass


def fail_with(watched, gone):
    weakref.finalize(watched, Path(gone).touch)
    raise KeyError(gone)


def test_failed_tasks_arguments_are_freed_by_an_idle_slot(tmp_path):
    """An idle slot holds no argument of the task that failed in it last."""
    gone = tmp_path / "gone"
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        with pytest.raises(KeyError):
            pool.submit(fail_with, Watched(), str(gone)).result(20)
        assert eventually(gone.exists, 20)
