"""The pools whose block is entered, so that functions without a pool among their arguments find theirs."""

from __future__ import annotations

import threading
from concurrent.futures import Executor
from typing import NamedTuple

from ..errors import PoolClosedError
from . import folding
from .display import Display


class _Entered(NamedTuple):
    pool: Executor
    display: Display
    thread: threading.Thread
    """The one that entered the block."""


_entered: list[_Entered] = []
"""In the order in which they were entered."""


def enter(pool: Executor, display: Display) -> None:
    """Note that the calling thread has entered the block of a pool, which shows itself by `display`."""
    _entered.append(_Entered(pool, display, threading.current_thread()))


def leave(pool: Executor) -> None:
    """Forget a pool whose block is left."""
    _entered[:] = [entered for entered in _entered if entered.pool is not pool]


def innermost(wanted_by: str) -> Display:
    """Return the display of the pool that the calling thread entered last, or the last of all if it entered none.

    Raise `PoolClosedError`, which names what `wanted_by` it, if there is none.
    """
    if not _entered:
        folding.install()
        raise PoolClosedError(
            f"{wanted_by} needs an open pool: use it inside `with sky.pool(...):`, or after `pool.start()`"
        )
    own = (display for _, display, thread in reversed(_entered) if thread is threading.current_thread())
    return next(own, _entered[-1].display)
