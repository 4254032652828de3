"""Lazy calls of `@sky.compute`: the operators `>`, `>>`, `@` and `&`, and the misuse that they refuse."""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from skyward_lite.client.lazy import _result
from skyward_lite.client.tasks import Tasks
from skyward_lite.pickling import payload

HERE = threading.Lock()
"""A global that cannot be pickled: a function that is sent with its module's globals fails."""


@sky.compute
def double(x: int, *, plus: int = 0) -> int:
    """Twice x."""
    assert not HERE.locked()
    return 2 * x + plus


@sky.compute
def fail(message: str) -> None:
    assert not HERE.locked()
    raise ValueError(message)


@sky.compute
def factorial(n: int) -> int:
    assert not HERE.locked()
    return 1 if n == 0 else n * factorial.local(n - 1)


@sky.compute
def pid() -> int:
    return os.getpid()


@sky.compute
def wait_for(path: str) -> str:
    while not os.path.exists(path):
        threading.Event().wait(0.005)
    return path


@sky.compute
def touch(path: str) -> None:
    Path(path).touch()


class Scale:
    """Has compute methods."""

    def __init__(self, by: int) -> None:
        self.by = by

    @sky.compute
    def times(self, x: int) -> int:
        """By times x."""
        assert not HERE.locked()
        return self.by * x

    @staticmethod
    @sky.compute
    def half(x: int) -> int:
        return x // 2


class Unpicklable:
    """An argument that fails its call at once."""

    def __reduce__(self):
        raise TypeError("not this one")


# ---------------------------------------------------------------------------------------------------- what it gives


def test_compute_call_operators(either_pool):
    """`>` returns a future and `>>` the result; keyword arguments travel too."""
    future = double(3) > either_pool
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(10) == 6
    assert double(3, plus=1) >> either_pool == 7
    assert pid() >> either_pool != os.getpid()


def test_gather_returns_a_tuple_in_order(either_pool):
    """`&` and `gather` run calls at once and return their results in the order of the calls."""
    assert (double(1) & factorial(4) & double(3)) >> either_pool == (2, 24, 6)
    assert ((double(1) & double(2)) > either_pool).result(10) == (2, 4)
    assert sky.gather(double(1), factorial(3)) >> either_pool == (2, 6)
    assert sky.gather(*[double(i) for i in range(100)]) >> either_pool == tuple(range(0, 200, 2))
    assert sky.gather() >> either_pool == ()


def test_gather_is_flat(shared_pool):
    """`&` is associative: a group of groups is one group."""
    a, b, c, d = (double(i) for i in range(4))
    for group in (a & (b & c) & d, (a & b) & (c & d), sky.gather(a, b) & c & d):
        assert group >> shared_pool == (0, 2, 4, 6)


def test_gather_runs_calls_at_once(shared_pool, tmp_path):
    """One call of a group may wait for the effect of another."""
    path = str(tmp_path / "gate")
    assert (wait_for(path) & touch(path)) >> shared_pool == (path, None)


def test_compute_call_can_be_run_again(shared_pool):
    """Each operator runs a call anew, with its arguments as they are then."""

    @sky.compute
    def total(numbers):
        return sum(numbers)

    numbers = [1, 2]
    call = total(numbers)
    assert call >> shared_pool == 3
    numbers.append(3)
    assert call >> shared_pool == 6


def test_broadcast_runs_a_call_on_every_node(shared_pool):
    """`@` returns one result per ready node, in the order of the nodes, and calls no node twice."""
    pids = pid() @ shared_pool
    assert len(set(pids)) == len(shared_pool.nodes()) == 2
    assert all(pid() @ shared_pool == pids for _ in range(5))


def test_broadcast_runs_a_group_on_every_node(shared_pool):
    """With `@` each tuple of a group's results comes from one node."""
    rows = (pid() & double(4) & pid()) @ shared_pool
    assert [row[0] for row in rows] == [row[2] for row in rows] == pid() @ shared_pool
    assert [row[1] for row in rows] == [8, 8]


