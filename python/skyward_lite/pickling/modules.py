"""Which modules a worker can import as this process has them. The others' functions and classes travel by value.

cloudpickle names what a module defines, for the far end to import, whenever the module is in `sys.modules`. That fails
for modules that were loaded from a file of their own, made by a program, or found by an importer that only this process
has, and it finds something else where a module has changed. So each pool decides once for each module:

by name     the standard library, installed distributions, and what the workers find at the same place;
by value    everything else that Python code defined, and what has been edited or reloaded, with the modules of the
            user's that use it, because workers may have imported another version;
an error    what can go neither way.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import marshal
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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from cloudpickle.cloudpickle import _function_setstate, _should_pickle_by_reference

from ..nesting import being_imported

log = logging.getLogger("skyward_lite")

LOOK_SECONDS: Final = 0.1
"""Least time between two looks at whether the files of modules that go by name have changed."""
LOOK_SHARE: Final = 20
"""How many times as long as such a look takes it is until the next one."""

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
_EDITED: Final = "was edited after this process had imported it: reload the module or restart the program"
_RELOADED: Final = (
    "was reloaded or replaced after workers may have imported it: open a new pool, whose workers import it anew"
)


class _Pickling(threading.local):
    """What the calling thread pickles for."""

    modules: Modules | None = None
    """Those of the pool; None where results are pickled, in a worker."""
    sent = ""
    """The module of which something was last found to travel by value; empty if there is none."""
    looked = False
    """Whether it was seen since `begin` which modules have changed. One pickle is of one moment."""


_pickling = _Pickling()


class _Known(NamedTuple):
    """What was decided for a module of the user's."""

    module: types.ModuleType
    by_value: bool


