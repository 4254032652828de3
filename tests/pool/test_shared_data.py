"""Data that tasks share: random graphs of objects arrive as they were, and no task sees what another one wrote."""

from __future__ import annotations

import collections
import hashlib
import operator
import tempfile
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
import skyward_lite as sky
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from joblib import Parallel, delayed

CALLS = 6
SIZES = (0, 1, 100, 9_000, 20_000)
"""Elements of a leaf. 20,000 numbers of eight bytes are 160,000 bytes, which are a blob; 9,000 are not."""
FEW = 20
"""Elements of a container that are looked at one by one."""

directory: Any = None
"""Where the files of memory maps are."""

bounded = settings(
    deadline=None,
    database=None,
    max_examples=12,
    print_blob=True,
    phases=[Phase.generate],  # a failure is small as it is
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module", params=["thread", "process"])
def pool(request):
    """A pool of one node as joblib's backend, with each executor."""
    with sky.pool(worker=sky.Worker(concurrency=2, executor=request.param)) as pool:
        yield pool


@pytest.fixture(scope="module", autouse=True)
def _directory(tmp_path_factory):
    global directory
    directory = tmp_path_factory.mktemp("maps")


@pytest.fixture
def shared_pool():
    """Tells the check for left processes that the pools of this file outlive its tests."""


pytestmark = pytest.mark.usefixtures("shared_pool", "functions_by_value")

# ------------------------------------------------------------------------------------------------ what is sent


class Leaf(NamedTuple):
    """From which `build` makes a leaf, every time the same."""

    kind: str
    size: int
    seed: int
    read_only: bool


class Holder:
    """An object of the script's."""

    def __init__(self, content):
        self.content = content


def mapped(values, mode, has_name):
    """Return a memory map of a new file. One that has a name is sent as its name."""
    with tempfile.NamedTemporaryFile(dir=directory, delete=not has_name) as file:
        values.tofile(file)
        file.flush()
        return np.memmap(file, mode=mode, dtype="i8")


def frame(n, seed):
    columns = {
        "number": np.arange(n) + seed / 2,
        "object": np.array([(seed, i) for i in range(n)] + [None], dtype=object)[:n],
        "text": pd.array([f"{seed} {i}" for i in range(n)], dtype=pd.ArrowDtype(pa.string())),
    }
    return pd.DataFrame(columns)


LEAVES = {
    "plain": lambda n, s: np.arange(n) * 1.5 + s,
    "shaped": lambda n, s: (np.arange(n * 2) + s).reshape(2, n),
    "sliced": lambda n, s: (np.arange(n + 20) + s)[10 : n + 10],
    "strided": lambda n, s: (np.arange(n * 3) + s)[::3],
    "reversed": lambda n, s: (np.arange(n) + s)[::-1],
    "fortran": lambda n, s: np.asfortranarray((np.arange(n * 2) + s).reshape(2, n)),
    "structured": lambda n, s: np.array([(i + s, "é") for i in range(min(n, 9_000))], [("a", "<i4"), ("b", "<U3")]),
    "complex": lambda n, s: (np.arange(n) + s) * (1 + 2j),
    "big-endian": lambda n, s: (np.arange(n) + s).astype(">f8"),
    "dates": lambda n, s: (np.arange(n) + s).astype("M8[s]"),
    "scalar": lambda n, s: np.array(n + s),
    "objects": lambda n, s: np.array([[i + s] for i in range(n)] + [None], dtype=object)[:n],
    "masked": lambda n, s: np.ma.MaskedArray(np.arange(n) + s, np.arange(n) % 3 == 0),
    "of bytes": lambda n, s: np.frombuffer(bytes([s % 256]) * (8 * n), dtype="f4"),
    "mapped": lambda n, s: mapped(np.arange(n + 1) + s, "r", has_name=True),
    "mapped copy": lambda n, s: mapped(np.arange(n + 1) + s, "c", has_name=False),
    "bytes": lambda n, s: bytes([s % 256]) * (8 * n),
    "bytearray": lambda n, s: bytearray([s % 256]) * (8 * n),
    "text": lambda n, s: f"é{s}" * n,
    "texts": lambda n, s: [f"{s} {i}" for i in range(n)],
    "mapping": lambda n, s: {f"{i}": [i, s] for i in range(n)},
    "deque": lambda n, s: collections.deque(range(s, s + n)),
    "frame": frame,
    "table": lambda n, s: pa.table({"x": np.arange(n) + s, "y": [f"{s} {i}" for i in range(n)]}).slice(n // 2),
    "sparse": lambda n, s: scipy.sparse.csr_matrix(np.arange(n, dtype="f8")[None] + s),
}


def build(leaf: Leaf) -> Any:
    made = LEAVES[leaf.kind](leaf.size, leaf.seed)
    if leaf.read_only and isinstance(made, np.ndarray):
        made.flags.writeable = False
    return made


SHAPES = {
    "bare": lambda leaves: leaves[0],
    "list": lambda leaves: [*leaves, leaves[0]],
    "dict": lambda leaves: dict(enumerate(leaves)),
    "tuple": lambda leaves: (leaves, leaves),
    "object": lambda leaves: Holder(leaves[0]),
    "cycle": lambda leaves: (cycle := [*leaves]) and (cycle.append(cycle) or cycle),
}
"""What is made of leaves: an object that may have a leaf twice, or itself."""

leaf = st.builds(Leaf, st.sampled_from(list(LEAVES)), st.sampled_from(SIZES), st.integers(0, 3), st.booleans())
arguments = st.lists(
    st.tuples(st.sampled_from(list(SHAPES)), st.lists(st.integers(0, 3), min_size=1, max_size=3)),
    min_size=1,
    max_size=3,
)


def build_all(leaves, shapes):
    """Return arguments of these shapes, which may share leaves."""
    built = list(map(build, leaves))
    return [SHAPES[shape]([built[number % len(built)] for number in numbers]) for shape, numbers in shapes]


# ------------------------------------------------------------------------------------------------ what tasks do


def digest(value):
    """Return what tells a value apart from others with another `repr`."""
    content = value if isinstance(value, bytes | bytearray) else repr(value).encode()
    return hashlib.md5(content).hexdigest()


def visit(value, write, seen):
    """Return a description of a value: equal ones for values that cannot be told apart. Write into it if `write`."""
    if isinstance(value, int | float | type(None)):
        return value
    if id(value) in seen:
        return f"as number {seen[id(value)][0]}"
    if not isinstance(value, str | bytes):
        # What is seen is kept, so that nothing else gets its `id`.
        seen[id(value)] = len(seen), value
    if isinstance(value, np.ndarray):
        return visit_array(value, write, seen)
    if isinstance(value, pd.DataFrame):
        described = [(name, str(value[name].dtype), digest(list(value[name]))) for name in value]
        if write and len(value):
            value.loc[0, "number"] = -1.0
        return described
    if isinstance(value, pa.Table):
        return str(value.schema), digest(value.to_pydict())
    if scipy.sparse.issparse(value):
        return [visit(part, write, seen) for part in (value.data, value.indices, value.indptr)], value.shape
    if isinstance(value, str | bytes | bytearray):
        described = digest(value)
        if write and isinstance(value, bytearray):
            value += b"written"
    elif isinstance(value, dict):
        described = digest(value) if len(value) > FEW else [(key, visit(value[key], write, seen)) for key in value]
        if write:
            value["written"] = 1
    elif isinstance(value, list | tuple | collections.deque):
        described = digest(value) if len(value) > FEW else [visit(each, write, seen) for each in value]
        if write and not isinstance(value, tuple):
            value.append("written")
    else:
        described = visit(value.content, write, seen)
        if write:
            value.content = "written"
    return type(value).__name__, described


def visit_array(array, write, seen):
    content = digest(array.tolist() if array.dtype.hasobject else np.ma.filled(array, 0).tobytes())
    described = str(array.dtype), array.shape, array.flags.writeable, array.flags.fnc
    if write and array.flags.writeable and array.size:
        array[(0,) * array.ndim] = None if array.dtype.hasobject else np.zeros((), array.dtype)
    return type(array).__name__, described, content


def run(given, own, i):
    """Describe the arguments, write into them, and return both descriptions and the arguments themselves."""
    before = visit([given, own], False, {})
    visit([given, own], True, {})
    return before, visit([given, own], False, {}), i, given, own


def described(results):
    return [(before, after, i, visit([given, own], False, {})) for before, after, i, given, own in results]


# ------------------------------------------------------------------------------------------------ the properties


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_shared_graphs_arrive_as_they_were(pool, batch_size):
    """Tasks that share arguments, and write into them, return what they do one by one: each has its own."""

    @bounded
    @given(st.lists(leaf, min_size=1, max_size=4), arguments, leaf)
    def check(leaves, shapes, own):
        graph = build_all(leaves, shapes)
        before = visit(graph, False, {})
        expected = described(
            run(build_all(leaves, shapes), build(own._replace(seed=own.seed + i % 2)), i) for i in range(CALLS)
        )
        owns = [build(own._replace(seed=own.seed + i % 2)) for i in range(CALLS)]
        results = Parallel(n_jobs=-1, batch_size=batch_size)(delayed(run)(graph, owns[i], i) for i in range(CALLS))
        assert described(results) == expected
        assert visit(graph, False, {}) == before

    check()


def test_equal_arguments_are_apart(pool):
    """Two equal arguments of a call are two: a task that writes into one of them finds the other unchanged."""
    leaves = [Leaf(kind, 20_000, 1, False) for kind in LEAVES]

    def write_one(one, other):
        visit(one, True, {})
        return visit(one, False, {}), visit(other, False, {})

    expected = [write_one(build(leaf), build(leaf)) for leaf in leaves]
    assert Parallel(n_jobs=-1)(delayed(write_one)(build(leaf), build(leaf)) for leaf in leaves) == expected


def test_changes_between_two_submits_are_sent(pool):
    """What the client writes into an argument after a submit is in the tasks that it submits later, and in no other."""
    values = [build(Leaf(kind, 20_000, 1, False)) for kind in LEAVES]
    expected, futures = [], []
    for _ in range(2):
        expected += [visit(value, False, {}) for value in values]
        futures += [pool.submit(visit, value, False, {}) for value in values]
        for value in values:
            visit(value, True, {})
    assert [future.result(30) for future in futures] == expected


@pytest.mark.parametrize("read_only", [False, True])
def test_changes_between_two_calls_of_the_input_are_sent(pool, read_only):
    """Tasks that joblib has drawn from its input get an array as it was then, and not as it was for earlier ones.

    So do they if the array is read-only, except for the moment when it is changed.
    """
    array = np.zeros(20_000)

    def calls():
        for i in range(12):
            if i % 2 == 0:  # joblib draws a task for each of two workers
                array.flags.writeable = True
                array[:] = i
                array.flags.writeable = not read_only
            yield delayed(np.max)(array)

    results = Parallel(n_jobs=2, batch_size=1)(calls())
    assert results == [i - i % 2 for i in range(12)]


def test_large_functions_are_rebuilt_for_each_task(pool):
    """What a large function has captured is as it was at the client, and each task has its own."""
    array, fixed, texts = np.zeros(20_000), np.ones(20_000), [f"text {i}" for i in range(20_000)]
    fixed.flags.writeable = False

    def use(i):
        before = array[0], len(texts), fixed.sum(), array.flags.writeable, fixed.flags.writeable
        array[0] = i + 1
        texts.append("more")
        return before

    results = Parallel(n_jobs=-1, batch_size=1)(delayed(use)(i) for i in range(CALLS))
    assert results == [(0.0, 20_000, 20_000.0, True, False)] * CALLS
    assert (array[0], len(texts)) == (0.0, 20_000)


def test_large_texts_come_back_as_they_are(pool):
    """A result that is a large text has the type and the content that it had, alone and in a batch."""
    sizes = 10, 100_000, 300_000
    results = Parallel(n_jobs=-1, batch_size=4)(
        delayed(operator.mul)(text, n) for n in sizes for text in (b"\0", "é", "\ud800")
    )
    assert results == [text * n for n in sizes for text in (b"\0", "é", "\ud800")]
    assert pool.submit(operator.mul, b"ab", 200_000).result() == b"ab" * 200_000
    twice = pool.submit(bytes, 200_000), pool.submit(str, "ü" * 200_000)
    assert [future.result() for future in twice] == [bytes(200_000), "ü" * 200_000]
