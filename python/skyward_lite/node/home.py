"""Messages of this worker's tasks, on their way home to the client: the sending half of `messages.py`."""

from __future__ import annotations

import threading
from typing import Final

from .. import _core, messages
from ..errors import MessageError, PayloadTooLargeError
from ..pickling import payload
from ..pickling.route import Route

MIN_WAIT_MS: Final = 600_000
"""How long a sender waits for its answer at least; longer if the pool's `lease` is longer.

The client may be busy for minutes with something that holds its GIL, and no message should be lost because of that.
"""


class _Sent(threading.local):
    """How many messages the task has sent that this thread runs."""

    task = 0
    count = 0


class Home:
    """The client of this worker process, as its tasks' messages reach it."""

    def __init__(self, core: _core.WorkerRuntime) -> None:
        self._core = core
        self._route = Route(core.settings.shares_files, to_client=True)
        self._sent = _Sent()

    def send(self, address: str, message: object) -> None:
        """Send a message to the client, and wait for its answer. Raise as `messages.send` does."""
        core, sent = self._core, self._sent
        task = core.current()
        if task != sent.task:
            sent.task, sent.count = task, 0
        sent.count += 1
        encoder = payload.encoder(core.settings.max_payload, self._route)
        pickled, buffers = encoder.dumps((address, task, sent.count, message))
        size = payload.size(pickled, buffers)
        if size > messages.LIMIT:
            raise PayloadTooLargeError(
                f"a message of {size:,} bytes for {address!r} is over the limit of {messages.LIMIT:,}: send it in "
                "parts, or return it as a part of the task's result"
            )
        wait_ms = max(MIN_WAIT_MS, core.lease_ms)
        error = core.note(pickled, buffers, wait_ms)
        if error is None:
            raise MessageError(
                f"node {core.node}: the client did not answer a message for {address!r} within {wait_ms / 1000:.0f} s: "
                "a listener of its process does not return, or the connection is slow. The message may have been taken"
            )
        if error:
            raise MessageError(
                f"node {core.node}: the client did not take a message for {address!r}: {error.decode(errors='replace')}"
            )
