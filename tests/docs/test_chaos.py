"""A few rounds of each part of `make chaos`."""

from __future__ import annotations

import signal

import deaths
import pytest
import sieges


def test_chaos_deaths_of_workers():
    """A worker that dies at any place is one error that names the death, and other tasks end as ever."""
    assert deaths.crashes(24, seed=7) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_chaos_interrupted_clients(number):
    """A client interrupted at any moment leaves nothing, and after Ctrl-C its interpreter is usable."""
    assert deaths.interruptions(3, seed=7, number=number) == []


def test_chaos_hostile_nodes():
    """With floods, nonsense and silence beside a good node the call is right, memory bounded, the block left in
    time.
    """
    assert sieges.hostile(1.0, ["floods of pulse", "nonsense: frames", "silence"]) == []
