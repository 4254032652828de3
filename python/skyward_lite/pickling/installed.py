"""What is installed in this interpreter, and where a module comes from: its file, its package, its distribution."""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import os
import sys
import zipimport
from typing import Any, Final

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

_ON_EVERY_WORKER: Final = ("skyward_lite", "cloudpickle")
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
    if top in _ON_EVERY_WORKER:
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
    if any(real.startswith(root) and canonical(top) in names for root, names in editable_projects()):
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


@functools.cache
def editable_projects() -> tuple[tuple[str, frozenset[str]], ...]:
    """Return the directories of projects that are used where they are, each with its top-level modules."""
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
            root = urllib.parse.unquote(urllib.parse.urlparse(origin["url"]).path)
            names = (distribution.read_text("top_level.txt") or distribution.metadata["Name"]).split()
            found.append((os.path.realpath(root) + os.sep, frozenset(map(canonical, names))))
    return tuple(found)
