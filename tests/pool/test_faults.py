"""What happens when something dies. A hang is never an outcome."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import multiprocessing
import operator
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from processes import MARK, eventually, has_ended, ours


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


def grow():
    return [bytearray(1 << 26) for _ in range(1 << 20)]


def limit_memory():
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))


def test_out_of_memory_is_the_tasks_error():
    """MemoryError arrives as such and the worker lives."""
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
    kept = []
    while True:
        kept.append(b"x" * (1 << 24))
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


def test_the_out_of_memory_killer_is_named(small_group):
    """It takes the worker, not the agent or the client, and the next task runs."""
    command = [sys.executable, "-c", STARVED, str(small_group / "cgroup.procs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert "node local-0" in done.stdout, done
    assert "out-of-memory killer" in done.stdout
    assert done.stdout.endswith("\n1\n")


def mark_and_sleep(path):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(300)


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_running_tasks_of_an_aborted_call_are_ended(tmp_path, executor):
    """An error in one task: the others' processes are gone within 5 s, and the pool goes on."""
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
        assert eventually(lambda: pool.tasks.core.counts()[0] == 0, 5)
        # Those that waited never started.
        assert len(log.read_text().split()) <= 2


def test_bystanders_of_an_aborted_task_lose_nothing(tmp_path):
    """What else ran in the replaced process ends in time, or runs again."""
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
        assert long.result(20) == "waited"


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_task_timeout_is_enforced_on_the_node(executor):
    """The task that takes too long fails, whatever it does, and others do not."""
    worker = sky.Worker(concurrency=2, executor=executor, task_timeout=1.0)
    with sky.pool(worker=worker, plugins=[]) as pool:
        late = pool.submit(hold_the_gil, 300)
        with pytest.raises(sky.TaskTimeoutError, match=r"node local-0: .*task_timeout=1"):
            late.result(20)
        assert pool.submit(operator.neg, 1).result(20) == -1


def test_task_timeout_counts_calls_not_batches():
    """Ten calls of a batch may together take longer."""
    with sky.pool(worker=sky.Worker(concurrency=1, task_timeout=1.0)):
        assert Parallel(n_jobs=2, batch_size=10)(delayed(time.sleep)(0.25) for _ in range(10)) == [None] * 10


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_task_timeout_holds_for_what_clears_up_behind_a_task(executor):
    """The tasks that wait behind it run elsewhere."""

    # In here, so that it arrives at once: this module's import would count.
    class Stays:
        """Arrives as a number, and never goes where it was made."""

        def __reduce__(self):
            return int, ()

        def __del__(self):
            threading.Event().wait()

    with sky.pool(worker=sky.Worker(concurrency=1, executor=executor, task_timeout=1.0), plugins=[]) as pool:
        assert pool.submit(Stays).result(20) == 0
        assert pool.submit(operator.neg, 1).result(20) == -1


def test_cancel_reaches_a_task_that_waits_on_its_node(tmp_path):
    """`Future.cancel()` is true wherever the task waits, and false once it runs."""
    gate, log = tmp_path / "gate", tmp_path / "log"

    def start_and_wait():
        log.touch()
        return wait_for(gate)

    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        running = pool.submit(start_and_wait)
        assert eventually(log.exists, 20)
        queued = [pool.submit(wait_for, "/") for _ in range(10)]
        assert all(future.cancel() for future in queued)
        assert all(future.cancelled() for future in queued)
        assert not running.cancel()
        assert not running.cancelled()
        gate.touch()
        assert running.result(20) == "waited"
        assert not running.cancel()


def nested_loky():
    return Parallel(n_jobs=2, backend="loky")(delayed(os.getpid)() for _ in range(4))


def test_process_workers_can_start_processes():
    """`executor="process"` runs a task on the main thread of a process that is no daemon: loky works in it."""

    def where():
        import multiprocessing
        import threading

        return threading.current_thread() is threading.main_thread(), multiprocessing.current_process().daemon

    with sky.pool(worker=sky.Worker(concurrency=1, executor="process"), plugins=[]) as pool:
        assert pool.submit(where).result(20) == (True, False)
        pids = pool.submit(nested_loky).result(40)
        assert pool.submit(os.getpid).result(20) not in pids


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


