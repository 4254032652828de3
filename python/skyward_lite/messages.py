"""Messages home: what a task tells the process that opened the pool while the task still runs.

At the client a library says who takes messages for an address; in a task it sends them there:

    messages.listen("progress", bar.update)                      # at the client
    messages.send("progress", 10)                                # in a task, on any machine and from any thread

`send` returns when the listener has taken the message, and raises if it did not. Messages travel over the pool's own
connection. All messages of a pool are taken by one thread of the pool, in the order in which they arrive, so a listener
must return soon: while it runs, other senders of the same pool wait. No result waits for a listener.

A task that runs again, because its node or process was lost, sends its messages again. Messages that were taken before
are not handed to the listener a second time: the n-th message of a task counts once. This holds for messages that the
thread sends which runs the task; messages of other threads that the task starts may come twice.

This is the public face, for both ends. The client takes messages in `client/inbox.py`, a worker sends them in
`node/home.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

from . import _core, checks
from .errors import MessageError

Listener = Callable[[Any], object]

LIMIT: Final = _core.MAX_NOTE
"""Largest pickled message, in bytes. The client holds one of each sender at once, beyond the credit for results."""

_listeners: dict[str, Listener] = {}
"""Address → what takes its messages, in this process."""


class _Worker:
    """The worker process that this process is, if it is one. Set once, by `be_worker`."""

    send_home: Callable[[str, object], None] | None = None
    process = 0


def listen(address: str, listener: Listener) -> None:
    """Call `listener` with each message that is sent to `address`, by tasks of any pool of this process.

    It is called on a thread of the pool from which the message came, so with several pools perhaps on several threads
    at once.

    Parameters
    ----------
    address : str
        The name that senders use.
    listener : function of one argument
        What takes the messages. It must return soon.

    Raises
    ------
    ValueError
        If the address has a listener already.

    Examples
    --------
    >>> steps = []
    >>> sky.messages.listen("steps", steps.append)
    >>> with sky.pool() as pool:
    ...     pool.submit(sky.messages.send, "steps", 1).result()
    >>> sky.messages.unlisten("steps")
    >>> steps
    [1]
    """
    checks.text("listen", "address", address, '"progress"')
    checks.function("listen", "listener", listener, 'listen("progress", print)')
    if _listeners.setdefault(address, listener) != listener:
        raise ValueError(f"{address!r} has a listener already: unlisten({address!r}) first, or choose another address")


def unlisten(address: str) -> None:
    """Take no more messages for an address: their senders get a `MessageError`.

    Parameters
    ----------
    address : str
        The name that `listen` was called with. One without a listener is no error.
    """
    _listeners.pop(address, None)


def listener(address: str) -> Listener | None:
    """Return the listener of this process for an address; None if there is none."""
    return _listeners.get(address)


def send(address: str, message: object) -> None:
    """Send a message to the listener for this address, and wait until it was taken.

    In a process that has such a listener itself this calls it. In a worker process the message goes to the client.

    Parameters
    ----------
    address : str
        The name that the listener was registered with.
    message : object
        Anything that can be pickled, at most 16 MiB as a pickle.

    Raises
    ------
    MessageError
        If there is no listener, if it raised, or if no answer came within ten minutes, or within `pool(lease=)` if that
        is longer; the message may have been taken then.
    PayloadTooLargeError
        If the message is too large; and what pickling it raises.
    """
    checks.text("send", "address", address, '"progress"')
    own = _listeners.get(address)
    if own is not None:
        own(message)
    else:
        send_home(address, message)


def send_home(address: str, message: object) -> None:
    """Send a message as `send` does, but always to the client of the pool whose worker this process is."""
    if _Worker.send_home is None or not in_worker():
        where = "that is no worker of a pool" if _Worker.send_home is None else "that a task started"
        raise MessageError(
            f"no message can be sent to {address!r} from a process {where}: send it from the task itself"
        )
    _Worker.send_home(address, message)


def be_worker(send_home: Callable[[str, object], None]) -> None:
    """Note that this process is a worker, which sends its tasks' messages to the client by `send_home`."""
    _Worker.send_home, _Worker.process = send_home, os.getpid()


def in_worker() -> bool:
    """Return whether this process is a worker of a pool."""
    return _Worker.process == os.getpid()
