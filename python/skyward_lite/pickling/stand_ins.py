"""What a worker makes of modules that it cannot import: their contents travel by value, and stand-ins have their names.

When a function or a class of such a module arrives, the worker enters it into a stand-in for the module. So code in
tasks that looks names up, as `joblib.Memory` and `pickle` do, finds it under its name.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Sequence
from typing import Any, Final

from cloudpickle.cloudpickle import _function_setstate

_MODULE_LACKS_NAME: Final = re.compile(r"Can't get attribute '.*' on <module '(.+?)'")
"""pickle's message if a module lacks a name."""

# ------------------------------------------------------------------------------------------------ the import path


class WithPath:
    """A call, and the import path with which a worker is to rebuild it. Pickles as the call."""

    def __init__(self, path: Sequence[str], call: Any) -> None:
        self._path = tuple(path)
        self._call = call

    def __reduce__(self) -> Any:
        # A pickle is rebuilt from its beginning. The path comes first in it, so that the worker has the path when it
        # looks up the call's names.
        return second, (_Path(self._path), self._call)


class _Path:
    """Pickles as a call of `take_path`."""

    def __init__(self, path: tuple[str, ...]) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return take_path, (self._path,)


def second(_: None, call: Any) -> Any:
    """Return the second argument; for the pickle of a `WithPath`."""
    return call


def take_path(path: tuple[str, ...]) -> None:
    """Search these directories first, and then the others that this process has searched so far."""
    if tuple(sys.path[: len(path)]) != path:
        sys.path[:] = [*path, *(entry for entry in sys.path if entry not in path)]
        importlib.invalidate_caches()
        # The new directories may have the modules for which there are stand-ins.
        while _stand_ins:
            sys.modules.pop(_stand_ins.pop(), None)


# ------------------------------------------------------------------------------------------------ modules by value


class Namespace(types.ModuleType):
    """A package without a file, with those of its modules that were sent by value. It imports the others."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)
        return importlib.import_module(f"{self.__name__}.{name}")


def fill(module: types.ModuleType, contents: dict[str, Any]) -> None:
    """Set the contents of a module that was rebuilt."""
    vars(module).update(contents)


def set_function(function: types.FunctionType, state: Any) -> None:
    """Set the contents of a function that was rebuilt, and enter it into its module's stand-in."""
    _function_setstate(function, state)
    enter(function)


# ------------------------------------------------------------------------------------------------ stand-ins


class StandIn(types.ModuleType):
    """A module that this worker cannot import, with the functions and classes of it that tasks were sent."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"module {self.__name__!r} has no attribute {name!r} in this worker, which cannot import it: it has the "
            "functions and classes that tasks were sent of it by value so far",
            name=name,
            obj=self,
        )


_stand_ins: set[str] = set()
"""The names of the modules that have a stand-in."""
_importable: set[str] = set()
"""The names of modules that an import finds, so that they need no stand-in."""


def has_stand_in(name: str) -> bool:
    """Return whether there is a stand-in for the module of this name."""
    return name in _stand_ins


def enter(thing: Any) -> None:
    """Enter a function or a class into the stand-in for its module, if this process cannot import the module."""
    name, key = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if type(name) is not str or type(key) is not str or name in _importable or not key.isidentifier():
        return
    module = sys.modules.get(name) or _make_stand_in(name)
    if type(module) is StandIn:
        vars(module)[key] = thing
    else:
        _importable.add(name)


def _make_stand_in(name: str) -> types.ModuleType | None:
    """Make the stand-in for a module, and those for the packages around it.

    Return None, and make none, if one of the packages can be imported.
    """
    parent, _, last = name.rpartition(".")
    if parent:
        package = sys.modules.get(parent) or _make_stand_in(parent)
        if type(package) is not StandIn:
            return None
    else:
        with contextlib.suppress(ImportError, ValueError):
            if importlib.util.find_spec(name) is not None:
                return None
    _stand_ins.add(name)
    module = sys.modules.setdefault(name, StandIn(name))
    if parent:
        setattr(package, last, module)
    return module


def missing_module_hint(error: BaseException) -> str | None:
    """Return what to do about a module, or a name in a module, that this worker lacks; None for other errors."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = error.name.partition(".")[0]
        if error.name != top and top in sys.modules:
            what = f"this node's {top} has no module {error.name}: it may be another version, or another module"
        else:
            what = f"this node has no module {top}"
    elif isinstance(error, AttributeError) and type(error.obj) is StandIn:
        top = error.obj.__name__.partition(".")[0]
        what = f"this node has no module {error.obj.__name__}"
    elif isinstance(error, AttributeError) and (match := _MODULE_LACKS_NAME.match(str(error))):
        top = match[1].partition(".")[0]
        what = f"this node's module {match[1]} lacks what the client's has: it is another version, or another module"
    else:
        return None
    if top in sys.stdlib_module_names or top == "__main__":
        return None
    return (
        f"{what}. Image(pip=[...]) installs packages on the nodes and Image(includes=[...]) sends modules of your own; "
        "Local() nodes import what this interpreter has and what is on sys.path"
    )
