"""Values to bytes and back.

A payload is a pickle (protocol 5, by cloudpickle) and its out-of-band buffers: arrays of 16 KiB and more travel beside
the pickle, so that the far end can use the memory that it receives in place.
"""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Callable, Sequence, Sized
from typing import Any, Final

from .. import _core
from ..errors import PayloadTooLargeError
from .handles import Handles
from .pickler import Functions, Pickler, Shared
from .route import BY_VALUE, Route
from .streams import MAX_BUFFERS, OUT_OF_BAND_BYTES, rebuild

Buffers = list[memoryview | _core.Blob] | None
Encoded = tuple[bytes, Buffers]
"""A pickle and the buffers beside it."""
Loads = Callable[[bytes | memoryview, Sequence[Any] | None, Sequence[Any], int], Any]
"""Unpickles, as `loads` does."""

BACKEND_NAME: Final = "skyward"
"""The name under which joblib knows our backend, at the client and in workers."""

# How a worker reads a task's pickle. The core carries these numbers and does not read them.
CALL: Final = 0
"""The pickle is `(function, args, kwargs)`."""
BATCH: Final = 1
"""The pickle is a list of such triples, as joblib makes them, or a `batches.Calls`; the result is the list
of their values.

Or the pickle is a triple of `inner_max_num_threads`, or None; of the nanoseconds after which the worker gives back the
calls that it has not begun, or None; and of the calls.
"""


class Encoder:
    """A pickler that is used again and again: to make one takes longer than to pickle a small task.

    Not for several threads at once. `limit` is the largest payload in bytes: for a larger one `dumps` raises
    `PayloadTooLargeError`. The payloads go over `route`.
    """

    def __init__(self, limit: int, route: Route = BY_VALUE) -> None:
        self.limit = limit
        self.route = route
        self._file = io.BytesIO()
        self._buffers: list[memoryview | _core.Blob] = []
        self._handles: Handles | None = None
        """Those of the call of `Parallel`, within `dumps`."""
        self._busy = False
        """Whether it is within `dumps`."""
        self._pickler = Pickler(self._file, route, buffer_callback=self._is_in_pickle)

    def _is_in_pickle(self, buffer: pickle.PickleBuffer) -> bool:
        """Return whether a buffer stays inside the pickle. Otherwise keep it, to travel beside."""
        if len(self._buffers) >= MAX_BUFFERS:
            return True
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND_BYTES:
            return True
        self._buffers.append(view if self._handles is None else self._handles.find(view))
        return False

    def is_alone(self, function: Any, shared: Shared) -> bool:
        """Return whether a function can be pickled apart from its call: see `Pickler.is_alone`."""
        self._pickler.shared = shared
        try:
            return self._pickler.is_alone(function)
        finally:
            self._pickler.shared = None

    def dumps(
        self, value: object, shared: Shared | None = None, calls: int = 1, known: Functions | None = None
    ) -> Encoded:
        """Pickle `value`, which has so many calls. Raises what its pickling raises, and `PayloadTooLargeError`.

        `known` are functions that were pickled before, and how.
        """
        if self._busy:
            # This call is within another one: an object that is being pickled, or a signal handler, submits a task.
            return Encoder(self.limit, self.route).dumps(value, shared, calls, known)
        self._busy = True
        file = self._file
        self._pickler.shared = shared
        self._pickler.known = known
        # What is remembered of a function are its buffers themselves.
        self._handles = None if shared is None or known is None else shared.handles
        buffers: Buffers = None
        try:
            self._pickler.dump(value)
            pickled = file.getvalue()
            if self._buffers:
                buffers = self._buffers
                self._buffers = []
        finally:
            # The next value must see nothing of this one, neither its memory nor its memo.
            self._buffers = []
            self._handles = None
            self._pickler.shared = self._pickler.known = None
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
    """Return the bytes of a payload, as it was encoded or as it was received."""
    return len(pickled) + sum(map(len, buffers)) if buffers else len(pickled)


_local = threading.local()


def encoder(limit: int, route: Route = BY_VALUE) -> Encoder:
    """Return the calling thread's encoder for this limit and this route."""
    last: Encoder | None = getattr(_local, "encoder", None)
    if last is None or last.limit != limit or (last.route is not route and last.route != route):
        last = _local.encoder = Encoder(limit, route)
    return last


def loads(pickled: bytes | memoryview, buffers: Sequence[Any] | None, apart: Sequence[Any] = (), flats: int = 0) -> Any:
    """Unpickle what `Encoder.dumps` made, using `buffers` in place. Raises what unpickling raises.

    `apart` are the streams of a call's large values, of which the first `flats` are flat containers'.
    """
    if apart:
        return rebuild(apart, flats, pickled, buffers or ())
    return pickle.loads(pickled) if buffers is None else pickle.loads(pickled, buffers=buffers)
