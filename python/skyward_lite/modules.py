"""Which modules a worker can import as this process has them. The others' functions and classes travel by value.

cloudpickle names what a module defines, for the far end to import, whenever the module is in `sys.modules`. That fails
for modules that were loaded from a file of their own, made by a program, or found by an importer that only this process
has, and it finds something else where a module has changed. So each pool decides once for each module:

by name     the standard library, installed distributions, and what the workers find at the same place;
by value    everything else that Python code defined, and all modules of the user's once one of them has been edited or
            reloaded while the pool is open, because workers may have imported the old one;
an error    what can go neither way.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import math
import operator
import os
import pickle
import re
import sys
import threading
import time
import types
import zipimport
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple

from cloudpickle.cloudpickle import _function_setstate, _should_pickle_by_reference

from .nesting import being_imported

log = logging.getLogger("skyward_lite")

LOOK_SECONDS: Final = 0.1
"""Least time between two looks at whether the files of modules that go by name have changed."""

_OURS: Final = ("skyward_lite", "cloudpickle")
"""Packages that every worker has."""
_MODULE_STATE: Final = frozenset(("__builtins__", "__spec__", "__loader__", "__cached__"))
"""What a module that is rebuilt from its contents does not take over."""
_LOADERS: Final = (
    importlib.machinery.SourceFileLoader,
    importlib.machinery.SourcelessFileLoader,
    importlib.machinery.ExtensionFileLoader,
    importlib.machinery.NamespaceLoader,
    zipimport.zipimporter,
)
"""Loaders that workers have as well. What else loads from a directory of `sys.path` is by a hook of this process."""
_EXTENSIONS: Final = tuple(importlib.machinery.EXTENSION_SUFFIXES)
_NOT_FOUND: Final = re.compile(r"Can't get attribute '.*' on <module '(.+?)'")
"""What pickle says if a module lacks a name."""

Stamp = tuple[int, int]
"""A file's time of change in nanoseconds and its size."""
_spec_of: Final = operator.attrgetter("__spec__")


class _Pickling(threading.local):
    """What the calling thread pickles for."""

    modules: Modules | None = None
    """Those of the pool; None where results are pickled, in a worker."""
    sent = ""
    """The module of which something was last found to travel by value; empty if there is none."""


_pickling = _Pickling()


class _Known(NamedTuple):
    """What was decided for a module of the user's."""

    module: types.ModuleType
    by_value: bool


