"""cloudpickle's pickler, with what it would send wrongly or anew each time sent as it is meant."""

from __future__ import annotations

import dataclasses
import enum
import functools
import io
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Final

import cloudpickle
from cloudpickle.cloudpickle import _decompose_typevar, _dynamic_class_reduce, _make_typevar

from . import (
    alone,
    arrays,
    arrow,
    classes,
    filters,
    managers,
    modules,
    script,
)
from .route import Route

Functions = dict[int, tuple[Callable[..., Any], Any]]
"""Functions of one call of `Parallel` by identity: the function, kept so that its id stays its own, and what
`reducer_override` returns for it; None for the usual way."""
Parts = Callable[["Pickler", Any], tuple[tuple[Any, ...], Any, Callable[[Any, Any], None]]]
"""Takes a class or a cached function apart: what makes it, with arguments; its state; what gives it that."""
Reducer = Callable[["Pickler", Any], Any]
"""Returns what `reducer_override` does, for objects of one type; `NotImplemented` for the usual way."""

MAX_TYPES: Final = 4096
"""Types whose reducer is remembered. More than that are classes that a program makes as it goes."""

_SINGLE_DISPATCH: Final = getattr(functools.singledispatch(lambda _: None), "__code__", None)
"""The code that all functions have which `functools.singledispatch` made."""
_TYPED_DICT: Final[Any] = getattr(typing, "_TypedDictMeta", None)
"""The metaclass of all of `typing.TypedDict`'s kind."""
_ATOMS: Final = (int, float, complex, str, bytes, bool, type(None))
"""What a class has from the moment when it is made."""
_AT_ONCE: Final = (*_ATOMS, types.ModuleType, types.BuiltinFunctionType)
"""What a method can do with before its class is there in full."""
_BUILTIN: Final = frozenset((object, type, dict, list, tuple, set, int, float, str, bytes, bool))
"""Classes that are asked for so often that the usual questions would take long."""
_EVERYWHERE: Final = frozenset(
    function
    for module in (cloudpickle.cloudpickle, alone, arrays, arrow, classes, filters, managers, modules, script)
    for function in vars(module).values()
    if type(function) is types.FunctionType and function.__module__ == module.__name__
)
"""Functions that pickles of ours are full of, and that each worker finds by name: to ask would take longer."""
_NAME: Final = re.compile(r"[A-Za-z_]\w*")


class Shared:
    """What the calls of one `Parallel` share: its functions and classes are pickled once.

    It keeps them alive for as long as their results may come.
    """

    def __init__(self) -> None:
        self.functions: Functions = {}
        """Those that go by name or can be pickled alone."""
        self.all: Functions = {}
        """Those as well that can be pickled apart only from arguments with which they share nothing."""
        self.definitions = classes.Definitions()
        self.question = alone.Question()


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """See the module's text. `route` is the way that what it writes goes."""

    shared: Shared | None = None
    kept: Functions | None = None
    """Functions that are pickled as was found out before."""
    known_reducers: ClassVar[dict[Route, dict[type, Reducer | None]]] = {}

    def __init__(self, file: io.BytesIO, route: Route, **options: Any) -> None:
        super().__init__(file, protocol=5, **options)
        self.route = route
        self.home = route.to_client
        self.bare: dict[int, Any] = {}
        """Methods that are pickled without their state, which comes with that of their class."""
        self.reducers = self.known_reducers.setdefault(route, {})

    def reducer_override(self, obj: Any) -> Any:
        if self.kept is not None:
            known = self.kept.get(id(obj))
            if known is not None and known[1] is not None:
                return known[1]
        # Not isinstance, which believes what an object says of its __class__.
        kind = type(obj)
        try:
            reducer = self.reducers[kind]
        except KeyError:
            if len(self.reducers) >= MAX_TYPES:
                self.reducers.clear()
            reducer = self.reducers[kind] = _reducer(kind, self.route)
        if kind is types.FunctionType and id(obj) in self.bare:
            return self.bare[id(obj)]
        # cloudpickle's own way concerns classes and functions only, whose reducers ask for it.
        return NotImplemented if reducer is None else reducer(self, obj)

    def usual(self, obj: Any) -> Any:
        """Return what cloudpickle's `reducer_override` does for a class or a function; by value if workers lack it."""
        if modules.by_value(obj):
            return _dynamic_class_reduce(obj) if isinstance(obj, type) else self._dynamic_function_reduce(obj)
        return super().reducer_override(obj)

    def goes_by_name(self, thing: Any) -> bool:
        """Return whether a function, a class or a cached function goes by name, or by what the far end knows of it."""
        if isinstance(thing, type):
            known = thing in _BUILTIN or (self.home and classes.from_home(thing) is not None)
            return known or len(_reduced(self.usual(thing))) != 6
        if type(thing) is types.FunctionType:
            return thing in _EVERYWHERE or len(_reduced(self.usual(thing))) != 6
        return _has_name(thing)

    def is_alone(self, thing: Any) -> bool:
        """Return whether a function, a class or a cached function can be pickled apart from what else is pickled."""
        return self._sharing().question.ask(thing, self.goes_by_name)

    def _sharing(self) -> Shared:
        if self.shared is None:
            self.shared = Shared()
        return self.shared

    def by_value(self, thing: Any, parts: Parts) -> Any:
        """Return how a class or a cached function is pickled that has no name which the far end could import."""
        known = classes.from_home(thing) if self.home else None
        if known is not None:
            return classes.rebuild, (*known, None, False)
        if not self.home and not self.is_alone(thing):
            # It belongs to what else is in the pickle.
            make, state, setter = parts(self, thing)
            functions, rest = self._bare(thing)
            arguments = classes.identify(thing), functions, *make
            return classes.fresh, arguments, (setter, state, rest), None, None, classes.set_fresh
        definition = self._sharing().definitions.define(thing, parts, functools.partial(_pickled, self.route))
        return classes.rebuild, (*definition, not self.home)

    def _bare(self, thing: Any) -> tuple[list[Any], list[Any]]:
        """Return the methods of a class without their state, and the state of each.

        Their globals may have instances of the class. An instance in a set, for example, needs the `__hash__` of its
        class as soon as it is rebuilt, so the class gets its methods before their globals are rebuilt.
        """
        functions: list[Any] = []
        rest: list[Any] = []
        for name, value in vars(thing).items() if isinstance(thing, type) else ():
            reduced = _function(self, value) if type(value) is types.FunctionType else NotImplemented
            if len(_reduced(reduced)) == 6:
                make, arguments, state, _, _, setter = reduced
                self.bare[id(value)] = make, arguments
                own = state[1] if setter is script.set_function else state
                known = own[1].get("__globals__", {}) if isinstance(own[1], dict) else {}
                functions.append((name, value, {k: v for k, v in known.items() if type(v) in _AT_ONCE}))
                rest.append((setter, value, state))
        return functions, rest


