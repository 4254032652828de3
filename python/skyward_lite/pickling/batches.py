"""Batches of calls to bytes and back: each call gets arguments of its own, and functions are pickled once.

If one pickle had all calls of a batch, two calls that have the same list as an argument would share one list at the
worker, and see each other's changes. With a pickle for each call, every pickle would have the function. So there are
three ways, from the fastest to the most careful:

- The calls have nothing in common that can change: one pickle has them all.
- Otherwise each call has a pickle of its own (`_SeparateCalls`), in which functions, classes and large texts stand by
  their numbers. All calls of the batch share these, and the memory of large arrays that they have in common.
- The functions are pickled once for all batches of one call of `Parallel` (`Shared`).
"""

from __future__ import annotations

import io
import pickle
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any, Final

from .. import _core
from . import modules, payload
from .payload import MAX_BUFFERS, OUT_OF_BAND_BYTES, Encoded, Encoder, Loads, Triple
from .pickler import Pickler, Shared
from .route import Route

MAX_FUNCTION_BYTES: Final = 64 * 1024
"""A function with a larger pickle is pickled anew for each batch."""
MAX_FUNCTIONS: Final = 128
"""At most this many functions are remembered per call of `Parallel`. If every task brings a function of its own, there
is nothing to gain."""
MAX_LOOKED_AT: Final = 32
"""Calls with a larger container as an argument have a pickle each: to look at all of its elements would take longer."""

_UNCHANGING: Final[set[type]] = {int, float, complex, bool, str, bytes, type(None), range, types.FunctionType, type}
"""Types of values that cannot change, or that calls share by design. NumPy's types of numbers are added when they are
met."""
_CONTAINERS: Final = (list, dict, set, bytearray)
_SMALL: Final = {int, float, complex, bool, str, bytes, type(None)}


def is_small(calls: Sequence[Triple], shared: Shared) -> bool:
    """Return whether this is one call, of a function that was pickled before, with numbers and text as arguments.

    So are most calls of a program that makes very many.
    """
    if len(calls) != 1:
        return False
    function, args, kwargs = calls[0]
    known = shared.functions.get(id(function))
    return known is not None and known[1] is not None and not kwargs and _SMALL.issuperset(map(type, args))


def dump(
    encoder: Encoder,
    calls: Sequence[Triple],
    shared: Shared | None = None,
    threads: int | None = None,
    nanos: int | None = None,
) -> Encoded:
    """Pickle the calls of a batch so that each gets its own arguments, whatever other calls are in the batch.

    Functions, classes and values that cannot change are shared, by all batches with the same `shared`. For `threads`
    and `nanos` see `payload.BATCH`.
    """
    known = None
    if shared is not None:
        known = shared.functions
        apart = False
        for function, _, _ in calls:
            if id(function) not in known:
                if id(function) not in shared.all:
                    _remember(encoder, function, shared)
                apart = True
        if apart and _are_constants(calls):
            known = shared.all
    batch: Any = calls if len(calls) == 1 or _share_nothing(calls) else _SeparateCalls(calls, encoder.route, shared)
    batch = batch if threads is nanos is None else (threads, nanos, batch)
    return encoder.dumps(modules.with_path(batch), shared, len(calls), known)


def _remember(encoder: Encoder, function: Any, shared: Shared) -> None:
    """Note in `shared` how later batches shall pickle a function: by name, or as it is now.

    So a global or a closed-over variable that changes afterwards is not sent again. Nothing is noted for functions of
    other kinds, such as bound methods.
    """
    if len(shared.all) >= MAX_FUNCTIONS:
        return
    by_itself = True
    reduced: Any = None
    if isinstance(function, types.FunctionType):
        pickled, buffers = encoder.dumps(function, shared)
        if b"cloudpickle" not in pickled and b"skyward_lite" not in pickled:
            reduced = function.__qualname__
        elif buffers is None and len(pickled) <= MAX_FUNCTION_BYTES:
            reduced = (rebuild_function, (pickled,))
            by_itself = encoder.is_alone(function, shared)
    elif isinstance(function, types.BuiltinFunctionType) and isinstance(function.__self__, types.ModuleType):
        reduced = function.__qualname__
    else:
        return
    shared.all[id(function)] = (function, reduced)
    if by_itself:
        shared.functions[id(function)] = (function, reduced)


