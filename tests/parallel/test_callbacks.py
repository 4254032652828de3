"""scikit-learn's callbacks on workers report as in a serial run, on this machine and on others."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skyward_lite as sky
from joblib import parallel_config
from lab import Lab
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

pytest.importorskip("sklearn.callback")
pytest.importorskip("rich")

from sklearn.callback import ProgressBar, ScoringMonitor, _transport

# Ten iterations are too few to converge, which does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore")

X, Y = load_iris(return_X_y=True)
CANDIDATES = list(np.logspace(-3, 2, 8))
FITS = 3 * len(CANDIDATES)
PLUGINS = [sky.plugins.sklearn()]


class Unreachable(_transport.Listener):
    """A listener whose socket nobody can connect to, as it is for processes on other machines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        Path(self.address).unlink()
        Path(self.address).touch()


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("callbacks"))
    # With other kernels of OpenBLAS the last digit would differ.
    kernels = {k: v for k, v in os.environ.items() if k.startswith("OPENBLAS_")}
    lab.host(env=kernels).make_environment(PLUGINS[0].transform(sky.Image()))
    yield lab
    lab.close()


@pytest.fixture(scope="module", params=["local threads", "local processes", "ssh threads", "ssh processes"])
def pool(request, lab, serial) -> Iterator[sky.ComputePool]:
    """A pool of 8 threads or 2 processes that is joblib's backend."""
    where, executor = request.param.split()
    provider = sky.SSH(lab.hosts[0].name, config=lab.config) if where == "ssh" else sky.Local()
    threads = executor == "threads"
    worker = sky.Worker(concurrency=8 if threads else 2, executor="thread" if threads else "process")
    with pytest.MonkeyPatch.context() as patch, sky.pool(provider, worker=worker, plugins=PLUGINS) as pool:
        if where == "ssh":
            patch.setattr(_transport, "Listener", Unreachable)
        yield pool


def search(estimator: Any, n_jobs: int, *callbacks: Any, **parameters: Any) -> Any:
    """Search a grid, and return the fitted search."""
    name = "C" if isinstance(estimator, LogisticRegression) else "logisticregression__C"
    grid = GridSearchCV(estimator, {name: CANDIDATES}, cv=3, n_jobs=n_jobs, error_score="raise", **parameters)
    if callbacks:
        grid.set_callbacks(*callbacks)
    with threadpool_limits(1):
        return grid.fit(X, Y)


def monitored(n_jobs: int, inside: bool = False) -> tuple[list[Any], Any]:
    """Search a grid with a monitor on the classifier, perhaps inside a pipeline. Return its log and the search."""
    monitor = ScoringMonitor(scoring=["accuracy", "neg_log_loss"])
    estimator = LogisticRegression(max_iter=10).set_callbacks(monitor)
    found = search(make_pipeline(StandardScaler(), estimator) if inside else estimator, n_jobs)
    return [log.data for log in monitor.get_logs("all")], found


def check_same(found: Any, serial: Any) -> None:
    assert found.best_params_ == serial.best_params_
    assert np.array_equal(found.cv_results_["mean_test_score"], serial.cv_results_["mean_test_score"])
    assert np.array_equal(found.predict(X), serial.predict(X))


@pytest.fixture(scope="module")
def serial() -> tuple[list[Any], Any]:
    logged, found = monitored(1)
    assert len(logged) == 1
    assert len({row["parent_task_id_path"] for row in logged[0]}) > FITS
    return logged, found


@pytest.fixture(scope="module")
def serial_inside() -> tuple[list[Any], Any]:
    return monitored(1, inside=True)


def test_scoring_monitor_logs_a_serial_runs_values(pool, serial):
    """Each row of every fit has a serial run's values, round after round, and no fit fails."""
    for _ in range(3):
        logged, found = monitored(-1)
        assert logged == serial[0]
        check_same(found, serial[1])


def test_scoring_monitor_inside_a_pipeline(pool, serial_inside):
    """A monitor of a pipeline's step logs all fits, as in a serial run."""
    logged, found = monitored(-1, inside=True)
    alone, serial = serial_inside
    assert len(logged[0]) > FITS
    assert logged == alone
    check_same(found, serial)


def test_scoring_monitor_inside_an_estimator_without_callbacks(pool):
    """A monitor in an estimator without callbacks logs all fits, each as a run of its own."""

    def logged(n_jobs):
        monitor = ScoringMonitor(scoring="accuracy")
        estimator = LogisticRegression(max_iter=10).set_callbacks(monitor)
        with threadpool_limits(1):
            OneVsRestClassifier(estimator, n_jobs=n_jobs).fit(X, Y)
        return sorted([log.data for log in monitor.get_logs("all")], key=repr)

    alone = logged(1)
    assert len(alone) == 3
    assert logged(-1) == alone


def test_progress_bar_shows_all_fits(pool, serial, capsys):
    """A search's progress bar is handed on to its fits, and its last state is a serial run's."""

    def shown(n_jobs):
        capsys.readouterr()
        found = search(LogisticRegression(max_iter=10), n_jobs, ProgressBar(max_propagation_depth=None))
        lines = capsys.readouterr().out.splitlines()
        return found, sorted(line[:70].rstrip(" 0123456789…") for line in lines)

    found, lines = shown(-1)
    alone, expected = shown(1)
    assert sum("candidate-split-evaluation | LogisticRegression" in line for line in lines) == FITS
    assert lines == expected
    check_same(found, serial[1])


