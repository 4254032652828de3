"""The terminal, which has one owner in this process: whatever is written there while a live part is shown goes through
it.

Above are permanent lines: of tasks, of pools, and of the user's own program. Below them, at the cursor, is the live
part, which is erased before anything permanent is written and drawn again afterwards:

    [lab1] a line that a task printed
    a line that the program printed
    [lab1] 10%                                a task's line that has not ended (`output.py`)
    step 3                                    the program's line that has not ended
    ━━━━━━━━━━━ 120 of 300 tasks, 12/s        what pools show (`display.py`)

While pools show something, the `write` of this process's streams on the terminal is a wrapper, which is set on the
stream object itself. So `print`, `logging` and `warnings` keep their lines whole, on any thread, whichever of them
asked for `sys.stdout` earlier. What goes past the streams (`os.write`, subprocesses) may still tear the live part.
The cursor stays visible and no mode of the terminal is changed, so nothing has to be put back if the process is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

MAX_HELD_CHARACTERS = 64 * 1024
"""Characters of the program's line that are held until the line's end has come."""
MIN_REDRAW_SECONDS = 0.02
"""Between two drawings of the live part because something was written: a program may print thousands of lines."""
FALLBACK_COLUMNS, FALLBACK_ROWS = 80, 24

_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-Z\\-_]|[\x00-\x1f\x7f]")
"""A control sequence or character. Only colours, which end with an m, may be in the live part."""


class _Part(NamedTuple):
    """A part of the live part: what one owner shows."""

    out: Any
    """The stream that it belongs to; None for what pools show, which goes to the screen's stream."""
    rows: tuple[str, ...]


class _Shown(NamedTuple):
    """The live part as it is on the screen."""

    out: Any
    widths: tuple[int, ...]
    """Of each row, in cells."""


class _Wrapped:
    """A stream of this process on the terminal whose `write` goes through the screen."""

    def __init__(self, out: Any, write: Callable[[Any, str], int]) -> None:
        self.out = out
        self.raw = out.write
        """The stream's own `write`."""
        self.held = ""
        """The program's line that has not ended: in the live part, or written if there is none."""
        self._own = "write" in out.__dict__
        # A function of its own, which is recognized when the wrapper is taken away.
        self._write = lambda text: write(self, text)
        out.write = self._write

    def unwrap(self) -> None:
        """Give the stream its own `write` back, unless somebody has wrapped it once more."""
        if self.out.__dict__.get("write") is self._write:
            if self._own:
                self.out.write = self.raw
            else:
                del self.out.write


