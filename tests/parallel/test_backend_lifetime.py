"""joblib's default backend before, inside and after a pool's block, and calls that are open when the block is left."""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from importlib import metadata

import joblib
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed


def pid(_):
    return os.getpid()


def workers(parallel):
    return set(parallel(delayed(pid)(i) for i in range(8)))


def test_backend_name_without_a_pool_is_an_error():
    """`backend="skyward"` without a pool is an error that says what to do."""
    with sky.pool():
        pass
    with pytest.raises(sky.PoolClosedError, match=r"with sky\.pool"):
        Parallel(n_jobs=2, backend="skyward")(delayed(operator.neg)(i) for i in range(2))


def test_default_backend_is_restored():
    """After the block joblib runs as before, also after an exception."""
    before = joblib.effective_n_jobs(-1)
    with pytest.raises(KeyError), sky.pool(worker=sky.Worker(concurrency=37)):
        assert joblib.effective_n_jobs(-1) == 37
        raise KeyError
    assert joblib.effective_n_jobs(-1) == before


def test_innermost_pool_is_the_default_backend():
    """Of nested pools the innermost is the default, each with its own workers."""
    with sky.pool(worker=sky.Worker(concurrency=2)):
        outer = workers(Parallel(n_jobs=-1))
        with sky.pool(worker=sky.Worker(concurrency=3)):
            assert joblib.effective_n_jobs(-1) == 3
            assert not workers(Parallel(n_jobs=-1)) & outer
        assert joblib.effective_n_jobs(-1) == 2
        assert workers(Parallel(n_jobs=-1)) == outer


def test_pool_of_one_slot_runs_remotely():
    """A pool of one slot runs calls on its worker, although joblib takes one job for sequential mode."""
    with sky.pool(worker=sky.Worker(concurrency=1)):
        assert os.getpid() not in workers(Parallel(n_jobs=-1))
        assert os.getpid() not in workers(Parallel(n_jobs=-2, return_as="generator"))
        with Parallel(n_jobs=4, timeout=20) as parallel:
            assert os.getpid() not in workers(parallel)


def test_default_backend_of_successive_pools():
    """Each of two pools is the default in its own block, and none is in between."""
    before = joblib.effective_n_jobs(-1)
    for slots in (5, 3):
        with sky.pool(worker=sky.Worker(concurrency=slots)):
            assert joblib.effective_n_jobs(-1) == slots
            assert os.getpid() not in workers(Parallel(n_jobs=-1))
        assert joblib.effective_n_jobs(-1) == before


