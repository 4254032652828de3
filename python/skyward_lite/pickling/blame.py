"""What an error is about: the call that raised it, or the value that cannot be pickled and the path to it."""

from __future__ import annotations

import functools
import pickle
import reprlib
import time
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from ..errors import PayloadTooLargeError
from . import payload
from .batches import Calls
from .exceptions import Place
from .streams import Triple

MAX_TRIALS: Final = 2_000
"""Values that are tried, one by one, in the search for the one that cannot be pickled."""
MAX_SEARCH_SECONDS: Final = 5.0
"""Bound on that search."""
MAX_CALL_CHARACTERS: Final = 200
"""Characters of a call in a note."""

Part = tuple[str, Any]
"""A value, and before it how it is reached from the value that it is a part of: `.name`, `[0]`, "argument 0 of f"."""

MAX_REPR_SECONDS: Final = 0.5
"""After this time no further argument's own repr is asked for: one of them may read a database."""


class _Repr(reprlib.Repr):
    """Short reprs on one line: of arrays and tables the shape, of other objects their own."""

    def __init__(self) -> None:
        super().__init__()
        self.maxother = self.maxstring = 60
        self.until = float("inf")
        """The time from which on values are named by their class."""

    def repr1(self, value: Any, level: int) -> str:
        # Not by `type(value).__name__`, as reprlib does: a class of the user's may be called "list".
        if type(value).__module__ in ("builtins", "collections", "array"):
            return super().repr1(value, level)
        return self.repr_instance(value, level)

    def repr_instance(self, value: Any, level: int) -> str:
        kind = type(value)
        shape = getattr(kind, "shape", None) and getattr(value, "shape", None)
        if isinstance(shape, tuple) and shape:
            dtype = getattr(value, "dtype", None)
            return f"<{kind.__name__} {' × '.join(map(str, shape))}{'' if dtype is None else f' {dtype}'}>"
        if time.monotonic() > self.until:
            return f"<{kind.__name__}>"
        return " ".join(super().repr_instance(value, level).split())


_repr = _Repr()

# ------------------------------------------------------------------------------------------------ which call


def place(node: str, kind: int, call: Any, position: int) -> Place:
    """Return where an exception was raised: in this call, or in the call at this position of a batch."""
    if kind == payload.BATCH and call is not None:
        # An exception that comes from outside may come just after the last call.
        call = call.current if isinstance(call, Calls) else call[min(position, len(call) - 1)]
    return Place(node, position if kind == payload.BATCH else None, "" if call is None else shown(call))


def place_of_result(error: Exception, node: str, kind: int, call: Any, value: Any, encoder: payload.Encoder) -> Place:
    """Return which call has a result that cannot be sent, and write that into the error's text."""
    before = "the result cannot be sent: "
    if kind != payload.BATCH:
        explain(error, [("the result", value)], encoder, before)
        return place(node, kind, call, 0)
    search = _Search(encoder)
    position = next((number for number, each in enumerate(value) if search.fails(each)), None)
    if position is None:
        # Each result can be sent alone, but not all of them together.
        explain(error, [], encoder, before)
        return Place(node, None, f"the results of {len(value)} calls")
    explain(error, [("the result", value[position])], encoder, before)
    known = not isinstance(call, Calls)
    return Place(node, position, shown(call[position]) if known else "its result")


def shown(call: Triple) -> str:
    """Return a call as it is written, shortened. Never raises."""
    try:
        function, args, kwargs = call
        short = _Repr()
        short.until = time.monotonic() + MAX_REPR_SECONDS
        parts = [*map(short.repr, args), *(f"{name}={short.repr(value)}" for name, value in kwargs.items())]
        text = f"{_name(function)}({', '.join(parts)})"
    except BaseException:
        return "a call that cannot be shown"
    return text if len(text) <= MAX_CALL_CHARACTERS else f"{text[:MAX_CALL_CHARACTERS]}…"


def _name(function: Any) -> str:
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None)
    if not isinstance(name, str):
        name = type(function).__qualname__
    name = name.rpartition("<locals>.")[2]
    # A compute function `f` sends its method `f.local`.
    return name if name == "local" else name.removesuffix(".local")


# ------------------------------------------------------------------------------------------------ which value


def explain(error: Exception, parts: Iterable[Part], encoder: payload.Encoder, before: str = "") -> None:
    """Write into the text of a pickling error which value it is about: the first part that cannot be pickled alone."""
    if not (len(error.args) == 1 and isinstance(error.args[0], str)):
        return
    path = "" if isinstance(error, PayloadTooLargeError) else _Search(encoder).path(parts)
    error.args = (f"{before}{error.args[0]}{f' ({path})' if path else ''}",)


