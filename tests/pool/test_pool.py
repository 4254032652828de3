"""`ComputePool` as a `concurrent.futures.Executor`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import operator
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import skyward_lite as sky
from processes import ours, refusal_in_a_fork
from skyward_lite.client import leaving
from skyward_lite.client.tasks import Tasks
from task_functions import fail


def gate(path: str, value: int) -> int:
    """Return the value when the file exists."""
    while not os.path.exists(path):
        time.sleep(0.005)
    return value


def test_submit_returns_a_future(either_pool):
    """A submitted call runs in another process with its arguments, and its value is the future's."""
    assert either_pool.submit(operator.sub, 5, 3).result(10) == 2
    assert either_pool.submit(dict, a=1).result(10) == {"a": 1}
    assert either_pool.submit(os.getpid).result(10) != os.getpid()


def test_closures_and_lambdas_run(either_pool):
    """Closures and lambdas, which plain pickle refuses, run in tasks."""
    k = 10
    assert either_pool.submit(lambda x: x * k, 4).result(10) == 40


def test_exceptions_have_their_type_and_traceback(either_pool):
    """An exception's cause is the remote traceback, with the user's frames and none of the library's."""
    with pytest.raises(ValueError, match="boom") as caught:
        either_pool.submit(fail, "boom").result(10)
    assert str(caught.value) == "boom"
    text = str(caught.value.__cause__)
    assert isinstance(caught.value.__cause__, sky.RemoteTraceback)
    assert "in fail" in text
    assert "task_loop" not in text


@pytest.mark.parametrize("stop", [SystemExit(3), KeyboardInterrupt()])
def test_system_exit_in_a_task(either_pool, stop):
    """A task that raises SystemExit or KeyboardInterrupt fails, and its worker lives."""

    def leave():
        raise stop

    before = either_pool.submit(os.getpid).result(10)
    with pytest.raises(type(stop)):
        either_pool.submit(leave).result(10)
    pids = {either_pool.submit(os.getpid).result(10) for _ in range(20)}
    assert before in pids or len(pids) > 1


def test_unpicklable_arguments_are_refused_at_the_call(shared_pool):
    """Arguments that cannot be pickled raise in `submit`, and nothing is sent."""
    with pytest.raises(TypeError, match="pickle"):
        shared_pool.submit(print, threading.Lock())
    assert Tasks.of(shared_pool).core.counts()[0] == 0


def test_unpicklable_results_fail_their_task_only(either_pool):
    """A result that cannot be pickled fails its task with the reason, and the worker goes on."""
    with pytest.raises(TypeError, match="pickle"):
        either_pool.submit(threading.Lock).result(10)
    assert either_pool.submit(operator.neg, 1).result(10) == -1


def test_arrays_are_writable_and_private(either_pool):
    """A received array is writable, and writes do not reach the sender's array."""

    def double(array):
        array *= 2
        return array

    array = np.arange(100_000)
    got = either_pool.submit(double, array).result(10)
    assert (got == 2 * np.arange(100_000)).all()
    assert (array == np.arange(100_000)).all()
    got += 1


def test_arguments_are_a_snapshot(shared_pool):
    """Changes of an argument after `submit` do not reach the task."""
    array = np.zeros(1_000_000)
    futures = []
    for i in range(10):
        array[:] = i
        futures.append(shared_pool.submit(np.unique, array))
    assert [f.result(20).tolist() for f in futures] == [[i] for i in range(10)]


def test_large_payloads_both_ways(shared_pool):
    """100 MB go there and back beside small tasks, which do not wait for them."""
    big = shared_pool.submit(np.asarray, np.random.default_rng(0).bytes(100_000_000))
    small = [shared_pool.submit(operator.neg, i) for i in range(100)]
    assert [f.result(30) for f in small] == [-i for i in range(100)]
    assert len(big.result(60).item()) == 100_000_000


@pytest.mark.parametrize("chunksize", [1, 7])
@pytest.mark.parametrize("buffersize", [None, 1, 10])
def test_map_keeps_the_order(shared_pool, chunksize, buffersize):
    """`map` returns results in the order of the arguments."""
    got = shared_pool.map(pow, range(50), [2] * 50, chunksize=chunksize, buffersize=buffersize)
    assert list(got) == [i**2 for i in range(50)]


