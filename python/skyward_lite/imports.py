"""The names of modules that code imports: functions as they are, and sources as they are written."""

from __future__ import annotations

import ast
import functools
import importlib.util
import types
from collections.abc import Iterator


def in_code(code: types.CodeType) -> Iterator[str]:
    """Yield the names of the modules that a function imports when it runs, and those of functions within it.

    Not found are relative imports, and modules that code names otherwise, as by `importlib.import_module`.
    """
    importing, extending = _opcodes()
    operations = code.co_code
    # Most functions import nothing: that is known from their bytes alone.
    if importing in operations[::2]:
        argument = 0
        for operation, low in zip(operations[::2], operations[1::2], strict=False):
            argument = argument << 8 | low
            if operation == importing:
                yield from code.co_names[argument : argument + 1]
            if operation != extending:
                argument = 0
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from in_code(constant)


@functools.cache
def _opcodes() -> tuple[int, int]:
    # Not at the module's head: a worker has no use for it.
    import opcode

    return opcode.opmap["IMPORT_NAME"], opcode.opmap["EXTENDED_ARG"]


def in_source(text: str, package: str = "") -> set[str]:
    """Return the names of the modules that a source imports, anywhere in it; none for a text that is no Python.

    `package` is the one that relative imports start from. `from a import b` names both `a` and `a.b`.
    """
    names: set[str] = set()
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package or None)
            except ImportError:
                continue  # it is relative, and the source is in no package
            names.update((origin, *(f"{origin}.{alias.name}" for alias in node.names if alias.name != "*")))
    return names
