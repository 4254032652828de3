"""What the log says while tasks wait for nodes that are away."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
from skyward_lite.client import node_log
from skyward_lite.client.node_log import NodeLog
from skyward_lite.client.node_state import Node


class Core:
    """A core in which one task waits."""

    def counts(self) -> tuple[int, int]:
        return 1, 0

    def notices(self, number: int) -> None:
        return None


def test_the_log_tells_when_tasks_fail_that_wait_for_a_lost_node(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The time counts from the loss of the node, whatever attempts to start it anew have failed since."""
    monkeypatch.setattr(node_log, "WAITING_SECONDS", 0.0)
    core: Any = Core()
    log, began, old = NodeLog(core, 600.0), time.time(), "ready"
    for state, since in (("lost", 10.0), ("connecting", 20.0), ("lost", 70.0)):
        node = Node("host", state, "it is off", 2, None, None, began + since)
        log.changed(0, node, old)
        old = state
    with caplog.at_level(logging.WARNING, "skyward_lite"):
        caplog.clear()
        log.waiting([node], [""])
    shown = [time.strftime("%H:%M:%S", time.localtime(began + seconds)) for seconds in (70, 610)]
    (message,) = caplog.messages
    assert message == (
        f"no node is usable, and tasks wait: host is lost since {shown[0]} (it is off). "
        f"They fail at {shown[1]} unless a node is back"
    )


def test_a_node_that_drained_and_has_nothing_left_is_not_told_as_a_loss(caplog: pytest.LogCaptureFixture) -> None:
    """At each time limit of a job a node leaves as planned: that is no warning, and nothing runs elsewhere."""
    core: Any = Core()
    reason = "it has done its last task: its job will soon be at its time limit"
    with caplog.at_level(logging.INFO, "skyward_lite"):
        NodeLog(core, 600.0).changed(0, Node("slurm-7_0", "lost", reason, 2, None, None, 0.0), "draining")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("INFO", f"node slurm-7_0 has left: {reason}")]
