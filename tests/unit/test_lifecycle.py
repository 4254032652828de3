"""A pool's stages: they are passed in order, each at most once, by whichever thread comes first."""

from __future__ import annotations

import threading

import pytest
from skyward_lite.client.lifecycle import Lifecycle, Stage


def test_a_pool_goes_forward_only():
    """A stage that was reached or skipped is not entered again, and only one of two callers has entered it."""
    lifecycle = Lifecycle()
    assert lifecycle.stage is Stage.NEW
    assert lifecycle.advance(Stage.OPEN)
    assert not lifecycle.advance(Stage.OPEN)
    assert lifecycle.advance(Stage.CANCELLING)
    assert not lifecycle.advance(Stage.DRAINING)
    assert lifecycle.stage is Stage.CANCELLING
    assert lifecycle.advance(Stage.RELEASING)
    assert lifecycle.advance(Stage.CLOSED)


def test_of_several_threads_one_begins_to_leave():
    """The others learn that they were not the first."""
    lifecycle, first, ready = Lifecycle(), [], threading.Barrier(8)

    def leave():
        ready.wait(20)
        first.append(lifecycle.advance(Stage.DRAINING))

    threads = [threading.Thread(target=leave) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(first) == [False] * 7 + [True]


def test_who_waits_for_a_stage_is_woken():
    """At once, not after the bound on the wait."""
    lifecycle, woken = Lifecycle(), threading.Event()

    def wait():
        with lifecycle.changed:
            if lifecycle.changed.wait_for(lambda: lifecycle.stage is Stage.CLOSED, 20):
                woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    lifecycle.advance(Stage.CLOSED)
    assert woken.wait(10)
    thread.join(20)


@pytest.mark.parametrize(
    ("stage", "word"),
    [("NEW", "new"), ("OPEN", "open"), ("DRAINING", "closing"), ("CANCELLING", "closing"), ("CLOSED", "closed")],
)
def test_a_stage_has_a_word_for_users(stage, word):
    """In a pool's repr, and in errors of calls that come too early or too late."""
    assert Stage[stage].word == word
