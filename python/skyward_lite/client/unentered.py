"""A warning for pools that were made and never entered, while joblib runs its tasks elsewhere.

`pool = sky.pool(...)` alone starts nothing, and what follows it would silently run on joblib's own backend. As long as
there is such a pool, the factory of that backend in joblib's registry is ours. It makes the same backend, and watches
for its first use as the default: a backend that the program names itself is none of our business. joblib's code stays
as it is, and its registry is as it was once the pool is entered or closed, or the warning was given.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from typing import Any

_LIBRARIES = ("joblib", "sklearn", "skyward_lite")
"""Packages whose lines no warning points to."""
_DEFAULT_IS_ASKED_FOR = "_get_active_backend"
"""The function of joblib's that makes a backend which the program has not named."""

_unentered: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()
"""A pool that was made and not entered yet → file and line where it was made."""
_original: tuple[str, Any] | None = None
"""The name and the factory of joblib's default backend while ours has its place."""
_warned = False


def made(pool: object) -> None:
    """Note that a pool for joblib was made."""
    if not _warned:
        frame = _caller()
        _unentered[pool] = "" if frame is None else f" at {frame.f_code.co_filename}:{frame.f_lineno}"
        watch()


def entered(pool: object) -> None:
    """Note that a pool was entered or closed."""
    _unentered.pop(pool, None)
    if not _unentered:
        _restore()


def watch() -> None:
    """Take the factory's place if joblib is imported and a pool was made that is not entered."""
    global _original
    joblib = sys.modules.get("joblib.parallel")
    backends = getattr(joblib, "BACKENDS", {})
    name: str = getattr(joblib, "DEFAULT_BACKEND", "")
    if _original is None and _unentered and name in backends:
        _original = (name, backends[name])
        backends[name] = _make


def forget() -> None:
    """Forget the pools that were not entered."""
    _unentered.clear()
    _restore()


def _restore() -> None:
    global _original
    if _original is not None:
        (name, factory), _original = _original, None
        backends = sys.modules["joblib.parallel"].BACKENDS
        # The program may have registered a factory of its own meanwhile, which stays.
        if backends.get(name) is _make:
            backends[name] = factory


def _make(*args: Any, **kwargs: Any) -> Any:
    """Make joblib's default backend."""
    joblib = sys.modules["joblib.parallel"]
    factory = joblib.LokyBackend if _original is None else _original[1]
    backend = factory(*args, **kwargs)
    if _unentered and sys._getframe(1).f_code.co_name == _DEFAULT_IS_ASKED_FOR:
        # On this one object, until it is used for the first time.
        backend.configure = functools.partial(_configure, backend)
    return backend


def _configure(backend: Any, n_jobs: int = 1, *args: Any, **kwargs: Any) -> Any:
    del backend.configure
    if n_jobs != 1:
        _warn(type(backend).__name__)
    return backend.configure(n_jobs, *args, **kwargs)


def _warn(backend: str) -> None:
    global _warned
    places = [*_unentered.values()]
    if _warned or not places:
        return
    _warned = True
    forget()
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and _is_library(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"joblib runs these tasks on this machine ({backend}), because the pool that was made{places[-1]} has not been "
        "started. Use it as `with sky.pool(...) as pool:`, or call pool.start(), as in a notebook",
        UserWarning,
        stacklevel=level,
    )


def _is_library(frame: Any) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in _LIBRARIES


def _caller() -> Any:
    """Return the frame of the program's that this call comes from."""
    frame: Any = sys._getframe(1)
    while frame is not None and _is_library(frame):
        frame = frame.f_back
    return frame
