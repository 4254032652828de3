"""Pools for the tests, and the check that no test leaves a process behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import skyward_lite as sky

if TYPE_CHECKING:
    from cloud import Cloud

MARK = "SKYWARD_TEST_RUN"
os.environ[MARK] = str(os.getpid())


def ours() -> dict[int, str]:
    """Agents and workers that were started by this test run: process id → command line."""
    found = {}
    mark = f"{MARK}={os.environ[MARK]}".encode()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes()
            if (b"skyward_lite." in command or b"fake_agent" in command) and mark in (
                directory / "environ"
            ).read_bytes():
                found[int(directory.name)] = command.replace(b"\0", b" ").decode()
        except OSError:
            continue  # it ended meanwhile
    return found


def parent(pid: int) -> int:
    """Give a process's parent; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def has_ended(pid: int) -> bool:
    """Say whether a process has ended, whoever is to take note of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def eventually(true: Callable[[], object], seconds: float) -> bool:
    """Wait until `true()`, at most for so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.01)
    return bool(true())


def refusal_in_a_fork(use: Callable[[], object]) -> str:
    """Fork, and give the text of the PoolClosedError that `use()` raises in the child; nothing if it raises none."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            use()
        except sky.PoolClosedError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said


def pytest_collection_finish() -> None:
    """Build the program that stands before fake nodes, if a test may need it: it takes longer than a test may."""
    if {"fakes", "chaos"} & sys.modules.keys():
        import fakes

        try:
            fakes.embedded_server()
        except (OSError, subprocess.CalledProcessError) as error:
            why = f"fake nodes need rust/examples/embedded_server.rs, which cannot be built: {error}; run `make test`"
            raise pytest.UsageError(why) from error


@pytest.fixture(autouse=True)
def no_process_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves an agent or a worker that was not there before it."""
    before = set(ours())
    yield
    if "shared_pool" in request.fixturenames or "shared_processes" in request.fixturenames:
        return

    def left() -> dict[int, str]:
        # The agents of shared pools may have started further workers.
        return {p: c for p, c in ours().items() if p not in before and parent(p) not in before}

    assert eventually(lambda: not left(), 5), left()


@pytest.fixture(scope="session")
def _shared_pool() -> Iterator[sky.ComputePool]:
    with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=4), plugins=[]) as pool:
        yield pool


@pytest.fixture(scope="session")
def _shared_processes() -> Iterator[sky.ComputePool]:
    with sky.pool(worker=sky.Worker(concurrency=2, executor="process"), plugins=[]) as pool:
        yield pool


@pytest.fixture
def shared_pool(_shared_pool: sky.ComputePool) -> sky.ComputePool:
    """A pool of two nodes with four threads each; not joblib's backend. For tests that do it no harm."""
    return _shared_pool


@pytest.fixture
def shared_processes(_shared_processes: sky.ComputePool) -> sky.ComputePool:
    """A pool of one node with two processes; not joblib's backend. For tests that do it no harm."""
    return _shared_processes


@pytest.fixture(scope="module")
def _cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    from cloud import Cloud

    with Cloud(tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


@pytest.fixture
def cloud(_cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """An empty cloud; nothing may be left in it, nor asked of it that the README's policy does not allow."""
    from cloud import allowed

    _cloud.reset()
    for name, value in _cloud.env.items():
        monkeypatch.setenv(name, value)
    yield _cloud
    assert {call.name for call in _cloud.calls} <= allowed()
    assert _cloud.leftovers() == {}


@pytest.fixture(params=["thread", "process"])
def either_pool(request: pytest.FixtureRequest) -> sky.ComputePool:
    """Both shared pools, one after the other."""
    name = "shared_pool" if request.param == "thread" else "shared_processes"
    pool: sky.ComputePool = request.getfixturevalue(name)
    return pool
