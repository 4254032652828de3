"""Arguments of tasks: each task has its own at any batch size, and what a batch shares travels once."""

from __future__ import annotations

import functools
import gc
import operator
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from skyward_lite.pickling import batches, payload

CALLS = 12
SMALL = np.zeros(3)


@pytest.fixture(scope="module", params=["thread", "process"])
def pool(request):
    """One node that is joblib's backend, with each executor."""
    with sky.pool(worker=sky.Worker(concurrency=2, executor=request.param)) as pool:
        yield pool


@pytest.fixture
def shared_pool():
    """Pools of this module outlive its tests; nothing else is left behind."""


pytestmark = pytest.mark.usefixtures("shared_pool")


def draw(random, *_):
    return random.randint(1 << 30)


def append(values, i):
    values.append(i)
    return list(values)


def add(array, i):
    array += i
    return array.sum()


def count(mapping, i):
    mapping["n"] += 1
    return mapping["n"], i


class Counter:
    def __init__(self):
        self.n = 0

    def up(self, _):
        self.n += 1
        return self.n

    def __call__(self, _):
        return self.up(_)


def changing():
    """Calls that share something which each of them changes."""
    large = np.zeros(50_000)
    counter = Counter()
    nested = {"n": 0, "inner": [large]}
    return {
        "RandomState": (draw, [(np.random.RandomState(0),)] * CALLS),
        "Generator": (lambda g: g.integers(1 << 30), [(np.random.default_rng(0),)] * CALLS),
        "list": (append, [(values, i) for values in [[]] for i in range(CALLS)]),
        "small array": (add, [(array, i) for array in [np.zeros(10)] for i in range(CALLS)]),
        "large array": (add, [(large, i) for i in range(CALLS)]),
        "F order": (add, [(array, i) for array in [np.zeros((500, 100), order="F")] for i in range(CALLS)]),
        "in pieces": (add, [(array, i) for array in [np.zeros((500, 200))[:, ::2]] for i in range(CALLS)]),
        "dict": (count, [(mapping, i) for mapping in [{"n": 0}] for i in range(CALLS)]),
        "nested": (lambda m, i: add(m["inner"][0], i), [(nested, i) for i in range(CALLS)]),
        "bound method": (counter.up, [(i,) for i in range(CALLS)]),
        "callable": (counter, [(i,) for i in range(CALLS)]),
        "partial": (functools.partial(append, [7]), [(i,) for i in range(CALLS)]),
        "tuple": (lambda t, i: append(t[0], i), [(values, i) for values in [([],)] for i in range(CALLS)]),
        "bytearray": (append, [(values, i) for values in [bytearray(b"x")] for i in range(CALLS)]),
    }


@pytest.mark.parametrize("what", list(changing()))
@pytest.mark.parametrize("batch_size", [1, 5, CALLS, "auto"])
def test_changed_argument_is_not_seen_by_other_tasks(pool, what, batch_size):
    """Tasks that change an argument which a batch shares give the results of tasks that each have a copy."""
    function, calls = changing()[what]
    alone = [pool.submit(function, *args).result(20) for args in calls]
    assert Parallel(n_jobs=-1, batch_size=batch_size)(delayed(function)(*args) for args in calls) == alone
    assert list(pool.map(function, *zip(*calls, strict=True), chunksize=5)) == alone


def test_changed_keyword_argument_is_not_seen_by_other_tasks(pool):
    """Tasks that change a keyword argument give the results of tasks that each have a copy."""
    shared: dict[str, Any] = {"values": []}
    got = Parallel(n_jobs=1 + 1, batch_size=4)(delayed(append)(i=i, **shared) for i in range(8))
    assert got == [[i] for i in range(8)]


def test_argument_passed_twice_to_one_task_stays_one_object(pool):
    """An object that a task gets twice is one object there, and views of the same memory share it."""
    array = np.zeros(50_000)

    def same(a, b, c, view, i):
        a += 1
        return a is b, c[0] is a, float(b[0]), float(view[0])

    got = Parallel(n_jobs=2, batch_size=4)(delayed(same)(array, array, [array], array[:], i) for i in range(4))
    assert [row[:3] for row in got] == [(True, True, 1.0)] * 4
    assert array.sum() == 0


def test_functions_and_classes_of_a_batch_are_shared(pool):
    """A batch has one function and one class of each kind, and their definitions travel once."""

    class Local:
        text = "x" * 30_000

        def __init__(self, i):
            self.i = i

    def function(local, helper, i):
        return type(local), id(helper)

    calls = [(function, (Local(i), len, i), {}) for i in range(50)]
    pickled, buffers = batches.dump(payload.Encoder(1 << 30), calls)
    assert payload.size(pickled, buffers) < 60_000
    got = Parallel(n_jobs=2, batch_size=50)(delayed(function)(*args) for _, args, _ in calls)
    assert {kind for kind, _ in got} == {Local}
    # Of each process.
    assert len({helper for _, helper in got}) <= 2


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(100_000),
        np.zeros((1000, 100), order="F"),
        np.zeros((1000, 200))[:, ::2],
        bytes(800_000),
        "x" * 800_000,
    ],
    ids=["array", "F order", "in pieces", "bytes", "str"],
)
def test_large_argument_travels_once_per_batch(value):
    """A large argument travels once however many calls of the batch have it, by position or by keyword."""
    calls = [(append, ([value] if isinstance(value, np.ndarray) else value, i), {"more": value}) for i in range(20)]
    pickled, buffers = batches.dump(payload.Encoder(1 << 30), calls)
    assert payload.size(pickled, buffers) < 1_700_000
    for (_, (first, number), kwargs), i in zip(payload.loads(pickled, buffers), range(20), strict=True):
        assert number == i
        assert np.array_equal(np.asarray(first).ravel(), np.asarray([value]).ravel())
        assert np.array_equal(kwargs["more"], value)


