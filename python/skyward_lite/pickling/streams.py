"""Large arguments and functions apart from the rest of their call.

A call is one pickle, unless it has a list of a million texts, say, or a data frame with a column of objects, whose own
pickle is large. Each such value is pickled first, as a stream of its own that travels beside the pickle, and the call
last, by the same pickler: it keeps its memo, so that the call refers to objects of the streams rather than to copies.
One unpickler reads them in the same order.

A value has the same stream in each call that has it, whatever the call's other arguments are. So the core sends the
stream to a node once. Of several large values, a stream after the first one depends on the streams before it, to whose
objects it may refer. They are written in the order in which their contents were first met: with `f(X, y)` for one `X`
and many a `y`, at the latest from the second call on `X` comes first. Lists, tuples and dictionaries of numbers and
texts come before all others, and depend on nothing (flat.py).

Large texts travel beside the pickle as they are.
"""

from __future__ import annotations

import functools
import io
import itertools
import operator
import pickle
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from .classes import RecentlyUsed
from .flat import MAX_FLAT, Flats, prefix
from .pickler import Functions, Pickler

Triple = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""A call: function, arguments, keyword arguments."""
IsInPickle = Callable[[pickle.PickleBuffer], bool]
"""Tells, as pickle's `buffer_callback`, whether a buffer stays inside the pickle."""

OUT_OF_BAND_BYTES: Final = 16 * 1024
"""A buffer of at least so many bytes travels beside the pickle. A smaller one stays inside: one copy of it is cheaper
than one more allocation."""
MAX_BUFFERS: Final = 1000
"""Buffers beside one pickle; further ones stay inside it. A message has at most `_core.MAX_PARTS`."""
APART_BYTES: Final = 64 * 1024
"""A value with a pickle of at least so many bytes is pickled apart, and a text of at least so many travels as it is."""
MIN_ELEMENTS: Final = 8192
"""A container of at least so many elements is taken for large before it is pickled."""
MAX_LEARNED: Final = 256
"""Types that are taken for large because a value of theirs was. A program with more makes classes as it goes."""

# ------------------------------------------------------------------------------------------------ what is large


def _is_long_text(text: str | bytes) -> bool:
    return len(text) >= APART_BYTES


def _is_long(container: Any) -> bool:
    return len(container) >= MIN_ELEMENTS


def _has_many_objects(array: Any) -> bool:
    return bool(array.dtype.hasobject) and array.size >= MIN_ELEMENTS


def _is_large(_: Any) -> bool:
    return True


_tests: Final[dict[type, Callable[[Any], bool]]] = {
    **dict.fromkeys((str, bytes, bytearray), _is_long_text),
    **dict.fromkeys((list, tuple, dict, set, frozenset), _is_long),
}
"""What tells whether a value of a type is probably large. A type without such a test has values that probably are not.

Types are added when one of their values turned out to be large."""
_OF_ANY_SIZE: Final = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
"""Types of which one large value tells nothing about the others."""
_first_met = RecentlyUsed()
"""The contents of streams, by hash and length, with the order in which they were first met."""
_order = itertools.count(1)


def seem_large(values: Iterable[Any]) -> bool:
    """Return whether one of the values is probably large, by its type and its length."""
    for value in values:
        test = _tests.get(type(value))
        if test is not None and test(value):
            return True
    return False


def _may_be_large(value: Any) -> bool:
    """Return whether the pickle of a value may be large."""
    kind = type(value)
    if kind.__module__ == "numpy" and kind.__name__ == "ndarray":
        # Its elements are beside the pickle, unless they are objects.
        return bool(value.dtype.hasobject)
    return kind not in (int, float, bool, type(None))


def weight(value: Any) -> int:
    """Return the bytes of the texts in a value of a type that calls need not share, containers included."""
    kind = type(value)
    if kind in (str, bytes, bytearray):
        return len(value)
    if kind is dict:
        return sum(map(weight, value)) + sum(map(weight, value.values()))
    return sum(map(weight, value)) if kind in (list, tuple, set, frozenset) else 0


