"""What is installed in this interpreter, and where a module comes from: its file, its package, its distribution."""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import os
import sys
import types
import zipimport
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from ..distributions import canonical

LOADERS: Final = (
    importlib.machinery.SourceFileLoader,
    importlib.machinery.SourcelessFileLoader,
    importlib.machinery.ExtensionFileLoader,
    importlib.machinery.NamespaceLoader,
    zipimport.zipimporter,
)
"""Loaders that workers have as well. Any other loader for a directory of `sys.path` is a hook of this process."""
EXTENSIONS: Final = tuple(importlib.machinery.EXTENSION_SUFFIXES)

ON_EVERY_WORKER: Final = ("skyward_lite", "cloudpickle")
"""Packages that every worker has."""


def file_of(module: Any) -> str | None:
    """Return the file that a module was loaded from; None if there is none."""
    spec = getattr(module, "__spec__", None)
    file = getattr(spec, "origin", None) if getattr(spec, "has_location", False) else getattr(module, "__file__", None)
    return file if isinstance(file, str) else None


def included_path(name: str, module: Any) -> str:
    """Return the file or the directory that `Image(includes=)` has to name for a module to be sent."""
    top = sys.modules.get(name.partition(".")[0], module)
    file = file_of(top)
    if file is None:
        return name
    return os.path.dirname(file) if hasattr(top, "__path__") else file


def is_namespace(module: Any) -> bool:
    """Return whether a module is a package without a file, in which several distributions may have a part."""
    spec = getattr(module, "__spec__", None)
    return file_of(module) is None and type(getattr(spec, "loader", None)) is importlib.machinery.NamespaceLoader


def is_same(module: Any, found: importlib.machinery.ModuleSpec | None) -> bool:
    """Return whether a module was loaded from the file, or the directories, that an import finds now."""
    if found is None:
        return False
    file = file_of(module)
    if file is None or found.origin is None:
        # A package without a file: its directories are compared.
        if file is not None or found.origin is not None or found.submodule_search_locations is None:
            return False
        return set(getattr(module, "__path__", [""])) <= set(found.submodule_search_locations)
    if file == found.origin:
        return True
    try:
        return os.path.samefile(file, found.origin)
    except OSError:
        return False


def has_replaced(module: Any, found: importlib.machinery.ModuleSpec) -> bool:
    """Return whether the file that was found has put `module`, a module or another object, into its own module's place.

    A file does so by `sys.modules[__name__] = ...`. Then it has defined all functions of the object.
    """
    if file_of(module) is not None or type(found.loader) is not importlib.machinery.SourceFileLoader:
        return False
    if isinstance(getattr(module, "__spec__", None), importlib.machinery.ModuleSpec):
        return False
    functions = _functions_in(getattr(module, "__dict__", {})) + _functions_in(vars(type(module)))
    return all(f.__code__.co_filename == found.origin for f in functions if f.__module__ == found.name)


def _functions_in(names: Mapping[str, Any]) -> list[types.FunctionType]:
    """Return the functions among the values, and in the classes among them."""
    found = []
    for value in list(names.values()):
        for each in [*vars(value).values()] if isinstance(value, type) else [value]:
            function = getattr(each, "__func__", each) if isinstance(each, staticmethod | classmethod) else each
            if isinstance(function, types.FunctionType):
                found.append(function)
    return found


def import_path() -> list[str]:
    """Return `sys.path` as this process resolves it: absolute, whatever the working directory was."""
    path = []
    for entry in sys.path:
        if not isinstance(entry, str):
            continue
        with contextlib.suppress(OSError):  # the working directory may be gone
            if entry:
                # A finder keeps the directory that a relative entry meant at its first use.
                found = getattr(sys.path_importer_cache.get(entry), "path", None)
                entry = os.path.abspath(found if isinstance(found, str) else entry)
            else:
                entry = os.getcwd()
            path.append(entry)
    return path


# ------------------------------------------------------------------------------------------------ installed


def is_installed(name: str, module: Any) -> bool:
    """Return whether a module is the interpreter's, or an installed distribution's that knows it by this name."""
    top = name.partition(".")[0]
    if top in ON_EVERY_WORKER:
        return True
    file = file_of(module)
    if file is None:
        if name == "cython_runtime" or name.startswith("_cython_"):
            return True  # each extension module that Cython made also makes these, wherever it is imported
        if is_namespace(module):
            return all(_is_in_distributions(f"{each}{os.sep}", name.count(".") + 1) for each in module.__path__)
        if top in sys.builtin_module_names or getattr(getattr(module, "__spec__", None), "origin", None) == "frozen":
            return True
        return _is_in_installed_package(top, module)
    for prefix in _installed_directories():
        if file.startswith(prefix):
            # Either the name leads from that directory to the file, or the library or a package has given the file's
            # module that name.
            return (
                file[len(prefix) :].partition(os.sep)[0].partition(".")[0] == top
                or top in sys.stdlib_module_names
                or top == "distutils"
                or file.endswith(EXTENSIONS)
                or _is_in_installed_package(top, module)
            )
    return _is_in_distributions(file, name.count(".") + hasattr(module, "__path__"))


def may_be_installed(name: str) -> bool:
    """Return whether a module of this name is installed, as far as is known: one that is not loaded may be."""
    top = name.partition(".")[0]
    module = sys.modules.get(top)
    return module is None or is_installed(top, module)


