"""How a worker process ends when its pool is left in order: as an interpreter does.

The interpreter waits for threads that are no daemons, runs what was registered with `atexit` and finalizers, and closes
what is open. The agent kills a worker that is not done after 2 s (`UNWIND` in worker.rs): no step here needs a bound.
"""

from __future__ import annotations

import atexit
import gc
import os

from .. import _core


def prepare() -> None:
    """Prepare the end, before the first task and after the imports that come before it.

    What tasks start in process groups of its own is killed at exit, after all that tasks have registered with `atexit`:
    once this process has ended, nothing leads from the agent to such a process.
    """
    # The modules that are imported by now are never garbage. Each of the interpreter's last collections would look
    # through them all the same, which takes 90 ms with scikit-learn.
    gc.freeze()
    worker = os.getpid()

    def end_escaped() -> None:
        # A child that a task forked has the same list of callbacks.
        if os.getpid() == worker:
            _core.WorkerRuntime.end_escaped()

    # The first to be registered is the last to be called.
    atexit.register(end_escaped)
