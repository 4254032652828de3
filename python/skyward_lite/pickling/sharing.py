"""Which calls of a batch have something in common that can change, so that each needs a pickle of its own."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, Final

from .streams import Triple

MAX_LOOKED_AT: Final = 32
"""Calls with a larger container as an argument have a pickle each: to look at all of its elements would take longer."""

MAX_DEPTH: Final = 4
"""Calls with tuples that are nested deeper have a pickle each, too: a tuple that is in many others would be looked at
in each of them."""

_UNCHANGING: Final[set[type]] = {int, float, complex, bool, str, bytes, type(None), range, types.FunctionType, type}
"""Types of values that cannot change, or that calls share by design. NumPy's types of numbers are added when they are
met."""
_CONTAINERS: Final = (list, dict, set, bytearray)


def are_constants(calls: Sequence[Triple]) -> bool:
    """Return whether all arguments are numbers, text and the like, so that functions share nothing with them."""
    seen: set[int] = set()
    values = (value for _, args, kwargs in calls for value in (*args, *kwargs.values()))
    return (
        all(
            type(value) is not types.FunctionType and not isinstance(value, type) and _is_own(value, seen)
            for value in values
        )
        and not seen
    )


def share_nothing(calls: Sequence[Triple]) -> bool:
    """Return whether no two calls have the same object that could change, so that one pickle for all is right.

    An object of a type that is not known here counts as shared.
    """
    seen: set[int] = set()
    for function, args, kwargs in calls:
        if type(function) is not types.FunctionType and not (callable(function) and _is_own(function, seen)):
            return False
        for value in args:
            if type(value) not in _UNCHANGING and not _is_own(value, seen):
                return False
        for value in kwargs.values():
            if not _is_own(value, seen):
                return False
    return True


def _is_own(value: Any, seen: set[int], depth: int = 0) -> bool:
    """Return whether a value cannot change, or was not seen before. Note it as seen.

    `depth` is the number of tuples around it.
    """
    kind = type(value)
    if kind in _UNCHANGING:
        return True
    if kind is tuple or kind is frozenset:
        if len(value) > MAX_LOOKED_AT or depth == MAX_DEPTH:
            return False
        return _UNCHANGING.issuperset(map(type, value)) or all(_is_own(each, seen, depth + 1) for each in value)
    if kind in _CONTAINERS:
        if id(value) in seen or len(value) > MAX_LOOKED_AT:
            return False
        seen.add(id(value))
        if kind is dict and not all(_is_own(each, seen) for each in value.values()):
            return False
        return kind is bytearray or all(_is_own(each, seen) for each in value)
    if kind is types.BuiltinFunctionType:
        # A method, such as a list's `append`, has its object.
        return isinstance(value.__self__, types.ModuleType)
    if kind.__module__ != "numpy":
        return False
    import numpy as np

    if kind is np.ndarray:
        # Views of the same memory are different objects, and each is rebuilt as an array of its own.
        new = id(value) not in seen and not value.dtype.hasobject
        seen.add(id(value))
        return new
    if issubclass(kind, np.number | np.bool_):
        _UNCHANGING.add(kind)
    return kind in _UNCHANGING
