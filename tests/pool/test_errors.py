"""What errors contain: the path to the value that cannot be pickled, the node, and the call."""

from __future__ import annotations

import functools
import os
import pickle
import re
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from skyward_lite.pickling import blame


@pytest.fixture(scope="module", params=["thread", "process", "ssh"])
def pool(request):
    """A pool of one node as joblib's backend: with each executor, and on a real sshd with directories of its own."""
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
    """Tells the check for left processes that the pools of this file outlive its tests."""


# The host of the lab has directories of its own, and this file is in none of them.
pytestmark = pytest.mark.usefixtures("functions_by_value", "shared_pool")


class Client:
    def __init__(self):
        self.lock = threading.Lock()


class Conf:
    def __init__(self):
        self.conf = {"name": "x", "client": Client()}


def test_pickling_error_path_through_a_global(pool):
    """The path in a pickling error leads through a global, an attribute, a key and an attribute."""
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
def test_pickling_error_path(pool, function, args, kwargs, path):
    """The path in a pickling error begins with the argument or the function and ends with the value."""
    with pytest.raises((TypeError, pickle.PicklingError), match="lock") as caught:
        pool.submit(function, *args, **kwargs)
    assert path in str(caught.value)


def test_pickling_error_path_search_is_bounded(pool):
    """The search for the path ends, also in objects that refer to themselves or have very many parts."""
    loop: list = []
    loop += [loop, list(range(10_000)), {str(i): [i] for i in range(10_000)}, threading.Lock()]
    with pytest.raises(TypeError, match="lock"):
        pool.submit(print, loop)


def test_pickling_error_of_a_pool_or_future(pool):
    """A closure that uses the pool or a future gets an error that says that it exists only at the client."""
    future = pool.submit(abs, -1)
    with pytest.raises(pickle.PicklingError, match="the pool itself.*in this process only") as caught:
        pool.submit(lambda x: pool.submit(abs, x), 1)
    assert "'pool' in the closure of" in str(caught.value)
    with pytest.raises(pickle.PicklingError, match=r"future.*send what its result\(\) gives"):
        pool.submit(print, future)
    assert future.result(20) == 1


def test_pickling_error_of_a_result(pool):
    """The error of a result that cannot be pickled says that it is the result, with the path to the value, and the
    call.
    """
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
def test_exception_note_names_node_and_call(pool, batch_size):
    """An exception's note names the node and the call's place in the `Parallel` call, at any batch size."""
    with pytest.raises(ValueError, match="2 is bad") as caught:
        Parallel(n_jobs=2, batch_size=batch_size)(delayed(bad)(i, scale=3) for i in range(5))
    (note,) = caught.value.__notes__
    assert note == f"node {pool.nodes()[0].name}, task 2: bad(2, scale=3)"


def test_exception_note_of_submit_and_map(pool):
    """The note of a submitted call has no place; the note of a call of `map` has."""
    name = pool.nodes()[0].name
    with pytest.raises(ValueError, match="bad") as caught:
        pool.submit(bad, 2).result(20)
    assert caught.value.__notes__ == [f"node {name}: bad(2)"]
    with pytest.raises(ValueError, match="bad") as caught:
        list(pool.map(bad, [7, 7, 7, 2], chunksize=2))
    assert caught.value.__notes__ == [f"node {name}, task 3: bad(2)"]


def test_exception_note_is_bounded_and_never_fails(pool):
    """A note is short and is made whatever the arguments' `repr` does."""

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


def test_exception_note_has_shapes_and_waits_for_no_repr(monkeypatch):
    """Arrays and tables are shown by their shape, and after a slow repr values are named by their class."""
    asked = []

    class Slow:
        def __repr__(self):
            asked.append(1)
            monkeypatch.setattr(blame.time, "monotonic", lambda: float("inf"))
            return "slow\n  one"

    class list(Slow):  # noqa: A001, N801
        pass

    table = pd.DataFrame({"a": [1, 2]})
    call = (abs, (np.zeros((3, 4)), table, np.float64(2), [np.zeros(2)], Slow(), list(), 5), {"x": Slow()})
    assert blame.shown(call) == (
        "abs(<ndarray 3 × 4 float64>, <DataFrame 2 × 1>, np.float64(2.0), [<ndarray 2 float64>], slow one, <list>, 5, "
        "x=<Slow>)"
    ).replace("np.float64(2.0)", repr(np.float64(2)))
    assert asked == [1]


def test_exception_notes_of_the_task_stay(pool):
    """Notes that the task added to its exception come before the note with the node."""

    def fail():
        error = ValueError("noted")
        error.add_note("its own")
        raise error

    with pytest.raises(ValueError, match="noted") as caught:
        pool.submit(fail).result(20)
    assert caught.value.__notes__ == ["its own", f"node {pool.nodes()[0].name}: fail()"]


