"""Our own copy of uv: the client's, which hosts without a uv are sent.

It is the program of the package `uv`, which is a wheel, if this interpreter has it (the extra `skyward_lite[uv]`), else
the `uv` on the client's PATH. A host stores it in its cache directory under the digest of its content, so it crosses
once; later pools find it there, and the sweep removes it when nothing has used it for long.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import platform
import re
import shutil
import sys
import threading
import weakref
from pathlib import Path

from .probe import Facts

EXTRA = 'pip install "skyward_lite[uv]"'
"""The command that gives a client a uv."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The client's uv."""

    path: str
    size: int
    digest: str
    """The SHA-256 of its content, in hexadecimal."""
    glibc: tuple[int, ...]
    """The newest glibc version that it names; empty for a program that needs none."""


class Packed:
    """The program's content, compressed with gzip. Many hosts share it, and it is released with the last of them."""

    def __init__(self, data: bytes) -> None:
        self.data = data


_reading = threading.Lock()
"""Held while the program is looked for or compressed: the hosts of a pool ask for it at once, and one of them does it
for all. Python's sysconfig, which is asked where the program is, fails in two threads at once, too."""
_packed: weakref.ref[Packed] | None = None
"""The compressed program, while a host's build refers to it. Changed under `_reading`."""


def find() -> Program | None:
    """Return the client's uv; None if it has none."""
    with _reading:
        return _find_once()


@functools.cache
def _find_once() -> Program | None:
    for path in _places():
        try:
            content = Path(path).read_bytes()
        except OSError:
            continue
        # Not a script that starts another uv: only the program itself can be sent.
        if not content.startswith(b"\x7fELF"):
            continue
        versions = re.findall(rb"GLIBC_(\d{1,4})\.(\d{1,4})", content)
        glibc = max(((int(a), int(b)) for a, b in versions), default=())
        return Program(path, len(content), hashlib.sha256(content).hexdigest(), glibc)
    return None


def _places() -> list[str]:
    """Return the paths where the client's uv may be, the preferred one first."""
    places = []
    try:
        # Imported here because most pools never need it, and the package is optional.
        import uv

        places.append(str(uv.find_uv_bin()))
    except (ImportError, FileNotFoundError):
        pass
    found = shutil.which("uv")
    return places if found is None else [*places, found]


def unfit(facts: Facts) -> str:
    """Return why the client's uv cannot be sent to a host; empty if it can."""
    if sys.platform != "linux":
        return "only a client on Linux sends its own"
    program = find()
    if program is None:
        return f"this client has none to send: `{EXTRA}` here"
    if facts.system != "Linux" or facts.machine != platform.machine():
        return f"the client's is for Linux, {platform.machine()}"
    if program.glibc and facts.libc < program.glibc:
        return f"the client's needs glibc {'.'.join(map(str, program.glibc))} or newer"
    return ""


def packed(program: Program) -> Packed:
    """Return the program's content, compressed."""
    global _packed
    with _reading:
        known = _packed() if _packed is not None else None
        if known is None:
            # The fastest level: the better ones take longer than they save on a local network.
            known = Packed(gzip.compress(Path(program.path).read_bytes(), 1, mtime=0))
            _packed = weakref.ref(known)
        return known