class Modules:
    """What the workers of one pool can import.

    `shares_files` says that they see this machine's files and get its import path. `includes` are the files and
    directories that `Image(includes=)` sends to those that do not.
    """

    def __init__(self, shares_files: bool, includes: Iterable[str] = ()) -> None:
        self.shares_files = shares_files
        self._included = {os.path.basename(os.path.normpath(path)).partition(".")[0] for path in includes}
        self._given = list(sys.path)
        """`sys.path` as it was when `path` was made of it."""
        self.path = import_path()
        """The directories that workers with this machine's files search from their start."""
        self._later: tuple[list[str], tuple[str, ...]] = [], ()
        """`sys.path` as it was at a later call, and what was made of it."""
        self.known: dict[str, _Known | Literal[False]] = {"__main__": False, "builtins": False}
        """What was decided, by the module's name; False for what goes by name for good."""
        self._whys: dict[str, str] = {}
        """Why modules go by value, and what would let them go by name."""
        self._noted: dict[str, int] = {}
        """The user's modules that there are: name → place in the next two lists."""
        self._modules: list[types.ModuleType] = []
        self._specs: list[object] = []
        """The modules' `__spec__` when workers could import them first. `importlib.reload` replaces it."""
        self._stamps: dict[str, Stamp] = {}
        """The modules' files when workers could import them first."""
        self._changed = ""
        """The module that workers may have in another version than this process; empty if there is none."""
        self._next_look = 0.0
        """When files are looked at next."""
        self._counted = 0
        self._lock = threading.RLock()
        self._note_all()

    def begin(self) -> Modules | None:
        """Make this decide for what the calling thread pickles; return what did before, for `end`."""
        before, _pickling.modules = _pickling.modules, self
        _pickling.sent = ""
        return before

    def with_path(self, call: Any) -> Any:
        """Return the call, together with this process's import path if workers did not get that at their start."""
        if not self.shares_files or sys.path == self._given:
            return call
        return _WithPath(self._path(), call)

    def _path(self) -> Sequence[str]:
        """Return the directories that a worker searches which has got a call of this moment."""
        if sys.path == self._given:
            return self.path
        later, path = self._later
        if sys.path != later:
            path = tuple(import_path())
            self._later = list(sys.path), path
        return path

    def by_value(self, name: str, thing: Any) -> bool:
        """Return whether a function, a class or a module that belongs to the module of that name must travel by value.

        Raises `PicklingError` if it can travel neither so nor by name, and if its name would make workers import a
        module whose import on this very thread waits for them.
        """
        known = self.known.get(name)
        if (
            known
            and known.module is sys.modules.get(name)
            and time.monotonic() < self._next_look
            and all(map(operator.is_, map(_spec_of, self._modules), self._specs))
        ):
            return known.by_value
        with self._lock:
            self._look()
            known = self.known.get(name)
            if known is False:
                return False
            module = sys.modules.get(name)
            if module is None:
                return False  # cloudpickle sends its functions and classes by value
            if known is None or known.module is not module:
                known = self._decide(name, module, thing)
            return known is not False and known.by_value

    def why(self, name: str) -> str:
        """Return why a module travels by value, and what would let it travel by name."""
        return self._whys.get(name, "")

    # ------------------------------------------------------------------------------------------------ the decision

    def _decide(self, name: str, module: Any, thing: Any) -> _Known | Literal[False]:
        """Decide for a module, and keep the decision unless the module is still being imported."""
        if _is_installed(name, module):
            if not _is_imported_here(name, module, thing):
                self.known[name] = False
            return False
        self._note_all()
        why = self._unfindable(name, module)
        file = _file(module)
        if file is not None and file.endswith(_EXTENSIONS):
            if not why:
                self.known[name] = False
            elif _by_reference(thing):
                raise pickle.PicklingError(f"{name} is an extension module, which cannot be sent, and {why}")
            return False
        if not why and self._changed and file is not None:
            why = (
                f"{self._changed} was edited or reloaded after workers may have imported it, so modules of yours are "
                "sent as this process has them. Open a new pool, whose workers import them anew"
            )
        if not why and _is_imported_here(name, module, thing):
            return False
        if why:
            self._whys[name] = why
        known = self.known[name] = _Known(module, bool(why))
        return known

    def _unfindable(self, name: str, module: Any) -> str:
        """Return why the workers cannot import the module as this process has it, with a remedy; empty if they can."""
        if not self.shares_files:
            if name.partition(".")[0] in self._included:
                return ""
            return (
                "the nodes have only what is installed there. Install it on the nodes, or send "
                f"{_home(name, module)} with Image(includes=[...])"
            )
        if _is_same(module, self._find(name)):
            return ""
        where = _file(module)
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
        """Find a module as a worker would that has this process's files and import path."""
        parent = name.rpartition(".")[0]
        path: Any = self._path()
        if parent:
            package = sys.modules.get(parent)
            found = self._find(parent)
            if found is None or (package is not None and not _is_same(package, found)):
                return None
            path = getattr(package, "__path__", None) or found.submodule_search_locations
            if path is None:
                return None
        spec: importlib.machinery.ModuleSpec | None
        with contextlib.suppress(Exception):
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            if spec is not None and (spec.loader is None or type(spec.loader) in _LOADERS):
                return spec
        # The importers of editable installs, which Python has from its start in the workers too.
        finders: list[Any] = [finder for finder in sys.meta_path if "editable" in _home_of(finder)]
        for finder in finders:
            with contextlib.suppress(Exception):
                spec = finder.find_spec(name, path)
                if spec is not None:
                    return spec
        return None

    # ------------------------------------------------------------------------------------------------ changes

    def _note_all(self) -> None:
        """Note the user's modules that there are by now, and whether one has changed since this process loaded it."""
        if self._counted == len(sys.modules):
            return
        for name, module in list(sys.modules.items()):
            # Of other types are those that are loaded only when something asks for one of their attributes.
            if name in self._noted or type(module) is not types.ModuleType:
                continue
            file = _file(module)
            if file is None or file.endswith(_EXTENSIONS) or _is_installed(name, module):
                continue
            if module.__name__ != name or name in ("__main__", "__mp_main__") or not hasattr(module, "__spec__"):
                continue
            self._noted[name] = len(self._modules)
            self._modules.append(module)
            self._specs.append(module.__spec__)
            loaded, now = _loaded(name, module, file), _stamp(file)
            if now is not None:
                self._stamps[file] = now
                if loaded != now:
                    self._change(name)
        self._counted = len(sys.modules)

    def _look(self) -> None:
        """Look whether the user's modules have been reloaded, and now and then whether their files have changed."""
        if self._changed:
            self._next_look = math.inf
            return
        for name, place in self._noted.items():
            if self._modules[place].__spec__ is not self._specs[place]:
                self._change(name)
                return
        moment = time.monotonic()
        if moment < self._next_look:
            return
        self._next_look = moment + LOOK_SECONDS
        for name, place in self._noted.items():
            module = self._modules[place]
            file = _file(module) or ""
            if sys.modules.get(name, module) is not module or self._stamps.get(file) != _stamp(file):
                self._change(name)
                return

    def _change(self, name: str) -> None:
        if not self._changed:
            log.info(
                "module %s was edited or reloaded: from now on modules of yours are sent to this pool's workers as "
                "this process has them. The workers of a new pool import them anew",
                name,
            )
        self._changed = name
        self._specs = [module.__spec__ for module in self._modules]
        self.known = {each: known for each, known in self.known.items() if known is False}


