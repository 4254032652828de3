"""Where the user's modules are: which names are local at the client, found as an import finds them, importing nothing.

A module is local if it belongs neither to the standard library nor to an installed distribution. Projects that are
installed as editable are local, unless the image installs them on the nodes.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import os
import sys
import types
import zipimport
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from ..distributions import canonical
from ..pickling import installed
from .units import Place

MAX_NAMES: Final = 5_000
"""Names that the directories of `sys.path` are searched for. Others are found when a worker asks for them."""


class Located(NamedTuple):
    """What a name leads to."""

    place: Place | None = None
    """The unit that has the module; None if no unit does."""
    directories: tuple[str, ...] = ()
    """The directories of a namespace package of which a part is local."""
    reason: str = ""
    """Why no unit has the module, if it is there and local; else empty."""
    is_on_nodes: bool = False
    """Whether the image brings the module to the nodes."""

    @property
    def is_local(self) -> bool:
        """Return whether workers are to ask for this name."""
        return bool(self.place or self.directories)


_ELSEWHERE: Final = Located()
"""What a name leads to that is not local."""
_ON_NODES: Final = Located(is_on_nodes=True)
_NOWHERE: Final = Located()
"""What a name leads to that no module has, so far."""


class Locator:
    """Where modules are at one time: a module that was found stays where it was, whatever changes meanwhile.

    `included` are top-level names that `Image(includes=)` sends, `packages` the names of distributions that
    `Image(pip=)` installs on the nodes.
    """

    def __init__(self, included: Iterable[str] = (), packages: Iterable[str] = ()) -> None:
        self._included = frozenset(included)
        self._packages = frozenset(packages)
        self._sys_path: list[str] = []
        """`sys.path` when `_path` was made of it."""
        self._path: list[str] = []
        self._found: dict[str, Located] = {}

    def locate(self, name: str) -> Located:
        """Return where the module of this name is. The caller must not call this on two threads at once."""
        found = self._found.get(name)
        if found is not None:
            return found
        parent, top = name.rpartition(".")[0], name.partition(".")[0]
        if parent:
            found = self.locate(parent)
            if not found.directories:
                return found
        elif top in self._included or canonical(top) in self._packages:
            return _ON_NODES
        elif top in sys.stdlib_module_names or top in sys.builtin_module_names:
            return _ELSEWHERE
        if not name.rpartition(".")[2].isidentifier() or name in ("__main__", "__mp_main__"):
            return _NOWHERE
        if self._sys_path != sys.path:
            self._sys_path, self._path = list(sys.path), installed.import_path()
        found = self._search(name, found.directories if found is not None else self._path)
        if found is not _NOWHERE:
            # The number of those is bounded by what is there, whatever names a node asks for.
            self._found[name] = found
        return found

    def _search(self, name: str, path: Sequence[str]) -> Located:
        """Search the directories of `path` for a module that is not below a unit."""
        spec = _find(name, path)
        if spec is None:
            return _NOWHERE
        if spec.origin is None or spec.loader is None:
            return self._namespace(name, spec)
        module: Any = types.SimpleNamespace(__spec__=spec, __path__=spec.submodule_search_locations)
        if spec.submodule_search_locations is None:
            del module.__path__
        if installed.is_installed(name, module):
            return _ELSEWHERE
        if self._packages and canonical(distribution_of(name, spec.origin)[0]) in self._packages:
            return _ON_NODES
        return _place(name, spec)

    def _namespace(self, name: str, spec: importlib.machinery.ModuleSpec) -> Located:
        directories = tuple(os.path.abspath(path) for path in spec.submodule_search_locations or ())
        # `is_installed` looks at the loader's type alone.
        loader = importlib.machinery.NamespaceLoader.__new__(importlib.machinery.NamespaceLoader)
        module = types.SimpleNamespace(__spec__=types.SimpleNamespace(loader=loader), __path__=directories)
        return _ELSEWHERE if installed.is_installed(name, module) else Located(directories=directories)

    def is_installed(self, name: str) -> bool:
        """Return whether an installed distribution has the module, or the package that the name begins with."""
        return name.partition(".")[0] not in sys.stdlib_module_names and self.locate(name) is _ELSEWHERE

    def names(self) -> Iterator[str]:
        """Yield the local top-level names that are on `sys.path` or imported, and those below namespace packages."""
        for name, module in [*sys.modules.items()]:
            # Imported ones: those in namespace packages, and all that are found otherwise than on `sys.path`.
            # A module of another type may be loaded only when it is asked for an attribute.
            if type(module) is types.ModuleType and not installed.is_installed(name, module):
                yield from self._local(name)
        for name in {
            name for project in installed.editable_projects() for name in project.names() if name.isidentifier()
        }:
            yield from self._local(name)
        count = 0
        for directory in self._path:
            if os.path.basename(directory).endswith("-packages") or directory.startswith(sys.base_prefix + os.sep):
                continue
            for name in _names_in(directory):
                count += 1
                if count > MAX_NAMES:
                    return
                yield from self._local(name)

    def _local(self, name: str) -> Iterator[str]:
        found = self.locate(name)
        if found.place is not None:
            yield found.place.name
        elif found.directories:
            yield name


def _find(name: str, path: Sequence[str]) -> importlib.machinery.ModuleSpec | None:
    """Find a module by the finders that other Python processes have as well."""
    spec: importlib.machinery.ModuleSpec | None
    with contextlib.suppress(Exception):  # a finder for `sys.path` may be anybody's
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and (spec.loader is None or type(spec.loader) in installed.LOADERS):
            return spec
    return installed.find_editable(name, None if "." not in name else list(path))


def _place(name: str, spec: importlib.machinery.ModuleSpec) -> Located:
    """Return the unit of a local module, which is not below another unit."""
    origin, loader = spec.origin or "", spec.loader
    is_package = spec.submodule_search_locations is not None
    if isinstance(loader, zipimport.zipimporter):
        inner = os.path.relpath(origin, loader.archive)
        return Located(Place(name, os.path.dirname(inner) if is_package else inner, is_package, loader.archive))
    if origin.endswith(installed.EXTENSIONS):
        return Located(reason=f"{name} is compiled ({origin}), and compiled modules are not sent{remedy(name, origin)}")
    if not origin.endswith((".py", ".pyc")) or not os.path.isabs(origin):
        return Located(reason=f"{name} was found at {origin}, which is no file of Python code")
    return Located(Place(name, os.path.dirname(origin) if is_package else origin, is_package))


def _names_in(directory: str) -> Iterator[str]:
    """Yield the names of the modules and regular packages in a directory, or in a zip file."""
    # Not at the module's head: it is needed once for each generation.
    import pkgutil

    with contextlib.suppress(Exception):  # the directory may be gone, or anybody's finder
        yield from sorted(found.name for found in pkgutil.iter_modules([directory]) if found.name.isidentifier())


# ------------------------------------------------------------------------------------------------ distributions


def remedy(name: str, file: str) -> str:
    """Return the end of a sentence that tells how a compiled module gets to the nodes."""
    distribution, version = distribution_of(name, file)
    if not version:
        return ": let the nodes install a distribution that has it, with Image(pip=[...])"
    pinned = f"{canonical(distribution)}=={version}"
    return f": let the nodes install its distribution, with Image(pip=[{pinned!r}]) if an index has it"


def distribution_of(name: str, file: str) -> tuple[str, str]:
    """Return the name and the version of the distribution that has a local module; the version is "" if none has it.

    It is a project that is used where it is, or one that has the module's own name.
    """
    real, top = os.path.realpath(file), name.partition(".")[0]
    for project in installed.editable_projects():
        if real.startswith(project.root) and project.has(top, real):
            return project.name, project.version
    # Not at the module's head: few modules are of such a project.
    from importlib import metadata

    try:
        return top, metadata.version(top)
    except (metadata.PackageNotFoundError, ValueError):
        return top, ""
