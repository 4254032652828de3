"""`joblib.Parallel` on a pool."""

from __future__ import annotations

import math
import multiprocessing
import operator
import os
import pickle
import threading
import time
import warnings
import weakref
from concurrent.futures import CancelledError

import joblib
import numpy as np
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed, parallel_config
from processes import eventually, refusal_in_a_fork
from skyward_lite.client.joblib_backend import SkywardBackend

JOBLIB = tuple(int(part) for part in joblib.__version__.split(".")[:2])


@pytest.fixture(scope="module")
def backend_pool():
    """One node of four threads as joblib's backend."""
    with sky.pool(worker=sky.Worker(concurrency=4)) as pool:
        yield pool


@pytest.fixture
def shared_pool(backend_pool):
    """Override: tests here share a pool that is joblib's default."""
    return backend_pool


pytestmark = pytest.mark.usefixtures("shared_pool")


def pid_and_thread(_):
    return os.getpid(), threading.get_ident()


@pytest.mark.parametrize("batch_size", ["auto", 1, 7])
def test_results_are_in_order(batch_size):
    """A `Parallel` call returns a serial run's list."""
    got = Parallel(n_jobs=-1, batch_size=batch_size)(delayed(math.sqrt)(i) for i in range(500))
    assert got == [math.sqrt(i) for i in range(500)]


def test_nothing_runs_in_the_client():
    """No call runs in the client, also with few tasks and with n_jobs=None."""
    for n_jobs in (-1, 2, None):
        pids = {pid for pid, _ in Parallel(n_jobs=n_jobs)(delayed(pid_and_thread)(i) for i in range(5))}
        assert os.getpid() not in pids


@pytest.mark.parametrize(("n_jobs", "effective"), [(-1, 4), (-2, 3), (2, 2), (20, 4), (None, 4), (1, 1), (-100, 2)])
def test_effective_n_jobs(n_jobs, effective):
    """n_jobs=-1 means all slots, -2 all but one, n at most n; 1 is joblib's sequential mode, which no pool claims to
    be.
    """
    assert joblib.effective_n_jobs(n_jobs) == effective


def test_n_jobs_zero_is_refused():
    """n_jobs=0 is an error, as joblib leaves this check to its backends."""
    with pytest.raises(ValueError, match="n_jobs == 0"):
        Parallel(n_jobs=0)(delayed(operator.neg)(i) for i in range(2))


def test_n_jobs_limits_concurrent_tasks():
    """With n_jobs=2 on four slots never more than two tasks run at once."""

    def busy(_):
        # The module lives in the worker: all its threads see the same object.
        state = time.__dict__.setdefault("_skyward_test_meter", [threading.Lock(), 0, 0])
        with state[0]:
            state[1] += 1
            state[2] = max(state[2], state[1])
        time.sleep(0.01)
        with state[0]:
            state[1] -= 1
        return state[2]

    assert max(Parallel(n_jobs=2, batch_size=1)(delayed(busy)(i) for i in range(40))) <= 2


def test_exceptions_arrive_with_type_and_cause():
    """The first error aborts the call with its type and cause, and the pool goes on."""
    with pytest.raises(ZeroDivisionError) as caught:
        Parallel(n_jobs=-1)(delayed(operator.truediv)(1, i) for i in range(100))
    assert "ZeroDivisionError" in str(caught.value.__cause__)
    assert Parallel(n_jobs=-1)(delayed(operator.neg)(i) for i in range(10)) == [-i for i in range(10)]


@pytest.mark.parametrize("place", [0, 50])
def test_unpicklable_arguments_raise(place):
    """An argument that cannot be pickled raises loky's error with the reason as its cause, on any thread, without a
    hang.
    """
    arguments = [threading.Lock() if i == place else i for i in range(100)]
    with pytest.raises(pickle.PicklingError, match=r"the task to send .*lock") as caught:
        Parallel(n_jobs=2, batch_size=1, pre_dispatch=4)(delayed(id)(a) for a in arguments)
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.skipif(JOBLIB < (1, 4), reason="before joblib 1.4 such an error is lost on any callback thread")
def test_error_in_the_input_reaches_the_caller():
    """An exception in the middle of the input iterator reaches the caller."""

    def numbers():
        yield from range(50)
        raise LookupError("input")

    with pytest.raises(LookupError, match="input"):
        Parallel(n_jobs=2, batch_size=1)(delayed(operator.neg)(i) for i in numbers())