class _DefinitionPickler(Pickler):
    """Writes the definition of one thing. Others that are defined stand in it by their ids."""

    def __init__(self, file: io.BytesIO, route: Route, thing: Any) -> None:
        super().__init__(file, route)
        self.thing = thing
        self.references: classes.References = {}

    def by_value(self, thing: Any, parts: Parts) -> Any:
        if self.home and classes.from_home(thing) is not None:
            return super().by_value(thing, parts)
        name = classes.identify(thing)
        if thing is not self.thing:
            self.references[name] = thing, parts
            return classes.member, (name,)
        make, state, setter = parts(self, thing)
        return classes.skeleton, (name, *make), state, None, None, setter


def _reduced(reduced: Any) -> tuple[Any, ...]:
    return reduced if isinstance(reduced, tuple) else ()


def _pickled(route: Route, thing: Any, parts: Parts) -> tuple[bytes, classes.References]:
    file = io.BytesIO()
    pickler = _DefinitionPickler(file, route, thing)
    pickler.dump(thing)
    return file.getvalue(), pickler.references


# ------------------------------------------------------------------------------------------------ by type


def _reducer(kind: type, route: Route) -> Reducer | None:
    """Return the reducer for objects of this type on this route; None where cloudpickle's own way is right.

    Asked once for each type and route, so it may take its time; a reducer itself is called for each object.
    """
    if issubclass(kind, type):
        return _class
    if kind is types.FunctionType:
        return _function
    if kind in _BY_KIND:
        return _BY_KIND[kind]
    if issubclass(kind, enum.Enum):
        by_name = Pickler(io.BytesIO(), route).usual(kind) is NotImplemented
        return None if by_name else _enum_member
    if kind.__module__.partition(".")[0] == "pyarrow" and hasattr(kind, "get_total_buffer_size"):
        return _arrow
    if str(kind.__module__).startswith("sklearn.callback."):
        # Not at the module's top: it needs this one.
        from . import sklearn_callbacks

        return _plain(sklearn_callbacks.reducer(kind))
    if hasattr(kind, "write") and hasattr(kind, "flush"):
        return _stream
    return _plain(arrays.reducer(kind, route) or managers.reducer(kind, route))


def _plain(reduce: Callable[[Any], Any] | None) -> Reducer | None:
    """Return the reducer that asks a function which needs no pickler."""
    return None if reduce is None else lambda _, obj: reduce(obj)


def _class(pickler: Pickler, cls: type) -> Any:
    if cls in _BUILTIN:
        return NotImplemented
    if issubclass(cls, Warning):
        return filters.reduce(cls, functools.partial(_any_class, pickler))
    return _any_class(pickler, cls)