def test_broadcast_raises_the_first_error(shared_pool):
    """`@` raises the error of the first node whose call failed, in the order of the nodes."""
    with pytest.raises(ValueError, match="no"):
        fail("no") @ shared_pool


def test_broadcast_without_a_ready_node_is_an_error(shared_pool, monkeypatch):
    """`@` calls ready nodes only, and is an error without any, as an empty list would hide the mistake."""
    monkeypatch.setattr(shared_pool, "nodes", lambda: [sky.Node("n", "lost", "gone", 0, None, None, 0.0)])
    with pytest.raises(sky.NodeLostError, match="no node is ready"):
        double(1) @ shared_pool


# ---------------------------------------------------------------------------------------------------- what travels


def test_importable_functions_travel_by_name(shared_pool):
    """Neither code nor globals of an importable function are sent, for recursive functions, joblib and submit
    as well.
    """
    encoder = payload.Encoder(1 << 20)
    for value in (double, double.local, Scale.times, Scale.times.local, Scale.half):
        pickled, _ = encoder.dumps(value)
        assert b"cloudpickle" not in pickled
        assert payload.loads(pickled, None) is value
        assert pickle.loads(pickle.dumps(value)) is value
    assert factorial(5) >> shared_pool == 120
    assert shared_pool.submit(double.local, 3).result(10) == 6
    assert list(shared_pool.map(double.local, [1, 2])) == [2, 4]


def test_compute_function_local_in_joblib():
    """`delayed(f.local)` runs the decorated function in a `Parallel` call."""
    with sky.pool():
        assert Parallel(n_jobs=-1)(delayed(double.local)(i) for i in range(3)) == [0, 2, 4]


def test_compute_closures_travel(either_pool):
    """Decorated closures arrive with the objects that they refer to, themselves included."""
    k = 10

    @sky.compute
    def down(n):
        return k if n == 0 else down.local(n - 1) + 1

    assert down(5) >> either_pool == 15
    assert down.local(5) == 15


MAIN = """
import skyward_lite as sky

K = 3

@sky.compute
def up(n: int) -> int:
    "Counts."
    return K if n == 0 else up.local(n - 1) + 1

def about():
    return up.__name__, up.__doc__, repr(up), up.local(2)

class Thing:
    @sky.compute
    def method(self, x):
        return x, K

if __name__ == "__main__":
    with sky.pool(plugins=[]) as pool:
        print(up(2) >> pool, (up(0) & up(1)) >> pool, pool.submit(about).result(), Thing().method(1) >> pool)
"""


def test_compute_functions_of_a_script_travel(tmp_path):
    """Functions of `__main__` travel with their globals, and references to itself lead to the same function."""
    script = tmp_path / "script.py"
    script.write_text(MAIN)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr == ""
    assert done.stdout == "5 (3, 4) ('up', 'Counts.', '<compute function __main__.up>', 5) (1, 3)\n"