def test_map_ends_with_the_shortest_iterable(shared_pool):
    """`map` ends with the shortest iterable, as the builtin does."""
    assert list(shared_pool.map(operator.add, [1, 2, 3], [10, 20])) == [11, 22]
    assert list(shared_pool.map(operator.neg, [])) == []


def test_map_raises_where_the_error_is_reached(shared_pool):
    """`map` returns the results before an error, and raises it in its place."""
    results = shared_pool.map(operator.truediv, [1, 1, 1], [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_computes_only_buffersize_ahead(shared_pool):
    """With `buffersize` an endless input is read no further than that many calls ahead of the results."""
    taken = []

    def numbers():
        for i in range(1_000_000):
            taken.append(i)
            yield i

    results = shared_pool.map(operator.neg, numbers(), buffersize=5)
    assert [next(results) for _ in range(10)] == [-i for i in range(10)]
    assert len(taken) <= 16


def test_map_times_out(shared_pool, tmp_path):
    """`map(timeout=)` raises TimeoutError that many seconds after the call."""
    path = tmp_path / "gate"
    results = shared_pool.map(gate, [str(path)], [1], timeout=0.05)
    with pytest.raises(TimeoutError):
        next(results)
    path.touch()


@pytest.mark.parametrize("bad", [{"chunksize": 0}, {"buffersize": 0}])
def test_map_checks_its_parameters(shared_pool, bad):
    """`map` refuses a wrong parameter at the call, with its name."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        shared_pool.map(operator.neg, [1], **bad)


def test_wait_as_completed_and_callbacks(shared_pool):
    """`wait`, `as_completed` and callbacks of the standard library work with the pool's futures."""
    futures = [shared_pool.submit(operator.neg, i) for i in range(20)]
    assert {f.result() for f in concurrent.futures.as_completed(futures, 10)} == {-i for i in range(20)}
    called = threading.Event()
    shared_pool.submit(operator.neg, 1).add_done_callback(lambda f: called.set())
    assert called.wait(10)


def test_callback_that_raises_does_not_affect_later_tasks(shared_pool, caplog):
    """A callback's exception is logged by the standard library, and later tasks end as ever."""
    with caplog.at_level(logging.CRITICAL, "concurrent.futures"):
        future = shared_pool.submit(operator.neg, 1)
        future.add_done_callback(lambda f: 1 / 0)
        assert shared_pool.submit(operator.neg, 2).result(10) == -2


def test_queued_futures_can_be_cancelled(tmp_path):
    """A task for which `cancel()` is true never starts, and its future is cancelled."""
    path = tmp_path / "gate"
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        futures = [pool.submit(gate, str(path), i) for i in range(10)]
        cancelled = [f.cancel() for f in futures]
        assert cancelled[-1]
        path.touch()
        done, pending = concurrent.futures.wait(futures, 20)
        assert not pending
        for future, was_cancelled in zip(futures, cancelled, strict=True):
            if was_cancelled:
                assert future.cancelled()
                with pytest.raises(concurrent.futures.CancelledError):
                    future.result()


def test_leaving_waits_for_pending_futures():
    """A block that is left without an exception waits for all submitted tasks."""
    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        futures = [pool.submit(time.sleep, 0.05) for _ in range(10)]
    assert all(f.done() and not f.cancelled() for f in futures)


def test_exception_that_leaves_the_block_cancels_pending_futures(tmp_path):
    """An exception that leaves the block waits for nothing, and every future has an end."""
    path = str(tmp_path / "never")
    with pytest.raises(RuntimeError, match="out"), sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        futures = [pool.submit(gate, path, i) for i in range(10)]
        raise RuntimeError("out")
    assert all(f.cancelled() for f in futures)


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_leaving_ends_every_process(executor):
    """Agents, workers and processes that they started have ended when the block is left."""
    with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=2, executor=executor), plugins=[]) as pool:
        assert pool.submit(operator.neg, 1).result(10) == -1
        mine = {p for p, c in ours().items() if "agent" in c}
        assert {n.pid for n in pool.nodes()} <= mine
    left = {n.pid for n in pool.nodes()} & set(ours())
    assert not left


