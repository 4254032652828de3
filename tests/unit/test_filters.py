"""Warning categories in tasks: those that can be imported at the node, and those that cannot."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap
import threading
import types
import warnings

import boto3.exceptions
import botocore.exceptions
import cloudpickle
import numpy as np
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed, parallel_config
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC
from skyward_lite.pickling import filters, payload

HIDDEN = ["pytest", "_pytest", "boto3", "botocore"]


@pytest.fixture
def made_up(monkeypatch):
    """A package that only this process has: nothing on any disk can be imported by its name."""
    module = types.ModuleType("made_up_sdk.warnings")

    class SdkWarning(UserWarning):
        class Inner(UserWarning):
            pass

    for category, name in ((SdkWarning, "SdkWarning"), (SdkWarning.Inner, "SdkWarning.Inner")):
        category.__module__, category.__qualname__ = module.__name__, name
    module.SdkWarning = SdkWarning
    monkeypatch.setitem(sys.modules, "made_up_sdk", types.ModuleType("made_up_sdk"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def no_stand_ins(monkeypatch):
    """A process that has not met a category yet."""
    monkeypatch.setattr(filters, "_stand_ins", {})


@pytest.fixture(params=["thread", "process"], scope="module")
def node_without(request, tmp_path_factory):
    """A pool whose worker cannot import pytest and boto3; it is joblib's default."""
    directory = tmp_path_factory.mktemp("site")
    (directory / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
        import sys

        class Hide:
            def find_spec(name, path=None, target=None):
                if name.partition(".")[0] in {HIDDEN}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Hide)
        """)
    )
    path = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
    # One slot, as the active filters are the process's, which the threads of a worker share.
    worker = sky.Worker(concurrency=1, executor=request.param)
    with sky.pool(worker=worker, image=sky.Image(env={"PYTHONPATH": path}), plugins=[sky.plugins.sklearn()]) as pool:
        yield pool


@pytest.fixture
def node_with():
    """A pool whose worker has all that the client has; it is joblib's default for the length of a test."""
    with sky.pool(worker=sky.Worker(concurrency=1)) as pool:
        yield pool


@pytest.fixture
def shared_pool():
    """Tells the check for left processes that the pools of this file outlive its tests."""


# This file imports what a node lacks, so no node shall import it.
pytestmark = pytest.mark.usefixtures("functions_by_value", "shared_pool")

FOREIGN = [
    pytest.PytestUnraisableExceptionWarning,
    pytest.PytestCollectionWarning,
    boto3.exceptions.PythonDeprecationWarning,
    botocore.exceptions.ImminentRemovalWarning,
]


def importable(name):
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def under(active, warn=None):
    """Run with these filters, as scikit-learn does, and warn with a category. Return the filters."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        for action, _, category, *_ in active:
            warnings.simplefilter(action, category, append=True)
        if warn is not None:
            warnings.warn("from the task", warn, stacklevel=1)
    described = [(action, category.__module__, category.__qualname__) for action, _, category, *_ in active]
    return described, len(caught)


def described(active):
    return [(action, category.__module__, category.__qualname__) for action, _, category, *_ in active]


def entry(action, category):
    return action, None, category, None, 0


# ------------------------------------------------------------------------------------------------ on the wire


@pytest.mark.parametrize("category", [*FOREIGN, ConvergenceWarning, UserWarning, Warning])
def test_a_category_that_can_be_imported_stays_itself(encoder, category):
    """A warning category that the other end can import arrives as that class."""
    assert payload.loads(*encoder.dumps(category)) is category


def test_nested_categories_go_by_their_qualified_name(encoder, made_up):
    """A category defined in a class is found by its qualified name."""
    assert payload.loads(*encoder.dumps(made_up.SdkWarning.Inner)) is made_up.SdkWarning.Inner


def test_categories_of_the_standard_library_are_plain_pickles(encoder):
    """Categories of the standard library need no stand-in, so their pickle is an ordinary one."""
    assert b"skyward_lite" not in encoder.dumps([DeprecationWarning, ResourceWarning])[0]


def test_categories_that_no_import_finds_travel_by_value(encoder):
    """A local category and one of `__main__` arrive with their attributes."""

    class LocalWarning(UserWarning):
        level = 3

    pickled, buffers = encoder.dumps(LocalWarning)
    assert b"skyward_lite.pickling.filters" not in pickled
    assert payload.loads(pickled, buffers).level == 3


def test_missing_category_gets_a_stand_in(encoder, made_up, monkeypatch, no_stand_ins):
    """A category missing at the other end is a stand-in with the original's name, which no warning is an
    instance of.
    """
    sent = encoder.dumps([made_up.SdkWarning, made_up.SdkWarning.Inner])
    monkeypatch.delitem(sys.modules, made_up.__name__)
    outer, inner = payload.loads(*sent)
    assert outer is not made_up.SdkWarning
    assert issubclass(outer, Warning)
    assert (inner.__module__, inner.__qualname__, inner.__name__) == (made_up.__name__, "SdkWarning.Inner", "Inner")
    assert not issubclass(made_up.SdkWarning, outer)
    assert not issubclass(UserWarning, outer)


def test_stand_in_goes_back_as_the_original_category(encoder, made_up, monkeypatch, no_stand_ins):
    """A client gets its own class back from a node that has a stand-in for it."""
    sent = encoder.dumps(made_up.SdkWarning)
    with monkeypatch.context() as node:
        node.delitem(sys.modules, made_up.__name__)
        stand_in = payload.loads(*sent)
        back = encoder.dumps((stand_in, stand_in("text")))
    filters._stand_ins.clear()
    category, instance = payload.loads(*back)
    assert category is made_up.SdkWarning
    assert type(instance) is made_up.SdkWarning
    assert instance.args == ("text",)


def test_missing_module_of_a_category_is_tried_once(no_stand_ins, monkeypatch):
    """A failing import of a category's module is not repeated, as scikit-learn sends all filters with each task."""
    tried = []
    monkeypatch.setattr("importlib.import_module", lambda name: tried.append(name) or __import__("no_such_module"))
    found = {filters.find("no_such_sdk", "SdkWarning") for _ in range(3)}
    assert len(found) == 1
    assert tried == ["no_such_sdk"]


