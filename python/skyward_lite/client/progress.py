"""`with sky.progress():` shows the tasks of a pool while the block runs."""

from __future__ import annotations

import os
import sys
import types
from typing import Self

from .. import checks
from .display import Display
from .innermost import innermost
from .task_view import TaskView


class Progress:
    """Show the progress of a pool's tasks for the length of a `with` block.

    On a terminal it is a live part below whatever tasks and this program print, in a notebook a display below the cell,
    and nothing elsewhere. Shown are the calls that are done, run and wait, how many end per second, bytes to and from
    the nodes, and each node. The last state stays as one line. The pool is the innermost open one, as for
    `backend="skyward"`.

    Parameters
    ----------
    total : int, optional
        How many calls there will be. With it, the time that is left is known from the first results on; without it,
        as soon as the input of all calls has been read to its end.

    Raises
    ------
    PoolClosedError
        If no pool is open.

    Examples
    --------
    >>> with sky.pool(), sky.progress(total=100):
    ...     results = Parallel(n_jobs=-1)(delayed(abs)(i) for i in range(100))
    """

    def __init__(self, total: int | None = None) -> None:
        self._total = None if total is None else checks.whole("progress", "total", total, 1, sys.maxsize)
        self._process = 0
        """The process that entered the block."""
        self._shown: tuple[Display, TaskView] | None = None

    def __enter__(self) -> Self:
        if self._shown is not None:
            raise RuntimeError("this sky.progress() is entered already: make one for each block")
        self._process = os.getpid()
        display = innermost("sky.progress()")
        self._shown = display, display.begin(self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if self._shown is not None:
            display, view = self._shown
            self._shown = None
            # In a forked child the terminal is its parent's, and the display's lock may be held for ever.
            if os.getpid() == self._process:
                display.finish(view)


progress = Progress
