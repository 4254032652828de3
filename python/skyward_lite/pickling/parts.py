"""Classes, enumerations and functions with a cache: taken apart by the sender, put together by the far end.

For each kind, the function that takes a thing apart and those that make it again stand side by side. To take one apart
means to return three values:

- what makes the thing, with arguments: `(make_class, metaclass, name, ...)`;
- its state, which is pickled after the thing itself, because it may refer to the thing: a method may name its class;
- what sets the state, once the thing is there.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Final

from . import classes, script

PLAIN_VALUES: Final = (int, float, complex, str, bytes, bool, type(None))
"""Types of the attributes that a class has from the moment when it is made."""

_TYPED_DICT: Final[Any] = getattr(typing, "_TypedDictMeta", None)
"""The metaclass of all of `typing.TypedDict`'s kind."""
_NAME: Final = re.compile(r"[A-Za-z_]\w*")

# ------------------------------------------------------------------------------------------------ classes


def take_class(reduced: Any, _: Any, cls: type) -> Any:
    """Take a class apart. `reduced` is how cloudpickle would pickle it, which is put right here."""
    arguments, attributes = reduced[1], reduced[2][0]
    namespace: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    names = names_in(vars(cls).get("__annotations__"), cls.__module__)
    if issubclass(cls, enum.Enum):
        return _take_enum(cls, attributes, namespace, names)
    namespace.update(arguments[3])
    bases: tuple[Any, ...] = cls.__bases__
    if type(cls) is _TYPED_DICT:
        # Its metaclass takes only the bases that were written in the class statement.
        bases = vars(cls).get("__orig_bases__", bases)
    elif "__orig_bases__" in vars(cls):
        # `typing.Generic` looks for it when the class is made.
        namespace["__orig_bases__"] = attributes.pop("__orig_bases__", vars(cls)["__orig_bases__"])
    # `copyreg` notes this on a class when it pickles an instance. It is no part of the class.
    attributes.pop("__slotnames__", None)
    own = {k for k, v in vars(cls).items() if type(v) is types.MemberDescriptorType and v.__objclass__ is cls}
    for key in own:
        attributes.pop(key, None)
    if "__slots__" in vars(cls):
        slots = attributes.pop("__slots__", None)
        # If it was written as an iterator, that is used up by now.
        namespace["__slots__"] = slots if isinstance(slots, str | tuple | list | dict) else tuple(own)
    abstract = attributes.pop("__abstractmethods__", None)
    for key, value in list(attributes.items()):
        if key.startswith("__") or key == "_abc_impl":
            continue
        if type(value) in PLAIN_VALUES:
            # `__init_subclass__` and metaclasses mostly look at attributes of these types. They may change the
            # attribute, so it is set once more with the others.
            namespace[key] = value
    make = make_class, type(cls), cls.__name__, bases, namespace, abstract
    return make, (attributes, names), set_class


def make_class(
    metaclass: Any, name: str, bases: tuple[Any, ...], namespace: dict[str, Any], abstract: frozenset[str] | None
) -> type:
    """Return a class without its functions, of which `abstract` are abstract.

    At the client, `__init_subclass__` and the metaclass have run when the class was made. If they travel by value, what
    they did to the class and to themselves is in what was sent, so they do not run again. Nor does an
    `__init_subclass__` run that needs arguments of the class statement: these are not known any more.
    """
    family = [each for base in bases for each in getattr(base, "__mro__", ())]
    hooked = next((each for each in family if "__init_subclass__" in vars(each) and each is not object), None)
    kind = next(each for each in metaclass.__mro__ if not classes.travels(each))

    def new() -> Any:
        if kind is metaclass:
            return types.new_class(name, bases, {"metaclass": metaclass}, lambda space: space.update(namespace))
        return kind.__new__(metaclass, name, types.resolve_bases(bases), dict(namespace))

    def bare() -> Any:
        return type.__new__(metaclass, name, bases, dict(namespace))

    ways: list[tuple[Callable[[], Any], bool]] = [
        (new, hooked is not None and classes.travels(hooked)),
        (new, True),
        (bare, True),
    ]
    for number, (way, silent) in enumerate(ways):
        try:
            with _silenced(hooked if silent else None):
                made = way()
            break
        except Exception:
            # The hook or the metaclass misses arguments, or an attribute that the class does not have yet.
            if number == len(ways) - 1:
                raise
    if abstract is not None:
        type.__setattr__(made, "__abstractmethods__", abstract)
    return made  # type: ignore[no-any-return]