# ------------------------------------------------------------------------------------------------ for the pickler


def end(before: Modules | None) -> None:
    """Undo `begin`."""
    _pickling.modules = before


def with_path(call: Any) -> Any:
    """Return a call with what else its workers need to rebuild it."""
    modules = _pickling.modules
    return call if modules is None else modules.with_path(call)


def by_value(thing: Any) -> bool:
    """Return whether a function or a class must travel by value although it has a name: see `Modules.by_value`."""
    name = getattr(thing, "__module__", None)
    if type(name) is not str:
        return False
    modules = _pickling.modules
    if modules is None:
        # In a worker. What is in a stand-in goes home as it came.
        return name in _stand_ins
    # Most are known, and nothing else is asked of them.
    return modules.known.get(name) is not False and _is_sent(modules, name, thing)


def _is_sent(modules: Modules, name: str, thing: Any) -> bool:
    # What is refused here needs no other reason.
    before, _pickling.sent = _pickling.sent, ""
    sent = modules.by_value(name, thing)
    _pickling.sent = name if sent else before
    return sent


def reduce_module(module: types.ModuleType) -> Any:
    """Return how a module is pickled that must travel by value; `NotImplemented` for the others."""
    modules, name = _pickling.modules, module.__name__
    if modules is None or sys.modules.get(name) is not module:
        return NotImplemented
    if modules.known.get(name) is False or not _is_sent(modules, name, module):
        return NotImplemented
    state = {key: value for key, value in vars(module).items() if key not in _MODULE_STATE}
    # The contents come after the module itself, which they may refer to.
    return types.ModuleType, (name,), state, None, None, _fill


def check_builtin(_: Any, function: types.BuiltinFunctionType) -> Any:
    """Raise `PicklingError` for a function of an extension module that workers cannot import."""
    by_value(function)
    return NotImplemented


def explain(error: Exception) -> None:
    """Write into the text of a pickling error which module's contents were sent by value, why, and the remedy."""
    modules, name = _pickling.modules, _pickling.sent
    if modules is None or not name or not (len(error.args) == 1 and isinstance(error.args[0], str)):
        return
    what = f"What the call uses of module {name} is sent by value, with the globals that it refers to"
    error.args = (f"{error.args[0]}. {what}: {modules.why(name)}",)


# ------------------------------------------------------------------------------------------------ at the worker


class _WithPath:
    """A call, and the import path with which it is to be rebuilt."""

    def __init__(self, path: Sequence[str], call: Any) -> None:
        self.path = tuple(path)
        self.call = call

    def __reduce__(self) -> Any:
        # The path comes first in the pickle: it is there when the call's names are looked up.
        return _second, (_Path(self.path), self.call)


class _Path:
    def __init__(self, path: tuple[str, ...]) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return take_path, (self.path,)


def take_path(path: tuple[str, ...]) -> None:
    """Search these directories first, and then what else this process has searched so far."""
    if tuple(sys.path[: len(path)]) != path:
        sys.path[:] = [*path, *(entry for entry in sys.path if entry not in path)]
        importlib.invalidate_caches()
        # It may have what stood in for something.
        while _stand_ins:
            sys.modules.pop(_stand_ins.pop(), None)


def _second(_: None, call: Any) -> Any:
    return call


def _fill(module: types.ModuleType, state: dict[str, Any]) -> None:
    """Give a module that was rebuilt its contents."""
    vars(module).update(state)


def set_function(function: types.FunctionType, state: Any) -> None:
    """Give a function that was rebuilt its contents, and its module the function."""
    _function_setstate(function, state)
    enter(function)


