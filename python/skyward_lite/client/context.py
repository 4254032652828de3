"""What a program has set in this process for all of its calculations. It holds in tasks, too.

It is noted when a pool is opened. `node/context.py` makes it hold in workers.
"""

from __future__ import annotations

import contextlib
import json
import locale
import os
import re
import sys
import warnings
from collections.abc import Mapping
from typing import Any, Final

THREAD_PREFIXES: Final = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "VECLIB_", "NUMEXPR_", "NUMBA_")
"""How the names of the variables begin by which numeric libraries are set: threads, their places, their schedules."""
OTHER_VARIABLES: Final = ("PYTHONWARNINGS", "SKLEARN_ASSUME_FINITE", "SKLEARN_WORKING_MEMORY")
MAX_CONTEXT: Final = 16_384
"""Characters of a context, which travels in a hello. What does not fit is left out: filters first."""


def variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables of this process that its workers have as well."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(THREAD_PREFIXES) or name in OTHER_VARIABLES
    }


def record() -> str:
    """Return what `node/context.py` applies, as JSON: warning filters, scikit-learn's configuration, the locale."""
    found = {"filters": _filters(), "sklearn": _sklearn(), "locale": _locale()}
    text = json.dumps(found)
    return text if len(text) <= MAX_CONTEXT else json.dumps({**found, "filters": []})


def _filters() -> list[tuple[Any, ...]]:
    """Return the warning filters in their order: action, message, category's module and name, module, line."""
    found = []
    for item in list(warnings.filters):
        if len(item) != 5:
            continue
        action, message, category, module, line = item
        patterns = _pattern(message), _pattern(module)
        # A list that a program has filled itself may have anything in it, which matches no warning.
        if isinstance(category, type) and isinstance(line, int) and all(isinstance(p, str | None) for p in patterns):
            name = str(category.__module__), category.__qualname__
            found.append((str(action), patterns[0], name, patterns[1], line))
    return found


def _pattern(pattern: object) -> object:
    """Return what `warnings.filterwarnings` makes the same pattern of."""
    # Python's own first filters have a text, which must be equal.
    return f"{re.escape(pattern)}\\Z" if isinstance(pattern, str) else getattr(pattern, "pattern", pattern)


def _sklearn() -> dict[str, Any]:
    """Return scikit-learn's configuration as far as it was changed, if this process has imported scikit-learn."""
    module = sys.modules.get("sklearn")
    with contextlib.suppress(Exception):
        if module is not None:
            first = sys.modules["sklearn._config"]._global_config
            return {name: value for name, value in module.get_config().items() if _is_changed(first, name, value)}
    return {}


def _is_changed(first: Mapping[str, Any], name: str, value: object) -> bool:
    return value != first.get(name) and isinstance(value, str | int | float | bool | None)


def _locale() -> str:
    """Return the locale of all categories, as `locale.setlocale` takes it."""
    try:
        return locale.setlocale(locale.LC_ALL)
    except locale.Error:
        return ""
