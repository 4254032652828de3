"""What of the user's modules is sent at once: a module's file, or the whole directory of a package. Read and packed.

A package's directory is sent with its data files, within bounds. Hidden files, `__pycache__` and compiled code are left
behind. A packed unit names each of its files relative to a directory of import (`company/tool/__init__.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import os
import pickle
import re
import stat
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from ..pickling.installed import EXTENSIONS

MAX_FILES: Final = 10_000
"""Files that one package may have, its data files included."""
MAX_DATA_FILE: Final = 1 << 20
"""Bytes of a package's largest data file that is sent."""
MAX_DATA: Final = 32 << 20
"""Bytes of all data files of one package that are sent. Beyond it the largest are left behind."""
FRESH_NANOS: Final = 1_000_000_000
"""Age below which a file's time of change does not prove its content: file systems count time in steps of up to 10 ms
(ext4) or 1 s (older ones), and a second change within one step leaves the time as it was."""
MAX_READS: Final = 3
"""Tries to read a file that is being written to."""

_EXTENSIONS: Final = sorted(EXTENSIONS, key=len, reverse=True)
"""The longest first: the module of `x.abi3.so` is not named "x.abi3"."""
_SOURCES: Final = (".py", ".pyc")
_COMPILED: Final = re.compile(r"\.(so|pyd|dylib|dll)(\.[\d.]+)?$|\.(o|a|obj|lib)$")
_IMPORT: Final = re.compile(
    r"(?:^|[;:])[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import[ \t]*(\([^)]*\)|[^\n;#]*)|import[ \t]+([^\n;#]+))", re.MULTILINE
)
_IMPORT_BY_STRING: Final = re.compile(r"""(?:import_module|__import__)\(\s*["']([\w.]+)["']""")
_NAME: Final = re.compile(r"[\w.]+")
_NO_STATEMENT: Final = re.compile(
    r'''#[^\n]*|"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""|"[^"\\\n]*(?:\\.[^"\\\n]*)*"|'''
    r"""'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''|'[^'\\\n]*(?:\\.[^'\\\n]*)*'""",
    re.DOTALL,
)
"""A comment or a string: imports that these tell of are none."""
_FOR_TYPE_CHECKERS: Final = re.compile(r"[ \t]*if[ \t(]+(?:\w+\.)?TYPE_CHECKING\b[ \t)]*:")


