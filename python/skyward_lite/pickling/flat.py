"""Large lists, tuples and dictionaries of numbers and texts: nothing in them can change but what they have.

Objects that cannot change need not be the same at the far end as in other arguments. So the stream of such a container
depends on nothing else, and the container is the only object of it to which the rest of the call refers. And whether
the container still has what it had is found out much faster than it is pickled: the elements are the same objects.
"""

from __future__ import annotations

import operator
import pickle
from typing import Any, Final

from .classes import RecentlyUsed

_UNCHANGING: Final = frozenset((str, bytes, int, float, complex, bool, type(None)))
MAX_KEPT: Final = 4
"""Containers that are kept for a call of `Parallel`, with their streams."""
MAX_MET: Final = 4
"""Containers that are kept because the call has sent them once: each task may bring its own."""
MAX_FLAT: Final = 256
"""Containers of one call that are pickled so: the unpickler's number of one has a byte."""


class Flats:
    """The containers of one call of `Parallel` that are flat."""

    def __init__(self) -> None:
        self._met = RecentlyUsed(MAX_MET)
        """`id` → a copy of a container, which keeps its elements. Of those that were sent once, the last ones alone."""
        self._kept = RecentlyUsed(MAX_KEPT)
        """`id` → such a copy and its stream, of the containers that were sent twice or more."""

    def stream(self, value: Any, least: int) -> bytes | None:
        """Return the stream of a container as it is now; None for a value of another kind, or of fewer bytes."""
        key = id(value)
        kept: tuple[Any, bytes] | None = self._kept.find(key)
        if kept is not None and _has_same(kept[0], value):
            return kept[1]
        copy = _copy(value)
        if copy is None:
            return None
        # Of the copy: another thread may change the container meanwhile.
        stream = pickle.dumps(copy, 5)
        if len(stream) < least:
            return None
        # Another container may have the `id` by now.
        if _has_same(self._met.find(key), copy):
            self._kept.remember(key, (copy, stream))
            self._met.forget(key)
        else:
            self._met.remember(key, copy)
        return stream


def _copy(value: Any) -> Any:
    """Return a copy of a container with the same elements, if none of them can change; None otherwise."""
    kind = type(value)
    if kind is list or kind is tuple:
        copy = value[:]
        return copy if _UNCHANGING.issuperset(map(type, copy)) else None
    if kind is dict:
        copy = value.copy()
        kinds = _UNCHANGING
        return copy if kinds.issuperset(map(type, copy)) and kinds.issuperset(map(type, copy.values())) else None
    return None


def _has_same(copy: Any, value: Any) -> bool:
    """Return whether a container has the very objects that its copy has, in the same order."""
    if type(copy) is not type(value) or len(copy) != len(value):
        return False
    # Of a copy, so that it does not change while it is compared.
    now = value.copy() if type(value) is dict else value[:]
    same = len(copy) == len(now) and all(map(operator.is_, copy, now))
    return same and (type(now) is not dict or all(map(operator.is_, copy.values(), now.values())))


def prefix(count: int) -> bytes:
    """Return a stream that enters so many containers into an unpickler's memo, by its `persistent_load`."""
    loads = (pickle.BININT1 + bytes((number,)) + pickle.BINPERSID + pickle.MEMOIZE for number in range(count))
    return b"".join((pickle.PROTO, bytes((5,)), *loads, pickle.STOP))
