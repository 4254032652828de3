"""Try random settings of a model, and stop when many of them brought nothing better.

python sweep.py         # until 100 trials in a row were no better than the best
python sweep.py 10      # until 10 were
"""

import contextlib
import itertools
import sys
import warnings

import numpy as np
import skyward_lite as sky
from joblib import Parallel, delayed
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

patience = int(sys.argv[1]) if len(sys.argv) > 1 else 100


def trial(seed, x, y):
    """Return the accuracy of random settings, and the settings."""
    # A generator of each trial's own, from its number: the same sweep gives the same
    # trials, wherever they run.
    rng = np.random.default_rng(seed)
    settings = {"C": 10 ** rng.uniform(-3, 4), "gamma": 10 ** rng.uniform(-6, 1)}
    model = make_pipeline(StandardScaler(), SVC(**settings))
    return cross_val_score(model, x, y, cv=5).mean(), settings


x, y = load_breast_cancer(return_X_y=True)
best, unchanged, done = 0.0, 0, 0

# When a sweep is stopped, joblib warns of the trials that were begun and not used. Here
# that is the plan.
warnings.filterwarnings("ignore", r"\d+ tasks", UserWarning)

# For your own machines: provider=sky.SSH("me@lab1", "me@lab2"), for EC2:
# provider=sky.AWS(), nodes=10. The plugin has scikit-learn installed there.
with sky.pool(provider=sky.Local(nodes=2), plugins=[sky.plugins.sklearn()]):
    # The input has no end, and nothing has to know it in advance: a trial is drawn when
    # a slot is about to be free. "generator_unordered" yields each result as soon as it
    # is there, whatever its place in the input.
    results = Parallel(n_jobs=-1, return_as="generator_unordered")(
        delayed(trial)(seed, x, y) for seed in itertools.count()
    )
    # Closing the generator ends the call: trials that wait are dropped, and those that
    # run are ended.
    with contextlib.closing(results):
        for score, settings in results:
            done += 1
            unchanged += 1
            if score > best:
                best, unchanged = score, 0
                shown = ", ".join(
                    f"{name}={value:.2g}" for name, value in settings.items()
                )
                print(f"trial {done:4}: accuracy {best:.4f} with {shown}")
            if unchanged == patience:
                break

print(f"stopped after {done} trials: the last {patience} were no better than {best:.4f}")
