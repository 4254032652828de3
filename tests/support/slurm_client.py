"""A program that uses the nodes of the job it runs in, as users' programs do. Prints what it found as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import skyward_lite as sky
from joblib import Parallel, delayed


def slow_task(x: int) -> int:
    time.sleep(0.01)
    return x * 2


def where(_: object) -> str:
    return os.environ["SLURMD_NODENAME"]


def main() -> None:
    """Run the example's 2,000 tasks and a search on the job's own nodes."""
    from sklearn.datasets import load_iris
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    x, y = load_iris(return_X_y=True)
    with sky.pool(sky.Slurm()) as pool:
        results = Parallel(n_jobs=-1)(delayed(slow_task)(i) for i in range(2000))
        grid = GridSearchCV(SVC(), {"C": [0.1, 1, 10]}, cv=5, n_jobs=-1).fit(x, y)
        found = {
            "right": results == [i * 2 for i in range(2000)],
            "nodes": sorted(set(pool.map(where, range(40)))),
            "slots": [node.slots for node in pool.nodes()],
            "scores": list(grid.cv_results_["mean_test_score"]),
            "queue": subprocess.check_output(["squeue", "--noheader", "--format=%i"], text=True).split(),
        }
    serial = GridSearchCV(SVC(), {"C": [0.1, 1, 10]}, cv=5, n_jobs=1).fit(x, y)
    found["serial"] = list(serial.cv_results_["mean_test_score"])
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