@pytest.mark.parametrize(
    "return_as",
    ["generator", pytest.param("generator_unordered", marks=pytest.mark.skipif(JOBLIB < (1, 4), reason="joblib 1.4"))],
)
def test_return_as_generators(return_as):
    """With `return_as` a generator returns results as they come."""
    got = Parallel(n_jobs=2, return_as=return_as)(delayed(operator.neg)(i) for i in range(100))
    assert sorted(got) == [-i for i in reversed(range(100))]


def test_parallel_timeout():
    """With `timeout` a task that takes too long raises TimeoutError, and the pool goes on."""
    with pytest.raises((TimeoutError, multiprocessing.TimeoutError)):
        Parallel(n_jobs=2, timeout=0.05)(delayed(time.sleep)(i) for i in [1.0, 1.0])
    assert Parallel(n_jobs=2)(delayed(operator.neg)(i) for i in range(4)) == [0, -1, -2, -3]


def test_reused_parallel_objects():
    """`with Parallel() as p` may be called several times."""
    with Parallel(n_jobs=-1) as parallel:
        for k in range(3):
            assert parallel(delayed(operator.mul)(k, i) for i in range(20)) == [k * i for i in range(20)]


def test_nested_parallel_calls_are_sequential():
    """A `Parallel` call inside a task runs in that task's thread."""

    def outer(i):
        inner = Parallel(n_jobs=4)(delayed(pid_and_thread)(j) for j in range(5))
        return set(inner) == {pid_and_thread(None)}

    assert all(Parallel(n_jobs=-1)(delayed(outer)(i) for i in range(4)))


def test_nested_parallel_call_with_the_backends_name():
    """A `Parallel` call in a task with the backend's name runs in that task's thread, one level below the client's."""

    def outer(i):
        inner = Parallel(n_jobs=4, backend="skyward")(delayed(pid_and_thread)(j) for j in range(5))
        with parallel_config(backend="skyward") as config:
            return set(inner) == {pid_and_thread(None)}, config["backend"].nesting_level

    assert set(Parallel(n_jobs=-1)(delayed(outer)(i) for i in range(4))) == {(True, 1)}


def test_backend_by_name():
    """`backend="skyward"` works as a parameter and in `parallel_config`."""
    me = os.getpid()
    assert me not in dict(Parallel(n_jobs=2, backend="skyward")(delayed(pid_and_thread)(i) for i in range(3)))
    with parallel_config(backend="skyward", n_jobs=2):
        assert me not in dict(Parallel()(delayed(pid_and_thread)(i) for i in range(3)))


def test_auto_batching_follows_the_tasks_duration():
    """Tiny tasks travel in batches; tasks of 20 ms and more do not."""
    sizes = []

    class Spy(SkywardBackend):
        def batch_completed(self, batch_size, duration):
            super().batch_completed(batch_size, duration)
            sizes.append(batch_size)

    joblib.register_parallel_backend("spy", Spy)
    Parallel(n_jobs=2, backend="spy")(delayed(operator.neg)(i) for i in range(5000))
    assert max(sizes) > 20
    sizes.clear()
    Parallel(n_jobs=2, backend="spy")(delayed(time.sleep)(0.02) for i in range(20))
    assert max(sizes) == 1


@pytest.mark.parametrize("kind", [bytes, np.uint8])
@pytest.mark.parametrize("heavy", ["argument", "result"])
def test_auto_batches_stay_below_max_payload(heavy, kind):
    """Automatic batches stay small in bytes however short the tasks are; arrays travel beside the pickle."""

    def make():
        return os.urandom(30_000) if kind is bytes else np.frombuffer(os.urandom(30_000), np.uint8)

    arguments = (make() if heavy == "argument" else i for i in range(1000))
    with sky.pool(worker=sky.Worker(concurrency=2, max_payload=1_000_000)):
        if heavy == "argument":
            lengths = Parallel(n_jobs=2)(delayed(len)(x) for x in arguments)
        else:
            lengths = [len(x) for x in Parallel(n_jobs=2)(delayed(make)() for _ in arguments)]
    assert lengths == [30_000] * 1000


@pytest.mark.parametrize("heavy", ["argument", "result"])
def test_chosen_batch_over_max_payload_names_its_remedy(heavy):
    """A batch of a chosen size that is too large is an error with the remedy."""
    with sky.pool(worker=sky.Worker(concurrency=2, max_payload=1_000_000)):
        calls = [delayed(len)(bytes(30_000)) if heavy == "argument" else delayed(bytes)(30_000) for _ in range(400)]
        with pytest.raises(sky.PayloadTooLargeError, match=r"with 50 calls in one batch.*batch_size=1"):
            Parallel(n_jobs=2, batch_size=50)(calls)


