"""Real scikit-learn on a pool gives a serial run's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import skyward_lite as sky
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.svm import SVC


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_grid_search_equals_a_serial_run(executor):
    """best_params_, best_score_ and every score of cv_results_."""
    x, y = load_digits(return_X_y=True)
    x, y = x[:400], y[:400]
    grid = {"C": [0.1, 1, 10], "gamma": [1e-4, 1e-3]}
    serial = GridSearchCV(SVC(), grid, cv=3, n_jobs=1).fit(x, y)
    with sky.pool(worker=sky.Worker(concurrency=2, executor=executor)):
        remote = GridSearchCV(SVC(), grid, cv=3, n_jobs=-1).fit(x, y)
        scores = cross_val_score(SVC(), x, y, cv=3, n_jobs=-1)
    assert remote.best_params_ == serial.best_params_
    assert remote.best_score_ == serial.best_score_
    for name in serial.cv_results_:
        if "score" in name and "time" not in name:
            np.testing.assert_array_equal(remote.cv_results_[name], serial.cv_results_[name])
    np.testing.assert_array_equal(scores, cross_val_score(SVC(), x, y, cv=3))
