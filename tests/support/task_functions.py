"""Functions for tests to submit: workers import this file by its name, so it imports next to nothing."""

from __future__ import annotations

import ctypes
import os
import threading


def wait_for(path: str) -> str:
    """Wait until the file exists, and return its path."""
    while not os.path.exists(path):
        threading.Event().wait(0.005)
    return path


def hold_the_gil(seconds: int) -> str:
    """Hold the GIL for `seconds`, and return "held"."""
    # Unlike CDLL, PyDLL does not release the GIL around its calls.
    ctypes.PyDLL(None).sleep(seconds)
    return "held"


def fail(message: str) -> None:
    """Raise ValueError with this text."""
    raise ValueError(message)
