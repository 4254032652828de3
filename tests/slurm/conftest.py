"""A real Slurm cluster for each file of tests. Each test finds it empty, and has to leave it so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import slurm
from processes import eventually
from slurm import Cluster

EMPTY_SECONDS = 15
"""Bound on the end of what a pool has started: KillWait is 5 s."""


@pytest.fixture(scope="module")
def _cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    slurm.require()
    options = getattr(request.module, "CLUSTER", {})
    with Cluster(tmp_path_factory.mktemp("slurm"), **options) as cluster, slurm.submission_environment(cluster):
        yield cluster


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster of a test file, which may say by `CLUSTER` what it has to be like."""
    yield _cluster
    left = not eventually(_cluster.is_empty, EMPTY_SECONDS) and (_cluster.leftovers(), _cluster.logs())
    _cluster.cancel_all()
    assert not left, left
