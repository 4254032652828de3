"""Messages home: what a task tells the process that opened the pool while the task still runs.

At the client a library says who takes messages for an address; in a task it sends them there:

    messages.listen("progress", bar.update)                      # at the client
    messages.send("progress", 10)                                # in a task, on any machine and from any thread

`send` returns when the listener has taken the message, and raises if it did not. Messages travel over the pool's own
connection. All messages of a pool are taken by one thread of the pool, in the order in which they arrive, so a listener
must return soon: while it runs, other senders of the same pool wait. What it does meanwhile holds up no results.

A task that runs again, because its node or process was lost, sends its messages again. Those that were taken before are
not given to the listener a second time: the n-th message of a task counts once. This holds for what the thread that
runs the task sends; messages of other threads that the task starts may come twice.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from . import _core
from .errors import MessageError, PayloadTooLargeError
from .pickling import payload
from .pickling.route import Route

if TYPE_CHECKING:
    from .client.pool import ComputePool

Listener = Callable[[Any], object]

LIMIT: Final = _core.MAX_NOTE
"""Largest pickled message, in bytes. The client holds one of each sender at once, beyond the credit for results."""
LEAST_WAIT_MS: Final = 600_000
"""How long `send` waits for its answer at least; longer if the pool's `lease` is longer.

The client may be busy for minutes with something that holds its GIL, and no message should be lost of that.
"""
WAIT_MS: Final = 1_000
"""Bound on one wait for messages; closing the pool wakes the waiting thread at once."""
MAX_ERROR: Final = 16 * 1024
"""Bytes that are kept of the text that says why a message was not taken."""
MANY: Final = 1_000
"""Tasks of which it is remembered how many messages were taken, before those that have ended are forgotten."""

_listeners: dict[str, Listener] = {}


class _Worker:
    """The worker process that this process is."""

    core: _core.WorkerRuntime | None = None
    process = 0


class _Sent(threading.local):
    """How many messages the task sent that this thread runs."""

    task = 0
    count = 0


_sent = _Sent()


def listen(address: str, listener: Listener) -> None:
    """Call `listener` with each message that is sent to `address`, by tasks of any pool of this process.

    It is called on a thread of the pool from which the message came, so with several pools perhaps on several threads
    at once. Raises `ValueError` if the address has a listener already.
    """
    if _listeners.setdefault(address, listener) != listener:
        raise ValueError(f"{address!r} has a listener already: unlisten({address!r}) first, or choose another address")


def unlisten(address: str) -> None:
    """Take no more messages for an address: their senders get a `MessageError`."""
    _listeners.pop(address, None)


def send(address: str, message: object) -> None:
    """Send a message, at most 16 MiB as a pickle, to the listener for this address, and wait until it was taken.

    In a process that has such a listener itself this calls it. In a worker process the message goes to the client.
    Raises `MessageError` if there is no listener, if it raised, or if no answer came within ten minutes, or within
    `pool(lease=)` if that is longer (the message may have been taken then); `PayloadTooLargeError`; and what pickling
    the message raises.
    """
    listener = _listeners.get(address)
    if listener is not None:
        listener(message)
    else:
        send_home(address, message)


def send_home(address: str, message: object) -> None:
    """As `send`, but always to the client of the pool whose worker this process is."""
    worker = _Worker.core
    if worker is None or _Worker.process != os.getpid():
        where = "a process that is no worker of a pool" if worker is None else "a process that a task started"
        raise MessageError(f"no message can be sent to {address!r} from {where}: send it from the task itself")
    task = worker.current()
    if task != _sent.task:
        _sent.task, _sent.count = task, 0
    _sent.count += 1
    settings = worker.settings
    pickled, buffers = payload.encoder(settings.max_payload, Route(settings.shares_files, to_client=True)).dumps(
        (address, task, _sent.count, message)
    )
    size = payload.size(pickled, buffers)
    if size > LIMIT:
        raise PayloadTooLargeError(
            f"a message of {size:,} bytes for {address!r} is over the limit of {LIMIT:,}: send it in parts, or return "
            "it as a part of the task's result"
        )
    wait_ms = max(LEAST_WAIT_MS, worker.lease_ms)
    error = worker.note(pickled, buffers, wait_ms)
    if error is None:
        raise MessageError(
            f"node {worker.node}: the client did not answer a message for {address!r} within {wait_ms / 1000:.0f} s: a "
            "listener of its process does not return, or the connection is slow. The message may have been taken"
        )
    if error:
        raise MessageError(
            f"node {worker.node}: the client did not take a message for {address!r}: {error.decode(errors='replace')}"
        )


def be_worker(core: _core.WorkerRuntime) -> None:
    """Enable this process's tasks to send messages home."""
    _Worker.core, _Worker.process = core, os.getpid()


def in_worker() -> bool:
    """Return whether this process is a worker of a pool."""
    return _Worker.process == os.getpid()


def start_taking(pool: ComputePool) -> None:
    """Start the thread that gives the messages of a pool's tasks to their listeners. It ends with the pool."""
    threading.Thread(target=_take_all, args=(pool,), name="skyward-messages", daemon=True).start()


def _take_all(pool: ComputePool) -> None:
    core = pool._core
    taken: dict[int, int] = {}
    many = MANY
    pickled: Any
    buffers: Any
    while (notes := core.notes(WAIT_MS)) is not None:
        for node, (note, _, _, _, pickled, buffers) in notes:
            core.answer_note(node, note, _take(pickled, buffers, taken).encode(errors="replace")[:MAX_ERROR])
        # While this thread waits for the next message it must not keep the last one's memory.
        del notes
        pickled = buffers = None
        if len(taken) > many:
            for task in [task for task in taken if not pool._is_pending(task)]:
                del taken[task]
            many = max(MANY, 2 * len(taken))


def _take(pickled: Any, buffers: Any, taken: dict[int, int]) -> str:
    """Call the listener of one message; return why that failed, or nothing.

    `taken` has for each task how many of its messages were taken.
    """
    try:
        address, task, count, message = payload.loads(pickled, buffers)
    except BaseException as error:
        return f"it cannot be rebuilt there: {_text(error)}"
    if task and count <= taken.get(task, 0):
        # An earlier attempt at the task has sent this.
        return ""
    listener = _listeners.get(address)
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
