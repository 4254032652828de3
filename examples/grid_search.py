"""Search the best settings of a classifier on real data, with a progress bar.

python grid_search.py           # 240 fits
python grid_search.py 1         # 1 value of C in place of 12: 20 fits
"""

import sys

import numpy as np
import skyward_lite as sky
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

values = int(sys.argv[1]) if len(sys.argv) > 1 else 12

# 1,797 pictures of handwritten digits, 8 × 8 pixels each. They come with scikit-learn.
x, y = load_digits(return_X_y=True)

grid = {"C": np.logspace(-2, 3, values), "gamma": np.logspace(-5, -2, 4)}
search = GridSearchCV(SVC(), grid, cv=5, n_jobs=-1)
fits = 5 * len(grid["C"]) * len(grid["gamma"])

# Two nodes on this machine. For your own machines: provider=sky.SSH("me@lab1",
# "me@lab2"), for EC2: provider=sky.AWS(), nodes=10. Nothing else in this script
# changes: the plugin has scikit-learn installed there.
with (
    sky.pool(provider=sky.Local(nodes=2), plugins=[sky.plugins.sklearn()]),
    sky.progress(total=fits),
):
    # scikit-learn runs the fits with joblib, and within this block joblib runs them on
    # the pool. The data cross to each node once, not once per fit.
    search.fit(x, y)

best = ", ".join(f"{name}={value:.3g}" for name, value in search.best_params_.items())
print(f"best of {fits // 5} settings: {best}, accuracy {search.best_score_:.3f}")
