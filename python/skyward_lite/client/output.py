"""What tasks print, on this process's streams: whole lines, each with its node's name.

A line comes in parts if it is long, or if its worker paused within it, and other workers' lines may come between the
parts. So the beginning of a line is held, for each worker and stream, until the line's end has come. The printer writes

- a whole line, as soon as its end has come;
- the beginning of a line whose worker has paused: on a terminal and in a notebook as a status line, which is erased
  before anything else is written; elsewhere as it is, and the rest of the line follows it;
- the last state of a line that is written over with `\\r`, as by progress bars: on a terminal and in a notebook as a
  status line about twice a second; elsewhere when the line ends;
- a line of more than 1 MiB in parts of 1 MiB, and other workers' lines may then come between the parts.

Tasks' text is written as it is, with its colours and whatever else a terminal obeys. A node's reports of itself go
another way, into errors and the log, and are made harmless there (`_core.printable`).
"""

from __future__ import annotations

import codecs
import contextlib
import contextvars
import sys
import threading
from collections.abc import Callable
from typing import Any

from .. import _core
from .screen import can_erase, screen

TAKE_MS = 1_000
"""Bound on one wait for output; closing the pool wakes the thread at once."""
MAX_HELD_LINE = 1 << 20
"""Bytes of one line that are held until the line's end has come."""
MAX_HELD = 16 << 20
"""Bytes of all lines that are held. Each line counts for `HELD_LINE_COST` at least."""
HELD_LINE_COST = 1024
"""About the memory that the beginning of a line takes with the name of its stream, in bytes."""
STDOUT, PAUSED, STREAMS = 1, 4, 3
"""In the number of a stream: standard output, the mark of a pause, and the bits of the stream itself. The core, which
makes these numbers, describes them at `output` in `_core.pyi`."""

Source = tuple[str, int]
"""A node's name, and the number of the stream of one of its workers."""


class Printer:
    """Writes what the workers of one pool wrote, on a thread of its own."""

    def __init__(self, core: _core.Core, on_call: Callable[[], object] | None = None) -> None:
        self._core = core
        self._on_call = on_call
        """Called for each call, on the thread that makes it, if this is a notebook."""
        self._thread = threading.Thread(target=self._run, name="skyward-print", daemon=True)
        self._held: dict[Source, bytes] = {}
        """The beginnings of lines whose end has not come, without the parts that were written."""
        self._held_cost = 0
        """The cost of all that is held, in bytes."""
        self._open: dict[int, Source] = {}
        """For each of this process's streams that ends within a line, the worker whose line that is."""
        self._paused: Source | None = None
        """The worker whose line the status line shows."""
        self._cell: Any = None
        """ipykernel's mark of the notebook cell that made the latest call."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait until everything is written, once the core is closed; not for ever, as nobody may read the streams."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def call_made(self) -> None:
        """Note which notebook cell makes a call on this thread: what workers print from now on appears below that cell.

        Without this, output would appear below the cell that started the printing thread (ipykernel 6) or that ran last
        (ipykernel 7).
        """
        if "ipykernel" in sys.modules:
            self._cell = getattr(sys.stdout, "parent_header", None) or self._cell
            if self._on_call is not None:
                self._on_call()

    def _run(self) -> None:
        while (written := self._core.output(TAKE_MS)) is not None:
            self.write(written)
        self.close()

    def write(self, written: list[tuple[str, int, bytes]]) -> None:
        """Write output that has come, each part of it with the node's name, the number of the stream, and the text."""
        for node, stream, text in written:
            self._add((node, stream & ~PAUSED), text, bool(stream & PAUSED))
        self._show_status()
        for out in (sys.stdout, sys.stderr):
            # The user's program may have closed, removed or broken its streams.
            with contextlib.suppress(Exception):
                out.flush()

    def close(self) -> None:
        """Write the end of each line that has not ended."""
        self.write([(*source, b"\n") for source in {**self._held, **dict.fromkeys(self._open.values())}])

    def _add(self, source: Source, text: bytes, paused: bool) -> None:
        held = self._held.pop(source, b"")
        self._held_cost -= max(len(held), HELD_LINE_COST) if held else 0
        text = held + text
        end = text.rfind(b"\n") + 1
        if end:
            if source == self._paused:
                self._paused = None
            self._put_lines(source, text[: end - 1].decode(errors="backslashreplace"))
        rest = text[end:]
        # Only the last state of a line that is written over.
        rest = rest[max(0, rest.rstrip(b"\r").rfind(b"\r")) :]
        if rest and self._held_cost + max(len(rest), HELD_LINE_COST) > MAX_HELD:
            self._put_beginning(source, rest)
            rest = b""
        elif len(rest) > MAX_HELD_LINE:
            rest = self._put_beginning(source, rest)
        elif rest and paused:
            if can_erase(_out(source)):
                self._paused = source
            elif b"\r" not in rest:
                rest = self._put_beginning(source, rest)
        if rest:
            self._held[source] = rest
            self._held_cost += max(len(rest), HELD_LINE_COST)

    def _put_lines(self, source: Source, text: str) -> None:
        first, *others = text.split("\n")
        if self._open.get(source[1] & STREAMS) == source:
            del self._open[source[1] & STREAMS]
            # A new state of the line cannot take the place of the state that has been written already.
            begun = f"\n{_line(source, first)}" if "\r" in first.rstrip("\r") else f"{first}\n"
        else:
            begun = self._break(source) + _line(source, first)
        self._put(_out(source), begun + "".join(_line(source, line) for line in others))

    def _put_beginning(self, source: Source, text: bytes) -> bytes:
        """Write the beginning of a line. Return its last bytes if they are an incomplete character."""
        begun = "" if self._open.get(source[1] & STREAMS) == source else f"{self._break(source)}[{source[0]}] "
        self._open[source[1] & STREAMS] = source
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._put(_out(source), begun + decoder.decode(text))
        return decoder.getstate()[0]

    def _break(self, source: Source) -> str:
        """Return the line end that is needed if another worker's line has not ended on the same stream, or ""."""
        return "\n" if self._open.pop(source[1] & STREAMS, None) else ""

    def _put(self, out: Any, text: str) -> None:
        self._choose_cell(out)
        screen.write(out, text)

    def _choose_cell(self, out: Any) -> None:
        cell = getattr(out, "_parent_header", None)
        if self._cell and isinstance(cell, contextvars.ContextVar):
            # A context variable has a value of its own in each thread.
            cell.set(self._cell)

    def _show_status(self) -> None:
        line = ""
        out: Any = None
        if self._paused is not None:
            out, held = _out(self._paused), self._held.get(self._paused, b"")
            line = _line(self._paused, held.decode(errors="backslashreplace")) if held else ""
            self._choose_cell(out)
        screen.hold(self, out, line.rstrip("\n"))


def _line(source: Source, line: str) -> str:
    """Return a line as it is written: its last state, or "" if the task wiped the line out in the end."""
    *before, state = line.rstrip("\r").split("\r")
    return f"[{source[0]}] {state}\n" if state.strip() or not before else ""


def _out(source: Source) -> Any:
    return sys.stdout if source[1] & STREAMS == STDOUT else sys.stderr
