"""Pauses between attempts: how long they are, and which is the last."""

from __future__ import annotations

import time

import pytest
from skyward_lite.backoff import Backoff


def pauses(backoff: Backoff, slept: list[float], limit: int = 20) -> list[float]:
    """Return the pauses of a loop that never succeeds."""
    for _ in range(limit):
        if not backoff.pause():
            break
    return slept


def test_backoff_pauses_grow_up_to_the_longest():
    """Each pause is a multiple of the one before, up to the longest."""
    slept: list[float] = []
    backoff = Backoff(1.0, factor=2.0, longest=5.0, most=5, sleep=slept.append)
    assert pauses(backoff, slept) == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_backoff_jitter_spreads_each_pause():
    """Jitter makes each pause random within its share."""
    slept: list[float] = []
    backoff = Backoff(1.0, factor=1.0, jitter=(0.5, 1.5), most=20, sleep=slept.append)
    assert all(0.5 <= pause <= 1.5 for pause in pauses(backoff, slept))
    assert len(set(slept)) > 1


def test_backoff_one_pause_may_be_longer():
    """A single pause may be longer than the others."""
    slept: list[float] = []
    backoff = Backoff(1.0, factor=2.0, sleep=slept.append)
    assert backoff.pause(at_least=10.0)
    assert backoff.pause()
    assert slept == [10.0, 2.0]


def test_backoff_deadline_cuts_the_last_pause_short(monkeypatch):
    """The last pause ends at the deadline; after it there is one more attempt and no further pause."""
    now = 100.0
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now)
    backoff = Backoff(2.0, factor=1.0, deadline=105.0, sleep=sleep)
    assert pauses(backoff, slept) == [2.0, 2.0, 1.0]


@pytest.mark.parametrize("result", [True, False, None])
def test_backoff_ends_when_its_wait_is_interrupted(result):
    """A `wait` that returns true, as an event's does when it is set, ends the attempts; `time.sleep` returns None."""
    assert Backoff(1.0, sleep=lambda seconds: result).pause() == (not result)
