"""Connections that are cut cost nothing. `make chaos` cuts many more, at seeded moments, and kills what it can."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import skyward_lite as sky
import storms
from lab import Lab, Sshd
from processes import eventually
from proxy import Proxy, before

SIZE = 20 * 1000 * 1000
HELD_SECONDS = 50
"""How long a task waits for its file."""
BACK_SECONDS = 30
"""How long a node may take until it is ready again, on a busy machine."""

pytestmark = pytest.mark.usefixtures("functions_by_value")


def counted(path: str, name: str, data: bytes = b"") -> tuple[str, int]:
    """Count this execution in a file, and return the name and the data's checksum."""
    with open(path, "a") as file:
        file.write(f"{name}\n")
    return name, zlib.crc32(data)


def held(path: str, name: str, until: str) -> str:
    """Count this execution, and wait for a file, which a test that fails does not make."""
    counted(path, name)
    deadline = time.monotonic() + HELD_SECONDS
    while not os.path.exists(until) and time.monotonic() < deadline:
        time.sleep(0.005)
    counted(path, f"{name} ended")
    return name


class Far:
    """A pool whose hosts are behind proxies, and the file in which executions are counted."""

    def __init__(self, lab: Lab, hosts: list[Sshd], proxies: list[Proxy], pool: sky.ComputePool, file: Path) -> None:
        self.lab, self.hosts, self.proxies, self.pool, self.file = lab, hosts, proxies, pool, file

    def counts(self) -> list[str]:
        """Return a line for each execution so far."""
        return self.file.read_text().split("\n")[:-1]

    def connections(self) -> list[int]:
        """Return how many connections were ever made to each host."""
        return [proxy.connections for proxy in self.proxies]

    def is_back(self, made: list[int], further: int = 1) -> bool:
        """Wait until so many more connections were made to each host and all nodes are ready. Return whether so."""

        def back() -> bool:
            states = {node.state for node in self.pool.nodes()}
            assert "lost" not in states, self.pool.nodes()
            enough = all(now >= before + further for now, before in zip(self.connections(), made, strict=True))
            return states == {"ready"} and enough

        return eventually(back, BACK_SECONDS)

    def cut(self, how: str = "reset") -> list[int]:
        """Cut all connections. Return how many were ever made to each host."""
        made = self.connections()
        for proxy in self.proxies:
            assert proxy.cut(how)  # type: ignore[arg-type]
        return made


@pytest.fixture(scope="module", params=[1, 2], ids=["one node", "two nodes"])
def far(request: pytest.FixtureRequest, lab: Lab, functions_by_value: None) -> Iterator[Far]:
    """A pool of one node, or of two."""
    with tempfile.TemporaryDirectory(prefix="sky", dir="/tmp") as directory:
        hosts = [lab.host(env={"TMPDIR": directory}) for _ in range(request.param)]
        proxies = [before(lab, host) for host in hosts]
        file = Path(directory) / "executions"
        file.touch()
        provider = sky.SSH(*(host.name for host in hosts), config=lab.config, python=sys.executable)
        with sky.pool(provider, worker=sky.Worker(concurrency=2), plugins=[]) as pool:
            yield Far(lab, hosts, proxies, pool, file)
        for proxy in proxies:
            proxy.close()
        assert eventually(lambda: not list(Path(directory).glob("skyward-lite-*")), 5)


@pytest.fixture(autouse=True)
def empty(request: pytest.FixtureRequest) -> None:
    """Begin each test without executions."""
    if "far" in request.fixturenames:
        request.getfixturevalue("far").file.write_text("")


@pytest.fixture
def shared_processes(far: Far) -> None:
    """The nodes of this file's pools outlive its tests."""


