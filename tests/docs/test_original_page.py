"""Promises of Skyward's joblib page, behaviour by behaviour, and its own snippets with another import line."""

from __future__ import annotations

import inspect
import logging
import operator
import os
import socket
import sys
import threading
import time
import types
import warnings
from concurrent.futures import Future
from importlib import metadata

import joblib
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from joblib.parallel import ParallelBackendBase, SequentialBackend, get_active_backend
from original_page import BASIC, LEARNED, TUNED
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.svm import SVC
from skyward_lite.client.joblib_backend import SkywardBackend, as_default_backend
from skyward_lite.providers import Machine, NodeRequest


@pytest.fixture
def shared_pool(_shared_pool):
    """The pool of all test files, two nodes of four threads, as joblib's default for the length of a test."""
    with as_default_backend(_shared_pool):
        yield _shared_pool


# ------------------------------------------------------------------------------------------------ its snippets


def run(snippet, namespace):
    """Run a snippet as a script's code: its import line and its provider are all that is changed."""
    for old, new in (("import skyward as sky", "import skyward_lite as sky"), ("sky.AWS()", "sky.Local()")):
        snippet = snippet.replace(old, new)
    namespace["__name__"] = "__main__"
    exec(compile(snippet, "<the page>", "exec"), namespace)
    return namespace


def test_the_basic_snippet_runs(short_sleep):
    """The page's basic snippet runs 2,000 tasks on 10 nodes of 10 slots."""
    page = run(BASIC, {})
    assert page["results"] == [i * 2 for i in range(2000)]
    assert [node.slots for node in page["pool"].nodes()] == [10] * 10


def test_the_tuned_snippet_runs(short_sleep):
    """The page's tuned snippet runs 20,000 tasks on 2 nodes of 120 slots, with `vcpus=`."""
    imports = BASIC[: BASIC.index("with sky")]
    page = run(imports + TUNED, {})
    assert page["results"] == [i * 2 for i in range(20000)]
    assert page["pool"].vcpus == 64


def test_the_scikit_learn_snippet_runs():
    """The page's grid search on 4 nodes of 4 slots has the serial run's numbers."""
    x, y = load_iris(return_X_y=True)
    names = {"sky": sky, "GridSearchCV": GridSearchCV, "SVC": SVC, "X": x, "y": y}
    grid = run(LEARNED, {**names, "param_grid": {"C": [0.1, 1, 10]}})["grid"]
    serial = GridSearchCV(SVC(), {"C": [0.1, 1, 10]}, cv=5, n_jobs=1).fit(x, y)
    assert grid.best_params_ == serial.best_params_
    assert list(grid.cv_results_["mean_test_score"]) == list(serial.cv_results_["mean_test_score"])


# ------------------------------------------------------------------------------------------------ what it does


THREADS = f"threadpoolctl=={metadata.version('threadpoolctl')}"


def test_the_image_transform_appends_joblib():
    """The joblib plugin appends joblib to the user's requirements in the client's version, and threadpoolctl if it is
    here.
    """
    image = sky.plugins.joblib().transform(sky.Image(pip=["numpy"]))
    assert image.pip == ("numpy", f"joblib=={joblib.__version__}", THREADS)


def test_the_image_transform_pins_the_version_that_is_asked_for():
    """`joblib(version=...)` pins that version, whatever is installed here."""
    assert sky.plugins.joblib(version="1.4.0").transform(sky.Image()).pip == ("joblib==1.4.0", THREADS)


def test_entering_the_pool_makes_its_backend_joblibs_default(shared_pool):
    """The backend is a subclass of joblib's own base and is found by joblib's own means, without a monkey-patch."""
    backend, _ = get_active_backend()
    assert type(backend) is SkywardBackend
    assert isinstance(backend, ParallelBackendBase)
    assert backend.pool is shared_pool


def test_the_backend_has_a_registered_name(shared_pool):
    """`backend="skyward"` works, on a thread that has no default too."""
    found = []

    def call():
        found.extend(Parallel(n_jobs=2, backend="skyward")(delayed(os.getpid)() for _ in range(3)))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(20)
    assert len(found) == 3
    assert os.getpid() not in found


