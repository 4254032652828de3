"""Behaviours for `fake_agent.py` that send text, for `test_border.py`."""

from __future__ import annotations

from typing import Any


def begins(agent: Any, first: str) -> None:
    """Send these bytes (hexadecimal digits) before the client has sent any, and nothing else."""
    agent.write(bytes.fromhex(first))
    agent.sleep()


def says(agent: Any, hello: dict[str, object], answers: list[str]) -> None:
    """Begin with these fields in the hello, and send the next of the answers at each task and each cancel."""
    agent.hello(**hello)
    agent.ready()
    for answer in answers:
        agent.until("task", "cancel")
        agent.write(bytes.fromhex(answer))
    agent.sleep()


def ends(agent: Any, outcomes: list[str], text: str) -> None:
    """End one task after the other with the next of the outcomes, and this text."""
    agent.begin()
    for outcome in outcomes:
        agent.result(agent.until("task"), [text.encode()], outcome)
    agent.sleep()
