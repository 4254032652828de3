"""The names of modules that code imports: functions as they are, and sources as they are written."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import types
from collections.abc import Iterator

_NO_ESCAPE = re.compile(r"""\\(?:([^\n\r\\'"abfnrtvxNuU])|.)""", re.DOTALL)
"""A backslash with what follows it; the group has a character that needs no backslash before it."""


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

    `package` is the one that relative imports start from. `from a import b` names both `a` and `a.b`. What is imported
    for type checkers only, under `if TYPE_CHECKING:`, is left out.
    """
    names: set[str] = set()
    # Python warns of a backslash that means nothing: at each look, and as an error under a filter "error".
    quiet = _NO_ESCAPE.sub(lambda found: found[1] or found[0], text)
    try:
        left: list[ast.AST] = [ast.parse(quiet)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # The last two are for expressions that are nested too deeply.
        return set()
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and _is_for_type_checkers(node.test):
            left += node.orelse
            continue
        left += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package or None)
            except ImportError:
                continue  # it is relative, and the source is in no package
            names.update((origin, *(f"{origin}.{alias.name}" for alias in node.names if alias.name != "*")))
    return names


def _is_for_type_checkers(test: ast.expr) -> bool:
    """Return whether a condition is `TYPE_CHECKING` or `typing.TYPE_CHECKING`."""
    return "TYPE_CHECKING" in (getattr(test, "id", ""), getattr(test, "attr", ""))
