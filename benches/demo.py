"""The main job on the embedded default: sleeping tasks on two nodes, then a grid search that equals a serial run."""

from __future__ import annotations

import argparse
import time

import numpy as np
import skyward_lite as sky
from joblib import Parallel, delayed
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

NAP = 0.05


def nap(x: int) -> int:
    """Stand for a task that waits: an API call, a download."""
    time.sleep(NAP)
    return x * 2


def main() -> None:
    """Run both jobs and print what they did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few tasks and fits only")
    smoke = parser.parse_args().smoke
    tasks = 200 if smoke else 2000

    print(f"1. {tasks:,} tasks of {NAP * 1000:.0f} ms on 2 nodes with 50 threads each")
    started = time.perf_counter()
    with sky.pool(provider=sky.Local(nodes=2), worker=sky.Worker(concurrency=50)) as pool:
        print(f"   ready after {time.perf_counter() - started:.2f} s:")
        for node in pool.nodes():
            print(f"   {node.name}: {node.state}, {node.slots} slots, process {node.pid}, over SSH")
        begin = time.perf_counter()
        results = Parallel(n_jobs=-1)(delayed(nap)(i) for i in range(tasks))
        took = time.perf_counter() - begin
        assert results == [2 * i for i in range(tasks)]
        left = time.perf_counter()
    left = time.perf_counter() - left
    ideal = tasks * NAP / 100
    print(f"   {took:.2f} s; ideal {ideal:.2f} s; efficiency {ideal / took:.1%}; left after {left:.2f} s")

    x, y = load_digits(return_X_y=True)
    grid = {"C": np.logspace(-2, 3, 8), "gamma": np.logspace(-5, -2, 4)}
    if smoke:
        x, y, grid = x[:300], y[:300], {"C": [1, 10]}
    search = GridSearchCV(SVC(), grid, cv=5, n_jobs=-1)
    fits = 5 * int(np.prod([len(v) for v in grid.values()]))
    print(f"2. GridSearchCV(SVC(), cv=5, n_jobs=-1) on the digits: {fits} fits")
    with sky.pool(provider=sky.Local(nodes=2), worker=sky.Worker(concurrency=1)):
        begin = time.perf_counter()
        search.fit(x, y)
        took = time.perf_counter() - begin
    begin = time.perf_counter()
    serial = GridSearchCV(SVC(), grid, cv=5, n_jobs=1).fit(x, y)
    print(f"   {took:.2f} s; serial {time.perf_counter() - begin:.2f} s")
    scores = [name for name in serial.cv_results_ if "score" in name and "time" not in name]
    for name in scores:
        np.testing.assert_array_equal(search.cv_results_[name], serial.cv_results_[name], err_msg=name)
    assert search.best_params_ == serial.best_params_
    assert search.best_score_ == serial.best_score_
    shown = ", ".join(f"{k}={v:.4g}" for k, v in search.best_params_.items())
    print(f"   best: {shown}, score {search.best_score_:.4f}")
    print(f"   best_params_, best_score_ and all {len(scores)} score columns of cv_results_ equal the serial run's")


if __name__ == "__main__":
    main()