def test_many_tasks_do_not_recurse():
    """20,000 batches complete without deep stacks."""
    assert sum(Parallel(n_jobs=-1, batch_size=1)(delayed(operator.neg)(1) for _ in range(20_000))) == -20_000


def test_arrays_and_closures():
    """Arrays and closures work as arguments and functions."""
    data = np.arange(200_000.0)
    got = Parallel(n_jobs=-1)(delayed(lambda a, k: float(a.sum()) * k)(data, k) for k in range(8))
    assert got == [data.sum() * k for k in range(8)]


def test_parallel_does_not_change_warning_filters():
    """After a call the user's warning filters are the same object with the same entries."""
    before, entries = warnings.filters, list(warnings.filters)
    Parallel(n_jobs=2)(delayed(operator.neg)(i) for i in range(4))
    assert warnings.filters is before
    assert list(warnings.filters) == entries


def test_verbose_counts_tasks(capsys):
    """`verbose=` prints joblib's own lines."""
    Parallel(n_jobs=2, verbose=10)(delayed(operator.neg)(i) for i in range(20))
    out, err = capsys.readouterr()
    assert "SkywardBackend" in out + err
    assert "20" in out + err


def test_concurrent_generators_are_independent():
    """Closing one call's generator leaves another call's batches alone, running and held ones."""
    one = Parallel(n_jobs=2, return_as="generator", batch_size=1)(delayed(time.sleep)(0.01) for _ in range(50))
    two = Parallel(n_jobs=2, return_as="generator", batch_size=1)(delayed(slow_neg)(i) for i in range(50))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one.close()
    assert list(two) == [-i for i in range(50)]


def slow_neg(i):
    time.sleep(0.005)
    return -i


def test_aborted_tasks_do_not_count_for_the_next_calls_n_jobs(tmp_path):
    """A running task of an aborted call does not count against the next call's n_jobs."""
    gate = tmp_path / "gate"

    def wait():
        while not gate.exists():
            time.sleep(0.01)

    with pytest.raises((TimeoutError, multiprocessing.TimeoutError)):
        Parallel(n_jobs=2, timeout=0.05)(delayed(wait)() for _ in range(2))
    assert Parallel(n_jobs=2)(delayed(operator.neg)(i) for i in range(20)) == [-i for i in range(20)]
    gate.touch()


def test_batch_size_is_reset_between_calls(shared_pool):
    """A batch size that suits tiny tasks is forgotten when the call ends."""
    parallel = Parallel(n_jobs=2)
    parallel(delayed(operator.neg)(i) for i in range(5000))
    assert parallel._backend.compute_batch_size() == 1


def sleep_or_fail(seconds):
    if not seconds:
        raise KeyError("fails")
    time.sleep(seconds)


def test_late_completion_of_an_aborted_call_is_dropped():
    """A task of an aborted call that ends while joblib begins the next call does not count for that call."""
    failed, ended = threading.Event(), threading.Event()

    class Spy(SkywardBackend):
        def effective_n_jobs(self, n_jobs):
            assert not failed.is_set() or ended.wait(20)
            return super().effective_n_jobs(n_jobs)

        def batch_ended(self, batch):
            super().batch_ended(batch)
            if failed.is_set():
                ended.set()

    joblib.register_parallel_backend("spy", Spy)
    with Parallel(n_jobs=2, backend="spy", batch_size=1) as parallel:
        with pytest.raises(KeyError):
            parallel(delayed(sleep_or_fail)(seconds) for seconds in (60, 0))
        failed.set()
        assert parallel(delayed(operator.neg)(i) for i in range(10)) == [-i for i in range(10)]


def test_slow_callback_of_an_aborted_call_is_dropped():
    """A callback of an aborted call that is still running does not count tasks or dispatch for the next call."""
    inside = threading.Event()

    class Spy(SkywardBackend):
        def batch_completed(self, batch_size, duration):
            if not inside.is_set():
                inside.set()
                time.sleep(0.3)
            super().batch_completed(batch_size, duration)

    joblib.register_parallel_backend("spy", Spy)
    with Parallel(n_jobs=2, backend="spy", batch_size=1, return_as="generator") as parallel:
        results = parallel(delayed(operator.neg)(i) for i in range(10))
        assert inside.wait(20)
        with pytest.warns(UserWarning, match="have been cancelled"):
            results.close()
        # The last one runs alone.
        assert list(parallel(delayed(sleep_or_fail)(0.1) for _ in range(11))) == [None] * 11


def test_closures_are_not_shared_between_tasks():
    """Objects that a function captured are not shared between tasks."""
    state = []

    def count(_):
        state.append(1)
        return len(state)

    assert Parallel(n_jobs=-1, batch_size=1)(delayed(count)(i) for i in range(20)) == [1] * 20


