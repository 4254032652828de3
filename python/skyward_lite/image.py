"""What a node's environment must have."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence

from . import checks, credentials, keywords
from ._version import PYTHON
from .distributions import canonical, installed

# What typing.TYPE_CHECKING is for type checkers, without the import of typing.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from packaging.requirements import Requirement

_PIP_OPTIONS = "; write them into pip's or uv's configuration file in the node's home directory (extra-index-url, say)"
"""Where options of pip's may stand, which `pip` does not take."""

_LISTS = {"pip": '["numpy", "pandas>=2"]', "apt": '["libgomp1"]', "includes": '["src/mypackage"]'}
"""The fields that are lists, and an example of each."""

_SIMPLE = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9][A-Za-z0-9.+!_-]*))?")
"""A name, or a name and one version, as plugins write a requirement. Such a requirement is read without `packaging`,
whose import takes 15 ms."""

_LOCATION = re.compile(r"[/\\]|(?i:\.(?:whl|zip|tar\.gz|tgz|tar\.bz2)$)")
"""A URL, a path or a file, which only pip understands."""


@keywords.explained("Image")
@dataclasses.dataclass(frozen=True, repr=False)
class Image:
    """The environment of a node.

    Where an interpreter is used as it is (`Local()`, `SSH(python=)`), `pip` is verified and nothing is installed.

    Parameters
    ----------
    python : str, optional
        The Python version of the nodes, as "3.11", or a release of it, as "3.11.9". Its minor version must be this
        process's, which is the default. A host that lacks it gets it from uv.
    pip : sequence of str, optional
        Requirements in pip's syntax. URLs may have credentials (percent-encoded): they reach pip and git on a node
        through files that only the user may read, and are shown nowhere.
    apt : sequence of str, optional
        Packages of Debian or of a system derived from it. They are installed by root, or by a user who may use sudo
        without a password.
    env : mapping of str to str, optional
        Variables of the workers' environment, set before they start. Numbers and paths are taken as texts.
    index_url : str, optional
        The index that pip uses instead of PyPI; it may have credentials, as URLs in `pip`.
    wheelhouse : str or path, optional
        A directory of wheels on this machine that is sent to the nodes, where pip then uses these wheels only: for
        hosts without a network.
    includes : sequence of str or path, optional
        Files and directories on this machine with modules and packages that the nodes can import.
    wheel : str or path, optional
        A wheel of skyward_lite for nodes on which this process's own build does not run.

    Raises
    ------
    TypeError, ValueError, FileNotFoundError
        If a value cannot be used; the text names the parameter.

    See Also
    --------
    Image.like_here : an image with everything that the program imports.

    Examples
    --------
    >>> image = sky.Image(pip=["numpy>=2"], env={"MODE": "fast"})
    >>> image.with_pip("pandas").pip
    ('numpy>=2', 'pandas')
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
        for name, example in _LISTS.items():
            items = checks.texts("Image", name, getattr(self, name), example, paths=name == "includes")
            object.__setattr__(self, name, items)
        object.__setattr__(self, "pip", tuple(_checked_requirement(item) for item in self.pip))
        object.__setattr__(self, "apt", tuple(_checked_package(item) for item in self.apt))
        if self.index_url is not None:
            checks.text("Image", "index_url", self.index_url, '"https://packages.example.org/simple"')
            object.__setattr__(self, "index_url", _checked_index(self.index_url))
        if self.python is not None:
            _check_python(self.python)
        for name in ("wheelhouse", "wheel"):
            path = getattr(self, name)
            if path is not None:
                object.__setattr__(self, name, checks.path("Image", name, path, f'"~/{name}s"'))
        for path in (*self.includes, *filter(None, [self.wheelhouse, self.wheel])):
            if not os.path.exists(path):
                raise FileNotFoundError(f"Image: there is no {credentials.mask(path)} on this machine")
        object.__setattr__(self, "env", _checked_env(self.env))
        for name, value in self.env.items():
            if not name or "=" in name or "\0" in name + value:
                raise ValueError(
                    f'Image(env={{{name!r}: ...}}): a name is not empty and has no "=", and no name or value has a NUL'
                )

    @classmethod
    def like_here(cls, **fields: Any) -> Image:
        """Return an image with everything that the program imports, in the versions that are installed here.

        The program is its script or notebook, the module that calls this, and the local modules that these import.
        Pinned is what they import anywhere in their sources, whether or not it has been imported yet, and all that it
        requires: call this after a notebook's imports. Left out are editable installs, whose modules nodes get from
        here, and what was installed from a URL or a directory, which the log names.

        Parameters
        ----------
        **fields
            The parameters of `Image`. A requirement in `pip=` stands in place of the package's own.

        Returns
        -------
        Image
        """
        # Not at the module's head: most programs do not need it.
        from . import here

        given = cls(**fields)
        pins = here.pins(sys._getframe(1).f_globals.get("__name__", ""), given.packages())
        return dataclasses.replace(given, pip=[*pins, *given.pip])

    def __repr__(self) -> str:
        """Return the fields, without credentials and without the values of `env`."""
        shown = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shown["pip"] = self.masked_pip()
        shown["env"] = dict.fromkeys(self.env, credentials.MASKED)
        if self.index_url is not None:
            shown["index_url"] = credentials.mask(self.index_url)
        return f"Image({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def masked_pip(self) -> tuple[str, ...]:
        """Return the requirements without credentials, fit to be shown.

        Returns
        -------
        tuple of str
        """
        return tuple(credentials.mask(requirement) for requirement in self.pip)

    def secrets(self) -> frozenset[str]:
        """Return the credentials, which must not be shown where pip or git prints them.

        Returns
        -------
        frozenset of str
        """
        return frozenset().union(*(credentials.secrets(text) for text in (*self.pip, self.index_url or "")))

    def with_pip(self, *requirements: str) -> Image:
        """Return this image with further requirements, each listed once.

        Parameters
        ----------
        *requirements : str
            Requirements in pip's syntax.

        Returns
        -------
        Image
        """
        new = [r for r in requirements if r not in self.pip]
        return dataclasses.replace(self, pip=[*self.pip, *new])

    def with_package(self, name: str, version: str | None) -> Image:
        """Return this image with a package in one version, in place of requirements for another version.

        Parameters
        ----------
        name : str
            The package.
        version : str or None
            None keeps the image's own requirement for the package, if it has one; else it means this interpreter's
            version, or any version if this interpreter does not have the package.

        Returns
        -------
        Image
        """
        others = [r for r in self.pip if _package(r) != canonical(name)]
        if version is None:
            if len(others) < len(self.pip):
                return self
            version = installed(name)
        return dataclasses.replace(self, pip=[*others, name if version is None else f"{name}=={version}"])

    def packages(self) -> set[str]:
        """Return the canonical names of the packages that `pip` requires.

        Returns
        -------
        set of str
        """
        return {name for name in map(_package, self.pip) if name is not None}

    def missing(self) -> list[str]:
        """Return a sentence for each requirement that this interpreter does not meet.

        Compared are names and versions. A requirement whose marker does not hold here is met. Of a URL after a name
        (`name @ URL`) only the name is compared, and the further requirements of extras are not looked at.

        Returns
        -------
        list of str
        """
        problems = [_problem(*pair) for pair in zip(self.pip, self.masked_pip(), strict=True)]
        release = ".".join(map(str, sys.version_info[:3]))
        if self.python not in (None, PYTHON, release):
            problems.insert(0, f"Python {self.python} is wanted, {release} is installed")
        return [problem for problem in problems if problem is not None]


def _checked_env(value: object) -> dict[str, str]:
    """Return the variables of `Image(env=)`, numbers and paths as texts. Raises `TypeError`."""
    checked = {}
    for name, setting in checks.pairs("Image", "env", value, '{"MODE": "fast"}').items():
        if isinstance(setting, os.PathLike):
            setting = os.fspath(setting)
        # True could be meant as "1", "true" or "yes", and None as "" or as no variable. numpy's numbers are numbers.
        is_number = hasattr(setting, "__float__") and not hasattr(setting, "__len__")
        if not isinstance(setting, str) and (not is_number or str(setting) in ("True", "False")):
            kind = str(setting) if is_number or setting is None else f"a {type(setting).__name__}"
            raise TypeError(f'Image(env={{{name!r}: ...}}): a text is needed, not {kind}: write "1" or "", say')
        checked[name] = str(setting)
    return checked


def _check_python(version: object) -> None:
    """Raise `ValueError` for a Python version that nodes cannot have: its minor version must be the client's."""
    if not isinstance(version, str) or not re.fullmatch(rf"{re.escape(PYTHON)}(?:\.[0-9]{{1,3}})?", version):
        raise ValueError(
            f"Image(python={checks.shown(version)}): nodes need the client's Python, which is {PYTHON}: functions that "
            f'one version pickled do not run in another. Give "{PYTHON}", or one of its releases, as "{PYTHON}.9"'
        )


