"""Every public name, parameter and error type is as recorded: whatever changes here is a change for users."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import skyward_lite as sky

RECORD = Path(__file__).with_name("public_api.txt")
"""One line for each name. `RECORD_API=1 pytest tests/unit/test_public_api.py` writes it anew."""


def described() -> Iterator[str]:
    """Return each public name with its parameters, in the order of `__all__`."""
    for name in sky.__all__:
        thing = getattr(sky, name)
        if isinstance(thing, types.ModuleType):
            for part in sorted(PARTS[name]):
                yield from of(f"{name}.{part}", getattr(thing, part))
        else:
            yield from of(name, thing)
    for name in sorted(vars(sky.pool(sky.Local()))):
        if not name.startswith("_"):
            yield f"pool().{name}"


PARTS = {
    "errors": [name for name in vars(sky.errors) if isinstance(getattr(sky.errors, name), type)],
    "messages": ["Listener", "listen", "send", "unlisten"],
    "plugins": ["Plugin", "WorkerInfo", "joblib", "sklearn"],
}
"""The names that a public module offers."""


def of(name: str, thing: Any) -> Iterator[str]:
    if isinstance(thing, type) and issubclass(thing, BaseException):
        yield f"{name}: {' < '.join(base.__name__ for base in thing.__mro__[:-2])}"
    elif isinstance(thing, type) and not isinstance(thing, types.GenericAlias):
        yield f"{name}{parameters(thing)}"
        if dataclasses.is_dataclass(thing):
            yield f"{name}: {', '.join(field.name for field in dataclasses.fields(thing))}"
        for part, value in sorted(inherited(thing).items()):
            if isinstance(value, property):
                yield f"{name}.{part}"
            elif callable(value) or isinstance(value, classmethod | staticmethod):
                yield f"{name}.{part}{parameters(getattr(thing, part))}"
    elif inspect.isfunction(thing):
        yield f"{name}{parameters(thing)}"
    else:
        yield f"{name}: {type(thing).__name__}"


def inherited(kind: type) -> dict[str, Any]:
    """Return the public parts of a class that this package defines."""
    own = [base for base in kind.__mro__ if base.__module__.startswith("skyward_lite")]
    return {part: value for base in reversed(own) for part, value in vars(base).items() if not part.startswith("_")}


def parameters(thing: Any) -> str:
    signature = inspect.signature(thing)
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def test_public_names_and_signatures_are_as_recorded() -> None:
    """Names, parameters, defaults, fields, methods and bases of errors are those of `public_api.txt`."""
    found = "".join(f"{line}\n" for line in described())
    if os.environ.get("RECORD_API"):
        RECORD.write_text(found)
    recorded = RECORD.read_text()
    if found != recorded:
        pytest.fail("\n".join(difflib.unified_diff(recorded.splitlines(), found.splitlines(), lineterm="")))