def test_all_parallel_calls_of_the_block_go_to_the_workers(shared_pool):
    """`Parallel` calls in the block run on the workers, also those in libraries which know nothing of the pool."""
    assert os.getpid() not in Parallel(n_jobs=-1)(delayed(os.getpid)() for _ in range(8))
    assert len(cross_val_score(SVC(), *load_iris(return_X_y=True), cv=3, n_jobs=-1)) == 3


@pytest.mark.parametrize("leave", [None, KeyError], ids=["clean", "by an exception"])
def test_leaving_the_pool_restores_joblibs_default(leave):
    """After the block, joblib's backend and number of jobs are as before."""
    (before, _), jobs = get_active_backend(), joblib.effective_n_jobs(-1)
    try:
        with sky.ComputePool(worker=sky.Worker(concurrency=37), plugins=[sky.plugins.joblib()]):
            assert joblib.effective_n_jobs(-1) == 37
            if leave is not None:
                raise leave
    except KeyError:
        pass
    assert type(get_active_backend()[0]) is type(before) is not SkywardBackend
    assert joblib.effective_n_jobs(-1) == jobs


def test_without_the_plugin_joblib_stays_as_it_is():
    """Without the plugin the pool is an executor only, and joblib's default stays."""
    before = joblib.effective_n_jobs(-1)
    with sky.pool(worker=sky.Worker(concurrency=37), plugins=[]) as pool:
        assert joblib.effective_n_jobs(-1) == before
        assert pool.submit(os.getpid).result() != os.getpid()


# ------------------------------------------------------------------------------------------------ how it works


def test_submit_gives_joblib_a_future_at_once(shared_pool, tmp_path):
    """A call is sent when the backend's `submit` returns; its result comes by `retrieve_result_callback`."""
    gate, ended = tmp_path / "gate", threading.Event()
    backend, got = SkywardBackend(pool=shared_pool), []

    def wait():
        while not gate.exists():
            time.sleep(0.01)
        return "done"

    def callback(out):
        got.append(backend.retrieve_result_callback(out))
        ended.set()

    backend.submit(wait, callback)
    assert not got
    gate.touch()
    assert ended.wait(20)
    assert got == ["done"]


def test_submitted_call_is_a_future(shared_pool):
    """The pool's `submit` returns a `concurrent.futures.Future`."""
    future = shared_pool.submit(operator.add, 1, 2)
    assert isinstance(future, Future)
    assert future.result(20) == 3


def test_closures_and_lambdas_travel_by_cloudpickle(shared_pool):
    """Closures and lambdas, which plain pickle refuses, travel with the values that they captured."""
    factor = 3
    assert Parallel(n_jobs=-1)(delayed(lambda x: x * factor)(i) for i in range(10)) == [i * 3 for i in range(10)]


def test_functions_of_main_travel(tmp_path):
    """A script's own functions and classes need no module on the workers."""
    names = run("class Pair:\n    def __init__(self, x): self.x = x\n\ndef twice(p): return Pair(2 * p.x)\n", {})
    with sky.pool():
        pairs = Parallel(n_jobs=-1)(delayed(names["twice"])(names["Pair"](i)) for i in range(5))
    assert [pair.x for pair in pairs] == [0, 2, 4, 6, 8]


class Metered(sky.Local):
    """Local nodes that count the bytes to and from them."""

    count = 0

    def start(self, wanted: NodeRequest, hosts: list[Machine]) -> None:
        super().start(wanted, hosts)
        for host in hosts:
            agent = host.socket
            host.socket, client = socket.socketpair()
            for ends in ((client, agent), (agent, client)):
                threading.Thread(target=self.pump, args=ends, daemon=True).start()

    def pump(self, source, sink):
        with source:
            try:
                while data := source.recv(1 << 16):
                    self.count += len(data)
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the other end was closed first