@pytest.mark.usefixtures("shared_processes")
class TestCuts:
    """Cuts of the connections to one node, or to two."""

    @pytest.mark.parametrize("how", ["reset", "end"])
    def test_an_idle_pool(self, far: Far, how: str) -> None:
        """The nodes are ready again before anybody needs them."""
        assert far.is_back(far.cut(how))
        assert far.pool.submit(counted, str(far.file), "idle").result() == ("idle", 0)
        assert far.counts() == ["idle"]

    def test_between_end_and_result(self, far: Far) -> None:
        """Tasks that had ended when their results were under way do not run again."""
        until = f"{far.file}.until"
        futures = [far.pool.submit(held, str(far.file), f"t{number}", until) for number in range(4)]
        slots = 2 * len(far.proxies)
        assert eventually(lambda: len(far.counts()) == slots, BACK_SECONDS)
        for proxy in far.proxies:
            proxy.down.stall()
        Path(until).touch()
        assert eventually(lambda: sum("ended" in line for line in far.counts()) >= slots, BACK_SECONDS)
        made = far.cut()
        for proxy in far.proxies:
            proxy.resume()
        assert [future.result() for future in futures] == ["t0", "t1", "t2", "t3"]
        assert sorted(line for line in far.counts() if "ended" not in line) == ["t0", "t1", "t2", "t3"]
        assert far.is_back(made)
        Path(until).unlink()

    @pytest.mark.parametrize("act", ["cut", "truncate", "flip"])
    def test_in_the_middle_of_a_blob(self, far: Far, act: str) -> None:
        """Large data arrives unchanged, whatever happens to the connection that carries it."""
        made = far.connections()
        armed = [proxy.up.at(SIZE // 4, act, bit=3) for proxy in far.proxies]  # type: ignore[arg-type]
        data = [os.urandom(SIZE) for _ in armed]
        futures = [far.pool.submit(counted, str(far.file), f"b{n}", one) for n, one in enumerate(data)]
        assert [future.result() for future in futures] == [(f"b{n}", zlib.crc32(one)) for n, one in enumerate(data)]
        assert sorted(far.counts()) == [f"b{n}" for n in range(len(data))]
        assert any(one.fired.is_set() for one in armed)
        for proxy in far.proxies:
            proxy.up.armed = None
        # Both may have gone to one node.
        assert far.is_back([count - (not one.fired.is_set()) for count, one in zip(made, armed, strict=True)])

    def test_while_it_is_attached_again(self, far: Far) -> None:
        """A connection may break at any byte of its greeting: another one is made."""
        future = far.pool.submit(held, str(far.file), "held", f"{far.file}.until")
        assert eventually(far.counts, BACK_SECONDS)
        for number, count in enumerate((0, 40, 1800, 2500)):
            made = far.cut()
            directions = [proxy.down if number % 2 else proxy.up for proxy in far.proxies]
            armed = [direction.at(count, "cut") for direction in directions]
            assert all(one.fired.wait(BACK_SECONDS) for one in armed), count
            # The one that broke, perhaps when the node was ready again, and another one.
            assert far.is_back(made, 2)
        Path(f"{far.file}.until").touch()
        assert future.result() == "held"
        assert far.counts() == ["held", "held ended"]
        Path(f"{far.file}.until").unlink()

    def test_a_host_that_is_away_and_a_server_that_is_restarted(self, far: Far) -> None:
        """The nodes are reconnecting until their hosts are there again, and what runs on them runs on."""
        future = far.pool.submit(held, str(far.file), "held", f"{far.file}.until")
        assert eventually(far.counts, BACK_SECONDS)
        for proxy in far.proxies:
            proxy.refuse()
        made = far.cut()
        assert eventually(lambda: {node.state for node in far.pool.nodes()} == {"reconnecting"}, BACK_SECONDS)
        Path(f"{far.file}.until").touch()
        assert eventually(lambda: len(far.counts()) == 2, BACK_SECONDS)
        assert not future.done()
        for host in far.hosts:
            host.kill()
            host.start()
        for proxy in far.proxies:
            proxy.listen()
        assert far.is_back(made)
        assert future.result() == "held"
        assert far.counts() == ["held", "held ended"]
        Path(f"{far.file}.until").unlink()


# ------------------------------------------------------------------------------------------------ whole clients


def test_a_storm() -> None:
    """Workers and agents are killed and connections cut: the results are those of a serial run."""
    assert storms.storm(7, print, tasks=300, nodes=3, pace=0.4) == []


def test_a_client_that_is_killed_leaves_nothing() -> None:
    """Its nodes have no process, no socket and no file of ours when its lease is over."""
    assert storms.client_killed(14, print) == []


def test_a_goodbye_that_is_cut() -> None:
    """A client whose connections are cut while it leaves leaves all the same."""
    assert storms.goodbye_cut(28, print) == []
