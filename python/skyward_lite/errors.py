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
    """The base of every exception that skyward_lite raises on its own behalf.

    An exception that a task raises keeps its own type, and its `__cause__` is a `RemoteTraceback`. So
    `except sky.SkywardError` catches what became of tasks and nodes, and not what your functions raise.

    What to do: catch one of the classes below where you can do something about it, and this one where you cannot.
    """


class NodeStartError(SkywardError):
    """Raised on entering the pool if fewer nodes than `pool(nodes=)` asks for became ready. Nothing is left running.

    Each node is named with its reason: the host's key is not known, no key of yours was accepted, the environment could
    not be built, EC2 has no capacity. The text has what the programs there printed.

    Example: 2 ready nodes are needed, but lab1 is ready; lab2 is lost: lab2 is not in /home/me/.ssh/known_hosts, so it
    is not trusted; its key is SHA256:…. Compare and accept its key with `ssh lab2`, or use SSH(..., accept_new=True)

    What to do: follow the reason, which ends with the remedy. `skyward check HOST` tests hosts one step at a time, and
    other nodes with `--exec` or `--slurm`. `pool(nodes=(1, 4))` is content with fewer nodes, and takes the others as
    they become ready.
    """


class NodeLostError(SkywardError):
    """Raised for a task whose node went away, if no other node or no attempt is left for it.

    A node is lost if its machine was switched off, if its agent was killed, or if it cannot be reached for as long as
    `pool(lease=)`. Its tasks run again on other nodes, each at most `Worker(retries=)` times.

    Example: node lab1 was lost: the agent ended the connection

    What to do: look at the reason in the text, and at the machine. Raise `Worker(retries=)` if nodes come and go, and
    `pool(lease=)` if connections are cut for long. Write a task's output under a temporary name and rename it, since a
    task may run more than once.
    """


class WorkerCrashedError(SkywardError):
    """Raised for a task that ended its worker process: by a signal, by `os._exit`, or by the out-of-memory killer.

    The text names the node, the signal or exit status, and the end of the process's standard error. Other tasks that
    ran in the same process run again, each alone in a process of its own.

    Example: node lab1: worker process 4711 was killed by the kernel's out-of-memory killer (SIGKILL) while it ran this
    task

    What to do: for the out-of-memory killer, lower `Worker(concurrency=)` or send less data per task. For SIGSEGV and
    other signals, look for the extension module in the end of standard error, and run the task in this process to
    reproduce it. `Worker(executor="process")` keeps other tasks out of the process that dies.
    """


class TaskTimeoutError(SkywardError, TimeoutError):
    """Raised for a task that ran for longer than `Worker(task_timeout=)`, and that its node ended for that reason.

    Example: node lab1: the task ran for 60.2 s, longer than Worker(task_timeout=60), and was ended

    What to do: raise `Worker(task_timeout=)`, or look at what the task waits for. A task that waits for a server needs
    a time limit of its own there.
    """


class PayloadTooLargeError(SkywardError, ValueError):
    """Raised for a call, a result or a message that is larger, once it is pickled, than `Worker(max_payload=)`.

    Example: payload of 5,368,709,120 bytes is over the limit of 4,294,967,296: send less per task, or raise it with
    Worker(max_payload=5_368_709_120)

    What to do: send less per task, return less, or let the task read and write files. Raise `Worker(max_payload=)` if
    the machines have the memory.
    """


class EnvironmentMismatchError(SkywardError):
    """Raised with `pool(strict_env=True)` for a call that names packages which a node lacks or has in other versions.

    The call is not sent, and neither is any later one while such a node is in the pool. Without `strict_env` the log
    has a warning in its place.

    Example: lab1: scikit-learn is 1.5.2 there and 1.7.0 here: tasks that use it may fail or differ.
    Image(pip=["scikit-learn==1.7.0"]) installs it

    What to do: install on the nodes what is installed here, with the `Image(pip=[...])` that the text names.
    `sky.Image.like_here()` lists everything that your program imports.
    """


class PoolClosedError(SkywardError, RuntimeError):
    """Raised for a task that is submitted to a pool that is not open, and for `backend="skyward"` without an open pool.

    That is before the block and after it, in a process that was forked from the one that opened the pool, and for a
    generator of `Parallel(return_as="generator")` that is read on after the block.

    Example: this pool is closed: submit inside its with block

    What to do: submit, and read generators to their end, inside `with sky.pool(...):`, or between `pool.start()` and
    `pool.close()`. A forked process opens a pool of its own.
    """


class MessageError(SkywardError):
    """Raised by `sky.messages.send` in a task if no listener took the message.

    There is none for its address, it raised, or no answer came in time.

    Example: node lab1: the client did not take a message for 'progress': nobody listens there

    What to do: call `sky.messages.listen` in the process that opened the pool, before the task sends; and let the
    listener return soon.
    """


class RemoteError(SkywardError):
    """Raised in place of a task's exception, or of its result, that cannot be pickled there or rebuilt here.

    Its text has the type and the message of the original; its `__cause__` is the traceback on the node.

    Example: mylib.errors.ParseError: line 3 (a TypeError prevents sending it: cannot pickle '_io.TextIOWrapper' object)

    What to do: make the exception one that pickles, with all parameters of its `__init__` in `args`; or raise another
    one in the task. For a result, install here the package that the text names.
    """


class RemoteTraceback(Exception):
    """The traceback of a task's exception on its node. It is the `__cause__` of that exception, and is not raised.

    Python and notebooks show it first, with your source lines and an arrow at the line of your code that failed.

    What to do: read the line after the arrow. `error.__cause__.node` tells a program where it was.

    Attributes
    ----------
    text : str
        The traceback.
    node : str
        The name of the node on which the task ran.
    task : int or None
        The place of the call among those of its `Parallel` or `map`, counted from 0; None for a call of `submit`.
    call : str
        The call as it is written, shortened; empty if it could not be rebuilt on the node.
    """

    def __init__(self, text: str, node: str = "", task: int | None = None, call: str = "") -> None:
        super().__init__(text)
        self.text = text
        self.node = node
        self.task = task
        self.call = call

    def __str__(self) -> str:
        task = "" if self.task is None else f", task {self.task}"
        call = f": {self.call}" if self.call else ", before the call has run"
        where = f"on node {self.node}{task}{call}" if self.node else ""
        return f'{where}\n"""\n{self.text}"""'
