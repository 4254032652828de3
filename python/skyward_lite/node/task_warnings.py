"""The `warnings` module for tasks that run side by side in threads of one process: each task has its own filters.

Python has one list of filters, and one function that shows warnings, per process. With `catch_warnings` in two threads
at once, one thread sees the other's filters, and these may stay behind. In a worker with several slots `install` gives
each thread a view of its own:

- A task begins with the process's filters, and its changes end with it.
- A filter that a module adds when it is imported is added for the process as well: the import happens once, and all
  later tasks are to have the filter.
- A thread that a task starts inherits the task's view.

C code reads `filters` and `_showwarnmsg` as attributes of the module, so these are properties of the module's class.
The functions in warnings.py read their own globals, so the module's dictionary has objects that forward to the view.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import importlib
import itertools
import logging
import operator
import sys
import threading
import types
import warnings
from collections import UserList
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_PATCHED = ("_add_filter", "_filters_mutated", "_showwarning_orig", "_showwarnmsg", "_showwarnmsg_impl")


class _View:
    """The state of `warnings` that one task sees. A copy shares `seen` with it until either changes its filters."""

    __slots__ = ("captured", "filters", "impl", "own", "seen", "showwarning")

    def __init__(
        self, filters: list[Any], showwarning: Any, impl: Any, captured: Any, seen: dict[Any, bool], own: list[Any]
    ) -> None:
        self.filters = filters
        self.showwarning = showwarning
        self.impl = impl
        self.captured = captured
        """The `showwarning` that `logging.captureWarnings` has replaced; None if warnings do not go to the log."""
        self.seen = seen
        """The warnings that were shown, each with whether it is not to be shown again. A change of the filters makes a
        new dictionary."""
        self.own = own
        """The list that `filters` was when the task began. Within `catch_warnings`, `filters` is another list."""

    def copy(self) -> _View:
        filters = self.filters[:]
        return _View(filters, self.showwarning, self.impl, self.captured, self.seen, filters)

    def inherited(self) -> _View:
        return _View(self.filters, self.showwarning, self.impl, self.captured, self.seen, self.own)

    def shown_by(self) -> tuple[Any, Any, Any]:
        return self.showwarning, self.impl, self.captured


class Scope:
    """A thread's place for its view. The task loop sets `view` to None when a task has ended."""

    __slots__ = ("importing", "task", "view")

    def __init__(self, view: _View | None = None, task: tuple[Scope, _View] | None = None) -> None:
        self.view = view
        """None until the task first reads or changes its filters."""
        self.task = task
        """For a thread that a task started: the scope and the view of that task."""
        self.importing: list[Any] | None = None
        """The task's own filters, while it imports a module; None within a `catch_warnings` that it has entered."""

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the calls of a batch. The changes of one call end before the next call begins."""
        for item in items:
            self.view = None
            yield item


_process = _View([], None, None, None, {}, [])
"""The process's own state, which the main thread sees and a copy of which each task begins with. `install` fills it."""
_process_scope = Scope(_process)


class _Own(threading.local):
    scope = _process_scope


_own = _Own()


def _view() -> _View:
    """Return the calling thread's view."""
    scope = _own.scope
    task = scope.task
    if task is not None and task[0].view is not task[1]:
        # The task that started this thread has ended, and its filters with it.
        scope.task = scope.view = None
    view = scope.view
    if view is None:
        view = scope.view = _process.copy()
    return view


def _attribute(name: str) -> property:
    def read(module: types.ModuleType) -> Any:
        return getattr(_view(), name)

    def write(module: types.ModuleType, value: Any) -> None:
        setattr(_view(), name, value)

    return property(read, write)


class _Filters(UserList[Any]):
    """The calling thread's list, for the functions in warnings.py."""

    def __init__(self) -> None:
        """Keep nothing: `data` is looked up at each use."""

    @property
    def data(self) -> list[Any]:  # type: ignore[override]
        return _view().filters


