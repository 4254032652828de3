"""Warning categories that travel.

scikit-learn pickles `warnings.filters` into every task. A filter of a package that the task's worker lacks (pytest's, a
cloud SDK's) would make the task fail before it starts. So a category from outside the standard library travels as its
module and name. A far end that cannot import the category makes a class in its place. No warning is an instance of this
class, so the filter never matches there.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

_stand_ins: dict[tuple[str, str], type[Warning]] = {}
"""The classes in the place of categories that cannot be imported here, by module and qualified name. To try an import
again, for every task, would take too long."""


def reduce(category: type[Warning], usual: Callable[[type], Any]) -> Any:
    """Return how a category is pickled, as `reducer_override` does. `usual` returns it for other classes."""
    name = category.__module__, category.__qualname__
    if _stand_ins.get(name) is not category:
        if str(name[0]).partition(".")[0] in sys.stdlib_module_names:
            return NotImplemented
        reduced = usual(category)
        if reduced is not NotImplemented:
            # By value: no import finds it, because it is the script's own, for example.
            return reduced
    return find, name


def find(module: str, qualname: str) -> type[Warning]:
    """Import a category, or return the class in its place: always the same one."""
    known = _stand_ins.get((module, qualname))
    if known is not None:
        return known
    try:
        found = functools.reduce(getattr, qualname.split("."), importlib.import_module(module))
        if not (isinstance(found, type) and issubclass(found, Warning)):
            raise TypeError(f"{found!r} is no warning category")
        return found
    except Exception:
        # A module may raise anything when it is imported, and the task must run all the same.
        stand_in = type(qualname.rpartition(".")[2], (Warning,), {"__module__": module, "__qualname__": qualname})
        # Several threads may come here at the same time, and all get the same class.
        return _stand_ins.setdefault((module, qualname), stand_in)
