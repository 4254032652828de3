"""The script's `__main__`, in a worker: a module with the functions and classes of the script that tasks were sent.

Code in tasks that pickles by name, as `joblib.Memory`, `joblib.dump` and `pickle` do, or that looks names up, as
`typing.get_type_hints` does, finds them there. It does not find the module that runs the worker.
"""

from __future__ import annotations

import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Any


class _Own(threading.local):
    """What the task was sent that runs on this thread. Tasks on other threads may be sent other versions meanwhile."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}


_own = _Own()


class _Script(types.ModuleType):
    def __getattribute__(self, name: str) -> Any:
        names = _own.names
        return names[name] if name in names else super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"module '__main__' has no attribute {name!r} in this worker, but only the functions and classes of the "
            "script that tasks have used so far. Use the name itself in the task, or pass its value as an argument",
            name=name,
            obj=self,
        )


_stand_in: _Script | None = None
_worker_main: types.ModuleType | None = None
"""The module that runs the worker, to which nothing else refers."""


def install() -> None:
    """Put the stand-in into the place of `__main__`."""
    global _stand_in, _worker_main
    _worker_main = sys.modules["__main__"]
    _stand_in = _Script("__main__")
    # Python expects this name in the module. Functions that were pickled do not need it: cloudpickle puts it into their
    # own globals.
    _stand_in.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = _stand_in


def enter(thing: Any) -> None:
    """Enter a function or a class that was rebuilt, if it is the script's and has a name on the module's level."""
    if _stand_in is None or getattr(thing, "__module__", None) != "__main__":
        return
    name = getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None)
    if isinstance(name, str) and name.isidentifier():
        enter_all({name: thing})


def enter_all(names: dict[str, Any]) -> None:
    """Enter objects of the script under their names."""
    if _stand_in is not None:
        _stand_in.__dict__.update(names)
        _own.names.update(names)


def names() -> dict[str, Any]:
    """Return the dictionary of what was entered on this thread. The task loop clears it when a task has ended."""
    return _own.names


def set_function(function: types.FunctionType, state: tuple[Callable[..., None], Any, dict[str, Any]]) -> None:
    """Set the state of a function of the script, and enter it and the names that it looks up.

    `state` is what cloudpickle sets it with, its state, and the names with their objects.
    """
    setter, own, names = state
    setter(function, own)
    enter(function)
    enter_all(names)
    if _stand_in is not None and "__file__" not in _stand_in.__dict__:
        file = function.__globals__.get("__file__")
        if isinstance(file, str) and os.path.exists(file):
            # Processes that multiprocessing spawns import the script, as those of the client do.
            _stand_in.__file__ = file