def _any_class(pickler: Pickler, cls: type) -> Any:
    if pickler.home and classes.from_home(cls) is not None:
        reduced = None
    else:
        reduced = pickler.usual(cls)
        if reduced is NotImplemented or len(reduced) != 6:
            return reduced
    return pickler.by_value(cls, functools.partial(_class_definition, reduced))


def _class_definition(reduced: Any, pickler: Pickler, cls: type) -> Any:
    """Return what a class is made of: what cloudpickle would make it of, put right."""
    _, arguments, (attributes, _), _, _, _ = reduced
    namespace: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    names = _names_in(vars(cls).get("__annotations__"), cls.__module__)
    if issubclass(cls, enum.Enum):
        return _enum_definition(cls, attributes, namespace, names)
    namespace.update(arguments[3])
    bases: tuple[Any, ...] = cls.__bases__
    if type(cls) is _TYPED_DICT:
        # Its metaclass takes only what was written there.
        bases = vars(cls).get("__orig_bases__", bases)
    elif "__orig_bases__" in vars(cls):
        # `typing.Generic` looks for it when the class is made.
        namespace["__orig_bases__"] = attributes.pop("__orig_bases__", vars(cls)["__orig_bases__"])
    # What `copyreg` notes on a class when it pickles an instance is no part of the class.
    attributes.pop("__slotnames__", None)
    own = {k for k, v in vars(cls).items() if type(v) is types.MemberDescriptorType and v.__objclass__ is cls}
    for key in own:
        attributes.pop(key, None)
    if "__slots__" in vars(cls):
        slots = attributes.pop("__slots__", None)
        # An iterator has been used up.
        namespace["__slots__"] = slots if isinstance(slots, str | tuple | list | dict) else tuple(own)
    abstract = attributes.pop("__abstractmethods__", None)
    for key, value in list(attributes.items()):
        if key.startswith("__") or key == "_abc_impl":
            continue
        if type(value) in _ATOMS:
            # What `__init_subclass__` and metaclasses look at is mostly of this kind. They may change it, so it is set
            # once more with the other attributes.
            namespace[key] = value
    make = classes.make_class, type(cls), cls.__name__, bases, namespace, abstract
    return make, (attributes, names), classes.set_class


def _enum_definition(cls: Any, attributes: dict[str, Any], namespace: dict[str, Any], names: dict[str, Any]) -> Any:
    for key in (*cls.__members__, *_ENUM_INNER):
        attributes.pop(key, None)
    if "_generate_next_value_" in vars(cls):
        attributes["_generate_next_value_"] = vars(cls)["_generate_next_value_"]
    members = [(key, member._value_, _data(cls, member)) for key, member in cls.__members__.items()]
    states = {
        key: state
        for key, member in cls.__members__.items()
        if member._name_ == key and (state := {k: v for k, v in vars(member).items() if k not in _MEMBER_INNER})
    }
    boundary = getattr(cls, "_boundary_", None)
    options = {} if boundary is None else {"boundary": boundary}
    make = classes.make_enum, type(cls), cls.__name__, cls.__bases__, namespace, options, members
    return make, (attributes, names, states), classes.set_enum


_ENUM_INNER: Final = (
    *("_member_names_", "_member_map_", "_value2member_map_", "_member_type_", "_unhashable_values_"),
    *("_hashable_values_", "_unhashable_values_map_"),
)
"""Attributes of an enumeration that making it sets, from its members."""
_MEMBER_INNER: Final = ("_value_", "_name_", "__objclass__", "_sort_order_", "_inverted_")
"""The same, of a member."""


def _data(cls: Any, member: Any) -> tuple[Any, ...]:
    """Return the arguments with which the data type of an enumeration, such as `int`, makes this member."""
    kind = cls._member_type_
    if kind.__new__ is object.__new__:
        return ()
    if hasattr(kind, "__getnewargs__"):
        return tuple(kind.__getnewargs__(member))
    if kind.__reduce__ is not object.__reduce__:
        # As those of datetime do.
        return tuple(kind.__reduce__(member)[1])
    return (member._value_,)


def _enum_member(_: Pickler, member: Any) -> Any:
    # Not by its value, which need not be equal to what it becomes on its way.
    cls = type(member)
    return (getattr, (cls, member._name_)) if member._name_ in cls.__members__ else NotImplemented


def _function(pickler: Pickler, function: types.FunctionType) -> Any:
    if function in _EVERYWHERE:
        return NotImplemented
    reduced = pickler.usual(function)
    if reduced is NotImplemented or len(reduced) != 6:
        return reduced
    if function.__code__ is _SINGLE_DISPATCH:
        return _dispatcher(function)
    make, arguments, state, _, _, setter = reduced
    for name, value in _names_in(function.__annotations__, function.__globals__).items():
        state[1]["__globals__"].setdefault(name, value)
    if pickler.home:
        return reduced
    if function.__module__ != "__main__":
        return (*reduced[:5], modules.set_function) if modules.by_value(function) else reduced
    names = _looked_up(function.__code__) if "__main__" in sys.modules else {}
    return make, arguments, (setter, state, names), None, None, script.set_function