class _StandIn(types.ModuleType):
    """A module that this worker cannot import, with what tasks were sent of it."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"module {self.__name__!r} has no attribute {name!r} in this worker, which cannot import it: it has the "
            "functions and classes that tasks were sent of it by value so far",
            name=name,
            obj=self,
        )


_stand_ins: set[str] = set()
"""The modules that have a stand-in."""
_importable: set[str] = set()
"""Modules that need none, as an import finds something."""


def enter(thing: Any) -> None:
    """Enter a function or a class into the stand-in for its module, if this process cannot import that.

    What tasks pickle by name, as `joblib.Memory` and `pickle` do, is found there.
    """
    name, key = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if type(name) is not str or type(key) is not str or name in _importable or not key.isidentifier():
        return
    module = sys.modules.get(name) or _stand_in(name)
    if type(module) is _StandIn:
        vars(module)[key] = thing
    else:
        _importable.add(name)


def _stand_in(name: str) -> types.ModuleType | None:
    """Make the stand-in for a module and those of its packages; None if there is such a package."""
    parent, _, last = name.rpartition(".")
    if parent:
        package = sys.modules.get(parent) or _stand_in(parent)
        if type(package) is not _StandIn:
            return None
    else:
        with contextlib.suppress(ImportError, ValueError):
            if importlib.util.find_spec(name) is not None:
                return None
    _stand_ins.add(name)
    module = sys.modules.setdefault(name, _StandIn(name))
    if parent:
        setattr(package, last, module)
    return module


def missing_module_hint(error: BaseException) -> str | None:
    """Return what to do about a module, or a name in one, that is not to be found here; None for other errors."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = error.name.partition(".")[0]
        if error.name != top and top in sys.modules:
            what = f"this node's {top} has no module {error.name}: it may be another version, or another module"
        else:
            what = f"this node has no module {top}"
    elif isinstance(error, AttributeError) and type(error.obj) is _StandIn:
        top = error.obj.__name__.partition(".")[0]
        what = f"this node has no module {error.obj.__name__}"
    elif isinstance(error, AttributeError) and (match := _NOT_FOUND.match(str(error))):
        top = match[1].partition(".")[0]
        what = f"this node's module {match[1]} lacks what the client's has: it is another version, or another module"
    else:
        return None
    if top in sys.stdlib_module_names or top == "__main__":
        return None
    return (
        f"{what}. Image(pip=[...]) installs packages on the nodes and Image(includes=[...]) sends modules of your own; "
        "Local() nodes import what this interpreter has and what is on sys.path"
    )


# ------------------------------------------------------------------------------------------------ about modules


def import_path() -> list[str]:
    """Return `sys.path` as this process resolves it: absolute, whatever the working directory was."""
    path = []
    for entry in sys.path:
        if not isinstance(entry, str):
            continue
        with contextlib.suppress(OSError):  # of a working directory that is gone
            if entry:
                # A finder keeps the directory that a relative entry meant at its first use.
                found = getattr(sys.path_importer_cache.get(entry), "path", None)
                entry = os.path.abspath(found if isinstance(found, str) else entry)
            else:
                entry = os.getcwd()
            path.append(entry)
    return path


