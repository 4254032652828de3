"""What the client's program has set for all of its calculations, in this worker: see `client/context.py`.

Warning filters and scikit-learn's configuration are applied after the imports that come with a task. A module may add
filters when it is imported. The client imported its modules before its program set filters, so the program's filters
come first in a worker, too. A category is looked up only when its package is there: a worker imports nothing for a
filter.

The action "error" becomes "default" in a worker. The client's program set it after its imports, and in a worker it
would make the imports fail.
"""

from __future__ import annotations

import contextlib
import json
import locale
import re
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, Final

from . import first_imports, task_warnings

_ACTIONS: Final = {"error": "default"}
"""What becomes of an action here; the others stay."""


class Context:
    """The client's context in one worker process, for all of its threads."""

    def __init__(self, text: str) -> None:
        found = json.loads(text) if text else {}
        self._filters: list[Any] = found.get("filters", [])
        self._sklearn: dict[str, Any] = found.get("sklearn", {})
        self._locale: str = found.get("locale", "")
        self.watches_imports = bool(self._sklearn)
        """Whether it is to be told of imports within tasks, by `first_imports`."""
        self._first = list(warnings.filters)
        """The filters of this process at its start."""
        self._lock = threading.Lock()
        self._filtered = 0
        """The length of `sys.modules` when the filters were last applied."""

    def set_locale(self) -> None:
        """Set the client's locale, if this node has it. Called once, before the first task."""
        with contextlib.suppress(locale.Error, ValueError, TypeError):
            if self._locale and locale.setlocale(locale.LC_ALL) != self._locale:
                locale.setlocale(locale.LC_ALL, self._locale)

    def for_thread(self) -> Callable[[], None] | None:
        """Return what a thread calls before each task, when its call has been rebuilt; None for nothing."""
        if not (self._filters or self._sklearn):
            return None
        if self.watches_imports:
            # A task may import scikit-learn itself.
            first_imports.after_each(self._configure)
        configured = not self._sklearn
        count = 0

        def apply() -> None:
            nonlocal configured, count
            if len(sys.modules) == count:
                return
            count = len(sys.modules)
            # A task runs whatever the client has set.
            with contextlib.suppress(Exception):
                self._apply_filters(count)
            configured = configured or self._configure()

        return apply

    def _configure(self) -> bool:
        """Configure scikit-learn for the calling thread and for later ones; return False if it is not imported yet."""
        module: Any = sys.modules.get("sklearn")
        if not hasattr(module, "set_config"):
            return False  # not there, or another thread is importing it
        for name, value in self._sklearn.items():
            # Another version may lack an option, and some options need other packages.
            with contextlib.suppress(Exception):
                module.set_config(**{name: value})
                sys.modules["sklearn._config"]._global_config[name] = value
        return True

    def _apply_filters(self, count: int) -> None:
        with self._lock:
            if self._filtered == count:
                return
            self._filtered = count
            present = task_warnings.process_filters()
            filters = merged(self._filters, present, self._first)
            if filters != present:
                task_warnings.set_process_filters(filters)


def merged(noted: list[Any], present: list[Any], first: list[Any]) -> list[Any]:
    """Return a worker's filters with the client's `noted` ones.

    `present` are the filters that the worker has, `first` those that it had at its start. First come the filters of
    modules that only the worker has imported, as they would at the client; then the client's; then the worker's own.
    """
    clients = []
    for action, message, (module, name), where, line in noted:
        category = _category(module, name)
        if category is not None:
            with contextlib.suppress(re.error, TypeError):
                patterns = message and re.compile(message, re.IGNORECASE), where and re.compile(where)
                clients.append((_ACTIONS.get(action, action), patterns[0], category, patterns[1], line))
    there, start = {*map(_key, clients)}, {*map(_key, first)}
    others = [item for item in present if _key(item) not in there]
    added = [item for item in others if _key(item) not in start]
    return [*added, *clients, *(item for item in others if _key(item) in start)]


def _key(item: Any) -> tuple[Any, ...]:
    """Return what makes two filters the same, however their patterns are given."""
    action, message, category, module, line = item
    return action, getattr(message, "pattern", message), category, getattr(module, "pattern", module), line


def _category(module: str, name: str) -> type[Warning] | None:
    """Return a category that is there without an import; None for others."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Warning) else None
