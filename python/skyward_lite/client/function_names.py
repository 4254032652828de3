"""The names of the functions that a pool has run, by number: for those who watch a run."""

from __future__ import annotations

import threading
from typing import Any, Final

MAX_NAMES: Final = 65_536
"""Names that one pool remembers. Functions of further names have none."""


class FunctionNames:
    """Numbers the names of functions, from 1 on."""

    def __init__(self) -> None:
        self.names = [""]
        """The names by number; 0 stands for functions without a name."""
        self._numbers: dict[tuple[Any, Any], int] = {}
        """The number of each name, by the function's module and its name there."""
        self._lock = threading.Lock()
        """Held to add a name."""

    def number(self, function: Any) -> int:
        """Return the number of a function's name; 0 if it has none."""
        try:
            key = function.__module__, function.__qualname__
            return self._numbers[key]
        except Exception:
            # A new name, or an object without a name: a partial function, or an instance that can be called.
            return self._add(function)

    def _add(self, function: Any) -> int:
        try:
            for _ in range(8):
                if isinstance(getattr(function, "__qualname__", None), str):
                    break
                function = getattr(function, "func", type(function))
            module, name = str(function.__module__), str(function.__qualname__)
        except Exception:  # attributes of the user's objects may raise anything
            return 0
        with self._lock:
            number = self._numbers.get((module, name))
            if number is None and len(self.names) <= MAX_NAMES:
                number = self._numbers[module, name] = len(self.names)
                self.names.append(name if module in ("__main__", "None") else f"{module}.{name}")
        return number or 0