@contextlib.contextmanager
def _silenced(hooked: type | None) -> Iterator[None]:
    """Replace a class's `__init_subclass__` by one that does nothing, until the block is left."""
    if hooked is None:
        yield
        return
    with classes.building_lock():
        hook = vars(hooked)["__init_subclass__"]
        type.__setattr__(hooked, "__init_subclass__", classmethod(lambda cls, **_: None))
        try:
            yield
        finally:
            type.__setattr__(hooked, "__init_subclass__", hook)


def set_class(cls: type, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Set the attributes of a class, and enter the names that its annotations use into the script."""
    attributes, names = state
    registered = attributes.pop("_abc_impl", ())
    for name, value in attributes.items():
        type.__setattr__(cls, name, value)
    if "__firstlineno__" in attributes:
        # Setting other attributes removes it (Python 3.13).
        type.__setattr__(cls, "__firstlineno__", attributes["__firstlineno__"])
    for subclass in registered:
        cls.register(subclass)  # type: ignore[attr-defined]
    script.enter_all(names)


# ------------------------------------------------------------------------------------------------ enumerations

_ENUM_INNER: Final = (
    *("_member_names_", "_member_map_", "_value2member_map_", "_member_type_", "_unhashable_values_"),
    *("_hashable_values_", "_unhashable_values_map_"),
)
"""Attributes of an enumeration that are set from its members when it is made."""
_MEMBER_INNER: Final = ("_value_", "_name_", "__objclass__", "_sort_order_", "_inverted_")
"""The same, of a member."""


def _take_enum(cls: Any, attributes: dict[str, Any], namespace: dict[str, Any], names: dict[str, Any]) -> Any:
    """Take an enumeration apart. Its members become part of what makes it."""
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
    make = make_enum, type(cls), cls.__name__, cls.__bases__, namespace, options, members
    return make, (attributes, names, states), set_enum


def _data(cls: Any, member: Any) -> tuple[Any, ...]:
    """Return the arguments with which the data type of an enumeration, such as `int`, makes this member."""
    kind = cls._member_type_
    if kind.__new__ is object.__new__:
        return ()
    if hasattr(kind, "__getnewargs__"):
        return tuple(kind.__getnewargs__(member))
    if kind.__reduce__ is not object.__reduce__:
        # As the types of datetime do it.
        return tuple(kind.__reduce__(member)[1])
    return (member._value_,)


def make_enum(
    metaclass: Any,
    name: str,
    bases: tuple[Any, ...],
    namespace: dict[str, Any],
    options: dict[str, Any],
    members: list[tuple[str, Any, tuple[Any, ...]]],
) -> Any:
    """Return an enumeration with its members, aliases and named composites.

    `members` has for each its name, its value and the arguments of its data type. The enumeration's own `__new__` and
    `__init__` do not run, because the arguments with which they ran are not known any more. What they have set is in
    the state.
    """
    values = {index: (value, data) for index, (_, value, data) in enumerate(members)}

    def new(cls: Any, index: Any, *_: Any) -> Any:
        # If the data type is a tuple, the index comes in a tuple.
        value, data = values[index[0] if isinstance(index, tuple) else index]
        kind = cls._member_type_
        made = object.__new__(cls) if kind.__new__ is object.__new__ else kind.__new__(cls, *data)
        made._value_ = value
        return made

    space = metaclass.__prepare__(name, bases)
    for key, value in namespace.items():
        space[key] = value
    space["__new__"] = new
    space["__init__"] = lambda self, *_: None
    for index, (member_name, _, _) in enumerate(members):
        space[member_name] = index
    made = metaclass(name, bases, space, **options)
    for key in ("__new_member__", "__init__"):
        with contextlib.suppress(AttributeError):
            type.__delattr__(made, key)
    return made


def set_enum(cls: Any, state: tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]) -> None:
    """Set the attributes of an enumeration and of its members."""
    attributes, names, members = state
    set_class(cls, (attributes, names))
    for name, values in members.items():
        vars(cls._member_map_[name]).update(values)


# ------------------------------------------------------------------------------------------------ functions


def reduce_dispatcher(function: Any) -> Any:
    """Return how a function is pickled that `functools.singledispatch` made."""
    base = function.__wrapped__
    registered = {kind: each for kind, each in function.registry.items() if each is not base or kind is not object}
    inner = ("registry", "dispatch", "register", "_clear_cache", "__wrapped__")
    attributes = {k: v for k, v in vars(function).items() if k not in inner}
    return make_dispatcher, (base,), (registered, attributes), None, None, set_dispatcher


def make_dispatcher(function: Any) -> Any:
    """Return a function as `functools.singledispatch` makes it, with nothing registered."""
    return functools.singledispatch(function)


def set_dispatcher(dispatcher: Any, state: tuple[dict[Any, Any], dict[str, Any]]) -> None:
    """Register the functions that were registered at the client, and set the attributes."""
    registered, attributes = state
    for kind, function in registered.items():
        dispatcher.register(kind, function)
    vars(dispatcher).update(attributes)
    script.enter(dispatcher)


def take_cached(_: Any, cached: Any) -> Any:
    """Take a function apart that has a cache of `functools.lru_cache`. The cache's content stays behind."""
    options = cached.cache_parameters()
    make = make_cached, cached.__wrapped__, options["maxsize"], options["typed"]
    return make, dict(vars(cached)), set_cached


def make_cached(function: Any, maxsize: int | None, typed: bool) -> Any:
    """Return a function with an empty cache, as `functools.lru_cache` makes it."""
    return functools.lru_cache(maxsize, typed)(function)


def set_cached(cached: Any, state: dict[str, Any]) -> None:
    """Set the attributes of a function with a cache."""
    vars(cached).update(state)


# ------------------------------------------------------------------------------------------------ names


def named(module: str, name: str, make: Callable[..., Any], *args: Any) -> Any:
    """Return the object that a module has under a name, if it is of the type that `make` makes; else make it.

    For objects that pickle by their name alone, as `typing.NewType` does.
    """
    known = getattr(sys.modules.get(module), name, None)
    if isinstance(make, type) and type(known) is make:
        return known
    made = make(*args)
    made.__module__ = module
    script.enter(made)
    return made


_ANNOTATING: Final = (
    *(type, types.ModuleType, types.GenericAlias, types.UnionType, typing.TypeVar, typing.NewType),
    type(list[int]),
    type(typing.Any),
    type(typing.Optional["int"]),
)
"""Types of the objects that annotations are made of."""


def names_in(annotations: Any, module: Any) -> dict[str, Any]:
    """Return the types and modules that a module has under the names in annotations that are strings.

    `module` is its name or its dictionary.
    """
    texts = [text for text in (annotations or {}).values() if isinstance(text, str)]
    if not texts:
        return {}
    space = module if isinstance(module, dict) else getattr(sys.modules.get(module), "__dict__", {})
    names = {name for text in texts for name in _NAME.findall(text)}
    found = {name: space[name] for name in sorted(names) if name in space}
    return {name: value for name, value in found.items() if isinstance(value, _ANNOTATING)}