def test_shutdown_without_waiting(tmp_path):
    """`shutdown(wait=False)` returns at once; submitted tasks still end, and new ones are refused."""
    path = tmp_path / "gate"
    pool = sky.pool(worker=sky.Worker(concurrency=1), plugins=[]).__enter__()
    future = pool.submit(gate, str(path), 7)
    pool.shutdown(wait=False)
    assert not future.done()
    with pytest.raises(sky.PoolClosedError):
        pool.submit(operator.neg, 1)
    path.touch()
    assert future.result(10) == 7


def test_pool_that_is_not_open_refuses_calls():
    """A pool refuses calls before it is entered and after it is left, and to be entered twice."""
    pool = sky.pool(plugins=[])
    with pytest.raises(sky.PoolClosedError, match="not started"):
        pool.submit(operator.neg, 1)
    with pool:
        pass
    with pytest.raises(sky.PoolClosedError, match="closed"):
        pool.submit(operator.neg, 1)
    with pytest.raises(sky.PoolClosedError, match="starts once"):
        pool.__enter__()
    pool.shutdown()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_cannot_use_the_pool(shared_pool):
    """A forked child that uses its parent's pool gets an error, as it must not use the parent's connections."""
    assert "forked" in refusal_in_a_fork(lambda: shared_pool.submit(operator.neg, 1))
    assert shared_pool.submit(operator.neg, 1).result(10) == -1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sky.Worker(concurrency=0), "concurrency=0"),
        (lambda: sky.Worker(executor="fiber"), "fiber"),
        (lambda: sky.Worker(retries=-1), "retries=-1"),
        (lambda: sky.Local(0), "nodes=0"),
        (lambda: sky.pool(nodes=0), "nodes=0"),
        (lambda: sky.pool(nodes=(3, 2)), r"nodes=\(3, 2\)"),
        (lambda: sky.pool(sky.Local(2), 3), "disagree"),
        (lambda: sky.pool(lease=0), "lease=0"),
    ],
)
def test_parameters_out_of_range_are_named(make, says):
    """A parameter out of range is an error with its name and value."""
    with pytest.raises(ValueError, match=says):
        make()


def test_image_environment_reaches_the_workers():
    """`Image(env=)` is set before the worker starts; thread limits are the node's share of cores."""
    image = sky.Image(env={"SKYWARD_SAYS": "hello"})
    with sky.pool(worker=sky.Worker(concurrency=64), image=image, plugins=[]) as pool:
        assert pool.submit(os.getenv, "SKYWARD_SAYS").result(10) == "hello"
        assert pool.submit(os.getenv, "OMP_NUM_THREADS").result(10) == os.getenv("OMP_NUM_THREADS", "1")


def test_local_checks_requirements_and_installs_nothing():
    """With `Local()` a requirement that this interpreter does not meet is an error on entry with its name."""
    image = sky.Image(pip=["no-such-package-here", "numpy>=99"])
    with (
        pytest.raises(sky.NodeStartError, match=r"no-such-package-here is not installed.*numpy>=99 is wanted"),
        sky.pool(image=image, plugins=[]),
    ):
        pass


