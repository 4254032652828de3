"""Callables, values and exceptions to bytes and back.

A payload is a pickle (protocol 5, by cloudpickle) and its out-of-band buffers: arrays of 16 KiB and more travel beside
the pickle, so that the far end can use the received memory in place.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, Final, NamedTuple

from .. import _core
from ..errors import PayloadTooLargeError, RemoteError, RemoteTraceback
from . import modules
from .pickler import Functions, Pickler, Shared
from .route import BY_VALUE, Route

Buffers = list[memoryview] | None
Encoded = tuple[bytes, Buffers]
"""A pickle and what travels beside it."""
Triple = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""A call: function, arguments, keyword arguments."""
Loads = Callable[[bytes | memoryview, Sequence[Any] | None], Any]
"""Unpickles: see `loads`."""

BACKEND_NAME: Final = "skyward"
"""The name under which joblib knows our backend, at the client and in workers."""

# How a worker reads a task's pickle. The core carries these numbers and does not read them.
CALL: Final = 0
"""The pickle is `(function, args, kwargs)`."""
BATCH: Final = 1
"""The pickle is a list of such triples, as joblib makes them, or a `Calls`; the result is the list of their
values.

Or it is a triple: `inner_max_num_threads`, or None; the nanoseconds after which the worker gives back what it has not
begun, or None; and the calls.
"""

OUT_OF_BAND: Final = 16 * 1024
"""Bytes from which on a buffer travels beside the pickle. Below, one copy is cheaper than one more allocation."""
MAX_FUNCTION: Final = 64 * 1024
"""Bytes up to which a pickled function is kept for the length of a call."""
MAX_FUNCTIONS: Final = 128
"""Functions that are kept for the length of a call. One per task is none that tasks share."""
MAX_TEXT: Final = 16 * 1024
"""Characters that are kept of each end of an exception's text and traceback."""
MAX_BUFFERS: Final = 1000
"""Buffers beside one pickle; more stay inside it. A message has at most `_core.MAX_PARTS` parts."""


class Encoder:
    """A pickler that is kept: making a new one costs more than pickling a small task. Not for several threads at once.

    `limit` is the largest payload in bytes; beyond it, encoding raises `PayloadTooLargeError`. `route` is the way that
    the payloads go.
    """

    def __init__(self, limit: int, route: Route = BY_VALUE) -> None:
        self.limit = limit
        self.route = route
        self._file = io.BytesIO()
        self._buffers: list[memoryview] = []
        self._busy = False
        self._pickler = Pickler(self._file, route, buffer_callback=self._beside)

    def _beside(self, buffer: pickle.PickleBuffer) -> bool:
        if len(self._buffers) >= MAX_BUFFERS:
            return True
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND:
            return True
        self._buffers.append(view)
        return False

    def _learn(self, function: Any, shared: Shared) -> None:
        """Note in `shared` how later calls of `dumps` with it shall pickle `function`: by name, or as it is now.

        A global or a closed-over variable that changes afterwards is not sent again. What has nothing to gain, as a
        bound method, is not kept, and no more functions than a call is likely to share between its tasks.
        """
        if len(shared.all) >= MAX_FUNCTIONS:
            return
        by_itself = True
        reduced: Any = None
        if isinstance(function, types.FunctionType):
            pickled, buffers = self.dumps(function, shared)
            if b"cloudpickle" not in pickled and b"skyward_lite" not in pickled:
                reduced = function.__qualname__
            elif buffers is None and len(pickled) <= MAX_FUNCTION:
                reduced = (_function, (pickled,))
                self._pickler.shared = shared
                by_itself = self._pickler.is_alone(function)
                self._pickler.shared = None
        elif isinstance(function, types.BuiltinFunctionType) and isinstance(function.__self__, types.ModuleType):
            reduced = function.__qualname__
        else:
            return
        shared.all[id(function)] = (function, reduced)
        if by_itself:
            shared.functions[id(function)] = (function, reduced)

    def dump_calls(
        self,
        calls: Sequence[Triple],
        shared: Shared | None = None,
        threads: int | None = None,
        nanos: int | None = None,
    ) -> Encoded:
        """Pickle the calls of a batch so that each gets its own arguments, whatever else is in the batch.

        Functions, classes and what cannot change are shared, by all batches with the same `shared`. For `threads` and
        `nanos` see `BATCH`.
        """
        kept = None
        if shared is not None:
            kept = shared.functions
            apart = False
            for function, _, _ in calls:
                if id(function) not in kept:
                    if id(function) not in shared.all:
                        self._learn(function, shared)
                    apart = True
            if apart and _are_constants(calls):
                kept = shared.all
        batch: Any = calls if len(calls) == 1 or _share_nothing(calls) else _Separate(calls, self.route, shared)
        batch = batch if threads is nanos is None else (threads, nanos, batch)
        return self.dumps(modules.with_path(batch), shared, len(calls), kept)

    def dumps(
        self, value: object, shared: Shared | None = None, calls: int = 1, kept: Functions | None = None
    ) -> Encoded:
        """Pickle `value`, of so many calls. Raises what its pickling raises, and `PayloadTooLargeError`.

        `kept` are functions that are pickled as was found out before.
        """
        if self._busy:
            # Something that is being pickled, or a signal handler, submits by itself.
            return Encoder(self.limit, self.route).dumps(value, shared, calls, kept)
        self._busy = True
        file = self._file
        self._pickler.shared = shared
        self._pickler.kept = kept
        buffers: Buffers = None
        try:
            self._pickler.dump(value)
            pickled = file.getvalue()
            if self._buffers:
                buffers = self._buffers
                self._buffers = []
        finally:
            # Nothing of this value may be seen by the next: neither its memory nor its memo.
            self._buffers = []
            self._pickler.shared = self._pickler.kept = None
            if self._pickler.bare:
                self._pickler.bare.clear()
            self._pickler.clear_memo()
            if self._pickler.globals_ref:
                self._pickler.globals_ref = {}
            file.seek(0)
            file.truncate()
            self._busy = False
        total = size(pickled, buffers)
        if total > self.limit:
            batch = f", with {calls} calls in one batch," if calls > 1 else ""
            less = "send fewer at once (batch_size=1, or map's chunksize)" if calls > 1 else "send less per task"
            raise PayloadTooLargeError(
                f"payload of {total:,} bytes{batch} is over the limit of {self.limit:,}: "
                f"{less}, or raise it with Worker(max_payload={total:_})"
            )
        return pickled, buffers


