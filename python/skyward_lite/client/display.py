"""What a pool shows of itself, on a terminal or in a notebook: its start, and its tasks.

    where                                       the start                        the tasks
    a terminal, with rich                       a live part: a row per node      a live part: all tasks, each node
    a terminal without rich, or TERM=dumb       a line when a node does more     one line that is written over
    a notebook                                  one display below the cell, which is updated
    anywhere else                               nothing                          nothing

Nothing is shown of what is over in half a second. One thread, `skyward-display`, draws a few times a second while there
is anything to show.
"""

from __future__ import annotations

import contextvars
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from . import figures, picture
from .node_state import Node, NodeState
from .notebook import Cell, current_cell
from .picture import Row
from .screen import MIN_REDRAW_SECONDS, screen, size, stream
from .startup import Startup
from .task_view import Counts, TaskView

log = logging.getLogger("skyward_lite")

QUIET_SECONDS: Final = 0.5
"""A start that takes no longer shows nothing."""
LATE_SECONDS: Final = 2.0
"""A node that becomes ready so long after the pool has started gets a line of its own."""
DRAW_SECONDS: Final = 0.125
"""Between two drawings on a terminal while nodes start: the spinner turns."""
TASKS_SECONDS: Final = 0.25
"""The same while tasks run, and for both in a notebook, which keeps each drawing for a while."""
NOTEBOOK_ROWS: Final = 24
"""Rows of a display in a notebook."""
SPARE_ROWS: Final = 4
"""Rows of the terminal that the live part leaves to what else is written."""
PREFIX: Final = "skyward_lite: "
"""Begins a line that pools write on a terminal, among others' lines."""


