"""How objects are pickled that cloudpickle would send wrongly, by their type.

`reducer` finds the function for a type. Such a function returns what a pickler's `reducer_override` returns:
`NotImplemented` for cloudpickle's own way, else a tuple as `__reduce__` does.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import cloudpickle
from cloudpickle.cloudpickle import _code_reduce, _decompose_typevar, _make_typevar

from . import alone, arrays, arrow, classes, filters, managers, modules, parts, script, stand_ins
from .route import Route


class AnyPickler(Protocol):
    """What a reducer asks of the pickler that calls it: see pickler.py."""

    home: bool
    route: Route

    def usual(self, obj: Any) -> Any: ...
    def by_value(self, thing: Any, take: Parts) -> Any: ...
    def without_gaps(self, array: Any) -> Any: ...


Parts = Callable[[Any, Any], tuple[tuple[Any, ...], Any, Callable[[Any, Any], None]]]
"""Takes a class or a cached function apart, for a pickler: see parts.py."""
Reducer = Callable[[AnyPickler, Any], Any]

BUILTIN: Final = frozenset((object, type, dict, list, tuple, set, int, float, str, bytes, bool))
"""Classes that are in so many pickles that the usual questions about them would take long."""
EVERYWHERE: Final = frozenset(
    function
    for room in (
        cloudpickle.cloudpickle,
        alone,
        arrays,
        arrow,
        classes,
        filters,
        managers,
        modules,
        parts,
        script,
        stand_ins,
    )
    for function in vars(room).values()
    if type(function) is types.FunctionType and function.__module__ == room.__name__
)
"""Functions that our pickles are full of, and that each worker finds by name."""

_SINGLE_DISPATCH: Final = getattr(functools.singledispatch(lambda _: None), "__code__", None)
"""The code of all functions that `functools.singledispatch` made."""


def reducer(kind: type, route: Route, pickler: AnyPickler) -> Reducer | None:
    """Return the reducer for objects of this type on this route; None where cloudpickle's own way is right.

    It is looked for once for each type and route, so that the search may take its time. A reducer is called for each
    object.
    """
    if issubclass(kind, type):
        return _reduce_class
    if kind is types.FunctionType:
        return reduce_function
    if kind in _BY_TYPE:
        return _BY_TYPE[kind]
    if issubclass(kind, enum.Enum):
        return None if pickler.usual(kind) is NotImplemented else _reduce_enum_member
    if kind.__module__.partition(".")[0] == "pyarrow" and hasattr(kind, "get_total_buffer_size"):
        return _without_pickler(arrow.reduce_arrow)
    if str(kind.__module__).startswith("sklearn.callback."):
        # Not at the module's head: multiprocessing's connections, which it imports, are of no use to other programs.
        from . import sklearn_callbacks

        return _without_pickler(sklearn_callbacks.reducer(kind))
    if hasattr(kind, "write") and hasattr(kind, "flush"):
        return _reduce_stream
    if arrays.is_plain(kind):
        return _reduce_array
    reduce = arrays.reducer(kind, route) or managers.reducer(kind, route)
    can_be_called = any("__call__" in vars(base) for base in kind.__mro__)
    return _reduce_callable if reduce is None and can_be_called else _without_pickler(reduce)


def _without_pickler(reduce: Callable[[Any], Any] | None) -> Reducer | None:
    """Return the reducer that calls a function which needs no pickler."""
    return None if reduce is None else lambda _, obj: reduce(obj)


# ------------------------------------------------------------------------------------------------ classes


def _reduce_class(pickler: AnyPickler, cls: type) -> Any:
    if cls in BUILTIN:
        return NotImplemented
    if issubclass(cls, Warning):
        return filters.reduce(cls, functools.partial(_reduce_any_class, pickler))
    return _reduce_any_class(pickler, cls)


def _reduce_any_class(pickler: AnyPickler, cls: type) -> Any:
    if pickler.home and classes.from_home(cls) is not None:
        reduced = None
    else:
        reduced = pickler.usual(cls)
        if not is_by_value(reduced):
            return reduced
    return pickler.by_value(cls, functools.partial(parts.take_class, reduced))


def is_by_value(reduced: Any) -> bool:
    """Return whether this is how cloudpickle sends the code of a function or of a class: a tuple of six."""
    return isinstance(reduced, tuple) and len(reduced) == 6


def _reduce_enum_member(_: AnyPickler, member: Any) -> Any:
    # Not by its value: what comes of a value on its way need not be equal to it.
    cls = type(member)
    return (getattr, (cls, member._name_)) if member._name_ in cls.__members__ else NotImplemented


# ------------------------------------------------------------------------------------------------ functions


def reduce_function(pickler: AnyPickler, function: types.FunctionType) -> Any:
    """Return how a function is pickled."""
    if function in EVERYWHERE:
        return NotImplemented
    reduced = pickler.usual(function)
    if not is_by_value(reduced):
        return reduced
    if function.__code__ is _SINGLE_DISPATCH:
        return parts.reduce_dispatcher(function)
    modules.note_imports(function.__code__)
    make, arguments, state, _, _, setter = reduced
    for name, value in parts.names_in(function.__annotations__, function.__globals__).items():
        state[1]["__globals__"].setdefault(name, value)
    if pickler.home:
        return reduced
    if function.__module__ != "__main__":
        return (*reduced[:5], stand_ins.set_function) if modules.by_value(function) else reduced
    names = _looked_up_in_script(function.__code__) if "__main__" in sys.modules else {}
    return make, arguments, (setter, state, names), None, None, script.set_function


def _looked_up_in_script(code: types.CodeType) -> dict[str, Any]:
    """Return the script's globals that code may use by way of `import __main__`."""
    names = set(_names_of(code))
    if "__main__" not in names:
        return {}
    space = vars(sys.modules["__main__"])
    return {name: space[name] for name in sorted(names) if name in space and not name.startswith("__")}


