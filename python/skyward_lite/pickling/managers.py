"""Proxies of `multiprocessing`'s managers as arguments and results of tasks.

A proxy connects to its manager's process with the manager's key. multiprocessing sends the key only to children that it
starts itself. Here the key travels with the proxy, and only to nodes that share files with the client: a manager is
usually reached through a Unix socket of its machine, and no other machine should get the key.
"""

from __future__ import annotations

import functools
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

from .route import Route

unclaimed: dict[int, list[Any]] = {}
"""Proxies that a thread has pickled for a task which it has not sent yet, by the thread."""


class Keeping:
    """A submitted call, together with the proxies that it was sent with: they live until the call has ended.

    A manager drops an object when its last proxy is gone, and the worker's proxy counts only once the task is there.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._proxies = unclaimed.pop(threading.get_ident(), None)

    def resolve(self, tag: int, nanos: int, pickled: Any, buffers: Any) -> None:
        """Pass the task's end on."""
        self._call.resolve(tag, nanos, pickled, buffers)


def reducer(kind: type, route: Route) -> Callable[[Any], Any] | None:
    """Return the reducer for proxies of this type on this route; None for what is no proxy."""
    # A program that has proxies has imported multiprocessing's managers.
    base = getattr(sys.modules.get("multiprocessing.managers"), "BaseProxy", None)
    if base is None or not issubclass(kind, base):
        return None
    return functools.partial(_reduce, route)


def _reduce(route: Route, proxy: Any) -> Any:
    managers: Any = sys.modules["multiprocessing.managers"]
    reduced = proxy.__reduce__()
    if reduced[0] is not managers.RebuildProxy:
        return NotImplemented
    kind, token, serializer, options = reduced[1]
    if not route.shares_files:
        raise pickle.PicklingError(
            f"a {type(proxy).__name__} of a multiprocessing manager ({token.typeid!r}) cannot be sent: the manager "
            "is a process of this machine, and the other end is another machine, to which its key does not go. Let "
            "tasks take plain values (dict(proxy), list(proxy), items of a queue) and return what they change; proxies "
            "work on sky.Local()"
        )
    # Not an AuthenticationString, which refuses to be pickled.
    options = {**options, "authkey": bytes(proxy._authkey)}
    if not route.to_client:
        # See `Keeping`.
        unclaimed.setdefault(threading.get_ident(), []).append(proxy)
    own = None if route.to_client else bytes(managers.process.current_process().authkey)
    return _rebuild, (own, kind, token, serializer, options)


def _rebuild(authkey: bytes | None, kind: Any, token: Any, serializer: str, options: dict[str, Any]) -> Any:
    """Return the proxy. A worker makes the client's key its own: proxies that it gets through this one need it."""
    from multiprocessing import managers, process

    current = process.current_process()
    if authkey is not None and current.authkey != authkey:
        current.authkey = authkey
    return managers.RebuildProxy(kind, token, serializer, options)  # type: ignore[attr-defined]
