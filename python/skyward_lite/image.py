"""What a node's environment must have."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

from . import checks, credentials
from ._version import PYTHON

_INSTEAD = {
    "pip": "; write them into pip's or uv's configuration file in the node's home directory (extra-index-url, say)",
}
"""Where options may stand that a field does not take."""

_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^]]*\])?\s*(?:==\s*([^\s;,*]+)(?=\s*(?:[;,]|$)))?")


@dataclasses.dataclass(frozen=True, repr=False)
class Image:
    """The environment of a node.

    `python`: the Python version of the nodes, "3.11"; it must be the client's, which is what None means.
    `pip`: requirements in pip's syntax. `apt`: packages of Debian's and its kin, for which the user must be root or may
    use sudo without a password.
    `env`: set in the workers' environment before they start.
    `index_url`: where pip looks instead of PyPI. `wheelhouse`: a directory of wheels here that is sent to the nodes and
    is all that pip uses there, for hosts without a network.
    `includes`: modules and packages here (files and directories) that can be imported on the nodes.
    `wheel`: a wheel of skyward_lite for nodes on which the client's own does not run.

    A node that uses an interpreter as it is (`Local`, `SSH(python=)`) verifies `pip` and installs nothing.

    Credentials may stand in `index_url` and in the URLs of `pip` (percent-encoded): they reach pip and git on a node
    through files that only the user may read, and are shown nowhere.
    """

    python: str | None = None
    pip: Sequence[str] = ()
    apt: Sequence[str] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    index_url: str | None = None
    wheelhouse: str | None = None
    includes: Sequence[str] = ()
    wheel: str | None = None

    def __post_init__(self) -> None:
        for name in ("pip", "apt", "includes"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"Image({name}=...) takes a list: {name}=[{credentials.mask(value)!r}]")
            object.__setattr__(self, name, tuple(str(item) for item in value))
        object.__setattr__(self, "pip", tuple(_checked_requirement(item) for item in self.pip))
        object.__setattr__(self, "apt", tuple(_checked_package(item) for item in self.apt))
        if self.index_url is not None:
            object.__setattr__(self, "index_url", _checked_index(str(self.index_url)))
        if self.python is not None and self.python != PYTHON:
            raise ValueError(
                f"Image(python={checks.shown(self.python)}): nodes need the client's Python, which is {PYTHON}: "
                "functions that one version pickled do not run in another"
            )
        for name in ("wheelhouse", "wheel"):
            path = getattr(self, name)
            if path is not None:
                object.__setattr__(self, name, str(path))
        for path in (*self.includes, *filter(None, [self.wheelhouse, self.wheel])):
            if not os.path.exists(path):
                raise FileNotFoundError(f"Image: there is no {credentials.mask(str(path))}")
        object.__setattr__(self, "env", {str(k): str(v) for k, v in self.env.items()})
        for name, value in self.env.items():
            if not name or "=" in name or "\0" in name + value:
                raise ValueError(
                    f'Image(env={{{name!r}: ...}}): a name is not empty and has no "=", and neither has NUL'
                )

    def __repr__(self) -> str:
        """Return the fields, without credentials and without the values of `env`."""
        shown = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shown["pip"] = self.masked_pip()
        shown["env"] = dict.fromkeys(self.env, credentials.MASKED)
        if self.index_url is not None:
            shown["index_url"] = credentials.mask(self.index_url)
        return f"Image({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def masked_pip(self) -> tuple[str, ...]:
        """Return the requirements without credentials, to be shown."""
        return tuple(credentials.mask(requirement) for requirement in self.pip)

    def secrets(self) -> frozenset[str]:
        """Return what must not be shown of what pip and git print."""
        return frozenset().union(*(credentials.secrets(text) for text in (*self.pip, self.index_url or "")))

    def with_pip(self, *requirements: str) -> Image:
        """Give this image with further requirements, each listed once."""
        new = [r for r in requirements if r not in self.pip]
        return dataclasses.replace(self, pip=[*self.pip, *new])

    def with_package(self, name: str, version: str | None) -> Image:
        """Give this image with the package in that version, which replaces what was asked of it before.

        None leaves what the image asks already; else it means this interpreter's version, or any where it has none.
        """
        others = [r for r in self.pip if _package(r) != canonical(name)]
        if version is None:
            if len(others) < len(self.pip):
                return self
            version = installed(name)
        return dataclasses.replace(self, pip=[*others, name if version is None else f"{name}=={version}"])

    def packages(self) -> set[str]:
        """Give the names of the packages that `pip` requires."""
        return {name for name in map(_package, self.pip) if name is not None}

    def missing(self) -> list[str]:
        """Say which requirements this interpreter does not meet, one sentence each.

        Names and exact versions (`==`) are checked; other specifiers only for the name.
        """
        problems = []
        for requirement, shown in zip(self.pip, self.masked_pip(), strict=True):
            match = _REQUIREMENT.match(requirement)
            if match is None:
                problems.append(f"{shown!r} is not a requirement that pip would understand")
                continue
            name, wanted = match.groups()
            found = installed(name)
            if found is None:
                problems.append(f"{shown} is not installed")
            elif wanted is not None and found != wanted:
                problems.append(f"{shown} is wanted, {found} is installed")
        return problems


def _checked_requirement(text: str) -> str:
    """Return a requirement that is one line of a requirements file, and no option of pip's. Raises `ValueError`."""
    requirement = _checked("pip", text)
    if requirement.startswith("#") or re.search(r"\s#", requirement) or requirement.endswith("\\"):
        raise ValueError(f"Image(pip=[{credentials.mask(text)!r}]): a requirement has no comment and no line after it")
    return requirement


