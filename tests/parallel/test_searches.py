"""Grid searches that run at once, with callbacks and with warnings that are errors, give a serial run's numbers.

`make searches` runs ten rounds.
"""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import skyward_lite as sky
from joblib import parallel_config
from sklearn.datasets import load_iris
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Perceptron
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

callback = pytest.importorskip("sklearn.callback")

ROUNDS = int(os.environ.get("ROUNDS", "2"))
X, Y = load_iris(return_X_y=True)
SEARCHES: list[tuple[Any, dict[str, list[Any]]]] = [
    # Those with 2 iterations do not converge: their fits fail where the warning is an error.
    (LogisticRegression(), {"C": list(np.logspace(-2, 2, 6)), "max_iter": [2, 1000]}),
    (Perceptron(random_state=0), {"alpha": [1e-4, 1e-2], "max_iter": [2, 1000]}),
    (SVC(), {"C": [0.1, 1.0, 10.0], "max_iter": [2, -1]}),
    (KNeighborsClassifier(), {"n_neighbors": [1, 3, 5, 7]}),
    (GaussianNB(), {"var_smoothing": [1e-9, 1e-3, 1e-1]}),
    (LinearDiscriminantAnalysis(), {"solver": ["svd", "lsqr"]}),
    (RandomForestClassifier(8, random_state=0), {"max_depth": [1, 3]}),
    (ExtraTreesClassifier(8, random_state=0), {"max_depth": [1, 3]}),
]


def searched(number: int, n_jobs: int) -> tuple[Any, ...]:
    """Search one of the grids with a monitor; what was found, and what the monitor logged."""
    estimator, grid = SEARCHES[number]
    search = GridSearchCV(estimator, grid, cv=3, n_jobs=n_jobs, refit=False)
    monitor = None
    if hasattr(estimator, "set_callbacks"):
        monitor = callback.ScoringMonitor(scoring="accuracy")
        search.estimator = type(estimator)(**estimator.get_params()).set_callbacks(monitor)
    with threadpool_limits(1):
        search.fit(X, Y)
    scores = [search.cv_results_[f"split{split}_test_score"] for split in range(3)]
    logs = [] if monitor is None else [log.data for log in monitor.get_logs("all")]
    return np.array(scores), search.cv_results_["rank_test_score"], logs


def check(got: tuple[Any, ...], alone: tuple[Any, ...]) -> None:
    scores, ranks, logs = got
    assert np.array_equal(scores, alone[0], equal_nan=True)
    assert np.array_equal(ranks, alone[1])
    assert logs == alone[2]


@pytest.fixture(scope="module")
def serial() -> dict[str, list[tuple[Any, ...]]]:
    """Each search alone in this process, with the warning as an error and ignored."""
    found = {}
    for action in ("error", "ignore"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter(action, ConvergenceWarning)
            found[action] = [searched(number, 1) for number in range(len(SEARCHES))]
    assert np.isnan(found["error"][0][0]).any()
    assert not np.isnan(found["ignore"][0][0]).any()
    return found


@pytest.mark.timeout(60 * ROUNDS)
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_concurrent_searches_give_a_serial_runs_numbers(serial, executor):
    """Eight classifiers are searched from eight threads on a fresh pool per round, every other round with the warning
    as an error.
    """
    for number in range(ROUNDS):
        action = ("error", "ignore")[number % 2]
        worker = sky.Worker(concurrency=8 if executor == "thread" else 2, executor=executor)
        found: dict[int, Any] = {}

        def search(number: int, found: dict[int, Any] = found) -> None:
            try:
                with parallel_config("skyward"):
                    found[number] = searched(number, -1)
            except BaseException as error:
                found[number] = error

        with warnings.catch_warnings(), sky.pool(worker=worker):
            warnings.simplefilter("ignore")
            warnings.simplefilter(action, ConvergenceWarning)
            threads = [threading.Thread(target=search, args=(each,)) for each in range(len(SEARCHES))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for each, alone in enumerate(serial[action]):
            if isinstance(found[each], BaseException):
                raise found[each]
            check(found[each], alone)