def test_threads_get_the_same_stand_in(no_stand_ins, monkeypatch):
    """Threads that meet a missing category at the same time get one stand-in."""
    both = threading.Barrier(2)

    def fail(name):
        both.wait(10)
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", fail)
    found = []
    threads = [threading.Thread(target=lambda: found.append(filters.find("no_such", "W"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("raise RuntimeError('no GPU here')", "Gone"),
        ("class Other: pass", "Gone"),
        ("Gone = 3", "Gone"),
        ("class Gone: pass", "Gone"),
        ("def __getattr__(name): raise KeyError(name)", "Gone"),
        ("this is no Python", "Gone"),
    ],
)
def test_category_whose_module_raises_or_lacks_it_gets_a_stand_in(tmp_path, monkeypatch, no_stand_ins, source, name):
    """A module that raises, lacks the name or has another object there leads to a stand-in and no error."""
    (tmp_path / "odd_sdk.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_sdk", raising=False)
    category = filters.find("odd_sdk", name)
    assert issubclass(category, Warning)
    assert (category.__module__, category.__qualname__) == ("odd_sdk", name)


def test_categories_of_modules_registered_by_value(encoder, made_up, monkeypatch):
    """`cloudpickle.register_pickle_by_value` holds for categories, too."""
    cloudpickle.register_pickle_by_value(made_up)
    try:
        pickled, _ = encoder.dumps(made_up.SdkWarning)
    finally:
        cloudpickle.unregister_pickle_by_value(made_up)
    assert b"skyward_lite.pickling.filters" not in pickled


def test_objects_that_claim_to_be_classes(encoder):
    """Proxies that lie about their class are pickled as usual, as the check for categories does not believe them."""

    class Proxy:
        __class__ = type

        def __reduce_ex__(self, protocol):
            return (int, ())

    assert payload.loads(*encoder.dumps(Proxy())) == 0


# ------------------------------------------------------------------------------------------------ on nodes


@pytest.mark.slow
def test_node_without_packages_lacks_them(node_without):
    """The node of the following tests lacks the packages that it should."""
    assert Parallel(n_jobs=2)(delayed(importable)(name) for name in HIDDEN) == [False] * 4
    assert all(importable(name) for name in HIDDEN)


def test_tasks_carry_filters_of_packages_that_the_node_lacks(node_without, made_up):
    """Categories of packages that the node lacks are filters in its tasks, under their names, that never match."""
    active = [entry("error", c) for c in [*FOREIGN, made_up.SdkWarning, made_up.SdkWarning.Inner]]
    active += [entry("always", UserWarning)]
    got = Parallel(n_jobs=2)(delayed(under)(active, UserWarning) for _ in range(4))
    assert got == [(described(active), 1)] * 4


def test_submitted_tasks_carry_filters_of_packages_that_the_node_lacks(node_without, made_up):
    """Submitted tasks have the filters' stand-ins as joblib's batches do."""
    active = [entry("error", made_up.SdkWarning)]
    assert node_without.submit(under, active).result() == (described(active), 0)
    assert node_without.submit(lambda: described(active)).result() == described(active)


def test_results_with_stand_ins_have_the_clients_category(node_without, made_up):
    """Results and exceptions that hold a stand-in arrive with the client's own class."""
    categories = [*FOREIGN, made_up.SdkWarning]
    assert Parallel(n_jobs=2)(delayed(list)(categories) for _ in range(2)) == [categories] * 2

    def fail(category):
        raise category("told")

    for category in categories:
        with pytest.raises(category, match="told"):
            Parallel(n_jobs=2)(delayed(fail)(category) for _ in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("category", [*FOREIGN, ConvergenceWarning])
def test_filter_of_an_importable_category_works_on_the_node(node_with, category):
    """With "error" for a category the node has, a task that warns with it fails; with "ignore" it goes on."""
    with pytest.raises(category, match="from the task"):
        Parallel(n_jobs=2)(delayed(under)([entry("error", category)], category) for _ in range(2))
    assert (
        Parallel(n_jobs=2)(delayed(under)([entry("ignore", category)], category) for _ in range(2))
        == [(described([entry("ignore", category)]), 0)] * 2
    )


def test_category_of_the_node_alone_is_a_stand_in_at_the_client(node_with):
    """A category that the client lacks arrives as a stand-in with its name, and is no error."""

    def other():
        import sys
        import types

        module = types.ModuleType("of_the_node")
        module.NodeWarning = type("NodeWarning", (UserWarning,), {"__module__": "of_the_node"})
        sys.modules["of_the_node"] = module
        return module.NodeWarning

    def fail():
        raise other()("only here")

    category = node_with.submit(other).result()
    assert (category.__module__, category.__qualname__) == ("of_the_node", "NodeWarning")
    with pytest.raises(category, match="only here"):
        node_with.submit(fail).result()


# ------------------------------------------------------------------------------------------------ scikit-learn


def searched(n_jobs):
    x, y = load_iris(return_X_y=True)
    return GridSearchCV(SVC(), {"C": [0.1, 1, 10]}, cv=3, n_jobs=n_jobs).fit(x, y)


def test_scikit_learn_runs_with_filters_that_the_node_lacks(node_without, made_up):
    """scikit-learn runs although it pickles all active filters into each task; here they are set inside the block."""
    with warnings.catch_warnings():
        for category in (*FOREIGN, made_up.SdkWarning):
            warnings.simplefilter("error", category)
        warnings.filterwarnings("ignore", "some text", made_up.SdkWarning, module="made_up")
        before, entries = warnings.filters, list(warnings.filters)
        remote = searched(-1)
        assert warnings.filters is before
        assert list(warnings.filters) == entries
    with parallel_config(backend="sequential"):
        serial = searched(None)
    np.testing.assert_array_equal(remote.cv_results_["mean_test_score"], serial.cv_results_["mean_test_score"])


@pytest.mark.slow
def test_scikit_learn_runs_with_filters_of_before_the_block(tmp_path):
    """scikit-learn runs with filters that a program set up before it opened its pool."""
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent("""
        import sys, types, warnings

        sdk = types.ModuleType("made_up_sdk")
        sdk.SdkWarning = type("SdkWarning", (UserWarning,), {"__module__": "made_up_sdk"})
        sys.modules["made_up_sdk"] = sdk
        warnings.simplefilter("error", sdk.SdkWarning)

        class MainWarning(UserWarning):
            pass

        warnings.simplefilter("error", MainWarning)
        import skyward_lite as sky
        from sklearn.datasets import load_iris
        from sklearn.model_selection import cross_val_score
        from sklearn.svm import SVC

        entries = list(warnings.filters)
        with sky.pool(worker=sky.Worker(concurrency=2), plugins=[sky.plugins.sklearn()]):
            print(len(cross_val_score(SVC(), *load_iris(return_X_y=True), cv=3, n_jobs=-1)))
        assert warnings.filters == entries
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.returncode) == ("3\n", 0), done.stderr


def test_scikit_learn_warning_as_an_error_on_the_node(node_without):
    """A filter of the client whose category the node has fails the fit that warns."""
    x, y = load_iris(return_X_y=True)
    model = LogisticRegression(max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        with pytest.raises(ConvergenceWarning):
            GridSearchCV(model, {"C": [1, 2]}, cv=2, n_jobs=-1, error_score="raise").fit(x, y)
        warnings.simplefilter("ignore", ConvergenceWarning)
        GridSearchCV(model, {"C": [1, 2]}, cv=2, n_jobs=-1, error_score="raise").fit(x, y)


def test_plain_cloudpickle_fails_for_a_missing_category(made_up):
    """cloudpickle alone sends a category by a name that the other end cannot import."""
    sent = cloudpickle.dumps(made_up.SdkWarning)
    with pytest.MonkeyPatch.context() as node:
        node.delitem(sys.modules, made_up.__name__)
        node.delitem(sys.modules, "made_up_sdk")
        with pytest.raises(ModuleNotFoundError, match="made_up_sdk"):
            pickle.loads(sent)
