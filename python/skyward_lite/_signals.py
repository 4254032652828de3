"""Ctrl-C at a bad moment waits for a better one, and SIGTERM ends this process by way of its pools."""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals whose handlers may raise an exception on the main thread."""
ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a process at once, without any cleanup, unless the program has a handler for them."""


@contextlib.contextmanager
def held(*, insist: bool = False) -> Iterator[Sequence[int]]:
    """Hold SIGINT, SIGTERM and SIGHUP back until the block is left, because their handlers could raise inside it.

    Yield the numbers of the signals that have come so far: the sequence grows while the block runs. The handler of the
    first signal runs when the block is left. With `insist` the second signal is not held back, because the block may
    take long. On a thread other than the main one nothing is held back: Python runs no handlers there.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def hold(number: int, frame: types.FrameType | None) -> None:
        came.append(number)
        if insist and len(came) > 1:
            came.clear()
            handlers[number](number, frame)

    handlers: dict[int, Callable[[int, types.FrameType | None], object]] = {
        number: handler for number in HELD if callable(handler := signal.getsignal(number))
    }
    try:
        for number in handlers:
            signal.signal(number, hold)
        yield came
    finally:
        # SIGINT last: as soon as its handler is back, the handler may raise here.
        for number in reversed(handlers):
            signal.signal(number, handlers[number])
        for number in came[:1]:
            handlers[number](number, None)


def install_signal_handlers(installed: list[int]) -> None:
    """Install handlers that raise `SystemExit` for signals that would end this process without leaving its pools.

    Append to `installed` the numbers of the signals that get a handler, each before it gets the handler, which may
    raise at once. A signal that the program handles or ignores itself keeps its handler, and on a thread other than the
    main one, where Python can set no handlers, none is installed.
    """
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            if signal.getsignal(number) is signal.SIG_DFL:
                installed.append(number)
                signal.signal(number, _raise_system_exit)


def remove_signal_handlers(installed: list[int]) -> None:
    """Set the default action again for signals that `install_signal_handlers` listed, and empty the list.

    On a thread other than the main one the handlers and the list stay as they are.
    """
    if threading.current_thread() is threading.main_thread():
        while installed:
            signal.signal(installed.pop(), signal.SIG_DFL)


def _raise_system_exit(number: int, frame: types.FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