def test_a_killed_agents_tasks_run_elsewhere():
    """The list equals a serial run's although one of two nodes was killed."""
    with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=2)) as pool:
        futures = [pool.submit(slow_neg, i) for i in range(40)]
        os.kill(pool.nodes()[0].pid, signal.SIGKILL)
        assert [f.result(30) for f in futures] == [-i for i in range(40)]
        assert eventually(lambda: [n.state for n in pool.nodes()] == ["lost", "ready"], 20), pool.nodes()


def slow_neg(i):
    time.sleep(0.02)
    return -i


def test_without_nodes_tasks_fail_with_the_reason():
    """The last node is gone: pending and new tasks get an error, none hangs."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        futures = [pool.submit(time.sleep, 60) for _ in range(5)]
        os.kill(pool.nodes()[0].pid, signal.SIGKILL)
        for future in futures:
            with pytest.raises(sky.NodeLostError, match="local-0"):
                future.result(20)
        with pytest.raises(sky.NodeLostError):
            pool.submit(operator.neg, 1).result(20)


def test_no_retries_means_no_retries():
    """`Worker(retries=0)`: a task whose node was lost is not run again."""
    with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=1, retries=0), plugins=[]) as pool:
        futures = [pool.submit(time.sleep, 0.5) for _ in range(2)]
        os.kill(pool.nodes()[0].pid, signal.SIGKILL)
        ends = [future.exception(20) for future in futures]
        assert sorted(type(e) for e in ends if e is not None) == [sky.NodeLostError], ends


def test_a_stopped_agent_is_found_lost():
    """SIGSTOP: the socket lives, our heartbeat does not. Found within 10 s and a heartbeat."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pid = pool.nodes()[0].pid
        future = pool.submit(time.sleep, 60)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(sky.NodeLostError, match="no sign of life"):
                future.result(20)
        finally:
            os.kill(pid, signal.SIGCONT)


def hold_the_gil(seconds):
    import ctypes

    # Unlike CDLL, PyDLL does not release the GIL around its calls.
    ctypes.PyDLL(None).sleep(seconds)
    return "held"


def test_a_task_that_holds_the_gil_is_no_lost_node():
    """For longer than a node may be silent: heartbeats need no GIL, neither there nor here."""
    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        future = pool.submit(hold_the_gil, 13)
        hold_the_gil(13)
        assert future.result(20) == "held"
        assert [node.state for node in pool.nodes()] == ["ready"]


CLIENT = """
import sys, time, operator, subprocess, skyward_lite as sky
def spawn():
    # A grandchild in the worker's group. Its command line is sure to be there when it speaks: Popen returns earlier.
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(300)", "skyward_lite.grandchild"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process.pid
pool = sky.pool(lease={lease}, worker=sky.Worker(concurrency=2), plugins=[]).__enter__()
print(pool.nodes()[0].pid, pool.submit(spawn).result(), flush=True)
pool.submit(time.sleep, 300)
time.sleep(300)
"""


def client(tmp_path, lease):
    """A client process with a pool, a task and a grandchild; its pid and theirs."""
    script = tmp_path / "client.py"
    script.write_text(CLIENT.format(lease=lease))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    agent, grandchild = map(int, process.stdout.readline().split())
    assert {agent, grandchild} <= set(ours())
    return process, agent, grandchild


def test_a_killed_client_leaves_nothing(tmp_path):
    """kill -9: agent, workers and grandchildren end at once."""
    process, agent, grandchild = client(tmp_path, 60)
    with process:
        process.kill()
        process.wait()
    assert eventually(lambda: not {agent, grandchild} & set(ours()), 5), ours()


def test_a_stopped_clients_lease_ends(tmp_path):
    """SIGSTOP: agent, workers and grandchildren end when the lease does."""
    process, agent, grandchild = client(tmp_path, 3)
    with process:
        process.send_signal(signal.SIGSTOP)
        try:
            assert eventually(lambda: not {agent, grandchild} & set(ours()), 10), ours()
        finally:
            process.kill()