def test_last_task_takes_an_array_without_a_copy(pool):
    """Arrays of a batch are writable, and an array that a single task has is not copied."""
    arrays = [np.full(10_000, i) for i in range(6)]

    def change(array, i):
        array[:] += 1
        return array.flags.writeable, int(array.sum())

    got = Parallel(n_jobs=2, batch_size=3)(delayed(change)(array, i) for i, array in enumerate(arrays))
    assert got == [(True, 10_000 * (i + 1)) for i in range(6)]


def test_read_only_arrays_stay_read_only(pool):
    """Read-only arrays arrive read-only, in a batch as alone, and the tasks of a batch share them."""
    array = np.arange(50_000)
    array.setflags(write=False)
    got = Parallel(n_jobs=2, batch_size=3)(delayed(lambda a, i: (a.flags.writeable, a[i]))(array, i) for i in range(6))
    assert got == [(False, i) for i in range(6)]


ONE = [1]


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ((1, 2.0, "x", b"y", None, True, 3j, (1, ("a",)), frozenset({1}), range(3)), (1,), True),
        ((np.float64(1), np.int8(2)), (np.float64(1),), True),
        ((len, operator.neg, dict), (len,), True),
        (([1], {"a": [2]}, {3}, bytearray(b"x")), ([1], {"a": [2]}, {3}), True),
        ((np.zeros(1),), (np.zeros(1),), True),
        ((ONE,), (ONE,), False),
        (({"a": (ONE,)},), ([ONE],), False),
        ((ONE, ONE), (1,), False),
        (([list(range(100))],), (1,), False),
        ((SMALL,), (SMALL,), False),
        ((np.array([ONE], dtype=object),), (1,), False),
        ((object(),), (1,), False),
        ((ONE.append,), (1,), False),
    ],
)
def test_batch_without_mutable_shared_arguments_is_a_plain_pickle(first, second, together):
    """Calls that share nothing which could change are one ordinary pickle."""
    for calls in (
        [(print, first, {}), (print, second, {})],
        [(print, (), {"x": first}), (print, (), {"x": second})],
    ):
        pickled, _ = batches.dump(payload.Encoder(1 << 30), calls)
        assert (b"skyward_lite" not in pickled) is together


def test_argument_that_contains_itself(pool):
    """A list that contains itself arrives as such in a batch, and the search for shared objects ends."""
    loop: list[Any] = []
    loop.append(loop)
    got = list(
        pool.map(lambda value, i: (value[0] is value, value.append(i), len(value)), [loop] * 4, range(4), chunksize=4)
    )
    assert got == [(True, None, 2)] * 4


def test_argument_that_cannot_be_rebuilt_fails_its_own_call(pool):
    """The calls before a call whose argument cannot be rebuilt have run; the error says that this call was not
    rebuilt.
    """

    class Bad:
        def __reduce__(self):
            return int, ("no number",)

    with pytest.raises(ValueError, match="no number") as caught:
        Parallel(n_jobs=2, batch_size=4)(delayed(append)([Bad()] if i == 2 else [], i) for i in range(4))
    (note,) = caught.value.__notes__
    assert "task 2" in note
    assert "could not be rebuilt" in note


COLLECTED = """
import gc
import numpy as np
from skyward_lite import PayloadTooLargeError
from skyward_lite.pickling import batches, payload

encoder = payload.Encoder(1 << 16)
for _ in range(300):
    cycle = []
    try:
        batches.dump(encoder, [(np.sum, (np.zeros(5000),), {}) for _ in range(10)])
    except PayloadTooLargeError as error:
        cycle += [error, cycle]
gc.collect()
"""


def test_batch_in_a_reference_cycle_is_collected():
    """The garbage collector frees a batch that an error's traceback refers to, without a crash or a complaint."""
    run = subprocess.run([sys.executable, "-c", COLLECTED], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")


def test_pickled_batch_is_freed_at_once():
    """The arrays of a pickled batch are freed without the garbage collector."""
    arrays = [np.zeros(5000) for _ in range(3)]
    gone = [weakref.ref(array) for array in arrays]
    gc.disable()
    try:
        batches.dump(payload.Encoder(1 << 20), [(np.sum, (array,), {}) for array in arrays])
        del arrays
        assert [reference() for reference in gone] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("batch_size", [1, 2, 6, "auto"])
def test_overlapping_arrays_are_separate_at_any_batch_size(pool, batch_size):
    """Two arrays of one call, one a view of the other, have separate memory at the worker, in a batch as alone."""
    array = np.ones((100, 100))

    def change(a, b, i):
        a -= 1
        return float(b.sum())

    got = Parallel(n_jobs=2, batch_size=batch_size)(delayed(change)(array, array.T, i) for i in range(12))
    assert got == [10_000.0] * 12


def test_buffers_beyond_the_limit_are_not_shared_between_calls(pool):
    """Each call has its own buffers, also those which stay in the pickle because a message has too many."""
    arrays = [np.ones(2048) for _ in range(1010)]

    def change(array):
        array += 1
        return float(array[0])

    assert set(pool.map(change, arrays * 2, chunksize=2020)) == {2.0}
