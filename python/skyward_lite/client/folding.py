"""Tracebacks that a program's end and IPython show: without the frames between the program's line and the task's error.

An error of a task comes through this package, `concurrent.futures` and joblib, whose frames tell nothing about it. They
are left out where an error is shown, and nowhere else: by Python's `sys.excepthook`, by IPython, and by pytest, which
knows our frames by `__tracebackhide__`. `SKYWARD_TRACEBACK=full` keeps them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
import types
from typing import Any, Final

from ..errors import RemoteTraceback, SkywardError
from ..pickling.tracebacks import without_ours

VARIABLE: Final = "SKYWARD_TRACEBACK"
"""The environment variable that keeps all frames if it is "full"."""
MAX_CHAIN: Final = 100
"""Errors of a chain of causes that are looked at."""

_PICKLING: Final = ("encode", "encode_batch")
_TASKS: Final = os.path.join(os.path.dirname(__file__), "tasks.py")
"""The module in which calls are pickled, by the functions above."""
_FOLDS: Final = "_skyward_lite_folds"
"""The attribute that marks IPython's formatter once it leaves frames out."""


def install() -> None:
    """Have the tracebacks of tasks' errors shown without our frames, from now on in this process. Idempotent."""
    if os.environ.get(VARIABLE) == "full":
        return
    before = sys.excepthook
    if not getattr(before, _FOLDS, False):

        def excepthook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
            fold(error)
            before(kind, error, error.__traceback__)

        setattr(excepthook, _FOLDS, True)
        sys.excepthook = excepthook
    threads_before = threading.excepthook
    if not getattr(threads_before, _FOLDS, False):

        def threads_excepthook(args: threading.ExceptHookArgs) -> None:
            if args.exc_value is not None:
                fold(args.exc_value)
            threads_before(args)

        setattr(threads_excepthook, _FOLDS, True)
        threading.excepthook = threads_excepthook
    ipython = sys.modules.get("IPython")
    if ipython is not None:
        # Another version of IPython may have no such formatter: then it shows all frames.
        with contextlib.suppress(AttributeError):
            _install_in(ipython.get_ipython().InteractiveTB)


def _install_in(formatter: Any) -> None:
    """Have IPython's formatter of tracebacks leave out our frames."""
    before = formatter.structured_traceback
    if getattr(before, _FOLDS, False):
        return

    def structured_traceback(kind: Any = None, error: Any = None, trace: Any = None, *args: Any, **options: Any) -> Any:
        if isinstance(error, BaseException) and trace is not None:
            fold(error)
            trace = error.__traceback__
        return before(kind, error, trace, *args, **options)

    setattr(structured_traceback, _FOLDS, True)
    formatter.structured_traceback = structured_traceback


def fold(error: BaseException) -> None:
    """Leave our frames out of the tracebacks of an error that is about to be shown, and of its causes."""
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo and len(seen) < MAX_CHAIN:
        each = todo.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        todo += [each.__cause__, each.__context__]
        if isinstance(each, SkywardError) or isinstance(each.__cause__, RemoteTraceback):
            BaseException.with_traceback(each, without_ours(each.__traceback__))
        elif _is_unsendable(each):
            BaseException.with_traceback(each, without_ours(each.__traceback__))
            if each.__cause__ is not None:
                # What is left are the frames of the user's own `__reduce__`, if there are any.
                BaseException.with_traceback(each.__cause__, without_ours(each.__cause__.__traceback__, whole=True))


def _is_unsendable(error: BaseException) -> bool:
    """Return whether an error was raised for a call that could not be pickled, or by joblib for such a batch."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(frame.f_code.co_name in _PICKLING and frame.f_code.co_filename == _TASKS for frame in frames):
        return True
    try:
        job = frames[-1].f_locals["self"]
        return type(getattr(job.parallel, "_backend", None)).__module__.startswith("skyward_lite.")
    except (AttributeError, IndexError, KeyError):
        return False