def test_a_client_stopped_within_its_lease_goes_on(tmp_path):
    """SIGSTOP for longer than a node may be silent: the client hears what came meanwhile and loses nothing."""
    script = tmp_path / "stopped.py"
    script.write_text(
        "import operator, skyward_lite as sky\n"
        "with sky.pool(plugins=[]) as pool:\n"
        "    print(pool.submit(operator.neg, 1).result(), flush=True)\n"
        "    input()\n"
        "    print(pool.submit(operator.neg, 2).result(), pool.nodes()[0].state, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "-1\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(13)
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate("\n", timeout=20)
        assert out == "-2 ready\n"


def test_a_stopped_agent_cannot_keep_its_workers(tmp_path):
    """The workers' own watchdogs end them when the lease is over, grandchildren included."""
    process, agent, grandchild = client(tmp_path, 3)
    with process:
        os.kill(agent, signal.SIGSTOP)
        process.send_signal(signal.SIGSTOP)
        try:
            assert eventually(lambda: set(ours()) & {agent, grandchild} == {agent}, 10), ours()
        finally:
            os.kill(agent, signal.SIGKILL)
            process.kill()


def test_ctrl_c_leaves_the_block(tmp_path):
    """SIGINT in the middle of a Parallel call: KeyboardInterrupt, exit within seconds, nothing left."""
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import time, skyward_lite as sky\n"
        "from joblib import Parallel, delayed\n"
        "with sky.pool(worker=sky.Worker(concurrency=2)) as pool:\n"
        "    print(pool.nodes()[0].pid, flush=True)\n"
        "    Parallel(n_jobs=-1)(delayed(time.sleep)(300) for _ in range(10))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        agent = int(process.stdout.readline())
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) != 0
        assert "KeyboardInterrupt" in process.stderr.read()
    assert eventually(lambda: agent not in ours(), 5)


def test_the_interpreter_that_cannot_start_is_named(monkeypatch, capfd):
    """An agent that ends at once fails the start, with what it printed on standard error."""
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    monkeypatch.setenv(MARK, os.environ[MARK])
    with pytest.raises(sky.NodeStartError, match="local-0 is lost"), sky.pool(plugins=[]):
        pass
    assert "PYTHONHOME" in capfd.readouterr().err


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


def test_an_abort_that_crosses_a_recall_harms_nobody(tmp_path):
    """The task has come back unstarted, so nothing is to be ended for it where it had been."""

    def quick(i):
        time.sleep(0.25)

    def slow(i):
        (tmp_path / f"{i}-{time.monotonic()}").touch()
        time.sleep(5)

    with sky.pool(nodes=2, worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        first, _ = sky.compute(os.getpid)() @ pool
        os.kill(first, signal.SIGSTOP)
        futures = [pool.submit(quick, i) for i in range(8)]
        # The other node ends its own, and asks for what it can of the first one's.
        assert eventually(lambda: sum(future.done() for future in futures) >= 4, 10)
        time.sleep(0.5)
        for future in futures:
            pool.tasks.completions.futures.abort(future.task)
        os.kill(first, signal.SIGCONT)
        for future in [pool.submit(slow, i) for i in range(4)]:
            future.result(30)
    assert len(list(tmp_path.iterdir())) == 4


def test_why_a_node_cannot_start_its_workers_is_said(monkeypatch):
    """Here it may have few files open."""
    start = subprocess.Popen

    def limited(*args, **kwargs):
        few = (40, 40)
        return start(*args, **kwargs, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, few))

    monkeypatch.setattr(subprocess, "Popen", limited)
    with pytest.raises(sky.NodeStartError, match="cannot start a worker: Too many open files"):
        sky.pool(worker=sky.Worker(concurrency=40, executor="process"), plugins=[]).__enter__()