class Modules:
    """What the workers of one pool can import.

    `shares_files` says that they see this machine's files and get its import path. `includes` are the files and
    directories that `Image(includes=)` sends to those that do not, `packages` the names of those
    that `Image(pip=)` installs there.
    """

    def __init__(self, shares_files: bool, includes: Iterable[str] = (), packages: Iterable[str] = ()) -> None:
        self.shares_files = shares_files
        self._packages = frozenset(packages)
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
        self._changed: dict[str, str] = {}
        """The modules that workers may have in another version than this process: name → why, and the remedy."""
        self._uses: dict[str, set[str]] = {}
        """The names of modules that the user's modules use, as far as they have been asked for."""
        self._next_look = 0.0
        """When files are looked at next."""
        self._counted = 0
        self._lock = threading.RLock()
        self._note_all()

    def begin(self) -> Modules | None:
        """Make this decide for what the calling thread pickles; return what did before, for `end`."""
        before, _pickling.modules = _pickling.modules, self
        _pickling.sent, _pickling.looked = "", False
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
        if not _pickling.looked:
            self._look()
            _pickling.looked = _pickling.modules is self
        known = self.known.get(name)
        if known and known.module is sys.modules.get(name):
            return known.by_value
        with self._lock:
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
        entry = module
        if not (_file(module) or isinstance(getattr(module, "__spec__", None), importlib.machinery.ModuleSpec)):
            found = self._find(name)
            if found is not None and _has_replaced(module, found):
                # What the name means at a worker is what running that file makes of it there.
                module = importlib.util.module_from_spec(found)
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
        if not why and self._changed:
            why = self._why_changed(name)
        if not why and _is_imported_here(name, module, thing):
            return False
        if why:
            self._whys[name] = why
        known = self.known[name] = _Known(entry, bool(why))
        return known

    def _unfindable(self, name: str, module: Any) -> str:
        """Return why the workers cannot import the module as this process has it, with a remedy; empty if they can."""
        if not self.shares_files:
            top = name.partition(".")[0]
            if top in self._included or _canonical(top) in self._packages or _is_editable(top, module):
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
            if found is None or not (package is None or _is_same(package, found) or _has_replaced(package, found)):
                return None
            path = getattr(package, "__path__", None) or found.submodule_search_locations
            if path is None:
                return None
        spec: importlib.machinery.ModuleSpec | None
        with contextlib.suppress(Exception):
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            if spec is not None and (spec.loader is None or type(spec.loader) in _LOADERS):
                return spec
        return _find_editable(name, path)

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
            if not _is_as_loaded(name, module, file):
                self._change(name, _EDITED)
        self._counted = len(sys.modules)

    def _look(self) -> None:
        """Look whether the user's modules have been reloaded, and now and then whether their files have changed."""
        if not all(map(operator.is_, map(_spec_of, self._modules), self._specs)):
            with self._lock:
                for name, place in self._noted.items():
                    if self._modules[place].__spec__ is not self._specs[place]:
                        self._change(name, _RELOADED)
        if time.monotonic() < self._next_look:
            return
        with self._lock:
            began = time.monotonic()
            if began < self._next_look:
                return
            # Files may be slow: other threads go on meanwhile with what is known.
            self._next_look = math.inf
            noted = [(name, self._modules[place]) for name, place in self._noted.items() if name not in self._changed]
        try:
            replaced = [name for name, module in noted if sys.modules.get(name, module) is not module]
            edited = [name for name, module in noted if not _is_as_loaded(name, module, _file(module) or "")]
            with self._lock:
                for name in edited:
                    self._change(name, _EDITED)
                for name in replaced:
                    self._change(name, _RELOADED)
        finally:
            ended = time.monotonic()
            self._next_look = ended + max(LOOK_SECONDS, LOOK_SHARE * (ended - began))

    def _change(self, name: str, why: str) -> None:
        if name not in self._changed:
            log.info(
                "module %s %s. Until then it and the modules of yours that use it are sent to this pool's workers as "
                "this process has them",
                name,
                why,
            )
        self._changed[name] = why
        self._specs = [module.__spec__ for module in self._modules]
        self._uses.pop(name, None)
        self.known = {each: known for each, known in self.known.items() if known is False}

    def _why_changed(self, name: str) -> str:
        """Return why workers may have another version of a module or of what it uses; empty if they have this one."""
        seen, left = {name}, [name]
        while left:
            each = left.pop()
            if each in self._changed:
                users = "" if each == name else f"it uses {each}, and "
                return f"{users}module {each} {self._changed[each]}"
            if each in self._noted:
                if each not in self._uses:
                    self._uses[each] = _used_by(self._modules[self._noted[each]])
                new = self._uses[each] & self._noted.keys() - seen
                seen |= new
                left += new
        return ""


# ------------------------------------------------------------------------------------------------ for the pickler


def end(before: Modules | None) -> None:
    """Undo `begin`."""
    _pickling.modules, _pickling.looked = before, False


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
    if _is_namespace(module):
        # Other distributions may have a part in it: a worker imports what it is asked for of those.
        state = {key: value for key, value in state.items() if _is_own_part(modules, f"{name}.{key}", value)}
        return _Namespace, (name,), state, None, None, _fill
    # The contents come after the module itself, which they may refer to.
    return types.ModuleType, (name,), state, None, None, _fill


def _is_own_part(modules: Modules, name: str, value: object) -> bool:
    """Return whether a namespace package's attribute is a module of that name which travels by value."""
    with contextlib.suppress(pickle.PicklingError):
        return sys.modules.get(name) is value and modules.by_value(name, value)
    return False


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