def test_default_backend_per_thread():
    """Each thread's default is the pool that it opened, also by name."""
    barrier = threading.Barrier(2)
    found = {}

    def client(count):
        with sky.pool(worker=sky.Worker(concurrency=count)):
            barrier.wait(20)
            with joblib.parallel_config(backend="skyward"):
                named = joblib.effective_n_jobs(-1)
            found[count] = (joblib.effective_n_jobs(-1), named)
            barrier.wait(20)

    threads = [threading.Thread(target=client, args=(count,)) for count in (3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {3: (3, 3), 5: (5, 5)}


def test_sequential_calls_are_warned_of_once_per_pool(caplog):
    """Calls that joblib runs in this process, by n_jobs=1 or require="sharedmem", are warned of once per pool."""
    with caplog.at_level(logging.INFO, "skyward_lite"):
        for _ in range(2):
            caplog.clear()
            with sky.pool(worker=sky.Worker(concurrency=2)):
                assert workers(Parallel(n_jobs=2)) != {os.getpid()}
                assert not [record for record in caplog.records if "this process" in record.message]
                for _ in range(2):
                    assert workers(Parallel(n_jobs=1)) == {os.getpid()}
                    assert workers(Parallel(n_jobs=2, require="sharedmem")) == {os.getpid()}
            logged = [record.message for record in caplog.records if "this process" in record.message]
            assert [text.split(" ")[0] for text in logged] == ["Parallel(n_jobs=1)", 'Parallel(require="sharedmem")']


def test_process_executor_runs_as_many_processes_as_slots():
    """With `executor="process"` as many processes as slots run side by side."""
    with sky.pool(worker=sky.Worker(concurrency=3, executor="process")):
        found = set()
        for _ in range(100):
            found |= workers(Parallel(n_jobs=-1, batch_size=1))
            if len(found) == 3:
                break
        assert len(found) == 3


def test_plugins_compose_in_order_and_unwind_in_reverse():
    """Plugins are entered in order and left in reverse, also when one raises on entry."""
    import contextlib

    log = []

    def plugin(name, fails=False):
        @contextlib.contextmanager
        def around(pool):
            log.append(f"+{name}")
            if fails:
                raise OSError(name)
            try:
                yield
            finally:
                log.append(f"-{name}")

        return sky.Plugin(name, transform=lambda image: log.append(f"t{name}") or image, around_client=around)

    with sky.pool(plugins=[plugin("a"), plugin("b")]):
        pass
    assert log == ["ta", "tb", "+a", "+b", "-b", "-a"]
    log.clear()
    with pytest.raises(OSError, match="b"), sky.pool(plugins=[plugin("a"), plugin("b", fails=True)]):
        pass
    assert log == ["ta", "tb", "+a", "+b", "-a"]


def test_the_joblib_plugin_pins_the_clients_version():
    """Without a version the plugin pins joblib to the client's, and threadpoolctl if the client has it."""
    threadpoolctl = f"threadpoolctl=={metadata.version('threadpoolctl')}"
    image = sky.plugins.joblib().transform(sky.Image())
    assert image.pip == (f"joblib=={joblib.__version__}", threadpoolctl)
    assert sky.plugins.joblib("1.4.0").transform(sky.Image()).pip == ("joblib==1.4.0", threadpoolctl)


def test_client_without_threadpoolctl_does_not_require_it(monkeypatch):
    """A client without threadpoolctl, which is no dependency, does not ask for it."""
    monkeypatch.setattr("sys.path", [])
    assert sky.plugins.joblib("1.4.0").transform(sky.Image()).pip == ("joblib==1.4.0",)


def test_parallel_object_that_outlives_its_pool_is_an_error():
    """A call of a `Parallel` object after its pool was closed is an error that says so, and no hang."""
    with sky.pool(worker=sky.Worker(concurrency=2)), Parallel(n_jobs=2) as parallel:
        assert parallel(delayed(operator.neg)(i) for i in range(3)) == [0, -1, -2]
        sky_pool = parallel._backend.pool
        sky_pool.shutdown()
        with pytest.raises(sky.PoolClosedError):
            parallel(delayed(operator.neg)(i) for i in range(3))


def test_shutdown_without_waiting_restores_the_default_backend():
    """`shutdown(wait=False)` restores the default at once on the thread that opened the pool."""
    before = joblib.effective_n_jobs(-1)
    with sky.pool(worker=sky.Worker(concurrency=37)) as pool:
        pool.shutdown(wait=False)
        assert joblib.effective_n_jobs(-1) == before
        assert Parallel(n_jobs=2, backend="threading")(delayed(operator.neg)(i) for i in range(3)) == [0, -1, -2]
    assert joblib.effective_n_jobs(-1) == before


def test_shutdown_on_another_thread_restores_the_default_backend():
    """Whichever thread closes the pool, the block's end restores joblib's default on its own thread."""
    before = joblib.effective_n_jobs(-1)
    with sky.pool(worker=sky.Worker(concurrency=37)) as pool:
        thread = threading.Thread(target=pool.shutdown)
        thread.start()
        thread.join(20)
        with pytest.raises(sky.PoolClosedError):
            Parallel(n_jobs=2)(delayed(operator.neg)(i) for i in range(3))
    assert joblib.effective_n_jobs(-1) == before


def endless(read):
    """Yield calls without end, and count them."""
    for i in itertools.count():
        read.append(i)
        yield delayed(operator.neg)(i)


KINDS = [
    "generator",
    pytest.param(
        "generator_unordered",
        marks=pytest.mark.skipif(int(joblib.__version__.split(".")[1]) < 4, reason="joblib 1.4"),
    ),
]


@pytest.mark.parametrize("return_as", KINDS)
def test_leaving_ends_a_generator_that_was_begun(return_as):
    """Leaving aborts a generator that was begun, as its input may have no end, and a thread that reads on gets an
    error.
    """
    read = []
    with sky.pool(worker=sky.Worker(concurrency=2)) as pool:
        results = Parallel(n_jobs=2, return_as=return_as, batch_size=1)(endless(read))
        next(results)
        future = pool.submit(operator.neg, 7)
    assert future.result(0) == -7
    with pytest.raises(sky.PoolClosedError, match="or close it inside the block"):
        list(results)
    count = len(read)
    assert next(results, None) is None
    assert len(read) == count


def neg_when(gate, i):
    while i and not gate.exists():
        time.sleep(0.01)
    return -i


@pytest.mark.parametrize("error", [None, KeyError])
def test_leaving_does_not_wait_for_an_input_that_waits(tmp_path, error):
    """Leaving waits for no input that waits if its generator was begun, or if an exception leaves the block."""
    reached, go_on, gate = threading.Event(), threading.Event(), tmp_path / "gate"

    def calls():
        for i in range(12):
            if i == 8:
                reached.set()
                assert go_on.wait(30)
            yield delayed(neg_when)(gate, i)

    with pytest.raises(error) if error else contextlib.nullcontext(), sky.pool(worker=sky.Worker(concurrency=2)):
        results = Parallel(n_jobs=2, return_as="generator", batch_size=1, pre_dispatch=4)(calls())
        if not error:
            # joblib holds a lock while it reads the input and needs the lock here, so it reads on only afterwards.
            assert next(results) == 0
        gate.touch()
        assert reached.wait(20)
        if error:
            raise error
    go_on.set()
    # An exception cancels the calls that were under way, if there were any.
    with pytest.raises((CancelledError, sky.PoolClosedError) if error else sky.PoolClosedError):
        list(results)


@pytest.mark.parametrize("return_as", KINDS)
def test_leaving_waits_for_a_generator_that_was_not_begun(return_as):
    """Results of a generator that was not begun, or has read all its input, can be taken after the block."""
    with sky.pool(worker=sky.Worker(concurrency=2)):
        later = Parallel(n_jobs=2, return_as=return_as, batch_size=1)(delayed(operator.neg)(i) for i in range(50))
        whole = Parallel(n_jobs=2, return_as=return_as, batch_size=1, pre_dispatch="all")
        begun = whole(delayed(operator.neg)(i) for i in range(50))
        first = next(begun)
    assert sorted(later) == sorted([first, *begun]) == [-i for i in reversed(range(50))]


def test_leaving_waits_for_calls_of_other_threads():
    """Leaving waits for calls of other threads, which may go on with their generators meanwhile."""
    got, begun, leaving = [], threading.Event(), threading.Event()

    def client():
        calls = (delayed(operator.neg)(i) for i in range(100))
        for value in Parallel(n_jobs=2, backend="skyward", return_as="generator", batch_size=1)(calls):
            got.append(value)
            begun.set()
            assert leaving.wait(20)

    with sky.pool(worker=sky.Worker(concurrency=2)) as pool:
        thread = threading.Thread(target=client)
        thread.start()
        assert begun.wait(20)
        drain = pool._leaving._drain

        def watched(*signals_and_error):
            leaving.set()
            drain(*signals_and_error)

        pool._leaving._drain = watched
    thread.join(20)
    assert got == [-i for i in range(100)]


def test_generators_of_each_leaving_thread_end():
    """A thread that waits in shutdown for a generator of the main thread is released when that thread leaves too."""
    with sky.pool(worker=sky.Worker(concurrency=2)) as pool:
        results = Parallel(n_jobs=2, return_as="generator", batch_size=1)(endless([]))
        next(results)
        thread = threading.Thread(target=pool.shutdown)
        thread.start()
        assert next(results) == -1
    thread.join(20)
    assert not thread.is_alive()
    with pytest.raises(sky.PoolClosedError):
        list(results)


def test_input_may_shut_its_own_pool_down():
    """An input that shuts its pool down causes no deadlock: calls read by the caller are refused, those of callbacks
    run.
    """

    def calls():
        for i in range(20):
            if i == place:
                pool.shutdown()
            yield delayed(operator.neg)(i)

    place = 1
    with sky.pool(worker=sky.Worker(concurrency=2)) as pool, pytest.raises(sky.PoolClosedError):
        Parallel(n_jobs=2, batch_size=1)(calls())
    place = 12
    with sky.pool(worker=sky.Worker(concurrency=2)) as pool:
        assert Parallel(n_jobs=2, batch_size=1)(calls()) == [-i for i in range(20)]


def test_leaving_does_not_wait_for_the_input_of_a_closed_call():
    """Leaving does not wait for a closed call although joblib reads on in a callback."""
    reached, go_on = threading.Event(), threading.Event()

    def calls():
        for i in range(12):
            if i == 8:
                reached.set()
                assert go_on.wait(30)
            yield delayed(operator.neg)(i)

    with sky.pool(worker=sky.Worker(concurrency=2)):
        results = Parallel(n_jobs=2, return_as="generator", batch_size=1)(calls())
        assert reached.wait(20)
        with pytest.warns(UserWarning, match="have been cancelled|but not used"):
            results.close()
    assert not go_on.is_set()
    go_on.set()


def test_leaving_ends_a_generator_that_the_leaving_thread_took_over():
    """A generator counts as the thread's that last asked for results, so its leaving aborts the call."""
    with ThreadPoolExecutor(1) as others, sky.pool(worker=sky.Worker(concurrency=2)):
        make = Parallel(n_jobs=2, return_as="generator", batch_size=1, backend="skyward")
        results = others.submit(make, endless([])).result(20)
        next(results)
    with pytest.raises(sky.PoolClosedError):
        list(results)


def test_backend_name_without_a_pool_if_joblib_was_imported_before():
    """The error for the name without a pool is there as well if joblib was imported first."""
    code = (
        "import joblib, skyward_lite\n"
        "try: joblib.Parallel(n_jobs=2, backend='skyward')(joblib.delayed(abs)(i) for i in range(3))\n"
        "except skyward_lite.PoolClosedError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "with sky.pool" in done.stdout