def _dispatcher(function: Any) -> Any:
    base = function.__wrapped__
    registered = {kind: each for kind, each in function.registry.items() if each is not base or kind is not object}
    inner = ("registry", "dispatch", "register", "_clear_cache", "__wrapped__")
    attributes = {k: v for k, v in vars(function).items() if k not in inner}
    return classes.make_dispatcher, (base,), (registered, attributes), None, None, classes.set_dispatcher


def _cached(pickler: Pickler, cached: Any) -> Any:
    if _has_name(cached):
        return NotImplemented
    return pickler.by_value(cached, _cached_definition)


def _cached_definition(_: Pickler, cached: Any) -> Any:
    options = cached.cache_parameters()
    make = classes.make_cached, cached.__wrapped__, options["maxsize"], options["typed"]
    return make, dict(vars(cached)), classes.set_cached


def _cached_property(_: Pickler, cached: functools.cached_property[Any]) -> Any:
    # Its lock (Python 3.11) is made anew.
    state = {key: value for key, value in vars(cached).items() if key not in ("lock", "func")}
    return functools.cached_property, (cached.func,), state


def _named(pickler: Pickler, thing: Any) -> Any:
    if _has_name(thing):
        return NotImplemented
    kind = type(thing)
    more = (thing.__supertype__,) if kind is typing.NewType else ()
    return classes.named, (thing.__module__, thing.__name__, kind, thing.__name__, *more)


def _type_variable(_: Pickler, variable: Any) -> Any:
    return (_make_typevar, _decompose_typevar(variable)) if modules.by_value(variable) else NotImplemented


def _stream(_: Pickler, stream: Any) -> Any:
    for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
        # Also one that has been replaced since, by a notebook or a redirection.
        if stream is getattr(sys, name) or getattr(stream, "name", None) == f"<{name}>":
            return getattr, (sys, name)
    return NotImplemented


def _arrow(_: Pickler, data: Any) -> Any:
    """Leave out what a slice of Arrow data does not show: pyarrow pickles the whole that it was cut from."""
    if data.nbytes > 0.9 * data.get_total_buffer_size():
        return NotImplemented
    return arrow.reduce(data)


_BY_KIND: Final[dict[type, Reducer]] = {
    type(functools.lru_cache(lambda: None)): _cached,
    functools.cached_property: _cached_property,
    types.ModuleType: lambda _, module: modules.reduce_module(module),
    types.BuiltinFunctionType: modules.check_builtin,
    typing.TypeVar: _type_variable,
    typing.NewType: _named,
    typing.ParamSpec: _named,
    typing.TypeVarTuple: _named,
    # Of these there must be one.
    type(dataclasses.MISSING): lambda _, sentinel: "MISSING",
    type(dataclasses.KW_ONLY): lambda _, sentinel: "KW_ONLY",
}


# ------------------------------------------------------------------------------------------------ names


def _has_name(thing: Any) -> bool:
    """Return whether the far end finds this by importing its module."""
    if not travels_by_name(thing):
        return False
    found: Any = sys.modules.get(thing.__module__)
    for part in getattr(thing, "__qualname__", thing.__name__).split("."):
        found = getattr(found, part, None)
    return found is thing


def travels_by_name(thing: Any) -> bool:
    """Return whether what its module defines is named in a pickle, for the far end to import; else its code is sent."""
    module = thing.__module__
    registered = cloudpickle.list_registry_pickle_by_value()
    if module == "__main__" or any(module == name or module.startswith(f"{name}.") for name in registered):
        return False
    return not modules.by_value(thing)


def _names_in(annotations: Any, module: Any) -> dict[str, Any]:
    """Return what the names in annotations that are strings mean in a module: types, that is, and other modules."""
    texts = [text for text in (annotations or {}).values() if isinstance(text, str)]
    if not texts:
        return {}
    space = module if isinstance(module, dict) else getattr(sys.modules.get(module), "__dict__", {})
    names = {name for text in texts for name in _NAME.findall(text)}
    found = {name: space[name] for name in sorted(names) if name in space}
    return {name: value for name, value in found.items() if isinstance(value, _ANNOTATING)}


_ANNOTATING: Final = (
    *(type, types.ModuleType, types.GenericAlias, types.UnionType, typing.TypeVar, typing.NewType),
    type(list[int]),
    type(typing.Any),
    type(typing.Optional["int"]),
)
"""What annotations are made of."""


def _looked_up(code: types.CodeType) -> dict[str, Any]:
    """Return what code takes from the script by way of `import __main__`."""
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
