"""Text and servers that attack their readers: in errors, logs and terminals nothing of them may have an effect."""

from __future__ import annotations

import contextlib
import socket
import threading
import unicodedata
from collections.abc import Callable, Iterator

FORGED = "2026-01-01 00:00:00 CRITICAL root: pwned"
HOSTILE = f"\x1b]0;title\x07\x1b[2J50 %\r\n{FORGED}\n\u202etxt\u2066\u2028\u200b\x9b31m\U000e0041\x85\x00"
"""Escape sequences, a line for the log, and characters that hide or turn round what is read."""


def is_harmless(text: str) -> bool:
    """Return whether a text does nothing on a terminal, and no line of it can be taken for another's."""
    bad = [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs")]
    return not bad and not any(line.startswith(("2026", "50")) for line in text.split("\n"))


@contextlib.contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[socket.socket]:
    """Start a server that answers one connection with `answer`; the other end may hang up meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            one, _ = server.accept()
            with one, contextlib.suppress(OSError):
                answer(one)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server
        thread.join(20)
