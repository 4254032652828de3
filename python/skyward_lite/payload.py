"""Callables, values and exceptions to bytes and back.

A payload is a pickle (protocol 5, by cloudpickle) and its out-of-band buffers: arrays of 16 KiB and more travel beside
the pickle, so that the far end can use the received memory in place.
"""

from __future__ import annotations

import io
import pickle
import threading
import traceback
import types
from collections.abc import Callable, Sequence, Sized
from typing import Any, ClassVar, Final

import cloudpickle
from cloudpickle.cloudpickle import _dynamic_class_reduce

from . import filters
from .errors import PayloadTooLargeError, RemoteError, RemoteTraceback
from .modules import Modules, by_value, check_builtin, missing_module_hint, reduce_module, set_class, set_function

Buffers = list[memoryview] | None
Encoded = tuple[bytes, Buffers]
"""A pickle and what travels beside it."""
Functions = dict[int, tuple[Callable[..., Any], Any]]
"""Functions of one call by identity: the function, kept so that its id stays its own, and what a pickler's
`reducer_override` gives for it; None for cloudpickle's own way."""

# Tags on the wire; frame.rs has the same.
CALL: Final = 0
"""On a task: the pickle is `(function, args, kwargs)`."""
BATCH: Final = 1
"""On a task: the pickle is a list of such triples, as joblib makes them; the result is the list of their values.

For a call with `inner_max_num_threads` it is the pair of that number and the list.
"""
RETURNED: Final = 0
RAISED: Final = 1
CRASHED: Final = 2
CANCELLED: Final = 3
NODE_LOST: Final = 4
TIMED_OUT: Final = 5

OUT_OF_BAND: Final = 16 * 1024
"""Bytes from which on a buffer travels beside the pickle. Below, one copy is cheaper than one more allocation."""
MAX_FUNCTION: Final = 64 * 1024
"""Bytes up to which a pickled function is kept for the length of a call."""
MAX_FUNCTIONS: Final = 128
"""Functions that are kept for the length of a call. One per task is none that tasks share."""
MAX_TEXT: Final = 16 * 1024
"""Characters that are kept of each end of an exception's text and traceback."""
MAX_BUFFERS: Final = 1000
"""Buffers beside one pickle; more stay inside it. frame.rs takes 1,024 parts in a message."""


Reducer = Callable[["_Pickler", Any], Any]
"""What `reducer_override` returns for an object of a type: how it is pickled, or `NotImplemented` for the usual way."""

MAX_TYPES: Final = 4096
"""Types whose reducer is remembered. More than that are classes that a program makes as it goes."""


def _reducer(kind: type) -> Reducer | None:
    """Return the reducer for objects of this type that cloudpickle would pickle wrongly; None for its own way.

    Asked once for each type, so it may take its time; a reducer itself is called for each object.
    """
    if kind is types.FunctionType:
        return _reduce_function
    if issubclass(kind, type):
        return _reduce_class
    if issubclass(kind, types.ModuleType):
        return reduce_module
    if kind is types.BuiltinFunctionType:
        return check_builtin
    return None


def _reduce_function(pickler: _Pickler, function: types.FunctionType) -> Any:
    if not by_value(pickler, function):
        return NotImplemented
    return *pickler._dynamic_function_reduce(function)[:5], set_function


