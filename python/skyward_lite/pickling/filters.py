"""Warning categories that travel.

scikit-learn pickles `warnings.filters` into every task. A filter of a package that its worker lacks (pytest's, a cloud
SDK's) would make the task fail before it starts. So a category from outside the standard library goes as its module and
name; a far end that cannot import it takes a class that nothing is an instance of, and the filter never matches there.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

_stand_ins: dict[tuple[str, str], type[Warning]] = {}
"""What was not importable here, by module and qualified name. Kept: a failing import costs too much for every task."""


def reduce(category: type[Warning], ordinarily: Callable[[type], Any]) -> Any:
    """Say how a pickler shall send the category, as `reducer_override` does; `ordinarily` says it of other classes."""
    name = category.__module__, category.__qualname__
    if _stand_ins.get(name) is not category:
        if str(name[0]).partition(".")[0] in sys.stdlib_module_names:
            return NotImplemented
        kept = ordinarily(category)
        if kept is not NotImplemented:
            # By value: it is from __main__, say, and no import can find it.
            return kept
    return find, name


def find(module: str, qualname: str) -> type[Warning]:
    """Import a category, or give its stand-in: always the same one."""
    known = _stand_ins.get((module, qualname))
    if known is not None:
        return known
    try:
        found = functools.reduce(getattr, qualname.split("."), importlib.import_module(module))
        if not (isinstance(found, type) and issubclass(found, Warning)):
            raise TypeError(f"{found!r} is no warning category")
        return found
    except Exception:
        # Whatever a module does when it is imported, a filter must not break a task.
        stand_in = type(qualname.rpartition(".")[2], (Warning,), {"__module__": module, "__qualname__": qualname})
        # Threads that come here at the same time get the same one.
        return _stand_ins.setdefault((module, qualname), stand_in)
