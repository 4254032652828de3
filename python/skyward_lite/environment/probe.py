"""What a host has: the environment, or the means to make it, or an interpreter that will do as it is."""

from __future__ import annotations

import dataclasses
import json
import re

from .. import credentials
from .._version import PYTHON, __version__
from ..errors import NodeStartError
from ..image import Image
from . import scripts

PROBE_SECONDS = 30.0
"""Bound on the probe."""
VERIFY_SECONDS = 60.0
"""Bound on verifying an interpreter, which imports the package."""
MIN_FREE_MB = 200
"""Megabytes of free disk space without which no build is begun."""

FALLBACK_DIRECTORIES = ("/var/tmp", "/tmp")
"""Where an environment is made if the user's cache directory cannot have it. No blanks: they are words of a script."""

_PIP_SETTINGS = (
    "INDEX_URL EXTRA_INDEX_URL FIND_LINKS NO_INDEX CERT CLIENT_CERT PROXY TRUSTED_HOST "
    "CONSTRAINT NO_BINARY ONLY_BINARY PRE"
)
"""Variables PIP_... that change what pip installs, or how it reaches the index."""

UNSAFE = "is not safe from other users"
"""How the scripts report a directory whose files another user could change (unsafe.sh)."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the probe found on a host."""

    root: str
    """The directory that has or can have environments; empty if there is none."""
    ready: bool
    """Whether the environment is there. Then the probe has not looked for whatever making one needs."""
    system: str
    machine: str
    libc: tuple[int, ...]
    """The version of glibc; empty for another library."""
    python: str | None
    """An interpreter of the client's minor version; of the image's own version, where that is more precise."""
    venv: bool
    """Whether this interpreter can make environments."""
    uv: str | None
    pip_settings: str
    """What tells the host's pip where to look or whom to trust: a file, or the name of a variable; empty if nothing."""
    free: int | None
    """Free disk space for `root`, in megabytes."""
    others: tuple[str, ...]
    """Interpreters that were found, with their versions."""
    why: str
    """Why directories were passed over."""


def places() -> dict[str, str]:
    """Return what places.sh is given."""
    return {"FALLBACKS": " ".join(FALLBACK_DIRECTORIES)}


def probe_script(env: str, python: str | None = None) -> bytes:
    """Return the script that reports what a host has, and whether it has this environment.

    `python` is the image's own: the minor version of the interpreter to look for, or a release of it.
    """
    return scripts.compose(
        scripts.read("probe.sh"), ENV=env, PYTHON=PYTHON, RELEASE=python or PYTHON, SETTINGS=_PIP_SETTINGS, **places()
    )


def read_facts(report: dict[str, list[str]]) -> Facts:
    """Return what the probe's report says."""

    def first(key: str) -> str:
        return report.get(key, [""])[0].strip()

    libc = re.fullmatch(r"glibc ([0-9]{1,4}(?:\.[0-9]{1,4}){0,3})", first("libc"))
    free = scripts.parse_number(first("free"))
    return Facts(
        root=first("root"),
        ready=first("ready") == "yes",
        system=first("system"),
        machine=first("machine"),
        libc=tuple(int(part) for part in libc[1].split(".")) if libc else (),
        python=first("python") or None,
        venv=first("venv") == "yes",
        uv=first("uv") or None,
        pip_settings=first("pip"),
        free=None if free is None else free // 1024,
        others=tuple(report.get("found", [])),
        why=first("why"),
    )


def interpreter(facts: Facts, env: str) -> str:
    """Return the path of the environment's interpreter on the host. Raises `NodeStartError` if it cannot be a path."""
    _check_paths(facts)
    return f"{facts.root}/{env}-{facts.machine}/bin/python"


def remedy(facts: Facts) -> str:
    """Return what to do about the directories that were passed over."""
    alone = "make one this user's alone (chmod go-w, and remove what others left in it), "
    return f"{alone if UNSAFE in facts.why else ''}free some space, or set XDG_CACHE_HOME for sessions there"


def check_room(facts: Facts) -> None:
    """Raise `NodeStartError` if the host has no place for an environment."""
    if not facts.root:
        raise NodeStartError(f"there is no directory for the environment:{facts.why} {remedy(facts)}")
    _check_paths(facts)
    if facts.free is not None and facts.free < MIN_FREE_MB:
        raise NodeStartError(f"{facts.root} has {facts.free} MB left, and {MIN_FREE_MB} MB are needed")


def _check_paths(facts: Facts) -> None:
    """Raise `NodeStartError` if the paths that the host names, or its architecture, cannot be parts of a command."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}", facts.machine):
        raise NodeStartError(f"`uname -m` printed {facts.machine[:100]!r}, which names no architecture")
    paths = [path for path in (facts.root, facts.python, facts.uv) if path]
    for path in paths:
        if not path.startswith("/") or not path.isprintable() or len(path) > 4096:
            raise NodeStartError(f"it named {path[:200]!r} where the path of a file was expected")


def verify_script(python: str, image: Image) -> bytes:
    """Return the script that reports what an interpreter, which is used as it is, lacks for the image."""
    pip = json.dumps([credentials.bare(requirement) for requirement in image.pip])
    release = image.python or PYTHON
    given = {"PYTHON": python, "MINOR": PYTHON, "RELEASE": release, "VERSION": __version__, "PIP": pip}
    return scripts.compose(scripts.read("verify.sh"), **given)


UNMET = "does not meet the image"
"""What is said of an interpreter that runs, and lacks something."""


def verified(python: str, result: scripts.ScriptResult) -> str:
    """Return the path that `verify_script` reported. Raises `NodeStartError` if the interpreter will not do."""
    if result.status:
        raise NodeStartError(f"{python} cannot be used: {result.printed or f'status {result.status}'}")
    problems = result.report.get("problem", [])
    if problems:
        raise NodeStartError(f"{python} {UNMET}, and python= installs nothing: {'; '.join(problems)}")
    paths = result.report.get("python")
    if not paths or not paths[0]:
        raise NodeStartError(
            f"{python} cannot be used: it did not say where it is. It printed: {result.printed or 'nothing'}"
        )
    return paths[0]