@functools.cache
def _prefixes() -> tuple[str, ...]:
    """Return the directories of the standard library and of installed distributions."""
    # Not at the module's head: workers have no use for them.
    import site
    import sysconfig

    paths = sysconfig.get_paths()
    found = [paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")] + site.getsitepackages()
    found += [os.path.dirname(os.__file__), site.getusersitepackages()]
    found += [os.path.join(os.path.dirname(os.__file__), "lib-dynload"), sysconfig.get_config_var("DESTSHARED") or ""]
    spelled = {each + os.sep for path in found if path for each in (path, os.path.realpath(path))}
    # The longest first: site-packages is in the standard library's directory.
    return tuple(sorted(spelled, key=len, reverse=True))


def _is_installed(name: str, module: Any) -> bool:
    """Return whether a module is the interpreter's, or of an installed distribution and known by its name there."""
    top = name.partition(".")[0]
    if top in _OURS:
        return True
    file = _file(module)
    if file is None:
        if top in sys.builtin_module_names or getattr(getattr(module, "__spec__", None), "origin", None) == "frozen":
            return True
        return _is_in_installed(top, module)
    for prefix in _prefixes():
        if file.startswith(prefix):
            # The name leads from that directory to the file; or a package has given the module that name.
            return file[len(prefix) :].partition(os.sep)[0].partition(".")[0] == top or _is_in_installed(top, module)
    root = os.path.dirname(file)
    for _ in range(name.count(".") + hasattr(module, "__path__")):
        root = os.path.dirname(root)
    return _has_distributions(root)


def _is_in_installed(top: str, module: Any) -> bool:
    """Return whether a module belongs to an installed package, which makes it itself as six makes `six.moves`."""
    package = sys.modules.get(top)
    return package is not None and package is not module and _is_installed(top, package)


@functools.cache
def _has_distributions(directory: str) -> bool:
    """Return whether packages were installed into a directory, as by `pip install --target`."""
    try:
        return any(entry.endswith(".dist-info") for entry in os.listdir(directory))
    except OSError:
        return False


def _file(module: Any) -> str | None:
    """Return the file that a module was loaded from."""
    spec = getattr(module, "__spec__", None)
    file = getattr(spec, "origin", None) if getattr(spec, "has_location", False) else getattr(module, "__file__", None)
    return file if isinstance(file, str) else None


def _home(name: str, module: Any) -> str:
    """Return the file or the directory that `Image(includes=)` would have to name."""
    top = sys.modules.get(name.partition(".")[0], module)
    file = _file(top)
    if file is None:
        return name
    return os.path.dirname(file) if hasattr(top, "__path__") else file


def _home_of(finder: Any) -> str:
    return str(getattr(finder, "__module__", ""))


def _is_same(module: Any, found: importlib.machinery.ModuleSpec | None) -> bool:
    """Return whether what was found is what the module was loaded from."""
    if found is None:
        return False
    file = _file(module)
    if file is None or found.origin is None:
        # A package without a file: its directories.
        if file is not None or found.origin is not None or found.submodule_search_locations is None:
            return False
        return set(getattr(module, "__path__", [""])) <= set(found.submodule_search_locations)
    if file == found.origin:
        return True
    try:
        return os.path.samefile(file, found.origin)
    except OSError:
        return False


def _by_reference(thing: Any) -> bool:
    """Return whether cloudpickle would send a thing by its name."""
    if isinstance(thing, types.FunctionType | types.ModuleType | type):
        return bool(_should_pickle_by_reference(thing))
    return True


def _is_imported_here(name: str, module: Any, thing: Any) -> bool:
    """Raise `PicklingError` if the calling thread is running the module's body and its name would travel.

    The worker would import the module to find the name, and so run the same call again; and what comes back would wait
    for an import that ends only with this call. Return whether some other thread is importing it.
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


# ------------------------------------------------------------------------------------------------ about files


_loads: dict[str, tuple[object, object, Stamp | None]] = {}
"""The user's modules as this process first saw them: the module, its spec, and its file's stamp; None if the file was
edited between the module's import and that."""


def _stamp(file: str) -> Stamp | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _loaded(name: str, module: types.ModuleType, file: str) -> Stamp | None:
    """Return the stamp of the file from which this process has loaded the module, as far as that can be known."""
    spec = module.__spec__
    known = _loads.get(name)
    if known is None or known[0] is not module or known[1] is not spec:
        stamp = _stamp(file)
        if stamp is not None and type(getattr(spec, "loader", None)) is importlib.machinery.SourceFileLoader:
            compiled = _compiled(getattr(spec, "cached", None))
            if compiled is None:
                stamp = stamp if _has_code_of(module, file) else None
            elif compiled != ((stamp[0] // 10**9) & 0xFFFFFFFF, stamp[1] & 0xFFFFFFFF):
                stamp = None
        known = _loads[name] = module, spec, stamp
    return known[2]


def _compiled(cached: str | None) -> Stamp | None:
    """Return the time in seconds and the size of the source of which a file of bytecode was made; None if unknown."""
    if cached is None:
        return None
    try:
        with open(cached, "rb") as file:
            head = file.read(16)
    except OSError:
        return None
    if len(head) < 16 or int.from_bytes(head[4:8], "little"):
        return None  # by the source's hash
    return int.from_bytes(head[8:12], "little"), int.from_bytes(head[12:], "little")


def _has_code_of(module: types.ModuleType, file: str) -> bool:
    """Return whether the functions of a module are those that its file has now."""
    try:
        with open(file, "rb") as source:
            wanted = _codes(compile(source.read(), file, "exec", dont_inherit=True))
    except (OSError, SyntaxError, ValueError):
        return False
    functions = [f for f in vars(module).values() if isinstance(f, types.FunctionType)]
    return all(f.__code__ in wanted for f in functions if f.__code__.co_filename == file)


def _codes(code: types.CodeType) -> set[types.CodeType]:
    inner = {const for const in code.co_consts if isinstance(const, types.CodeType)}
    return inner.union(*map(_codes, inner))
