"""Warning filters of scikit-learn's searches and fits, many of which run side by side in one process."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
import skyward_lite as sky
from joblib import Parallel
from sklearn import get_config
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.utils.parallel import _FuncWrapper

X, Y = (part[:200] for part in load_digits(return_X_y=True))


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


def filters(_=None):
    return [tuple(map(repr, item)) for item in warnings.filters]


def failed_candidates():
    """Count the candidates of a grid search whose fits failed."""
    grid = {"C": list(np.logspace(-2, 2, 12))}
    try:
        search = GridSearchCV(LogisticRegression(max_iter=2), grid, cv=3, n_jobs=-1, refit=False).fit(X, Y)
    except ValueError:
        # All fits have failed.
        return 12
    return int(np.isnan(search.cv_results_["mean_test_score"]).sum())


def alternating(rounds):
    found = []
    for i in range(rounds):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("ignore" if i % 2 else "error", ConvergenceWarning)
            found.append(failed_candidates())
    return found


@pytest.mark.slow
def test_warning_filters_of_concurrent_searches(threads):
    """Each search has the filters of its own call, and the worker's own stay as they were."""
    # The client's filters of a package come to a worker with the package.
    alternating(1)
    before = threads.submit(filters).result(20)
    assert alternating(8) == [12, 0] * 4
    assert [threads.submit(filters).result(20) for _ in range(16)] == [before] * 16


@pytest.mark.slow
def test_warning_filters_with_the_process_executor():
    """With `executor="process"` the standard `warnings` module is enough, as no tasks run side by side."""
    with sky.pool(worker=sky.Worker(concurrency=2, executor="process")) as pool:
        before = pool.submit(filters).result(20)
        assert alternating(4) == [12, 0] * 2
        assert {tuple(pool.submit(filters).result(20)) for _ in range(4)} == {tuple(before)}


def fit(c):
    try:
        LogisticRegression(max_iter=2, C=c).fit(X, Y)
    except ConvergenceWarning:
        return "raised"
    return "fitted"


@pytest.mark.parametrize("batch_size", [1, 10])
def test_warning_filters_of_concurrent_client_threads(batch_size):
    """scikit-learn's wrapper sets filters in each task; two client threads each have their own."""
    found = {}

    def client(action):
        def call(c):
            wrapper = _FuncWrapper(fit)
            wrapper.with_config_and_warning_filters(get_config(), [(action, None, ConvergenceWarning, None, 0)])
            return wrapper, (c,), {}

        found[action] = Parallel(n_jobs=-1, backend="skyward", batch_size=batch_size)(
            call(c) for c in np.linspace(0.1, 1, 80)
        )

    clients = [threading.Thread(target=client, args=(action,)) for action in ("error", "ignore")]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(50)
    assert found == {"error": ["raised"] * 80, "ignore": ["fitted"] * 80}
