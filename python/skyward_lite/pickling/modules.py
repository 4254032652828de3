"""Which modules a worker can import as this process has them. The others' functions and classes travel by value.

cloudpickle names what a module defines, for the far end to import, whenever the module is in `sys.modules`. That fails
for modules that were loaded from a file of their own, made by a program, or found by an importer that only this process
has; and it finds another version where a module has changed. So each pool decides once for each module:

by name     the standard library, installed distributions, and modules that the workers find at the same place;
by value    all other modules of Python code; and modules that have been edited or reloaded, together with the user's
            modules that use them, because workers may have imported another version (changes.py);
an error    extension modules that the workers cannot import.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import pickle
import sys
import threading
import types
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple

import cloudpickle
from cloudpickle.cloudpickle import _should_pickle_by_reference

from .. import imports
from ..distributions import canonical
from ..nesting import being_imported
from . import installed, stand_ins
from .changes import Changes, functions_in
from .installed import file_of, is_same

_NOT_OF_THE_CONTENTS: Final = frozenset(("__builtins__", "__spec__", "__loader__", "__cached__"))
"""Attributes that a module which travels by value leaves behind."""


class _Pickling(threading.local):
    """The pickling that the calling thread does."""

    modules: Modules | None = None
    """Those of the pool for which the thread pickles. None in a worker, which pickles results."""
    sent = ""
    """The name of the module whose contents were last found to travel by value; empty if there is none. For errors."""
    looked = False
    """Whether this thread has looked for changed modules since `begin`: a pickle has the modules of one moment."""


_pickling = _Pickling()


class _Decision(NamedTuple):
    """How the contents of a module of the user's travel."""

    module: types.ModuleType
    by_value: bool


