"""Batches of calls to bytes and back: each call gets arguments of its own, and functions are pickled once.

If one pickle had all calls of a batch, two calls that have the same list as an argument would share one list at the
worker, and see each other's changes. With a pickle for each call, every pickle would have the function. So there are
three ways, from the fastest to the most careful:

- The calls have nothing in common that can change: one pickle has them all.
- Otherwise each call has a pickle of its own (`_SeparateCalls`), in which functions, classes and large texts stand by
  their numbers. All calls of the batch share these, and the memory of large arrays that they have in common.
- The functions are pickled once for all batches of one call of `Parallel` (functions.py).

Whichever way a call goes, its large arguments are pickled apart (streams.py).
"""

from __future__ import annotations

import io
import pickle
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any, Final

from .. import _core
from . import functions, modules, payload, streams
from .payload import Encoded, Encoder, Loads
from .pickler import Functions, Pickler, Shared
from .route import Route
from .sharing import share_nothing
from .streams import APART_BYTES, MAX_BUFFERS, OUT_OF_BAND_BYTES, IsInPickle, Triple

_SMALL: Final = {int, float, complex, bool, str, bytes, type(None)}
_NUMBERS: Final = {int, float, complex, bool, type(None)}


def is_small(calls: Sequence[Triple], shared: Shared) -> bool:
    """Return whether this is one call, of a function that was pickled before, with numbers and text as arguments.

    So are most calls of a program that makes very many.
    """
    if len(calls) != 1:
        return False
    function, args, kwargs = calls[0]
    known = shared.functions.get(id(function))
    if known is None or known[1] is None or kwargs:
        return False
    types_of_args = list(map(type, args))
    return _NUMBERS.issuperset(types_of_args) or (_SMALL.issuperset(types_of_args) and not streams.seem_large(args))


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
    known = None if shared is None else functions.known(encoder, calls, shared)
    if len(calls) > 1:
        batch: Any = calls if share_nothing(calls) else _SeparateCalls(calls, encoder.route, shared)
    elif _seems_large(calls[0]):
        batch = [_apart(encoder, calls[0], shared, known)]
    else:
        batch = calls
    encoded = encoder.dumps(_with_limits(batch, threads, nanos), shared, len(calls), known)
    if batch is not calls or len(encoded[0]) < APART_BYTES:
        return encoded
    # It is larger than it seemed.
    if len(calls) == 1:
        batch = [_apart(encoder, calls[0], shared, known)]
    elif any(_weight(call) >= APART_BYTES for call in calls):
        batch = _SeparateCalls(calls, encoder.route, shared)
    else:
        return encoded
    return encoder.dumps(_with_limits(batch, threads, nanos), shared, len(calls), known)


def dump_call(encoder: Encoder, call: Triple) -> Encoded:
    """Pickle a call that is in no batch: see `payload.CALL`."""
    if not _seems_large(call):
        encoded = encoder.dumps(modules.with_path(call))
        if len(encoded[0]) < APART_BYTES:
            return encoded
    return encoder.dumps(modules.with_path(_apart(encoder, call)))


def _seems_large(call: Triple) -> bool:
    """Return whether an argument of the call is probably large."""
    return streams.seem_large(call[1]) or (bool(call[2]) and streams.seem_large(call[2].values()))


def _apart(
    encoder: Encoder, call: Triple, shared: Shared | None = None, known: Functions | None = None
) -> streams.Apart:
    """Return a call of which the large values, if it has any, are pickled apart."""

    def make(file: io.BytesIO, is_in_pickle: IsInPickle) -> Pickler:
        pickler = Pickler(file, encoder.route, buffer_callback=is_in_pickle)
        pickler.shared, pickler.known = shared, known
        return pickler

    writer = streams.Writer(make, streams.beside_once(), known, None if shared is None else shared.flats)
    try:
        return streams.Apart(writer.write_call(call))
    finally:
        writer.close()


def _with_limits(batch: Any, threads: int | None, nanos: int | None) -> Any:
    """Return a batch as it travels: see `payload.BATCH`."""
    return modules.with_path(batch if threads is nanos is None else (threads, nanos, batch))


def _weight(call: Triple) -> int:
    """Return the bytes of the texts in the argument that has the most of them."""
    _, args, kwargs = call
    return max(map(streams.weight, (*args, *kwargs.values())), default=0)


# ------------------------------------------------------------------------------------------------ a pickle each

