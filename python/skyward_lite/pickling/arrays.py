"""How numpy's arrays are pickled: data beside the pickle, memory maps by the name of their file.

A memory map (`np.memmap`, or an array that is a view of one) goes by name where both ends share files, so that what a
task writes into it is in the file. To other machines its data travels. If the map is writable, that is an error: what
a task wrote into its copy would be lost.

An instance of an ndarray's subclass travels as a plain array and its attributes: numpy's own way copies the data into
the pickle and forgets the attributes. A subclass that defines how it is pickled is pickled so.
"""

from __future__ import annotations

import functools
import mmap
import os
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from .route import Route

MIN_CHECKED_BYTES: Final = 1 << 20
"""A copy-on-write map of fewer bytes travels as its data: to find out whether it was written to would take longer."""
PAGEMAP_ENTRY_BYTES: Final = 8
"""Bytes of the entry that /proc/self/pagemap has for a page: see proc_pid_pagemap(5)."""
FILE_PAGE_BIT: Final = 61
"""The bit of an entry which tells that the page is a file's."""
SWAPPED_BIT: Final = 62
"""The bit which tells that the page is swapped out. The next one, the highest, tells that it is in memory."""
MAX_PAGEMAP_ENTRIES: Final = 1 << 17
"""Entries that are read at once."""
MIN_COPIED_BYTES: Final = 16 * 1024
"""Bytes of an array with gaps from which on it travels beside the pickle, as an array without gaps does."""
NOT_EXPORTED: Final = "mMV"
"""Kinds of elements that arrays do not export as buffers, or not all of them: durations, dates and records."""
MEMMAP_ATTRIBUTES: Final = frozenset({"_mmap", "filename", "offset", "mode"})
"""Attributes of an `np.memmap` that the far end's map has of its own."""


def reducer(kind: type, route: Route) -> Callable[[Any], Any] | None:
    """Return the reducer for arrays of this type on this route; None for what is no array or pickles itself."""
    # A program that has arrays has imported numpy.
    np: Any = sys.modules.get("numpy")
    ndarray = getattr(np, "ndarray", None)
    if ndarray is None or not issubclass(kind, ndarray):
        return None
    own = [np.ma.MaskedArray] if hasattr(np, "ma") else []
    for name in ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"):
        known = [getattr(base, name) for base in (ndarray, *own)]
        if getattr(kind, name) not in known:
            return None
    return functools.partial(_reduce_subclass, route)


def is_plain(kind: type) -> bool:
    """Return whether this is the type of plain arrays."""
    return kind is getattr(sys.modules.get("numpy"), "ndarray", None)


def reduce_plain(route: Route, without_gaps: Callable[[Any], Any], array: Any) -> Any:
    """Return how a plain array travels: by name if it is a view of a memory map, else numpy's way, beside the pickle.

    numpy would copy the elements of an array of dates, or of one with gaps, into the pickle, and forget of these, and
    of an array of objects, that they are read-only. `without_gaps` returns a copy of an array without the gaps.
    """
    if array.base is not None:
        named = _named(route, array)
        if named is not None:
            return _mapped, (type(array), *named)
    flags, dtype = array.flags, array.dtype
    is_exported = dtype.kind not in NOT_EXPORTED
    if is_exported and flags.forc and not dtype.hasobject:
        return NotImplemented
    if dtype.hasobject or not (is_exported or array.nbytes):
        return NotImplemented if flags.writeable else (*array.__reduce__(), None, None, _set_read_only)
    if flags.writeable and array.nbytes < MIN_COPIED_BYTES:
        return NotImplemented
    if not flags.forc:
        array = without_gaps(array)
    if is_exported:
        return array.__reduce_ex__(5)
    return _typed, (array.reshape(-1, order="A").view("u1"), array.shape, dtype, array.strides)


def without_gaps(array: Any) -> Any:
    """Return a copy of an array without the gaps between its elements, read-only if the array is."""
    copy = array.copy("C")
    copy.flags.writeable = array.flags.writeable
    return copy


def _typed(elements: Any, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...]) -> Any:
    """Return an array on the memory of an array of bytes."""
    return type(elements)(shape, dtype, elements, 0, strides)


def _set_read_only(array: Any, state: Any) -> None:
    """Set the content of an array that was read-only."""
    array.__setstate__(state)
    array.flags.writeable = False


