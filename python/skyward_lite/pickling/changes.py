"""Which of the user's modules have changed since workers may have imported them.

A worker imports a module from its file when a task first needs it. The client may have imported the same module long
before. Since then the file may have been edited, or the module may have been reloaded in the client. Either way a
worker may have another version than the client, and the client's functions must travel by value.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import logging
import marshal
import math
import operator
import os
import sys
import time
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple

from .installed import EXTENSIONS, file_of, is_installed

log = logging.getLogger("skyward_lite")

LOOK_SECONDS: Final = 0.1
"""Least time between two looks at whether files have changed."""
LOOK_FACTOR: Final = 20
"""The pause after a look at files is at least so many times as long as the look took: at most 5 % of the time is spent
on them, even on a slow network drive."""

EDITED: Final = "was edited after this process had imported it: reload the module or restart the program"
RELOADED: Final = (
    "was reloaded or replaced after workers may have imported it: open a new pool, whose workers import it anew"
)

_spec_of: Final = operator.attrgetter("__spec__")


class Changes:
    """The user's modules in this process, and which of them workers may have in another version.

    `lock` is held while anything in here changes. `on_change` is called, with the lock held, for each module that turns
    out to have changed.
    """

    def __init__(self, lock: AbstractContextManager[Any], on_change: Callable[[], None]) -> None:
        self._lock = lock
        self._on_change = on_change
        self._places: dict[str, int] = {}
        """The user's modules that are known: name → place in the next two lists."""
        self._modules: list[types.ModuleType] = []
        self._specs: list[object] = []
        """The `__spec__` of each module when workers could first import it. `importlib.reload` replaces it."""
        self._reasons: dict[str, str] = {}
        """The modules that have changed: name → what has happened, and the remedy."""
        self._uses: dict[str, set[str]] = {}
        """The names of modules that a module uses, for modules that `reason` has asked for."""
        self._next_look = 0.0
        """When files are looked at next, by `time.monotonic`."""
        self._module_count = 0
        """The length of `sys.modules` when `note_all` last went through it."""

    def note_all(self) -> None:
        """Note the user's modules that this process has by now, and whether the file of one has changed already."""
        if self._module_count == len(sys.modules):
            return
        for name, module in list(sys.modules.items()):
            # A module of another type is loaded only when its first attribute is asked for: it is left alone here.
            if name in self._places or type(module) is not types.ModuleType:
                continue
            file = file_of(module)
            if file is None or file.endswith(EXTENSIONS) or is_installed(name, module):
                continue
            if module.__name__ != name or name in ("__main__", "__mp_main__") or not hasattr(module, "__spec__"):
                continue
            self._places[name] = len(self._modules)
            self._modules.append(module)
            self._specs.append(module.__spec__)
            if not is_as_loaded(name, module, file):
                self._change(name, EDITED)
        self._module_count = len(sys.modules)

    def look(self) -> None:
        """Look whether a module has been reloaded and, from time to time, whether a file has changed."""
        if not all(map(operator.is_, map(_spec_of, self._modules), self._specs)):
            with self._lock:
                for name, place in self._places.items():
                    if self._modules[place].__spec__ is not self._specs[place]:
                        self._change(name, RELOADED)
        if time.monotonic() < self._next_look:
            return
        with self._lock:
            began = time.monotonic()
            if began < self._next_look:
                return
            # Files may be slow. Other threads go on meanwhile with what is known, and do not look themselves.
            self._next_look = math.inf
            noted = [(name, self._modules[place]) for name, place in self._places.items() if name not in self._reasons]
        try:
            replaced = [name for name, module in noted if sys.modules.get(name, module) is not module]
            edited = [name for name, module in noted if not is_as_loaded(name, module, file_of(module) or "")]
            with self._lock:
                for name in edited:
                    self._change(name, EDITED)
                for name in replaced:
                    self._change(name, RELOADED)
        finally:
            ended = time.monotonic()
            self._next_look = ended + max(LOOK_SECONDS, LOOK_FACTOR * (ended - began))

    def reason(self, name: str) -> str:
        """Return why workers may have another version of a module or of one that it uses; empty if they have not."""
        if not self._reasons:
            return ""
        seen, left = {name}, [name]
        while left:
            each = left.pop()
            if each in self._reasons:
                user = "" if each == name else f"it uses {each}, and "
                return f"{user}module {each} {self._reasons[each]}"
            if each in self._places:
                if each not in self._uses:
                    self._uses[each] = _used_by(self._modules[self._places[each]])
                new = self._uses[each] & self._places.keys() - seen
                seen |= new
                left += new
        return ""

    def _change(self, name: str, reason: str) -> None:
        if name not in self._reasons:
            log.info(
                "module %s %s. Until then it and the modules of yours that use it are sent to this pool's workers as "
                "this process has them",
                name,
                reason,
            )
        self._reasons[name] = reason
        self._specs = [module.__spec__ for module in self._modules]
        self._uses.pop(name, None)
        self._on_change()