def test_scoring_monitors_of_concurrent_searches(pool, serial):
    """Three threads that search at once, with a monitor each, get their own rows."""
    results: list[Any] = []

    def run():
        with parallel_config(backend="skyward"):
            monitor = ScoringMonitor(scoring=["accuracy", "neg_log_loss"])
            estimator = LogisticRegression(max_iter=10).set_callbacks(monitor)
            found = search(estimator, -1)
            results.append(([log.data for log in monitor.get_logs("all")], found))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert len(results) == 3
    for logged, found in results:
        assert logged == serial[0]
        check_same(found, serial[1])


def test_scoring_monitor_of_a_returned_estimator(pool):
    """A returned monitor has the rows logged before and a listener of its own, so later rows do not reach the
    original.
    """
    monitor = ScoringMonitor(scoring="accuracy")
    estimator = LogisticRegression(max_iter=10).set_callbacks(monitor)
    estimator.fit(X, Y)
    (back,) = pool.map(clone, [estimator])
    before = len(monitor._log)
    assert back._skl_callbacks[0]._log == monitor._log
    back.fit(X, Y)
    assert len(monitor._log) == before
    assert len(back._skl_callbacks[0].get_logs("all")) == 2


def test_scoring_monitor_made_in_a_task(pool):
    """A monitor made in a task comes back with its log and a listener of this process, while the worker's still
    listens.
    """

    def make(x, y):
        from sklearn.callback import ScoringMonitor
        from sklearn.linear_model import LogisticRegression

        monitor = ScoringMonitor(scoring="accuracy")
        return LogisticRegression(max_iter=10).set_callbacks(monitor).fit(x, y)

    def logged(estimator):
        return [log.data for log in estimator._skl_callbacks[0].get_logs("all")]

    with threadpool_limits(1):
        back = pool.submit(make, X, Y).result(30)
        alone = make(X, Y)
        assert logged(back) == logged(alone)
        assert logged(back.fit(X, Y)) == logged(alone.fit(X, Y))
        (again,) = pool.map(lambda estimator: estimator.fit(X, Y), [back])
        assert len(logged(back)) == 3
        assert len(logged(again)) == 2


def test_transport_imported_by_name_is_replaced(pool):
    """A library's callback that imported the transport's functions by name, before or after us, sends through
    the pool.
    """
    told: list[Any] = []

    class Callback:
        def __init__(self):
            self.handle = _transport.open_listener(told.append, owner=self)

        def tell(self, message):
            from sklearn.callback._transport import can_reuse_listener, send

            assert can_reuse_listener(self.handle)
            send(self.handle, message)
            return message

    callback = Callback()
    assert list(pool.map(callback.tell, range(50))) == list(range(50))
    assert sorted(told) == list(range(50))


def tell(handle, *told):
    """Send to one of scikit-learn's listeners. Return the text of the error that this raises."""

    def task(handle, told):
        from sklearn.callback._transport import send

        try:
            for message in told:
                send(handle, message)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    return task, handle, told


def test_callback_listener_that_raises_is_an_error_in_the_task(pool):
    """A listener's exception is the task's error, and the next message is taken."""
    told = []

    def consume(message):
        if message == 1:
            raise ValueError("not this one")
        told.append(message)

    handle = _transport.open_listener(consume)
    try:
        text = pool.submit(*tell(handle, 0, 1)).result(30)
        assert text.startswith("MessageError: node l")
        assert "ValueError: not this one" in text
        assert pool.submit(*tell(handle, 2)).result(30) is None
        assert told == [0, 2]
    finally:
        _transport.close_listener(handle)


def test_callback_listener_that_was_closed_is_an_error_in_the_task(pool):
    """A message to a closed listener is an error in the task at once."""
    handle = _transport.open_listener(lambda _: _transport.close_listener(handle))
    text = pool.submit(*tell(handle, 1, 2)).result(30)
    assert "scikit-learn's listener is closed" in text


def test_callback_messages_of_a_pool_inside_a_task():
    """Messages of workers of a pool inside a task pass through the task's process to this one."""
    told: list[Any] = []

    def outer(handle, tell):
        with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
            return pool.submit(*tell(handle, 1, 2)).result(30)

    handle = _transport.open_listener(told.append)
    try:
        with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
            assert pool.submit(outer, handle, tell).result(40) is None
        assert told == [1, 2]
    finally:
        _transport.close_listener(handle)


WARNED = """
import logging, sys
import skyward_lite as sky
from sklearn.callback import ScoringMonitor, _transport
from sklearn.linear_model import LogisticRegression

def send(handle, message, more): ...

if len(sys.argv) > 1:
    _transport.send = send
plain = LogisticRegression()
watched = LogisticRegression().set_callbacks(ScoringMonitor(scoring="accuracy"))
for _ in range(2):
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pool.submit(repr, plain).result(30)
        print("plain", file=sys.stderr, flush=True)
        pool.submit(repr, watched).result(30)
        pool.submit(repr, watched).result(30)
"""


@pytest.mark.parametrize("changed", [True, False])
def test_unknown_callback_transport_is_warned_of(changed):
    """An unknown transport is one warning with what to do when the first callback is sent; the known one is none."""
    command = [sys.executable, "-c", WARNED, *(["changed"] if changed else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if not line.startswith("plain")]
    if not changed:
        assert warnings == []
        return
    assert len(warnings) == 1, done.stderr
    assert done.stderr.startswith("plain\nthe callbacks of scikit-learn 1.")
    assert "because its transport has changed. Set callbacks only on what is fitted in this process" in warnings[0]