def test_payloads_are_compressed_on_the_wire():
    """16 MB of text take less than a tenth of that on the wire in both directions; noise arrives all the same."""
    text, noise = "the quick brown fox " * 400_000, os.urandom(200_000)
    provider = Metered()
    with sky.pool(provider):
        assert Parallel(n_jobs=-1)(delayed(str)(t) for t in [text, text]) == [text, text]
        sent = provider.count
        assert Parallel(n_jobs=-1)(delayed(bytes)(n) for n in [noise]) == [noise]
    assert sent < 4 * len(text) / 10
    assert provider.count - sent > 2 * len(noise)


def test_effective_parallelism_is_nodes_times_concurrency():
    """4 nodes of 10 slots are 40 workers for joblib; n_jobs=20 means 20 of them."""
    with sky.ComputePool(provider=sky.Local(), nodes=4, worker=sky.Worker(concurrency=10)):
        assert joblib.effective_n_jobs(-1) == 40
        assert joblib.effective_n_jobs(20) == 20
        assert Parallel(n_jobs=20)(delayed(operator.neg)(i) for i in range(100)) == [-i for i in range(100)]


def test_n_jobs_of_minus_one_uses_all_workers_of_all_nodes(shared_pool, tmp_path):
    """With n_jobs=-1 eight tasks that wait for one another end, as all run at the same time."""

    def meet(number):
        (tmp_path / str(number)).touch()
        while len(os.listdir(tmp_path)) < 8:
            time.sleep(0.001)
        return os.getpid()

    assert len(set(Parallel(n_jobs=-1, batch_size=1)(delayed(meet)(i) for i in range(8)))) == 2


def test_nested_calls_fall_back_to_the_sequential_backend(shared_pool):
    """A `Parallel` call in a task runs its calls there one after the other, and sends nothing."""

    def outer():
        inner = Parallel(n_jobs=-1)(delayed(lambda: (os.getpid(), threading.get_ident()))() for _ in range(4))
        return type(get_active_backend()[0]), set(inner) == {(os.getpid(), threading.get_ident())}

    assert Parallel(n_jobs=2)(delayed(outer)() for _ in range(4)) == [(SequentialBackend, True)] * 4
    assert type(SkywardBackend(pool=shared_pool).get_nested_backend()[0]) is SequentialBackend


def test_nested_scikit_learn_runs(shared_pool):
    """In a grid search within a cross-validation, both with n_jobs=-1, the inner one stays in its worker."""
    x, y = load_iris(return_X_y=True)
    remote = cross_val_score(GridSearchCV(SVC(), {"C": [1, 10]}, cv=2, n_jobs=-1), x, y, cv=3, n_jobs=-1)
    serial = cross_val_score(GridSearchCV(SVC(), {"C": [1, 10]}, cv=2, n_jobs=1), x, y, cv=3, n_jobs=1)
    assert list(remote) == list(serial)


def test_results_come_in_the_order_of_the_tasks(shared_pool):
    """Results are in the order of the tasks although later tasks end first."""

    def nap(i):
        time.sleep(0.02 if i % 7 == 0 else 0)
        return i

    assert Parallel(n_jobs=-1)(delayed(nap)(i) for i in range(60)) == list(range(60))


# ------------------------------------------------------------------------------------------------ concurrency


def test_high_concurrency_suits_tasks_that_sleep():
    """With `Worker(concurrency=120)` a barrier opens for which 120 tasks of a node must be there at once."""

    def arrive():
        # The module lives in the worker: all its threads see the same object.
        barrier = time.__dict__.setdefault("_skyward_test_barrier", threading.Barrier(120))
        barrier.wait(30)
        return os.getpid()

    with sky.pool(worker=sky.Worker(concurrency=120)):
        pids = Parallel(n_jobs=-1, batch_size=1, pre_dispatch="all")(delayed(arrive)() for _ in range(240))
    assert len(set(pids)) == 1


def test_the_default_executor_is_threaded(shared_pool):
    """Tasks of a node share one process by default."""
    assert sky.Worker().executor == "thread"
    assert len(set(Parallel(n_jobs=-1, batch_size=1)(delayed(os.getpid)() for _ in range(50)))) <= len(
        shared_pool.nodes()
    )


