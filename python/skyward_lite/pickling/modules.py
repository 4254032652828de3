"""Which modules a worker can import as this process has them. The others' functions and classes travel by value.

cloudpickle names what a module defines, for the far end to import, whenever the module is in `sys.modules`. That fails
for modules that were loaded from a file of their own, made by a program, or found by an importer that only this process
has. So each pool decides once for each module:

by name     the standard library, installed distributions, and the user's modules where the workers find the same file
            by that name: on this machine, or in what the client serves to nodes without its files;
by value    all other modules of Python code;
an error    extension modules that the workers cannot import.

The user's modules that go by name are those of the call's generation (generations.py): after an edit, fresh workers
import them.
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
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple

import cloudpickle
from cloudpickle.cloudpickle import _should_pickle_by_reference

from .. import imports
from ..distributions import canonical
from ..nesting import being_imported
from . import installed, stand_ins
from .changes import Files
from .generations import Generations, Source
from .installed import file_of, has_replaced, is_same

_NOT_OF_THE_CONTENTS: Final = frozenset(("__builtins__", "__spec__", "__loader__", "__cached__"))
"""Attributes that a module which travels by value leaves behind."""


KEPT_GENERATIONS: Final = 16
"""Generations of which it is known which modules their calls have named."""

_NOTHING: Final[set[str]] = set()


class _Pickling(threading.local):
    """The pickling that the calling thread does."""

    modules: Modules | None = None
    """Those of the pool for which the thread pickles. None in a worker, which pickles results."""
    generation = 0
    """That of the call which is pickled."""
    taken = _NOTHING
    """The user's modules that go by name and have been taken into this generation."""
    sent = ""
    """The name of the module whose contents were last found to travel by value; empty if there is none. For errors."""


_pickling = _Pickling()

Before = tuple["Modules | None", int, set[str]]
"""What the thread pickled before `Modules.begin`."""


class _Decision(NamedTuple):
    """How the contents of a module of the user's travel."""

    module: types.ModuleType
    by_value: bool
    is_own: bool
    """Whether workers import a file of the user's for it, of the call's generation."""


class Modules:
    """The modules that the workers of one pool can import.

    `shares_files` tells whether the workers see this machine's files; then they also get its import path. `includes`
    are the files and directories that `Image(includes=)` sends to other machines, `packages` the names of the packages
    that `Image(pip=)` installs there. `sources` is what the client serves to other machines; None if it serves nothing.
    `is_idle()` returns whether every task of the pool has ended.
    """

    def __init__(
        self,
        shares_files: bool,
        includes: Iterable[str] = (),
        packages: Iterable[str] = (),
        sources: Source | None = None,
        is_idle: Callable[[], bool] = bool,
    ) -> None:
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
        self.sources: Source | None = Files(is_idle) if shares_files else sources
        """Where workers have the user's modules from; it answers their requests. None if they import none of them."""
        self._taken: dict[int, set[str]] = {0: set()}
        """For each of the last generations the modules that were taken into it."""
        self.generations = Generations(self.sources, self._forget_decisions)

    def begin(self, generation: int) -> Before:
        """Make this decide for what the calling thread pickles, for a call of that generation.

        Return what decided before, for `end`.
        """
        before = _pickling.modules, _pickling.generation, _pickling.taken
        taken = self._taken.get(generation)
        _pickling.modules, _pickling.generation, _pickling.sent = self, generation, ""
        _pickling.taken = self._taken_in(generation) if taken is None else taken
        return before

    def _taken_in(self, generation: int) -> set[str]:
        """Return the modules that were taken into a generation, and forget those of the oldest generations."""
        with self._lock:
            taken = self._taken.setdefault(generation, set())
            for old in sorted(self._taken)[:-KEPT_GENERATIONS]:
                del self._taken[old]
            return taken

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
        decision = self.decided.get(name)
        if not decision or decision.module is not sys.modules.get(name):
            with self._lock:
                decision = self.decided.get(name)
                if decision is False:
                    return False
                module = sys.modules.get(name)
                if module is None:
                    return False  # cloudpickle itself sends its functions and classes by value
                if decision is None or decision.module is not module:
                    decision = self._decide(name, module, thing)
        if decision and decision.is_own and name not in _pickling.taken:
            assert self.sources is not None
            self.sources.snapshot(_pickling.generation, name)
            _pickling.taken.add(name)
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
            if found is not None and has_replaced(module, found):
                # The file has put an object into its module's place. It does the same in a worker that imports it, so
                # the decision is for the file's module.
                module = importlib.util.module_from_spec(found)
        if installed.is_installed(name, module):
            self.named.add(name)
            if not _is_imported_here(name, module, thing):
                self.decided[name] = False
            return False
        reason = self._unfindable(name, module)
        file = file_of(module)
        if file is not None and file.endswith(installed.EXTENSIONS):
            if not reason:
                self.decided[name] = False
            elif _by_reference(thing):
                raise pickle.PicklingError(f"{name} is an extension module, which cannot be sent, and {reason}")
            return False
        is_own = not reason and self.sources is not None and not self._is_provided(name, module)
        decision = _Decision(entry, bool(reason), is_own)
        if not reason and _is_imported_here(name, module, thing):
            return decision
        if reason:
            self._reasons[name] = reason
        self.decided[name] = decision
        return decision

    def _forget_decisions(self) -> None:
        """Decide anew for the user's modules: one of them has changed."""
        with self._lock:
            self.decided = {name: decision for name, decision in self.decided.items() if decision is False}

    def _is_provided(self, name: str, module: Any) -> bool:
        """Return whether a module of the user's gets to the nodes with the image."""
        if self.shares_files:
            return False
        top = name.partition(".")[0]
        project = installed.editable_project(top, module) if self._packages else None
        names = {canonical(top), "" if project is None else canonical(project.name)}
        return top in self._included or bool(names & self._packages)

    def _unfindable(self, name: str, module: Any) -> str:
        """Return why the workers cannot import the module as this process has it, with a remedy; empty if they can."""
        if not self.shares_files:
            top = name.partition(".")[0]
            if self._is_provided(name, module):
                return ""
            if (file_of(module) or "").endswith(installed.EXTENSIONS):
                return f"the nodes have only what is installed there: name {installed.requirement(top, module)}"
            if self.sources is None:
                if installed.is_editable(top, module):
                    return ""
                return (
                    "the nodes have only what is installed there. Install it on the nodes, or send "
                    f"{installed.included_path(name, module)} with Image(includes=[...])"
                )
        if is_same(module, self._find(name)):
            return "" if self.sources is None else self.sources.reason(name, module)
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
            if found is None or not (package is None or is_same(package, found) or has_replaced(package, found)):
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


def end(before: Before) -> None:
    """Undo `Modules.begin`, which has returned `before`."""
    _pickling.modules, _pickling.generation, _pickling.taken = before


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
    if _pickling.modules is not None:
        _pickling.modules.named.update(filter(installed.may_be_installed, imports.in_code(code)))


def explain(error: Exception) -> None:
    """Add to the text of a pickling error which module's contents were sent by value, why, and the remedy."""
    modules, name = _pickling.modules, _pickling.sent
    if modules is None or not name or not (len(error.args) == 1 and isinstance(error.args[0], str)):
        return
    what = f"What the call uses of module {name} is sent by value, with the globals that it refers to"
    error.args = (f"{error.args[0]}. {what}: {modules.reason(name)}",)
