"""How an EC2 instance whose connection was cut is connected to again."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from skyward_lite import _core
from skyward_lite.errors import NodeStartError
from skyward_lite.providers import MachineGoneError
from skyward_lite.providers.aws.instance import Instance


class Core:
    """A core whose connections fail, if there is an error."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def connect(self, **_: object) -> str:
        if self.error is not None:
            raise self.error
        return "a connection"


@pytest.mark.parametrize("state", ["running", "terminated", "unknown"])
def test_ec2_is_asked_only_if_the_instance_cannot_be_reached(state: str) -> None:
    """A cut is mended without EC2. An instance that EC2 has ended is gone; any other one may be reached later."""
    asked = []

    def describe(ids: list[str], since: float) -> dict[str, Any]:
        asked.append(since)
        if state == "unknown":
            raise NodeStartError("no network")
        return {"i-1": {"State": {"Name": state}, "StateReason": {"Message": "Server.SpotInstanceTermination"}}}

    instance: Any = object.__new__(Instance)
    instance.name, instance.address, instance.host_key = "i-1", "10.0.0.1", "ssh-ed25519 AAAA"
    instance.launched = SimpleNamespace(ended=None)
    instance.wanted = SimpleNamespace(connect_timeout=1.0)
    instance.run = SimpleNamespace(describe=describe, described={}, user_key="key")
    assert instance.reconnect(Core(None)) == "a connection"
    assert not asked
    with pytest.raises(NodeStartError) as raised:
        instance.reconnect(Core(_core.UnreachableError("no route")))
    assert isinstance(raised.value, MachineGoneError) == (state == "terminated")
    assert ("SpotInstanceTermination" if state == "terminated" else "no route") in str(raised.value)
    assert asked[0] <= time.monotonic()