def rebuild_function(pickled: bytes) -> Any:
    """Rebuild a function, anew for each task: each has captured variables of its own."""
    return pickle.loads(pickled)


# ------------------------------------------------------------------------------------------------ a pickle each

_local = threading.local()
"""`shared`: the values that the calls of a batch share, while the pickle of one of them is read."""


class Calls:
    """The calls of a batch, as the worker reads them: each when it is its turn. Iterate over it once."""

    def __init__(
        self, shared: list[Any], pickles: list[bytes], uses: list[list[int]], buffers: list[_core.Buffer | memoryview]
    ) -> None:
        self._shared = shared
        self._pickles = pickles
        self._uses = uses
        """For each call the numbers of the buffers that its pickle takes."""
        self._buffers: list[Any] = buffers
        self.loads: Loads = payload.loads
        """Unpickles a call; the worker sets a function of its own."""
        self.current: Triple | None = None
        """The call that was rebuilt last; None while the next one is being rebuilt."""

    def __len__(self) -> int:
        return len(self._pickles)

    def __iter__(self) -> Iterator[Triple]:
        last_use = {number: place for place, used in enumerate(self._uses) for number in used}
        for place, pickled in enumerate(self._pickles):
            self.current = None
            # The last use of a buffer takes the memory that was received; uses before it take copies. An array that
            # one call has twice has one use.
            used = self._uses[place]
            own = [
                self._take(number, last_use[number] == place and number not in used[index + 1 :])
                for index, number in enumerate(used)
            ]
            _local.shared = self._shared
            try:
                self.current = self.loads(pickled, own)
            finally:
                _local.shared = None
                del own
            yield self.current

    def _take(self, number: int, last: bool) -> Any:
        """Return a buffer for one call: a copy if a later call takes the buffer, too, and this one could change it."""
        buffer = self._buffers[number]
        if last:
            self._buffers[number] = None
        elif isinstance(buffer, _core.Buffer):
            return buffer.copy()
        # Buffers of other types are views of memory that is read-only.
        return bytearray(buffer) if isinstance(buffer, bytearray) else buffer


def shared_value(number: int) -> Any:
    """Return a value that the calls of a batch share; for the pickle of one of them."""
    return _local.shared[number]