def _checked_requirement(text: str) -> str:
    """Return a requirement that is one line of a requirements file. Raises `ValueError` for an option of pip's."""
    requirement = _checked("pip", text)
    if requirement.startswith("#") or re.search(r"\s#", requirement) or requirement.endswith("\\"):
        raise ValueError(
            f"Image(pip=[{credentials.mask(text)!r}]): a requirement has no comment and no line after it; "
            "write each as an item of its own"
        )
    if not _SIMPLE.fullmatch(requirement) and not _LOCATION.search(requirement) and _parse(requirement) is None:
        shown = credentials.mask(text)
        meant = re.fullmatch(r"([\w.-]+(?:\[[\w,.-]*\])?)(?:\s*=\s*|\s+)(\d[\w.]*)", requirement)
        several = [part.strip() for part in re.split(r"[,;\s]+", requirement)]
        write = '"numpy" or "numpy>=2", say' if meant is None else f'"{meant[1]}=={meant[2]}"'
        if len(several) > 1 and meant is None and all(map(_SIMPLE.fullmatch, several)):
            write = f"{several}, each an item of its own"
        raise ValueError(f"Image(pip=[{shown!r}]): it is no requirement that pip would understand: write {write}")
    return requirement


def _checked_package(text: str) -> str:
    """Return the name of a package that apt is to install. Raises `ValueError`."""
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
    """Return the text without blanks around it. Raises `ValueError` if it is empty, or would be taken for an option.

    Raises `ValueError` also for credentials that could not be kept off command lines.
    """
    stripped = text.strip(" \t")
    shown = credentials.mask(text)
    shown = f"Image({field}={shown!r})" if field == "index_url" else f"Image({field}=[{shown!r}])"
    if not stripped:
        raise ValueError(f"{shown}: it is empty" + (" (None stands for PyPI)" if field == "index_url" else ""))
    if stripped.startswith("-"):
        elsewhere = _PIP_OPTIONS if field == "pip" else ""
        raise ValueError(f'{shown}: it begins with "-", and options are not taken here{elsewhere}')
    if not all(character.isprintable() or character == "\t" for character in stripped):
        raise ValueError(f"{shown}: it contains a line end or another control character")
    if field != "apt":
        try:
            credentials.split(stripped)
        except ValueError as error:
            raise ValueError(f"Image({field}=...): {error}") from None
    return stripped


