"""Proxies of multiprocessing's managers in tasks, and the hash seed that all workers of a pool have."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import uuid
from multiprocessing.managers import BaseManager

import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from lab import Lab
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


def test_manager_proxies_in_tasks(either_pool, manager):
    """A dict, list, queue, namespace, value, lock and event of a manager are the client's in every worker."""
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


def test_manager_proxies_in_parallel(manager):
    """`Parallel` calls take a manager's proxies, in batches as well."""
    shared = manager.dict()
    with sky.pool(worker=sky.Worker(concurrency=2)):
        Parallel(n_jobs=-1, batch_size=5)(delayed(shared.__setitem__)(i, i) for i in range(20))
    assert dict(shared) == {i: i for i in range(20)}


def test_manager_proxies_within_proxies(either_pool, manager):
    """A task takes a list out of a shared dict and changes it for all."""
    shared = manager.dict(inner=manager.list([1]))

    def use():
        shared["inner"].append(2)
        return list(shared["inner"])

    assert either_pool.submit(use).result(30) == [1, 2]
    assert list(shared["inner"]) == [1, 2]


def test_manager_of_a_users_class(either_pool):
    """Proxies of a manager with a key of its own and methods of its own work in tasks."""
    with Counters(authkey=b"its own", ctx=spawning) as counters:
        counter = counters.Counter()
        assert [either_pool.submit(counter.add, 2).result(30) for _ in range(3)] == [2, 4, 6]


def test_manager_proxy_as_a_result(either_pool, manager):
    """A task can return a proxy that it was given."""
    shared = manager.dict(a=1)
    assert dict(either_pool.submit(lambda: shared).result(30)) == {"a": 1}


def test_manager_proxy_that_only_a_task_refers_to(either_pool, manager):
    """Shared objects whose proxies the client dropped stay until the tasks that have them have ended."""
    futures = [either_pool.submit(lambda shared, i: [*shared, i], manager.list([-i]), i) for i in range(20)]
    assert [future.result(30) for future in futures] == [[-i, i] for i in range(20)]


def test_manager_proxy_result_does_not_change_the_clients_key(either_pool, manager):
    """A result with a proxy does not change the authentication key of the client's process."""
    before = multiprocessing.current_process().authkey
    shared = manager.dict()
    either_pool.submit(lambda shared: shared, shared).result(30)
    assert multiprocessing.current_process().authkey == before


def test_manager_proxy_is_refused_on_another_machine(host, manager):
    """On another machine the call raises the proxy, the reason and the remedy."""
    with sky.pool(host) as pool:
        told = "a DictProxy .*'dict'.* cannot be sent: .*another machine, .*plain values"
        with pytest.raises(pickle.PicklingError, match=told):
            pool.submit(len, manager.dict())
        with pytest.raises(pickle.PicklingError, match=told):
            Parallel(n_jobs=-1)(delayed(len)(manager.dict()) for _ in range(2))
        assert pool.submit(len, dict(manager.dict(a=1))).result(30) == 1


def test_multiprocessing_locks_are_refused(shared_pool):
    """A lock of multiprocessing itself raises its own error, that it is only inherited."""
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
def test_hash_seed_is_the_same_in_all_workers():
    """Four processes on two nodes iterate over a set of strings in the same order."""
    workers, _ = orders()
    assert len(workers) == 4
    assert all(seen == workers[0] for seen in workers)


def test_hash_seed_is_the_same_on_another_machine(host):
    """Workers on other hosts have the pool's hash seed in their environment."""
    with sky.pool(host, worker=sky.Worker(2, "process"), plugins=[]) as pool:
        seeds = {*pool.map(os.getenv, ["PYTHONHASHSEED"] * 20)}
        assert len(seeds) == 1
        assert 0 < int(seeds.pop()) < 2**32


def test_hash_seed_of_the_client_is_the_workers():
    """`PYTHONHASHSEED` in the client's environment is the workers' seed."""
    workers, client = orders(PYTHONHASHSEED="7")
    assert all(seen == client for seen in workers)


def test_hash_seed_differs_between_pools():
    """Without a seed in the environment each pool has a seed of its own."""
    seeds = {hello.hash_seed(uuid.uuid4().hex) for _ in range(5)}
    assert len(seeds) > 1


def test_hash_seed_of_an_image():
    """`PYTHONHASHSEED` in `Image(env=)` comes before every other seed."""
    with sky.pool(image=sky.Image(env={"PYTHONHASHSEED": "11"}), plugins=[]) as pool:
        assert pool.submit(os.getenv, "PYTHONHASHSEED").result(30) == "11"
