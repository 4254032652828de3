"""What is installed in this interpreter: distributions, their versions, and which of them a module is from.

Everything is read from installed metadata, when it is first asked for. `importlib.metadata` and `packaging` are not
imported at the module's head: the agent and programs that only import the package start sooner without them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping

# What typing.TYPE_CHECKING is for type checkers, without the import of typing.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from importlib import metadata

OWN = "skyward-lite"
"""This package, which nodes have in the client's version or not at all."""


def canonical(name: str) -> str:
    """Return a package's name as the index spells it: scikit-learn and Scikit_Learn are one package."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(package: str) -> str | None:
    """Return this interpreter's version of a package; None if it does not have the package."""
    # Not at the module's head: it would be a fifth of the time that importing the public names takes.
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclasses.dataclass(frozen=True)
class Distribution:
    """An installed distribution."""

    name: str
    """As the index spells it."""
    version: str
    """Without the local label, in the normal spelling."""
    label: str
    """The version's local label, as "cpu"; empty if it has none."""
    url: str
    """What pip can install it from that is no index, as "git+https://…@commit"; empty if it came from an index."""
    directory: str
    """The URL of the directory or the file on this machine that it was installed from; empty if it was not."""
    is_editable: bool
    """Whether its modules are used where they are, outside of the directories of installed distributions."""

    @property
    def requirement(self) -> str:
        """The requirement, in pip's syntax, that installs the same elsewhere; empty if there is none."""
        if self.directory or self.is_editable:
            return ""
        return f"{self.name} @ {self.url}" if self.url else f"{self.name}=={self.version}"


def same_version(one: str, other: str) -> bool:
    """Return whether two versions are the same by PEP 440; local labels do not count."""
    return one == other or public_version(one) == public_version(other)


@functools.lru_cache(1024)
def public_version(version: str) -> str:
    """Return a version without its local label, in a spelling that equal versions have in common."""
    from packaging.version import InvalidVersion, Version

    try:
        parsed = Version(version)
    except InvalidVersion:
        # A version from before PEP 440 is equal to its own text only.
        return version
    spelled = parsed.public
    # Zeros at the end of a release mean nothing: 1.2 and 1.2.0 are equal.
    release = ".".join(map(str, parsed.release))
    short = re.sub(r"(\.0)+$", "", release)
    return spelled.replace(release, short, 1)


# ------------------------------------------------------------------------------------------------ of a module


def of_module(name: str) -> tuple[Distribution, ...]:
    """Return the distributions that a module of this name is from; none for a local one and the standard library's.

    Of a namespace package that several distributions have a part in, it is those that have the module.
    """
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names:
        return ()
    homes = sorted(set(_homes().get(top, ())))
    if len(homes) > 1:
        homes = _with_file(name, homes)
    found = map(described, homes)
    return tuple(each for each in found if each is not None and each.name != OWN)


@functools.cache
def described(name: str) -> Distribution | None:
    """Return what is known of an installed distribution; None if there is none of that name."""
    from importlib import metadata

    try:
        found = metadata.distribution(name)
        version = found.version
    except metadata.PackageNotFoundError:
        return None
    url, directory, is_editable = _origin(found)
    public, _, label = version.partition("+")
    with contextlib.suppress(ImportError, ValueError):
        from packaging.version import Version

        public = Version(version).public
    return Distribution(canonical(name), public, label, url, directory, is_editable)


def _origin(found: metadata.Distribution) -> tuple[str, str, bool]:
    """Return `url`, `directory` and `is_editable` of a distribution, by PEP 610."""
    try:
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        url = str(origin.get("url", ""))
        if origin.get("dir_info", {}).get("editable"):
            return "", url, True
        if url.startswith("file:"):
            return "", url, False
        vcs = origin.get("vcs_info", {})
        return (f"{vcs['vcs']}+{url}@{vcs['commit_id']}" if vcs else url), "", False
    except (OSError, ValueError, KeyError, AttributeError):
        # Without a readable record it counts as one of an index.
        return "", "", False


def _with_file(name: str, homes: list[str]) -> list[str]:
    """Return those of the distributions that have the module, or the innermost package around it that one has."""
    path = name.replace(".", "/")
    while "/" in path:
        found = [home for home in homes if any(path == each or each.startswith(f"{path}/") for each in _files(home))]
        if found:
            return found
        path = path.rpartition("/")[0]
    # Of the package itself: it belongs to all if one of them has its code, otherwise to none of them.
    return [home for home in homes if f"{path}/__init__" in _files(home)]


@functools.cache
def _files(home: str) -> frozenset[str]:
    """Return the files of a distribution without the ends of their names."""
    from importlib import metadata

    return frozenset(re.sub(r"\.[^/]*$", "", str(file)) for file in metadata.files(home) or ())


_reading = threading.Lock()
"""Held while the distributions are read: several threads may ask at once, and one of them reads for all."""


def _homes() -> Mapping[str, list[str]]:
    """Return the names of the distributions that have each top-level module."""
    with _reading:
        return _read_homes()


@functools.cache
def _read_homes() -> Mapping[str, list[str]]:
    from importlib import metadata

    # Reads at least one file of each distribution that is installed.
    return metadata.packages_distributions()


def read() -> None:
    """Read what `of_module` needs, so that later calls need not wait for it."""
    _homes()
    public_version("0")


# ------------------------------------------------------------------------------------------------ with requirements


def with_requirements(distributions: Mapping[str, Distribution]) -> dict[str, Distribution]:
    """Return the distributions and all that they require and that is installed, by name, sorted."""
    found: dict[str, Distribution] = {}
    left = [(each, "") for each in distributions.values()]
    seen: set[tuple[Distribution, str]] = set()
    while left:
        each, extra = left.pop()
        found[each.name] = each
        for name, extras in _required(each.name, extra):
            needed = described(name)
            if needed is not None and needed.name != OWN:
                new = {(needed, of) for of in ("", *extras)} - seen
                seen |= new
                left += new
    return dict(sorted(found.items()))


def _required(name: str, extra: str) -> Iterator[tuple[str, set[str]]]:
    """Return the names, and their extras, that a distribution requires here, with this extra of its own."""
    from importlib import metadata

    from packaging.requirements import InvalidRequirement, Requirement

    for text in metadata.requires(name) or ():
        with contextlib.suppress(InvalidRequirement, ValueError, KeyError):
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                yield canonical(requirement.name), requirement.extras