class _Namespace(types.ModuleType):
    """A package without a file, with the modules of it that were sent by value."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)
        return importlib.import_module(f"{self.__name__}.{name}")


def _fill(module: types.ModuleType, state: dict[str, Any]) -> None:
    """Set the contents of a module that was rebuilt."""
    vars(module).update(state)


def set_function(function: types.FunctionType, state: Any) -> None:
    """Set the contents of a function that was rebuilt, and enter it into its module."""
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
    # Not at the module's top: workers have no use for them.
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
        if name == "cython_runtime" or name.startswith("_cython_"):
            return True  # of extension modules that Cython made, each of which makes them where it is imported
        if _is_namespace(module):
            return all(_is_installed_at(f"{each}{os.sep}", name.count(".") + 1) for each in module.__path__)
        if top in sys.builtin_module_names or getattr(getattr(module, "__spec__", None), "origin", None) == "frozen":
            return True
        return _is_in_installed(top, module)
    for prefix in _prefixes():
        if file.startswith(prefix):
            # The name leads from that directory to the file; or the library or a package has given it that name.
            return (
                file[len(prefix) :].partition(os.sep)[0].partition(".")[0] == top
                or top in sys.stdlib_module_names
                or top == "distutils"
                or file.endswith(_EXTENSIONS)
                or _is_in_installed(top, module)
            )
    return _is_installed_at(file, name.count(".") + hasattr(module, "__path__"))


def _is_installed_at(file: str, packages: int) -> bool:
    """Return whether a file is in a directory of distributions. So many directories between the two are packages."""
    root = os.path.dirname(file)
    for _ in range(packages):
        root = os.path.dirname(root)
    return f"{root}{os.sep}" in _prefixes() or _has_distributions(root)


def _is_in_installed(top: str, module: Any) -> bool:
    """Return whether a module belongs to an installed package, which makes it itself as six makes `six.moves`."""
    package = sys.modules.get(top)
    return package is not None and package is not module and _is_installed(top, package)


@functools.cache
def _editable() -> tuple[tuple[str, frozenset[str]], ...]:
    """Return the directories of projects that are installed where they are, each with its top-level modules."""
    # Not at the module's top: workers have no use for them.
    import json
    import urllib.parse
    from importlib import metadata

    found = []
    for distribution in metadata.distributions():
        with contextlib.suppress(Exception):  # of a distribution whose files are broken
            origin = json.loads(distribution.read_text("direct_url.json") or "{}")
            if not origin.get("dir_info", {}).get("editable"):
                continue
            root = urllib.parse.unquote(urllib.parse.urlparse(origin["url"]).path)
            names = (distribution.read_text("top_level.txt") or distribution.metadata["Name"]).split()
            found.append((os.path.realpath(root) + os.sep, frozenset(map(_canonical, names))))
    return tuple(found)


def _is_editable(top: str, module: Any) -> bool:
    """Return whether a module is of a project that is installed where it is, as by `pip install --editable`."""
    file = _file(sys.modules.get(top, module)) or _file(module)
    if file is None:
        return False
    real = os.path.realpath(file)
    if any(real.startswith(root) and _canonical(top) in names for root, names in _editable()):
        return True
    found = _find_editable(top, None)
    return found is not None and found.origin is not None and os.path.realpath(found.origin) == real


def _find_editable(name: str, path: Any) -> importlib.machinery.ModuleSpec | None:
    """Find a module by the importers of editable installs, which Python has from its start in the workers too."""
    finders: list[Any] = [finder for finder in sys.meta_path if "editable" in _home_of(finder)]
    for finder in finders:
        with contextlib.suppress(Exception):
            spec: importlib.machinery.ModuleSpec | None = finder.find_spec(name, path)
            if spec is not None:
                return spec
    return None


def _canonical(name: str) -> str:
    """Spell the name of a module or a package as package indexes do."""
    return re.sub(r"[-_.]+", "-", name).lower()


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


def _is_namespace(module: Any) -> bool:
    """Return whether a module is a package without a file, in which several distributions may have a part."""
    spec = getattr(module, "__spec__", None)
    return _file(module) is None and type(getattr(spec, "loader", None)) is importlib.machinery.NamespaceLoader


def _has_replaced(module: Any, found: importlib.machinery.ModuleSpec) -> bool:
    """Return whether a module or another object was put in the place of the module that the file makes which was found.

    A file that does so when it is imported has defined the functions of it.
    """
    if _file(module) is not None or type(found.loader) is not importlib.machinery.SourceFileLoader:
        return False
    if isinstance(getattr(module, "__spec__", None), importlib.machinery.ModuleSpec):
        return False
    functions = _functions(getattr(module, "__dict__", {})) + _functions(vars(type(module)))
    return all(f.__code__.co_filename == found.origin for f in functions if f.__module__ == found.name)


def _used_by(module: types.ModuleType) -> set[str]:
    """Return the names of modules that a module imports, and of those whose functions, classes or objects it has."""
    # Not at the module's top: of use only after a change.
    import ast

    used = set()
    for value in list(vars(module).values()):
        with contextlib.suppress(Exception):  # of an object that answers so when it is asked for an attribute
            used.add(value.__name__ if isinstance(value, types.ModuleType) else value.__module__)
    left: list[ast.AST] = []
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        left.append(ast.parse(_read(_file(module) or "")[1]))
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


class _Load(NamedTuple):
    """A module of the user's as this process has imported it."""

    module: types.ModuleType
    spec: object
    stamp: Stamp
    content: int
    """The hash of what its file had."""


