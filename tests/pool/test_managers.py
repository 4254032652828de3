"""Proxies of multiprocessing's managers in tasks, and the hash seed that all workers of a pool have."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import uuid
from multiprocessing.managers import BaseManager

import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from lab import Lab
from processes import eventually
from skyward_lite.client import hello

# Not by fork: this process has threads.
spawning = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def manager():
    """A manager with everything that multiprocessing offers."""
    with spawning.Manager() as manager:
        yield manager


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The provider for a host that counts as another machine."""
    lab = Lab(tmp_path_factory.mktemp("managers"))
    name = lab.host().name
    yield sky.SSH(name, config=lab.config, python=sys.executable)
    lab.close()


class Counter:
    """What a user's manager serves."""

    def __init__(self):
        self.count = 0

    def add(self, number):
        self.count += number
        return self.count


class Counters(BaseManager):
    """A user's manager, with a key of its own."""


Counters.register("Counter", Counter)


def test_proxies_work_in_tasks(either_pool, manager):
    """A dict, a list, a queue, a namespace, a value, a lock and an event are the client's, whatever worker runs."""
    shared, items, queue = manager.dict(), manager.list(), manager.Queue()
    space, value, lock, event = manager.Namespace(), manager.Value("i", 0), manager.Lock(), manager.Event()

    def use(i):
        shared[i] = -i
        items.append(i)
        queue.put(i)
        space.last = "there"
        with lock:
            value.value += 1
        event.set()
        return len(shared) > 0

    assert all(future.result(30) for future in [either_pool.submit(use, i) for i in range(10)])
    assert dict(shared) == {i: -i for i in range(10)}
    assert sorted(items) == sorted(queue.get() for _ in range(10)) == list(range(10))
    assert (space.last, value.value, event.is_set()) == ("there", 10, True)


def test_proxies_work_in_parallel(manager):
    """joblib's calls take them, in batches as well."""
    shared = manager.dict()
    with sky.pool(worker=sky.Worker(concurrency=2)):
        Parallel(n_jobs=-1, batch_size=5)(delayed(shared.__setitem__)(i, i) for i in range(20))
    assert dict(shared) == {i: i for i in range(20)}


def test_proxies_within_proxies_work_in_tasks(either_pool, manager):
    """A task takes a list out of a shared dict, and changes it for all."""
    shared = manager.dict(inner=manager.list([1]))

    def use():
        shared["inner"].append(2)
        return list(shared["inner"])

    assert either_pool.submit(use).result(30) == [1, 2]
    assert list(shared["inner"]) == [1, 2]


def test_a_users_manager_works_in_tasks(either_pool):
    """One with a key of its own, whose proxies have methods that only its process knows."""
    with Counters(authkey=b"its own", ctx=spawning) as counters:
        counter = counters.Counter()
        assert [either_pool.submit(counter.add, 2).result(30) for _ in range(3)] == [2, 4, 6]


def test_a_proxy_comes_back(either_pool, manager):
    """A task returns one that it was given."""
    shared = manager.dict(a=1)
    assert dict(either_pool.submit(lambda: shared).result(30)) == {"a": 1}


def test_a_proxy_that_only_the_task_has_stays(either_pool, manager):
    """The client lets go of its proxies at once: their objects are there until the tasks have ended."""
    futures = [either_pool.submit(lambda shared, i: [*shared, i], manager.list([-i]), i) for i in range(20)]
    assert [future.result(30) for future in futures] == [[-i, i] for i in range(20)]


def test_the_clients_key_stays_its_own(either_pool, manager):
    """A result with a proxy changes no key in this process."""
    before = multiprocessing.current_process().authkey
    shared = manager.dict()
    either_pool.submit(lambda shared: shared, shared).result(30)
    assert multiprocessing.current_process().authkey == before


def test_a_proxy_is_refused_elsewhere(host, manager):
    """On another machine the call raises which proxy it was, the reason and the remedy."""
    with sky.pool(host) as pool:
        told = "a DictProxy .*'dict'.* cannot be sent: .*another machine, .*plain values"
        with pytest.raises(pickle.PicklingError, match=told):
            pool.submit(len, manager.dict())
        with pytest.raises(pickle.PicklingError, match=told):
            Parallel(n_jobs=-1)(delayed(len)(manager.dict()) for _ in range(2))
        assert pool.submit(len, dict(manager.dict(a=1))).result(30) == 1


def test_locks_of_multiprocessing_itself_are_refused(shared_pool):
    """Its own error says that they are inherited only."""
    for make in (spawning.Lock, spawning.Queue, lambda: spawning.Value("i")):
        with pytest.raises(RuntimeError, match="should only be shared between processes through inheritance"):
            shared_pool.submit(print, make())


ORDERS = """
import skyward_lite as sky
def order():
    return list({"alpha", "beta", "gamma", "delta"}), hash("x"), __import__("os").getpid()
with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=2, executor="process"), plugins=[]) as pool:
    seen = {}
    while len(seen) < 4:
        for there in [future.result(30) for future in [pool.submit(order) for _ in range(8)]]:
            seen[there[2]] = there[:2]
    print(list(seen.values()))
    print(order()[:2])
"""


def orders(**env):
    """Open a pool in a process with these variables: what its four workers saw, and what the client sees."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    run = subprocess.run(
        [sys.executable, "-c", ORDERS], env={**clean, **env}, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return [eval(line) for line in run.stdout.splitlines()]


@pytest.mark.slow
def test_all_workers_of_a_pool_hash_alike():
    """Four processes on two nodes see a set of strings in the same order."""
    workers, _ = orders()
    assert len(workers) == 4
    assert all(seen == workers[0] for seen in workers)


def test_workers_on_another_machine_hash_alike(host):
    """A seed of the pool is in their environment, too."""
    with sky.pool(host, worker=sky.Worker(2, "process"), plugins=[]) as pool:
        seeds = {*pool.map(os.getenv, ["PYTHONHASHSEED"] * 20)}
        assert len(seeds) == 1
        assert 0 < int(seeds.pop()) < 2**32


def test_workers_hash_as_a_client_with_a_seed():
    """A seed in the client's environment is the workers', too."""
    workers, client = orders(PYTHONHASHSEED="7")
    assert all(seen == client for seen in workers)


def test_pools_hash_differently():
    """Without a seed each pool has one of its own."""
    seeds = {hello.hash_seed(uuid.uuid4().hex) for _ in range(5)}
    assert len(seeds) > 1


def test_nodes_that_come_late_hash_as_the_others(monkeypatch):
    """Though the program has set another seed meanwhile, as functions that seed everything do."""
    reseeded = threading.Event()

    class Gated(sky.Local):
        def start(self, wanted, machines):
            super().start(wanted, machines)
            machines[1].open = functools.partial(open_late, machines[1])

    def open_late(machine, core):
        assert reseeded.wait(20)
        return type(machine).open(machine, core)

    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with sky.pool(Gated(), nodes=(1, 2), plugins=[]) as pool:
        monkeypatch.setenv("PYTHONHASHSEED", "7")
        reseeded.set()
        assert eventually(lambda: pool.slots() and all(node.state == "ready" for node in pool.nodes()), 20)
        seeds = sky.compute(os.getenv)("PYTHONHASHSEED") @ pool
    assert len(seeds) == 2
    assert len(set(seeds)) == 1


def test_an_image_may_set_the_hash_seed():
    """What the user says comes first."""
    with sky.pool(image=sky.Image(env={"PYTHONHASHSEED": "11"}), plugins=[]) as pool:
        assert pool.submit(os.getenv, "PYTHONHASHSEED").result(30) == "11"