def _reduce_subclass(route: Route, array: Any) -> Any:
    """Return how an instance of a subclass travels: its data, by name or as a plain array, and its attributes."""
    np: Any = sys.modules["numpy"]
    if array.dtype.hasobject:
        # An array of objects may contain itself, and only numpy's own way can pickle that.
        return NotImplemented
    kind = type(array)
    state: Any = object.__getstate__(array)
    state = tuple(map(_without_map, state)) if isinstance(state, tuple) else _without_map(state)
    named = _named(route, array)
    if named is None:
        reduced: tuple[Any, ...] = (_viewed, (kind, np.ndarray.view(array, np.ndarray)))
    else:
        reduced = (_mapped, (kind, *named))
    return (*reduced, state, None, None, _set_state) if state else reduced


def _without_map(attributes: Any) -> Any:
    """Return attributes without those that belong to a memory map.

    An array that is made from a map, as by slicing or by arithmetic, may have copied the map's attributes: a user's
    class has them as its own, and a masked array has them in a dictionary.
    """
    if not isinstance(attributes, dict):
        return attributes
    return {
        name: _without_map(value) if type(value) is dict and _has_map(value) else value
        for name, value in attributes.items()
        if name not in MEMMAP_ATTRIBUTES or not _has_map(attributes)
    }


def _has_map(attributes: dict[Any, Any]) -> bool:
    return isinstance(attributes.get("_mmap"), mmap.mmap)


def _viewed(kind: type, array: Any) -> Any:
    """Return the plain, contiguous array as an instance of a subclass, on the same memory.

    `__array_finalize__` is called with None, as when numpy unpickles an instance. If it were called with the plain
    array, it might expect an instance of its own class.
    """
    make: Any = type(array).__new__
    if array.nbytes == 0:
        empty = make(kind, array.shape, array.dtype)
        empty.flags.writeable = array.flags.writeable
        return empty
    return make(kind, array.shape, array.dtype, array.reshape(-1, order="A").view("u1"), 0, array.strides)


def _set_state(array: Any, state: Any) -> None:
    """Set the attributes of an array that `object.__getstate__` named."""
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    if attributes:
        # Not by assignment: some of numpy's own subclasses act when an attribute is set.
        array.__dict__.update(attributes)
    for name, value in (slots or {}).items():
        object.__setattr__(array, name, value)


# ------------------------------------------------------------------------------------------------ memory maps


class _Named(NamedTuple):
    """An array as a part of a file."""

    path: str
    mode: str
    offset: int
    """The place of the array's lowest byte in the file."""
    length: int
    """The bytes from there to behind its highest one."""
    first: int
    """The bytes from there to its first element, which is not the lowest if a stride is negative."""
    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    writable: bool


class _File(NamedTuple):
    """The file that a map shows."""

    path: str
    identity: tuple[int, int]
    """Its device and inode: another file may get the same path later."""
    start: int
    """The address of the map's first byte."""
    offset: int
    """The place of that byte in the file."""


_files: weakref.WeakKeyDictionary[mmap.mmap, _File] = weakref.WeakKeyDictionary()
"""The file of each map that was looked up. An entry is valid while its path leads to the same file."""


def _named(route: Route, array: Any) -> _Named | None:
    """Return the part of a file that an array is; None if it is no memory map's, or is to travel as its data.

    Raises `PicklingError` for a writable map in a task whose worker could not write to the file.
    """
    root, memory = _root(array)
    if root is None or array.size == 0:
        return None
    writable = root.mode not in ("r", "c") and array.flags.writeable
    low, high = _bounds(array)
    file = _file(root, memory)
    if route.shares_files and file is not None and (root.mode != "c" or _is_unmodified(low, high)):
        mode = "r+" if root.mode == "w+" else root.mode
        first = array.__array_interface__["data"][0] - low
        offset = file.offset + low - file.start
        return _Named(
            *(file.path, mode, offset, high - low, first),
            *(array.dtype, array.shape, array.strides, bool(array.flags.writeable)),
        )
    if writable and not route.to_client:
        why = (
            "the workers are on machines that do not share files with this one"
            if not route.shares_files
            else "its file has been deleted or replaced, so that the workers cannot open it"
        )
        raise pickle.PicklingError(
            f"an array that is mapped from {_shown(root)} with mode={root.mode!r} cannot be sent with a task: {why}, "
            "and what a task writes into it would be lost. Let the task return the values instead; if tasks only read "
            "it, map it with mode='r' or send a copy, np.array(x)"
        )
    return None