def test_compute_functions_of_modules_that_the_node_lacks(tmp_path, monkeypatch, shared_pool):
    """Functions of modules that the node lacks are sent by value, after `cloudpickle.register_pickle_by_value`
    as well.
    """
    import cloudpickle

    (tmp_path / "only_here.py").write_text(
        "import skyward_lite as sky\n@sky.compute\ndef f(n):\n    return n and f.local(n - 1) + 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here

    assert only_here.f(3) >> shared_pool == 6
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    cloudpickle.register_pickle_by_value(only_here)
    try:
        assert only_here.f(3) >> shared_pool == 6
    finally:
        cloudpickle.unregister_pickle_by_value(only_here)


def test_compute_does_not_change_an_importable_function(shared_pool):
    """`sky.compute(f)` of an importable function changes nothing in it."""
    path = sky.compute(os.path.join)
    assert os.path.join.__qualname__ == "join"
    assert path("a", "b") >> shared_pool == os.path.join("a", "b")
    assert sky.compute(abs)(-1) >> shared_pool == 1
    assert sky.compute(len).local([1]) == 1


def test_compute_takes_any_callable(shared_pool):
    """`sky.compute` takes a callable without a name."""
    power = sky.compute(functools.partial(pow, 2))
    assert power(5) >> shared_pool == 32
    assert repr(power(5)) == "<lazy partial(5)>"


def test_compute_methods(either_pool):
    """A decorated method sends its object: bound through an instance, an argument through the class; static methods
    work.
    """
    assert Scale(5).times(2) >> either_pool == 10
    assert Scale.times(Scale(5), 3) >> either_pool == 15
    assert Scale(5).times.local(2) == Scale.times.local(Scale(5), 2) == 10
    assert Scale.half(8) >> either_pool == 4
    assert Scale(1).half(8) >> either_pool == 4


# ---------------------------------------------------------------------------------------------------- what it is like


def test_compute_function_metadata():
    """A decorated function has the name, documentation and signature of the function, and a repr."""
    assert double.local(2, plus=1) == 5
    assert (double.__name__, double.__doc__, double.__module__) == ("double", "Twice x.", __name__)
    assert str(inspect.signature(double)) == "(x: 'int', *, plus: 'int' = 0) -> 'int'"
    assert str(inspect.signature(Scale(1).times)) == "(x: 'int') -> 'int'"
    assert repr(double) == f"<compute function {__name__}.double>"
    assert repr(Scale(1).times) == f"<compute function {__name__}.Scale.times>"


def test_compute_call_repr():
    """The repr of a lazy call is the call as written, with long arguments shortened."""
    assert repr(double(3, plus=4)) == "<lazy double(3, plus=4)>"
    assert repr(double(1) & double(2)) == "<lazy gather(double(1), double(2))>"
    assert repr(sky.gather(*[double(i) for i in range(9)])) == "<lazy gather(double(0), … 9 calls)>"
    assert len(repr(double("x" * 1000))) < 100


# ---------------------------------------------------------------------------------------------------- errors


def test_compute_errors_have_type_and_remote_traceback(either_pool):
    """Errors keep their type and the remote traceback, which has none of the library's frames, not even the
    decorator's.
    """
    with pytest.raises(ValueError, match="boom") as caught:
        fail("boom") >> either_pool
    assert str(caught.value) == "boom"
    text = str(caught.value.__cause__)
    assert "in fail" in text
    assert "skyward_lite" not in text


def test_gather_raises_the_first_error_in_order(either_pool):
    """A group raises the first error in the order of its calls, with `>>` and by its future."""
    for _ in range(10):
        with pytest.raises(ValueError, match="first"):
            (double(1) & fail("first") & fail("second")) >> either_pool
    error = ((fail("first") & fail("second")) > either_pool).exception(10)
    assert error is not None
    assert str(error) == "first"


def test_gather_error_cancels_calls_that_have_not_started(tmp_path):
    """After an error, the calls of a group that wait behind it on a single slot never run."""
    before, gate, *after = (str(tmp_path / str(i)) for i in range(50))
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        group = touch(before) & fail("out") & wait_for(gate) & sky.gather(*[touch(path) for path in after])
        with pytest.raises(ValueError, match="out"):
            group >> pool
        touch.local(gate)
    assert os.path.exists(before)
    assert not os.path.exists(after[-1])


def test_gather_sends_nothing_if_a_call_cannot_be_pickled(shared_pool, tmp_path):
    """A call that cannot be pickled raises at once, with `>` too, and no other call of its group runs."""
    path = tmp_path / "ran"
    with pytest.raises(TypeError, match="not this one"):
        _ = (touch(str(path)) & double(Unpicklable())) > shared_pool
    assert Tasks.of(shared_pool).core.counts()[0] == 0
    assert not path.exists()


def test_gather_future_can_be_cancelled(tmp_path):
    """A group's future is cancelled if any of its calls has not started, and `wait` is woken."""
    path = str(tmp_path / "gate")
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        future = sky.gather(*[wait_for(path) for _ in range(10)]) > pool
        assert not future.done()
        assert future.cancel()
        assert future.cancelled()
        assert future.cancel()
        assert concurrent.futures.wait([future], 0).done == {future}
        touch.local(path)
        done = (double(1) & double(2)) > pool
        assert done.result(10) == (2, 4)
        assert not done.cancel()


def test_gather_is_cancelled_when_an_exception_leaves_the_block(tmp_path):
    """When an exception leaves the block, the futures of groups are cancelled, and none stays pending."""
    never = str(tmp_path / "never")
    with pytest.raises(RuntimeError, match="out"), sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        future = (wait_for(never) & wait_for(never)) > pool
        raise RuntimeError("out")
    assert future.cancelled()


def test_gather_results_are_freed(shared_pool):
    """A group's results are freed without the garbage collector when the caller drops them."""
    import gc
    import weakref

    gc.disable()
    try:
        future = (double(1) & double(2)) > shared_pool
        assert future.result(10) == (2, 4)
        double(3) >> shared_pool  # resolved after it: the resolving thread has moved on
        future_ref = weakref.ref(future)
        del future
        assert future_ref() is None
    finally:
        gc.enable()


def test_ctrl_c_cancels_a_compute_call():
    """After Ctrl-C during `>>` the call is cancelled, as nobody else has its future."""

    class Interrupted(concurrent.futures.Future):
        def result(self, timeout=None):
            raise KeyboardInterrupt

    future = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        _result(future)
    assert future.cancelled()


def test_compute_on_a_closed_pool():
    """A lazy call on a pool that is not open is the same error as `submit`."""
    pool = sky.pool(plugins=[])
    for run in (lambda: double(1) > pool, lambda: double(1) >> pool, lambda: double(1) @ pool):
        with pytest.raises(sky.PoolClosedError, match="not started"):
            run()


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda pool: double(1) >> 5, r"double\(1\)> >> 5: on the right goes a pool"),
        (lambda pool: double(1) > None, r"> > None: on the right goes a pool.*double\(1\) > pool"),
        (lambda pool: (double(1) & double(2)) @ "pool", r"@ 'pool': on the right goes a pool"),
        (lambda pool: double(1) > double(2), "on the right goes a pool"),
        (lambda pool: double(1) & double(2) >> pool, r"& 4: .*write `\(a & b\) >> pool`"),
        (lambda pool: double(1) >> pool & double(2), r"2 & <.*write `\(a & b\) >> pool`"),
        (lambda pool: (double(1) & double(2)) & 3, r"& 3: .*write `\(a & b\) >> pool`"),
        (lambda pool: bool(double(1)), r"neither true nor false: write `\(double\(1\) >> pool\)`"),
        (lambda pool: double(1) and double(2), "neither true nor false"),
        (lambda pool: double(1) > pool > pool, "not supported between"),
        (lambda pool: double(double(1)) >> pool, r"has not run.*`double\(1\) >> pool` first"),
        (lambda pool: pool.submit(double, 1).result(10), r"inside a task, or for submit and map.*`\.local`"),
        (lambda pool: sky.gather(double(1), 2), "gather takes calls"),
        (lambda pool: sky.gather(double), "gather takes calls"),
        (lambda pool: sky.compute(3), "takes a function, not 3"),
        (lambda pool: sky.compute(staticmethod(abs)), "go above it"),
    ],
)
def test_compute_misuse_is_a_type_error(shared_pool, write, says):
    """A wrong right-hand side, a truth value, a wrong argument or decoration is a TypeError that says what to write."""
    with pytest.raises(TypeError, match=says):
        write(shared_pool)