def _learn(value: Any) -> None:
    """Note that values of this type may be large."""
    kind = type(value)
    if kind not in _tests and len(_tests) < MAX_LEARNED and kind not in _OF_ANY_SIZE:
        is_array = kind.__module__ == "numpy" and kind.__name__ == "ndarray"
        _tests[kind] = _has_many_objects if is_array else _is_large


def _place(stream: bytes) -> int:
    """Return the place of a stream among all that were met, by the time when its content was first met."""
    key = hash(stream), len(stream)
    place = _first_met.find(key)
    if place is None:
        place = next(_order)
        _first_met.remember(key, place)
    return int(place)


class Beside:
    """A large text, which pickles as its bytes beside the pickle. Every call gets a text of its own."""

    def __init__(self, text: str | bytes) -> None:
        self._text = text

    def __reduce__(self) -> Any:
        text = self._text
        if isinstance(text, bytes):
            return bytes, (pickle.PickleBuffer(text),)
        return str, (pickle.PickleBuffer(text.encode("utf-8", "surrogatepass")), "utf-8", "surrogatepass")


def beside(value: Any) -> Any:
    """Return a value as it is pickled: a large text beside the pickle."""
    return Beside(value) if type(value) in (bytes, str) and len(value) >= APART_BYTES else value


def beside_once() -> Callable[[Any], Any]:
    """Return a function like `beside` for the arguments of one call: a text that the call has twice travels once."""
    seen: dict[int, Any] = {}

    def once(value: Any) -> Any:
        found = seen.get(id(value))
        if found is None:
            found = beside(value)
            if found is not value:
                seen[id(value)] = found
        return found

    return once


def result_beside(value: Any, is_batch: bool) -> Any:
    """Return a result as it is pickled: a large text beside the pickle. Of a batch `value` has the calls' values."""
    if not is_batch:
        return beside(value)
    if any(type(each) in (bytes, str) and len(each) >= APART_BYTES for each in value):
        return list(map(beside_once(), value))
    return value


# ------------------------------------------------------------------------------------------------ writing


Written = tuple[list[bytes], int, bytes, list[pickle.PickleBuffer]]
"""A call: the streams of its large values, how many of these are flat containers' (which come first), its own pickle,
and the buffers beside all of them, in the same order. A plain tuple: every call of a batch has one.
"""


