"""scikit-learn's callbacks (`ProgressBar`, `ScoringMonitor`; scikit-learn 1.9 and later) on workers.

A callback in a worker reports to a listener in the user's process. scikit-learn's own transport connects to a socket of
the user's machine. Other machines cannot reach it, and the one connection that a process has mixes up the messages of
its threads. So a listener's handle is pickled in a way of ours: once it is rebuilt in a worker, whatever scikit-learn
sends to the listener becomes a message home (messages.py).

For that, one name in scikit-learn's transport is replaced, in worker processes only: `Client`. All functions of the
transport connect through it, also when other modules have imported these functions.
"""

from __future__ import annotations

import functools
import inspect
import logging
import multiprocessing.connection
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from .. import messages

log = logging.getLogger("skyward_lite")

ADDRESS: Final = "scikit-learn callbacks"
"""The address of messages for scikit-learn's listeners. Each message is a pair: the listener's own address, and the
message for it."""

_lock = threading.Lock()
_home: set[str] = set()
"""In a worker: the addresses of listeners that are in the client, or in the client of a pool around this one."""
_warned = False


def reducer(kind: type) -> Callable[[Any], Any] | None:
    """Return how an instance of this class of scikit-learn's callbacks is pickled; None for the usual way.

    Warns, once, if it is the class of a callback or of a handle, and the installed scikit-learn has a transport that is
    not the one known here.
    """
    is_handle = kind.__name__ == "ListenerHandle"
    if not is_handle and not hasattr(kind, "on_fit_task_begin"):
        return None
    transport, why = _transport()
    if transport is not None:
        return _reduce if is_handle else None
    _warn(why)
    return None


def _warn(why: str) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    import sklearn

    log.warning(
        "the callbacks of scikit-learn %s may fail or report nothing from workers, above all from those on other "
        "machines, because %s. Set callbacks only on what is fitted in this process (n_jobs=1), or use a version of "
        "scikit-learn and of skyward_lite that fit each other",
        *(sklearn.__version__, why),
    )


@functools.cache
def _transport() -> tuple[ModuleType | None, str]:
    """Return scikit-learn's transport, if it is the one known here; otherwise None, and in which way it differs."""
    try:
        from sklearn.callback import _transport as found
    except ImportError as error:
        return None, f"its transport is missing ({error})"
    module: Any = found
    try:
        known = (
            getattr(module.ListenerHandle, "_fields", ()) == ("address", "authkey")
            and isinstance(module._message_consumers, dict)
            and isinstance(vars(module).get("_listeners"), dict)
            and module.Client in (multiprocessing.connection.Client, _connect)
            and list(inspect.signature(module.send).parameters) == ["listener_handle", "message"]
            and list(inspect.signature(module.can_reuse_listener).parameters) == ["listener_handle"]
            and {"Client", "_message_consumers"} <= {*module.send.__code__.co_names}
            and {"Client", "_listeners"} <= {*module.can_reuse_listener.__code__.co_names}
        )
    except AttributeError as error:
        return None, f"its transport has changed ({error})"
    return (module, "") if known else (None, "its transport has changed")


def _reduce(handle: Any) -> Any:
    """Return how a handle is pickled whose listener is in this process, or gets its messages through this process."""
    transport = _transport()[0]
    if transport is None or (handle.address not in transport._message_consumers and handle.address not in _home):
        return NotImplemented
    messages.listen(ADDRESS, _deliver)
    return _rebuild, tuple(handle)


def _rebuild(address: str, authkey: bytes) -> Any:
    """Rebuild a handle. In a worker, messages to its listener go home from now on.

    At the client, a listener that is not the client's own is a worker's: a task has returned an estimator with a
    callback. A fit of this estimator at the client would report to the worker, where nobody reads it. So the handle
    gets an address that leads nowhere, and scikit-learn opens a listener at the client.
    """
    from sklearn.callback._transport import ListenerHandle

    transport, why = _transport()
    if transport is None:
        _warn(why)
    elif messages.in_worker():
        with _lock:
            _home.add(address)
            transport.Client = _connect  # type: ignore[attr-defined]
    elif address not in transport._message_consumers:
        address += " (in a worker)"
    return ListenerHandle(address, authkey)


def _connect(address: str, *args: Any, **kwargs: Any) -> Any:
    """Connect to a listener, in the place of `multiprocessing.connection.Client`."""
    if address in _home:
        return _Home(address)
    return multiprocessing.connection.Client(address, *args, **kwargs)


class _Home:
    """A connection to a listener, as scikit-learn sees it. It has no state, so that threads may share it."""

    def __init__(self, address: str) -> None:
        self._address = address

    def send(self, message: object) -> None:
        messages.send_home(ADDRESS, (self._address, message))

    def recv(self) -> None:
        """Return the listener's acknowledgement: `send` has waited for it."""

    def close(self) -> None:
        pass


def _deliver(pair: tuple[str, Any]) -> None:
    """Hand a message to scikit-learn's listener in this process, or send it on to the client of this worker's pool."""
    address, message = pair
    transport, why = _transport()
    if transport is None:
        raise LookupError(f"scikit-learn's listener cannot be found: {why}")
    consumer = transport._message_consumers.get(address)
    if consumer is not None:
        consumer(message)
    elif address in _home:
        messages.send_home(ADDRESS, pair)
    else:
        raise LookupError("scikit-learn's listener is closed: its fit has ended, or its callback is gone")