class Modules:
    """The modules that the workers of one pool can import.

    `shares_files` tells whether the workers see this machine's files; then they also get its import path. `includes`
    are the files and directories that `Image(includes=)` sends to other machines, `packages` the names of the packages
    that `Image(pip=)` installs there.
    """

    def __init__(self, shares_files: bool, includes: Iterable[str] = (), packages: Iterable[str] = ()) -> None:
        self.shares_files = shares_files
        self._packages = frozenset(packages)
        self._included = {os.path.basename(os.path.normpath(path)).partition(".")[0] for path in includes}
        self._first_sys_path = list(sys.path)
        """`sys.path` at the moment when `path` was made of it."""
        self.path = installed.import_path()
        """The directories that workers with this machine's files search from their start."""
        self._later: tuple[list[str], tuple[str, ...]] = [], ()
        """`sys.path` at a later call, and the import path that was made of it."""
        self.decided: dict[str, _Decision | Literal[False]] = {"__main__": False, "builtins": False}
        """The decisions so far, by the module's name; False for a module that goes by name for good."""
        self.named: set[str] = set()
        """The full names of installed modules that pickles have named so far, and what functions that were sent import.
        It only grows."""
        self._reasons: dict[str, str] = {}
        """Why a module travels by value, and what would let it travel by name."""
        self._lock = threading.RLock()
        """Held for each new decision."""
        self._changes = Changes(self._lock, self._forget_decisions)
        self._changes.note_all()

    def begin(self) -> Modules | None:
        """Make this decide for what the calling thread pickles; return what decided before, for `end`."""
        before, _pickling.modules = _pickling.modules, self
        _pickling.sent, _pickling.looked = "", False
        return before

    def with_path(self, call: Any) -> Any:
        """Return the call; if `sys.path` has changed since the workers got it, together with this process's path."""
        if not self.shares_files or sys.path == self._first_sys_path:
            return call
        return stand_ins.WithPath(self._path(), call)

    def by_value(self, name: str, thing: Any) -> bool:
        """Return whether `thing`, a function or a class of the module of that name or the module itself, must travel by
        value.

        Raises `PicklingError` if it can travel neither so nor by name, and if its name would make workers import a
        module that waits for them: the module's import on this thread has led to this call.
        """
        if not _pickling.looked:
            self._changes.look()
            _pickling.looked = _pickling.modules is self
        decision = self.decided.get(name)
        if decision and decision.module is sys.modules.get(name):
            return decision.by_value
        with self._lock:
            decision = self.decided.get(name)
            if decision is False:
                return False
            module = sys.modules.get(name)
            if module is None:
                return False  # cloudpickle itself sends its functions and classes by value
            if decision is None or decision.module is not module:
                decision = self._decide(name, module, thing)
            return decision is not False and decision.by_value

    def reason(self, name: str) -> str:
        """Return why a module travels by value, and what would let it travel by name."""
        return self._reasons.get(name, "")

    # ------------------------------------------------------------------------------------------------ the decision

    def _decide(self, name: str, module: Any, thing: Any) -> _Decision | Literal[False]:
        """Decide for a module. The decision is kept unless the module is still being imported."""
        entry = module
        if not (file_of(module) or isinstance(getattr(module, "__spec__", None), importlib.machinery.ModuleSpec)):
            found = self._find(name)
            if found is not None and _has_replaced(module, found):
                # The file has put an object into its module's place. It does the same in a worker that imports it, so
                # the decision is for the file's module.
                module = importlib.util.module_from_spec(found)
        if installed.is_installed(name, module):
            self.named.add(name)
            if not _is_imported_here(name, module, thing):
                self.decided[name] = False
            return False
        self._changes.note_all()
        reason = self._unfindable(name, module)
        file = file_of(module)
        if file is not None and file.endswith(installed.EXTENSIONS):
            if not reason:
                self.decided[name] = False
            elif _by_reference(thing):
                raise pickle.PicklingError(f"{name} is an extension module, which cannot be sent, and {reason}")
            return False
        reason = reason or self._changes.reason(name)
        if not reason and _is_imported_here(name, module, thing):
            return False
        if reason:
            self._reasons[name] = reason
        decision = self.decided[name] = _Decision(entry, bool(reason))
        return decision

    def _forget_decisions(self) -> None:
        """Decide anew for the user's modules: one of them has changed."""
        self.decided = {name: decision for name, decision in self.decided.items() if decision is False}

    def _unfindable(self, name: str, module: Any) -> str:
        """Return why the workers cannot import the module as this process has it, with a remedy; empty if they can."""
        if not self.shares_files:
            top = name.partition(".")[0]
            if top in self._included or canonical(top) in self._packages or installed.is_editable(top, module):
                return ""
            return (
                "the nodes have only what is installed there. Install it on the nodes, or send "
                f"{installed.included_path(name, module)} with Image(includes=[...])"
            )
        if is_same(module, self._find(name)):
            return ""
        where = file_of(module)
        if where is None:
            return (
                "workers cannot import it, as it was not loaded from a file that they would find. Put the code into a "
                "file in a directory of sys.path"
            )
        return (
            f"workers do not find {where} by that name on sys.path. Put the directory that has it on sys.path and "
            "import it from there, or install it"
        )

    def _find(self, name: str) -> importlib.machinery.ModuleSpec | None:
        """Find a module as a worker finds it that has this process's files and import path."""
        parent = name.rpartition(".")[0]
        path: Any = self._path()
        if parent:
            package = sys.modules.get(parent)
            found = self._find(parent)
            if found is None or not (package is None or is_same(package, found) or _has_replaced(package, found)):
                return None
            path = getattr(package, "__path__", None) or found.submodule_search_locations
            if path is None:
                return None
        spec: importlib.machinery.ModuleSpec | None
        with contextlib.suppress(Exception):
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            if spec is not None and (spec.loader is None or type(spec.loader) in installed.LOADERS):
                return spec
        return installed.find_editable(name, path)

    def _path(self) -> Sequence[str]:
        """Return the directories that a worker searches once it has got a call of this moment."""
        if sys.path == self._first_sys_path:
            return self.path
        later, path = self._later
        if sys.path != later:
            path = tuple(installed.import_path())
            self._later = list(sys.path), path
        return path


def _has_replaced(module: Any, found: importlib.machinery.ModuleSpec) -> bool:
    """Return whether the file that was found has put `module`, a module or another object, into its own module's place.

    A file does so by `sys.modules[__name__] = ...`. Then it has defined all functions of the object.
    """
    if file_of(module) is not None or type(found.loader) is not importlib.machinery.SourceFileLoader:
        return False
    if isinstance(getattr(module, "__spec__", None), importlib.machinery.ModuleSpec):
        return False
    functions = functions_in(getattr(module, "__dict__", {})) + functions_in(vars(type(module)))
    return all(f.__code__.co_filename == found.origin for f in functions if f.__module__ == found.name)


def _by_reference(thing: Any) -> bool:
    """Return whether cloudpickle would send a thing by its name."""
    if isinstance(thing, types.FunctionType | types.ModuleType | type):
        return bool(_should_pickle_by_reference(thing))
    return True


