"""Warning filters of tasks: tasks that run side by side in one process have each their own.

What needs scikit-learn is in `test_search_warnings.py`: each worker imports this file.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed


@pytest.fixture(scope="module")
def threads():
    """One node of eight threads as joblib's backend."""
    with sky.pool(worker=sky.Worker(concurrency=8)) as pool:
        yield pool


@pytest.fixture
def shared_pool(threads):
    """The pool of this file, which is joblib's default."""
    return threads


pytestmark = pytest.mark.usefixtures("shared_pool")


def meet(name, parties=2):
    """Wait in a worker of threads until the other tasks are here, too."""
    # All threads of the worker see the same module object.
    return time.__dict__.setdefault(f"_skyward_{name}", threading.Barrier(parties)).wait(20)


def grumble(text="grumble"):
    warnings.warn(text, UserWarning, stacklevel=1)


def filters(_=None):
    return [tuple(map(repr, item)) for item in warnings.filters]


def test_warning_as_error_beside_default_on_the_same_line(threads):
    """A line whose warning one task has shown once still raises in another task that has it as an error."""

    def shows():
        with warnings.catch_warnings(record=True) as log:
            warnings.simplefilter("default")
            meet("registry")
            for _ in range(5):
                grumble()
            meet("registry")
            meet("registry")
            grumble()
            return len(log)

    def raises():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            meet("registry")
            meet("registry")
            with pytest.raises(UserWarning):
                grumble()
            meet("registry")

    pair = threads.submit(shows), threads.submit(raises)
    assert pair[1].result(20) is None
    assert pair[0].result(20) == 1


def test_warning_as_error_is_never_lost_to_thread_switches():
    """While two tasks show a warning and threads switch as often as possible, a third task's always raises."""

    def busy():
        sys.setswitchinterval(1e-6)
        over = time.__dict__.setdefault("_skyward_over", threading.Event())
        with warnings.catch_warnings(record=True) as log:
            warnings.simplefilter("default")
            meet("busy", 3)
            grumble()
            while not over.is_set():
                grumble()
        return len(log)

    def strict():
        over = time.__dict__.setdefault("_skyward_over", threading.Event())
        raised = 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            meet("busy", 3)
            for _ in range(3_000):
                try:
                    grumble()
                except UserWarning:
                    raised += 1
        over.set()
        return raised

    with sky.pool(worker=sky.Worker(concurrency=3), plugins=[]) as pool:
        futures = [pool.submit(busy), pool.submit(busy), pool.submit(strict)]
        assert [future.result(40) for future in futures] == [1, 1, 3_000]


def test_warning_filters_for_warnings_of_c_code():
    """Warnings of NumPy's C code, which reads the filters by itself, obey the task's filters."""

    def divide(action):
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            meet("numpy")
            try:
                for _ in range(100):
                    np.float64(1) / 0
            except RuntimeWarning:
                return "raised"
            finally:
                meet("numpy")
        return "divided"

    actions = ["error", "ignore"] * 3
    got = [
        Parallel(n_jobs=2, batch_size=1)(delayed(divide)(action) for action in actions[k : k + 2]) for k in (0, 2, 4)
    ]
    assert got == [["raised", "divided"]] * 3


def record(i, action, parties):
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter(action)
        meet(f"record_{action}_{parties}", parties)
        for _ in range(3):
            grumble(f"of task {i}")
            grumble("of all")
            warnings.warn("of all", UserWarning, stacklevel=1)
        meet(f"record_{action}_{parties}", parties)
    return [str(entry.message) for entry in log]


@pytest.mark.parametrize("action", ["always", "default", "module", "once"])
def test_catch_warnings_records_the_tasks_own_warnings(threads, action):
    """Four tasks at once record with `catch_warnings(record=True)` what each would record alone."""
    futures = [threads.submit(record, i, action, 4) for i in range(4)]
    assert [future.result(20) for future in futures] == [record(i, action, 1) for i in range(4)]


@pytest.mark.parametrize("batch_size", [1, 10])
def test_warning_filter_ends_with_its_call(threads, batch_size):
    """The next call, at any batch size, begins with the worker's own filters."""

    def leave(i):
        if i % 2:
            warnings.simplefilter("error")
            warnings.showwarning = None
        else:
            grumble()
        return filters()[0]

    first = threads.submit(filters).result(20)[0]
    error = tuple(map(repr, ("error", None, Warning, None, 0)))
    got = Parallel(n_jobs=-1, batch_size=batch_size)(delayed(leave)(i) for i in range(40))
    assert got == [first, error] * 20


