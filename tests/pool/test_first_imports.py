"""Imports of a worker's first tasks, which run at once in a fresh process, happen one after the other."""

from __future__ import annotations

import os
import sys
import textwrap
import warnings

import numpy as np
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed

CLASSIFIERS = {
    "sklearn.ensemble": "RandomForestClassifier",
    "sklearn.tree": "DecisionTreeClassifier",
    "sklearn.svm": "SVC",
    "sklearn.neighbors": "KNeighborsClassifier",
    "sklearn.naive_bayes": "GaussianNB",
    "sklearn.linear_model": "LogisticRegression",
    "sklearn.discriminant_analysis": "LinearDiscriminantAnalysis",
    "sklearn.neural_network": "MLPClassifier",
    "sklearn.gaussian_process": "GaussianProcessClassifier",
    "sklearn.semi_supervised": "LabelSpreading",
}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["call", "function"])
def test_concurrent_first_imports_of_ten_classifiers(where):
    """Ten classifiers can be a pool's first tasks, each imported when its call is rebuilt or within the function."""
    from sklearn.datasets import load_iris

    # Local functions go by value, so no task imports this file, and numpy with it, before the others.
    def classifier(module, name):
        import importlib

        kind = getattr(importlib.import_module(module), name)
        known = kind().get_params()
        return kind(**{k: v for k, v in {"random_state": 0, "max_iter": 500, "n_estimators": 5}.items() if k in known})

    def predict(model, x, y):
        return model.fit(x, y).predict(x)

    def import_and_predict(module, name, x, y):
        return predict(classifier(module, name), x, y)

    models = [classifier(*item) for item in CLASSIFIERS.items()]
    x, y = [array.tolist() for array in load_iris(return_X_y=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        serial = [predict(model, x, y) for model in models]
    for _ in range(3):
        with sky.pool(worker=sky.Worker(concurrency=10)):
            calls = (
                [delayed(predict)(model, x, y) for model in models]
                if where == "call"
                else [delayed(import_and_predict)(*item, x, y) for item in CLASSIFIERS.items()]
            )
            got = Parallel(n_jobs=-1, batch_size=1, pre_dispatch="all")(calls)
        np.testing.assert_array_equal(got, serial)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Write modules that the client and its workers can import."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(sources):
        for name, source in sources.items():
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(source))

    return write


WHOLE = {
    "gate": """
        import threading
        began, reached = threading.Event(), threading.Event()
        """,
    # Either module can be imported first. Without the lock, another thread reaches the other one meanwhile.
    "whole/__init__": """
        from gate import began, reached
        began.set()
        reached.wait(1)
        X = 1
        from .part import A
        """,
    "whole/part": """
        from gate import reached
        reached.set()
        from whole import X
        A = X
        """,
}


def import_whole():
    import whole

    return whole.A


def import_part():
    from gate import began

    assert began.wait(20)
    import whole.part

    return whole.part.A


@pytest.mark.slow
def test_waiting_for_an_import_does_not_count_as_task_time(modules):
    """A task waits twice its time limit while another thread imports, and then returns."""
    modules({"hold": "import threading\nheld, let_go = threading.Event(), threading.Event()\n", "quick": "X = 1\n"})

    def hold():
        import threading

        import hold
        from skyward_lite.node import first_imports

        def stay():
            with first_imports.alone():
                hold.held.set()
                return hold.let_go.wait(30)

        threading.Thread(target=stay).start()
        return hold.held.wait(20)

    def import_quick():
        import quick

        return quick.X

    def let_go():
        import sys

        sys.modules["hold"].let_go.set()

    with sky.pool(worker=sky.Worker(concurrency=2, task_timeout=1), plugins=[]) as pool:
        assert pool.submit(hold).result(20)
        waiting = pool.submit(import_quick)
        with pytest.raises(TimeoutError):
            waiting.result(2)
        pool.submit(let_go).result(20)
        assert waiting.result(20) == 1


@pytest.mark.slow
def test_concurrent_import_of_a_package_from_two_modules(modules):
    """Two modules that import a package at once see it whole, where Python's own locks would show one of them a
    part.
    """
    modules(WHOLE)
    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        futures = [pool.submit(import_whole), pool.submit(import_part)]
        assert [future.result(20) for future in futures] == [1, 1]


def test_module_that_waits_for_importing_threads(modules):
    """A module may wait for threads that it starts and that import, as these do not wait for it."""
    waiting = """
        import threading
        def load():
            import waited
            found.append(waited.VALUE)
        found = []
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
        """
    modules({"waiting": waiting, "waited": "VALUE = 7"})

    def found():
        import waiting

        return waiting.found

    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        assert pool.submit(found).result(20) == [7]


SLOW = "from gate import began, reached\nbegan.set()\nassert reached.wait(20)\nVALUE = 8"


def import_slowly():
    import slow

    return slow.VALUE


def import_meanwhile():
    from gate import began, reached

    assert began.wait(20)
    assert "slow" in sys.modules
    reached.set()
    import slow

    return slow.VALUE


def test_import_waits_for_a_module_that_another_thread_imports(modules):
    """A task waits for a module that is in `sys.modules` while its body still runs in another thread."""
    modules({"gate": WHOLE["gate"], "slow": SLOW})
    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        # This module, and the gate.
        pool.submit(import_gate).result(20)
        futures = [pool.submit(import_slowly), pool.submit(import_meanwhile)]
        assert [future.result(20) for future in futures] == [8, 8]


def fork_meanwhile():
    from gate import began, reached

    assert began.wait(20)
    pid = os.fork()
    if pid == 0:
        import waited

        os._exit(waited.VALUE)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        reached.set()


def test_forked_child_imports_while_its_parent_does(modules):
    """A child that is forked during an import can import, although the thread that holds the lock is not in the
    child.
    """
    modules({"gate": WHOLE["gate"], "slow": SLOW, "waited": "VALUE = 7"})
    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        # This module, and the gate.
        pool.submit(import_gate).result(20)
        slowly = pool.submit(import_slowly)
        assert pool.submit(fork_meanwhile).result(20) == 7
        assert slowly.result(20) == 8


def import_gate():
    import gate  # noqa: F401


def rebuild(path, text):
    """Fail the first time, as an object can while another thread imports its module."""
    if not os.path.exists(path):
        open(path, "w").close()
        raise ImportError(text)
    return abs


class Rebuilt:
    def __init__(self, path, text):
        self.path = path
        self.text = text

    def __reduce__(self):
        return rebuild, (self.path, self.text)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_call_is_rebuilt_again_after_a_partial_import(tmp_path, executor):
    """A call that failed to be rebuilt by a half-imported module is rebuilt once more; any other error is the
    task's.
    """
    with sky.pool(worker=sky.Worker(concurrency=2, executor=executor), plugins=[]) as pool:
        half = Rebuilt(str(tmp_path / "half"), "cannot import name 'x' from partially initialized module 'y'")
        assert pool.submit(lambda function: function(-1), half).result(20) == 1
        wrong = Rebuilt(str(tmp_path / "wrong"), "no licence")
        with pytest.raises(ImportError, match="no licence"):
            pool.submit(lambda function: function(-1), wrong).result(20)


def rebuild_never():
    raise ImportError("cannot import name 'x' from 'y'")


class Never:
    def __reduce__(self):
        return rebuild_never, ()


def test_call_that_cannot_be_rebuilt_has_one_error(shared_pool):
    """The error of a call that cannot be rebuilt does not show the first attempt as well."""
    with pytest.raises(ImportError, match="cannot import name 'x'") as caught:
        shared_pool.submit(abs, Never()).result(20)
    assert str(caught.value.__cause__).count("Traceback") == 1


def test_warnings_during_an_import_name_the_importer(modules):
    """`stacklevel=2` in a module's body means the line that imports it, and tracebacks show no more than
    Python's do.
    """
    modules(
        {
            "deprecated": "import warnings\nwarnings.warn('old', UserWarning, stacklevel=2)",
            "failing": "raise LookupError('inside')",
        }
    )

    def imports():
        import traceback
        import warnings

        with warnings.catch_warnings(record=True) as log:
            warnings.simplefilter("always")
            import deprecated  # noqa: F401
        try:
            import failing  # noqa: F401
        except LookupError as error:
            frames = traceback.extract_tb(error.__traceback__)
        return [entry.filename for entry in log], [frame.name for frame in frames], imports.__code__.co_filename

    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        files, frames, own = pool.submit(imports).result(20)
        assert files == [own]
        assert frames == ["imports", "<module>"]
