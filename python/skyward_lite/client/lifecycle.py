"""Where a pool stands between its making and its end.

The parts of a pool (`Tasks`, `Nodes`, the pool itself) run on many threads and all ask the one `Lifecycle` that the
pool made whether it is open or being left.
"""

from __future__ import annotations

import enum
import threading
import time


class Stage(enum.IntEnum):
    """A pool's stages, in their order: a pool goes forward only, and may skip stages."""

    NEW = 0
    """Nothing has been started."""
    OPEN = 1
    """The block was entered: nodes start, tasks are taken."""
    DRAINING = 2
    """The block is being left: what was submitted runs to its end, and calls of Parallel still submit their batches."""
    CANCELLING = 3
    """The block is being left without waiting: tasks that have not ended are cancelled once the plugins are left."""
    RELEASING = 4
    """No task is taken any more, the sessions with the nodes end, and the machines are released."""
    CLOSED = 5
    """All that was started has ended."""

    @property
    def word(self) -> str:
        """The stage as an error's text and a pool's repr name it."""
        return ("new", "open", "closing", "closing", "closed", "closed")[self]


class Lifecycle:
    """The stage of one pool, for its parts and for every thread that leaves it."""

    def __init__(self) -> None:
        self.stage = Stage.NEW
        """Changed by `advance` only, under `changed`; read by any thread."""
        self.reached: dict[Stage, float] = {}
        """When each stage but the first was reached, in seconds of `time.monotonic()`; set by `advance`."""
        self.leaving: set[threading.Thread] = set()
        """The threads that have begun to leave the pool. Each waits for its end, so none reads further results."""
        self._lock = threading.RLock()
        """The lock of `changed`."""
        self.changed = threading.Condition(self._lock)
        """Notified when the stage changes, and when the last task of a completion queue has ended."""

    def advance(self, stage: Stage) -> bool:
        """Go on to `stage` and return true, or return false if the pool has come as far already."""
        # By the lock itself: Ctrl-C could be raised within the condition's own methods, and leave the lock taken.
        with self._lock:
            if self.stage >= stage:
                return False
            self.reached[stage] = time.monotonic()
            self.stage = stage
            self.changed.notify_all()
            return True

    def notify(self) -> None:
        """Wake the threads that wait on `changed`."""
        with self.changed:
            self.changed.notify_all()
