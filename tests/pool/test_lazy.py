"""`@sky.compute`, its operators and what they refuse."""

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
    """As an argument it fails its call at once."""

    def __reduce__(self):
        raise TypeError("not this one")


# ---------------------------------------------------------------------------------------------------- what it gives


def test_the_three_operators_of_a_call(either_pool):
    """`>` gives a future, `>>` the result; keyword arguments travel too."""
    future = double(3) > either_pool
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(10) == 6
    assert double(3, plus=1) >> either_pool == 7
    assert pid() >> either_pool != os.getpid()


def test_a_group_gives_a_tuple(either_pool):
    """`&` and gather run calls at once; their results keep the order of the calls."""
    assert (double(1) & factorial(4) & double(3)) >> either_pool == (2, 24, 6)
    assert ((double(1) & double(2)) > either_pool).result(10) == (2, 4)
    assert sky.gather(double(1), factorial(3)) >> either_pool == (2, 6)
    assert sky.gather(*[double(i) for i in range(100)]) >> either_pool == tuple(range(0, 200, 2))
    assert sky.gather() >> either_pool == ()


def test_groups_of_groups_are_flat(shared_pool):
    """`&` is associative."""
    a, b, c, d = (double(i) for i in range(4))
    for group in (a & (b & c) & d, (a & b) & (c & d), sky.gather(a, b) & c & d):
        assert group >> shared_pool == (0, 2, 4, 6)


def test_the_members_of_a_group_run_at_once(shared_pool, tmp_path):
    """One may wait for what another does."""
    path = str(tmp_path / "gate")
    assert (wait_for(path) & touch(path)) >> shared_pool == (path, None)


def test_a_call_can_be_run_again(shared_pool):
    """Each operator runs it anew, with its arguments as they are then."""

    @sky.compute
    def total(numbers):
        return sum(numbers)

    numbers = [1, 2]
    call = total(numbers)
    assert call >> shared_pool == 3
    numbers.append(3)
    assert call >> shared_pool == 6


def test_every_node_runs_it(shared_pool):
    """`@` gives one result per ready node, in the order of the nodes, and calls no node twice."""
    pids = pid() @ shared_pool
    assert len(set(pids)) == len(shared_pool.nodes()) == 2
    assert all(pid() @ shared_pool == pids for _ in range(5))


def test_every_node_runs_a_group(shared_pool):
    """A group's tuple comes from one node."""
    rows = (pid() & double(4) & pid()) @ shared_pool
    assert [row[0] for row in rows] == [row[2] for row in rows] == pid() @ shared_pool
    assert [row[1] for row in rows] == [8, 8]


def test_the_first_error_of_a_node_is_raised(shared_pool):
    """As in a group."""
    with pytest.raises(ValueError, match="no"):
        fail("no") @ shared_pool


def test_only_ready_nodes_are_counted(shared_pool, monkeypatch):
    """With no ready node the error says so: an empty list would hide it."""
    monkeypatch.setattr(shared_pool, "nodes", lambda: [sky.Node("n", "lost", "gone", 0, None, None)])
    with pytest.raises(sky.NodeLostError, match="no node is ready"):
        double(1) @ shared_pool


# ---------------------------------------------------------------------------------------------------- what travels


def test_importable_functions_travel_by_name(shared_pool):
    """Neither their code nor their module's globals are sent, also for what refers to itself, joblib and submit."""
    encoder = payload.Encoder(1 << 20)
    for value in (double, double.local, Scale.times, Scale.times.local, Scale.half):
        pickled, _ = encoder.dumps(value)
        assert b"cloudpickle" not in pickled
        assert payload.loads(pickled, None) is value
        assert pickle.loads(pickle.dumps(value)) is value
    assert factorial(5) >> shared_pool == 120
    assert shared_pool.submit(double.local, 3).result(10) == 6
    assert list(shared_pool.map(double.local, [1, 2])) == [2, 4]


def test_joblib_takes_the_local_function():
    """As `delayed(f.local)`."""
    with sky.pool():
        assert Parallel(n_jobs=-1)(delayed(double.local)(i) for i in range(3)) == [0, 2, 4]


def test_closures_travel(either_pool):
    """With what they refer to, themselves included."""
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


def test_functions_of_a_script_travel(tmp_path):
    """What is defined in `__main__` is sent with its globals; references to itself lead to the same function."""
    script = tmp_path / "script.py"
    script.write_text(MAIN)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr == ""
    assert done.stdout == "5 (3, 4) ('up', 'Counts.', '<compute function __main__.up>', 5) (1, 3)\n"


def test_modules_that_the_far_end_lacks_can_be_sent(tmp_path, monkeypatch, shared_pool):
    """By itself, and after cloudpickle.register_pickle_by_value, as plain functions."""
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


def test_decorating_what_has_a_name_leaves_it_alone(shared_pool):
    """`sky.compute(f)` of an importable f changes nothing in f."""
    path = sky.compute(os.path.join)
    assert os.path.join.__qualname__ == "join"
    assert path("a", "b") >> shared_pool == os.path.join("a", "b")
    assert sky.compute(abs)(-1) >> shared_pool == 1
    assert sky.compute(len).local([1]) == 1


