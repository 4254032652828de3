"""The main thread of a worker with several slots. It runs no task, so that all slots are alike; it waits for the end.

Python runs signal handlers there, and there alone lets handlers be set.
"""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from collections.abc import Callable, Sequence

from .. import _core

LOOK_SECONDS = 1.0
"""Bound on one wait for the end, and so on the delay of a handler whose signal comes just before a wait begins."""
NOTE = (
    "this task ran on a thread, as those of Worker(concurrency=2 or more) do: "
    'with Worker(executor="process") each task has the main thread of its process'
)


def run_slots(worker: _core.WorkerRuntime, loops: Sequence[Callable[[], None]]) -> None:
    """Run each slot's loop on a thread, and wait until the process is to end."""
    over = threading.Event()

    def run(loop: Callable[[], None]) -> None:
        try:
            loop()
        finally:
            over.set()

    try:
        for slot, loop in enumerate(loops):
            # No daemons: threads that tasks start would be daemons too, which they are not at home.
            threading.Thread(target=run, args=(loop,), name=f"skyward-{slot}", daemon=False).start()
    except RuntimeError:
        # There are too many threads on this node. The interpreter would wait for the slots' threads.
        traceback.print_exc()
        os._exit(1)
    worker.ready()
    while True:
        try:
            while not worker.over:
                over.wait(LOOK_SECONDS)
            return
        except BaseException:
            # A signal handler raised it. No task runs on this thread that the exception could belong to.
            continue


def explain(error: BaseException) -> None:
    """Add a note to an exception that says that something works on the main thread only, if the task was elsewhere."""
    if not isinstance(error, ValueError | RuntimeError) or threading.current_thread() is threading.main_thread():
        return
    with contextlib.suppress(Exception):
        text = str(error)
        if "main thread" in text or text.startswith("There is no current event loop in thread"):
            error.add_note(NOTE)
