"""The user's modules on a node: real files, once for all worker processes of a pool, in the pool's directory there.

    <digest>/         what a unit has, as a directory of import: never changed, whatever becomes of the module
    namespaces/       an empty directory for each package without a file
    generation-<n>    what the client has told of generation n, pickled
    lock              held by the process that asks the client

A directory is made under another name and renamed when it is whole, so that a process that is killed leaves no half
unit behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import time
from collections.abc import Iterator
from typing import Final

from ..served import Answer

LOCK_POLL_SECONDS: Final = 0.01
"""Between two tries to take the lock, while another process asks the client."""


class UnkeptError(Exception):
    """Raised when a file of the directory cannot be written or read. The argument names the directory and says why."""


class Store:
    """The directory. Any thread of any process of this node's workers may use it. Most methods raise `UnkeptError`."""

    def __init__(self, directory: str, generation: int) -> None:
        self.directory = directory
        self._told = f"{directory}/generation-{generation}"
        self._told_file: tuple[int, int] = 0, 0
        """Of the file that `read` has last returned: inode and time of change."""

    @contextlib.contextmanager
    def locked(self, seconds: float) -> Iterator[None]:
        """Keep other processes from asking the client, until the block is left.

        After so many seconds go on without the lock: no file can be spoilt by that.
        """
        with self._explaining():
            # Each time, because it may be removed by hand.
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.directory, 0o700)
            fd = os.open(f"{self.directory}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(LOCK_POLL_SECONDS)
            yield
        finally:
            # Not by closing alone: a child that was forked meanwhile has the file open, too.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def read(self) -> Answer | None:
        """Return what the client has told this node of the generation, if that is new to the caller."""
        with self._explaining(), contextlib.suppress(FileNotFoundError), open(self._told, "rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_ino, status.st_mtime_ns) != self._told_file:
                told: Answer = pickle.load(file)
                self._told_file = status.st_ino, status.st_mtime_ns
                return told
        return None

    def write(self, told: Answer) -> None:
        """Keep what the client has told, for the other processes."""
        path = self._new()
        with self._explaining():
            try:
                with open(path, "wb") as file:
                    pickle.dump(told, file, protocol=5)
                    status = os.fstat(file.fileno())
                os.rename(path, self._told)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                raise
        self._told_file = status.st_ino, status.st_mtime_ns

    def root(self, digest: str) -> str:
        """Return the directory of import that a unit has here."""
        return f"{self.directory}/{digest}"

    def has(self, digest: str) -> bool:
        """Return whether the unit is here."""
        return os.path.isdir(self.root(digest))

    def digests(self) -> list[str]:
        """Return the digests of the units that are here."""
        with self._explaining():
            return [name for name in os.listdir(self.directory) if len(name) == 32]

    def install(self, digest: str, packed: bytes) -> None:
        """Write the files of a unit."""
        with self._explaining():
            self._install(digest, packed)

    def _install(self, digest: str, packed: bytes) -> None:
        # Not at the module's head: one process of a node needs them, and the others start sooner.
        import hashlib
        import shutil
        import zlib

        try:
            raw = zlib.decompress(packed)
        except zlib.error:
            raw = b""
        if hashlib.sha256(raw).hexdigest()[:32] != digest:
            raise ValueError(f"the content of unit {digest} was damaged on its way")
        _, files = pickle.loads(raw)
        new = self._new()
        try:
            made: set[str] = set()
            for relative, content, is_program in files:
                path = f"{new}/{relative}"
                parent = os.path.dirname(path)
                if parent not in made:
                    os.makedirs(parent, exist_ok=True)
                    made.add(parent)
                with open(path, "wb") as file:
                    file.write(content)
                if is_program:
                    os.chmod(path, 0o700)
            os.rename(new, self.root(digest))
        except OSError:
            if not self.has(digest):  # else another process was first
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Raise `UnkeptError` for an error of the block."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise UnkeptError(f"{self.directory}: {error}") from error

    def _new(self) -> str:
        """Return a path that no thread or process uses, or has used and left something there when it was killed."""
        return f"{self.directory}/new-{os.urandom(8).hex()}"

    def make_namespace(self, name: str) -> str:
        """Make a directory for a package without a file. Return the directory of import that has it."""
        root = f"{self.directory}/namespaces"
        with self._explaining():
            os.makedirs(f"{root}/{name.replace('.', '/')}", exist_ok=True)
        return root