def size(pickled: Sized, buffers: Sequence[Sized] | None) -> int:
    """Count the bytes of a payload, as it was encoded or as it was received."""
    return len(pickled) + sum(map(len, buffers)) if buffers else len(pickled)


def _function(pickled: bytes) -> Any:
    """Rebuild a function, anew for each task: what it captured is that task's own."""
    return pickle.loads(pickled)


_local = threading.local()


def encoder(limit: int, route: Route = BY_VALUE) -> Encoder:
    """Return the calling thread's encoder for this limit and this route."""
    kept: Encoder | None = getattr(_local, "encoder", None)
    if kept is None or kept.limit != limit or (kept.route is not route and kept.route != route):
        kept = _local.encoder = Encoder(limit, route)
    return kept


def loads(pickled: bytes | memoryview, buffers: Sequence[Any] | None) -> Any:
    """Unpickle what `Encoder.dumps` made, using `buffers` in place. Raises what unpickling raises."""
    return pickle.loads(pickled) if buffers is None else pickle.loads(pickled, buffers=buffers)


class Place(NamedTuple):
    """Where an exception was raised: on which node; in which call of its batch; and that call, as it is written.

    `call` is empty if it could not be rebuilt. `hint` is what the exception's message does not say.
    """

    node: str
    position: int | None
    call: str
    hint: str = ""


def dump_exception(encoder: Encoder, error: BaseException, skip: int, place: Place) -> tuple[bytes, Buffers]:
    """Pickle an exception with its traceback, of which the outermost `skip` frames are ours. Never raises.

    An exception that does not survive the journey (joblib #270) is replaced by a `RemoteError` that names it.
    """
    text = "(its traceback cannot be shown)"
    try:
        trace = error.__traceback__
        for _ in range(skip):
            trace = trace.tb_next if trace is not None and trace.tb_next is not None else trace
        if not place.hint:
            place = place._replace(hint=modules.missing_module_hint(error) or "")
        text = _shortened("".join(traceback.format_exception(type(error), error, trace)))
        # Not by assignment, which a frozen dataclass refuses.
        BaseException.with_traceback(error, None)
        pickled, buffers = encoder.dumps((error, text, tuple(place)))
        if not isinstance(loads(pickled, buffers)[0], BaseException):
            raise TypeError("unpickles as something that is no exception")
    except BaseException as why:
        name = f"{type(error).__module__}.{type(error).__qualname__}"
        said = f"{name}: {_said(error)} (a {type(why).__name__} prevents sending it: {_said(why)})"
        # Text only: nothing in it can fail to be pickled, and the pool takes as much whatever the user's limit is.
        return pickle.dumps((RemoteError(said), text, tuple(place)), 5), None
    return pickled, buffers


