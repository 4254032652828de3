"""One contestant of the data bench, in a process of its own: `contest.py NAME OPTIONS`, both in JSON.

Reads runs from standard input, a JSON object a line: {"run": its name, …its parameters}. Answers each by a line with
what it measured, in seconds and bytes. Each contestant makes its data from the same seeds, before the time counts.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import operator
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed, parallel_config

Answer = dict[str, Any]
MB = 10**6


# ------------------------------------------------------------------------------------------------ contestants


class Contestant:
    """How a contestant counts what crosses the wire: not at all, unless it can."""

    version = ""

    def traffic(self) -> tuple[int, int]:
        """Return the bytes sent to nodes and received from them so far."""
        return 0, 0


class Skyward(Contestant):
    """A pool on hosts, if some are named, or else on `Local()`."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        *,
        slots: int,
        nodes: int = 1,
        hosts: tuple[str, ...] = (),
        config: str = "",
        executor: Any = "thread",
    ) -> None:
        import skyward_lite as sky

        self.version = f"skyward_lite {sky.__version__}"
        provider = sky.SSH(*hosts, config=config) if hosts else sky.Local(nodes=nodes)
        worker = sky.Worker(concurrency=slots, executor=executor)
        self.pool = stack.enter_context(sky.pool(provider, worker=worker))
        stack.enter_context(parallel_config("skyward", n_jobs=-1))

    def traffic(self) -> tuple[int, int]:
        """Return the payload bytes of the SSH streams of all nodes."""
        rows = self.pool._core.traffic()
        return sum(sent for sent, _ in rows), sum(received for _, received in rows)


class Loky(Contestant):
    """joblib's default."""

    def __init__(self, stack: contextlib.ExitStack, *, slots: int) -> None:
        import joblib

        self.version = f"joblib {joblib.__version__}"
        stack.enter_context(parallel_config("loky", n_jobs=slots))


class Dask(Contestant):
    """A cluster of processes on this machine, with a thread each, which is what Dask makes of a small machine."""

    def __init__(self, stack: contextlib.ExitStack, *, slots: int) -> None:
        distributed = importlib.import_module("distributed")
        self.version = f"distributed {distributed.__version__}"
        cluster = distributed.LocalCluster(n_workers=slots, threads_per_worker=1, dashboard_address=None)
        client = distributed.Client(stack.enter_context(cluster))
        stack.enter_context(client)
        stack.enter_context(parallel_config("dask", n_jobs=-1))


class Ray(Contestant):
    """Ray's own pool behind joblib."""

    def __init__(self, stack: contextlib.ExitStack, *, slots: int) -> None:
        ray = importlib.import_module("ray")
        self.version = f"ray {ray.__version__}"
        ray.init(num_cpus=slots, include_dashboard=False, object_store_memory=1 << 30, logging_level="ERROR")
        stack.callback(ray.shutdown)
        importlib.import_module("ray.util.joblib").register_ray()
        stack.enter_context(parallel_config("ray", n_jobs=slots))


KINDS: dict[str, Callable[..., Contestant]] = {"skyward": Skyward, "loky": Loky, "dask": Dask, "ray": Ray}


# ------------------------------------------------------------------------------------------------ runs


@contextlib.contextmanager
def measured(me: Contestant, answer: Answer, name: str) -> Iterator[None]:
    """Note the seconds and the bytes of a block."""
    sent, received = me.traffic()
    begin = time.perf_counter()
    yield
    answer[name] = time.perf_counter() - begin
    now = me.traffic()
    answer[f"{name} up"], answer[f"{name} down"] = now[0] - sent, now[1] - received


def tiny(me: Contestant, *, seed: int, seconds: float) -> Answer:
    """Run tasks that take no time, one a batch, from an input that ends after so many seconds; return their rate."""
    begin = time.perf_counter()
    numbers = itertools.takewhile(lambda _: time.perf_counter() - begin < seconds, itertools.count(seed))
    got = Parallel(batch_size=1)(delayed(operator.neg)(i) for i in numbers)
    took = time.perf_counter() - begin
    assert got == [-i for i in range(seed, seed + len(got))]
    return {"rate": len(got) / took}


