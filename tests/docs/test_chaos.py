"""A few rounds of each part of `make chaos`."""

from __future__ import annotations

import signal

import chaos
import pytest


def test_deaths_of_workers():
    """Each death at some place, with some tasks in flight: one error that names it, and no other harm."""
    assert chaos.crashes(24, seed=7) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_clients(number):
    """At some moments: nothing is left, and after Ctrl-C the interpreter is usable."""
    assert chaos.interruptions(3, seed=7, number=number) == []


def test_hostile_nodes():
    """A flood, nonsense and silence beside a good node: the call is right, memory bounded, the block left in time."""
    assert chaos.hostile(1.0, ["floods of pulse", "nonsense: frames", "silence"]) == []
