"""How a task ended: its value, or the exception that says what became of it and which call it was."""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import Any, Final, NamedTuple

from .. import _core
from ..errors import NodeLostError, RemoteError, TaskTimeoutError, WorkerCrashedError
from ..pickling import exceptions, payload
from .function_names import FunctionNames

MAX_REASON: Final = 16_000
"""Bytes of a node's report of how a task ended, which may tell of several nodes."""
MAX_NAME: Final = 200
"""Characters of a function's name in a note."""

_ERRORS: Final = {
    _core.CRASHED: WorkerCrashedError,
    _core.NODE_LOST: NodeLostError,
    _core.TIMED_OUT: TaskTimeoutError,
}

_ADVICE: Final = {
    "by the kernel's out-of-memory killer": "Lower Worker(concurrency=), or send less data per task",
    "killed by signal 9 ": "If it was the out-of-memory killer: lower Worker(concurrency=), or send less data per task",
    "exited with status": "The task, or a library that it uses, ended the process, as os._exit does",
    "killed by signal 11 ": "An extension module that the task uses is broken, or is used by several threads at once: "
    'try Worker(executor="process")',
}
"""A part of a node's report on a worker that died → what to do."""


class Submitted(NamedTuple):
    """What was submitted as one task: how many calls of which function, and their place."""

    names: FunctionNames
    name: int
    """The number of the function's name."""
    first: int | None
    """The place of the first call among the calls that were submitted together; None for a call alone."""
    calls: int

    def __str__(self) -> str:
        """Return the calls as a note names them: "task 3: a call of fit"."""
        function = self.names.names[self.name][:MAX_NAME] or "a function without a name"
        what = f"a call of {function}" if self.calls == 1 else f"one of {self.calls} calls of {function}"
        if self.first is None:
            return what
        last = self.first + self.calls - 1
        return f"task {last}: {what}" if self.calls == 1 else f"tasks {self.first} to {last}: {what}"


About = tuple[FunctionNames, int, int | None, int]
"""The fields of a `Submitted`, which is made of them when it is needed: a plain tuple takes a tenth of the time."""


def outcome(code: int, pickled: Any, buffers: Any, about: About) -> Any:
    """Return a task's value, or raise what it raised or what became of it."""
    if code == _core.RETURNED:
        try:
            return payload.loads(pickled, buffers)
        except Exception as error:
            reason = _core.printable(f"{type(error).__name__}: {error}")
            advice = "Install its package here, or return something else" if isinstance(error, ImportError) else ""
            why = RemoteError(f"the task's result cannot be rebuilt here: {reason}")
            raise noted(why, Submitted(*about), advice) from error
    if code == _core.RAISED:
        raise exceptions.load(pickled, buffers, about[2])
    if code == _core.CANCELLED:
        raise CancelledError("the task was cancelled")
    # The text is the node's own, also where the core reports that a node was lost.
    text = _core.printable(bytes(pickled), MAX_REASON)
    advice = next((remedy for part, remedy in _ADVICE.items() if code == _core.CRASHED and part in text), "")
    raise noted(_ERRORS.get(code, RemoteError)(text), Submitted(*about), advice)


def noted(error: Exception, submitted: Submitted, advice: str = "") -> Exception:
    """Return an error with a note on the calls that it is about, and on what to do."""
    error.add_note(f"{submitted}. {advice}" if advice else str(submitted))
    return error