@functools.cache
def _installed_directories() -> tuple[str, ...]:
    """Return the directories of the standard library and of installed distributions, each with a separator behind it.

    The longest come first, because site-packages is in the standard library's directory.
    """
    # Not at the module's head: workers have no use for them.
    import site
    import sysconfig

    paths = sysconfig.get_paths()
    found = [paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")] + site.getsitepackages()
    found += [os.path.dirname(os.__file__), site.getusersitepackages()]
    found += [os.path.join(os.path.dirname(os.__file__), "lib-dynload"), sysconfig.get_config_var("DESTSHARED") or ""]
    spellings = {each + os.sep for path in found if path for each in (path, os.path.realpath(path))}
    return tuple(sorted(spellings, key=len, reverse=True))


def _is_in_distributions(file: str, packages: int) -> bool:
    """Return whether a file is in a directory of distributions, below as many packages as its module's name has."""
    root = os.path.dirname(file)
    for _ in range(packages):
        root = os.path.dirname(root)
    return f"{root}{os.sep}" in _installed_directories() or _has_distributions(root)


@functools.cache
def _has_distributions(directory: str) -> bool:
    """Return whether packages were installed into a directory, as by `pip install --target`."""
    try:
        return any(entry.endswith(".dist-info") for entry in os.listdir(directory))
    except OSError:
        return False


def _is_in_installed_package(top: str, module: Any) -> bool:
    """Return whether an installed package has made this module itself, as six makes `six.moves`."""
    package = sys.modules.get(top)
    return package is not None and package is not module and is_installed(top, package)


# ------------------------------------------------------------------------------------------------ editable installs


def is_editable(top: str, module: Any) -> bool:
    """Return whether a module is of a project that is used where it is, as by `pip install --editable`."""
    file = file_of(sys.modules.get(top, module)) or file_of(module)
    if file is None:
        return False
    real = os.path.realpath(file)
    if editable_project(top, module) is not None:
        return True
    found = find_editable(top, None)
    return found is not None and found.origin is not None and os.path.realpath(found.origin) == real


def find_editable(name: str, path: Any) -> importlib.machinery.ModuleSpec | None:
    """Find a module by the importers of editable installs. Python has them from its start, in the workers as well."""
    finders: list[Any] = [each for each in sys.meta_path if "editable" in str(getattr(each, "__module__", ""))]
    for finder in finders:
        with contextlib.suppress(Exception):
            spec: importlib.machinery.ModuleSpec | None = finder.find_spec(name, path)
            if spec is not None:
                return spec
    return None


class Project(NamedTuple):
    """A project that is used where it is, as by `pip install --editable`."""

    root: str
    """Its directory, with a separator behind it."""
    name: str
    version: str
    modules: frozenset[str] | None
    """Its top-level modules; None if it does not tell."""
    path: frozenset[str]
    """The directories that it has put on `sys.path`."""

    def names(self) -> frozenset[str]:
        """Return the names of its top-level modules, in the spelling of `canonical`; its own name if it tells none."""
        return frozenset(map(canonical, self.modules or (self.name,)))

    def has(self, top: str, file: str) -> bool:
        """Return whether a top-level module is the project's, and no script that is beside it."""
        if self.modules is not None:
            return top in self.modules
        return any(os.path.dirname(up) in self.path for up in (file, os.path.dirname(file))) or (
            find_editable(top, None) is not None
        )


def editable_project(top: str, module: Any) -> Project | None:
    """Return the project that is used where it is and has a module below this top-level name; None if there is none."""
    file = file_of(sys.modules.get(top, module)) or file_of(module)
    if file is None:
        return None
    real = os.path.realpath(file)
    return next((p for p in editable_projects() if real.startswith(p.root) and canonical(top) in p.names()), None)


def requirement(top: str, module: Any) -> str:
    """Return what would install a module of the user's on the nodes, as it is written in a program."""
    # Not at the module's head: workers have no use for it.
    from importlib import metadata

    project = editable_project(top, module)
    if project is not None:
        return f'Image(pip=["{project.name}=={project.version}"])'
    for name in metadata.packages_distributions().get(top, ()):
        return f'Image(pip=["{name}=={metadata.version(name)}"])'
    return f"a distribution of {top} in Image(pip=[...]), with Image(wheelhouse=) for a wheel of your own"


@functools.cache
def editable_projects() -> tuple[Project, ...]:
    """Return the projects that are used where they are, those within others first."""
    # Not at the module's head: workers have no use for them.
    import json
    import urllib.parse
    from importlib import metadata

    found = []
    for distribution in metadata.distributions():
        with contextlib.suppress(Exception):  # a distribution's files may be broken
            origin = json.loads(distribution.read_text("direct_url.json") or "{}")
            if not origin.get("dir_info", {}).get("editable"):
                continue
            root = os.path.realpath(urllib.parse.unquote(urllib.parse.urlparse(origin["url"]).path)) + os.sep
            modules = (distribution.read_text("top_level.txt") or "").split()
            pths = [file.read_text() for file in distribution.files or () if file.suffix == ".pth"]
            lines = [line for text in pths for line in text.splitlines()]
            path = frozenset(os.path.realpath(line) for line in lines if os.path.isabs(line))
            name, version = distribution.metadata["Name"], distribution.version
            found.append(Project(root, name, version, frozenset(modules) if modules else None, path))
    return tuple(sorted(found, key=lambda project: -len(project.root)))
