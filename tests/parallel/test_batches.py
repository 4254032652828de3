"""Automatic batches that travel in parts: those that are too large, and those that run for too long."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
from pathlib import Path

import joblib
import numpy as np
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from skyward_lite.client import joblib_batches as batches
from skyward_lite.client.joblib_backend import SkywardBackend

JOBLIB = tuple(int(part) for part in joblib.__version__.split(".")[:2])

LONG = 0.25
"""Seconds that a call takes after which its batch is given back."""
assert batches.PATIENCE * SkywardBackend.MAX_IDEAL_BATCH_DURATION < LONG


class Ten(SkywardBackend):
    """The pool's backend, with automatic batches of ten calls."""

    def compute_batch_size(self):
        """Whatever the tasks take."""
        return 10

    def start_call(self):
        """Whatever the round trip takes, on a loaded machine."""
        super().start_call()
        self.MIN_IDEAL_BATCH_DURATION = SkywardBackend.MIN_IDEAL_BATCH_DURATION
        self.MAX_IDEAL_BATCH_DURATION = SkywardBackend.MAX_IDEAL_BATCH_DURATION


@pytest.fixture(scope="module", params=["thread", "process"])
def pool(request):
    """Four slots, and no more than 1 MiB in a message."""
    with sky.pool(worker=sky.Worker(concurrency=4, executor=request.param, max_payload=1 << 20)) as pool:
        yield pool


def parallel(pool, **options):
    """Make a `Parallel` whose automatic batches have ten calls, if it gets ten for each slot."""
    return Parallel(**{"n_jobs": -1, "pre_dispatch": "all", "backend": Ten(pool=pool), **options})


def meet(directory, name, others):
    """Note that this call has begun; wait until so many have."""
    Path(directory, str(name)).touch()
    deadline = time.monotonic() + 20
    while len(os.listdir(directory)) < others:
        if time.monotonic() > deadline:
            raise TimeoutError(f"call {name} has met only {os.listdir(directory)}")
        time.sleep(0.005)
    return name


def work(i, directory, log):
    """The first call is long. The next four, of the same batch, wait for one another."""
    with open(log, "a") as file:
        file.write(f"{i}\n")
    if i == 0:
        time.sleep(LONG)
    elif i < 5:
        meet(directory, i, 4)
    return -i


def ran(log):
    """Say which calls ran, in order; one that ran twice is there twice."""
    return sorted(int(line) for line in log.read_text().split())


@pytest.mark.parametrize("options", [{}, {"return_as": "generator"}], ids=str)
def test_calls_of_a_long_batch_run_on_other_slots(pool, tmp_path, options):
    """Calls that a long batch has not begun are given back and run on other slots, once each, with results in order."""
    directory = tmp_path / "met"
    directory.mkdir()
    log = tmp_path / "log"
    results = parallel(pool, **options)(delayed(work)(i, str(directory), str(log)) for i in range(40))
    assert list(results) == [-i for i in range(40)]
    assert ran(log) == list(range(40))


@pytest.mark.skipif(JOBLIB < (1, 4), reason="joblib 1.4")
def test_results_of_a_split_batch_with_generator_unordered(pool, tmp_path):
    """`generator_unordered` gets a batch's values once each, when the batch is complete."""
    directory = tmp_path / "met"
    directory.mkdir()
    results = parallel(pool, return_as="generator_unordered")(
        delayed(work)(i, str(directory), str(tmp_path / "log")) for i in range(40)
    )
    assert sorted(results) == sorted(-i for i in range(40))


def test_slow_tasks_between_fast_ones_run_at_once(pool, tmp_path):
    """Slow tasks in automatic batches that were sized for fast ones are spread, so that four run at once."""

    def task(i):
        if 2000 <= i < 2020:
            # The first calls of a batch wait in vain for company.
            mine = Path(tmp_path, str(i))
            mine.touch()
            deadline = time.monotonic() + LONG
            while time.monotonic() < deadline:
                if len(list(Path(tmp_path).glob("2*"))) == 4:
                    Path(tmp_path, "met").touch()
                time.sleep(0.005)
            mine.unlink()
        return i

    calls = (delayed(task)(i) for i in range(4000))
    assert Parallel(n_jobs=-1, backend=SkywardBackend(pool=pool))(calls) == list(range(4000))
    assert (tmp_path / "met").exists()


def test_batches_of_a_chosen_size_stay_whole(pool):
    """With `batch_size=10` the calls of a batch run one after the other in one thread, however long they take."""

    def task(i):
        if i % 10 == 0:
            time.sleep(LONG)
        return os.getpid(), threading.get_ident()

    ran = parallel(pool, batch_size=10)(delayed(task)(i) for i in range(40))
    assert all(len(set(ran[first : first + 10])) == 1 for first in range(0, 40, 10))


@pytest.mark.parametrize("n_jobs", [2, 3])
def test_parts_of_long_batches_keep_to_n_jobs(pool, n_jobs):
    """While batches are given back, `n_jobs` calls run at once and no more."""

    def task(i):
        begun = time.monotonic()
        time.sleep(LONG if i % 10 == 0 else 0.02)
        return begun, time.monotonic()

    spans = parallel(pool, n_jobs=n_jobs)(delayed(task)(i) for i in range(10 * n_jobs))
    # At each begin, how many have begun and not ended.
    most = max(sum(begun <= moment < ended for begun, ended in spans) for moment, _ in spans)
    assert most == n_jobs


