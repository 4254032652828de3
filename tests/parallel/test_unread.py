"""Generators whose consumer is slow: the client holds a bounded part of the results, and nobody else waits for it."""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Iterator

import joblib
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from processes import eventually
from skyward_lite.client import joblib_unread
from task_functions import wait_for

MAX_UNREAD = 1 << 20
SIZE = 50_000
"""Bytes of one result."""
AHEAD = MAX_UNREAD // SIZE + 1 + 3 * 2 * 2
"""Results beyond those that were read: as many as may be unread, and those that joblib has dispatched by then."""

KINDS = ["generator"]
if tuple(map(int, joblib.__version__.split(".")[:2])) >= (1, 4):
    KINDS.append("generator_unordered")


@pytest.fixture(scope="module")
def _pool() -> Iterator[sky.ComputePool]:
    with sky.pool(worker=sky.Worker(concurrency=2)) as pool:
        yield pool


@pytest.fixture
def pool(_pool: sky.ComputePool, monkeypatch: pytest.MonkeyPatch) -> sky.ComputePool:
    """A pool whose clients hold little, so that tests need little."""
    monkeypatch.setattr(joblib_unread, "MAX_UNREAD_BYTES", MAX_UNREAD)
    return _pool


class Input:
    """An endless input, or one of `count` calls, whose call i returns i as `SIZE` bytes. Counts what was drawn."""

    def __init__(self, count: int | None = None) -> None:
        self.drawn = 0
        self.count = count

    def __iter__(self):
        for i in itertools.count() if self.count is None else range(self.count):
            self.drawn += 1
            yield delayed(int.to_bytes)(i, SIZE, "big")

    def is_still(self) -> bool:
        """Return whether nothing is drawn for a while."""
        drawn = self.drawn
        time.sleep(0.3)
        return self.drawn == drawn


def numbers(results):
    return [int.from_bytes(result, "big") for result in results]


@pytest.mark.parametrize("return_as", KINDS)
def test_endless_input_is_not_read_far_ahead_of_its_consumer(pool, return_as):
    """While the consumer sleeps, an endless input is read for a bounded number of bytes of results, time and again."""
    calls = Input()
    results = Parallel(n_jobs=2, return_as=return_as, batch_size=1)(calls)
    got = []
    for reads in (1, 10, 200, 1):
        got += numbers(itertools.islice(results, reads))
        assert eventually(calls.is_still, 20)
        assert len(got) + MAX_UNREAD // SIZE / 2 < calls.drawn < len(got) + AHEAD
        # Others, and the node's heartbeats, go on meanwhile.
        assert len(pool.submit(bytes, 3 * MAX_UNREAD).result(20)) == 3 * MAX_UNREAD
        assert pool.nodes()[0].state == "ready"
    with pytest.warns(UserWarning, match="successfully executed"):
        results.close()
    assert (got if return_as == "generator" else sorted(got))[:150] == list(range(150))


@pytest.mark.parametrize("return_as", KINDS)
def test_each_result_of_a_slow_consumer_is_read_once(pool, return_as):
    """A consumer that computes on the same pool between its reads, other generators' results too, gets all once."""
    outer, inner = Input(120), Parallel(n_jobs=2, return_as=return_as)(Input(60))
    got, of_inner = [], []
    for i, result in enumerate(Parallel(n_jobs=2, return_as=return_as)(outer)):
        got += numbers([result])
        if i % 20 == 0:
            assert Parallel(n_jobs=2)(delayed(operator.neg)(k) for k in range(3)) == [0, -1, -2]
            of_inner += numbers(itertools.islice(inner, 10))
    assert sorted(got) == list(range(120))
    assert sorted(of_inner) == list(range(60))
    if return_as == "generator":
        assert (got, of_inner) == (sorted(got), sorted(of_inner))


def test_slow_task_at_the_head_holds_up_an_endless_input(pool, tmp_path):
    """While the consumer waits for the next result in order, later ones are computed for a bounded number of bytes."""
    calls, gate = Input(), tmp_path / "gate"
    first = [delayed(wait_for)(str(gate))]
    results = Parallel(n_jobs=2, return_as="generator", batch_size=1)(itertools.chain(first, calls))
    assert eventually(calls.is_still, 20)
    assert MAX_UNREAD // SIZE / 2 < calls.drawn < AHEAD
    gate.touch()
    assert next(results) == str(gate)
    assert numbers(itertools.islice(results, 100)) == list(range(100))
    with pytest.warns(UserWarning, match="successfully executed"):
        results.close()


@pytest.mark.parametrize("return_as", KINDS)
def test_results_that_wait_can_be_read_after_the_block(pool, return_as):
    """Who leaves the block without having read gets all results of a finite input afterwards."""
    with sky.pool(worker=sky.Worker(concurrency=2)):
        calls = Input(100)
        results = Parallel(n_jobs=2, return_as=return_as, batch_size=1)(calls)
        assert eventually(calls.is_still, 20)
        assert calls.drawn < AHEAD
    assert sorted(numbers(results)) == list(range(100))


def test_failure_is_raised_although_results_wait(pool, tmp_path):
    """A task that fails ends the call at once, whatever waits to be read."""
    gate = tmp_path / "gate"

    def fail():
        wait_for(str(gate))
        raise KeyError("late")

    calls = Input()
    results = Parallel(n_jobs=2, return_as="generator", batch_size=1)(
        itertools.chain(iter(Input(3)), [delayed(fail)()], calls)
    )
    assert eventually(calls.is_still, 20)
    gate.touch()
    with pytest.raises(KeyError, match="late"):
        assert eventually(lambda: next(results) is None, 20)