class _LargeText:
    """Stands for a text that is too large to be sent with each call of a batch."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> Any:
        return shared_value, (self._number,)


class _SeparateCalls:
    """The calls of a batch, each with a pickle of its own. Pickles as a `Calls`."""

    def __init__(self, calls: Sequence[Triple], route: Route, shared: Shared | None) -> None:
        file = io.BytesIO()
        self._pickler = _CallPickler(file, route, buffer_callback=self._is_in_pickle)
        self._pickler.shared = shared
        self._numbers: dict[tuple[int, int, bool], int] = {}
        """The numbers of the buffers: (address, bytes, whether it is read-only) → number."""
        # As they come: CPython 3.11 crashes when it collects a PickleBuffer of a PickleBuffer's memoryview in a cycle.
        self._buffers: list[pickle.PickleBuffer] = []
        self._used: list[int] = []
        """The numbers of the buffers that the call which is being pickled takes."""
        uses: list[list[int]] = []
        pickles: list[bytes] = []
        for function, args, kwargs in calls:
            self._used = []
            # With a memo of its own: what two calls share at the client, they do not share at the worker.
            self._pickler.clear_memo()
            self._pickler.bare.clear()
            file.seek(0)
            file.truncate()
            self._pickler.dump(
                (function, tuple(map(self._light, args)), {k: self._light(v) for k, v in kwargs.items()})
            )
            pickles.append(file.getvalue())
            uses.append(self._used)
        self._reduced = Calls, (self._pickler.items, pickles, uses, self._buffers)
        # The pickler has a method of this object: without it there is no cycle, and the arrays can be freed at once.
        del self._pickler

    def __reduce__(self) -> Any:
        return self._reduced

    def _light(self, value: Any) -> Any:
        """Return an argument as it is pickled: of a large text only its number."""
        if type(value) in (bytes, str) and len(value) >= OUT_OF_BAND_BYTES:
            return _LargeText(self._pickler.number(value))
        return value

    def _is_in_pickle(self, buffer: pickle.PickleBuffer) -> bool:
        """Return whether a buffer stays inside the pickle. Otherwise note that the call takes it."""
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND_BYTES:
            return True
        key = _core.address(view), view.nbytes, view.readonly
        number = self._numbers.get(key)
        if number is None:
            if len(self._buffers) >= MAX_BUFFERS:
                return True
            number = self._numbers[key] = len(self._buffers)
            self._buffers.append(buffer)
        self._used.append(number)
        return False


class _CallPickler(Pickler):
    """Writes one call of a batch. Functions and classes stand in it by their numbers: all calls share them."""

    def __init__(self, file: io.BytesIO, route: Route, **options: Any) -> None:
        super().__init__(file, route, **options)
        self.items: list[Any] = []
        """What the calls share, in the order of its numbers."""
        self._numbers: dict[int, int] = {}
        """`id` → number. `items` keeps what has the `id`, so that nothing else gets it."""
        self._copies: dict[int, tuple[Any, Any]] = {}
        """`id` → array, and its copy without gaps."""
        self._may_share: dict[int, bool] = {}
        """`id` → answer of `_is_shared`."""
        self._asked: list[Any] = []
        """Keeps what `_is_shared` was asked of, so that nothing else gets its `id`."""

    def number(self, item: Any) -> int:
        """Return the number of something that the calls share."""
        number = self._numbers.get(id(item))
        if number is None:
            number = self._numbers[id(item)] = len(self.items)
            self.items.append(item)
        return number

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if obj is not shared_value and (kind is types.FunctionType or issubclass(kind, type)) and self._is_shared(obj):
            return shared_value, (self.number(obj),)
        reduced = super().reducer_override(obj)
        if reduced is NotImplemented and kind.__module__ == "numpy" and kind.__name__ == "ndarray":
            return self._reduce_array(obj)
        return reduced

    def _is_shared(self, thing: Any) -> bool:
        """Return whether calls may share a function or a class: unless it refers to what a call may change."""
        shared = self._may_share.get(id(thing))
        if shared is None:
            shared = self._may_share[id(thing)] = self.goes_by_name(thing) or self.is_alone(thing)
            self._asked.append(thing)
        return shared

    def _reduce_array(self, array: Any) -> Any:
        """Return how an array is pickled: a large one with gaps as one copy without, which all calls share."""
        if array.flags.forc or array.dtype.hasobject or array.nbytes < OUT_OF_BAND_BYTES:
            return NotImplemented
        copied = self._copies.get(id(array))
        if copied is None:
            copied = self._copies[id(array)] = array, array.copy("C")
        return copied[1].__reduce_ex__(5)


# ------------------------------------------------------------------------------------------------ what calls share


def _are_constants(calls: Sequence[Triple]) -> bool:
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


def _share_nothing(calls: Sequence[Triple]) -> bool:
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


def _is_own(value: Any, seen: set[int]) -> bool:
    """Return whether a value cannot change, or was not seen before. Note it as seen."""
    kind = type(value)
    if kind in _UNCHANGING:
        return True
    if kind is tuple or kind is frozenset:
        return len(value) <= MAX_LOOKED_AT and all(_is_own(each, seen) for each in value)
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
