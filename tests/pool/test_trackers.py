"""Resource trackers: only real ones are waited for, in bounded time; other processes end with their task's worker."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from processes import eventually, has_ended

SLEEP = "import time; time.sleep(600)"


def start(folder):
    """Start programs that mention resource trackers, and real trackers that never end: each holds its own pipe open."""
    script = Path(folder, "resource_tracker.py")
    script.write_text(SLEEP)
    code = f"{SLEEP} # from multiprocessing.resource_tracker import main;main(5)"
    read, write = os.pipe()
    tracker = [sys.executable, "-c", f"from multiprocessing.resource_tracker import main;main({read})"]
    return [
        subprocess.Popen(command, pass_fds=pass_fds, start_new_session=apart).pid
        for command, pass_fds in (
            ([sys.executable, str(script)], ()),
            ([sys.executable, "-c", SLEEP, "resource_tracker"], ()),
            ([sys.executable, "-c", code], ()),
            (tracker, (read, write)),
        )
        for apart in (False, True)
    ], os.getppid()


def interrupt(how, agent):
    """Kill the agent, or have a call of joblib's aborted; or do nothing, where the block is left."""
    if how == "agent":
        os.kill(agent, signal.SIGKILL)
    elif how == "abort":
        with pytest.raises((TimeoutError, multiprocessing.TimeoutError)):
            Parallel(n_jobs=2, timeout=0.1)(delayed(time.sleep)(60) for _ in range(2))


@pytest.mark.slow
@pytest.mark.parametrize(("end", "executor"), [("leave", "thread"), ("agent", "process"), ("abort", "process")])
def test_process_named_like_a_tracker_is_killed(tmp_path, end, executor):
    """Programs that mention resource trackers, and trackers that do not end, are killed with their task's worker."""
    with sky.pool(worker=sky.Worker(concurrency=1, executor=executor)) as pool:
        pids, agent = pool.submit(start, str(tmp_path)).result(20)
        interrupt(end, agent)
        if end != "leave":
            assert eventually(lambda: all(map(has_ended, pids)), 20)
    assert eventually(lambda: all(map(has_ended, pids)), 20)


@pytest.mark.slow
def test_process_named_like_a_tracker_is_killed_with_its_client(tmp_path):
    """A killed client leaves no program behind that mentions resource trackers."""
    script = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(processes.__file__).parent)]!r}\n"
        "import os, time, skyward_lite as sky, test_trackers\n"
        "with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:\n"
        f"    pids, _ = pool.submit(test_trackers.start, {str(tmp_path)!r}).result(20)\n"
        "    print(*pids, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as client:
        pids = [int(pid) for pid in client.stdout.readline().split()]
        client.kill()
    assert len(pids) == 8
    assert eventually(lambda: all(map(has_ended, pids)), 20)


def share_elsewhere():
    """Start a process in a session of its own that has shared memory, and return the memory's name."""
    code = (
        "import time\n"
        "from multiprocessing import resource_tracker, shared_memory\n"
        "memory = shared_memory.SharedMemory(create=True, size=1000)\n"
        "print(memory.name, resource_tracker._resource_tracker._pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, text=True)
    name, tracker = other.stdout.readline().split()
    return name, [other.pid, int(tracker)], os.getppid()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["leave", "agent", "abort"])
def test_tracker_in_another_session_unlinks_shared_memory(end):
    """Shared memory of a process in a session of its own is removed, and its tracker ends."""
    with sky.pool(worker=sky.Worker(concurrency=1)) as pool:
        name, pids, agent = pool.submit(share_elsewhere).result(20)
        assert Path(f"/dev/shm/{name}").exists()
        interrupt(end, agent)
        if end != "leave":
            assert eventually(lambda: not Path(f"/dev/shm/{name}").exists() and all(map(has_ended, pids)), 20)
    assert eventually(lambda: not Path(f"/dev/shm/{name}").exists() and all(map(has_ended, pids)), 20)
