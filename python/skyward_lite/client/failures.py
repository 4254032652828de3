"""The errors that calls of a pool ended with, as text: for its report."""

from __future__ import annotations

import collections
import time
from typing import Final, NamedTuple

from .. import _core

MAX_KEPT: Final = 1_000
"""Errors that are kept, the latest ones."""
MAX_TEXT: Final = 500
"""Characters of an error's text that are kept."""


class Failure(NamedTuple):
    """An error that a call ended with. `at` is in seconds of `time.monotonic()`."""

    at: float
    kind: str
    message: str
    where: str
    """The node, the task and the call, as the error's note has them; empty if the error has none."""


class Failures:
    """The latest errors of one pool's calls, and the number of all."""

    def __init__(self) -> None:
        self.count = 0
        self.latest: collections.deque[Failure] = collections.deque(maxlen=MAX_KEPT)
        """Of text alone: an exception would keep the frames alive that it was raised in."""

    def add(self, error: BaseException) -> None:
        """Note an error. Never raises, whatever the error's own methods do."""
        self.count += 1
        kind = type(error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        try:
            message = _core.printable(str(error), MAX_TEXT, lines=False)
        except Exception as reason:
            message = f"(its text cannot be shown: {type(reason).__name__})"
        notes = getattr(error, "__notes__", None)
        ours = (note for note in (notes if isinstance(notes, list) else ()) if isinstance(note, str))
        where = _core.printable(next((note for note in ours if note.startswith("node ")), ""), MAX_TEXT, lines=False)
        self.latest.append(Failure(time.monotonic(), name, message, where))
