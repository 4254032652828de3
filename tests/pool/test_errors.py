"""What an error says: the value that cannot be pickled, the node, the call, and whether it was the result."""

from __future__ import annotations

import functools
import pickle
import sys
import threading

import cloudpickle
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed


@pytest.fixture(scope="module", autouse=True)
def functions_of_this_file_go_by_value():
    """The host has directories of its own, and this file is in none of them."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module", params=["thread", "process", "ssh"])
def pool(request):
    """One node that is joblib's backend: with each executor, and a real sshd with directories of its own."""
    if request.param == "ssh":
        lab = request.getfixturevalue("lab")
        host = lab.host(name="lab1")
        host.make_environment(sky.plugins.joblib().transform(sky.Image()))
        with sky.pool(sky.SSH("lab1", config=lab.config), worker=sky.Worker(concurrency=2)) as pool:
            yield pool
    else:
        with sky.pool(worker=sky.Worker(concurrency=2, executor=request.param)) as pool:
            yield pool


@pytest.fixture
def shared_pool():
    """Pools of this module outlive its tests; nothing else is left behind."""


pytestmark = pytest.mark.usefixtures("shared_pool")


class Client:
    def __init__(self):
        self.lock = threading.Lock()


class Conf:
    def __init__(self):
        self.conf = {"name": "x", "client": Client()}


def test_the_path_to_what_cannot_be_pickled_leads_through_a_global(pool):
    """A global, an attribute, a key and an attribute."""
    space = {"h": Conf(), "__name__": "nowhere"}
    exec("def f(x):\n    return h, x", space)
    with pytest.raises(TypeError, match="lock") as caught:
        pool.submit(space["f"], 1)
    assert "(global 'h' of f, .conf['client'].lock)" in str(caught.value)
    with pytest.raises(pickle.PicklingError) as wrapped:
        Parallel(n_jobs=2)(delayed(space["f"])(i) for i in range(3))
    assert "(global 'h' of f, .conf['client'].lock)" in str(wrapped.value)


def paths():
    lock = threading.Lock()

    def closing():
        return lock

    def defaulting(x=lock):
        return x

    class Holder:
        held = lock

    class Slotted:
        __slots__ = ("s",)

        def __init__(self):
            self.s = lock

    conf = Conf()
    return [
        (print, (1, lock), {}, "argument 1 of print"),
        (print, (), {"sep": [1, {"a": lock}]}, "argument 'sep' of print, [1]['a']"),
        (closing, (), {}, "'lock' in the closure of closing"),
        (defaulting, (), {}, "default 0 of defaulting"),
        (functools.partial(print, lock), (), {}, "the function partial, .args[0]"),
        (print, (Holder(),), {}, "argument 0 of print"),
        (print, (Slotted(),), {}, "argument 0 of print, .s"),
        (print, (conf,), {}, "argument 0 of print, .conf['client'].lock"),
        (conf.__init__, (), {}, "the function Conf.__init__, .__self__.conf['client'].lock"),
    ]


@pytest.mark.parametrize(("function", "args", "kwargs", "path"), paths(), ids=[row[3] for row in paths()])
def test_the_path_to_what_cannot_be_pickled(pool, function, args, kwargs, path):
    """It begins with the argument or the function and ends with the value itself."""
    with pytest.raises((TypeError, pickle.PicklingError), match="lock") as caught:
        pool.submit(function, *args, **kwargs)
    assert path in str(caught.value)


def test_a_search_for_the_path_ends(pool):
    """Also in what refers to itself, and in what has a great many parts."""
    loop: list = []
    loop += [loop, list(range(10_000)), {str(i): [i] for i in range(10_000)}, threading.Lock()]
    with pytest.raises(TypeError, match="lock"):
        pool.submit(print, loop)


def test_the_pool_itself_has_a_sentence_of_its_own(pool):
    """A closure that uses the pool is told that it exists here only; so is a future."""
    future = pool.submit(abs, -1)
    with pytest.raises(pickle.PicklingError, match="the pool itself.*in this process only") as caught:
        pool.submit(lambda x: pool.submit(abs, x), 1)
    assert "'pool' in the closure of" in str(caught.value)
    with pytest.raises(pickle.PicklingError, match=r"future.*send what its result\(\) gives"):
        pool.submit(print, future)
    assert future.result(20) == 1