class Writer:
    """Pickles calls, each with its large values apart.

    `make` makes the pickler, and `light` returns what is pickled in the place of an argument. `known` are functions
    that were pickled before, and how, `flats` containers that were. `fits` tells whether so many buffers beside a call,
    and this one, are not too many.
    """

    def __init__(
        self,
        make: Callable[[io.BytesIO, IsInPickle], Pickler],
        light: Callable[[Any], Any] = beside,
        known: Functions | None = None,
        flats: Flats | None = None,
        fits: Callable[[int, memoryview], bool] = lambda count, _: count < MAX_BUFFERS,
    ) -> None:
        self._file = io.BytesIO()
        # As they come: CPython 3.11 crashes when it collects a PickleBuffer of a PickleBuffer's memoryview in a cycle.
        self._buffers: list[pickle.PickleBuffer] = []
        self._light = light
        self._known = known or {}
        self._flats = flats or Flats()
        self._fits = fits
        self._memo: dict[int, tuple[int, Any]] = {}
        """The flat containers of the call that is being written, as a pickler's memo has them."""
        self.pickler = make(self._file, self._is_in_pickle)

    def close(self) -> None:
        """Drop the pickler, which refers to what calls it. Nothing can be written any more."""
        del self.pickler

    def _is_in_pickle(self, buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND_BYTES or not self._fits(len(self._buffers), view):
            return True
        self._buffers.append(buffer)
        return False

    def write_call(self, call: Triple) -> Written:
        """Return a call, with the large values apart if there are any. Raise what pickling it raises."""
        function, args, kwargs = call
        self._memo = {}
        args = tuple(map(self._light, args))
        if kwargs:
            kwargs = {name: self._light(value) for name, value in kwargs.items()}
        if not seem_large(args) and not (kwargs and seem_large(kwargs.values())):
            self._restart()
            pickled = self._write((function, args, kwargs))
            if len(pickled) < APART_BYTES:
                return [], 0, pickled, self._buffers
        values = {id(value): value for value in (function, *args, *kwargs.values()) if not self._is_known(value)}
        flats = self._write_flat(values)
        others = self._write_apart(list(filter(_may_be_large, values.values())))
        return [*flats, *others], len(flats), self._write((function, args, kwargs)), self._buffers

    def _write_flat(self, values: dict[int, Any]) -> list[bytes]:
        """Return the streams of the flat containers that are large, and remove these from `values`."""
        streams: list[bytes] = []
        self._memo = {}
        for key, value in list(values.items()):
            stream = self._flats.stream(value, APART_BYTES) if len(streams) < MAX_FLAT else None
            if stream is not None:
                self._memo[key] = len(streams), value
                streams.append(stream)
                del values[key]
        return streams

    def _write_apart(self, values: list[Any]) -> list[bytes]:
        """Return the streams of the values that are large. The pickler then has the memo of these."""
        # Those that seem large come last: mostly there is one, and the pickler can go on from its stream.
        last, apart = None, []
        for value in sorted(values, key=lambda value: seem_large((value,))):
            self._restart()
            last = self._write(value)
            if len(last) >= APART_BYTES:
                _learn(value)
                apart.append((_place(last), last, value))
        if len(apart) == 1 and apart[0][1] is last:
            return [last]
        apart.sort(key=operator.itemgetter(0))
        self._restart()
        return [self._write(value) for *_, value in apart]

    def _is_known(self, value: Any) -> bool:
        """Return whether a value is a function that was pickled before."""
        # Not by going through all of them, which other threads may add to.
        known = self._known.get(id(value))
        return known is not None and known[1] is not None

    def _restart(self) -> None:
        """Forget what was written, but for the flat containers: what comes next must see nothing of it."""
        pickler = self.pickler
        pickler.clear_memo()
        if self._memo:
            pickler.memo = self._memo
        pickler.bare.clear()
        if pickler.globals_ref:
            pickler.globals_ref = {}
        self._buffers = []

    def _write(self, value: Any) -> bytes:
        file = self._file
        file.seek(0)
        file.truncate()
        self.pickler.dump(value)
        return file.getvalue()


class Apart:
    """A call whose large values are pickled apart. Pickles as the call."""

    def __init__(self, written: Written) -> None:
        streams, flats, pickled, buffers = written
        self._reduced = rebuild, (list(map(pickle.PickleBuffer, streams)), flats, pickled, buffers)

    def __reduce__(self) -> Any:
        return self._reduced


# ------------------------------------------------------------------------------------------------ reading


def rebuild(streams: Sequence[Any], flats: int, pickled: bytes | memoryview, buffers: Iterable[Any]) -> Any:
    """Return the call whose large values are in the streams, flat containers in the first so many."""
    others = *streams[flats:], pickled
    if flats:
        others = prefix(flats), *others
    unpickler = _Unpickler(_Reader(others), buffers=buffers)
    unpickler.flats = list(map(pickle.loads, streams[:flats]))
    for _ in others[1:]:
        # Its objects are in the memo, where the streams after it and the call find them.
        unpickler.load()
    return unpickler.load()


class _Unpickler(pickle.Unpickler):
    flats: list[Any]
    """The call's flat containers; set before anything is read."""

    def persistent_load(self, number: int) -> Any:
        return self.flats[number]


class _Reader:
    """A file of several streams, one after the other, for an unpickler that reads as many bytes as it needs."""

    def __init__(self, streams: Sequence[Any]) -> None:
        self._views: Iterator[memoryview] = iter([memoryview(each) for each in streams])
        self._view = memoryview(b"")

    def read(self, count: int) -> bytes:
        return bytes(self._take(count))

    def readinto(self, target: Any) -> int:
        taken = self._take(len(target))
        target[: len(taken)] = taken
        return len(taken)

    def readline(self) -> bytes:
        raise pickle.UnpicklingError("a stream of protocol 5 has no lines")

    def _take(self, count: int) -> memoryview:
        if not self._view:
            self._view = next(self._views, self._view)
        taken, self._view = self._view[:count], self._view[count:]
        return taken