def test_parallel_in_a_forked_child_is_an_error():
    """`Parallel` in a forked child, which has joblib's default but no connections, is an error and no hang."""
    assert "forked" in refusal_in_a_fork(lambda: Parallel(n_jobs=2)(delayed(operator.neg)(i) for i in range(3)))


class Finicky(Exception):
    """Cannot be rebuilt from its arguments."""

    def __init__(self, a, b):
        super().__init__("finicky")


def raiser(error, *arguments):
    raise error(*arguments)


def test_any_exception_arrives():
    """Exceptions arrive that end programs; one that cannot be unpickled arrives by name."""
    with pytest.raises(KeyboardInterrupt):
        Parallel(n_jobs=2)(delayed(raiser)(KeyboardInterrupt) for _ in range(2))
    with pytest.raises(sky.RemoteError, match="Finicky: finicky"):
        Parallel(n_jobs=2)(delayed(raiser)(Finicky, 1, 2) for _ in range(2))
    assert Parallel(n_jobs=2)(delayed(operator.neg)(i) for i in range(4)) == [0, -1, -2, -3]


@pytest.mark.parametrize("source", ["future", "map", "generator", "lazy call", "nested call"])
def test_input_may_wait_for_results_of_the_same_pool(shared_pool, source):
    """An input may wait for results of its own pool, as joblib reads most of it in callbacks on threads of the call."""

    def numbers():
        if source == "future":
            yield from (shared_pool.submit(operator.pos, i).result(20) for i in range(50))
        elif source == "map":
            yield from shared_pool.map(operator.pos, range(50), buffersize=2)
        elif source == "generator":
            yield from Parallel(n_jobs=2, return_as="generator", batch_size=1)(delayed(abs)(i) for i in range(50))
        elif source == "lazy call":
            yield from (sky.compute(abs)(i) >> shared_pool for i in range(50))
        else:
            for i in range(0, 50, 5):
                yield from Parallel(n_jobs=2, backend="skyward")(delayed(abs)(k) for k in range(i, i + 5))

    got = Parallel(n_jobs=2, batch_size=1)(delayed(operator.neg)(i) for i in numbers())
    assert got == [-i for i in range(50)]


def test_generators_may_be_chained():
    """A call may read another call's generator."""
    numbers = range(60)
    for _ in range(5):
        numbers = Parallel(n_jobs=2, return_as="generator", batch_size=1)(delayed(operator.add)(i, 1) for i in numbers)
    assert list(numbers) == list(range(5, 65))


def test_blocked_input_does_not_delay_other_calls(shared_pool):
    """An input that waits delays neither other calls nor futures, and what it waits for can arrive."""
    reached, go_on = threading.Event(), threading.Event()

    def calls():
        for i in range(8):
            if i == 6:
                reached.set()
                assert go_on.wait(30)
            yield delayed(operator.neg)(i)

    results = Parallel(n_jobs=2, return_as="generator", batch_size=1, pre_dispatch=4)(calls())
    assert reached.wait(20)
    assert Parallel(n_jobs=2)(delayed(operator.neg)(i) for i in range(100)) == [-i for i in range(100)]
    assert shared_pool.submit(operator.neg, 1).result(20) == -1
    go_on.set()
    assert list(results) == [-i for i in range(8)]


def test_calls_leave_no_thread():
    """A call's thread ends with the call, also if the call failed, was aborted or could not begin."""

    def settling():
        return [thread for thread in threading.enumerate() if thread.name.startswith("skyward-resolve-")]

    with sky.pool(worker=sky.Worker(concurrency=2)):
        before = len(settling())
        for _ in range(3):
            Parallel(n_jobs=2)(delayed(operator.neg)(i) for i in range(10))
        with pytest.raises(ZeroDivisionError):
            Parallel(n_jobs=2)(delayed(operator.truediv)(1, i) for i in range(10))
        with pytest.raises(TypeError):
            Parallel(n_jobs=2)(5)
        results = Parallel(n_jobs=2, return_as="generator", batch_size=1)(delayed(slow_neg)(i) for i in range(50))
        next(results)
        with pytest.warns(UserWarning, match="have been cancelled"):
            results.close()
        assert eventually(lambda: len(settling()) == before, 20)


def test_managed_parallel_works_after_an_error():
    """In `with Parallel()` a call after a failed one works, and runs no task of the failed one."""
    with Parallel(n_jobs=2) as parallel:
        for _ in range(20):
            with pytest.raises(ZeroDivisionError):
                parallel(delayed(operator.truediv)(1, i) for i in range(10))
            assert parallel(delayed(operator.neg)(i) for i in range(10)) == [-i for i in range(10)]


