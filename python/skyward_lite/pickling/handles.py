"""Large buffers that cannot change, and that a call of `Parallel` sends again and again: the core looks at each once.

The core finds out by the content of a large buffer whether a node has it already. An array can change between two
tasks, so its content is looked at for each. A `bytes` cannot, nor can a read-only array whose memory belongs to a
`bytes` or to a read-only array.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

from .. import _core

MIN_BYTES: Final = 128 * 1024
"""A smaller buffer is no blob: see `BLOB_BYTES` in `rust/src/timing.rs`."""
MAX_KEPT: Final = 16
"""Buffers that are kept for a call of `Parallel`, with their handles; then the oldest is given up."""
MAX_MET: Final = 1024
"""Buffers of which it is remembered that the call has sent them once."""

Key = tuple[int, int]
"""The address and the bytes of a buffer."""


class Handles:
    """The handles of one call of `Parallel`. `make` makes one: see `_core.Core.blob`."""

    def __init__(self, make: Callable[[memoryview], _core.Blob]) -> None:
        self._make = make
        self._met: dict[Key, None] = {}
        """The buffers that were sent once. They are not kept: each task may bring one of its own."""
        self._kept: dict[Key, tuple[memoryview, _core.Blob]] = {}
        """The buffers that were sent twice or more, and their handles. A buffer that is kept keeps its address."""

    def find(self, view: memoryview) -> memoryview | _core.Blob:
        """Return the handle of a buffer; the buffer itself if it can change, is small, or was not sent before."""
        if view.nbytes < MIN_BYTES:
            return view
        key = _core.address(view), view.nbytes
        kept = self._kept.get(key)
        if kept is not None:
            return kept[1]
        if not is_unchanging(view):
            return view
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