def _problem(requirement: str, shown: str) -> str | None:
    """Return why this interpreter does not meet a requirement; None if it does. `shown` is without credentials."""
    simple = _SIMPLE.fullmatch(requirement)
    version = None if simple is None else installed(simple[1])
    if simple is not None and version is not None and simple[2] in (None, version):
        return None
    parsed = _parse(requirement)
    if parsed is None:
        return f"{shown} is a URL or a path, which does not tell the package: write it as `name @ URL`"
    if not _applies(parsed):
        return None
    version = installed(parsed.name)
    if version is None:
        return f"{shown} is not installed"
    return None if _is_met(parsed, version) else f"{shown} is wanted, {version} is installed"


def _applies(requirement: Requirement) -> bool:
    """Return whether a requirement's marker holds here. A marker that cannot be evaluated counts as one that holds."""
    try:
        return requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    except (ValueError, KeyError):
        # Raised for a comparison that packaging does not define, and for a variable that only lock files have.
        return True


def _is_met(requirement: Requirement, version: str) -> bool:
    """Return whether a version meets a requirement. As for pip, a pre-release that is installed may meet any."""
    from packaging.version import InvalidVersion

    try:
        return requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        # A version from before PEP 440 is not comparable.
        return not requirement.specifier


def _package(requirement: str) -> str | None:
    """Return the canonical name of the package that is required; None if the requirement names none."""
    simple = _SIMPLE.fullmatch(requirement)
    if simple is not None:
        return canonical(simple[1])
    parsed = _parse(requirement)
    return None if parsed is None else canonical(parsed.name)


def _parse(requirement: str) -> Requirement | None:
    """Return a requirement's parts by PEP 508; None for one that only pip understands (a URL or a path), or nothing."""
    from packaging.requirements import Requirement

    try:
        # Options of pip's may follow, as `--hash`. Like pip, look for the first word that begins with "-".
        return Requirement(re.split(r"\s+-", requirement, maxsplit=1)[0])
    except ValueError:  # InvalidRequirement, and from older versions of packaging InvalidSpecifier, too
        return None