def shared(me: Contestant, *, seed: int, mb: float, tasks: int) -> Answer:
    """Let tasks share an array of random floats, twice."""
    x = np.random.default_rng(seed).random(int(mb * MB) // 8)
    step, answer = len(x) // tasks, Answer()
    for name in ("first", "second"):
        with measured(me, answer, name):
            got = Parallel()(delayed(operator.getitem)(x, i * step) for i in range(tasks))
        assert got == [x[i * step] for i in range(tasks)]
    return answer


def search(me: Contestant, *, seed: int, mb: float, candidates: int) -> Answer:
    """Search a grid with five folds, by an estimator that takes no time, so that the data's way counts."""
    from sklearn.dummy import DummyRegressor
    from sklearn.model_selection import GridSearchCV

    rng = np.random.default_rng(seed)
    x = rng.random((int(mb * MB) // 800, 100))
    y = rng.random(len(x))
    grid = {"quantile": np.linspace(0.1, 0.9, candidates).tolist()}
    answer = Answer()
    with measured(me, answer, "fit"):
        found = GridSearchCV(DummyRegressor(strategy="quantile"), grid, cv=5, refit=False).fit(x, y)
    answer["scores"] = found.cv_results_["mean_test_score"].tolist()
    return answer


def distinct(me: Contestant, *, seed: int, mb: float, tasks: int) -> Answer:
    """Send each task its own array, and get another one of the same size from it."""
    rng = np.random.default_rng(seed)
    arrays = [rng.random(int(mb * MB) // 8) for _ in range(tasks)]
    answer = Answer()
    with measured(me, answer, "all"):
        got = Parallel()(delayed(np.negative)(array) for array in arrays)
    assert all(a[-1] == -b[-1] and a.shape == b.shape for a, b in zip(got, arrays, strict=True))
    return answer


def data(seed: int, mb: float, kind: str) -> Any:
    """Return incompressible data."""
    size = int(mb * MB)
    # Far faster than random bytes, and no more compressible.
    words = np.random.default_rng(seed).integers(0, 1 << 63, size // 8, dtype=np.int64)
    return words.tobytes() if kind == "bytes" else words.view(np.uint8)


MAKE = """
import builtins, numpy
words = numpy.random.default_rng({seed}).integers(0, 1 << 63, {words}, dtype=numpy.int64)
builtins.bench_data = words.tobytes() if {kind!r} == "bytes" else words.view(numpy.uint8)
"""
"""Leaves data at the worker, so that the time of a result is that of its way."""


def up(me: Skyward, *, seed: int, mb: float, kind: str) -> Answer:
    """Send data to a task."""
    sent, answer = data(seed, mb, kind), Answer()
    with measured(me, answer, "all"):
        size = me.pool.submit(len, sent).result()
    assert size == len(sent)
    return answer


def make(me: Skyward, *, seed: int, mb: float, kind: str) -> Answer:
    """Make the data of `down` at the only worker."""
    me.pool.submit(exec, MAKE.format(seed=seed, words=int(mb * MB) // 8, kind=kind)).result()
    return {}


def down(me: Skyward, *, mb: float) -> Answer:
    """Get data from a task."""
    answer = Answer()
    with measured(me, answer, "all"):
        got = me.pool.submit(eval, "bench_data").result()
    assert len(got) == int(mb * MB) // 8 * 8
    return answer


def small(me: Skyward, *, while_: str, rounds: int, seed: int, mb: float, idle: float) -> Answer:
    """Run small tasks one after the other, on their own or while data is under way; return their seconds."""
    ended = threading.Event()
    under_way: list[float] = []
    # An array, and made before: to make or copy a `bytes` of this size would keep the interpreter's lock meanwhile.
    sent = data(seed, mb, "array") if while_ == "up" else None

    def bulk() -> None:
        try:
            for number in range(rounds):
                if sent is not None:
                    sent[0] = number  # so that it is not there yet
                begin = time.perf_counter()
                done = me.pool.submit(eval, "bench_data") if sent is None else me.pool.submit(len, sent)
                done.result()
                under_way.append(time.perf_counter() - begin)
        finally:
            ended.set()

    if while_ == "nothing":
        timer = threading.Timer(idle, ended.set)
        timer.start()
    else:
        threading.Thread(target=bulk).start()
    seconds = []
    while not ended.is_set():
        begin = time.perf_counter()
        assert me.pool.submit(operator.neg, 1).result() == -1
        seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds, "bulk": under_way}


def memory(me: Skyward, *, mb: float, tasks: int) -> Answer:
    """Let tasks read all of an array that they share; return the process's largest resident memory, in bytes."""
    x = np.random.default_rng(1).random(int(mb * MB) // 8)
    got = Parallel(n_jobs=-1)(delayed(np.sum)(x) for _ in range(tasks))
    assert set(got) == {x.sum()}
    status = Path("/proc/self/status").read_text().splitlines()
    (most,) = (int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return {"client": most * 1024}


def agents(me: Skyward) -> Answer:
    """Return the processes of the nodes' agents."""
    return {"pids": [node.pid for node in me.pool.nodes()]}


RUNS: dict[str, Callable[..., Answer]] = {
    run.__name__: run for run in (tiny, shared, search, distinct, up, make, down, small, memory, agents)
}


def main() -> None:
    """Be a contestant until standard input ends."""
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    # What the contestants' packages print is none of the protocol.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.ExitStack() as stack:
        begin = time.perf_counter()
        me = KINDS[kind](stack, **options)
        assert Parallel()(delayed(operator.neg)(i) for i in range(2)) == [0, -1]
        ready = time.perf_counter() - begin
        print(json.dumps({"version": me.version, "ready": ready}), file=answers, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            answer = RUNS[request.pop("run")](me, **request)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