class UnitError(Exception):
    """Raised when a unit cannot be sent. The argument says why, and names a remedy; `path` is what has to change."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path} {why}")
        self.path = path


class Place(NamedTuple):
    """Where a unit is at the client."""

    name: str
    """The name of the module or package, as "company.tool"."""
    path: str
    """The package's directory, or the module's file; within `archive` if there is one."""
    is_package: bool
    archive: str = ""
    """The zip file that has it; empty for a directory."""


def included_path(place: Place) -> str:
    """Return what `Image(includes=)` has to name for the unit to be sent with all that it has."""
    path = place.archive or place.path
    for _ in range(0 if place.archive else place.name.count(".")):
        path = os.path.dirname(path)
    return path


class Stamp(NamedTuple):
    """What the file system tells of a file or a directory."""

    changed: int
    """The later one of its two times of change, in nanoseconds."""
    size: int
    inode: int


class _File(NamedTuple):
    """A file as it was read."""

    stamp: Stamp
    read_at: int
    """The time just before it was read, in nanoseconds."""
    digest: bytes
    is_program: bool
    """Whether its owner may execute it."""


class Unit:
    """A unit's content at one time. `files` and `_directories` change only in what is known of their stamps."""

    def __init__(self, place: Place) -> None:
        """Read it. Raise `UnitError`."""
        self.place = place
        self.files: dict[str, str] = {}
        """Its files: path relative to a directory of import → path at the client."""
        self.extensions: dict[str, str] = {}
        """Compiled modules, which are not sent: name → file."""
        self.left_out: dict[str, int] = {}
        """Data files that are not sent: relative path → bytes."""
        self.imports: frozenset[str] = frozenset()
        """The names that its sources may import, from anywhere."""
        self._read: dict[str, _File] = {}
        self._directories: dict[str, tuple[Stamp, int]] = {}
        """Its directories: path → stamp, and the time just before it was listed."""
        contents = self._read_archive() if place.archive else self._read_files()
        programs = {path for path, file in self._read.items() if file.is_program}
        files = [(name, contents[name], self.files[name] in programs) for name in sorted(contents)]
        raw = pickle.dumps((place.name, files), protocol=5)
        self.digest = hashlib.sha256(raw).hexdigest()[:32]
        """Names the content: equal units have equal digests."""
        self.packed = zlib.compress(raw, 1)
        self.imports = frozenset(_imports(place.name, contents))

    def change(self) -> str:
        """Return the path of a file or a directory that is not as it was read; empty if all are."""
        for path, (before, listed_at) in self._directories.items():
            if stamp(path) != before or before.changed > listed_at - FRESH_NANOS:
                change = self._listing_change(path)
                if change:
                    return change
        for path, file in self._read.items():
            if stamp(path) == file.stamp and file.stamp.changed <= file.read_at - FRESH_NANOS:
                continue
            try:
                again, _ = _read(path)
            except OSError:
                return path
            if (again.digest, again.is_program) != (file.digest, file.is_program):
                return path
            self._read[path] = again
        return ""

    # ------------------------------------------------------------------------------------------------ reading

    def _read_files(self) -> dict[str, bytes]:
        """Return the contents of all files as they are at one time, unless they change all the while."""
        for left in reversed(range(MAX_READS)):
            self._list()
            self._read, contents = {}, {}
            try:
                for relative, path in self.files.items():
                    self._read[path], contents[relative] = _read(path)
            except FileNotFoundError as error:
                # It was removed after its directory was listed, as editors do with files of a moment.
                if not left:
                    raise _unreadable(path, error) from error
            except OSError as error:
                raise _unreadable(path, error) from error
            else:
                if not left or not self.change():
                    break
        return contents

    def _list(self) -> None:
        """Find the files that are sent and the others. Raise `UnitError` if there are too many."""
        name, path, is_package, _ = self.place
        base = name.replace(".", "/")
        self.files, self.extensions, self.left_out, self._directories = {}, {}, {}, {}
        if not is_package:
            # A bare module's directory has other things, too: that has no part in it.
            self.files[f"{base}{os.path.splitext(path)[1]}"] = path
            return
        data: dict[str, int] = {}
        for count, (relative, file) in enumerate(self._walk(path, base, frozenset()), 1):
            if count > MAX_FILES:
                raise UnitError(
                    path,
                    f"has more than {MAX_FILES:,} files: keep data outside of the package, or send the directory with "
                    f"Image(includes=[{included_path(self.place)!r}])",
                )
            kind = self._kind(relative)
            if kind == "source":
                self.files[relative] = file
            elif kind == "data":
                with contextlib.suppress(OSError):  # removed since, or a broken link
                    data[relative] = os.stat(file).st_size
                    self.files[relative] = file
        self._bound(data)

    def _kind(self, relative: str) -> str:
        """Return whether a file is a "source", "data" or "compiled". Note compiled modules."""
        if relative.endswith(_SOURCES):
            return "source"
        for suffix in _EXTENSIONS:
            if relative.endswith(suffix):
                name = relative.removesuffix(suffix).replace("/", ".").removesuffix(".__init__")
                self.extensions.setdefault(name, relative)
                return "compiled"
        return "compiled" if _COMPILED.search(relative) else "data"

    def _bound(self, data: dict[str, int]) -> None:
        """Leave out data files that are too large, and the largest while all together are."""
        total = sum(data.values())
        for relative, size in sorted(data.items(), key=lambda item: (-item[1], item[0])):
            if size <= MAX_DATA_FILE and total <= MAX_DATA:
                break
            self.left_out[relative] = size
            del self.files[relative]
            total -= size

    def _walk(self, directory: str, relative: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, str]]:
        """Yield the files below a directory: relative path, path. `above` are the directories that lead here."""
        listed_at = time.time_ns()
        try:
            status = os.stat(directory)
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            if above and isinstance(error, FileNotFoundError):
                return  # removed since the directory above was listed
            raise _unreadable(directory, error) from error
        self._directories[directory] = _stamp_of(status), listed_at
        here = above | {(status.st_dev, status.st_ino)}
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            try:
                found = os.stat(entry.path)
            except OSError:
                continue  # removed since, or a link that leads nowhere
            if stat.S_ISREG(found.st_mode):
                yield f"{relative}/{entry.name}", entry.path
            elif stat.S_ISDIR(found.st_mode) and (found.st_dev, found.st_ino) not in here:  # else a link back
                yield from self._walk(entry.path, f"{relative}/{entry.name}", here)

    def _listing_change(self, directory: str) -> str:
        """Return `directory` if the unit has other files than it had; else note the present stamps."""
        before = self.files, self.extensions, self.left_out, self._directories
        try:
            self._list()
        except UnitError:
            self.files, self.extensions, self.left_out, self._directories = before
            return directory
        same = (self.files, self.extensions, self.left_out.keys()) == (before[0], before[1], before[2].keys())
        if not same:
            self.files, self.extensions, self.left_out, self._directories = before
        return "" if same else directory

    def _read_archive(self) -> dict[str, bytes]:
        name, path, is_package, archive = self.place
        base, contents = name.replace(".", "/"), {}
        data: dict[str, int] = {}
        try:
            self._read[archive], _ = _read(archive)
            with zipfile.ZipFile(archive) as opened:
                for info in opened.infolist():
                    inner = info.filename
                    if is_package and inner.startswith(f"{path}/") and not info.is_dir() and _is_shown(inner):
                        relative = base + inner[len(path) :]
                        kind = self._kind(relative)
                        if kind != "compiled":
                            self.files[relative] = f"{archive}{os.sep}{inner}"
                        if kind == "data":
                            data[relative] = info.file_size
                    elif not is_package and inner == path:
                        self.files[f"{base}{os.path.splitext(path)[1]}"] = f"{archive}{os.sep}{inner}"
                self._bound(data)
                for relative, file in self.files.items():
                    contents[relative] = opened.read(file[len(archive) + 1 :])
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UnitError(archive, f"cannot be read ({error}): mend it, or take it off sys.path") from error
        return contents


