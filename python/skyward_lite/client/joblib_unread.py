"""What a call of `Parallel` that returns a generator has computed and its consumer has not read yet.

joblib dispatches a further batch whenever it is told that one has ended, whether or not anybody reads the results. So
with an endless input and a consumer that sleeps, this process would fill with results. Here joblib is told of an ended
batch only while the unread results that it has take less than `MAX_UNREAD_BYTES`, or if this batch is the next that the
consumer reads. The batches that were dispatched by then do end, and their results are held as they came.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, Protocol, TypeVar

MAX_UNREAD_BYTES: Final = 64 << 20
"""Bytes of results that joblib has, beyond the batch that it was told of last: as many as a node may have under way."""
BATCH_BYTES: Final = 1024
"""Bytes that a batch counts for beside its result: what this process and joblib remember of it."""
CALL_BYTES: Final = 64
"""Bytes that each call of a batch counts for beside: a small object takes more memory than its pickle."""


class Values(list[Any]):
    """The values of a batch. `on_read` is called once, when the consumer begins to read them."""

    def __init__(self, values: list[Any], on_read: Callable[[], None]) -> None:
        super().__init__(values)
        self._on_read: Callable[[], None] | None = on_read

    def __iter__(self) -> Iterator[Any]:
        on_read, self._on_read = self._on_read, None
        if on_read is not None:
            on_read()
        return super().__iter__()


class Ended(Protocol):
    """A batch that has ended."""

    first: int
    """The place of its first call among those of the call of `Parallel`."""
    calls: int
    size: int
    """Bytes of its result, or of what was sent if that is more."""


Batch = TypeVar("Batch", bound=Ended)


class Unread(Generic[Batch]):
    """The batches that have ended and that joblib is not told of, and the bytes of those that nobody has read.

    With `ordered` the consumer reads batches in the order of their calls, else in the order in which joblib was told.
    """

    def __init__(self, ordered: bool) -> None:
        self._ordered = ordered
        self._lock = threading.Lock()
        """Guards all that follows."""
        self._bytes = 0
        self._batches = 0
        """What joblib was told of and nobody has read."""
        self._next = 0
        """The place of the first call that is not read, if `ordered`."""
        self._held: dict[int, Batch] = {}
        """Place of its first call → a batch that joblib is not told of yet."""
        self._unbounded = False

    def hold(self, batch: Batch) -> None:
        """Hold a batch that has ended until `take_due` returns it."""
        with self._lock:
            self._held[batch.first] = batch

    def take_due(self) -> Batch | None:
        """Return a held batch of which joblib is to be told now. It counts as unread from now on."""
        with self._lock:
            if not self._held:
                return None
            first = next(iter(self._held))
            if self._ordered and self._next in self._held:
                first = self._next
            elif not self._unbounded and self._bytes >= MAX_UNREAD_BYTES and (self._ordered or self._batches):
                return None
            batch = self._held.pop(first)
            self._bytes += _cost(batch)
            self._batches += 1
            return batch

    def read(self, batch: Batch) -> bool:
        """Count a batch as read. Return whether any is held."""
        with self._lock:
            self._bytes -= _cost(batch)
            self._batches -= 1
            self._next = batch.first + batch.calls
            return bool(self._held)

    def release(self) -> None:
        """Hold nothing from now on: nobody may be able to read."""
        with self._lock:
            self._unbounded = True


def _cost(batch: Ended) -> int:
    return batch.size + BATCH_BYTES + CALL_BYTES * batch.calls
