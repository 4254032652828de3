"""The one tree of exceptions. Builtins are used where they fit (ValueError, TimeoutError, CancelledError).

Their texts contain the messages of nodes, hosts and clouds as `_core.printable` returns them: nothing in them has an
effect on a terminal, and no line of them can be taken for a line of the log. Exceptions that the user's own functions
raise come as they are.
"""

from __future__ import annotations

__all__ = [
    "EnvironmentMismatchError",
    "MessageError",
    "NodeLostError",
    "NodeStartError",
    "PayloadTooLargeError",
    "PoolClosedError",
    "RemoteError",
    "RemoteTraceback",
    "SkywardError",
    "TaskTimeoutError",
    "WorkerCrashedError",
]


class SkywardError(Exception):
    """Base of everything that skyward_lite raises on its own behalf."""


class MessageError(SkywardError):
    """Raised by `messages.send` if no listener took the message: there is none, it raised, or no answer came."""


class EnvironmentMismatchError(SkywardError):
    """Raised with `pool(strict_env=True)` in place of sending a call that names packages which a node has otherwise.

    Names each node, the packages and what installs them. The pool takes no further call while such a node is in it.
    """


class NodeStartError(SkywardError):
    """Raised when fewer nodes than asked for could be made ready. Names each node and its reason."""


class NodeLostError(SkywardError):
    """Raised for a task whose node went away, when the task has no attempt or no other node left."""


class WorkerCrashedError(SkywardError):
    """Raised for a task that made its worker process die.

    Names the node, the signal or exit status and the end of the process's standard error. Other tasks that ran in the
    same process run again.
    """


class TaskTimeoutError(SkywardError, TimeoutError):
    """Raised for a task that its node ended because it ran for longer than `Worker(task_timeout=)`."""


class PoolClosedError(SkywardError, RuntimeError):
    """Raised when a task is submitted to a pool that is not open, or the backend is used without an open pool."""


class PayloadTooLargeError(SkywardError, ValueError):
    """Raised when a pickled task or result is over the pool's `max_payload`. Names size, limit and remedy."""


class RemoteError(SkywardError):
    """Raised in place of a remote exception (or result) that cannot be pickled there or rebuilt here.

    Its text has the original's type and message; its `__cause__` the remote traceback.
    """


class RemoteTraceback(Exception):
    """Carries the traceback of a task's exception, as text. It is that exception's `__cause__`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'
