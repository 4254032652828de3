"""Answers to what workers ask about the user's modules, on a thread of its own.

Not the thread of messages (inbox.py), whose listeners may wait for tasks.
"""

from __future__ import annotations

import threading
from typing import Final

from .. import _core
from ..pickling.generations import Source

TAKE_MS: Final = 1_000
"""Bound on one wait for requests; closing the pool wakes the waiting thread at once."""


def start_answering(core: _core.Core, sources: Source) -> threading.Thread:
    """Start the thread that answers the requests of a pool's workers, and return it. It ends with the pool."""
    thread = threading.Thread(target=_answer_all, args=(core, sources), name="skyward-modules", daemon=True)
    thread.start()
    return thread


def _answer_all(core: _core.Core, sources: Source) -> None:
    while (requests := core.requests(TAKE_MS)) is not None:
        for sender, number, request in requests:
            try:
                core.answer_request(sender, number, sources.answer(request))
            except Exception as error:
                # The worker gets the error, and other workers their answers.
                core.answer_note(sender, number, f"{type(error).__name__}: {error}".encode(errors="replace"))
