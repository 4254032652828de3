"""`parallel_config("skyward", inner_max_num_threads=...)`: the threads of BLAS and OpenMP within a task."""

from __future__ import annotations

import builtins
import pickle
import sys
import threading

import joblib
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed, parallel_config
from skyward_lite.client.completions import CompletionQueue
from skyward_lite.node.batch import run_limited

JOBLIB = tuple(int(part) for part in joblib.__version__.split(".")[:2])


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_inner_threads_of_a_library_that_the_task_loads(executor):
    """OpenMP that a task is the first to load has the limit in that task, and its default afterwards."""

    # Not a function of this module, so that to unpickle it imports nothing.
    def fresh(_):
        loaded = "sklearn.utils._openmp_helpers" in sys.modules
        import sklearn.utils._openmp_helpers  # noqa: F401
        from threadpoolctl import threadpool_info

        return loaded, {library["num_threads"] for library in threadpool_info()}

    with sky.pool(worker=sky.Worker(concurrency=2, executor=executor)):
        with parallel_config(backend="skyward", inner_max_num_threads=3):
            within = Parallel(n_jobs=-1, batch_size=1)(delayed(fresh)(i) for i in range(4))
        after = Parallel(n_jobs=-1, batch_size=1)(delayed(fresh)(i) for i in range(8))
    assert not all(loaded for loaded, _ in within)
    assert all(found == {3} for _, found in within)
    assert not any(found & {3} for _, found in after)


def test_inner_threads_on_a_node_without_threadpoolctl():
    """A limit on a node without threadpoolctl fails the call with what to do, and other calls go on."""

    def forget():
        sys.modules["threadpoolctl"] = None

    with sky.pool(worker=sky.Worker(concurrency=1)) as pool:
        pool.submit(forget).result(20)
        with (
            parallel_config(backend="skyward", inner_max_num_threads=2),
            pytest.raises(ModuleNotFoundError, match=r"Image\(pip=\[\"threadpoolctl\"\]\)"),
        ):
            Parallel(n_jobs=2)(delayed(abs)(i) for i in range(3))
        assert Parallel(n_jobs=2)(delayed(abs)(i) for i in range(3)) == [0, 1, 2]


# The tests above open their own pools; those below share one, during which the test kit looks for no leftovers.


@pytest.fixture(scope="module", params=["thread", "process"])
def limited_pool(request):
    """One node with two workers."""
    with sky.pool(worker=sky.Worker(concurrency=2, executor=request.param)) as pool:
        yield pool


@pytest.fixture
def shared_pool(limited_pool):
    """Override: tests here share a pool that is joblib's default."""
    return limited_pool


def threads_of_libraries(_=None):
    """Give file → threads, as seen by the thread that runs this, with numpy's BLAS and scikit-learn's OpenMP loaded."""
    import numpy  # noqa: F401
    import sklearn.utils._openmp_helpers  # noqa: F401
    from threadpoolctl import threadpool_info

    found = {library["filepath"]: library["num_threads"] for library in threadpool_info()}
    assert {library["user_api"] for library in threadpool_info()} == {"blas", "openmp"}
    return found


@pytest.mark.parametrize("threads", [1, 3])
def test_inner_threads_are_limited_in_every_library(shared_pool, threads):
    """In each task of the call every library has the limit, and before and after the call its default."""
    calls = [delayed(threads_of_libraries)(i) for i in range(20)]
    before = Parallel(n_jobs=-1, batch_size=1)(calls)
    with parallel_config(backend="skyward", inner_max_num_threads=threads):
        within = Parallel(n_jobs=-1, batch_size=1)(calls)
    after = Parallel(n_jobs=-1, batch_size=1)(calls)
    assert {number for found in within for number in found.values()} == {threads}
    assert all(found == before[0] for found in before + after)


@pytest.mark.skipif(JOBLIB < (1, 5), reason="before joblib 1.5 Parallel takes no parameters for its backend")
def test_inner_threads_as_a_parameter_of_parallel(shared_pool):
    """`Parallel(inner_max_num_threads=)` limits the one call."""
    found = Parallel(n_jobs=2, inner_max_num_threads=3)(delayed(threads_of_libraries)(i) for i in range(4))
    assert {number for threads in found for number in threads.values()} == {3}


def overlapping():
    """Run two limited batches that overlap, in this process; the threads of BLAS in the course of it."""
    import numpy  # noqa: F401
    from threadpoolctl import threadpool_info

    seen = []
    entered, leave = threading.Event(), threading.Event()

    def look():
        seen.append({library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"})

    def long():
        entered.set()
        leave.wait(20)
        look()

    def short():
        entered.wait(20)
        look()

    look()
    first = threading.Thread(target=run_limited, args=(4, [(long, (), {})], []))
    first.start()
    run_limited(3, [(short, (), {})], [])
    look()
    leave.set()
    first.join(20)
    look()
    return seen, builtins.__import__.__name__


def test_inner_threads_of_concurrent_batches(shared_pool):
    """BLAS has one limit per process: the strictest of concurrent batches holds, and the last one's end restores the
    default.
    """
    (default, both, one_left, last_look, after), importer = shared_pool.submit(overlapping).result(30)
    assert both == {3}
    assert one_left == last_look == {4}
    assert after == default
    assert importer == "__import__"


def test_inner_threads_limit_of_another_thread_is_replaced(shared_pool):
    """threadpoolctl 3.8 lets one thread own OpenBLAS; batches on other threads are limited all the same."""

    def owned():
        import numpy  # noqa: F401
        from threadpoolctl import threadpool_info, threadpool_limits

        done, release = threading.Event(), threading.Event()

        def own():
            with threadpool_limits(2):
                done.set()
                release.wait(20)

        owner = threading.Thread(target=own)
        owner.start()
        done.wait(20)
        found = []
        run_limited(3, [(lambda: found.extend(threadpool_info()), (), {})], [])
        release.set()
        owner.join(20)
        return {library["num_threads"] for library in found}

    assert shared_pool.submit(owned).result(30) == {3}


def test_inner_threads_without_a_limit_send_a_plain_batch(shared_pool):
    """Without the parameter the batch that travels is joblib's own."""
    sent = []

    send = CompletionQueue.send

    def spy(queue, batch, kind, pickled, *more):
        sent.append(pickle.loads(pickled))
        return send(queue, batch, kind, pickled, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompletionQueue, "send", spy)
        Parallel(n_jobs=2)(delayed(abs)(i) for i in range(1))
    assert sent == [[(abs, (0,), {})]]


def test_inner_threads_below_one_are_refused(shared_pool):
    """A limit below one is an error, as joblib leaves this check to its backends."""
    with parallel_config(backend="skyward", inner_max_num_threads=0), pytest.raises(ValueError, match="at least 1"):
        Parallel(n_jobs=2)(delayed(abs)(i) for i in range(3))
