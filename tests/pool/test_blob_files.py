"""Large data on a node: in files that no task can change, within the limits of the system. Nothing is left of it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from processes import MARK

SIZE = 1 << 20
"""Bytes of an array that is a blob, and of no other file in memory."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at the descriptors of processes")


def memory_files(pid="self"):
    """Return the numbers of a process's descriptors of blobs."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(entry).startswith("/memfd:skyward") and entry.stat().st_size == SIZE:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def attack(array):
    """Try what could change a blob for others. Return the errors, the blob's descriptor, the limit of open files."""
    array[:] = 7
    number = max(memory_files())
    tries = [
        lambda: os.ftruncate(number, 0),
        lambda: os.ftruncate(number, 2 * SIZE),
        lambda: os.pwrite(number, b"x", 0),
        lambda: os.posix_fallocate(number, 0, 2 * SIZE),
        lambda: mmap.mmap(number, SIZE),
        lambda: os.pwrite(os.open(f"/proc/self/fd/{number}", os.O_RDWR), b"x", 0),
    ]
    errors = []
    for one in tries:
        try:
            one()
            errors.append(0)
        except OSError as error:
            errors.append(error.errno)
    return errors, number, resource.getrlimit(resource.RLIMIT_NOFILE)


def total(array):
    return float(array.sum()), os.getpid()


def test_no_task_can_change_what_others_share():
    """A task that writes to its array, or to the file behind it, changes neither the next task's array nor ours.

    The workers' descriptors of blobs leave the small numbers to the tasks, which have the limits that the client has.
    """
    array = np.ones(SIZE // 8)
    with sky.pool(worker=sky.Worker(concurrency=1, executor="process"), plugins=[]) as pool:
        errors, number, (soft, hard) = pool.submit(attack, array).result(30)
        assert errors == [errno.EPERM] * 6
        assert (soft, hard) == resource.getrlimit(resource.RLIMIT_NOFILE)
        assert number >= soft or soft == hard
        assert pool.submit(total, array).result(30)[0] == SIZE // 8 == array.sum()


def close_files(_):
    """Close the descriptors of blobs, as code does that closes all it does not know."""
    for number in memory_files():
        os.close(number)
    return os.getpid()


def test_a_worker_whose_files_were_closed_is_replaced():
    """The next task runs in a new process, and gets its data."""
    array = np.ones(SIZE // 8)
    with sky.pool(worker=sky.Worker(concurrency=1, executor="process"), plugins=[]) as pool:
        closed_in = pool.submit(close_files, array).result(30)
        result, process = pool.submit(total, array).result(30)
        assert (result, process == closed_in) == (SIZE // 8, False)


def test_results_and_forgotten_blobs_leave_no_files():
    """When tasks with data of their own have ended, processes have as many files of it as the cache may keep."""
    with sky.pool(worker=sky.Worker(concurrency=2, executor="process", cache_gb=0.003), plugins=[]) as pool:
        arrays = (np.full(SIZE // 8, float(i)) for i in range(60))
        results = Parallel(n_jobs=-1, batch_size=1)(delayed(np.negative)(array) for array in arrays)
        assert all(result[0] == -i and result.flags.writeable for i, result in enumerate(results))
        workers = {pool.submit(total, np.zeros(1)).result(30)[1] for _ in range(10)}
        agent = pool.nodes()[0].pid
        assert all(len(memory_files(pid)) <= 5 for pid in (agent, *workers))
        assert not memory_files(os.getpid())


def leave_room(size):
    """Let this process map so many bytes more; None for any number."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    limit = resource.RLIM_INFINITY if size is None else used + size
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def test_a_task_whose_data_cannot_be_mapped_ends():
    """A worker without address space for a task's data ends that task with an error that says so, and goes on."""
    with sky.pool(worker=sky.Worker(concurrency=1, executor="process"), plugins=[]) as pool:
        pool.submit(leave_room, 16 << 20).result(30)
        with pytest.raises(sky.WorkerCrashedError, match="local-0: its worker process has no memory to map data"):
            pool.submit(total, np.zeros(4 << 20)).result(30)
        pool.submit(leave_room, None).result(30)
        assert pool.submit(total, np.zeros(4 << 20)).result(30)[0] == 0


class Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]


class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction))]


def refuse_memory_files():
    """Have the kernel refuse `memfd_create` to this process and to all that it starts, as some sandboxes do."""
    number = {"x86_64": 319, "aarch64": 279}[os.uname().machine]
    filters = (Instruction * 4)(
        (0x20, 0, 0, 0),  # load the call's number
        (0x15, 0, 1, number),  # skip the next instruction if it is another one
        (0x06, 0, 0, 0x00050000 | errno.ENOSYS),
        (0x06, 0, 0, 0x7FFF0000),
    )
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(Program(4, filters)), 0, 0) == 0, ctypes.get_errno()


CLIENT = """
import sys
import numpy as np, skyward_lite as sky
from joblib import Parallel, delayed

def write(array, i):
    before = float(array.sum())
    array[:] = i
    return before, array

def main():
    size = int(sys.argv[1])
    small, large = np.ones(size // 8), np.ones(1 << 20)
    with sky.pool(worker=sky.Worker(concurrency=2, executor="process"), plugins=[]) as pool:
        results = Parallel(n_jobs=-1, batch_size=1)(delayed(write)(small, i) for i in range(8))
        assert all(before == size // 8 and (array == i).all() for i, (before, array) in enumerate(results))
        print(repr(pool.submit(write, large, 2).exception(30)))
        assert pool.submit(write, small, 9).result(30)[0] == size // 8

if __name__ == "__main__":
    main()
"""


def run_without_memory_files(tmp_path, *before):
    """Run `CLIENT` with a directory for temporary files of its own, behind the command `before`."""
    script, temporary = tmp_path / "client.py", tmp_path / "temporary"
    script.write_text(CLIENT)
    temporary.mkdir()
    return subprocess.run(
        [*before, sys.executable, str(script), str(SIZE)],
        env={**os.environ, "TMPDIR": str(temporary), MARK: "1"},
        preexec_fn=refuse_memory_files,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_systems_without_memory_files_use_a_disk(tmp_path):
    """Where the system refuses files in memory, tasks share data by files of a directory, which leave no name there."""
    done = run_without_memory_files(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")
    assert not list((tmp_path / "temporary").glob("skyward-*"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount")
def test_data_for_which_there_is_no_room_ends_its_task(tmp_path):
    """Without room in memory or on a disk a task ends with an error that names node, size and remedy; others go on."""
    small = 'for d in "$TMPDIR" /var/tmp; do mount -t tmpfs -o size=6m none "$d" || exit; done; exec "$@"'
    done = run_without_memory_files(tmp_path, "unshare", "-m", "sh", "-c", small, "sh")
    assert done.returncode == 0, done.stderr
    for words in ("WorkerCrashedError", "node local-0: no room for 8.4 MB of data", "free memory there"):
        assert words in done.stdout, done.stdout
