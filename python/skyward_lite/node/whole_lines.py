"""A worker's standard output and standard error, on which lines of several threads stay whole.

`print("a", 1)` writes four times: "a", " ", "1" and the end of the line. Between them other threads write, too. So what
a thread has written of a line is held until the thread writes the line's end, or flushes the stream: without either,
`io.TextIOWrapper` would hold it as well.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from typing import Any, Final

MAX_HELD: Final = 64 * 1024
"""Characters that are held of a line. A longer beginning is written."""


class WholeLines(io.TextIOWrapper):
    """A text stream, in UTF-8, that writes each line of a thread as a whole. Usable from any thread."""

    def __init__(self, buffer: Any) -> None:
        super().__init__(buffer, encoding="utf-8", errors="backslashreplace", line_buffering=True)
        self._begun: dict[int, str] = {}
        """The beginning of each thread's line, by the thread's identifier. An entry is its thread's own."""
        os.register_at_fork(after_in_child=self._forget_others)

    def write(self, text: str) -> int:
        """Write the lines that end in a text, and hold its rest."""
        if not isinstance(text, str):
            return super().write(text)  # which raises TypeError
        thread = threading.get_ident()
        begun = self._begun.pop(thread, "") + text
        # A line that is written over, as by progress bars, is shown as it is: `io.TextIOWrapper` flushes it, too.
        end = len(begun) if "\r" in text or len(begun) >= MAX_HELD else begun.rfind("\n") + 1
        if end < len(begun):
            self._begun[thread] = begun[end:]
        if end:
            super().write(begun[:end])
        return len(text)

    def flush(self) -> None:
        """Write what the calling thread and threads that have ended have begun, and flush the stream."""
        thread = threading.get_ident()
        others = [each for each in (*self._begun,) if each != thread]
        if others:
            living = {each.ident for each in threading.enumerate()}
            others = [each for each in others if each not in living]
        for each in (thread, *others):
            begun = self._begun.pop(each, "")
            if begun:
                super().write(begun)
        super().flush()

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return getattr, (sys, self.name.strip("<>"))

    def _forget_others(self) -> None:
        """Keep the calling thread's line only, in a forked child: the others' are the parent's."""
        thread = threading.get_ident()
        self._begun = {each: begun for each, begun in self._begun.items() if each == thread}


def install() -> None:
    """Let lines on this process's streams stay whole from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.flush()
            whole = WholeLines(stream.detach())
            setattr(sys, name, whole)
            setattr(sys, f"__{name}__", whole)
