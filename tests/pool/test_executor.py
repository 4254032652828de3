"""A pool and its futures in the place of a `concurrent.futures.Executor` and its futures: asyncio, scipy, `wait`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import operator
import os
import sys
import time

import pytest
import skyward_lite as sky
from scipy.optimize import differential_evolution, rosen
from task_functions import fail, wait_for


def test_asyncio_awaits_the_futures(either_pool):
    """`asyncio.wrap_future` gives values and errors of the pool's futures, and many can be gathered."""

    async def main() -> None:
        assert await asyncio.wrap_future(either_pool.submit(operator.neg, 1)) == -1
        with pytest.raises(ValueError, match="boom") as caught:
            await asyncio.wrap_future(either_pool.submit(fail, "boom"))
        assert isinstance(caught.value.__cause__, sky.RemoteTraceback)
        futures = [asyncio.wrap_future(either_pool.submit(operator.neg, i)) for i in range(100)]
        assert await asyncio.gather(*futures) == [-i for i in range(100)]

    asyncio.run(main())


def test_asyncio_run_in_executor(either_pool):
    """`loop.run_in_executor` takes the pool as its executor."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(either_pool, os.getpid) != os.getpid()
        assert await asyncio.gather(*[loop.run_in_executor(either_pool, pow, i, 2) for i in range(50)]) == [
            i**2 for i in range(50)
        ]

    asyncio.run(main())


def test_asyncio_cancels_a_task_that_has_not_started(tmp_path):
    """Cancelling the awaiting asyncio task cancels the pool's task, which never runs."""
    path = tmp_path / "gate"
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:

        async def main() -> None:
            running = pool.submit(wait_for, str(path))
            behind = [pool.submit(operator.neg, i) for i in range(50)]
            wrapped = asyncio.wrap_future(behind[-1])
            wrapped.cancel()
            with pytest.raises(asyncio.CancelledError):
                await wrapped
            path.touch()
            assert await asyncio.wrap_future(running) == str(path)
            # asyncio passes the cancellation on in a turn of its loop, which has passed by now.
            assert behind[-1].cancelled()

        asyncio.run(main())


def test_wait_and_as_completed(shared_pool, tmp_path):
    """`wait` and `as_completed` work with all conditions, and mixed with other executors' futures."""
    path = tmp_path / "gate"
    slow = shared_pool.submit(wait_for, str(path))
    quick = shared_pool.submit(operator.neg, 1)
    done, pending = concurrent.futures.wait([slow, quick], 10, concurrent.futures.FIRST_COMPLETED)
    assert (done, pending) == ({quick}, {slow})
    bad = shared_pool.submit(fail, "boom")
    done, pending = concurrent.futures.wait([slow, bad], 10, concurrent.futures.FIRST_EXCEPTION)
    assert (done, pending) == ({bad}, {slow})
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        other = threads.submit(path.touch)
        assert set(concurrent.futures.as_completed([slow, quick, bad, other], 10)) == {slow, quick, bad, other}
    assert slow.result() == str(path)
    with pytest.raises(TimeoutError):
        shared_pool.submit(wait_for, str(path) + "2").result(0)
    (tmp_path / "gate2").touch()


def test_submit_in_a_callback(shared_pool):
    """A future's callback may submit; it runs on the thread that resolves futures, which never waits."""
    second: concurrent.futures.Future[int] = concurrent.futures.Future()

    def go_on(first):
        shared_pool.submit(operator.neg, first.result()).add_done_callback(lambda f: second.set_result(f.result()))

    shared_pool.submit(operator.neg, 3).add_done_callback(go_on)
    assert second.result(10) == 3


def test_scipy_takes_pool_map_as_workers(either_pool):
    """`differential_evolution` finds with `workers=pool.map` what it finds alone."""

    def solve(workers: object) -> object:
        bounds = [(-2.0, 2.0)] * 3
        return differential_evolution(rosen, bounds, rng=7, maxiter=8, popsize=6, updating="deferred", workers=workers)

    alone, pooled = solve(1), solve(either_pool.map)
    assert (pooled.x == alone.x).all()
    assert (pooled.fun, pooled.nfev, pooled.nit) == (alone.fun, alone.nfev, alone.nit)


@pytest.mark.slow
def test_map_chunk_calls_are_separate_tasks():
    """Each call of a chunk of `map` is a task of its own for plugins and for the time limit."""

    def twice(fn):
        return lambda *args: 2 * fn(*args)

    def nap(i):
        time.sleep(0.4)
        return i

    worker = sky.Worker(concurrency=1, task_timeout=1)
    with sky.pool(worker=worker, plugins=[sky.Plugin("twice", decorate=twice)]) as pool:
        assert list(pool.map(nap, range(4), chunksize=4)) == [0, 2, 4, 6]


def test_map_runs_on_a_node_without_joblib():
    """A node needs only the packages that its tasks import."""

    def forget():
        sys.modules["joblib"] = None

    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pool.submit(forget).result(20)
        assert list(pool.map(abs, [-1, -2], chunksize=2)) == [1, 2]
