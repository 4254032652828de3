"""A worker process: how it starts and how it ends. What it does between the two is `task_loop.py`'s.

The agent starts it with a socket as its standard input. User code runs only in worker processes.

When its pool is left in order, a worker ends as any Python process does: the interpreter waits for threads that are no
daemons, runs finalizers and what was registered with `atexit`, and closes what is open. The agent kills a worker that
is not done after 2 s (`worker_exit` in timing.rs), so that no step here needs a bound.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import os
import pickle
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Final

from .. import _core, messages, nesting
from ..hooks import WorkerInfo
from ..pickling import script
from . import first_imports, take_socket, task_warnings, whole_lines
from .context import Context
from .home import Home
from .task_loop import NOTES, take_tasks

END_POLL_SECONDS: Final = 1.0
"""Bound on one wait of the main thread for the end, and so on the delay of a signal's handler: Python runs handlers on
the main thread, and a signal that comes just before a wait begins is handled after it."""
TRACKERS: Final = ("multiprocessing", "loky.backend", "joblib.externals.loky.backend")
"""Packages that have a `resource_tracker`, which cleans up when this process has been killed."""


def main() -> None:
    """Connect to the agent and serve until it ends this process, or asks for its end."""
    worker = _core.WorkerRuntime(prepare_process())
    messages.be_worker(Home(worker).send)
    settings = worker.settings
    if settings.sys_path:
        sys.path[:] = settings.sys_path
    # Not at the module's head: a worker needs one of the two or none.
    if settings.shares_files:
        from . import own_files

        own_files.install(worker)
    elif settings.serves_modules:
        from . import importer

        importer.install(worker)
        NOTES.append(importer.explain)
    sys.argv[:] = nesting.take_arguments()
    for module in settings.preload:
        # A task that needs a module which is missing here reports that itself.
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    prepare_exit()
    hooks = pickle.loads(base64.b64decode(settings.setup)) if settings.setup else []
    decorators = [decorate for _, decorate in hooks if decorate is not None]
    info = WorkerInfo(node=worker.node, pid=os.getpid(), slots=worker.slots)
    with contextlib.ExitStack() as stack:
        for around, _ in hooks:
            if around is not None:
                stack.enter_context(around(info))
        context = Context(settings.context)
        context.set_locale()
        loops = [functools.partial(take_tasks, worker, slot, decorators, context) for slot in range(worker.slots)]
        if worker.slots > 1:
            task_warnings.install()
            first_imports.install()
            run_slots(worker, loops)
        else:
            if context.watches_imports:
                first_imports.install()
            worker.ready()
            loops[0]()


def prepare_process() -> int:
    """Set up what tasks print to, which signals do nothing, and `__main__`. Return the socket to the agent."""
    fd = take_socket()
    # The lines that a task printed must not stay in a buffer, because this process may be killed. They reach the client
    # as UTF-8 whatever this node's locale is; programs that a task starts have the node's locale.
    whole_lines.install()
    with contextlib.suppress(Exception):
        # Nor may lines that C libraries print stay in C's buffer.
        libc = ctypes.CDLL(None)
        libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, 1, 0)
    # Trackers warn of each leak that they clean up. Here a killed process is a usual end, and its leaks are no mistake.
    filters = [f"ignore::UserWarning:{package}.resource_tracker" for package in TRACKERS]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), *filters)))
    # The client handles Ctrl-C. With a handler that does nothing, programs that tasks start have the usual one; if this
    # process ignored the signal, they would ignore it, too.
    signal.signal(signal.SIGINT, _do_nothing)
    free_sigterm()
    # The last lines of standard error are part of the error that reports how this process died.
    faulthandler.enable(all_threads=False)
    script.install()
    return fd


def _do_nothing(number: int, frame: types.FrameType | None) -> None:
    """Handle a signal."""


def free_sigterm() -> None:
    """Let tasks go on at SIGTERM where the agent announces it, as schedulers send it to all processes of a job.

    The agent's block is inherited. Programs that tasks start get their usual handler by that start, and forked children
    by a hook: both can be terminated.
    """
    if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        # Before it is freed: it may have come already.
        signal.signal(signal.SIGTERM, _do_nothing)
        hold = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGTERM})
        free = functools.partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, {signal.SIGTERM})
        # A child may be sent the signal at once.
        os.register_at_fork(before=hold, after_in_parent=free, after_in_child=_end_at_sigterm)
        free()


def _end_at_sigterm() -> None:
    """Give a forked child the usual end at SIGTERM, which was held back since before the fork."""
    if signal.getsignal(signal.SIGTERM) is _do_nothing:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def prepare_exit() -> None:
    """Prepare the end of this process. Called before the first task, after the imports that come before it."""
    # The modules that are imported by now are never garbage. Each of the interpreter's last collections would look
    # through them all the same, which takes 90 ms with scikit-learn.
    gc.freeze()


def run_slots(worker: _core.WorkerRuntime, loops: Sequence[Callable[[], None]]) -> None:
    """Run each slot's loop on a thread of its own, and wait on the main thread until the process is to end.

    With several slots the main thread runs no task, so that all slots are alike: signal handlers run there only, and
    can be set there only.
    """
    over = threading.Event()

    def run(loop: Callable[[], None]) -> None:
        try:
            loop()
        finally:
            over.set()

    try:
        for slot, loop in enumerate(loops):
            # Not as daemons: threads that a task starts inherit this, and at the client they would be no daemons.
            threading.Thread(target=run, args=(loop,), name=f"skyward-{slot}", daemon=False).start()
    except RuntimeError:
        # There are too many threads on this node. A usual end would wait for those slots that did get a thread.
        traceback.print_exc()
        os._exit(1)
    worker.ready()
    while True:
        try:
            while not worker.over:
                over.wait(END_POLL_SECONDS)
            return
        except BaseException:
            # A signal handler raised it. No task runs on this thread, so the exception belongs to none.
            continue


if __name__ == "__main__":
    main()
