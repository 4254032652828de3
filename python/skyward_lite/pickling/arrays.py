"""numpy's arrays beside the pickle, and memory maps by the name of their file.

A memory map (`np.memmap`, or an array that is a view of one) goes by name where both ends share files, so that what a
task writes into it is in the file. Elsewhere its data travels, unless it is writable: what a task wrote would be lost.

Instances of an ndarray's subclass travel as an array and what else the instance has. numpy's own way copies their data
into the pickle and forgets their attributes. A subclass that says itself how it is pickled is left to do so.
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

MIN_LOOK: Final = 1 << 20
"""Bytes from which on a copy-on-write map is worth the look at whether it has been written to."""
PAGE_ENTRY: Final = 8
"""Bytes of what /proc/self/pagemap says of a page."""
PAGE_OF_FILE: Final = 61
"""The bit of a page that is a file's. Above this one stand only two: that it is swapped out, and that it is there."""
PAGE_SWAPPED: Final = 62
MAX_ENTRIES: Final = 1 << 17
"""Pages that are looked at in one go."""
MEMMAP_FIELDS: Final = frozenset({"_mmap", "filename", "offset", "mode"})
"""Attributes of an `np.memmap` that are made anew with the map."""


def reducer(kind: type, route: Route) -> Callable[[Any], Any] | None:
    """Return the reducer for arrays of this type on this route; None for what is no array or pickles itself."""
    # A program that has arrays has imported numpy.
    np: Any = sys.modules.get("numpy")
    ndarray = getattr(np, "ndarray", None)
    if ndarray is None or not issubclass(kind, ndarray):
        return None
    if kind is ndarray:
        return functools.partial(_reduce_array, route)
    own = [np.ma.MaskedArray] if hasattr(np, "ma") else []
    for name in ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"):
        known = [getattr(base, name) for base in (ndarray, *own)]
        if getattr(kind, name) not in known:
            return None
    return functools.partial(_reduce_subclass, route)


def _reduce_array(route: Route, array: Any) -> Any:
    """Return how a plain array travels: by name if it is a view of a memory map, else numpy's way."""
    if array.base is None:
        return NotImplemented
    named = _named(route, array)
    return NotImplemented if named is None else (_mapped, (type(array), *named))


def _reduce_subclass(route: Route, array: Any) -> Any:
    """Return how an instance of a subclass travels: its data, by name or as a plain array, and its attributes."""
    np: Any = sys.modules["numpy"]
    if array.dtype.hasobject:
        # It may hold itself, which only numpy's way can tell.
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
    """Return attributes without those of a memory map.

    An array that is made from a map, as by slicing or by arithmetic, may have copied them: as its own, if its class is
    a user's, or into a dictionary, as masked arrays do.
    """
    if not isinstance(attributes, dict):
        return attributes
    return {
        name: _without_map(value) if type(value) is dict and _has_map(value) else value
        for name, value in attributes.items()
        if name not in MEMMAP_FIELDS or not _has_map(attributes)
    }


def _has_map(attributes: dict[Any, Any]) -> bool:
    return isinstance(attributes.get("_mmap"), mmap.mmap)


def _viewed(kind: type, array: Any) -> Any:
    """Return the plain, contiguous array as an instance of a subclass, on the same memory.

    As when numpy unpickles one, `__array_finalize__` is called with None: with an array it may expect one of its kind.
    """
    make: Any = type(array).__new__
    if array.nbytes == 0:
        return make(kind, array.shape, array.dtype)
    return make(kind, array.shape, array.dtype, array.reshape(-1, order="A").view("u1"), 0, array.strides)


def _set_state(array: Any, state: Any) -> None:
    """Set the attributes of an array that `object.__getstate__` named."""
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    if attributes:
        # Not by assignment: numpy's own subclasses do more than that when an attribute is set.
        array.__dict__.update(attributes)
    for name, value in (slots or {}).items():
        object.__setattr__(array, name, value)


# Memory maps -------------------------------------------------------------------------------------------------------


class _Named(NamedTuple):
    """An array as a part of a file. `offset` is that of its lowest byte, `first` its first element's from there."""

    path: str
    mode: str
    offset: int
    length: int
    first: int
    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    writable: bool


class _File(NamedTuple):
    """The file behind a map: where it is found, which it is, and where in it the map begins."""

    path: str
    identity: tuple[int, int]
    start: int
    """Address of the map's first byte."""
    offset: int
    """Place of that byte in the file."""


_files: weakref.WeakKeyDictionary[mmap.mmap, _File] = weakref.WeakKeyDictionary()
"""What was found out of each map. It holds for as long as the path leads to the same file."""


def _named(route: Route, array: Any) -> _Named | None:
    """Return how an array is found in a file; None if it is no memory map's, or travels as its data.

    Raises `PicklingError` for a task's writable map that the worker could not write to.
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
    """Return the file that a map shows; None if no path leads to it: it has been deleted, or never had a name."""
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
    # A system without /proc: what numpy noted.
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
    """Return whether a copy-on-write map is known to have been written to nowhere between these addresses.

    See proc_pid_pagemap(5): a page that is there, or swapped out, and is no file's has been copied.
    """
    if high - low < MIN_LOOK:
        return False
    np: Any = sys.modules["numpy"]
    first, end = low // mmap.PAGESIZE, -(-high // mmap.PAGESIZE)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(first * PAGE_ENTRY)
            while first < end:
                entries = np.frombuffer(pagemap.read(min(end - first, MAX_ENTRIES) * PAGE_ENTRY), "u8")
                if len(entries) == 0 or ((entries >> PAGE_SWAPPED != 0) & (entries >> PAGE_OF_FILE & 1 == 0)).any():
                    return False
                first += len(entries)
    except OSError:
        return False
    return True


def _maps() -> Iterator[tuple[int, int, int, str]]:
    """Yield this process's maps: start, end, offset in the file, and its path.

    See proc_pid_maps(5). Nothing on a system that has no such listing.
    """
    try:
        with open("/proc/self/maps", errors="surrogateescape") as lines:
            for line in lines:
                words = line.split(maxsplit=5)
                start, _, end = words[0].partition("-")
                path = words[5].rstrip("\n").replace("\\012", "\n") if len(words) > 5 else ""
                yield int(start, 16), int(end, 16), int(words[2], 16), path
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
    """Map an array's part of a file. Raises `OSError` or `ValueError` naming the file if it is not as it was."""
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
