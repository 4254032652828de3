"""What a node is told when its session begins."""

from __future__ import annotations

import types

import pytest
import skyward_lite as sky
from skyward_lite.client import settings
from skyward_lite.client.hello import Greeting
from skyward_lite.pickling.modules import Modules
from skyward_lite.providers import NodeRequest, local


def cache_bytes(machine, worker):
    """Return how many bytes of shared data a machine is told to keep."""
    own = settings.checked(
        *(None, None),
        vcpus=None,
        memory_gb=None,
        worker=worker,
        image=None,
        plugins=[],
        lease=60,
        connect_timeout=20,
        start_timeout=60,
        strict_env=False,
        ship_modules=True,
    )
    greeting = Greeting(own, "0123456789", own.image, Modules(shares_files=True), "")
    return greeting.for_machine(machine).worker.cache_bytes


@pytest.mark.parametrize("nodes", [1, 3])
def test_local_nodes_share_a_quarter_of_the_memory(monkeypatch, nodes):
    """Nodes of one machine have equal parts of a quarter of its memory for shared data, or what the user gives each."""
    monkeypatch.setattr(local, "_memory_bytes", lambda: 12_000)
    monkeypatch.setattr(
        local, "LocalMachine", lambda name, _, cache: types.SimpleNamespace(name=name, cache_bytes=cache)
    )
    machines = []
    sky.Local(nodes).start(NodeRequest(nodes, nodes, sky.Image(), None, None, 20), machines)
    assert [machine.cache_bytes for machine in machines] == [3_000 // nodes] * nodes
    vars(machines[0]).update(concurrency=None, shares_files=True)
    assert cache_bytes(machines[0], None) == 3_000 // nodes
    assert cache_bytes(machines[0], sky.Worker(cache_gb=0.5)) == 500_000_000
    assert cache_bytes(machines[0], sky.Worker(cache_gb=1e-12)) == 1


@pytest.mark.parametrize(
    ("group", "limit"),
    [
        ("0::/a/b", "a/b/memory.max"),
        ("0::/a/b", "a/memory.max"),
        ("0::/not/visible", "memory.max"),
        ("3:cpu:/\n4:hugetlb,memory:/a/b", "memory/a/b/memory.limit_in_bytes"),
        ("4:memory:/not/visible", "memory/memory.limit_in_bytes"),
    ],
)
def test_the_limit_of_a_container_is_its_memory(tmp_path, group, limit):
    """The limit of a control group, or of one around it, counts where it is less than the machine's memory."""
    groups, root = tmp_path / "own", tmp_path / "root"
    groups.write_text(f"{group}\n")
    machine = local._memory_bytes(str(groups), str(root))
    assert machine > 1 << 28
    for text, expected in [("max\n", machine), (f"{1 << 62}\n", machine), ("1048576\n", 1 << 20)]:
        (root / limit).parent.mkdir(parents=True, exist_ok=True)
        (root / limit).write_text(text)
        assert local._memory_bytes(str(groups), str(root)) == expected