def _add_filter(*item: Any, append: bool) -> None:
    """Add a filter to the calling thread's list, and to the process's if it comes from a module's import."""
    view = _view()
    _put(view, item, append)
    if _own.scope.importing is view.filters and view is not _process:
        _put(_process, item, append)


def _put(view: _View, item: tuple[Any, ...], append: bool) -> None:
    """Put a filter first or last, as Python does.

    A filter that is in the list already is moved if it is to be the first, and stays if it is to be the last.
    """
    filters = view.filters
    if not append:
        with contextlib.suppress(ValueError):
            filters.remove(item)
        filters.insert(0, item)
    elif item not in filters:
        filters.append(item)
    view.seen = {}


def _filters_mutated() -> None:
    """Forget which warnings were shown to the calling thread, so that they are shown again."""
    _view().seen = {}


def _show(message: warnings.WarningMessage) -> None:
    """Show a warning, unless its filter says to show it once and the calling thread has seen it."""
    view = _view()
    seen = view.seen
    key = (str(message.message), message.category, message.filename, message.lineno)
    if seen.get(key):
        return
    if key not in seen:
        action = _action(view.filters, message, key[0])
        if action in ("once", "module"):
            first = key[:3] not in seen
            seen[key[:3]] = True
        else:
            first = True
        seen[key] = action not in ("always", "all")
        if not first:
            return
    if view.showwarning is warnings._showwarning_orig:  # type: ignore[attr-defined]
        view.impl(message)
    elif not callable(view.showwarning):
        raise TypeError("warnings.showwarning() must be set to a function or method")
    else:
        details = message.message, message.category, message.filename, message.lineno, message.file, message.line
        view.showwarning(*details)


def _action(filters: list[Any], message: warnings.WarningMessage, text: str) -> str:
    """Return the action of the filter that matches. C has found the same one, but does not hand it on."""
    for action, pattern, category, module, lineno in filters:
        if (
            issubclass(message.category, category)
            and lineno in (0, message.lineno)
            and _matches(pattern, text)
            and (module is None or _matches(module, _module(message)))
        ):
            return str(action)
    return str(warnings.defaultaction)  # type: ignore[attr-defined]


def _matches(pattern: Any, text: str) -> bool:
    return pattern is None or (pattern == text if isinstance(pattern, str) else pattern.match(text) is not None)