def test_a_result_that_cannot_be_pickled_is_said_to_be_the_result(pool):
    """With the path to the value, and the call."""
    with pytest.raises(TypeError, match=r"the result cannot be sent: .*lock") as caught:
        pool.submit(Conf).result(20)
    assert "(the result, .conf['client'].lock)" in str(caught.value)
    with pytest.raises(TypeError, match="the result cannot be sent") as caught:
        list(pool.map(lambda i: Client() if i == 4 else i, range(6), chunksize=3))
    assert "(the result, .lock)" in str(caught.value)
    assert caught.value.__notes__[0].startswith(f"node {pool.nodes()[0].name}, task 4: <lambda>(4)")
    worker = sky.Worker(concurrency=1, max_payload=50_000)
    too_much = pytest.raises(sky.PayloadTooLargeError, match="the result cannot be sent: payload of")
    with sky.pool(worker=worker, plugins=[]) as small, too_much as too_large:
        small.submit(bytes, 60_000).result(20)
    assert too_large.value.__notes__ == ["node local-0: bytes(60000)"]


def bad(x, *, scale=1):
    if x == 2:
        raise ValueError(f"{x} is bad")
    return x * scale


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_an_exception_has_a_note_with_node_and_call(pool, batch_size):
    """The call of `Parallel` by its place, which does not depend on batches."""
    with pytest.raises(ValueError, match="2 is bad") as caught:
        Parallel(n_jobs=2, batch_size=batch_size)(delayed(bad)(i, scale=3) for i in range(5))
    (note,) = caught.value.__notes__
    assert note == f"node {pool.nodes()[0].name}, task 2: bad(2, scale=3)"


def test_the_notes_of_submit_and_map(pool):
    """A call alone has no place; one of `map` has."""
    name = pool.nodes()[0].name
    with pytest.raises(ValueError, match="bad") as caught:
        pool.submit(bad, 2).result(20)
    assert caught.value.__notes__ == [f"node {name}: bad(2)"]
    with pytest.raises(ValueError, match="bad") as caught:
        list(pool.map(bad, [7, 7, 7, 2], chunksize=2))
    assert caught.value.__notes__ == [f"node {name}, task 3: bad(2)"]


def test_a_note_is_short_and_never_fails(pool):
    """Whatever the arguments' `repr` does."""

    class Rude:
        def __repr__(self):
            raise LookupError

    def fail(*args):
        raise KeyError("k")

    with pytest.raises(KeyError) as caught:
        pool.submit(fail, Rude(), "x" * 10_000, list(range(10_000))).result(20)
    (note,) = caught.value.__notes__
    assert len(note) < 300
    assert "fail(" in note


def test_notes_of_the_task_itself_stay(pool):
    """Ours comes after them."""

    def fail():
        error = ValueError("noted")
        error.add_note("its own")
        raise error

    with pytest.raises(ValueError, match="noted") as caught:
        pool.submit(fail).result(20)
    assert caught.value.__notes__ == ["its own", f"node {pool.nodes()[0].name}: fail()"]


def test_a_call_that_cannot_be_rebuilt_says_so(pool):
    """Nothing has run; the node is named."""

    class Bad:
        def __reduce__(self):
            return int, ("no number",)

    with pytest.raises(ValueError, match="no number") as caught:
        pool.submit(print, Bad()).result(20)
    (note,) = caught.value.__notes__
    assert note == f"node {pool.nodes()[0].name}: the call could not be rebuilt there, and nothing of it has run"


def test_warnings_and_exits_are_noted_too(pool):
    """Whatever a task raises."""

    def leave():
        raise SystemExit(3)

    with pytest.raises(SystemExit) as caught:
        pool.submit(leave).result(20)
    assert caught.value.__notes__ == [f"node {pool.nodes()[0].name}: leave()"]