@pytest.mark.parametrize(
    "return_as",
    ["generator", pytest.param("generator_unordered", marks=pytest.mark.skipif(JOBLIB < (1, 4), reason="joblib 1.4"))],
)
def test_generator_may_be_closed_early(return_as):
    """Tasks of a closed generator that have not started never run, and the pool goes on."""
    results = Parallel(n_jobs=2, return_as=return_as, batch_size=1)(delayed(slow_neg)(i) for i in range(1000))
    next(results)
    with pytest.warns(UserWarning, match="have been cancelled"):
        results.close()
    assert Parallel(n_jobs=2)(delayed(operator.neg)(i) for i in range(4)) == [0, -1, -2, -3]


def test_parallel_calls_of_several_client_threads():
    """Several threads that name the backend, as joblib's defaults are per thread, get their own results."""
    start = threading.Barrier(4)
    results = {}

    def client(k):
        start.wait(20)
        for _ in range(5):
            calls = (delayed(operator.mul)(k, i) for i in range(50))
            results.setdefault(k, []).append(Parallel(n_jobs=2, backend="skyward", batch_size=3)(calls))

    threads = [threading.Thread(target=client, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {k: [[k * i for i in range(50)]] * 5 for k in range(4)}


def test_error_in_one_client_thread_does_not_affect_others():
    """Calls of other threads succeed while calls of some threads fail."""
    outcomes = {}

    def client(k):
        calls = (delayed(operator.truediv)(i, k) for i in range(200))
        try:
            outcomes[k] = Parallel(n_jobs=2, backend="skyward", batch_size=1)(calls)
        except ZeroDivisionError:
            outcomes[k] = None

    threads = [threading.Thread(target=client, args=(k,)) for k in (0, 1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert outcomes == {0: None, 1: [float(i) for i in range(200)], 2: [i / 2 for i in range(200)]}


@pytest.mark.parametrize("prefer", ["threads", "processes"])
def test_prefer_is_ignored(prefer):
    """`prefer` is ignored in a pool's block, as the block is an explicit choice."""
    pids = {pid for pid, _ in Parallel(n_jobs=2, prefer=prefer)(delayed(pid_and_thread)(i) for i in range(3))}
    assert os.getpid() not in pids


def test_n_jobs_1_is_sequential():
    """With n_jobs=1 calls run in this process, and joblib warns where a timeout is ignored."""
    with pytest.warns(UserWarning, match="SequentialBackend' does not support timeout"):
        got = Parallel(n_jobs=1, timeout=1)(delayed(pid_and_thread)(i) for i in range(3))
    assert set(got) == {pid_and_thread(None)}


def test_initializer_is_refused():
    """An initializer is an error and not ignored, as the workers have been running for long."""
    with pytest.raises(TypeError, match="initializer"), parallel_config(backend="skyward", initializer=print):
        pass
    if JOBLIB >= (1, 5):
        with pytest.raises(TypeError, match="initializer"):
            Parallel(n_jobs=2, initializer=print)(delayed(operator.neg)(i) for i in range(3))


def test_functions_of_single_tasks_are_freed():
    """The object of a bound method per task is freed with its task, as `pre_dispatch` promises."""

    class Model:
        def run(self):
            return 1

    models: list[weakref.ref[Model]] = []
    most = 0

    def calls():
        nonlocal most
        for _ in range(300):
            model = Model()
            models.append(weakref.ref(model))
            yield delayed(model.run)()
            most = max(most, sum(ref() is not None for ref in models))

    with sky.pool(worker=sky.Worker(concurrency=2)):
        assert Parallel(n_jobs=2, batch_size=1, pre_dispatch=4)(calls()) == [1] * 300
    assert most < 100


def test_abort_includes_a_batch_that_is_being_pickled(tmp_path):
    """A batch that is being pickled while its call is aborted is sent and ended afterwards."""
    gate = tmp_path / "gate"
    parallel = Parallel(n_jobs=2, batch_size=1, pre_dispatch=2)

    class Argument:
        def __init__(self, i):
            self.i = i

        def __reduce__(self):
            if self.i == 2:
                parallel._backend.abort_everything(ensure_ready=False)
            return (operator.pos, (self.i,))

    def wait(i):
        while i and not gate.exists():
            time.sleep(0.01)

    with sky.pool(worker=sky.Worker(concurrency=2)) as pool:
        with pytest.raises(CancelledError):
            parallel(delayed(wait)(Argument(i)) for i in range(3))
        assert eventually(lambda: pool.status().pending == 0, 20)
