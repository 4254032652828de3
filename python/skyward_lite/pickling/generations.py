"""Which state of the user's modules a call belongs to, and when there is a new one.

The number of such a state is a generation. It is raised when a call begins after a file of the user's modules has
changed. All tasks of a call have the generation of its beginning, and a worker process runs tasks of one generation
only. So no call sees two states of the files, and the next call sees them as they are then.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

log = logging.getLogger("skyward_lite")

LOOK_SHARE: Final = 0.05
"""Looks at the files for single tasks take at most this share of the time, even on a slow network drive."""
MIN_PAUSE_SECONDS: Final = 50e-6
"""Between two such looks at least: to open, write and close a file takes longer."""
MAX_LOOK_SECONDS: Final = 0.05
"""What may be spent on such looks at once, after a second without any: then also a program that edits a file and
submits a task at once gets the new code."""


class Source(Protocol):
    """Where workers have the user's modules from: this machine's files (changes.py), or what the client serves."""

    change: str
    """What had changed when `changed` last returned true, for the log."""

    def reason(self, name: str, module: Any) -> str:
        """Return why workers cannot import a module from here; "" if they can."""

    def snapshot(self, generation: int, name: str) -> None:
        """Take what the module of this name consists of into a generation, unless it is there."""

    def changed(self) -> bool:
        """Return whether a module has changed since the newest generation began."""

    def new_generation(self, generation: int) -> None:
        """Begin a generation, with the files as they are now."""

    def answer(self, request: bytes) -> bytes:
        """Return the answer to a worker's request."""


class Generations:
    """The generations of one pool. `on_new` is called when a new one begins, before any call has it.

    `sources` is None for a pool whose workers import none of the user's modules: it has one generation.
    """

    def __init__(self, sources: Source | None, on_new: Callable[[], None]) -> None:
        self.newest = 0
        """Raised by `begin` only, under its lock."""
        self._sources = sources
        self._on_new = on_new
        self._lock = threading.Lock()
        """Held for each look at the files."""
        self._allowed = MAX_LOOK_SECONDS
        """Seconds that may be spent on looks for single tasks. Negative after a look that takes longer."""
        self._took: deque[float] = deque(maxlen=16)
        """Seconds that the latest looks took. The shortest counts as what a look costs, from the second on: another may
        have waited for a processor, and an edit must not be missed because the machine is busy."""
        self._counted = -math.inf
        """The moment up to which the time has been added to it, by `time.monotonic`."""

    def begin(self, sparing: bool = False) -> int:
        """Look whether files have changed, and return the generation of a call that begins now.

        `sparing`: look only if that takes little of the program's time, for calls of which a program makes many.
        """
        if self._sources is None or (sparing and not self._may_look()):
            return self.newest
        # A look of another thread may have begun before the edit that this call is to see: it does not count for this.
        with self._lock:
            began = time.monotonic()
            self._look(self._sources)
            self._took.append(time.monotonic() - began)
            if sparing and len(self._took) > 1:
                self._allowed -= min(self._took)
            return self.newest

    def _may_look(self) -> bool:
        now = time.monotonic()
        if now - self._counted < MIN_PAUSE_SECONDS:
            return False
        self._allowed = min(MAX_LOOK_SECONDS, self._allowed + LOOK_SHARE * (now - self._counted))
        self._counted = now
        return self._allowed > 0

    def _look(self, sources: Source) -> None:
        if sources.changed():
            sources.new_generation(self.newest + 1)
            self._on_new()
            self.newest += 1
            log.info("%s has changed: fresh workers import it as it is now, for calls from here on", sources.change)