def _unreadable(path: str, error: OSError) -> UnitError:
    return UnitError(path, f"cannot be read ({error.strerror or error}): let this user read it, or remove it")


def _is_shown(path: str) -> bool:
    return not any(part.startswith(".") or part == "__pycache__" for part in path.split("/"))


def _stamp_of(status: os.stat_result) -> Stamp:
    return Stamp(max(status.st_mtime_ns, status.st_ctime_ns), status.st_size, status.st_ino)


def now() -> int:
    """Return the time in nanoseconds, as files have it."""
    return time.time_ns()


def stamp(path: str) -> Stamp | None:
    """Return what the file system tells of a file; None if there is none."""
    try:
        return _stamp_of(os.stat(path))
    except OSError:
        return None


def _read(path: str) -> tuple[_File, bytes]:
    """Return a file's content, and what is to be known of it. Raise `OSError`."""
    for _ in range(MAX_READS):
        read_at = time.time_ns()
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            content = file.read()
            after = _stamp_of(os.fstat(file.fileno()))
        if _stamp_of(status) == after:
            break
    # If it is still being written to, the next look finds a change.
    is_program = bool(status.st_mode & stat.S_IXUSR)
    return _File(_stamp_of(status), read_at, hashlib.sha256(content).digest(), is_program), content


# ------------------------------------------------------------------------------------------------ imports


def _imports(unit: str, contents: dict[str, bytes]) -> Iterator[str]:
    """Yield the names that sources may import and the unit itself does not have, found without parsing them."""
    for relative, content in contents.items():
        if relative.endswith(".py"):
            package = os.path.dirname(relative).replace("/", ".")
            text = content.decode(errors="ignore").replace("\\\n", " ")
            for name in _names(text):
                found = _absolute(name, package)
                if found and found != unit and not found.startswith(f"{unit}."):
                    yield found


def _names(text: str) -> Iterator[str]:
    for origin, tail, names in _IMPORT.findall(_statements(text)):
        if origin:
            yield origin
            separator = "" if origin.endswith(".") else "."
            yield from (f"{origin}{separator}{name}" for name in _first_words(tail.strip("()").splitlines()))
        else:
            yield from _first_words([names])
    yield from _IMPORT_BY_STRING.findall(text)


def _statements(text: str) -> str:
    """Return a source without its comments and strings, and without what is for type checkers only."""
    code = _NO_STATEMENT.sub("", text)
    if "TYPE_CHECKING" not in code:
        return code
    lines, skipped = [], None
    for line in code.splitlines():
        indent = len(line) - len(line.lstrip())
        if skipped is not None and (indent > skipped or not line.strip()):
            continue
        skipped = indent if _FOR_TYPE_CHECKERS.match(line) else None
        if skipped is None:
            lines.append(line)
    return "\n".join(lines)


def _first_words(lines: Iterable[str]) -> Iterator[str]:
    """Yield the names of "a, b as c", of each line up to its comment."""
    for line in lines:
        for part in line.partition("#")[0].split(","):
            match = _NAME.match(part.strip())
            if match is not None:
                yield match[0]


def _absolute(name: str, package: str) -> str:
    """Return the absolute name of an imported module; empty if there is none."""
    if not name.startswith("."):
        return name
    try:
        return importlib.util.resolve_name(name, package)
    except (ImportError, ValueError):
        return ""


def suffixes(name: str) -> list[str]:
    """Return the relative paths, without that of an extension, at which an import finds the module of this name."""
    base = name.replace(".", "/")
    endings = (*importlib.machinery.SOURCE_SUFFIXES, *importlib.machinery.BYTECODE_SUFFIXES)
    return [f"{base}{middle}{ending}" for middle in ("/__init__", "") for ending in endings]