def _module(message: warnings.WarningMessage) -> str:
    """Return the name of the module that a warning is about.

    The module of the frame on the stack at the warning's line; without such a frame, the file that the warning names.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_lineno == message.lineno and frame.f_code.co_filename == message.filename:
            return str(frame.f_globals.get("__name__") or "<string>")
        frame = frame.f_back
    return message.filename.removesuffix(".py")


def _showing() -> property:
    """Return the attribute `_showwarnmsg`, which is `_show`. Each read of it makes all registries invalid.

    A registry lists the warnings that a module has shown. All threads share it, and C looks a warning up there before
    it asks for the filters. For example, one thread shows a warning with the action "default". Then the entry would
    keep the filter "error" of another thread from being applied. C reads this attribute just after it has made an
    entry. Only C functions run here, so that no other thread runs before the entry is invalid.
    """
    invalidate: Callable[[], None] = warnings._filters_mutated  # type: ignore[attr-defined]
    steps = zip(iter(invalidate, object()), itertools.repeat(_show))
    # A property calls `next(shows, module)`, in which `module` is the value for the end of an iterator: it never ends.
    shows = map(operator.itemgetter(1), steps)
    return property(functools.partial(next, shows))


def _capture_warnings(capture: bool) -> None:
    """Do what `logging.captureWarnings` does, for the calling thread's view.

    The original has one variable, for all threads, for the `showwarning` that it has replaced.
    """
    view = _view()
    log: Any = logging
    if capture and view.captured is None:
        # logging hands a warning on to this function if it is to be shown in a file.
        log._warnings_showwarning = view.captured = view.showwarning
        view.showwarning = log._showwarning
    elif not capture and view.captured is not None:
        view.showwarning, view.captured = view.captured, None


def install() -> bool:
    """Make a view for each thread that calls `enter`. Do nothing and return False if that is impossible or needless.

    It is impossible if Python's module lacks a name that is replaced here, and needless from Python 3.14 on: there,
    with `-X context_aware_warnings`, Python itself does the same.
    """
    if hasattr(sys.flags, "context_aware_warnings") or not all(hasattr(warnings, name) for name in _PATCHED):
        return False
    _process.filters = warnings.filters  # type: ignore[assignment]
    _process.showwarning = warnings.showwarning
    _process.impl = warnings._showwarnmsg_impl  # type: ignore[attr-defined]
    _process.captured = getattr(logging, "_warnings_showwarning", None)
    if hasattr(logging, "_showwarning"):
        logging.captureWarnings = functools.wraps(logging.captureWarnings)(_capture_warnings)
    parts = {name: _attribute(name) for name in ("filters", "showwarning")}
    parts |= {"_showwarnmsg_impl": _attribute("impl"), "_showwarnmsg": _showing()}
    kind = type("ThreadedWarnings", (types.ModuleType,), parts)
    # cloudpickle would pickle this module by value, because its class is no longer Python's own. It goes by its name.
    copyreg.pickle(kind, lambda module: (importlib.import_module, ("warnings",)))
    warnings._filters_mutated()  # type: ignore[attr-defined]
    vars(warnings).update(
        filters=_Filters(),
        _add_filter=_add_filter,
        _filters_mutated=_filters_mutated,
        _showwarnmsg=_show,
        _showwarnmsg_impl=lambda message: _view().impl(message),
    )
    warnings.__class__ = kind
    _inherit()
    return True


def _inherit() -> None:
    """Start the threads of tasks with the task's view. The thread and the task share the list of filters."""
    start = threading.Thread.start

    def start_thread(thread: threading.Thread) -> None:
        scope = _own.scope
        if scope is not _process_scope:
            view = _view()
            task = scope.task or (scope, view)
            inherited = Scope(view.inherited(), task)

            def run() -> None:
                del thread.run
                _own.scope = inherited
                thread.run()

            thread.run = run  # type: ignore[method-assign]
        start(thread)

    threading.Thread.start = functools.wraps(start)(start_thread)  # type: ignore[method-assign, assignment]


def _is_installed() -> bool:
    # The attribute is a property; the module's dictionary has what `install` has put there.
    return isinstance(vars(warnings)["filters"], _Filters)


def process_filters() -> list[Any]:
    """Return the filters with which each task begins."""
    return list(_process.filters if _is_installed() else warnings.filters)


def set_process_filters(filters: list[Any]) -> None:
    """Set the filters with which each task begins. Called between two tasks, or before a task's function runs.

    The calling thread's task sees them as well.
    """
    if _is_installed():
        _process.filters, _process.seen = filters, {}
        _own.scope.view = None
    else:
        warnings.filters[:] = filters  # type: ignore[index]
        warnings._filters_mutated()  # type: ignore[attr-defined]


def enter() -> Scope:
    """Make a scope for the calling thread, which is going to run tasks, and return it."""
    scope = _own.scope = Scope()
    return scope


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Apply what a module does to the task's filters, while it is imported, to the process's filters as well.

    Not within a `catch_warnings` of the task, at whose end Python undoes the module's changes.
    """
    scope, view = _own.scope, _view()
    before = scope.importing
    scope.importing = view.filters if view.filters is view.own else None
    shown_by = view.shown_by()
    try:
        yield
    finally:
        scope.importing = before
        if view.filters is view.own and view.shown_by() != shown_by:
            _process.showwarning, _process.impl, _process.captured = view.shown_by()