def of_calls(calls: Sequence[Triple]) -> Iterator[Part]:
    """Yield the parts of calls: their functions and arguments."""
    for function, args, kwargs in calls:
        name = _name(function)
        yield f"the function {name}", function
        for number, value in enumerate(args):
            yield f"argument {number} of {name}", value
        for key, value in kwargs.items():
            yield f"argument {key!r} of {name}", value


_CONTINUES: Final = (".", "[")
"""First characters of a label that continues the label before: "argument 0 of f" and ".args[0]"."""


class _Search:
    """Finds what cannot be pickled: of a value that cannot be, it tries the parts, and then the parts' parts."""

    def __init__(self, encoder: payload.Encoder) -> None:
        self._limit, self._route = encoder.limit, encoder.route
        self._until = time.monotonic() + MAX_SEARCH_SECONDS
        self._trials = 0
        self._seen: set[int] = set()
        """The `id`s of the values that were tried."""

    def path(self, parts: Iterable[Part]) -> str:
        """Return the way to the innermost part that fails; an empty text if no part fails alone."""
        way, before = "", ""
        while (bad := next((part for part in parts if self.fails(part[1])), None)) is not None:
            label, value = bad
            if before.startswith("the function ") and not label.startswith(_CONTINUES):
                # This label, as "global 'x' of f", has the function's name, too.
                way = label
            else:
                continues = before.startswith(_CONTINUES) and label.startswith(_CONTINUES)
                way += label if continues or not way else f", {label}"
            before = label
            parts = _parts(value)
        return way

    def fails(self, value: Any) -> bool:
        """Return whether a value cannot be pickled; False for a value that was tried before, or when time is up."""
        if id(value) in self._seen or self._trials >= MAX_TRIALS or time.monotonic() > self._until:
            return False
        self._seen.add(id(value))
        self._trials += 1
        try:
            payload.Encoder(self._limit, self._route).dumps(value)
        except PayloadTooLargeError:
            return False
        except Exception:
            return True
        return False


def _parts(value: Any) -> Iterator[Part]:
    """Yield the values that are pickled with a value."""
    if isinstance(value, types.FunctionType):
        yield from _parts_of_function(value)
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
        yield ".__func__", value.__func__
    elif isinstance(value, functools.partial):
        yield ".func", value.func
        yield from ((f".args[{number}]", each) for number, each in enumerate(value.args))
        yield from ((f".keywords[{key!r}]", each) for key, each in value.keywords.items())
    elif isinstance(value, dict):
        yield from ((f"[{_repr.repr(key)}]", each) for key, each in value.items())
        yield from ((f"key {_repr.repr(key)}", key) for key in value)
    elif isinstance(value, list | tuple):
        yield from ((f"[{number}]", each) for number, each in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield from (("an element", each) for each in value)
    elif isinstance(value, type):
        yield from ((f".{name}", each) for name, each in vars(value).items() if name not in ("__dict__", "__weakref__"))
    else:
        yield from _parts_of_object(value)


def _parts_of_function(function: types.FunctionType) -> Iterator[Part]:
    code, name = function.__code__, _name(function)
    for variable in code.co_names:
        if variable in function.__globals__:
            yield f"global {variable!r} of {name}", function.__globals__[variable]
    for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"{variable!r} in the closure of {name}", cell.cell_contents
        except ValueError:
            continue  # not assigned yet
    for number, default in enumerate(function.__defaults__ or ()):
        yield f"default {number} of {name}", default
    for key, default in (function.__kwdefaults__ or {}).items():
        yield f"default of {key!r} of {name}", default
    yield from ((f".{key}", each) for key, each in vars(function).items())
    for constant in code.co_consts:
        # The globals of functions that are defined within it.
        if isinstance(constant, types.CodeType):
            for variable in constant.co_names:
                if variable in function.__globals__:
                    yield f"global {variable!r} of {name}", function.__globals__[variable]


def _parts_of_object(value: Any) -> Iterator[Part]:
    try:
        reduced = value.__reduce_ex__(5)
    except (Exception, pickle.PicklingError):
        return
    if not isinstance(reduced, tuple):
        return
    _, args, state, items, pairs = (*reduced[:5], None, None, None, None)[:5]
    for each in args or ():
        if each is not type(value):
            yield "what it is made from", each
    states = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    for each in states:
        if isinstance(each, dict):
            yield from ((f".{key}", inner) for key, inner in each.items())
        elif each is not None:
            yield "its state", each
    yield from ((f"[{number}]", each) for number, each in enumerate(items or ()))
    yield from ((f"[{_repr.repr(key)}]", each) for key, each in pairs or ())