@pytest.mark.slow
@pytest.mark.parametrize("block", [False, True], ids=["bare", "catch_warnings"])
def test_warning_filters_set_by_an_import_stay(tmp_path, monkeypatch, block):
    """Filters that a module sets when it is imported stay for all later tasks, unless it is imported in
    `catch_warnings`.
    """
    (tmp_path / "quieting.py").write_text("import warnings\nwarnings.filterwarnings('ignore', 'noise', UserWarning)\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def imports():
        with warnings.catch_warnings() if block else contextlib.nullcontext():
            warnings.simplefilter("error", BytesWarning)
            __import__("quieting")
            return filters()[:2]

    def all_slots(_):
        meet("quieting", 3)
        return filters()

    with sky.pool(worker=sky.Worker(concurrency=3), plugins=[]) as pool:
        before = pool.submit(filters).result(20)
        noise, error = pool.submit(imports).result(20)
        assert "noise" in noise[1]
        assert "BytesWarning" in error[2]
        after = before if block else [noise, *before]
        assert [future.result(20) for future in [pool.submit(all_slots, i) for i in range(3)]] == [after] * 3


SHOWING = {
    "shows": """
        def show(message, *details):
            shown.append(str(message))
        warnings.showwarning = show
        """,
    "logs": """
        class Handler(logging.Handler):
            def emit(self, record):
                shown.append(record.getMessage())
        logging.getLogger("py.warnings").addHandler(Handler())
        logging.captureWarnings(True)
        """,
}


@pytest.mark.parametrize("executor", ["thread", "process"])
@pytest.mark.parametrize("name", SHOWING)
def test_showwarning_set_by_an_import_stays(tmp_path, monkeypatch, name, executor):
    """A `showwarning` that a module sets at its import is for all tasks; one that a task sets is for that task."""
    source = "import logging\nimport warnings\nshown = []\n" + textwrap.dedent(SHOWING[name])
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))

    def count(i, other):
        shown = __import__(name).shown
        before = len(shown)
        if other:
            warnings.showwarning = lambda *details: None
        warnings.warn(f"warning {i}", UserWarning, stacklevel=1)
        if other and executor == "process":
            # In a process a task's changes stay, as in the client.
            warnings.showwarning = logging._showwarning if name == "logs" else sys.modules[name].show
        return len(shown) - before

    with sky.pool(worker=sky.Worker(concurrency=2, executor=executor), plugins=[]) as pool:
        assert [pool.submit(count, i, i == 2).result(20) for i in range(6)] == [1, 1, 0, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_capture_warnings_in_each_task(executor):
    """`logging.captureWarnings` works in each task, after and beside others that use it."""

    def logged(i, beside):
        records = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())
        log = logging.getLogger("py.warnings")
        log.addHandler(handler)
        if beside:
            meet("capture")
        logging.captureWarnings(True)
        warnings.warn(f"logged {i}", UserWarning, stacklevel=1)
        if beside:
            meet("capture")
        logging.captureWarnings(False)
        with warnings.catch_warnings(record=True) as shown:
            warnings.warn(f"shown {i}", UserWarning, stacklevel=1)
        log.removeHandler(handler)
        return sum(f"logged {i}" in record for record in records), len(records) < 3, len(shown)

    with sky.pool(worker=sky.Worker(concurrency=2, executor=executor), plugins=[]) as pool:
        alone = [pool.submit(logged, i, False).result(20) for i in range(4)]
        together = [pool.submit(logged, i, executor == "thread") for i in (4, 5)]
        assert [*alone, *(future.result(20) for future in together)] == [(1, True, 1)] * 6


def test_warning_filters_in_threads_of_a_task(threads):
    """Threads of a task have its filters; their own `catch_warnings` is theirs, and nothing outlives the task."""

    def outcome(_):
        try:
            grumble()
        except UserWarning:
            return "raised"
        return "shown"

    def overlapping(i):
        with warnings.catch_warnings():
            warnings.simplefilter("error" if i else "ignore")
            meet("overlap")
            got = outcome(i)
            meet("overlap")
            return got

    def task():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            executor = time.__dict__["_skyward_executor"] = ThreadPoolExecutor(2)
            return [executor.submit(outcome, 0).result(20), *executor.map(overlapping, range(2)), outcome(0)]

    before = threads.submit(filters).result(20)
    assert threads.submit(task).result(20) == ["raised", "shown", "raised", "raised"]
    assert (
        threads.submit(lambda: time.__dict__["_skyward_executor"].submit(outcome, 0).result(20)).result(20) == "shown"
    )
    assert threads.submit(filters).result(20) == before


def test_functions_that_refer_to_the_warnings_module(threads):
    """A returned function that refers to `warnings` has it by its name, whatever its class in the worker."""

    def make():
        return lambda: warnings.catch_warnings

    assert threads.submit(make).result(20)() is warnings.catch_warnings


def named():
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        warnings.filterwarnings("default", "", UserWarning, __name__)
        warnings.filterwarnings("default", "", UserWarning, "named")
        registry: dict[object, object] = {}
        for _ in range(2):
            warnings.warn("from here", UserWarning, stacklevel=1)
            grumble("from there")
            warnings.warn_explicit("explicit", UserWarning, "named.py", 3, registry=registry)
            warnings.warn_explicit("other", UserWarning, "other.py", 3, registry=registry)
    return [(str(entry.message), entry.filename) for entry in log]


def test_warning_filters_by_module(threads):
    """A filter's module is matched by the stack or by the file that the warning names."""
    got = threads.submit(named).result(20)
    assert [message for message, _ in got] == ["from here", "from there", "explicit", "other", "other"]
    assert got == named()