def _reduce_class(pickler: _Pickler, cls: type) -> Any:
    if not by_value(pickler, cls):
        return NotImplemented
    make, args, state, *_ = _dynamic_class_reduce(cls)
    # cloudpickle leaves it out.
    state[0]["__qualname__"] = cls.__qualname__
    return make, args, state, None, None, set_class


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle's, but for functions that were pickled before in the same call, and for what it pickles wrongly."""

    functions: Functions | None = None
    modules: Modules | None = None
    sent = ""
    reducers: ClassVar[dict[type, Reducer | None]] = {}

    def reducer_override(self, obj: Any) -> Any:
        if self.functions is not None:
            known = self.functions.get(id(obj))
            if known is not None and known[1] is not None:
                return known[1]
        # Not isinstance, which believes what an object says of its __class__.
        kind = type(obj)
        try:
            reducer = self.reducers[kind]
        except KeyError:
            if len(self.reducers) >= MAX_TYPES:
                self.reducers.clear()
            reducer = self.reducers[kind] = _reducer(kind)
        if reducer is not None:
            reduced = reducer(self, obj)
            if reduced is not NotImplemented:
                return reduced
        if issubclass(kind, type) and issubclass(obj, Warning):
            return filters.reduce(obj, super().reducer_override)
        return super().reducer_override(obj)


class Encoder:
    """A pickler that is kept: making a new one costs more than pickling a small task. Not for several threads at once.

    `limit` is the largest payload in bytes; beyond it, encoding raises `PayloadTooLargeError`. `modules` says what the
    far end can import; None in a worker, whose client has whatever can be named.
    """

    def __init__(self, limit: int, modules: Modules | None = None) -> None:
        self._limit = limit
        self.modules = modules
        self._file = io.BytesIO()
        self._buffers: list[memoryview] = []
        self._busy = False
        self._pickler = _Pickler(self._file, protocol=5, buffer_callback=self._beside)
        self._pickler.modules = modules

    def _beside(self, buffer: pickle.PickleBuffer) -> bool:
        if len(self._buffers) >= MAX_BUFFERS:
            return True
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND:
            return True
        self._buffers.append(view)
        return False

    def learn(self, function: Any, functions: Functions) -> None:
        """Note in `functions` how later calls of `dumps` with it shall pickle `function`: by name, or as it is now.

        A global or a closed-over variable that changes afterwards is not sent again. What has nothing to gain, as a
        bound method, is not kept, and no more functions than a call is likely to share between its tasks.
        """
        if len(functions) >= MAX_FUNCTIONS:
            return
        reduced: Any = None
        if isinstance(function, types.FunctionType):
            head, buffers = self.dumps(function)
            if b"cloudpickle" not in head and b"skyward_lite" not in head:
                reduced = function.__qualname__
            elif buffers is None and len(head) <= MAX_FUNCTION:
                reduced = (_function, (head,))
        elif isinstance(function, types.BuiltinFunctionType) and isinstance(function.__self__, types.ModuleType):
            reduced = function.__qualname__
        else:
            return
        functions[id(function)] = (function, reduced)

    def dumps(self, value: object, functions: Functions | None = None, calls: int = 1) -> Encoded:
        """Pickle `value`, of so many calls. Raises what its pickling raises, and `PayloadTooLargeError`."""
        if self._busy:
            # Something that is being pickled, or a signal handler, submits by itself.
            return Encoder(self._limit, self.modules).dumps(value, functions, calls)
        self._busy = True
        file = self._file
        self._pickler.functions = functions
        buffers: Buffers = None
        try:
            self._pickler.dump(value)
            head = file.getvalue()
            if self._buffers:
                buffers = self._buffers
                self._buffers = []
        except Exception as error:
            if self.modules is not None and self._pickler.sent:
                raise self.modules.explained(error, self._pickler.sent) from error
            raise
        finally:
            self._pickler.sent = ""
            # Nothing of this value may be seen by the next: neither its memory nor its memo.
            self._buffers = []
            self._pickler.functions = None
            self._pickler.clear_memo()
            if self._pickler.globals_ref:
                self._pickler.globals_ref = {}
            file.seek(0)
            file.truncate()
            self._busy = False
        total = size(head, buffers)
        if total > self._limit:
            batch = f", with {calls} calls in one batch," if calls > 1 else ""
            less = "send fewer at once (batch_size=1, or map's chunksize)" if calls > 1 else "send less per task"
            raise PayloadTooLargeError(
                f"payload of {total:,} bytes{batch} is over the limit of {self._limit:,}: "
                f"{less}, or raise it with Worker(max_payload={total:_})"
            )
        return head, buffers