def test_the_process_executor_gives_each_cpu_bound_task_its_own_interpreter():
    """With `Worker(executor="process")` tasks run at once in as many processes, each on its main thread."""

    def count_primes(below):
        assert threading.current_thread() is threading.main_thread()
        return sum(all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(2, below))

    with sky.pool(worker=sky.Worker(concurrency=2, executor="process")):
        assert joblib.effective_n_jobs(-1) == 2
        assert set(Parallel(n_jobs=-1)(delayed(count_primes)(20_000) for _ in range(8))) == {2262}


# ------------------------------------------------------------------------------------------------ warning filters


@pytest.fixture
def sdk_warning(monkeypatch):
    """A warning category of a package that no worker has."""
    module = types.ModuleType("page_sdk")
    module.SdkWarning = type("SdkWarning", (UserWarning,), {"__module__": "page_sdk"})
    monkeypatch.setitem(sys.modules, "page_sdk", module)
    return module.SdkWarning


@pytest.mark.parametrize("when", ["before the block", "in the block"])
def test_filters_of_packages_that_workers_lack_break_no_task(sdk_warning, when):
    """Filters of missing packages, which scikit-learn sends with every task, break none, and the user's list keeps
    them.
    """
    x, y = load_iris(return_X_y=True)
    with warnings.catch_warnings():
        if when == "before the block":
            warnings.simplefilter("error", sdk_warning)
        with sky.pool(plugins=[sky.plugins.sklearn()]):
            if when == "in the block":
                warnings.simplefilter("error", sdk_warning)
            filters, entries = warnings.filters, list(warnings.filters)
            assert any(category is sdk_warning for _, _, category, _, _ in entries)
            assert len(cross_val_score(SVC(), x, y, cv=3, n_jobs=-1)) == 3
        assert warnings.filters is filters
        assert list(warnings.filters) == entries


def test_filters_that_workers_can_import_are_kept():
    """Filters of the standard library and of packages on the node mean there what they mean here."""

    def tell(category):
        warnings.warn("from the task", category, stacklevel=1)

    def under(active, category):
        with warnings.catch_warnings():
            warnings.resetwarnings()
            for action, message, kind, module, line in active:
                assert (message, module) == (None, None)
                warnings.simplefilter(action, kind, line, append=True)
            tell(category)

    with sky.pool(worker=sky.Worker(concurrency=1)):
        for category in (DeprecationWarning, FutureWarning, ConvergenceWarning):
            with warnings.catch_warnings():
                warnings.resetwarnings()
                warnings.simplefilter("error", category)
                with pytest.raises(category, match="from the task"):
                    Parallel(n_jobs=2)(delayed(under)(warnings.filters, category) for _ in range(2))


# ------------------------------------------------------------------------------------------------ parameters


def test_the_plugins_take_a_version_or_none():
    """The plugins take the versions of the page's table."""
    for plugin in (sky.plugins.joblib, sky.plugins.sklearn):
        assert inspect.signature(plugin).parameters["version"].default is None


def test_the_size_of_nodes_reaches_the_provider():
    """`vcpus=` and `memory_gb=` reach the provider, which has to meet them."""
    passed = {}

    class Sized(sky.Local):
        def start(self, wanted, hosts):
            passed.update(vcpus=wanted.vcpus, memory_gb=wanted.memory_gb)
            super().start(wanted, hosts)

    with sky.pool(Sized(), vcpus=64, memory_gb=0.5) as pool:
        assert (pool.vcpus, pool.memory_gb) == (64, 0.5)
    assert passed == {"vcpus": 64, "memory_gb": 0.5}


@pytest.mark.parametrize(
    ("size", "expected_warnings"),
    [({"vcpus": 100_000}, 1), ({"memory_gb": 1e6}, 1), ({"vcpus": 1, "memory_gb": 0.01}, 0), ({}, 0)],
)
def test_local_nodes_are_as_large_as_this_machine(caplog, size, expected_warnings):
    """`Local()` warns once, for any number of nodes, if this machine is smaller than the size asked for."""
    with caplog.at_level(logging.INFO, "skyward_lite"), sky.pool(sky.Local(), 2, **size):
        pass
    assert sum("uses this machine as it is" in message for message in caplog.messages) == expected_warnings


