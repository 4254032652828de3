"""Messages that tasks send to this process: taken from the Rust core and handed to their listeners.

The public functions, and what a sender may rely on, are in `messages.py`; the sending half runs on nodes.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Any, Final

from .. import _core, messages
from ..pickling import payload

TAKE_MS: Final = 1_000
"""Bound on one wait for messages; closing the pool wakes the waiting thread at once."""
MAX_ERROR: Final = 16 * 1024
"""Bytes that are sent of the text that says why a message was not taken."""
MIN_COUNTED_TASKS: Final = 1_000
"""Tasks whose messages are counted before the counts of those that have ended are dropped for the first time."""


def start_taking(core: _core.Core, is_pending: Callable[[int], bool]) -> threading.Thread:
    """Start and return the thread that hands the messages of a pool's tasks to their listeners. It ends with the pool.

    `is_pending(task)` returns whether the task of this number has not ended.
    """
    thread = threading.Thread(target=_take_all, args=(core, is_pending), name="skyward-messages", daemon=True)
    thread.start()
    return thread


def _take_all(core: _core.Core, is_pending: Callable[[int], bool]) -> None:
    taken: dict[int, int] = {}
    limit = MIN_COUNTED_TASKS
    pickled: Any
    buffers: Any
    while (notes := core.notes(TAKE_MS)) is not None:
        for node, (note, _, _, _, pickled, buffers) in notes:
            core.answer_note(node, note, _take(pickled, buffers, taken).encode(errors="replace")[:MAX_ERROR])
        # While this thread waits for the next message it must not keep the last one's memory.
        del notes
        pickled = buffers = None
        if len(taken) > limit:
            for task in [task for task in taken if not is_pending(task)]:
                del taken[task]
            limit = max(MIN_COUNTED_TASKS, 2 * len(taken))


def _take(pickled: Any, buffers: Any, taken: dict[int, int]) -> str:
    """Call the listener of one message. Return why that failed, or "".

    `taken` has for each task how many of its messages were taken.
    """
    try:
        address, task, count, message = payload.loads(pickled, buffers)
    except BaseException as error:
        return f"it cannot be rebuilt there: {_text(error)}"
    if task and count <= taken.get(task, 0):
        # An earlier attempt at the task has sent this message already.
        return ""
    listener = messages.listener(address)
    if listener is None:
        return "it has no listener for that address (any more)"
    try:
        listener(message)
    except BaseException as error:
        return f"its listener raised {_text(error)}"
    if task:
        taken[task] = count
    return ""


def _text(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))[-MAX_ERROR // 4 :]
    except BaseException:
        return type(error).__name__
