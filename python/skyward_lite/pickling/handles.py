"""Large buffers that a call of `Parallel` sends again and again: the core looks at each as seldom as it may.

The core finds out by the content of a large buffer whether a node has it already. A `bytes` cannot change, nor can a
read-only array whose memory belongs to a `bytes` or to a read-only array: the core looks at these once. Another array
can change between two tasks. joblib draws several batches at once from its input, and sends one of them whenever
another one has ended. An array that is an argument in several of these is looked at when the first of them is sent, and
goes with all of them as it was then: each task gets it as it was at some moment after the task was drawn.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from .. import _core

MIN_BYTES: Final = 128 * 1024
"""A smaller buffer is no blob: see `BLOB_BYTES` in `rust/src/timing.rs`."""
MAX_KEPT: Final = 16
"""Buffers that are kept for a call of `Parallel`, with their handles; then the oldest is given up."""
MAX_MET: Final = 1024
"""Buffers of which it is remembered that the call has sent them once."""

Key = tuple[int, int]
"""The address and the bytes of a buffer."""


Calls = Sequence[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]
"""The calls of a batch, which is known by this very object."""


class _Drawn(NamedTuple):
    """A buffer that can change and that several batches have, which joblib has drawn at once."""

    view: memoryview
    handle: _core.Blob
    batches: list[Calls]
    """Those that were drawn before the buffer was looked at and are not sent yet. Shrinks until none is left."""


class Handles:
    """The handles of one call of `Parallel`.

    `make` makes one: see `_core.Core.blob`. `waiting` returns the batches that are drawn and not begun. Several threads
    may send batches at once.
    """

    def __init__(self, make: Callable[[memoryview], _core.Blob], waiting: Callable[[], list[Calls]] = list) -> None:
        self._make = make
        self._waiting = waiting
        self._own = threading.local()
        """`batch`: what this thread is sending."""
        self._lock = threading.Lock()
        self._drawn: dict[Key, _Drawn] = {}
        """Changed under the lock. A buffer that is kept keeps its address."""
        self._met: dict[Key, None] = {}
        """The buffers that were sent once. They are not kept: each task may bring one of its own."""
        self._kept: dict[Key, tuple[memoryview, _core.Blob]] = {}
        """The buffers that were sent twice or more, and their handles. A buffer that is kept keeps its address."""

    def begin(self, batch: Calls) -> None:
        """Set which batch this thread sends from now on."""
        self._own.batch = batch

    def end(self, batch: Calls) -> None:
        """Forget a batch, which is pickled."""
        self._own.batch = None
        if not self._drawn:
            return
        with self._lock:
            for key, drawn in list(self._drawn.items()):
                drawn.batches[:] = [each for each in drawn.batches if each is not batch]
                if not drawn.batches:
                    del self._drawn[key]

    def find(self, view: memoryview) -> memoryview | _core.Blob:
        """Return the handle of a buffer; the buffer itself if it is small, or if no other batch has it."""
        if view.nbytes < MIN_BYTES:
            return view
        key = _core.address(view), view.nbytes
        kept = self._kept.get(key)
        if kept is not None:
            return kept[1]
        if not is_unchanging(view):
            return self._find_drawn(view, key)
        if key not in self._met:
            if len(self._met) >= MAX_MET:
                self._met.clear()
            self._met[key] = None
            return view
        if len(self._kept) >= MAX_KEPT:
            self._kept.pop(next(iter(self._kept)), None)
        handle = self._make(view)
        self._kept[key] = view, handle
        return handle

    def _find_drawn(self, view: memoryview, key: Key) -> memoryview | _core.Blob:
        batch: Calls | None = getattr(self._own, "batch", None)
        if batch is None:
            return view
        with self._lock:
            drawn = self._drawn.get(key)
            if drawn is not None and any(each is batch for each in drawn.batches):
                return drawn.handle
            # Whatever was drawn before now may have the buffer as it is now.
            others = [each for each in self._waiting() if _is_argument(view.obj, each)]
            if not others:
                return view
            handle = self._make(view)
            self._drawn[key] = _Drawn(view, handle, [batch, *others])
            return handle


def _is_argument(owner: Any, batch: Calls) -> bool:
    """Return whether an object, or what it is a view of, is an argument of a batch's calls."""
    base = getattr(owner, "base", None)
    wanted = {id(owner)} if base is None else {id(owner), id(base)}
    return any(
        not wanted.isdisjoint(map(id, args)) or not wanted.isdisjoint(map(id, kwargs.values()))
        for _, args, kwargs in batch
    )


def is_unchanging(view: memoryview) -> bool:
    """Return whether nothing can write to the memory of a buffer, for as long as no array is made writable again."""
    owner: Any = view.obj
    np: Any = sys.modules.get("numpy")
    while view.readonly and np is not None and type(owner) is np.ndarray and not owner.flags.writeable:
        if owner.base is None:
            return bool(owner.flags.owndata)
        owner = owner.base
        if type(owner) is memoryview:
            if not owner.readonly:
                return False
            owner = owner.obj
    return type(owner) is bytes