class Display:
    """What one pool shows. `wanted` is `pool(progress=)`."""

    def __init__(self, wanted: bool | None) -> None:
        self.wanted = wanted
        self.counts: Callable[[], Counts]
        """Returns how the tasks stand; set by the pool."""
        self._lock = threading.RLock()
        """Guards the fields below, and is held while something is drawn."""
        self._startup: Startup | None = None
        self._views: list[TaskView] = []
        """The views of tasks that were begun and not ended; the last one is shown."""
        self._due = 0.0
        """When (`time.monotonic`) the first drawing of what is to be shown may come."""
        self._shown = False
        """Whether anything of the start was shown."""
        self._started_at = 0.0
        """When (Unix time) the pool had started."""
        self._cells: dict[object, Cell] = {}
        """The notebook's display of the start, and of each view."""
        self._paint: Callable[[Row], str] | None = None
        """Makes a terminal's text of a row; None without rich."""
        self._thread: threading.Thread | None = None
        self._follows_cells = False
        """Whether the tasks of each cell of a notebook are shown below it."""
        self._following: TaskView | None = None
        """The view of the cell that made the latest call, if so."""

    # ------------------------------------------------------------------------------------------------ the start

    def begin_start(self, startup: Startup) -> None:
        """Show the start of the nodes, from now on until `end_start`."""
        if self.wanted is False or not is_shown_somewhere():
            return
        with self._lock:
            self._startup = startup
            self._due = time.monotonic() + QUIET_SECONDS
            self._ensure_thread()

    def end_start(self, failed: bool = False) -> None:
        """Show no longer how nodes start, but in one line what became of it, unless it has failed."""
        with self._lock:
            startup, self._startup = self._startup, None
            if startup is None:
                return
            self._started_at = time.time()
            if self._shown:
                self._end(startup, [] if failed else [[(startup.end(), "")]])
            self._shown = False

    def node_changed(self, node: Node, old: str) -> None:
        """Write a line on a node that has become ready after the start. The log warns of what is bad."""
        if self.wanted is False or self._startup is not None or log.isEnabledFor(logging.INFO):
            return
        if old == NodeState.CONNECTING and node.since < self._started_at + LATE_SECONDS:
            return
        if node.state == NodeState.READY and stream() is not None and not in_notebook():
            what = "is connected again" if old == NodeState.RECONNECTING else "is ready"
            screen.say(f"{PREFIX}{node.name} {what} with {figures.count(node.slots, 'slot')}")

    # ------------------------------------------------------------------------------------------------ tasks

    def open(self) -> None:
        """Show the tasks for as long as the pool is open, if that is wanted: in a notebook from the next call on."""
        if self.wanted and in_notebook():
            self._follows_cells = True
        elif self.wanted:
            self.begin()

    def begin(self, total: int | None = None) -> TaskView:
        """Show the tasks from now on, of which there will be `total`, instead of the view that was begun before."""
        view = TaskView(self.counts, total)
        if not is_shown_somewhere():
            return view
        with self._lock:
            if self._following is not None:
                self.finish(self._following)
            self._views.append(view)
            self._due = 0.0
            if in_notebook():
                # At once, and on this thread: the cell may have ended before the next drawing.
                self._cells[view] = Cell()
                self._cells[view].update(view.rows(NOTEBOOK_ROWS))
            else:
                screen.enter(self)
            self._ensure_thread()
        return view

    def finish(self, view: TaskView) -> None:
        """Show a view no longer, but in one line what was done."""
        with self._lock:
            if view not in self._views:
                return
            self._views.remove(view)
            if view is self._following:
                self._following = None
            view.sample()
            end = view.end()
            self._end(view, [[(end, "")]] if end else [])

    def call_made(self) -> None:
        """Note that this thread makes a call: in a notebook what is shown moves to the cell that it runs for."""
        if not self._follows_cells:
            return
        with self._lock:
            following = self._following
            if following is not None and self._cells[following].is_current():
                return
            if following is not None:
                self.finish(following)
            if not self._views:
                self._following = self.begin()

    def close(self, seconds: float) -> None:
        """Show nothing any more. Waits so long for a terminal that takes no output, as after Ctrl-S."""
        run = contextvars.copy_context().run
        closing = threading.Thread(target=run, args=(self._close,), name="skyward-display-end", daemon=True)
        try:
            closing.start()
        except RuntimeError:
            # Some versions of Python start no thread any more while a program ends.
            self._close()
        else:
            closing.join(seconds)

    def _close(self) -> None:
        with self._lock:
            self._follows_cells = False
            self.end_start(failed=True)
            for view in reversed(self._views.copy()):
                self.finish(view)

    # ------------------------------------------------------------------------------------------------ drawing

    def _ensure_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            # In a copy of this thread's context: newer notebooks find the cell to which output belongs by it.
            run = contextvars.copy_context().run
            self._thread = threading.Thread(target=run, args=(self._run,), name="skyward-display", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        last = 0.0
        while True:
            fast = self._startup is not None and not in_notebook()
            interval = DRAW_SECONDS if fast else TASKS_SECONDS
            if screen.stale.wait(max(0.0, min(interval, last + interval - time.monotonic()))):
                time.sleep(MIN_REDRAW_SECONDS)
                screen.refresh()
            if time.monotonic() < last + interval:
                continue
            last = time.monotonic()
            with self._lock:
                if self._startup is None and not self._views:
                    self._thread = None
                    return
                if last >= self._due:
                    try:
                        self._draw()
                    except Exception:
                        # The tasks are not to suffer from what is shown of them.
                        log.warning("the pool's progress cannot be shown any more", exc_info=True)
                        self._startup, self._views = None, []

    def _draw(self) -> None:
        startup = self._startup
        out = None if in_notebook() else stream()
        if out is None and not in_notebook():
            return
        if self._paint is None and out is not None:
            self._paint = picture.painter(out)
        height = NOTEBOOK_ROWS if out is None else max(1, size(out)[1] - SPARE_ROWS)
        if startup is not None:
            self._shown = True
            if out is not None and self._paint is None:
                # A log that has these lines already, and more, is not repeated.
                for line in [] if log.isEnabledFor(logging.INFO) else startup.news():
                    screen.say(f"{PREFIX}{line}")
                return
            rows = startup.rows(height)
        else:
            view = self._views[-1]
            view.sample()
            if out is not None and view.is_idle:
                screen.show(self, [])
                return
            rows = [[(view.end(), "")]] if view.is_idle else view.rows(height)
            if out is not None and self._paint is None:
                screen.show(self, [picture.text(picture.readable(view.line(), out))])
                return
        if self._paint is not None:
            screen.show(self, [self._paint(row) for row in rows])
        else:
            key = self._views[-1] if startup is None else startup
            self._cells.setdefault(key, Cell()).update(rows)

    def _end(self, shown: object, rows: list[Row]) -> None:
        """Leave these rows where the start or a view was shown."""
        if in_notebook():
            if cell := self._cells.pop(shown, None):
                cell.update(rows)
            return
        if self._views:
            screen.show(self, [])
        else:
            screen.leave(self)
        out = stream()
        for row in rows if out is not None else []:
            screen.say(f"{PREFIX}{picture.text(picture.readable(row, out))}")


def in_notebook() -> bool:
    """Return whether this process is a notebook's kernel."""
    return "ipykernel" in sys.modules and current_cell() is not None


def is_shown_somewhere() -> bool:
    """Return whether there is a notebook or a terminal to show anything."""
    return in_notebook() or stream() is not None
