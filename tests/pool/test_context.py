"""What a program has set for all of its calculations holds in tasks, as it was when the pool was opened."""

from __future__ import annotations

import json
import locale
import os
import re
import sys
import warnings

import pytest
import sklearn
import skyward_lite as sky
from joblib import Parallel, delayed
from sklearn.exceptions import ConvergenceWarning
from skyward_lite.node import first_imports


def shown(text, category):
    """Return whether a warning is shown in a task; "error" if it is raised."""
    seen = []
    with warnings.catch_warnings():
        warnings.showwarning = lambda *args: seen.append(args)
        try:
            warnings.warn(text, category, stacklevel=1)
        except category:
            return "error"
    return bool(seen)


def config(*_):
    """Return scikit-learn's configuration in a task that imports scikit-learn with its first argument."""
    return sklearn.get_config()["assume_finite"], sklearn.get_config()["display"]


def config_of_its_own_import(_=None):
    import sklearn

    return sklearn.get_config()["assume_finite"], sklearn.get_config()["display"]


def surroundings():
    return os.environ.get("OMP_NUM_THREADS"), os.environ.get("KMP_BLOCKTIME"), locale.setlocale(locale.LC_ALL)


@pytest.fixture
def settings(monkeypatch):
    """The settings of a program: warning filters, scikit-learn's configuration, variables, the locale."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("KMP_BLOCKTIME", "0")
    before = locale.setlocale(locale.LC_ALL)
    locale.setlocale(locale.LC_NUMERIC, "C.UTF-8")
    with warnings.catch_warnings(), sklearn.config_context(assume_finite=True, display="text"):
        warnings.resetwarnings()
        warnings.filterwarnings("error", message="a mistake")
        warnings.filterwarnings("ignore", message="noise")
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_settings_of_the_program_hold_in_tasks(settings, executor):
    """Filters, but none raises; scikit-learn's configuration without its own `delayed`; variables; the locale."""
    with sky.pool(worker=sky.Worker(concurrency=2, executor=executor)) as pool:
        assert pool.submit(surroundings).result() == ("3", "0", locale.setlocale(locale.LC_ALL))
        cases = [
            ("noise", UserWarning),
            ("noise", DeprecationWarning),
            ("other", UserWarning),
            ("a mistake", UserWarning),
        ]
        for _ in range(2):
            results = Parallel(n_jobs=2)(delayed(shown)(*case) for case in cases)
            assert results == [False, False, True, True]
        # The category's package comes with this task, and its filter with it.
        assert pool.submit(shown, "it did not converge", ConvergenceWarning).result() is False
        assert Parallel(n_jobs=2)(delayed(config)(ConvergenceWarning) for _ in range(4)) == [(True, "text")] * 4


@pytest.mark.parametrize("worker", [sky.Worker(concurrency=1), sky.Worker(concurrency=2)], ids=["one", "two"])
def test_a_task_that_imports_scikit_learn_itself_has_it_configured(settings, worker):
    """Also the first one, which begins before scikit-learn is there."""

    def there():
        import sys

        return "sklearn" in sys.modules

    with sky.pool(worker=worker) as pool:
        assert pool.submit(there).result() is False
        assert Parallel(n_jobs=2)(delayed(config_of_its_own_import)() for _ in range(4)) == [(True, "text")] * 4


def test_nothing_that_cannot_be_applied_fails_a_task(monkeypatch):
    """Filters that match nothing, an option that another scikit-learn lacks, and one that it refuses."""
    from skyward_lite.client import context
    from skyward_lite.node.context import Context

    with warnings.catch_warnings():
        odd = [
            ("ignore", re.compile(b"bytes"), UserWarning, None, 0),
            ("ignore", None, UserWarning, None, "7"),
            ("ignore", None, (UserWarning, FutureWarning), None, 0),
            ("ignore", 7, UserWarning, None, 0),
            ("ignore", None, UserWarning, None, 12345),
        ]
        warnings.filters[:0] = odd
        noted = json.loads(context.record())
        assert [item for item in noted["filters"] if item[4] == 12345]
        assert not [item for item in noted["filters"] if item[4] == "7"]
        noted["filters"].append(["ignore", "(", ["builtins", "UserWarning"], None, 0])
        noted["sklearn"] = {"no_option": 1, "assume_finite": True, "array_api_dispatch": "?"}
        monkeypatch.setattr(warnings, "filters", [*warnings.filters, None])
        with sklearn.config_context():
            before = dict(sys.modules["sklearn._config"]._global_config)
            try:
                Context(json.dumps(noted)).for_thread()()
                assert sklearn.get_config()["assume_finite"] is True
            finally:
                sys.modules["sklearn._config"]._global_config.clear()
                sys.modules["sklearn._config"]._global_config.update(before)
                first_imports.after_each(lambda: True)


def test_a_task_sets_its_own(settings):
    """What a task sets itself comes before the program's."""

    def loud():
        warnings.simplefilter("always")
        with sklearn.config_context(assume_finite=False):
            return shown("noise", UserWarning), sklearn.get_config()["assume_finite"]

    with sky.pool(worker=sky.Worker(concurrency=2), image=sky.Image(env={"OMP_NUM_THREADS": "1"})) as pool:
        assert pool.submit(loud).result() == (True, False)
        assert pool.submit(surroundings).result()[0] == "1"


def test_a_context_that_is_too_large_loses_its_filters():
    """A hello has a bound; ten thousand filters are more."""
    from skyward_lite.client import context

    with warnings.catch_warnings():
        for n in range(10_000):
            warnings.filters.insert(0, ("ignore", None, UserWarning, None, n + 1))
        assert len(context.record()) < context.MAX_CONTEXT