def test_exception_note_of_a_call_that_cannot_be_rebuilt(pool):
    """The note of a call that cannot be rebuilt says that nothing has run, and names the node."""

    class Bad:
        def __reduce__(self):
            return int, ("no number",)

    with pytest.raises(ValueError, match="no number") as caught:
        pool.submit(print, Bad()).result(20)
    (note,) = caught.value.__notes__
    name = pool.nodes()[0].name
    assert note == f"node {name}: the call could not be rebuilt there, and nothing of it has run"
    shown = str(caught.value.__cause__)
    assert shown.startswith(f'on node {name}, before the call has run\n"""\nValueError: invalid literal'), shown


def test_exception_note_of_warnings_and_exits(pool):
    """Warnings raised as errors and `SystemExit` get the note, too."""

    def leave():
        raise SystemExit(3)

    with pytest.raises(SystemExit) as caught:
        pool.submit(leave).result(20)
    assert caught.value.__notes__ == [f"node {pool.nodes()[0].name}: leave()"]


def test_crash_note_names_the_calls(pool):
    """The note of a task that ended its process names its function and its place; of a batch, where it is within."""
    with pytest.raises(sky.WorkerCrashedError) as caught:
        pool.submit(os._exit, 3).result(20)
    (note,) = caught.value.__notes__
    assert note == "a call of posix._exit. The task, or a library that it uses, ended the process, as os._exit does"
    with pytest.raises(sky.WorkerCrashedError) as caught:
        Parallel(n_jobs=1 + 1, batch_size=2)(delayed(os._exit if i == 3 else abs)(i) for i in range(4))
    assert caught.value.__notes__[0].startswith("tasks 2 to 3: one of 2 calls of ")


SCRIPT = """
import skyward_lite as sky
from joblib import Parallel, delayed

def fail(x):
    return 1 / x

with sky.pool(worker=sky.Worker(concurrency=1)) as pool:
    USE
"""
USES = {
    "Parallel": "Parallel(n_jobs=2)(delayed(fail)(i) for i in range(2))",
    "generator": "list(Parallel(n_jobs=2, return_as='generator')(delayed(fail)(i) for i in range(2)))",
    "submit": "pool.submit(fail, 0).result()",
    "map": "list(pool.map(fail, [0, 1]))",
    "compute": "sky.compute(fail)(0) >> pool",
}


@pytest.mark.parametrize("use", USES)
def test_a_script_shows_the_task_and_its_own_line_only(tmp_path, use):
    """A script that ends by a task's error shows the task's traceback with an arrow, then its own line only."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("USE", USES[use]))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    remote, _, local = done.stderr.partition("The above exception was the direct cause")
    assert remote.startswith("skyward_lite.errors.RemoteTraceback: on node local-0")
    assert f'  File "{script}", line 6, in fail\n--> return 1 / x\n           ~~^~~\nZeroDivisionError' in remote
    assert re.findall(r'File "(.*)", line (\d+)', local) == [(str(script), "9")]
    assert local.splitlines()[-1].startswith("node local-0")


def test_a_script_shows_what_cannot_be_sent_and_its_own_line_only(tmp_path):
    """The error for a call that cannot be pickled has the path to the value, and no frames but the script's own."""
    script = tmp_path / "script.py"
    text = SCRIPT.replace("USE", USES["Parallel"]).replace("return 1 / x", "return lock")
    script.write_text("import threading\nlock = threading.Lock()\n" + text)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50, check=False)
    assert done.stderr.startswith("TypeError: cannot pickle '_thread.lock' object (global 'lock' of fail)\n\nThe above")
    assert re.findall(r'File "(.*)", line (\d+)', done.stderr) == [(str(script), "11")]


def test_ipython_shows_the_task_and_the_cell_only(tmp_path):
    """IPython shows the same of an error in a cell, with the cells' names."""
    script = tmp_path / "cells.py"
    first, _, last = SCRIPT.replace("USE", USES["Parallel"]).partition("\n\nwith")
    script.write_text(
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance(colors='NoColor')\n"
        f"shell.run_cell({first!r}, store_history=True)\n"
        f"shell.run_cell({'with' + last!r}, store_history=True)\n"
    )
    environment = {**os.environ, "IPYTHONDIR": str(tmp_path)}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False, env=environment)
    assert re.search(r"Cell In\[1\], line \d, in fail\n--> return 1 / x", done.stdout), done.stdout
    assert "parallel.py" not in done.stdout
    assert "tasks.py" not in done.stdout
    assert "----> 2     Parallel" in done.stdout
