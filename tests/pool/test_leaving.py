"""A pool that is left at an unusual moment, or by an unusual thread, still releases its machines, and only its own."""

from __future__ import annotations

import contextlib
import operator
import os
import signal
import subprocess
import sys
import threading

import pytest
import skyward_lite as sky


class Counting(sky.Local):
    """Local nodes that note which machines were started, and which were released."""

    def __init__(self):
        super().__init__()
        self.started, self.released = [], []

    def start(self, wanted, machines):
        super().start(wanted, machines)
        self.started += machines

    def stop(self, machines, timeout):
        self.released += machines
        super().stop(machines, timeout)


@contextlib.contextmanager
def fails_at_its_end(pool):
    yield
    raise LookupError


def bounded(function, seconds=30):
    """Call a function on a thread that must come back: whether it did."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def test_a_pool_that_is_closed_before_its_machines_start_starts_none():
    """By a plugin, say, or by another thread."""
    provider = Counting()

    def transform(image):
        pool.shutdown()
        return image

    pool = sky.pool(provider, plugins=[sky.Plugin("closing", transform=transform)])
    with pytest.raises(sky.PoolClosedError, match="closed while it started"), pool:
        pass
    assert not provider.started


def test_machines_that_start_while_the_pool_is_closed_are_released():
    """Another thread closes the pool within the provider's `start`, and does not know these machines."""

    class Slow(Counting):
        def start(self, wanted, machines):
            assert bounded(pool.shutdown)
            super().start(wanted, machines)

    provider = Slow()
    pool = sky.pool(provider, start_timeout=20, plugins=[])
    with pytest.raises(sky.SkywardError), pool:
        pass
    assert len(provider.started) == 1
    assert set(provider.started) <= set(provider.released)
    assert provider.started[0].agent.returncode is not None


def test_shutdown_without_waiting_closes_the_pool_though_a_plugin_fails():
    """The plugin's exception is raised, and the pool is closed all the same."""
    provider = Counting()
    pool = sky.pool(provider, plugins=[sky.Plugin("failing", around_client=fails_at_its_end)]).__enter__()
    assert pool.submit(operator.neg, 1).result(20) == -1
    with pytest.raises(LookupError):
        pool.shutdown(wait=False)
    assert bounded(pool.shutdown)
    assert provider.released == provider.started


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("wait", [True, False])
def test_a_forked_child_closes_nothing(wait):
    """Machines are the parent's: a provider that reaches them over the network would end them."""
    read, write = os.pipe()

    class Telling(sky.Local):
        def stop(self, machines, timeout):
            os.write(write, str(os.getpid()).encode() + b"\n")
            super().stop(machines, timeout)

    with sky.pool(Telling(), plugins=[]) as pool:
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(20)
                pool.shutdown(wait)
                for thread in threading.enumerate():
                    if thread.name == "skyward-shutdown":
                        thread.join()
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert pool.submit(operator.neg, 1).result(20) == -1
    os.close(write)
    with os.fdopen(read) as file:
        assert file.read().split() == [str(os.getpid())]


FORGETFUL = """
import contextlib, skyward_lite as sky

class Telling(sky.Local):
    def stop(self, machines, timeout):
        print("released")
        super().stop(machines, timeout)

@contextlib.contextmanager
def failing(pool):
    yield
    raise LookupError

for _ in range(2):
    sky.pool(Telling(), plugins=[sky.Plugin("failing", around_client=failing)]).__enter__()
"""


def test_all_forgotten_pools_are_closed_though_one_raises():
    """When the interpreter ends."""
    run = subprocess.run([sys.executable, "-c", FORGETFUL], capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["released", "released"]
    assert "LookupError" in run.stderr
