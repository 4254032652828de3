"""The user's files that workers on this machine import, and what each of them had in it in each generation.

Such workers import modules from the files themselves, whenever a task first needs them. A file may be edited before
some worker does so. Therefore the client remembers the content of each file from the moment when workers may import it,
and a worker asks before it runs a source (`node/own_files.py`): if the file has changed since the worker's generation
began, it gets the content of then.

The client knows the modules that it has imported itself. Others it learns of when the first worker imports one, so that
an edit is noticed from then on. Of extension modules and archives it knows only whether they have changed: a worker
imports them as they are.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import types
import zipimport
from collections.abc import Callable
from typing import Any, Final

from .installed import file_of, is_installed

FRESH_NANOS: Final = 2_000_000_000
"""A file that was written less than 2 s before it was read may be written again without a change of its times: file
systems have clocks of up to 2 s. Its content is compared instead, until it is older."""
MAX_SOURCE: Final = 8 << 20
"""Bytes of the largest source whose content is remembered. Of a larger file only its times and its size are."""
KEPT_GENERATIONS: Final = 16
"""The newest generations whose contents are remembered. Calls of older ones import the oldest that is known."""

AS_READ: Final = b"="
"""The answer to a worker that has read what its generation has."""
OTHER: Final = b"!"
"""What the answer begins with that has the content of the worker's generation."""

Stamp = tuple[int, int, int, int]
"""A file's times of change in nanoseconds, of its content and of its other properties, its size and its number."""


class _File:
    """A file that workers import, or may import."""

    __slots__ = ("contents", "is_imported", "name", "stamp")

    def __init__(self, name: str, path: str, generation: int) -> None:
        self.name = name
        """The module's, for messages."""
        self.is_imported = False
        """Whether a worker has asked for it."""
        self.stamp, content = _read(path)
        self.contents: list[tuple[int, bytes | None]] = [(generation, content)]
        """What it had in it, and the first generation for which this is so; None where there was no file. The last is
        the newest."""

    def at(self, generation: int) -> bytes | None:
        """Return its content in a generation, or the oldest that is known."""
        known = [content for first, content in self.contents if first <= generation]
        return known[-1] if known else self.contents[0][1]

    def has_changed(self, path: str, is_idle: Callable[[], bool]) -> bool:
        """Return whether it has another content than in the newest generation.

        If no worker can have imported it, that generation gets the content of now.
        """
        if self.stamp is not None and self.stamp == _stamp(path):
            return False
        stamp, content = _read(path)
        last = self.contents[-1][1]
        if content != last:
            if self.is_imported or content is None or last is None or not is_idle():
                return True
            self.contents[-1] = self.contents[-1][0], content
        self.stamp = stamp
        return False

    def renew(self, path: str, generation: int) -> None:
        """Note its content of now, from this generation on, and forget those that no remembered generation has."""
        if self.has_changed(path, bool):
            self.stamp, content = _read(path)
            self.contents.append((generation, content))
        while len(self.contents) > 1 and self.contents[1][0] <= generation - KEPT_GENERATIONS:
            del self.contents[0]


