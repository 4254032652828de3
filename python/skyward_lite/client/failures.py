"""The errors that calls of a pool ended with, as text: for its report."""

from __future__ import annotations

import collections
import time
from concurrent.futures import CancelledError
from typing import Final, NamedTuple

from .. import _core
from ..errors import RemoteError

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
        """Note an error, unless the call was cancelled. Never raises, whatever the error's own methods do."""
        if isinstance(error, CancelledError):
            return
        self.count += 1
        try:
            failure = _as_text(error)
        except BaseException as reason:
            failure = Failure(time.monotonic(), "an error", f"(it cannot be shown: {type(reason).__name__})", "")
        self.latest.append(failure)


def _as_text(error: BaseException) -> Failure:
    kind = type(error)
    is_known = kind.__module__ in ("builtins", RemoteError.__module__)
    name = kind.__qualname__ if is_known else f"{kind.__module__}.{kind.__qualname__}"
    try:
        message = _core.printable(str(error), MAX_TEXT)
    except BaseException as reason:
        message = f"(its text cannot be shown: {type(reason).__name__})"
    found = getattr(error, "__notes__", None)
    notes = [note for note in (found if isinstance(found, list) else ()) if isinstance(note, str)]
    is_ours = kind.__module__ == RemoteError.__module__
    # Of an error of ours the first note is ours, too; other errors may have come with notes of their own.
    where = next((note for note in notes if note.startswith("node ")), notes[0] if notes and is_ours else "")
    return Failure(time.monotonic(), name, message, _core.printable(where, MAX_TEXT, lines=False))
