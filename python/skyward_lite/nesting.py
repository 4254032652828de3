"""Pools inside tasks: what a node's processes know of the client's, so that a program does not start pools without end.

The environment of a worker has the number of pools around the process, and the client's command line. The environment
of an agent's process marks it as one: if `sys.executable` is a program that is no Python, and opens a pool itself, the
program finds the mark there.
"""

from __future__ import annotations

import base64
import os
import sys
import types

# Without `typing`: agents need a name of this module, and start 10 ms sooner.
from .errors import NodeStartError

DEPTH = "SKYWARD_LITE_DEPTH"
"""The environment variable with the number of pools around a worker."""
AGENT = "SKYWARD_LITE_AGENT"
"""The environment variable that marks an agent's process; the agent removes it."""
ARGUMENTS = "SKYWARD_LITE_ARGV"
"""The environment variable with the client's command line; the worker removes it."""
MAX_ARGUMENTS = 4 * 1024
"""Bytes of the client's command line that fit a hello. Of a longer one, workers get the first word only."""
MAX_DEPTH = 2
"""Pools that may be around one another. In a program with more, each worker opens another one by mistake."""


def check() -> None:
    """Raise `NodeStartError` where no pool may be opened."""
    if AGENT in os.environ:
        raise NodeStartError(
            f"this process was started as a node's agent, but runs a program that opens a pool: {_executable()}. Set "
            "sys.executable to a Python interpreter that has skyward_lite before the pool"
        )
    around = depth()
    if not around:
        return
    # Not at the module's head: agents start sooner without it.
    from . import messages

    # Only in the worker itself. A program that a task started imports modules of its own, which may open pools.
    names = being_imported() if messages.in_worker() else []
    if names:
        raise NodeStartError(
            f"module {names[0]} opens a pool when it is imported, and a worker is importing it: each worker would open "
            f'another one. Open the pool in a function of {names[0]}, or under `if __name__ == "__main__":`'
        )
    if around >= MAX_DEPTH:
        raise NodeStartError(
            f"there are {around} pools around this process already, each opened by a task of the one before, and that "
            "is the limit: call Parallel or submit without a pool of its own here, or open one in an outer task"
        )


def depth() -> int:
    """Return how many pools are around this process."""
    value = os.environ.get(DEPTH, "")
    return int(value) if value.isdecimal() else 0


def interpreter() -> str:
    """Return the interpreter that runs nodes on this machine. Raises `NodeStartError` if there is none."""
    if not sys.executable:
        raise NodeStartError(
            "sys.executable is empty, so that Local() does not know which Python would run its nodes: set it to a "
            "Python interpreter that has skyward_lite before the pool"
        )
    if getattr(sys, "frozen", False) and not os.path.basename(sys.executable).startswith(("python", "pypy")):
        raise NodeStartError(
            f"{_executable()}, an application that brings its own Python: started as a node it would run the "
            "application again. Set sys.executable to a Python interpreter that has skyward_lite before the pool, or "
            "use hosts with sky.SSH()"
        )
    return sys.executable


def worker_environment() -> dict[str, str]:
    """Return the variables by which the workers' environment describes this process."""
    arguments = "\0".join(map(str, sys.argv)).encode(errors="surrogateescape")
    if len(arguments) > MAX_ARGUMENTS:
        arguments = arguments.partition(b"\0")[0][:MAX_ARGUMENTS]
    return {DEPTH: str(depth() + 1), ARGUMENTS: base64.b64encode(arguments).decode()}


def take_arguments() -> list[str]:
    """Return the client's command line, and remove it from this worker's environment."""
    return base64.b64decode(os.environ.pop(ARGUMENTS, "")).decode(errors="surrogateescape").split("\0")


def agent_environment() -> dict[str, str]:
    """Return the environment in which an agent is started on this machine."""
    return {**os.environ, AGENT: "1"}


def being_imported() -> list[str]:
    """Return the names of the modules whose bodies the calling thread is running, the innermost first."""
    names = []
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            name = frame.f_globals.get("__name__")
            spec = getattr(sys.modules.get(name), "__spec__", None) if isinstance(name, str) else None
            if name != "__main__" and getattr(spec, "_initializing", False):
                names.append(str(name))
        frame = frame.f_back
    return names


def _executable() -> str:
    return f"sys.executable is {sys.executable!r}"
