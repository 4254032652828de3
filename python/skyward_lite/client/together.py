"""Several futures as one, for groups of lazy calls."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any


class Together(Future[Any]):
    """Several futures as one: the tuple of their values, or the first error in their order."""

    def __init__(self, members: Sequence[Future[Any]]) -> None:
        super().__init__()
        self._members = members
        self._returned = 0
        """How many members, counted from the first up to the first without a value, have a value."""
        self._claimed = False
        """Whether a thread has begun to resolve this future. Each resolves once."""
        self._lock = threading.Lock()
        """Guards the fields above."""
        self._on_member_end()
        for member in members:
            member.add_done_callback(self._on_member_end)

    def _on_member_end(self, _: object = None) -> None:
        members = self._members
        with self._lock:
            while self._returned < len(members) and _has_value(members[self._returned]):
                self._returned += 1
            if self._claimed or (self._returned < len(members) and not members[self._returned].done()):
                return
            self._claim()
        # Without the lock, because this future's own callbacks may do anything.
        if self._returned == len(members):
            self.set_result(tuple(member.result() for member in members))
            return
        # Before the error is set, so that the thread that gets the error knows that nothing more will start.
        for member in members[self._returned + 1 :]:
            member.cancel()
        failed = members[self._returned]
        if failed.cancelled():
            self._set_cancelled()
        else:
            self.set_exception(failed.exception())

    def _claim(self) -> None:
        """Note that the calling thread resolves this future.

        The members are dropped: their callbacks refer to this future, so that all of them would live on as a cycle.
        """
        self._claimed = True
        self._members = ()

    def _set_cancelled(self) -> None:
        super().cancel()
        self.set_running_or_notify_cancel()

    def running(self) -> bool:
        """Return whether a member runs now."""
        return super().running() or any(member.running() for member in self._members)

    def cancel(self) -> bool:
        """Cancel the members that have not started. Return true if there was one: then there will be no tuple."""
        members = self._members
        cancelled = [member.cancel() for member in members]
        with self._lock:
            claimed = any(cancelled) and not self._claimed
            if claimed:
                self._claim()
        if claimed:
            self._set_cancelled()
        return self.cancelled()


def _has_value(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