class Files:
    """The files of the user's modules, for a pool whose nodes see them: see `generations.Source`.

    `is_idle()` returns whether every task has ended. Then an edit of a file that no worker has imported makes no
    difference to any worker.
    """

    def __init__(self, is_idle: Callable[[], bool] = bool) -> None:
        self._is_idle = is_idle
        self._lock = threading.Lock()
        """Guards everything below."""
        self._generation = 0
        """The newest."""
        self._files: dict[str, _File] = {}
        """By path."""
        self._modules: dict[str, types.ModuleType] = {}
        """The user's modules in this process, by name."""
        self._paths: dict[str, str] = {}
        """The file of each module, also of those that this process has dropped."""
        self._installed: set[str] = set()
        """The names of installed modules that were seen."""
        self._count = 0
        """The length of `sys.modules` when all modules were noted last."""
        self._replaced = ""
        """A module that was found in another file than workers may have imported, in the newest generation."""
        self.change = ""
        """What had changed when `changed` last returned true."""
        self._note_all()

    def reason(self, name: str, module: Any) -> str:
        """Return "": whether workers find the same file is decided elsewhere."""
        return ""

    def snapshot(self, generation: int, name: str) -> None:
        """Note the content of all modules of the user's that this process has by now, unless they are known."""
        with self._lock:
            self._note_all()

    def changed(self) -> bool:
        """Return whether a module has changed since the newest generation began, or is another file's than before."""
        with self._lock:
            self._note_all()
            if self._replaced:
                self.change = f"module {self._replaced}"
                return True
            for path, file in self._files.items():
                if file.has_changed(path, self._is_idle):
                    self.change = f"module {file.name} ({path})"
                    return True
        return False

    def new_generation(self, generation: int) -> None:
        """Begin a generation, with the files as they are now."""
        with self._lock:
            self._generation, self._replaced = generation, ""
            for path, file in self._files.items():
                file.renew(path, generation)

    def answer(self, request: bytes) -> bytes:
        """Answer a worker which has read a file: with `AS_READ`, or with what the file had in the worker's generation.

        `request` is as the function of this name makes it.
        """
        lines = request.decode(errors="surrogateescape").split("\n", 3)
        generation, name, read, path = int(lines[0]), *lines[1:]
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _File(name, path, generation)
            file.is_imported = True
            content = file.at(generation)
        if content is None or len(content) > MAX_SOURCE or not path.endswith(".py") or _digest(content) == read:
            return AS_READ
        return OTHER + content

    def _note_all(self) -> None:
        """Note the user's modules that this process has by now, and which of them is another file's than before."""
        modules, known = sys.modules, self._modules
        if self._count == len(modules) and all(modules.get(name) is module for name, module in known.items()):
            return
        for name in [name for name, module in known.items() if modules.get(name) is not module]:
            del known[name]
        for name, module in list(modules.items()):
            # A module of another type is loaded only when its first attribute is asked for: it is left alone here.
            if name in known or name in self._installed or type(module) is not types.ModuleType:
                continue
            path = _path_of(module)
            if path is None or module.__name__ != name or name in ("__main__", "__mp_main__"):
                continue
            if is_installed(name, module):
                self._installed.add(name)
                continue
            if self._paths.setdefault(name, path) != path:
                self._replaced, self._paths[name] = name, path
            known[name] = module
            if path not in self._files:
                self._files[path] = _File(name, path, self._generation)
        self._count = len(modules)


def _path_of(module: Any) -> str | None:
    """Return the file that has a module: its own one, or the archive."""
    loader = getattr(getattr(module, "__spec__", None), "loader", None)
    return loader.archive if isinstance(loader, zipimport.zipimporter) else file_of(module)


def request(generation: int, name: str, path: str, read: bytes) -> bytes:
    """Return what a worker of a generation asks that has read this content in the file of a module."""
    return f"{generation}\n{name}\n{_digest(read)}\n{path}".encode(errors="surrogateescape")


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def stamp_of(status: os.stat_result) -> Stamp:
    """Return by what a file is known to be unchanged, if it is not fresh."""
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def is_fresh(status: os.stat_result) -> bool:
    """Return whether a file was written so lately that it may change and keep its stamp."""
    now = time.time_ns()
    return abs(now - status.st_mtime_ns) < FRESH_NANOS or abs(now - status.st_ctime_ns) < FRESH_NANOS


def _stamp(path: str) -> Stamp | None:
    try:
        return stamp_of(os.stat(path))
    except (OSError, ValueError):
        return None


def _read(path: str) -> tuple[Stamp | None, bytes | None]:
    """Return a file's stamp, None if it is not to be trusted; and its content, None if there is no file.

    In the place of the content of an archive, an extension module or a very large file, its times and its size are
    returned.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            large = status.st_size > MAX_SOURCE or not path.endswith((".py", ".pyc"))
            content = repr(stamp_of(status)).encode() if large else file.read()
            after = os.fstat(file.fileno())
    except (OSError, ValueError):
        return None, None
    stamp = stamp_of(after)
    return (None if stamp_of(status) != stamp or is_fresh(after) else stamp), content
