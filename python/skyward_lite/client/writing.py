"""Files that a pool writes for its user: complete or not at all."""

from __future__ import annotations

import contextlib
import gzip
import os
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path

from .. import checks


def target(owner: str, path: object) -> Path:
    """Return the file that a user named. Raise `TypeError` that names the parameter if it is no path."""
    if isinstance(path, str | os.PathLike) and isinstance(name := os.fspath(path), str) and name:
        return Path(name)
    raise TypeError(f"{owner}(path={checks.shown(path)}): the name of a file")


def write(path: Path, parts: Iterable[str], *, compress: bool = False) -> None:
    """Write a file in the place of what may be there. Raise `OSError` that names it; then the old file is still there.

    What is no plain file, such as a pipe, is written to. A symbolic link stays, and what it leads to is replaced.
    """
    try:
        real = path.resolve()
        if real.exists() and not stat.S_ISREG(real.stat().st_mode):
            _fill(real, "wb", parts, compress)
            return
        beside = real.with_name(f".{real.name[:200]}.{uuid.uuid4().hex[:8]}.part")
        try:
            _fill(beside, "xb", parts, compress)
            os.replace(beside, real)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
    except OSError as error:
        # The user knows the name that was given, and not the one of the file beside it.
        raise OSError(error.errno, error.strerror, str(path)) from None


def _fill(path: Path, mode: str, parts: Iterable[str], compress: bool) -> None:
    with open(path, mode) as file:
        if not compress:
            for part in parts:
                file.write(part.encode("utf-8", "backslashreplace"))
            return
        # The archive's own time and name are left out: the same run makes the same file.
        with gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed:
            for part in parts:
                packed.write(part.encode("utf-8", "backslashreplace"))
