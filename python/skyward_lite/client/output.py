"""What workers wrote, on its way to this process's streams: whole lines, each with its node's name.

A line comes in parts if it is long, or if its worker paused within it, and other workers' lines may come between the
parts. So the beginning of a line is kept, for each worker and stream, until its end is there. What is written:

- a whole line, as soon as its end is there;
- the beginning of a line whose worker has paused: on a terminal and in a notebook as a status line, which is erased
  before anything else is written; elsewhere as it is, and the rest of the line follows it;
- of a line that is written over with `\\r`, as progress bars do, the last state: on a terminal and in a notebook as a
  status line about twice a second; elsewhere when the line ends;
- a line of more than 1 MiB in parts of that length, and other workers' lines may then come between them.

What tasks print is theirs: it is written as it is, with its colours and whatever else a terminal obeys. What a node
says of itself goes another way, into errors and the log, and is made harmless there (`_core.printable`).
"""

from __future__ import annotations

import codecs
import contextlib
import contextvars
import os
import sys
import threading
from typing import Any

from .. import _core

WAIT_MS = 1_000
"""Bound on one wait for output; closing the pool wakes the thread at once."""
LONGEST = 1 << 20
"""Bytes of a line that are kept until its end is there."""
MOST = 16 << 20
"""Bytes of all lines that are kept, each of which counts for `LEAST` at least."""
LEAST = 1024
"""About the memory that the beginning of a line takes with the name of its stream, in bytes."""
STDOUT, PAUSED, STREAMS = 1, 4, 3
"""In the number of a stream: standard output, the mark of a pause, and the bits of the stream itself. See output.rs."""

Source = tuple[str, int]
"""A node's name, and the number of the stream of one of its workers."""


class Printer:
    """Writes what the workers of one pool wrote, on a thread of its own."""

    def __init__(self, core: _core.Core) -> None:
        self._core = core
        self._thread = threading.Thread(target=self._run, name="skyward-print", daemon=True)
        self._kept: dict[Source, bytes] = {}
        """The beginnings of lines, without the parts that were written."""
        self._size = 0
        self._open: dict[int, Source] = {}
        """For each stream that ends within a line: whose line that is."""
        self._paused: Source | None = None
        """Whose line the status line shows."""
        self._status: tuple[Any, str] | None = None
        """The status line that is there, and its stream."""
        self._cell: Any = None
        """ipykernel's mark of the notebook cell that made the latest call."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait until all is written of a pool that is closed. Whoever reads the streams may have stopped to do so."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def call_made(self) -> None:
        """Note which notebook cell makes a call on this thread: what workers write from now on appears below it.

        By itself the kernel takes the cell that started the printing thread (ipykernel 6) or ran last (ipykernel 7).
        """
        if "ipykernel" in sys.modules:
            self._cell = getattr(sys.stdout, "parent_header", None) or self._cell

    def _run(self) -> None:
        while (written := self._core.output(WAIT_MS)) is not None:
            self.write(written)
        self.close()

    def write(self, written: list[tuple[str, int, bytes]]) -> None:
        """Write what has come: the node's name, the number of the stream, and the text."""
        for node, stream, text in written:
            self._add((node, stream & ~PAUSED), text, bool(stream & PAUSED))
        self._show_status()
        for out in (sys.stdout, sys.stderr):
            # A stream that is closed, missing or broken is its owner's choice.
            with contextlib.suppress(Exception):
                out.flush()

    def close(self) -> None:
        """End the lines that have not ended."""
        self.write([(*source, b"\n") for source in {**self._kept, **dict.fromkeys(self._open.values())}])

    def _add(self, source: Source, text: bytes, paused: bool) -> None:
        kept = self._kept.pop(source, b"")
        self._size -= max(len(kept), LEAST) if kept else 0
        text = kept + text
        end = text.rfind(b"\n") + 1
        if end:
            if source == self._paused:
                self._paused = None
            self._put_lines(source, text[: end - 1].decode(errors="backslashreplace"))
        rest = text[end:]
        # Of a line that is written over the last state.
        rest = rest[max(0, rest.rstrip(b"\r").rfind(b"\r")) :]
        if rest and self._size + max(len(rest), LEAST) > MOST:
            self._put_beginning(source, rest)
            rest = b""
        elif len(rest) > LONGEST:
            rest = self._put_beginning(source, rest)
        elif rest and paused:
            if _can_erase(_out(source)):
                self._paused = source
            elif b"\r" not in rest:
                rest = self._put_beginning(source, rest)
        if rest:
            self._kept[source] = rest
            self._size += max(len(rest), LEAST)

    def _put_lines(self, source: Source, text: str) -> None:
        first, *others = text.split("\n")
        if self._open.get(source[1] & STREAMS) == source:
            del self._open[source[1] & STREAMS]
            # What a line is written over with cannot take the place of what stands there.
            begun = f"\n{_line(source, first)}" if "\r" in first.rstrip("\r") else f"{first}\n"
        else:
            begun = self._break(source) + _line(source, first)
        self._put(_out(source), begun + "".join(_line(source, line) for line in others))

    def _put_beginning(self, source: Source, text: bytes) -> bytes:
        """Write the beginning of a line; return the bytes of a character that is not there in full."""
        begun = "" if self._open.get(source[1] & STREAMS) == source else f"{self._break(source)}[{source[0]}] "
        self._open[source[1] & STREAMS] = source
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._put(_out(source), begun + decoder.decode(text))
        return decoder.getstate()[0]

    def _break(self, source: Source) -> str:
        """Return what ends another worker's line on the same stream."""
        return "\n" if self._open.pop(source[1] & STREAMS, None) else ""

    def _put(self, out: Any, text: str) -> None:
        self._erase_status()
        self._write(out, text)

    def _write(self, out: Any, text: str) -> None:
        cell = getattr(out, "_parent_header", None)
        if self._cell and isinstance(cell, contextvars.ContextVar):
            # Each thread has a value of its own.
            cell.set(self._cell)
        with contextlib.suppress(Exception):
            try:
                out.write(text)
            except UnicodeEncodeError:
                encoding = out.encoding or "ascii"
                out.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _show_status(self) -> None:
        if self._paused is None:
            return
        out, kept = _out(self._paused), self._kept.get(self._paused, b"")
        line = _line(self._paused, kept.decode(errors="backslashreplace")) if kept else ""
        status = line.rstrip("\n")[: _columns(out) - 1]
        if self._status != (out, status):
            self._erase_status()
            if status:
                self._write(out, f"\r{status}")
                self._status = out, status

    def _erase_status(self) -> None:
        if self._status is not None:
            out, status = self._status
            self._status = None
            self._write(out, f"\r{' ' * len(status)}\r")


def _line(source: Source, line: str) -> str:
    """Return a line as it is written: its last state, or nothing if it was wiped out in the end."""
    *before, state = line.rstrip("\r").split("\r")
    return f"[{source[0]}] {state}\n" if state.strip() or not before else ""


def _out(source: Source) -> Any:
    return sys.stdout if source[1] & STREAMS == STDOUT else sys.stderr


def _can_erase(out: Any) -> bool:
    """Return whether `\\r` leads back to the beginning of the line there."""
    try:
        return type(out).__module__.startswith("ipykernel.") or bool(out.isatty())
    except Exception:
        return False


def _columns(out: Any) -> int:
    """Return the width of a terminal: a longer line could not be erased."""
    try:
        return os.get_terminal_size(out.fileno()).columns or 80
    except Exception:
        return 80