_local = threading.local()
"""`shared`: the values that the calls of a batch share, while the pickle of one of them is read."""


class Calls:
    """The calls of a batch, as the worker reads them: each when it is its turn. Iterate over it once."""

    def __init__(
        self,
        shared: list[Any],
        pickles: list[bytes],
        uses: list[list[int]],
        buffers: list[_core.Buffer | memoryview],
        streams: list[Any],
        apart: list[tuple[int, list[int]]],
    ) -> None:
        self._shared = shared
        self._pickles = pickles
        self._uses = uses
        """For each call the numbers of the buffers that its streams and its pickle take."""
        self._buffers: list[Any] = buffers
        self._streams = streams
        self._apart = apart
        """For each call how many of its streams are flat containers', and the numbers of its streams; empty if no call
        has any."""
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
            flats, numbers = self._apart[place] if self._apart else (0, [])
            before = [self._streams[number] for number in numbers]
            _local.shared = self._shared
            try:
                self.current = self.loads(pickled, own, before, flats)
            finally:
                _local.shared = None
                del own, before
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
        self._numbers: dict[tuple[int, int, bool], int] = {}
        """The numbers of the buffers: (address, bytes, whether it is read-only) → number."""
        self._buffers: list[pickle.PickleBuffer] = []
        self._pickler: _CallPickler

        def make(file: io.BytesIO, is_in_pickle: IsInPickle) -> Pickler:
            self._pickler = _CallPickler(file, route, buffer_callback=is_in_pickle)
            self._pickler.shared = shared
            return self._pickler

        numbers: dict[bytes, int] = {}
        """The numbers of the streams: calls with equal values have the same."""
        pickles, uses, apart = [], [], []
        writer = streams.Writer(make, self._light, None, None if shared is None else shared.flats, self._fits)
        for call in calls:
            written, flats, pickled, buffers = writer.write_call(call)
            pickles.append(pickled)
            uses.append([self._buffer_number(buffer) for buffer in buffers])
            apart.append((flats, [numbers.setdefault(stream, len(numbers)) for stream in written]))
        beside = list(map(pickle.PickleBuffer, numbers))
        self._reduced = (
            Calls,
            (self._pickler.items, pickles, uses, self._buffers, beside, apart if numbers else []),
        )
        # The pickler and what it calls refer to one another. Without this cycle the arrays can be freed at once.
        writer.close()
        del self._pickler

    def __reduce__(self) -> Any:
        return self._reduced

    def _light(self, value: Any) -> Any:
        """Return an argument as it is pickled: of a large text only its number."""
        if type(value) in (bytes, str) and len(value) >= OUT_OF_BAND_BYTES:
            return _LargeText(self._pickler.number(value))
        return value

    def _fits(self, count: int, view: memoryview) -> bool:
        """Return whether a call with so many buffers may have one more."""
        return len(self._buffers) + count < MAX_BUFFERS or _key(view) in self._numbers

    def _buffer_number(self, buffer: pickle.PickleBuffer) -> int:
        number = self._numbers.setdefault(_key(buffer.raw()), len(self._buffers))
        if number == len(self._buffers):
            self._buffers.append(buffer)
        return number


def _key(view: memoryview) -> tuple[int, int, bool]:
    return _core.address(view), view.nbytes, view.readonly


class _CallPickler(Pickler):
    """Writes one call of a batch. Functions and classes stand in it by their numbers: all calls share them."""

    def __init__(self, file: io.BytesIO, route: Route, **options: Any) -> None:
        super().__init__(file, route, **options)
        self.items: list[Any] = []
        """What the calls share, in the order of its numbers; of a large text what travels in its place."""
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
            self.items.append(streams.beside(item))
        return number

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if obj is not shared_value and (kind is types.FunctionType or issubclass(kind, type)) and self._is_shared(obj):
            return shared_value, (self.number(obj),)
        return super().reducer_override(obj)

    def _is_shared(self, thing: Any) -> bool:
        """Return whether calls may share a function or a class: unless it refers to what a call may change."""
        shared = self._may_share.get(id(thing))
        if shared is None:
            shared = self._may_share[id(thing)] = self.goes_by_name(thing) or self.is_alone(thing)
            self._asked.append(thing)
        return shared

    def without_gaps(self, array: Any) -> Any:
        """Return a copy of an array without gaps: one copy, which all calls share."""
        copied = self._copies.get(id(array))
        if copied is None:
            copied = self._copies[id(array)] = array, super().without_gaps(array)
        return copied[1]