def test_any_callable_can_be_decorated(shared_pool):
    """Also one without a name."""
    power = sky.compute(functools.partial(pow, 2))
    assert power(5) >> shared_pool == 32
    assert repr(power(5)) == "<lazy partial(5)>"


def test_methods_send_their_object(either_pool):
    """Through an instance `self` is bound, through the class it is an argument; static methods work."""
    assert Scale(5).times(2) >> either_pool == 10
    assert Scale.times(Scale(5), 3) >> either_pool == 15
    assert Scale(5).times.local(2) == Scale.times.local(Scale(5), 2) == 10
    assert Scale.half(8) >> either_pool == 4
    assert Scale(1).half(8) >> either_pool == 4


# ---------------------------------------------------------------------------------------------------- what it is like


def test_a_compute_function_looks_like_its_function():
    """Name, documentation, signature, and a repr."""
    assert double.local(2, plus=1) == 5
    assert (double.__name__, double.__doc__, double.__module__) == ("double", "Twice x.", __name__)
    assert str(inspect.signature(double)) == "(x: 'int', *, plus: 'int' = 0) -> 'int'"
    assert str(inspect.signature(Scale(1).times)) == "(x: 'int') -> 'int'"
    assert repr(double) == f"<compute function {__name__}.double>"
    assert repr(Scale(1).times) == f"<compute function {__name__}.Scale.times>"


def test_lazy_calls_show_what_was_written():
    """Long arguments are shortened."""
    assert repr(double(3, plus=4)) == "<lazy double(3, plus=4)>"
    assert repr(double(1) & double(2)) == "<lazy gather(double(1), double(2))>"
    assert repr(sky.gather(*[double(i) for i in range(9)])) == "<lazy gather(double(0), … 9 calls)>"
    assert len(repr(double("x" * 1000))) < 100


# ---------------------------------------------------------------------------------------------------- errors


def test_errors_are_the_functions_own(either_pool):
    """Type and remote traceback; no frame of ours, not even through the decorator."""
    with pytest.raises(ValueError, match="boom") as caught:
        fail("boom") >> either_pool
    assert str(caught.value) == "boom"
    text = str(caught.value.__cause__)
    assert "in fail" in text
    assert "skyward_lite" not in text


def test_a_group_raises_its_first_error_in_order(either_pool):
    """Whichever came first in time; `>>` and the future agree."""
    for _ in range(10):
        with pytest.raises(ValueError, match="first"):
            (double(1) & fail("first") & fail("second")) >> either_pool
    error = ((fail("first") & fail("second")) > either_pool).exception(10)
    assert error is not None
    assert str(error) == "first"


def test_after_an_error_what_has_not_started_is_cancelled(tmp_path):
    """On one slot the members that wait behind the running one never run."""
    before, gate, *after = (str(tmp_path / str(i)) for i in range(50))
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        group = touch(before) & fail("out") & wait_for(gate) & sky.gather(*[touch(path) for path in after])
        with pytest.raises(ValueError, match="out"):
            group >> pool
        touch.local(gate)
    assert os.path.exists(before)
    assert not os.path.exists(after[-1])


def test_nothing_of_a_group_is_sent_if_a_member_cannot_be_pickled(shared_pool, tmp_path):
    """The error is raised at once, by `>` too."""
    path = tmp_path / "ran"
    with pytest.raises(TypeError, match="not this one"):
        _ = (touch(str(path)) & double(Unpicklable())) > shared_pool
    assert Tasks.of(shared_pool).core.counts()[0] == 0
    assert not path.exists()


def test_a_groups_future_can_be_cancelled(tmp_path):
    """It is cancelled if any member did not start: there will be no tuple. `wait` hears of it."""
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


def test_a_group_is_cancelled_when_its_pool_is_left_by_an_error(tmp_path):
    """No future stays without an end."""
    never = str(tmp_path / "never")
    with pytest.raises(RuntimeError, match="out"), sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        future = (wait_for(never) & wait_for(never)) > pool
        raise RuntimeError("out")
    assert future.cancelled()


def test_a_groups_results_are_not_kept(shared_pool):
    """What the caller lets go of is gone, without the garbage collector's help."""
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


def test_an_interrupted_wait_cancels_the_call():
    """Nobody else has its future: after Ctrl-C it must not start any more."""

    class Interrupted(concurrent.futures.Future):
        def result(self, timeout=None):
            raise KeyboardInterrupt

    future = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        _result(future)
    assert future.cancelled()


def test_a_pool_that_is_not_open_says_so():
    """As for submit."""
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
def test_misuse_says_what_to_write(shared_pool, write, says):
    """A TypeError for a right-hand side, a truth value, an argument or a decoration that means something else."""
    with pytest.raises(TypeError, match=says):
        write(shared_pool)