class Screen:
    """The owner of the terminal. Usable from any thread; there is one in a process, `screen`."""

    def __init__(self) -> None:
        self.stale = threading.Event()
        """Set when the live part is to be drawn soon, by `refresh`."""
        self._lock = threading.RLock()
        """Guards the fields below and the order of what is written."""
        self._parts: dict[object, _Part] = {}
        self._owners: set[object] = set()
        """Those that need the streams wrapped, whether or not they show anything."""
        self._wrapped: list[_Wrapped] = []
        self._shown: _Shown | None = None
        self._drawn_at = 0.0
        """When the live part was drawn last (`time.monotonic`)."""
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._leave_to_parent)

    # ------------------------------------------------------------------------------------------------ for pools

    def enter(self, owner: object) -> None:
        """Wrap the streams until `leave`, also while the owner shows nothing.

        A progress bar of the program's that is made meanwhile keeps the `write` that it finds.
        """
        with self._lock:
            self._owners.add(owner)
            self._wrap()

    def leave(self, owner: object) -> None:
        """Take the owner's part away, and give the streams their own `write` back if nobody else needs them wrapped."""
        with self._lock:
            self._owners.discard(owner)
            self.show(owner, [])
            if not self._owners and not self._is_live():
                self._unwrap()

    def show(self, owner: object, rows: Sequence[str]) -> None:
        """Show these rows as the owner's part of the live part, in the place of those before; none: take it away."""
        with self._lock:
            was_live = self._is_live()
            if rows:
                self._wrap()
                self._parts[owner] = _Part(None, tuple(rows))
            elif self._parts.pop(owner, None) is None:
                return
            self._erase()
            for wrapped in self._wrapped if self._is_live() != was_live else []:
                # A line that has not ended is in the live part, or else written as the program has written it.
                self._put(wrapped.out, wrapped.held if was_live else f"\r{' ' * cells(wrapped.held)}\r")
                self._flush(wrapped.out)
            if was_live and not self._is_live() and not self._owners:
                self._unwrap()
            self._draw()

    def _is_live(self) -> bool:
        return any(part.out is None for part in self._parts.values())

    def say(self, line: str) -> None:
        """Write a permanent line of a pool's."""
        out = stream()
        if out is not None:
            self.write(out, f"{line}\n")

    def refresh(self) -> None:
        """Draw the live part if it is to be drawn."""
        if self.stale.is_set():
            with self._lock:
                self.stale.clear()
                self._erase()
                self._draw()

    # ------------------------------------------------------------------------------------------------ for output

    def hold(self, owner: object, out: Any, line: str) -> None:
        """Show a line that has not ended, which belongs to a stream, as the owner's part; "": take it away."""
        with self._lock:
            before = self._parts.pop(owner, None)
            part = _Part(out, (fit(line, columns(out) - 1),)) if line else None
            if part is not None:
                self._parts = {owner: part, **self._parts}
            if part != before or self._shown is None:
                self._erase()
                self._draw()

    def write(self, out: Any, text: str) -> None:
        """Write permanent text on a stream: whole lines, unless the stream is no terminal."""
        if not can_erase(out):
            # Without the lock: nobody may read a pipe, and what goes elsewhere need not wait for it.
            self._put(out, text)
            return
        with self._lock:
            if not (self._parts or self._wrapped):
                self._put(out, text)
                return
            self._erase()
            if not self._is_live():
                self._write_above_held(out, text)
                return
            self._put(out, text)
            if time.monotonic() < self._drawn_at + MIN_REDRAW_SECONDS:
                self.stale.set()
            else:
                self._draw()

    def _write_above_held(self, out: Any, text: str) -> None:
        """Write permanent text in the place of the program's lines that have not ended, and these below it."""
        held = [wrapped for wrapped in self._wrapped if wrapped.held]
        for wrapped in held:
            self._put(wrapped.out, f"\r{' ' * cells(wrapped.held)}\r")
            self._flush(wrapped.out)
        self._put(out, text)
        if held:
            self._flush(out)
        for wrapped in held:
            self._put(wrapped.out, wrapped.held)
            self._flush(wrapped.out)

    # ------------------------------------------------------------------------------------------------ streams

    def _wrap(self) -> None:
        if self._wrapped:
            return
        for out in dict.fromkeys((sys.stderr, sys.stdout)):
            # A stream that takes no attribute is written to as it is.
            if is_terminal(out) and hasattr(out, "__dict__"):
                with contextlib.suppress(AttributeError, TypeError):
                    self._wrapped.append(_Wrapped(out, self._write_wrapped))

    def _unwrap(self) -> None:
        wrapped, self._wrapped = self._wrapped, []
        for one in wrapped:
            one.unwrap()
            one.held = ""

    def _write_wrapped(self, wrapped: _Wrapped, text: str) -> int:
        """Write what the program has written on one of its streams."""
        with self._lock:
            if wrapped not in self._wrapped or not isinstance(text, str):
                # Somebody, as a progress bar, has kept the wrapper; or it is an error, which the stream raises.
                result: int = wrapped.raw(text)
                return result
            is_live = self._is_live()
            if not is_live:
                self._erase()
                self._put(wrapped.out, text)
            text, size = wrapped.held + text, len(text)
            end = text.rfind("\n") + 1
            rest = text[end:]
            # Only the last state of a line that is written over.
            rest = rest[max(0, rest.rstrip("\r").rfind("\r")) :]
            if len(rest) > MAX_HELD_CHARACTERS:
                end, rest = len(text), ""
            wrapped.held = rest
            if not is_live:
                pass
            elif end:
                self.write(wrapped.out, text[:end])
                self._flush(wrapped.out)
            else:
                self.stale.set()
            return size

    def _raw(self, out: Any) -> Callable[[str], object]:
        write: Callable[[str], object] = next((one.raw for one in self._wrapped if one.out is out), None) or out.write
        return write

    def _put(self, out: Any, text: str) -> None:
        # The user's program may have closed, removed or broken its streams.
        with contextlib.suppress(Exception):
            write = self._raw(out)
            try:
                write(text)
            except UnicodeEncodeError:
                encoding = out.encoding or "ascii"
                write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _flush(self, out: Any) -> None:
        with contextlib.suppress(Exception):
            out.flush()

    # ------------------------------------------------------------------------------------------------ the live part

    def _draw(self) -> None:
        if self._shown is not None:
            return
        out = next((part.out for part in self._parts.values() if part.out is not None), None)
        streams = self._wrapped if self._is_live() else []
        if streams:
            out = streams[0].out
        if out is None:
            return
        width, height = size(out)
        held = [fit(line, width - 1) for wrapped in streams if (line := wrapped.held.strip("\r")).strip()]
        parts = [*self._parts.values()]
        rows = [row for part in parts if part.out is not None for row in part.rows]
        rows += held + [fit(row, width - 1) for part in parts if part.out is None for row in part.rows]
        rows = rows[-max(1, height - 1) :]
        if not rows:
            return
        self._put(out, "\r" + "\r\n".join(rows))
        self._flush(out)
        self._shown = _Shown(out, tuple(cells(row) for row in rows))
        self._drawn_at = time.monotonic()
        self.stale.clear()

    def _erase(self) -> None:
        if self._shown is None:
            return
        (out, widths), self._shown = self._shown, None
        if obeys_sequences(out):
            # Terminals break rows anew that have become too long for a narrower window.
            width = max(1, columns(out))
            up = sum(max(1, -(-cells // width)) for cells in widths) - 1
            # Row by row: what is erased at once, from the top of the screen on, tmux keeps above it.
            self._put(out, "\r\x1b[2K" + "\x1b[1A\x1b[2K" * up)
            if self._wrapped:
                self._flush(out)
        else:
            self._put(out, f"\r{' ' * widths[-1]}\r")

    def _leave_to_parent(self) -> None:
        """Forget the live part in a forked child: it is the parent's, whose other threads may have held the lock."""
        self._lock = threading.RLock()
        self.stale = threading.Event()
        wrapped, self._wrapped = self._wrapped, []
        for one in wrapped:
            one.held = ""
            one.unwrap()
        self._parts, self._owners, self._shown = {}, set(), None


screen = Screen()


def stream() -> Any:
    """Return the stream on which pools show something: standard error or else output; None if neither is a terminal."""
    return next((out for out in (sys.stderr, sys.stdout) if is_terminal(out)), None)


def is_terminal(out: Any) -> bool:
    """Return whether a stream leads to a terminal."""
    try:
        return bool(out.isatty())
    except Exception:
        return False


def can_erase(out: Any) -> bool:
    """Return whether `\\r` leads back to the beginning of the line on this stream: on a terminal and in a notebook."""
    return type(out).__module__.startswith("ipykernel.") or is_terminal(out)


def obeys_sequences(out: Any) -> bool:
    """Return whether a stream leads to a terminal that can move the cursor up."""
    try:
        return os.isatty(out.fileno()) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
    except Exception:
        return False


def size(out: Any) -> tuple[int, int]:
    """Return the numbers of columns and rows of the terminal behind a stream."""
    try:
        found = os.get_terminal_size(out.fileno())
    except Exception:
        found = os.terminal_size((0, 0))
    return found.columns or FALLBACK_COLUMNS, found.lines or FALLBACK_ROWS


def columns(out: Any) -> int:
    """Return the width of the terminal behind a stream: a longer row could not be erased."""
    return size(out)[0]


def cells(text: str) -> int:
    """Return how many columns a text takes."""
    plain = _SEQUENCE.sub("", text)
    if plain.isascii():
        return len(plain)
    return sum(map(_cells, plain))


def _cells(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def fit(text: str, width: int) -> str:
    """Return the beginning of a text that fits so many columns. Of control sequences only colours stay."""
    shown: list[str] = []
    coloured, taken, at = False, 0, 0
    for found in [*_SEQUENCE.finditer(text), None]:
        for character in text[at : found.start() if found else len(text)]:
            taken += _cells(character)
            if taken > width:
                return "".join(shown) + ("\x1b[0m" if coloured else "")
            shown.append(character)
        if found is not None:
            at = found.end()
            if found[0].endswith("m") and found[0].startswith("\x1b["):
                shown.append(found[0])
                coloured = True
    return "".join(shown) + ("\x1b[0m" if coloured and shown[-1] != "\x1b[0m" else "")