def _checked_package(text: str) -> str:
    """Return the name of a package of apt's, which installs it. Raises `ValueError`."""
    name = _checked("apt", text)
    if name.endswith("-") or any(character.isspace() for character in name):
        shown = credentials.mask(text)
        raise ValueError(
            f'Image(apt=[{shown!r}]): the name of one package, which does not end with "-" (apt removes then)'
        )
    return name


def _checked_index(text: str) -> str:
    """Return the URL of an index. Raises `ValueError`."""
    url = _checked("index_url", text)
    if any(character.isspace() for character in url):
        raise ValueError(f"Image(index_url={credentials.mask(text)!r}): a URL has no blanks in it")
    return url


def _checked(field: str, text: str) -> str:
    """Return the text without blanks around it, if it is something and no option. Raises `ValueError`.

    Credentials in it are such as can be kept off command lines.
    """
    stripped = text.strip(" \t")
    shown = credentials.mask(text)
    shown = f"Image({field}={shown!r})" if field == "index_url" else f"Image({field}=[{shown!r}])"
    if not stripped:
        raise ValueError(f"{shown}: it is empty" + (" (None stands for PyPI)" if field == "index_url" else ""))
    if stripped.startswith("-"):
        raise ValueError(f'{shown}: it begins with "-", and options are not taken here{_INSTEAD.get(field, "")}')
    if not all(character.isprintable() or character == "\t" for character in stripped):
        raise ValueError(f"{shown}: it contains a line end or another control character")
    if field != "apt":
        try:
            credentials.split(stripped)
        except ValueError as error:
            raise ValueError(f"Image({field}=...): {error}") from None
    return stripped


def installed(package: str) -> str | None:
    """Give this interpreter's version of a package."""
    # Not at the module's head: it would be a fifth of the time that importing the package's names takes.
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _package(requirement: str) -> str | None:
    match = _REQUIREMENT.match(requirement)
    return None if match is None else canonical(match[1])


def canonical(name: str) -> str:
    """Spell a package's name as the index does: scikit-learn and Scikit_Learn are one."""
    return re.sub(r"[-_.]+", "-", name).lower()