def _names_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)


def _reduce_callable(_: AnyPickler, thing: Any) -> Any:
    # A function of a type of its own, as Cython and NumPy have them, is pickled by its name alone.
    if hasattr(thing, "__module__"):
        modules.by_value(thing)
    elif type(thing).__module__ == "numpy":
        modules.by_value(type(thing))  # a ufunc, which does not know its module
    return NotImplemented


def _reduce_cached(pickler: AnyPickler, cached: Any) -> Any:
    return NotImplemented if modules.has_name(cached) else pickler.by_value(cached, parts.take_cached)


def _reduce_cached_property(_: AnyPickler, cached: functools.cached_property[Any]) -> Any:
    # Its lock (Python 3.11) is made anew.
    state = {key: value for key, value in vars(cached).items() if key not in ("lock", "func")}
    return functools.cached_property, (cached.func,), state


# ------------------------------------------------------------------------------------------------ other types


def _reduce_named(_: AnyPickler, thing: Any) -> Any:
    if modules.has_name(thing):
        return NotImplemented
    kind = type(thing)
    more = (thing.__supertype__,) if kind is typing.NewType else ()
    return parts.named, (thing.__module__, thing.__name__, kind, thing.__name__, *more)


def _reduce_type_variable(_: AnyPickler, variable: Any) -> Any:
    return (_make_typevar, _decompose_typevar(variable)) if modules.by_value(variable) else NotImplemented


def _reduce_array(pickler: AnyPickler, array: Any) -> Any:
    return arrays.reduce_plain(pickler.route, pickler.without_gaps, array)


def _reduce_stream(_: AnyPickler, stream: Any) -> Any:
    for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
        # By its name also if `sys` has another one since: a notebook or a redirection may have replaced it.
        if stream is getattr(sys, name) or getattr(stream, "name", None) == f"<{name}>":
            return getattr, (sys, name)
    return NotImplemented


def _reduce_code(_: AnyPickler, code: types.CodeType) -> Any:
    """Return code as cloudpickle sends it, and with its file's name, which tracebacks and warnings need."""
    make, args = _code_reduce(code)
    return make, tuple(code.co_filename if type(arg) is str and arg == "<dynamic-code>" else arg for arg in args)


_BY_TYPE: Final[dict[type, Reducer]] = {
    type(functools.lru_cache(lambda: None)): _reduce_cached,
    functools.cached_property: _reduce_cached_property,
    types.CodeType: _reduce_code,
    types.ModuleType: lambda _, module: modules.reduce_module(module),
    types.BuiltinFunctionType: lambda _, function: modules.check_builtin(function),
    typing.TypeVar: _reduce_type_variable,
    typing.NewType: _reduce_named,
    typing.ParamSpec: _reduce_named,
    typing.TypeVarTuple: _reduce_named,
    # There must be one of each in a process: a string is the name of a global in the object's module.
    type(dataclasses.MISSING): lambda _, sentinel: "MISSING",
    type(dataclasses.KW_ONLY): lambda _, sentinel: "KW_ONLY",
}
