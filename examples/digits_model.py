"""The model that plugin.py uses, in a module of its own.

What a module keeps is there for all tasks of a worker process.
"""

import time

model = None


def load():
    """Make the model; stands for one that takes long to load and needs much memory."""
    from sklearn.datasets import load_digits
    from sklearn.ensemble import RandomForestClassifier

    global model
    begin = time.perf_counter()
    x, y = load_digits(return_X_y=True)
    model = RandomForestClassifier(50, random_state=0).fit(x[:1500], y[:1500])
    return time.perf_counter() - begin


def predict(pictures):
    """Return the digits that the pictures show."""
    if model is None:
        raise RuntimeError("the model is not loaded here: is the plugin in plugins=?")
    return model.predict(pictures)