_loads: dict[str, _Load] = {}


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


def _is_as_loaded(name: str, module: types.ModuleType, file: str) -> bool:
    """Return whether a module's file has what this process has loaded from it, as far as that can be known.

    A file that was written without a change has.
    """
    load = _loads.get(name)
    if load is not None and (load.module is not module or load.spec is not module.__spec__):
        load = None
    stamp = _stamp(file)
    if stamp is None:
        return load is None  # there never was one, as in an archive
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


def _has_loaded(module: types.ModuleType, file: str, stamp: Stamp, content: bytes) -> bool:
    """Return whether this is the source that this process has imported a module from, at the first look at its file."""
    spec = module.__spec__
    if type(getattr(spec, "loader", None)) is not importlib.machinery.SourceFileLoader:
        return True
    cached = getattr(spec, "cached", None) or ""
    try:
        made = _read(cached)[1]
    except OSError:
        made = b""
    by_time = len(made) > 16 and not int.from_bytes(made[4:8], "little")
    written = (stamp[0] // 10**9 & 0xFFFFFFFF).to_bytes(4, "little") + (stamp[1] & 0xFFFFFFFF).to_bytes(4, "little")
    if by_time and made[8:16] == written:
        return True
    try:
        source = compile(content, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    if not _has_code_of(module, file, source):
        return False
    if not by_time or made[:4] != importlib.util.MAGIC_NUMBER:
        return True
    # The bytecode is of another version of the file. It is what was loaded, and not the source, if Python would
    # have written it anew otherwise.
    compiled = marshal.loads(made[16:])
    renewed = not sys.dont_write_bytecode and os.access(os.path.dirname(cached), os.W_OK)
    return bool(compiled == source) or not renewed or not _has_code_of(module, file, compiled)


def _has_code_of(module: types.ModuleType, file: str, code: types.CodeType) -> bool:
    """Return whether the functions of a module, also those in its classes, are those of this code."""
    wanted = _codes(code)
    return all(f.__code__ in wanted for f in _functions(vars(module)) if f.__code__.co_filename == file)


def _functions(names: Mapping[str, Any]) -> list[types.FunctionType]:
    """Return the functions among the values, and in the classes among them."""
    found = []
    for value in list(names.values()):
        for each in [*vars(value).values()] if isinstance(value, type) else [value]:
            function = getattr(each, "__func__", each) if isinstance(each, staticmethod | classmethod) else each
            if isinstance(function, types.FunctionType):
                found.append(function)
    return found


def _codes(code: types.CodeType) -> set[types.CodeType]:
    inner = {const for const in code.co_consts if isinstance(const, types.CodeType)}
    return inner.union(*map(_codes, inner))
