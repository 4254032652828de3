"""What the user's program imports, as pinned requirements: `Image.like_here()`.

The program is its script or its notebook, the module that asks, and all local modules that these import. What they
import of installed distributions is pinned, together with what those distributions require.
"""

from __future__ import annotations

import importlib.machinery
import logging
import os
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from . import credentials, distributions, imports
from .distributions import Distribution

log = logging.getLogger("skyward_lite")


def pins(asking: str, given: Iterable[str] = ()) -> list[str]:
    """Return a requirement of one version for each distribution that the user's program needs, sorted by name.

    `asking` is the name of the module that asks, `given` are names of packages that need no pin.
    """
    skipped = set(given)
    needed = distributions.with_requirements(_imported(asking))
    found = {name: each for name, each in needed.items() if name not in skipped}
    labelled = [each for each in found.values() if each.label and each.requirement]
    if labelled:
        log.warning(
            "Image.like_here(): versions with a local label are not on an index: %s. Add pip=[...] with the version "
            "that you want, and index_url= with the index that has it, if these will not do",
            ", ".join(f"{each.version}+{each.label} is pinned as {each.requirement}" for each in labelled),
        )
    for each in found.values():
        if each.directory and not each.is_editable:
            log.warning(
                "Image.like_here(): %s was installed from %s, which nodes do not have: send its modules with "
                "includes=[...], or a wheel of it with wheelhouse=",
                each.name,
                credentials.mask(each.directory),
            )
        elif each.url:
            log.warning(
                "Image.like_here(): %s was installed from a URL, not from an index, and is left out: add pip=[%r] to "
                "install it on nodes that can reach the URL",
                each.name,
                credentials.mask(each.requirement),
            )
    editable = [name for name, each in found.items() if each.is_editable]
    if editable:
        log.info("Image.like_here(): %s: editable installs, whose modules nodes get from here", ", ".join(editable))
    return [each.requirement for each in found.values() if each.requirement and not each.url]


def _imported(asking: str) -> dict[str, Distribution]:
    """Return the distributions that the program imports modules of, by name."""
    found: dict[str, Distribution] = {}
    names = [*_of_script()]
    for root in {asking, "__main__"}:
        spec = _spec(root)
        names += () if _is_installed(spec) else _of_module(spec)
    seen: set[str] = set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in ("__main__", "skyward_lite"):
            continue
        if _is_installed(_spec(top)):
            found |= {each.name: each for each in distributions.of_module(name)}
            continue
        # A local module runs the packages around it, too.
        parent = name.rpartition(".")[0]
        names += [parent] if parent else []
        names += _of_module(_spec(name))
        found |= {each.name: each for each in distributions.of_module(name) if not each.is_editable and _is_part(name)}
    return found


def _of_script() -> Iterator[str]:
    """Yield the names of the modules that the script, the notebook or the interactive session imports."""
    script = sys.modules.get("__main__")
    if script is None:
        return
    space = dict(vars(script))
    # In a notebook: the cells that ran so far, with calls in the place of magic commands.
    cells = space.get("In")
    if isinstance(cells, list):
        for cell in cells:
            yield from imports.in_source(str(cell))
    elif isinstance(file := getattr(script, "__file__", None), str):
        if _is_program(file) or _is_installed(_spec("__main__")):
            return
        yield from imports.in_source(_read(file))
    has_source = isinstance(cells, list) or isinstance(getattr(script, "__file__", None), str)
    for value in space.values():
        if isinstance(value, types.ModuleType):
            yield value.__name__
        elif isinstance(value, types.FunctionType) and value.__module__ == "__main__":
            yield from imports.in_code(value.__code__)
        elif not has_source:
            # Of a session, or of `python -c`, only the values are left: `from numpy import pi, array`.
            named = value if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType) else type(value)
            if isinstance(named.__module__, str):
                yield named.__module__


def _is_program(file: str) -> bool:
    """Return whether a script is an installed program, as `bin/pytest`: what it imports is not the user's."""
    return os.path.dirname(os.path.abspath(file)) in {os.path.dirname(sys.executable), os.path.join(sys.prefix, "bin")}


def _of_module(spec: importlib.machinery.ModuleSpec | None) -> set[str]:
    """Return the names of the modules that a local module imports."""
    if spec is None:
        return set()
    try:
        text = spec.loader.get_source(spec.name) if spec.loader else None  # type: ignore[attr-defined]
    except Exception:  # any loader may be asked, and a file may be gone
        text = None
    if text is None and spec.has_location and str(spec.origin).endswith(".py"):
        # Its loader tells no source, as that of pytest.
        text = _read(str(spec.origin))
    return imports.in_source(text, spec.parent or "") if isinstance(text, str) else set()


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Return how a module is found, without importing anything; None if it is not found."""
    module = sys.modules.get(name)
    spec: Any = getattr(module, "__spec__", None)
    if isinstance(spec, importlib.machinery.ModuleSpec):
        return spec
    if module is not None:
        return None
    parent = name.rpartition(".")[0]
    above = _spec(parent) if parent else None
    path = list(above.submodule_search_locations or ()) if above is not None else None
    if parent and not path:
        return None
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except Exception:  # any finder may be asked
            continue
        if isinstance(spec, importlib.machinery.ModuleSpec):
            return spec
    return None


def _is_installed(spec: importlib.machinery.ModuleSpec | None) -> bool:
    """Return whether a module, or the package around it, is in a directory into which distributions are installed."""
    if spec is None:
        return False
    if spec.origin is None or not spec.has_location:
        places = [str(place) for place in spec.submodule_search_locations or ()]
        return bool(places) and all(map(_is_among_distributions, places))
    place = spec.origin
    for _ in range(spec.name.count(".") + (spec.submodule_search_locations is not None)):
        place = os.path.dirname(place)
    return _is_among_distributions(place)


def _is_among_distributions(place: str) -> bool:
    """Return whether packages are installed into the directory of a file or a package."""
    directory = os.path.dirname(place)
    if os.path.basename(directory) in ("site-packages", "dist-packages"):
        return True
    try:
        return any(entry.endswith(".dist-info") for entry in os.listdir(directory))
    except OSError:
        return False


def _is_part(name: str) -> bool:
    """Return whether a module is an installed distribution's part of a namespace package that has local parts, too."""
    spec = _spec(name)
    origin = None if spec is None or not spec.has_location else spec.origin
    return origin is not None and f"{os.sep}site-packages{os.sep}" in origin


def _read(file: str) -> str:
    # Not at the module's head: it is needed for scripts only.
    import tokenize

    try:
        with tokenize.open(file) as source:
            return source.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""