def _root(array: Any) -> tuple[Any, Any]:
    """Return the `np.memmap` whose memory this array shows, and that memory; two Nones if there is none."""
    np: Any = sys.modules["numpy"]
    while True:
        base = array.base
        if isinstance(base, mmap.mmap):
            return (array, base) if isinstance(array, np.memmap) else (None, None)
        if not isinstance(base, np.ndarray):
            return None, None
        array = base


def _bounds(array: Any) -> tuple[int, int]:
    """Return the addresses of an array's lowest byte, and of the one after its highest."""
    low = high = array.__array_interface__["data"][0]
    for length, stride in zip(array.shape, array.strides, strict=True):
        reach = (length - 1) * stride
        low, high = low + min(reach, 0), high + max(reach, 0)
    return low, high + array.itemsize


def _file(root: Any, memory: Any) -> _File | None:
    """Return the file that a map shows; None if no path leads to it: it was deleted, or never had a name."""
    file = _files.get(memory)
    if file is None or _identity(file.path) != file.identity:
        file = _look_up(root)
        if file is None:
            _files.pop(memory, None)
        else:
            _files[memory] = file
    return file


def _look_up(root: Any) -> _File | None:
    address = root.__array_interface__["data"][0]
    for start, end, offset, path in _maps():
        if start <= address < end:
            identity = None if path.endswith(" (deleted)") else _identity(path)
            return None if identity is None else _File(path, identity, start, offset)
    # The system has no /proc. numpy has noted the file's name.
    path = "" if root.filename is None else os.fspath(root.filename)
    identity = _identity(path)
    return None if identity is None else _File(path, identity, _bounds(root)[0], root.offset)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _is_unmodified(low: int, high: int) -> bool:
    """Return whether it is known that nobody has written to a copy-on-write map between these addresses.

    A write copies the page. So a page that is in memory, or swapped out, and is no file's has been written to.
    """
    if high - low < MIN_CHECKED_BYTES:
        return False
    np: Any = sys.modules["numpy"]
    first, end = low // mmap.PAGESIZE, -(-high // mmap.PAGESIZE)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(first * PAGEMAP_ENTRY_BYTES)
            while first < end:
                entries = np.frombuffer(pagemap.read(min(end - first, MAX_PAGEMAP_ENTRIES) * PAGEMAP_ENTRY_BYTES), "u8")
                if len(entries) == 0 or ((entries >> SWAPPED_BIT != 0) & (entries >> FILE_PAGE_BIT & 1 == 0)).any():
                    return False
                first += len(entries)
    except OSError:
        return False
    return True


def _maps() -> Iterator[tuple[int, int, int, str]]:
    """Yield this process's maps: start, end, offset in the file, and its path: see proc_pid_maps(5).

    Yield nothing on a system without /proc.
    """
    try:
        with open("/proc/self/maps", errors="surrogateescape") as lines:
            for line in lines:
                fields = line.split(maxsplit=5)
                start, _, end = fields[0].partition("-")
                path = fields[5].rstrip("\n").replace("\\012", "\n") if len(fields) > 5 else ""
                yield int(start, 16), int(end, 16), int(fields[2], 16), path
    except FileNotFoundError:
        return


def _shown(root: Any) -> str:
    return "a file without a name" if root.filename is None else repr(os.fspath(root.filename))


def _mapped(
    kind: type,
    path: str,
    mode: str,
    offset: int,
    length: int,
    first: int,
    dtype: Any,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    writable: bool,
) -> Any:
    """Map the part of a file that an array is: see `_Named`.

    Raises `OSError` or `ValueError`, which names the file, if the file is gone or too short.
    """
    np: Any = sys.modules["numpy"]
    access = {"r": mmap.ACCESS_READ, "c": mmap.ACCESS_COPY}.get(mode, mmap.ACCESS_WRITE)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with open(path, "r+b" if access == mmap.ACCESS_WRITE else "rb") as file:
        try:
            memory = mmap.mmap(file.fileno(), offset + length - start, access=access, offset=start)
        except ValueError as error:
            raise ValueError(f"{path} cannot be mapped up to byte {offset + length:,}: {error}") from None
    array = np.ndarray.__new__(np.memmap, shape, dtype, memory, offset - start + first, strides)
    array._mmap, array.filename, array.offset, array.mode = memory, path, offset, mode
    if not writable and access != mmap.ACCESS_READ:
        array.flags.writeable = False
    return array if kind is np.memmap else array.view(kind)