def test_error_in_a_part_fails_the_parallel_call(pool):
    """An exception of a call that was given back is the `Parallel` call's, and the pool goes on."""

    def task(i):
        if i == 0:
            time.sleep(LONG)
        if i == 7:
            raise ValueError("seven")
        return i

    with pytest.raises(ValueError, match="seven"):
        parallel(pool)(delayed(task)(i) for i in range(40))
    assert parallel(pool)(delayed(abs)(i) for i in range(40)) == list(range(40))


@pytest.mark.parametrize("n_jobs", [2, -1])
def test_parts_are_aborted_with_their_parallel_call(pool, tmp_path, n_jobs):
    """When a timeout passes, calls that were given back are aborted too, and the pool is free again."""

    def task(i):
        if i == 0:
            time.sleep(LONG)
        elif i < 10:
            meet(str(tmp_path), i, 100)
        return i

    with pytest.raises(multiprocessing.TimeoutError):
        parallel(pool, n_jobs=n_jobs, timeout=1)(delayed(task)(i) for i in range(10 * (4 if n_jobs < 0 else n_jobs)))
    assert parallel(pool)(delayed(abs)(i) for i in range(40)) == list(range(40))
    # The calls that never got a slot have not run.
    assert len(os.listdir(tmp_path)) < 9


def test_worker_that_dies_of_a_part_is_named(pool):
    """A worker that a part killed is named as with any task."""

    def task(i):
        if i == 0:
            time.sleep(LONG)
        if i == 5:
            os._exit(3)
        return i

    with pytest.raises(sky.WorkerCrashedError, match="status 3"):
        parallel(pool)(delayed(task)(i) for i in range(40))
    assert parallel(pool)(delayed(abs)(i) for i in range(40)) == list(range(40))


def test_batch_with_inner_max_num_threads_is_given_back(pool, tmp_path):
    """Batches with `inner_max_num_threads` are given back in parts, too."""
    directory = tmp_path / "met"
    directory.mkdir()
    backend = Ten(pool=pool, inner_max_num_threads=1)
    calls = (delayed(work)(i, str(directory), str(tmp_path / "log")) for i in range(40))
    assert parallel(pool, backend=backend)(calls) == [-i for i in range(40)]


def test_automatic_batch_over_max_payload_is_split(pool):
    """Ten calls of 300 KB each, over the limit of 1 MiB, go in parts, and the results are a serial run's."""
    arrays = [np.full(37_500, i, "f8") for i in range(40)]
    assert parallel(pool)(delayed(np.sum)(a) for a in arrays) == [a.sum() for a in arrays]


def test_growing_automatic_batches_are_split(pool):
    """Batches that grew while calls were small are split when large calls follow."""
    sizes = [1] * 3000 + [30_000] * 40
    calls = (delayed(np.size)(np.zeros(size)) for size in sizes)
    assert Parallel(n_jobs=-1, backend=SkywardBackend(pool=pool))(calls) == sizes


def test_parts_of_a_large_batch_keep_to_n_jobs(pool):
    """With n_jobs=2 no more than two of the ten parts of a large batch run at once."""
    arrays = [np.full(100_000, i, "f8") for i in range(20)]
    assert parallel(pool, n_jobs=2)(delayed(np.sum)(a) for a in arrays) == [a.sum() for a in arrays]


def test_single_call_over_max_payload_is_an_error(pool):
    """A call that is too large by itself is an error, and other calls are not affected."""
    with pytest.raises(sky.PayloadTooLargeError, match="send less per task"):
        parallel(pool)(delayed(np.sum)(np.zeros(200_000 if i == 7 else 20_000)) for i in range(40))
    assert parallel(pool)(delayed(abs)(i) for i in range(40)) == list(range(40))


def test_chosen_batch_over_max_payload_is_an_error(pool):
    """With `batch_size=10` a batch that is too large is an error, as its size is the user's to change."""
    with pytest.raises(sky.PayloadTooLargeError, match="with 10 calls in one batch.*batch_size=1"):
        parallel(pool, batch_size=10)(delayed(np.sum)(np.zeros(30_000)) for _ in range(40))


def test_results_that_are_too_large_together_name_the_remedy(pool):
    """Results of a batch that are too large together are an error with the remedy, and the calls do not run again."""
    with pytest.raises(sky.PayloadTooLargeError, match="with 10 calls in one batch.*batch_size=1"):
        parallel(pool)(delayed(np.zeros)(30_000) for _ in range(40))


@pytest.mark.parametrize(
    ("done", "seconds", "slots", "sizes"),
    [
        (2, 0.2, 8, [1] * 98),  # slow: one by one
        (50, 0.2, 4, [1] * 50),  # 4 ms a call
        (90, 0.009, 4, [3, 3, 3, 1]),  # fast, but every slot gets a part
        (10, 0.01, 2, [2] * 45),  # as many as take 2 ms
        (10, 0.0, 2, [45, 45]),
    ],
)
def test_pieces_of_a_batch(done, seconds, slots, sizes):
    """A batch is cut into parts of about the wanted duration, with every call in one of them."""
    parts = list(batches.pieces(list(range(100)), done, seconds, 0.002, slots))
    assert [len(part) for _, part in parts] == sizes
    assert all(part[0] == first for first, part in parts)
    assert list(itertools.chain.from_iterable(part for _, part in parts)) == list(range(done, 100))
