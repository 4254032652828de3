"""Pools for the tests, and the check that no test leaves a process behind."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cloudpickle
import pytest
import skyward_lite as sky
from processes import eventually, ours, parent
from skyward_lite.client import unentered
from skyward_lite.pickling import payload

if TYPE_CHECKING:
    from cloud import Cloud
    from lab import Lab


LONGEST_FIRST = (
    *("ec2/test_aws.py", "pool/test_modules.py", "hosts/test_ssh.py", "hosts/test_environment.py"),
    *("ec2/test_aws_faults.py", "parallel/test_callbacks.py", "docs/test_original_page.py", "docs/test_benches.py"),
    *("hosts/test_cuts.py", "docs/test_chaos.py", "parallel/test_searches.py", "pool/test_first_imports.py"),
    *("parallel/test_sklearn.py", "parallel/test_conformance.py", "pool/test_silence.py", "hosts/test_check.py"),
    *("hosts/test_exec.py", "ec2/test_reap.py", "pool/test_edits.py"),
)
"""Files that take longest: some have few tests. All others come after them, and those with most tests first."""


def pytest_configure(config: pytest.Config) -> None:
    """Let xdist keep the order of files, where it would otherwise begin with those that have most tests."""
    config.option.loadscopereorder = False


@pytest.fixture(autouse=True)
def no_pools_of_earlier_tests() -> Iterator[None]:
    """Forget the pools that a test has made and not entered: the next test may use joblib's own backend."""
    yield
    unentered.forget()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that at the end no process still has one while the others have none."""
    here = Path(__file__).parent
    counts = Counter(item.path for item in items)
    ranks = {here / name: rank for rank, name in enumerate(LONGEST_FIRST)}
    order = {path: (ranks.get(path, len(ranks)), -count) for path, count in counts.items()}
    items.sort(key=lambda item: (*order[item.path], item.path))


def pytest_collection_finish() -> None:
    """Build the program that stands before fake nodes, if a test may need it: it takes longer than a test may."""
    if {"fakes", "sieges"} & sys.modules.keys():
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
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A directory for real SSH servers, which the tests of a file start in it."""
    from lab import Lab

    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def _cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    from cloud import Cloud

    with Cloud(tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


@pytest.fixture
def cloud(_cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """An empty cloud; nothing may be left in it, nor asked of it that the policy of docs/ec2.md does not allow."""
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


@pytest.fixture
def short_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """`time.sleep` lasts 1/500 of the time: the original page has 2,000 tasks that sleep for 5 s each."""

    # A nested function travels by value, so that no node imports this file.
    def sleep(seconds: float) -> None:
        threading.Event().wait(seconds / 500)

    monkeypatch.setattr(time, "sleep", sleep)


@pytest.fixture(scope="module")
def functions_by_value(request: pytest.FixtureRequest) -> Iterator[None]:
    """The functions of the test's file travel by value, so that no node has to import it."""
    cloudpickle.register_pickle_by_value(request.module)
    yield
    cloudpickle.unregister_pickle_by_value(request.module)


@pytest.fixture
def encoder() -> payload.Encoder:
    """A pickler of payloads with a limit of 1 MiB."""
    return payload.Encoder(1 << 20)