def test_modules_beside_the_script_are_importable(tmp_path, monkeypatch, shared_processes):
    """Workers on this machine have the client's import path as it was when the pool started."""
    (tmp_path / "beside_me.py").write_text("def f():\n    return 'found'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import beside_me

    with sky.pool(plugins=[]) as pool:
        assert pool.submit(beside_me.f).result(10) == "found"


def test_process_executor_runs_tasks_on_the_main_thread(shared_processes):
    """With `executor="process"` tasks run on the main thread of a process that is no daemon, as nested pools need."""

    def where():
        import multiprocessing

        return threading.current_thread() is threading.main_thread(), multiprocessing.current_process().daemon

    assert shared_processes.submit(where).result(10) == (True, False)


def test_output_and_closed_descriptors_do_not_break_the_session(capfd):
    """Tasks may print, flood the streams and close descriptors 0, 1 and 2 without harm to the session."""

    def noise(n):
        print("out" * n)
        print("err" * n, file=sys.stderr)
        os.write(1, b"raw\n")
        return n

    def close_all():
        for fd in (0, 1, 2):
            os.close(fd)

    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        assert list(pool.map(noise, range(1, 50))) == list(range(1, 50))
        pool.submit(close_all).result(10)
        assert pool.submit(operator.neg, 5).result(10) == -5
    out, err = capfd.readouterr()
    assert "outoutout\n" in out
    assert "raw\n" in out
    assert "errerrerr\n" in err


def test_submit_from_many_threads(shared_pool):
    """Several threads may use a pool at once."""
    results: dict[int, list[int]] = {}

    def use(k):
        results[k] = [f.result(20) for f in [shared_pool.submit(operator.mul, k, i) for i in range(200)]]

    threads = [threading.Thread(target=use, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {k: [k * i for i in range(200)] for k in range(8)}


def test_several_pools_side_by_side(shared_pool):
    """Several pools may be open, one after and one inside another."""
    with sky.pool(plugins=[]) as one, sky.pool(plugins=[]) as two:
        pids = {p.submit(os.getpid).result(10) for p in (one, two, shared_pool)}
        assert len(pids) == 3
    with sky.pool(plugins=[]) as three:
        assert three.submit(operator.neg, 1).result(10) == -1


def test_pool_that_is_never_closed_ends_with_the_interpreter(tmp_path):
    """A script that never closes its pool ends, and leaves no process."""
    script = tmp_path / "forgets.py"
    script.write_text(
        "import operator, skyward_lite as sky\n"
        "p = sky.pool(plugins=[]).__enter__()\n"
        "print(p.submit(operator.neg, 1).result(), p.nodes()[0].pid)\n"
    )
    import subprocess

    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=30, check=True)
    value, pid = done.stdout.split()
    assert value == "-1"
    assert int(pid) not in ours()
    assert done.stderr == ""


def test_shutdown_in_a_callback():
    """`shutdown` in a callback returns, as the thread that runs callbacks does not wait for itself."""
    pool = sky.pool(plugins=[]).__enter__()
    future = pool.submit(operator.neg, 1)
    future.add_done_callback(lambda f: pool.shutdown())
    assert future.result(10) == -1
    pool.shutdown()
    with pytest.raises(sky.PoolClosedError):
        pool.submit(operator.neg, 1)


def test_one_provider_for_several_pools():
    """Leaving one of two pools of a provider ends its own nodes only."""
    provider = sky.Local()
    with sky.pool(provider, plugins=[]) as outer:
        with sky.pool(provider, plugins=[]) as inner:
            assert inner.submit(operator.neg, 1).result(10) == -1
        assert outer.submit(operator.neg, 2).result(10) == -2


@pytest.mark.slow
def test_short_lease_is_renewed():
    """Heartbeats are as frequent as a short lease needs."""
    with sky.pool(lease=1.0, plugins=[]) as pool:
        assert pool.submit(time.sleep, 2.5).result(10) is None


def test_results_are_freed():
    """A result is freed when the caller drops it."""
    import gc
    import weakref

    with sky.pool(plugins=[]) as pool:
        future = pool.submit(operator.neg, 1)
        assert future.result(10) == -1
        future_ref = weakref.ref(future)
        del future
        pool.submit(operator.neg, 2).result(10)
        gc.collect()
        assert future_ref() is None


def test_client_without_standard_streams(tmp_path):
    """A client whose descriptors 0, 1 and 2 are closed opens a pool, and no socket takes these descriptors."""
    import subprocess

    out = tmp_path / "out"
    code = (
        "import operator, skyward_lite as sky\n"
        "with sky.pool(plugins=[]) as p:\n"
        f"    open({str(out)!r}, 'w').write(str(p.submit(operator.neg, 1).result(20)))\n"
    )
    shell = f'exec {sys.executable} -c "$1" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", shell, "sh", code], timeout=30, check=True)
    assert out.read_text() == "-1"


def test_sys_path_entries_that_are_no_strings(monkeypatch, tmp_path):
    """Entries of `sys.path` that are no strings are left out, as Python ignores them."""
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    with sky.pool(plugins=[]) as pool:
        assert pool.submit(operator.neg, 1).result(10) == -1


def test_callback_that_never_returns_does_not_block_leaving(monkeypatch, caplog):
    """The block is left, and its nodes end, although a callback never returns."""
    monkeypatch.setattr(leaving, "JOIN_SECONDS", 0.2)
    never, called = threading.Event(), threading.Event()

    def block(future):
        called.set()
        never.wait()

    with pytest.raises(ZeroDivisionError), sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pool.submit(operator.neg, 1).add_done_callback(block)
        assert called.wait(20)
        raise ZeroDivisionError
    assert "a callback of a future has not returned" in caplog.text
    never.set()


def test_long_error_text_under_a_low_max_payload():
    """Errors have a bound of their own, so one longer than `max_payload` arrives, and the node lives."""
    with sky.pool(worker=sky.Worker(concurrency=1, max_payload=1000), plugins=[]) as pool:
        future = pool.submit(exec, "raise ValueError('x' * 100_000)")
        with pytest.raises(sky.RemoteError, match="ValueError"):
            future.result(20)
        assert pool.submit(operator.neg, 1).result(20) == -1


def test_forked_child_closes_nothing():
    """Leaving the pool and aborting in the child return at once, and the parent's tasks go on."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        future = pool.submit(time.sleep, 0.5)

        def leave() -> None:
            signal.alarm(10)  # ends a child that waits for ever
            pool._core.abort(future.task)
            pool.__exit__(None, None, None)
            pool.shutdown(cancel_futures=True)
            pool._core.close()
            pool.nodes()

        assert "forked" in refusal_in_a_fork(leave)
        assert future.result(20) is None


def test_forked_child_cannot_list_nodes_or_cancel():
    """A forked child may neither list nodes nor cancel, as the threads that would answer are the parent's."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        future = pool.submit(operator.neg, 1)
        assert "forked" in refusal_in_a_fork(pool.slots)
        assert future.result(20) == -1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"provider": "me@lab"}, r"sky\.SSH\('me@lab1'\)"),
        ({"provider": sky.Local}, r"sky\.Local\(nodes=2\)"),
        ({"plugins": [sky.plugins.joblib]}, r"\[sky\.plugins\.joblib\(\)\]"),
        ({"plugins": sky.plugins.joblib()}, r"\[sky\.plugins\.joblib\(\)\]"),
        ({"worker": 4}, r"sky\.Worker\(concurrency=4\)"),
        ({"image": {}}, r"sky\.Image\("),
        ({"nodes": "2"}, r"nodes='2'.*a whole number, or two: \(least, wanted\)"),
        ({"nodes": (1, 2, 3)}, r"nodes=\(1, 2, 3\).*a whole number"),
        ({"nodes": 1.5}, r"nodes=1\.5.*a whole number"),
    ],
)
def test_parameters_of_a_wrong_type_are_named(wrong, says):
    """A parameter of a wrong type is an error with its name and what was probably meant."""
    with pytest.raises(TypeError, match=says):
        sky.pool(**wrong)


def test_leaving_ends_tasks_then_plugins_then_machines():
    """Leaving ends the tasks, then the plugins' contexts, then releases the machines, whatever raises before that."""
    steps = []

    def note(step):
        steps.append(f"{step} {repr(pool).rpartition(' ')[2]}")

    class Noting(sky.Local):
        def stop(self, machines, timeout):
            note("release")
            super().stop(machines, timeout)

    @contextlib.contextmanager
    def around(_):
        yield
        note("plugin")
        raise LookupError

    pool = sky.pool(Noting(), worker=sky.Worker(concurrency=1), plugins=[sky.Plugin("p", around_client=around)])
    with pytest.raises(LookupError), pool:
        pool.submit(time.sleep, 0.3).add_done_callback(lambda _: note("task"))
    assert steps == ["task closing>", "plugin closing>", "release closed>"]