@pytest.mark.parametrize("size", [{"vcpus": 0}, {"memory_gb": -1.0}, {"memory_gb": float("nan")}])
def test_size_out_of_range_is_named(size):
    """A size out of range is an error with its parameter and value."""
    ((name, value),) = size.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        sky.pool(**size)


# ------------------------------------------------------------------------------------------------ the sklearn plugin


def requirements(*plugins, image=None):
    image = image or sky.Image()
    for plugin in plugins:
        image = plugin.transform(image)
    return sorted(image.pip)


HAS = [f"joblib=={joblib.__version__}", f"scikit-learn=={metadata.version('scikit-learn')}", THREADS]


def test_the_sklearn_plugin_installs_scikit_learn_and_joblib():
    """The sklearn plugin installs both packages in the client's versions, or in the versions that are asked for."""
    assert requirements(sky.plugins.sklearn()) == HAS
    assert requirements(sky.plugins.sklearn(version="1.5.0")) == [HAS[0], "scikit-learn==1.5.0", THREADS]


def test_the_sklearn_plugin_builds_on_the_same_backend():
    """The sklearn plugin has the same backend and name, with the modules of scikit-learn's tasks already imported."""
    with sky.pool(plugins=[sky.plugins.sklearn()]) as pool:
        assert type(get_active_backend()[0]) is SkywardBackend
        assert pool.submit(lambda: "sklearn.ensemble" in sys.modules).result()


@pytest.mark.parametrize("names", [("joblib", "sklearn"), ("sklearn", "joblib"), ("sklearn", "sklearn")])
def test_both_plugins_together_are_as_one(names):
    """Both plugins in any order give the same image, the same backend, and joblib's default afterwards."""
    before = joblib.effective_n_jobs(-1)
    plugins = [getattr(sky.plugins, name)() for name in names]
    assert requirements(*plugins) == HAS
    with sky.pool(worker=sky.Worker(concurrency=37), plugins=plugins):
        assert joblib.effective_n_jobs(-1) == 37
        assert os.getpid() not in Parallel(n_jobs=-1)(delayed(os.getpid)() for _ in range(3))
    assert joblib.effective_n_jobs(-1) == before
    with pytest.raises(sky.PoolClosedError):
        Parallel(n_jobs=2, backend="skyward")(delayed(os.getpid)() for _ in range(2))


def test_pinned_joblib_beside_the_sklearn_plugin():
    """A version pinned by the joblib plugin, before or after the sklearn plugin, is the one listed, and listed once."""
    pinned, learn = sky.plugins.joblib(version="1.4.0"), sky.plugins.sklearn()
    assert requirements(pinned, learn) == requirements(learn, pinned) == ["joblib==1.4.0", *HAS[1:]]


def test_requirements_of_the_image_come_before_the_plugins():
    """A plugin without a version adds no second requirement to the image's own, however its name is spelled."""
    image = sky.Image(pip=["scikit_learn>=1.2", "joblib<2"])
    assert requirements(sky.plugins.sklearn(), image=image) == ["joblib<2", "scikit_learn>=1.2", THREADS]
    assert requirements(sky.plugins.sklearn("1.5.0"), image=image) == ["joblib<2", "scikit-learn==1.5.0", THREADS]


def test_client_without_scikit_learn_asks_for_the_latest(monkeypatch):
    """A client without scikit-learn asks for the latest, and nodes that install nothing say that it is missing."""
    version = metadata.version

    def none(name):
        if name == "scikit-learn":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", none)
    assert requirements(sky.plugins.sklearn()) == [HAS[0], "scikit-learn", THREADS]
    with pytest.raises(sky.NodeStartError, match="scikit-learn is not installed"):
        sky.pool(plugins=[sky.plugins.sklearn()]).__enter__()
