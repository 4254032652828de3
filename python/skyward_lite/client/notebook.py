"""A display below a cell of a notebook, which is updated in its place."""

from __future__ import annotations

import itertools
import os
import sys
from typing import Any

from .picture import Row, as_html, plain

_numbers = itertools.count(1)


def current_cell() -> Any:
    """Return ipykernel's mark of the cell for which this thread runs, which is never false; None outside a notebook."""
    return getattr(sys.stdout, "parent_header", None) or None


class Cell:
    """One display, made below the cell for which the calling thread runs."""

    def __init__(self) -> None:
        self._of = current_cell()
        self._id = f"skyward-{os.getpid()}-{next(_numbers)}"
        self._last: list[Row] | None = None

    def is_current(self) -> bool:
        """Return whether the calling thread runs for the same cell."""
        return bool(self._of == current_cell())

    def update(self, rows: list[Row]) -> None:
        """Show these rows, in the place of those before."""
        if rows == self._last:
            return
        # Not at the module's head: it is imported only where it is there.
        from IPython.display import display

        show: Any = display
        data = {"text/html": as_html(rows), "text/plain": plain(rows)}
        show(data, raw=True, display_id=self._id, update=self._last is not None)
        self._last = rows
