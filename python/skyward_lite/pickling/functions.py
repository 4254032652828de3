"""Functions that the batches of one call of `Parallel` share: each is pickled once, as it is then.

So a global or a closed-over variable that changes afterwards is not sent again. Each task rebuilds the function anew,
with captured variables of its own. A large function travels beside the pickle, and so do the arrays that it refers to,
as copies: what is sent is the function as it was pickled, whatever becomes of the arrays meanwhile.
"""

from __future__ import annotations

import pickle
import types
import weakref
from collections.abc import Sequence
from typing import Any, Final

from . import modules
from .payload import Encoder
from .pickler import Functions, Shared
from .sharing import are_constants
from .streams import OUT_OF_BAND_BYTES, Triple

MAX_FUNCTIONS: Final = 128
"""At most this many functions are remembered per call of `Parallel`. If every task brings a function of its own, there
is nothing to gain."""


def known(encoder: Encoder, calls: Sequence[Triple], shared: Shared) -> Functions:
    """Return how the functions of these calls are pickled, once they were. Remember those that are new."""
    functions = shared.functions
    apart = False
    for function, _, _ in calls:
        if id(function) not in functions:
            if id(function) not in shared.all:
                _remember(encoder, function, shared)
            apart = True
    return shared.all if apart and are_constants(calls) else functions


def _remember(encoder: Encoder, function: Any, shared: Shared) -> None:
    """Note in `shared` how later batches shall pickle a function: by name, or as it is now.

    Nothing is noted for functions of other kinds, such as bound methods.
    """
    if len(shared.all) >= MAX_FUNCTIONS:
        return
    by_itself = True
    if isinstance(function, types.FunctionType):
        pickled, buffers = encoder.dumps(function, shared)
        if b"cloudpickle" not in pickled and b"skyward_lite" not in pickled:
            reduced: Any = function.__qualname__
        else:
            by_itself = encoder.is_alone(function, shared)
            if buffers is not None or len(pickled) >= OUT_OF_BAND_BYTES:
                _remember_large(function, pickled, buffers or [], by_itself, shared)
                return
            reduced = rebuild_function, (pickled,)
    elif isinstance(function, types.BuiltinFunctionType) and isinstance(function.__self__, types.ModuleType):
        modules.check_builtin(function)
        reduced = function.__qualname__
    else:
        return
    shared.all[id(function)] = (function, reduced)
    if by_itself:
        shared.functions[id(function)] = (function, reduced)


def _remember_large(function: Any, pickled: bytes, buffers: Sequence[Any], by_itself: bool, shared: Shared) -> None:
    """Note how a large function is pickled, for as long as the function lives: every task may bring one of its own."""
    key = id(function)
    homes = [shared.all, shared.functions] if by_itself else [shared.all]

    def forget(_: object) -> None:
        for home in homes:
            home.pop(key, None)

    copies = [pickle.PickleBuffer(pickled), *(pickle.PickleBuffer(_copy(view)) for view in buffers)]
    for home in homes:
        home[key] = (weakref.ref(function, forget), (rebuild_function, tuple(copies)))


def _copy(view: Any) -> bytes:
    """Return the content of a buffer as it is now."""
    return view.obj if type(view.obj) is bytes and len(view.obj) == view.nbytes else bytes(view)


def rebuild_function(pickled: Any, *buffers: Any) -> Any:
    """Rebuild a function, anew for each task: each has captured variables of its own."""
    return pickle.loads(pickled, buffers=map(_own_memory, buffers))


def _own_memory(buffer: Any) -> Any:
    """Return writable memory of the task's own. The function's pickle tells which arrays are read-only.

    The buffer is a read-only view of memory that was received for this task, or a part of the call's pickle.
    """
    owner = buffer.obj if isinstance(buffer, memoryview) else buffer
    return bytearray(owner) if isinstance(owner, bytes) else owner
