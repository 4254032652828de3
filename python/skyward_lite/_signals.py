"""Ctrl-C at a bad moment waits for a better one."""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Callable, Iterator

HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def held(on_signal: Callable[[], object] | None = None, *, insist: bool = False) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP wait until the block is left, if their handlers could raise in the middle of it.

    `on_signal` is called when one comes. With `insist` the second one is not held: the block may take long.
    Does nothing on other threads, where Python runs no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def hold(number: int, frame: types.FrameType | None) -> None:
        came.append(number)
        if on_signal is not None:
            on_signal()
        if insist and len(came) > 1:
            came.clear()
            handlers[number](number, frame)

    handlers: dict[int, Callable[[int, types.FrameType | None], object]] = {
        number: handler for number in HELD if callable(handler := signal.getsignal(number))
    }
    try:
        for number in handlers:
            signal.signal(number, hold)
        yield
    finally:
        # SIGINT last: once its handler is back it may raise here.
        for number in reversed(handlers):
            signal.signal(number, handlers[number])
        for number in came[:1]:
            handlers[number](number, None)