def raise_when_idle(how, over, done):
    """Let something be raised in this task's thread when this is over and the thread waits for the next one."""
    thread = threading.get_ident()

    def raise_there():
        while not os.path.exists(over) or sys._current_frames()[thread].f_code.co_name != "take_tasks":
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
def test_what_is_raised_between_two_tasks_is_nobodys(tmp_path, executor, how):
    """A task left it behind. The next one runs, in the same process."""
    with sky.pool(worker=sky.Worker(concurrency=1, executor=executor), plugins=[]) as pool:
        for i in range(3):
            over, done = tmp_path / f"{i}-over", tmp_path / f"{i}-done"
            pid = pool.submit(raise_when_idle, how, str(over), str(done)).result(20)
            over.touch()
            assert eventually(done.exists, 20)
            assert pool.submit(os.getpid).result(20) == pid
            assert list(pool.map(operator.neg, range(3))) == [0, -1, -2]


def hammer(seconds, go):
    """Raise something in this task's thread all the time, later."""
    thread = threading.get_ident()

    def raise_there():
        while not os.path.exists(go):
            time.sleep(0.01)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(StopAsyncIteration))
            time.sleep(0.001)

    threading.Thread(target=raise_there, daemon=True).start()


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_tasks_end_whatever_is_raised_in_their_thread(tmp_path, executor):
    """Each has its own value, or the error that was raised while it ran: none is lost."""
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


kept = []


def share():
    """Make shared memory that this process's resource tracker removes when the process has ended."""
    kept.append(shared_memory.SharedMemory(create=True, size=1000))
    return kept[-1].name, resource_tracker._resource_tracker._pid, os.getppid()


@pytest.mark.parametrize("executor", ["thread", "process"])
@pytest.mark.parametrize("end", ["leave", "crash", "agent", "abort"])
def test_shared_memory_of_tasks_is_removed(end, executor):
    """However their process ends: the tracker gets to do its work, and ends too."""
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


def test_nested_loky_leaves_nothing(capsys):
    """Neither processes nor semaphores, nor a word about these."""
    # An earlier process of the same number may have left some.
    before = set(Path("/dev/shm").iterdir())

    def semaphores(pid):
        return set(Path("/dev/shm").glob(f"sem.loky-{pid}-*")) - before

    with sky.pool(worker=sky.Worker(concurrency=1, executor="process")) as pool:
        results, pid = pool.submit(nest).result(30)
        assert results == [0, -1, -2, -3]
        assert semaphores(pid)
    assert eventually(lambda: not semaphores(pid), 20)
    assert "resource_tracker" not in capsys.readouterr().err


@pytest.mark.parametrize(("code", "status"), [(0, 0), (3, 3), ("said", 1), (None, 0)])
def test_a_forked_child_exits_with_its_status(code, status):
    """And its parent goes on."""

    def fork():
        pid = os.fork()
        if pid == 0:
            sys.exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    with sky.pool(worker=sky.Worker(concurrency=1, executor="process"), plugins=[]) as pool:
        assert pool.submit(fork).result(20) == status


def test_a_subprocess_whose_first_thread_has_ended_ends_too():
    """It looks like a zombie, and runs."""
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


@pytest.mark.parametrize("end", ["leave", "agent", "abort"])
def test_subprocesses_in_sessions_of_their_own_end_too(end):
    """As those that `timeout` or `setsid` start: they are known by their parents."""
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


def test_a_worker_whose_connection_a_task_closed_says_so():
    """As daemons do, which close all that they do not know."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        with pytest.raises(sky.WorkerCrashedError, match="lost the connection to its agent, did a task close it"):
            pool.submit(os.closerange, 3, 1000).result(20)
        assert pool.submit(operator.neg, 1).result(20) == -1


class Watched:
    pass


def fail_with(watched, gone):
    weakref.finalize(watched, Path(gone).touch)
    raise KeyError(gone)


def test_an_idle_slot_keeps_nothing_of_a_task_that_failed(tmp_path):
    """Its arguments go with it."""
    gone = tmp_path / "gone"
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        with pytest.raises(KeyError):
            pool.submit(fail_with, Watched(), str(gone)).result(20)
        assert eventually(gone.exists, 20)
