"""What a pool tells of its tasks while they run and when they have ended: `Future.running()` and `pool.status()`."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from skyward_lite import _core
from skyward_lite.client import records
from skyward_lite.client.function_names import FunctionNames
from skyward_lite.client.tasks import Tasks
from task_functions import fail, wait_for


@pytest.fixture(scope="module", params=["thread", "process"])
def pool(request) -> Iterator[sky.ComputePool]:
    """A pool of two nodes, each with two slots."""
    with sky.pool(sky.Local(2), worker=sky.Worker(concurrency=2, executor=request.param)) as opened:
        yield opened


def becomes(condition: Callable[[], object]) -> bool:
    """Wait until a condition holds, for as long as the test may take."""
    while not condition():
        time.sleep(0.01)
    return True


@sky.compute
def waiting(path: str) -> str:
    """Wait until the file exists."""
    return wait_for(path)


def test_a_future_runs_from_its_task_s_beginning_to_its_end(pool, tmp_path):
    """Tasks in slots run and those behind them do not; a group runs while a member does; an ended task does not run."""
    paths = [str(tmp_path / str(number)) for number in range(12)]
    futures = [pool.submit(wait_for, path) for path in paths[:-2]]
    group = (waiting(paths[-2]) & waiting(paths[-1])) > pool
    assert not futures[-1].running()
    assert becomes(lambda: sum(future.running() for future in futures) == 4)
    status = pool.status()
    assert (status.running, status.queued, status.pending, status.slots) == (4, 8, 12, 4)
    assert [(node.running, node.slots) for node in status.nodes] == [(2, 2), (2, 2)]
    assert not group.running()
    for path in paths[:-2]:
        open(path, "w").close()
    assert becomes(group.running)
    assert [future.result(20) for future in futures] == paths[:-2]
    assert not any(future.running() for future in futures)
    for path in paths[-2:]:
        open(path, "w").close()
    assert group.result(20) == tuple(paths[-2:])
    assert not group.running()


@pytest.mark.parametrize("batch_size", [1, 7, "auto"])
def test_calls_are_counted_whatever_the_batches(pool, batch_size):
    """Status counts calls: of `Parallel` in batches of any size, of `map` in chunks, and single ones."""
    before = pool.status()
    Parallel(n_jobs=-1, batch_size=batch_size)(delayed(abs)(number) for number in range(500))
    list(pool.map(abs, range(100), chunksize=9))
    pool.submit(abs, 1).result(20)
    after = pool.status()
    assert (after.done - before.done, after.failed - before.failed, after.pending) == (601, 0, 0)
    assert sum(node.done for node in after.nodes) == after.done
    assert after.payload_sent - before.payload_sent > 0
    assert after.payload_received - before.payload_received > 0
    assert after.bytes_sent > before.bytes_sent
    assert after.bytes_received > before.bytes_received
    assert after.seconds > before.seconds


@pytest.mark.parametrize("pre_dispatch", ["2 * n_jobs", 30])
def test_calls_that_wait_here_are_counted(pool, tmp_path, pre_dispatch):
    """The display counts calls that wait here: in batches above `n_jobs`, and in an input of known length."""
    before = pool._display.counts()
    gate = str(tmp_path / "gate")
    parallel = Parallel(n_jobs=2, batch_size=3, pre_dispatch=pre_dispatch, return_as="generator")
    values = parallel([delayed(wait_for)(gate)] * 50)
    try:
        counts = pool._display.counts()
    finally:
        open(gate, "w").close()
    assert (counts.submitted - before.submitted, counts.is_complete) == (50, True)
    assert list(values) == [gate] * 50
    after = pool._display.counts()
    assert (after.submitted - before.submitted, after.done - before.done) == (50, 50)


def test_an_automatic_batch_that_is_given_back_in_part_counts_once(pool):
    """Calls of a batch that becomes slow go back, and are counted when they have run."""
    before = pool.status().done
    slow = Parallel(n_jobs=2, batch_size="auto")
    slow(delayed(time.sleep)(0.0 if number < 2000 else 0.02) for number in range(2040))
    assert pool.status().done - before == 2040


def test_failures_are_counted(pool):
    """A call that raises has ended and failed; one that is cancelled while it waits has done neither."""
    before = pool.status()
    failed = pool.submit(fail, "counted")
    assert str(failed.exception(20)) == "counted"
    with pytest.raises(ValueError, match="counted"):
        list(pool.map(fail, ["counted", "not run"], chunksize=2))
    after = pool.status()
    assert (after.done - before.done, after.failed - before.failed) == (2, 2)


def test_a_crash_and_a_lost_node_are_counted(tmp_path):
    """A task whose process dies has failed. What a lost node ran runs again, and counts once when it has ended."""
    path = str(tmp_path / "go")
    with sky.pool(sky.Local(2), worker=sky.Worker(concurrency=1, executor="process")) as pool:
        assert isinstance(pool.submit(os.kill, 0, signal.SIGKILL).exception(20), sky.WorkerCrashedError)
        assert (pool.status().done, pool.status().failed) == (1, 1)
        futures = [pool.submit(wait_for, path) for _ in range(2)]
        assert becomes(lambda: all(future.running() for future in futures))
        lost = pool.nodes()[0]
        os.kill(lost.pid, signal.SIGKILL)
        assert becomes(lambda: pool.status().rerun == 1)
        open(path, "w").close()
        assert [future.result(20) for future in futures] == [path] * 2
        status = pool.status()
        assert (status.done, status.failed, status.rerun, status.nodes[0].rerun) == (3, 1, 1, 1)
    assert pool.status().done == 3


def test_records_of_attempts(pool):
    """Each attempt is recorded with its function's name, its slot, and a time within the run."""
    core, names = Tasks.of(pool).core, Tasks.of(pool).names
    seen, _ = core.records(2**64 - 1)
    pool.submit(time.sleep, 0.05).result(20)
    first, packed = core.records(seen)
    [record] = records.decode(packed)
    assert first == seen
    assert (record.calls, names.names[record.name], record.outcome) == (1, "time.sleep", _core.RETURNED)
    assert 50_000_000 <= record.duration <= record.end <= core.totals()["seconds"] * 1e9
    assert min(record.sent, record.received) > 0
    assert record.place % (1 << _core.SLOT_BITS) < 2
    assert record.node in (0, 1)
    assert core.records(first + 1) == (first + 1, b"")


def test_names_of_functions():
    """Functions are named by module and name; callables without a name by what they call, or by their type."""

    class Hostile:
        def __getattr__(self, name):
            raise RuntimeError(name)

        def __call__(self) -> None: ...

    names = FunctionNames()
    numbers = [names.number(f) for f in (abs, functools.partial(functools.partial(abs), 1), time.sleep, abs, Hostile())]
    assert [names.names[number] for number in numbers[:4]] == [
        "builtins.abs",
        "builtins.abs",
        "time.sleep",
        "builtins.abs",
    ]
    assert names.names[numbers[4]] in ("", f"{__name__}.test_names_of_functions.<locals>.Hostile")
