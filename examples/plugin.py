"""Load a model once per worker process, and report slow calls: a plugin.

python plugin.py        # all 297 pictures
python plugin.py 20     # fewer
"""

import contextlib
import functools
import os
import sys
import time

import skyward_lite as sky
from joblib import Parallel, delayed
from sklearn.datasets import load_digits

import digits_model

count = int(sys.argv[1]) if len(sys.argv) > 1 else 297
SLOW_SECONDS = 0.2


@contextlib.contextmanager
def loaded_model(info):
    """Load the model in a worker process, before its first task.

    What follows `yield` would run when the process ends.
    """
    seconds = digits_model.load()
    print(f"model loaded in {seconds:.1f} s by process {os.getpid()}")
    yield


def report_slow_calls(function):
    """Return what a worker calls in place of a task's function."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds = time.perf_counter() - begin
            if seconds > SLOW_SECONDS:
                print(f"{function.__name__} took {seconds:.2f} s")

    return call


def classify(picture):
    """Return the digit that a picture shows. Only the picture travels."""
    return int(digits_model.predict(picture.reshape(1, -1))[0])


pictures, digits = load_digits(return_X_y=True)
pictures, digits = pictures[1500 : 1500 + count], digits[1500 : 1500 + count]

plugins = [
    sky.plugins.joblib(),  # joblib uses the pool: the default, which plugins= replaces
    sky.Plugin("digits", around_worker=loaded_model, decorate=report_slow_calls),
]

# For your own machines: provider=sky.SSH("me@lab1", "me@lab2"), for EC2:
# provider=sky.AWS(), nodes=10. There the workers get digits_model.py from this process,
# and image=sky.Image(pip=["scikit-learn"]) installs what it imports.
with sky.pool(
    provider=sky.Local(nodes=2), worker=sky.Worker(concurrency=4), plugins=plugins
):
    found = Parallel(n_jobs=-1)(delayed(classify)(picture) for picture in pictures)

right = sum(a == b for a, b in zip(found, digits, strict=True))
print(f"{right} of {count} pictures are recognised")