def _is_imported_here(name: str, module: Any, thing: Any) -> bool:
    """Return whether a module is being imported, by any thread.

    Raises `PicklingError` if the calling thread is running the module's body and the thing's name would travel. The
    worker would import the module to find the name, and so run the same call again; and this call would wait for a
    result that needs an import which ends only after this call.
    """
    if not getattr(getattr(module, "__spec__", None), "_initializing", False):
        return False
    if name in being_imported() and _by_reference(thing):
        raise pickle.PicklingError(
            f"module {name} calls Parallel or a pool while it is being imported, for functions or classes of its own: "
            "each worker would import it and do the same. Make the call in a function, and call that after the import, "
            'or under `if __name__ == "__main__":`'
        )
    return True


# ------------------------------------------------------------------------------------------------ for the pickler


def end(before: Modules | None) -> None:
    """Undo `Modules.begin`, which has returned `before`."""
    _pickling.modules, _pickling.looked = before, False


def with_path(call: Any) -> Any:
    """Return a call, together with the import path if its workers need it: see `Modules.with_path`."""
    modules = _pickling.modules
    return call if modules is None else modules.with_path(call)


def by_value(thing: Any) -> bool:
    """Return whether a function or a class must travel by value although it has a name: see `Modules.by_value`."""
    name = getattr(thing, "__module__", None)
    if type(name) is not str:
        return False
    modules = _pickling.modules
    if modules is None:
        # In a worker: what a stand-in has came by value, and goes home so.
        return stand_ins.has_stand_in(name)
    # Most modules go by name for good: nothing else is asked for them.
    return modules.decided.get(name) is not False and _is_sent(modules, name, thing)


def _is_sent(modules: Modules, name: str, thing: Any) -> bool:
    """Return whether a thing travels by value, and note its module for `explain` if so."""
    # If `by_value` raises, its text has the reason, and `explain` has nothing to add.
    before, _pickling.sent = _pickling.sent, ""
    sent = modules.by_value(name, thing)
    _pickling.sent = name if sent else before
    return sent


def has_name(thing: Any) -> bool:
    """Return whether the far end finds a thing by importing its module and looking its name up there."""
    if not travels_by_name(thing):
        return False
    found: Any = sys.modules.get(thing.__module__)
    for part in getattr(thing, "__qualname__", thing.__name__).split("."):
        found = getattr(found, part, None)
    return found is thing


def travels_by_name(thing: Any) -> bool:
    """Return whether a pickle names what a module defines, for the far end to import. Otherwise its code is sent."""
    module = thing.__module__
    registered = cloudpickle.list_registry_pickle_by_value()
    if module == "__main__" or any(module == name or module.startswith(f"{name}.") for name in registered):
        return False
    return not by_value(thing)


def reduce_module(module: types.ModuleType) -> Any:
    """Return how a module is pickled that must travel by value; `NotImplemented` for the others."""
    modules, name = _pickling.modules, module.__name__
    if modules is None or sys.modules.get(name) is not module:
        return NotImplemented
    if modules.decided.get(name) is False or not _is_sent(modules, name, module):
        return NotImplemented
    contents = {key: value for key, value in vars(module).items() if key not in _NOT_OF_THE_CONTENTS}
    make: type[types.ModuleType] = types.ModuleType
    if installed.is_namespace(module):
        # Other distributions may have a part in the package: a worker imports their modules when it is asked for them.
        contents = {key: value for key, value in contents.items() if _is_own_part(modules, f"{name}.{key}", value)}
        make = stand_ins.Namespace
    # The contents are rebuilt after the module itself, to which they may refer.
    return make, (name,), contents, None, None, stand_ins.fill


def _is_own_part(modules: Modules, name: str, value: object) -> bool:
    """Return whether a namespace package's attribute is a module of that name which travels by value."""
    with contextlib.suppress(pickle.PicklingError):
        return sys.modules.get(name) is value and modules.by_value(name, value)
    return False


def check_builtin(function: types.BuiltinFunctionType) -> Any:
    """Raise `PicklingError` for a function of an extension module that workers cannot import."""
    by_value(function)
    return NotImplemented


def note_imports(code: types.CodeType) -> None:
    """Note which installed modules a function, whose code is sent, imports when it runs: its pickle does not tell."""
    modules = _pickling.modules
    if modules is None:
        return
    for name in imports.in_code(code):
        top = name.partition(".")[0]
        module = sys.modules.get(top)
        if name not in modules.named and (module is None or installed.is_installed(top, module)):
            modules.named.add(name)


def explain(error: Exception) -> None:
    """Add to the text of a pickling error which module's contents were sent by value, why, and the remedy."""
    modules, name = _pickling.modules, _pickling.sent
    if modules is None or not name or not (len(error.args) == 1 and isinstance(error.args[0], str)):
        return
    what = f"What the call uses of module {name} is sent by value, with the globals that it refers to"
    error.args = (f"{error.args[0]}. {what}: {modules.reason(name)}",)