# ------------------------------------------------------------------------------------------------ a module's file

Stamp = tuple[int, int]
"""A file's time of change in nanoseconds, and its size."""


class _Load(NamedTuple):
    """A module of the user's, and the file from which this process has loaded it, at the last look at both."""

    module: types.ModuleType
    spec: object
    stamp: Stamp
    content: int
    """The hash of the file's content."""


_loads: dict[str, _Load] = {}


def is_as_loaded(name: str, module: types.ModuleType, file: str) -> bool:
    """Return whether a module's file has what this process has loaded from it, as far as that can be known.

    A file that was written again with the same content counts as unchanged.
    """
    load = _loads.get(name)
    if load is not None and (load.module is not module or load.spec is not module.__spec__):
        load = None
    stamp = _stamp(file)
    if stamp is None:
        return load is None  # a module of an archive never had a file of its own
    if load is not None and load.stamp == stamp:
        return True
    try:
        stamp, content = _read(file)
    except OSError:
        return load is None
    same = load.content == hash(content) if load is not None else _has_loaded(module, file, stamp, content)
    if same:
        _loads[name] = _Load(module, module.__spec__, stamp, hash(content))
    return same


def _stamp(file: str) -> Stamp | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _read(file: str) -> tuple[Stamp, bytes]:
    with open(file, "rb") as source:
        content = source.read()
        status = os.fstat(source.fileno())
    return (status.st_mtime_ns, status.st_size), content


def _has_loaded(module: types.ModuleType, file: str, stamp: Stamp, content: bytes) -> bool:
    """Return whether this process has imported a module from this source, at the first look at its file.

    Python's bytecode file tells it if it was written for the source's time and size. Otherwise the functions of the
    module are compared with those of the source.
    """
    spec = module.__spec__
    if type(getattr(spec, "loader", None)) is not importlib.machinery.SourceFileLoader:
        return True
    cached = getattr(spec, "cached", None) or ""
    try:
        bytecode = _read(cached)[1]
    except OSError:
        bytecode = b""
    # The file's format: magic number, flags, the source's time in seconds and its size; 4 bytes each.
    by_time = len(bytecode) > 16 and not int.from_bytes(bytecode[4:8], "little")
    expected = (stamp[0] // 10**9 & 0xFFFFFFFF).to_bytes(4, "little") + (stamp[1] & 0xFFFFFFFF).to_bytes(4, "little")
    if by_time and bytecode[8:16] == expected:
        return True
    try:
        source = compile(content, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    if not _has_code_of(module, file, source):
        return False
    if not by_time or bytecode[:4] != importlib.util.MAGIC_NUMBER:
        return True
    # The bytecode is of another version of the source. If Python could have renewed it and has not, the module was
    # loaded from that bytecode, and not from this source.
    compiled = marshal.loads(bytecode[16:])
    renewable = not sys.dont_write_bytecode and os.access(os.path.dirname(cached), os.W_OK)
    return bool(compiled == source) or not renewable or not _has_code_of(module, file, compiled)


def _has_code_of(module: types.ModuleType, file: str, code: types.CodeType) -> bool:
    """Return whether the functions of a module, also those in its classes, are those of this code."""
    wanted = _codes(code)
    return all(f.__code__ in wanted for f in functions_in(vars(module)) if f.__code__.co_filename == file)


def _codes(code: types.CodeType) -> set[types.CodeType]:
    """Return the code of everything that is defined within code."""
    inner = {const for const in code.co_consts if isinstance(const, types.CodeType)}
    return inner.union(*map(_codes, inner))


def functions_in(names: Mapping[str, Any]) -> list[types.FunctionType]:
    """Return the functions among the values, and in the classes among them."""
    found = []
    for value in list(names.values()):
        for each in [*vars(value).values()] if isinstance(value, type) else [value]:
            function = getattr(each, "__func__", each) if isinstance(each, staticmethod | classmethod) else each
            if isinstance(function, types.FunctionType):
                found.append(function)
    return found


def _used_by(module: types.ModuleType) -> set[str]:
    """Return the names of modules that a module imports, and of those whose functions, classes or objects it has."""
    # Not at the module's head: it is needed only when a module has changed.
    import ast

    used = set()
    for value in list(vars(module).values()):
        with contextlib.suppress(Exception):  # an object may raise anything when it is asked for an attribute
            used.add(value.__name__ if isinstance(value, types.ModuleType) else value.__module__)
    left: list[ast.AST] = []
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        left.append(ast.parse(_read(file_of(module) or "")[1]))
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            used.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            with contextlib.suppress(ImportError):
                origin = importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__)
                used.update((origin, *(f"{origin}.{alias.name}" for alias in node.names)))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            left += ast.iter_child_nodes(node)
    return {name for name in used if isinstance(name, str)}