def _said(error: BaseException) -> str:
    try:
        return _shortened(str(error))
    except BaseException as why:
        return f"(its text cannot be shown: {type(why).__name__})"


def _shortened(text: str) -> str:
    if len(text) <= 2 * MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]}\n… {len(text) - 2 * MAX_TEXT:,} characters left out …\n{text[-MAX_TEXT:]}"


def load_exception(pickled: bytes | memoryview, buffers: Sequence[Any] | None, first: int | None) -> BaseException:
    """Rebuild an exception; its remote traceback is its `__cause__`, and a note says where it was raised.

    `first` is the place of its batch's first call among those that were submitted together, None for a call alone.
    """
    try:
        error, text, place = loads(pickled, buffers)
    except Exception as why:
        return RemoteError(f"the task raised an exception that cannot be rebuilt here: {type(why).__name__}: {why}")
    object.__setattr__(error, "__cause__", RemoteTraceback(text))
    node, position, call, hint = place
    task = "" if first is None or position is None else f", task {first + position}"
    note = f"node {node}{task}: {call}"
    if not call:
        note = f"node {node}{task}: the call could not be rebuilt there, and nothing of it has run"
    # An exception may refuse to have attributes.
    with contextlib.suppress(Exception):
        error.add_note(f"{note}. {hint}" if hint else note)
    return error  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------ batches


