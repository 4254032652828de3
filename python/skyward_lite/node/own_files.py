"""Imports of the user's modules from this machine's files, each as it was when the worker's generation began.

For nodes that see the client's files. Such a file may be edited between the beginning of a call and the moment when
this process first imports it. So the loader asks the client before it runs a source (`pickling/changes.py`), a fraction
of a millisecond for each of the user's modules. The client learns so which files workers have imported.

Python's own loader takes the bytecode of an earlier source for that of an edited one, if both have the same size and
were written within the same second. This loader takes bytecode only where that cannot be.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import linecache
import marshal
import os
import sys
import types
from collections.abc import Callable
from typing import Any, Final

from .. import _core
from ..pickling import changes
from ..pickling.changes import FRESH_NANOS, OTHER, is_fresh, stamp_of
from ..pickling.installed import ON_EVERY_WORKER
from . import first_imports

_INSTALLED: Final = ("site-packages", "dist-packages")
"""Directories of installed distributions."""
_LIBRARY: Final = os.path.dirname(os.__file__) + os.sep
"""The directory of the standard library."""

WAIT_MS: Final = 600_000
"""Bound on one wait for the client, which may be busy for minutes with something that holds its GIL. Then the file is
taken as it is."""

Ask = Callable[[bytes, int], bytes | None]
"""Sends a request to the client and returns its answer; None if none comes within so many milliseconds."""


def install(worker: _core.WorkerRuntime) -> None:
    """Have the user's modules imported as they were when this worker's generation began."""
    sys.meta_path.insert(0, _Finder(worker.request, worker.generation))


class _Finder:
    """Finds what the other finders find, and has a loader of ours load the user's source files."""

    def __init__(self, ask: Ask, generation: int) -> None:
        self._ask = ask
        self._generation = generation
        self._process = os.getpid()
        """The worker's process. A child that a task forks cannot ask."""

    def find_spec(
        self, name: str, path: Any = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return how a module is loaded; None if no finder finds it."""
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: importlib.machinery.ModuleSpec | None = None if find is None else find(name, path, target)
            if spec is not None:
                loader = spec.loader
                if type(loader) is importlib.machinery.SourceFileLoader and _is_users(name, loader.path):
                    spec.loader = OwnFileLoader(loader.name, loader.path, self.content)
                return spec
        return None

    def content(self, name: str, path: str, source: bytes) -> bytes:
        """Return what this worker's generation has in a file, which has `source` in it now."""
        answer: bytes | None = None
        if os.getpid() == self._process:
            request = changes.request(self._generation, name, path, source)
            # A `CoreError` means that the pool is being closed.
            with first_imports.untimed(), contextlib.suppress(_core.CoreError):
                answer = self._ask(request, WAIT_MS)
        return source if answer is None or not answer.startswith(OTHER) else answer[len(OTHER) :]


def _is_users(name: str, path: str) -> bool:
    if name.partition(".")[0] in ON_EVERY_WORKER:
        return False
    return not path.startswith(_LIBRARY) and not any(f"{os.sep}{part}{os.sep}" in path for part in _INSTALLED)


class OwnFileLoader(importlib.machinery.SourceFileLoader):
    """Loads a module from a file of the user's. `content` returns what the worker's generation has in it."""

    def __init__(self, name: str, path: str, content: Callable[[str, str, bytes], bytes]) -> None:
        super().__init__(name, path)
        self._content = content

    def get_code(self, fullname: str) -> types.CodeType | None:
        """Return the module's code, of this worker's generation."""
        path = self.get_filename(fullname)
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            source = file.read()
        content = self._content(fullname, path, source)
        if content != source:
            # Tracebacks show the lines that ran.
            lines = f"{importlib.util.decode_source(content)}\n".splitlines(keepends=True)
            linecache.cache[path] = len(content), None, lines, path
        elif _has_bytecode_of(path, status):
            code = super().get_code(fullname)
            if stamp_of(os.stat(path)) == stamp_of(status):
                return code
        code = self.source_to_code(content, path)
        if content == source and not sys.dont_write_bytecode and not is_fresh(status):
            self._write_bytecode(path, status, code)
        return code

    def _write_bytecode(self, path: str, status: os.stat_result, code: types.CodeType) -> None:
        """Write the bytecode of a file, so that the next process need not compile it."""
        try:
            cached = importlib.util.cache_from_source(path)
        except NotImplementedError:
            return
        # An error of writing is none: `set_data` says so in the debug log of importlib.
        self.set_data(cached, _header(status) + marshal.dumps(code), _mode=status.st_mode | 0o200)


def _has_bytecode_of(path: str, status: os.stat_result) -> bool:
    """Return whether there is a bytecode file that was made of this state of a source file, beyond doubt."""
    try:
        with open(importlib.util.cache_from_source(path), "rb") as file:
            made = os.fstat(file.fileno())
            return file.read(16) == _header(status) and made.st_mtime_ns - status.st_mtime_ns > FRESH_NANOS
    except (OSError, NotImplementedError):
        return False


def _header(status: os.stat_result) -> bytes:
    """Return what a file with the bytecode of a source begins with."""
    seconds, size = int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF
    # The format's number, no flags, the source's time of change and its size.
    return importlib.util.MAGIC_NUMBER + bytes(4) + seconds.to_bytes(4, "little") + size.to_bytes(4, "little")
