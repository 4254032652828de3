"""Which functions and classes can be pickled alone, apart from the call that uses them.

A function that is pickled alone refers to copies. For example, it uses the global list `seen`, and an argument of the
call is the same list. Pickled together they have one list at the worker, as at the client. Pickled apart they have two.
So such a function has to be pickled with its call. Copies make no difference if nothing changes the originals: numbers
and text, modules, objects that go by name, and functions and classes which in turn refer to such objects only.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import dis
import enum
import fractions
import functools
import logging
import pathlib
import re
import sys
import types
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

_CONSTANT: Final = {
    *(int, float, complex, bool, str, bytes, type(None), type(Ellipsis), type(NotImplemented), range, slice),
    *(datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone, decimal.Decimal),
    *(fractions.Fraction, uuid.UUID, pathlib.PosixPath, pathlib.PurePosixPath, re.Pattern, logging.Logger),
    *(types.ModuleType, types.GenericAlias, types.UnionType),
}
"""Types of objects that nothing changes, or that go by name."""
_DESCRIPTORS: Final = (types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType)
_STORES: Final = {dis.opmap[name] for name in ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF")}

ByName = Callable[[Any], bool]
"""Tells whether a function or a class goes by name."""


class Question:
    """The question whether a function or a class can be pickled alone; for one pickle, or one call of `Parallel`."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], bool]] = {}
        """The answers, by `id`, for as long as what was asked about lives: each task may have a function of its own."""
        self._stored: dict[int, tuple[dict[str, Any], set[str]]] = {}
        """`id` of a module's dictionary → that dictionary, so that no other gets its `id`, and the globals that the
        module's functions set."""

    def ask(self, thing: Any, by_name: ByName) -> bool:
        """Return whether a function, class or cached function that goes by value can be pickled alone."""
        known = self._known.get(id(thing))
        if known is not None:
            return known[1]
        # Functions and classes that refer to one another are gone through once. All of them can be pickled alone, or
        # this one cannot.
        reached: dict[int, Any] = {}
        answer = all(_is_constant(each, by_name) for each in self._reach(thing, reached, by_name))
        if answer:
            # Those that it refers to can be pickled alone as well. If it cannot be, they may nevertheless.
            for each in reached.values():
                self._note(each, True)
        else:
            self._note(thing, False)
        return answer

    def _note(self, thing: Any, answer: bool) -> None:
        """Note an answer, unless it is about a tuple or the like, to which no weak reference can be made."""
        if type(thing) not in (tuple, frozenset):
            self._known[id(thing)] = weakref.ref(thing, functools.partial(self._known.pop, id(thing))), answer

    def _reach(self, thing: Any, reached: dict[int, Any], by_name: ByName) -> Iterator[Any]:
        """Yield the objects, other than functions and classes, to which a thing refers in any number of steps.

        Yield `_CHANGING` in the place of objects that a task may change.
        """
        waiting = [thing]
        while waiting:
            each = waiting.pop()
            if id(each) in reached:
                continue
            reached[id(each)] = each
            known = self._known.get(id(each))
            if known is not None:
                if not known[1]:
                    yield _CHANGING
                continue
            for part in self._parts(each):
                if isinstance(part, type | types.FunctionType | _CACHED):
                    if part is thing or not by_name(part):
                        waiting.append(part)
                elif type(part) in (tuple, frozenset):
                    waiting.append(part)
                else:
                    yield part

    def _parts(self, thing: Any) -> Iterator[Any]:
        if isinstance(thing, type):
            yield from self._parts_of_class(thing)
        elif isinstance(thing, types.FunctionType):
            yield from self._parts_of_function(thing)
        elif isinstance(thing, _CACHED):
            # The content of its cache stays behind.
            yield thing.__wrapped__
        else:
            yield from thing

    def _parts_of_class(self, cls: type) -> Iterator[Any]:
        yield type(cls)
        yield from cls.__bases__
        inner = {"_abc_impl", "_fields", "_field_defaults", "__weakref__"} | set(getattr(cls, "__slots__", ()))
        if issubclass(cls, enum.Enum):
            # Others refer to a member by its name, and to nothing that it consists of.
            inner |= {name for name in vars(cls) if name.startswith("_") or name in cls.__members__}
        for field in vars(cls).get("__dataclass_fields__", {}).values():
            if field.default_factory is not dataclasses.MISSING:
                yield field.default_factory
        for name, value in vars(cls).items():
            if isinstance(value, staticmethod | classmethod):
                yield value.__func__
            elif isinstance(value, property):
                yield from (each for each in (value.fget, value.fset, value.fdel) if each is not None)
            elif isinstance(value, functools.cached_property):
                yield value.func
            elif isinstance(value, types.FunctionType | type | _CACHED) or not (
                name in inner
                or (name.startswith("__") and name.endswith("__"))
                or type(value) in _DESCRIPTORS
                or type(value).__name__ == "_tuplegetter"
            ):
                yield value

    def _parts_of_function(self, function: types.FunctionType) -> Iterator[Any]:
        space = function.__globals__
        names: set[str] = set()
        for code in _codes(function.__code__):
            names.update(code.co_names)
        if self._stores(space) & names or any(
            name in _stored(function.__code__) for name in function.__code__.co_freevars
        ):
            yield _CHANGING
        yield from (space[name] for name in names if name in space)
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:
                continue  # not assigned yet
            # Other functions may share the cell, and set it. So any value in it counts as changing, even a number. But
            # a function, a class or a module in a cell comes from a `def`, `class` or `import`, and is set once.
            yield value if isinstance(value, type | types.FunctionType | types.ModuleType | _CACHED) else _CHANGING
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        yield from vars(function).values()

    def _stores(self, space: dict[str, Any]) -> set[str]:
        """Return the globals of a module that its functions set."""
        known = self._stored.get(id(space))
        if known is not None:
            return known[1]
        stored: set[str] = set()
        for value in list(space.values()):
            for function in [value] if isinstance(value, types.FunctionType) else _functions_of(value):
                if function.__globals__ is space:
                    stored |= _stored(function.__code__)
        self._stored[id(space)] = space, stored
        return stored


_CACHED: Final = type(functools.lru_cache(lambda: None))
_CHANGING: Final = object()
"""Stands for an object that a task may change."""


def _is_constant(value: Any, by_name: ByName) -> bool:
    kind = type(value)
    if kind in _CONSTANT:
        return True
    if kind is types.BuiltinFunctionType:
        return isinstance(value.__self__, types.ModuleType | type)
    module = str(kind.__module__)
    if module == "numpy":
        import numpy as np

        return isinstance(value, np.number | np.bool_ | np.dtype | np.ufunc)
    return module in ("typing", "types") or (isinstance(value, enum.Enum) and by_name(kind))


def _functions_of(value: Any) -> Iterator[types.FunctionType]:
    if isinstance(value, _CACHED):
        value = value.__wrapped__
        if isinstance(value, types.FunctionType):
            yield value
    elif isinstance(value, type) and value.__module__ in sys.modules:
        for each in vars(value).values():
            inner = getattr(each, "__func__", getattr(each, "fget", each))
            if isinstance(inner, types.FunctionType):
                yield inner


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


@functools.lru_cache(4096)
def _stored(code: types.CodeType) -> frozenset[str]:
    """Return the global and closed-over variables that code, and functions within it, set."""
    names: set[str] = set()
    for each in _codes(code):
        operations = each.co_code[::2]
        if any(operation in _STORES for operation in operations):
            for instruction in dis.get_instructions(each):
                if instruction.opcode in _STORES and isinstance(instruction.argval, str):
                    names.add(instruction.argval)
    return frozenset(names)