class Calls:
    """The calls of a batch, each with arguments of its own.

    A call is rebuilt when it is its turn. To be gone through once.
    """

    def __init__(
        self, shared: list[Any], pickles: list[bytes], uses: list[list[int]], buffers: list[_core.Buffer | memoryview]
    ) -> None:
        self._shared = shared
        self._pickles = pickles
        self._uses = uses
        """For each call the buffers that its pickle takes, by their numbers."""
        self._buffers: list[Any] = buffers
        self.loads: Loads = loads
        """How the pickle of a call is read. A worker sets a function of its own."""
        self.current: Triple | None = None
        """The call that was rebuilt last, None while the next one is."""

    def __len__(self) -> int:
        return len(self._pickles)

    def __iter__(self) -> Iterator[Triple]:
        last = {number: place for place, used in enumerate(self._uses) for number in used}
        for place, pickled in enumerate(self._pickles):
            self.current = None
            # The last use of all takes the memory that came. What is one thing in a call has one use.
            used = self._uses[place]
            own = [
                self._take(number, last[number] == place and number not in used[index + 1 :])
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
        """Return a buffer for one call: a copy, unless no later call needs it, or none can change it."""
        buffer = self._buffers[number]
        if last:
            self._buffers[number] = None
        elif isinstance(buffer, _core.Buffer):
            return buffer.copy()
        # Others than these cannot be changed: they are views of memory that is read-only.
        return bytearray(buffer) if isinstance(buffer, bytearray) else buffer


def _shared(number: int) -> Any:
    """Return what the calls of a batch share; for the pickle of one of them."""
    return _local.shared[number]


class _Large:
    """Stands for an argument that cannot change and is too large to be sent with each call of a batch."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _shared, (self.number,)


class _Separate:
    """Pickles as a `Calls`."""

    def __init__(self, calls: Sequence[Triple], route: Route, shared: Shared | None) -> None:
        file = io.BytesIO()
        self._pickler = _CallPickler(file, route, buffer_callback=self._beside)
        self._pickler.shared = shared
        self._numbers: dict[tuple[int, int, bool], int] = {}
        # As they come: CPython 3.11 crashes when it collects a PickleBuffer of a PickleBuffer's memoryview in a cycle.
        self._buffers: list[pickle.PickleBuffer] = []
        self._used: list[int] = []
        uses: list[list[int]] = []
        pickles: list[bytes] = []
        for function, args, kwargs in calls:
            self._used = []
            # A memo of its own: what two calls share at the client, they do not share at the worker.
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
        if type(value) in (bytes, str) and len(value) >= OUT_OF_BAND:
            return _Large(self._pickler.number(value))
        return value

    def _beside(self, buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND:
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
        self._numbers: dict[int, int] = {}
        self._copies: dict[int, tuple[Any, Any]] = {}
        self._may_share: dict[int, bool] = {}
        self._asked: list[Any] = []
        """Kept so that their ids stay theirs."""

    def number(self, item: Any) -> int:
        """Return the number of what is shared, which is kept so that its id stays its own."""
        number = self._numbers.get(id(item))
        if number is None:
            number = self._numbers[id(item)] = len(self.items)
            self.items.append(item)
        return number

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if obj is not _shared and (kind is types.FunctionType or issubclass(kind, type)) and self._is_shared(obj):
            return _shared, (self.number(obj),)
        reduced = super().reducer_override(obj)
        if reduced is NotImplemented and kind.__module__ == "numpy" and kind.__name__ == "ndarray":
            return self._array(obj)
        return reduced

    def _is_shared(self, thing: Any) -> bool:
        """Return whether calls may share a function or a class: unless it leads to what a call may change."""
        shared = self._may_share.get(id(thing))
        if shared is None:
            shared = self._may_share[id(thing)] = self.goes_by_name(thing) or self.is_alone(thing)
            self._asked.append(thing)
        return shared

    def _array(self, array: Any) -> Any:
        """Return how an array is pickled: of a large one that lies in pieces as one copy, which travels once."""
        if array.flags.forc or array.dtype.hasobject or array.nbytes < OUT_OF_BAND:
            return NotImplemented
        kept = self._copies.get(id(array))
        if kept is None:
            # The array is kept so that its id stays its own.
            kept = self._copies[id(array)] = array, array.copy("C")
        return kept[1].__reduce_ex__(5)


_ATOMS: Final[set[type]] = {int, float, complex, bool, str, bytes, type(None), range, types.FunctionType, type}
"""Types of what cannot change, or is shared by design. NumPy's numbers come to it as they are met."""
_CONTAINERS: Final = (list, dict, set, bytearray)
MAX_LOOKED_AT: Final = 32
"""Elements of a container that are looked at. Calls with larger ones have a pickle each."""


def is_small(calls: Sequence[Triple], shared: Shared) -> bool:
    """Return whether this is one call of a known function with numbers and the like, as most of a great many are."""
    if len(calls) != 1:
        return False
    function, args, kwargs = calls[0]
    known = shared.functions.get(id(function))
    return known is not None and known[1] is not None and not kwargs and _PLAIN.issuperset(map(type, args))


_PLAIN: Final = {int, float, complex, bool, str, bytes, type(None)}


def _are_constants(calls: Sequence[Triple]) -> bool:
    """Return whether all arguments are numbers, text and the like: functions share nothing with them."""
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
    """Return whether no two calls have the same thing that could change: then one pickle with one memo is right.

    What is not known to be so counts as shared.
    """
    seen: set[int] = set()
    for function, args, kwargs in calls:
        if type(function) is not types.FunctionType and not (callable(function) and _is_own(function, seen)):
            return False
        for value in args:
            if type(value) not in _ATOMS and not _is_own(value, seen):
                return False
        for value in kwargs.values():
            if not _is_own(value, seen):
                return False
    return True


def _is_own(value: Any, seen: set[int]) -> bool:
    """Return whether a value cannot change, or was not seen before; note it as seen."""
    kind = type(value)
    if kind in _ATOMS:
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
        # Not a method, such as a list's `append`.
        return isinstance(value.__self__, types.ModuleType)
    if kind.__module__ != "numpy":
        return False
    import numpy as np

    if kind is np.ndarray:
        # Views of the same memory are different things to pickle: each of them becomes an array of its own.
        new = id(value) not in seen and not value.dtype.hasobject
        seen.add(id(value))
        return new
    if issubclass(kind, np.number | np.bool_):
        _ATOMS.add(kind)
    return kind in _ATOMS
