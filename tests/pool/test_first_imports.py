"""Tasks that begin at once in a fresh process import what they need one after the other."""

from __future__ import annotations

import os
import sys
import textwrap
import warnings

import numpy as np
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from sklearn.datasets import load_iris

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
def test_ten_classifiers_are_the_first_tasks_of_a_pool(where):
    """Each has a module of its own, imported when the call is rebuilt or within the function."""

    # In here, so that they go by value: no task imports this module, and scikit-learn with it, for the others.
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
    # Either of the two can be imported first. Without the lock, the other is reached in another thread meanwhile.
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


def test_a_wait_for_an_import_is_not_the_tasks_time(modules):
    """A task with a limit waits for twice as long, while another thread imports; then it returns."""
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
def test_a_package_is_entered_by_two_modules_at_once(modules):
    """Python's own locks would let one of the two see a module that is half imported."""
    modules(WHOLE)
    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        futures = [pool.submit(import_whole), pool.submit(import_part)]
        assert [future.result(20) for future in futures] == [1, 1]


def test_a_module_may_wait_for_threads_that_import(modules):
    """Those that it starts do not wait for it."""
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


def test_a_module_that_another_thread_imports_is_waited_for(modules):
    """It is in `sys.modules` before its body has run."""
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


def test_a_forked_child_imports_while_its_parent_does(modules):
    """The thread that holds the lock is not in the child."""
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
    """Fail the first time, as an import in another thread can make it."""
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


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_a_call_is_rebuilt_once_more_after_a_half_import(tmp_path, executor):
    """Nothing of it has run. Another error is the task's."""
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


def test_a_call_that_cannot_be_rebuilt_has_one_error(shared_pool):
    """Its text does not show the first attempt as well."""
    with pytest.raises(ImportError, match="cannot import name 'x'") as caught:
        shared_pool.submit(abs, Never()).result(20)
    assert str(caught.value.__cause__).count("Traceback") == 1


def test_warnings_of_an_import_are_about_its_importer(modules):
    """`stacklevel=2` in a module's body is the line that imports it, and tracebacks show no more than Python's do."""
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
