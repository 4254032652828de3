"""Automatic batches of a `Parallel` call that travel in parts.

joblib chooses the size of an automatic batch before it knows the batch's tasks. Two of its choices are put right here,
and joblib is told only of the whole batch. A batch that is larger than `max_payload` is sent in halves. A batch that
runs for too long is given back after the call that was running: the worker returns the values so far, and the calls
that it has not begun are sent again in small parts, to any slots that are free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from .. import checks

PATIENCE: Final = 10
"""A batch is given back when it has run for 10 times the longest time that a batch should take."""


class Parts:
    """What has become of the calls of a batch: each part's values, until the batch is whole again."""

    def __init__(self, calls: int) -> None:
        self.over = False
        """Whether the batch has ended: its values are complete, or a part has failed."""
        self._missing = calls
        self._values: dict[int, list[Any]] = {}
        """Place of a part's first call in the batch → the values from there on."""

    def add(self, first: int, values: list[Any]) -> None:
        """Add the values of consecutive calls. Each call's value comes once."""
        self._values[first] = values
        self._missing -= len(values)
        self.over = self._missing == 0

    def take(self) -> list[Any]:
        """Return all values, in the order of the calls, and keep none."""
        values, self._values = self._values, {}
        return [value for first in sorted(values) for value in values[first]]


def halves(items: Sequence[Any]) -> Iterator[tuple[int, Sequence[Any]]]:
    """Yield both halves of a batch with more than one call, each with the place of its first call."""
    middle = len(items) // 2
    yield 0, items[:middle]
    yield middle, items[middle:]


def pieces(items: Sequence[Any], done: int, seconds: float, ideal: float, slots: int) -> Iterator[tuple[int, Any]]:
    """Yield the calls from number `done` on in parts, each with the place of its first call.

    A part should take `ideal` seconds at the pace of the calls so far, which took `seconds`, and each slot gets one.
    For example, 2 calls took 0.2 s and 198 are left: each part is one call.
    """
    rest = len(items) - done
    size = max(1, min(int(ideal * done / seconds) if seconds > 0 else rest, -(-rest // max(1, slots))))
    for first in range(done, len(items), size):
        yield first, items[first : first + size]


def not_a_call(items: Any) -> str | None:
    """Return what is wrong with a batch whose items are not all calls, as `delayed` makes them; None if they are."""
    for item in items or ():
        if not isinstance(item, tuple) or len(item) != 3 or not callable(item[0]):
            return (
                f"Parallel takes calls, and its input had {checks.shown(item)}: write "
                "`Parallel(...)(delayed(f)(x) for x in xs)`, with the function in the brackets of `delayed` and its "
                "arguments in the brackets after them"
            )
    return None
