"""Large buffers that a call of `Parallel` sends again and again: the core looks at each as seldom as it may.

The core finds out by the content of a large buffer whether a node has it already. A `bytes` cannot change, nor can an
array whose memory belongs to a `bytes`: the core looks at these once. Another array can change between two tasks, also
a read-only one: it may be made writable again, or have a view from the time when it was writable. joblib draws several
batches at once from its input, and sends one of them whenever another one has ended. An array that is an argument in
several of these is looked at when the first of them is sent, and goes with all of them as it was then: each task gets
it as it was at some moment after the task was drawn.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from .. import _core
from .classes import RecentlyUsed

MIN_BYTES: Final = 128 * 1024
"""A smaller buffer is no blob: see `BLOB_BYTES` in `rust/src/timing.rs`."""
MAX_KEPT: Final = 16
"""Buffers that are kept for a call of `Parallel`, with their handles."""
MAX_MET: Final = 8
"""Buffers that are kept because the call has sent them once: each task may bring one of its own."""

_WITHOUT_BUFFERS: Final = frozenset((int, float, str, bytes, bool, type(None)))
"""Types of arguments that are in many calls, and that have no buffer which can change."""

Key = tuple[int, int]
"""The address and the bytes of a buffer."""


Calls = Sequence[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]
"""The calls of a batch, which is known by this very object."""


class _Drawn(NamedTuple):
    """A buffer that can change and that several batches have, which joblib has drawn at once."""

    view: memoryview
    handle: _core.Blob
    batches: dict[int, Calls]
    """Those that were drawn before the buffer was looked at and are not sent yet, by `id`. Shrinks until none is left.
    """


class Handles:
    """The handles of one call of `Parallel`.

    `make` makes one: see `_core.Core.blob`. `waiting` returns the batches that are drawn and not begun. Several threads
    may send batches at once.
    """

    def __init__(self, make: Callable[[memoryview], _core.Blob], waiting: Callable[[], list[Calls]] = list) -> None:
        self._make = make
        self._waiting = waiting
        self._own = threading.local()
        """`batch`: what this thread is sending. `owners`: what `_by_argument` returned for it, None before that."""
        self._lock = threading.Lock()
        self._drawn: dict[Key, _Drawn] = {}
        """Changed under the lock. A buffer that is kept keeps its address."""
        self._met = RecentlyUsed(MAX_MET)
        """The buffers that were sent once, the last ones alone."""
        self._kept = RecentlyUsed(MAX_KEPT)
        """The buffers that were sent twice or more, and their handles."""

    def begin(self, batch: Calls) -> None:
        """Set which batch this thread sends from now on."""
        self._own.batch, self._own.owners = batch, None

    def end(self, batch: Calls) -> None:
        """Forget a batch, which is pickled."""
        self._own.batch = self._own.owners = None
        if not self._drawn:
            return
        with self._lock:
            for key, drawn in list(self._drawn.items()):
                drawn.batches.pop(id(batch), None)
                if not drawn.batches:
                    del self._drawn[key]

    def find(self, view: memoryview) -> memoryview | _core.Blob:
        """Return the handle of a buffer; the buffer itself if it is small, or if no other batch has it."""
        if view.nbytes < MIN_BYTES:
            return view
        key = _core.address(view), view.nbytes
        if not is_unchanging(view):
            return self._find_drawn(view, key)
        kept: tuple[memoryview, _core.Blob] | None = self._kept.find(key)
        if kept is not None:
            return kept[1]
        if self._met.find(key) is None:
            self._met.remember(key, view)
            return view
        handle = self._make(view)
        self._kept.remember(key, (view, handle))
        self._met.forget(key)
        return handle

    def _find_drawn(self, view: memoryview, key: Key) -> memoryview | _core.Blob:
        batch: Calls | None = getattr(self._own, "batch", None)
        if batch is None:
            return view
        with self._lock:
            drawn = self._drawn.get(key)
            if drawn is not None and id(batch) in drawn.batches:
                return drawn.handle
            # Whatever was drawn before now may have the buffer as it is now.
            others = self._waiting_with(view.obj)
            if not others:
                return view
            handle = self._make(view)
            self._drawn[key] = _Drawn(view, handle, {id(batch): batch, **others})
            return handle

    def _waiting_with(self, owner: Any) -> dict[int, Calls]:
        """Return the batches, by `id`, that wait and have an object, or what it is a view of, as an argument."""
        own = self._own
        if own.owners is None:
            own.owners = _by_argument(self._waiting())
        having = [*own.owners.get(id(owner), ()), *own.owners.get(id(getattr(owner, "base", None)), ())]
        if not having:
            return {}
        # Some may have been begun since the arguments were looked at.
        waiting = {id(batch): batch for batch in self._waiting()}
        return {id(batch): batch for batch in having if id(batch) in waiting}


def _by_argument(batches: list[Calls]) -> dict[int, list[Calls]]:
    """Return which batches have an object as an argument, by its `id`."""
    found: dict[int, list[Calls]] = {}
    for batch in batches:
        for _, args, kwargs in batch:
            for value in (*args, *kwargs.values()):
                if type(value) not in _WITHOUT_BUFFERS:
                    found.setdefault(id(value), []).append(batch)
    return found


def is_unchanging(view: memoryview) -> bool:
    """Return whether the memory of a buffer belongs to a `bytes`, so that nothing can write to it."""
    owner: Any = view.obj
    ndarray = getattr(sys.modules.get("numpy"), "ndarray", None)
    while view.readonly and type(owner) in (ndarray, memoryview):
        owner = owner.obj if type(owner) is memoryview else owner.base
    return type(owner) is bytes