def size(head: Sized, buffers: Sequence[Sized] | None) -> int:
    """Count the bytes of a payload, as it was encoded or as it was received."""
    return len(head) + sum(map(len, buffers)) if buffers else len(head)


def _function(head: bytes) -> Any:
    """Rebuild a function, anew for each task: what it captured is that task's own."""
    return pickle.loads(head)


_local = threading.local()


def encoder(limit: int, modules: Modules | None = None) -> Encoder:
    """Give the calling thread's encoder for this limit, and for a far end that can import this."""
    kept: Encoder | None = getattr(_local, "encoder", None)
    if kept is None or kept._limit != limit or kept.modules is not modules:
        kept = _local.encoder = Encoder(limit, modules)
    return kept


def travels_by_name(thing: Any) -> bool:
    """Say whether what its module defines is named in a pickle, for the far end to import; else its code is sent."""
    module = thing.__module__
    registered = cloudpickle.list_registry_pickle_by_value()
    if module == "__main__" or any(module == name or module.startswith(f"{name}.") for name in registered):
        return False
    kept: Encoder | None = getattr(_local, "encoder", None)
    # One that is not busy pickles nothing: this is for another pickler.
    return kept is None or not kept._busy or not by_value(kept._pickler, thing)


def loads(head: bytes | memoryview, buffers: Sequence[Any] | None) -> Any:
    """Unpickle what `Encoder.dumps` made, using `buffers` in place. Raises what unpickling raises."""
    return pickle.loads(head) if buffers is None else pickle.loads(head, buffers=buffers)


def dump_exception(encoder: Encoder, error: BaseException, skip: int) -> tuple[bytes, Buffers]:
    """Pickle an exception with its traceback, of which the outermost `skip` frames are ours. Never raises.

    An exception that does not survive the journey (joblib #270) is replaced by a `RemoteError` that names it.
    """
    text = "(its traceback cannot be shown)"
    try:
        hint = missing_module_hint(error)
        if hint is not None:
            error.add_note(hint)
        trace = error.__traceback__
        for _ in range(skip):
            trace = trace.tb_next if trace is not None and trace.tb_next is not None else trace
        text = _shortened("".join(traceback.format_exception(type(error), error, trace)))
        # Not by assignment, which a frozen dataclass refuses.
        BaseException.with_traceback(error, None)
        head, buffers = encoder.dumps((error, text))
        if not isinstance(loads(head, buffers)[0], BaseException):
            raise TypeError("unpickles as something that is no exception")
    except BaseException as why:
        name = f"{type(error).__module__}.{type(error).__qualname__}"
        said = f"{name}: {_said(error)} (a {type(why).__name__} prevents sending it: {_said(why)})"
        # Text only: nothing in it can fail to be pickled, and the pool takes as much whatever the user's limit is.
        return pickle.dumps((RemoteError(said), text), 5), None
    return head, buffers


def _said(error: BaseException) -> str:
    try:
        return _shortened(str(error))
    except BaseException as why:
        return f"(its text cannot be shown: {type(why).__name__})"


def _shortened(text: str) -> str:
    if len(text) <= 2 * MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]}\n… {len(text) - 2 * MAX_TEXT:,} characters left out …\n{text[-MAX_TEXT:]}"


def load_exception(head: bytes | memoryview, buffers: Sequence[Any] | None) -> BaseException:
    """Rebuild an exception; its remote traceback is its `__cause__`."""
    try:
        error, text = loads(head, buffers)
    except Exception as why:
        return RemoteError(f"the task raised an exception that cannot be rebuilt here: {type(why).__name__}: {why}")
    object.__setattr__(error, "__cause__", RemoteTraceback(text))
    return error  # type: ignore[no-any-return]
