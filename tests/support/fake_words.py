"""What the fake agents of `test_border.py` say in words: behaviours as `fake_agent.py` describes them."""

from __future__ import annotations

from typing import Any


def begins(agent: Any, first: str) -> None:
    """Send these bytes (hexadecimal digits) before the client has said a word, and nothing else."""
    agent.write(bytes.fromhex(first))
    agent.sleep()


def says(agent: Any, hello: dict[str, object], answers: list[str]) -> None:
    """Begin with these fields in its hello, and send the next of the answers with each task and each wish to cancel."""
    agent.hello(**hello)
    agent.ready()
    for answer in answers:
        agent.until("task", "cancel")
        agent.write(bytes.fromhex(answer))
    agent.sleep()


def ends(agent: Any, tags: list[str], text: str) -> None:
    """End one task after the other with the next of the tags, and this text."""
    agent.begin()
    for tag in tags:
        agent.result(agent.until("task"), [text.encode()], tag)
    agent.sleep()
