"""Nodes that speak the protocol and do not help: what a pool does with them. `fake_agent.py` is their agent."""

from __future__ import annotations

from collections.abc import Iterator

import fakes
import pytest
from conftest import eventually
from lab import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("hostile"))
    yield lab
    lab.close()


@pytest.mark.parametrize("door", ["embedded", "sshd"])
def test_a_fake_agent_is_a_node_like_others(lab, door, capsys):
    """Behind the embedded server and behind a real one, what it says reaches the client."""
    body = b"a line of a fake node\n"
    args = {"kind": "output", "task": 1, "body": body.hex(), "count": 40}
    with fakes.pool("floods", lab=lab if door == "sshd" else None, times=1, **args) as pool:
        futures = [pool.submit(abs, -number) for number in range(4)]
        assert eventually(lambda: "a line of a fake node" in "".join(capsys.readouterr()), 10)
        assert any(line.startswith("task ") for line in pool.provider.heard())
        for future in futures:
            future.cancel()
