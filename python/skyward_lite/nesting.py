"""What a node's processes are told of the client's, and what keeps a program from starting pools without end.

The workers' environment says how many pools are around a process, and what the client's command line was. The
environment of an agent's process says that it is one: what `sys.executable` starts in Python's place finds it there.
"""

from __future__ import annotations

import base64
import os
import sys
import types

# Agents need a name of this module, and start sooner without what `typing` imports.
from .errors import NodeStartError

DEPTH = "SKYWARD_LITE_DEPTH"
"""The variable that says how many pools are around a worker."""
AGENT = "SKYWARD_LITE_AGENT"
"""The variable with which an agent's process is started; the agent removes it."""
ARGUMENTS = "SKYWARD_LITE_ARGV"
"""The variable that has the client's command line; the worker removes it."""
MAX_ARGUMENTS = 4 * 1024
"""Bytes of the client's command line that fit a hello. Beyond, workers get its first word only."""
MAX_DEPTH = 2
"""Pools that may be around one another. More are a program that opens them by mistake, each worker for itself."""


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
    # Not at the module's head: it imports what imports this.
    from . import messages

    # A program that a task starts runs its own modules, whose pools have the limit only.
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
    said = os.environ.get(DEPTH, "")
    return int(said) if said.isdecimal() else 0


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
    """Return what the environment of the workers has of this process."""
    words = "\0".join(map(str, sys.argv)).encode(errors="surrogateescape")
    if len(words) > MAX_ARGUMENTS:
        words = words.partition(b"\0")[0][:MAX_ARGUMENTS]
    return {DEPTH: str(depth() + 1), ARGUMENTS: base64.b64encode(words).decode()}


def take_arguments() -> list[str]:
    """Return the client's command line, in a worker."""
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
