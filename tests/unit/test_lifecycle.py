"""Stages of a pool: they are passed in order, each at most once, by whichever thread comes first."""

from __future__ import annotations

import threading

import pytest
from skyward_lite.client.lifecycle import Lifecycle, Stage


def test_lifecycle_goes_forward_only():
    """A stage that was reached or skipped is not entered again, and only one of two callers enters it."""
    lifecycle = Lifecycle()
    assert lifecycle.stage is Stage.NEW
    assert lifecycle.advance(Stage.OPEN)
    assert not lifecycle.advance(Stage.OPEN)
    assert lifecycle.advance(Stage.CANCELLING)
    assert not lifecycle.advance(Stage.DRAINING)
    assert lifecycle.stage is Stage.CANCELLING
    assert lifecycle.advance(Stage.RELEASING)
    assert lifecycle.advance(Stage.CLOSED)


def test_lifecycle_is_left_by_one_of_several_threads():
    """Of several threads that leave a pool, one learns that it is the first."""
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


def test_lifecycle_wakes_a_thread_that_waits_for_a_stage():
    """A thread that waits for a stage is woken at once, not after the bound on the wait."""
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
def test_lifecycle_stages_have_a_word_for_users(stage, word):
    """Each stage has a word for the pool's repr and for errors of calls that come too early or too late."""
    assert Stage[stage].word == word
