"""Classes and cached functions that travel by value, as a script's own do, and keep their identity.

Each of them has an id, made by the process that defined it, and a digest of its definition: of its own pickle and the
pickles of the classes that it refers to. Who has built a definition once does not build it again. For example, a task
gets an instance of the script's class `Point`, and so does the next task on the same worker:

- Both tasks see one class `Point`. What the first task has set on the class, the second one finds there.
- If the client changes `Point` in between, the digest is another one, so the second task gets a new class. The class
  does not change under a task that is running.
- A worker that returns a `Point` sends the id and the digest alone. The client has the class.

This holds for classes that refer to nothing that a task may change (alone.py). Any other class belongs to the call with
which it is sent. It shares with that call what it shares with it at the client, and is made anew for each call (`fresh`
below). When it comes back, the client takes its own class for it as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from . import script, stand_ins

MAX_REMEMBERED: Final = 1024
"""Classes and cached functions that a process remembers: so many that it built, and so many of its own that it sent."""
BUILD_SECONDS: Final = 60.0
"""Bound on waiting for another thread that builds a definition."""

Row = tuple[str, bytes, bytes]
"""A definition: id, digest and pickle."""
Parts = Callable[[Any, Any], Any]
"""Takes a class apart for a pickler: see parts.py."""
References = dict[str, tuple[Any, Parts]]
"""The classes that a definition refers to, by id."""


class Definition(NamedTuple):
    """A class's id and digest, and the rows from which the far end builds it and the classes that it refers to."""

    id: str
    digest: bytes
    rows: tuple[Row, ...]


class RecentlyUsed:
    """At most `most` values by key. The least recently used ones are forgotten."""

    def __init__(self, most: int = MAX_REMEMBERED) -> None:
        self._most = most
        self._values: dict[Any, Any] = {}
        """The most recently used value is the last, from the moment when half of the places are taken."""
        self._moving = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def find(self, key: Any) -> Any:
        """Return the value, or None."""
        value = self._values.get(key)
        if value is not None and len(self._values) <= self._most // 2:
            return value
        with self._moving:
            # Asked again: another thread may just have been moving the value.
            value = self._values.pop(key, None)
            if value is not None:
                self._values[key] = value
        return value

    def forget(self, key: Any) -> None:
        with self._moving:
            self._values.pop(key, None)

    def remember(self, key: Any, value: Any) -> None:
        with self._moving:
            self._values.pop(key, None)
            self._values[key] = value
            while len(self._values) > self._most:
                del self._values[next(iter(self._values))]


# What "thing" means below: a class or a cached function.

_ids: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""The ids of the things that this process defined and sent."""
_own = RecentlyUsed()
"""The things that this process defined and sent, by id: results refer to them so."""
_alive: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""The same, for as long as something else keeps them."""
_built = RecentlyUsed()
"""The things that this process built from another one's definition, by (id, digest)."""
_versions = RecentlyUsed()
"""The digests of the last two definitions of an id that this process built, by id."""
_foreign: weakref.WeakSet[Any] = weakref.WeakSet()
"""All things that this process built."""
_fresh: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""Of the things that are made for one call alone, the last of each id."""
_from_home: weakref.WeakKeyDictionary[Any, tuple[str, bytes]] = weakref.WeakKeyDictionary()
"""(id, digest) of each thing that came from the process whose tasks this one runs. The digest of a thing that was made
for one call alone is empty."""


class _ThreadState(threading.local):
    """What the calling thread has done since the task loop last asked."""

    made_fresh = False
    """Whether it made classes for one call alone. After the call they are garbage in cycles, with all that they refer
    to."""


thread_state = _ThreadState()
_building = threading.RLock()
"""Held by the thread that builds a definition, or that makes a class."""


class _Group:
    """The classes of one definition, which refer to one another, while the thread that holds the lock builds them."""

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self.rows = {row[0]: row for row in rows}
        self.begun: dict[str, Any] = {}
        """The classes that exist by now, by id, with or without their attributes: a definition may refer to itself."""

    def find(self, ident: str) -> Any:
        """Return a class of the group, as far as it can be built by now."""
        return own(ident) or _built.find((ident, self.rows[ident][1])) or self.begun.get(ident) or self.build(ident)

    def build(self, ident: str) -> Any:
        """Build a class. Unpickling it leads to `member` for the classes that it refers to."""
        return pickle.loads(self.rows[ident][2])


_group: _Group | None = None
"""The group that is being built."""


def from_home(thing: Any) -> tuple[str, bytes] | None:
    """Return (id, digest) of a class or a cached function that came from the process whose tasks this one runs."""
    return _from_home.get(thing)


def travels(cls: type) -> bool:
    """Return whether a class travels by value: this process has built it, or sent it so."""
    return cls in _foreign or cls in _ids


def identify(thing: Any) -> str:
    """Return the id of a class or of a cached function that this process defined."""
    known = _ids.get(thing)
    if known is None:
        known = _ids.setdefault(thing, uuid.uuid4().hex)
    if _own.find(known) is None:
        _own.remember(known, thing)
        _alive[known] = thing
    return known


def own(ident: str) -> Any:
    """Return the thing of that id that this process defined and sent, or None."""
    return _own.find(ident) or _alive.get(ident)


class Definitions:
    """The definitions that are sent in one pickle, or in one call of `Parallel`, each made once.

    It keeps alive the things that it defines, so that results which refer to them find them.
    """

    def __init__(self) -> None:
        self._pickles: dict[str, bytes] = {}
        self._references: dict[str, References] = {}
        self._rows: dict[str, Row] = {}
        self._made: dict[str, tuple[Any, Definition]] = {}

    def define(self, thing: Any, parts: Parts, pickled: Callable[[Any, Parts], tuple[bytes, References]]) -> Definition:
        """Return the definition of a class, which `parts` takes apart.

        `pickled` returns the pickle of one class, in which the classes that it refers to stand by their ids alone,
        together with those classes.
        """
        ident = identify(thing)
        made = self._made.get(ident)
        if made is not None:
            return made[1]
        group: References = {ident: (thing, parts)}
        waiting = [ident]
        while waiting:
            each = waiting.pop()
            if each not in self._pickles:
                self._pickles[each], self._references[each] = pickled(*group[each])
            for other, reference in self._references[each].items():
                if other not in group:
                    group[other] = reference
                    waiting.append(other)
        rows = tuple(self._row(each) for each in sorted(group))
        definition = Definition(ident, self._rows[ident][1], rows)
        self._made[ident] = thing, definition
        return definition

    def _row(self, ident: str) -> Row:
        """Return the row of a class. Its digest covers all classes that it refers to, in however many steps."""
        row = self._rows.get(ident)
        if row is None:
            reached = {ident}
            waiting = [ident]
            while waiting:
                new = self._references[waiting.pop()].keys() - reached
                reached |= new
                waiting += new
            digest = hashlib.blake2b(digest_size=16)
            for each in sorted(reached):
                digest.update(each.encode())
                digest.update(hashlib.blake2b(self._pickles[each], digest_size=16).digest())
            row = self._rows[ident] = ident, digest.digest(), self._pickles[ident]
        return row


# ------------------------------------------------------------------------------------------------ at the far end


def rebuild(ident: str, digest: bytes, rows: tuple[Row, ...] | None, home: bool) -> Any:
    """Return the class of that id: this process's own, the one that it built before, or one that it builds now.

    `home` tells whether the sender is the process whose tasks this one runs. `rows` is None where the sender knows that
    this process has the class. Raises `pickle.UnpicklingError` if it is gone.
    """
    known = own(ident)
    if known is not None:
        return known
    known = _built.find((ident, digest))
    if known is not None:
        # Entered again: in between, another version of the class may have been entered under its name.
        _enter(known, home)
        return known
    if rows is None:
        # A worker may have sent it: it rebuilds what it is going to send home, to see whether that is possible.
        known = _fresh.get(ident)
        if known is not None:
            return known
        raise pickle.UnpicklingError(
            "a class or a cached function that this process defined and sent is gone: keep a reference to it until its "
            "results are there"
        )
    with building_lock():
        # Asked again: another thread may have built it meanwhile; and unpickling a definition may lead here, to a class
        # of the group that is being built.
        known = _built.find((ident, digest))
        return known if known is not None else _build(ident, rows, home)


def _build(ident: str, rows: tuple[Row, ...], home: bool) -> Any:
    """Build a class, and those that it refers to."""
    global _group
    outer, _group = _group, _Group(rows)
    try:
        built = _group.build(ident)
        # Only now may other threads see the classes: none is half built any more.
        for each, thing in _group.begun.items():
            digest = _group.rows[each][1]
            _built.remember((each, digest), thing)
            *older, last = [old for old in _versions.find(each) or () if old != digest] or [digest]
            for old in older:
                # Two versions are enough: a class that changes from task to task must not fill the memory.
                _built.forget((each, old))
            _versions.remember(each, [last, digest])
            _note_origin(thing, each, digest, home)
            _enter(thing, home)
        return built
    finally:
        _group = outer


def member(ident: str) -> Any:
    """Return the class of that id, while the group to which it belongs is built."""
    assert _group is not None
    return _group.find(ident)


def skeleton(ident: str, make: Callable[..., Any], *args: Any) -> Any:
    """Return what `make(*args)` makes, without its attributes; or the one that was begun before."""
    assert _group is not None
    begun = _group.begun.get(ident)
    if begun is None:
        begun = make(*args)
        # Making it may have led here, too: its bases may refer to it.
        begun = _group.begun.setdefault(ident, begun)
        _foreign.add(begun)
    return begun


def fresh(ident: str, functions: list[Any], make: Callable[..., Any], *args: Any) -> Any:
    """Return what `make(*args)` makes, for the call alone that is being rebuilt.

    `functions` are the methods of a class, whose state follows: name, function, and those of its globals that it can
    have at once. Only the process whose tasks this one runs sends such a class.
    """
    made = make(*args)
    for key, function, known in functions:
        function.__globals__.update(known)
        type.__setattr__(made, key, function)
    _note_origin(made, ident, b"", home=True)
    _fresh[ident] = made
    thread_state.made_fresh = True
    return made


def set_fresh(thing: Any, state: tuple[Callable[[Any, Any], None], Any, list[Any]]) -> None:
    """Set the attributes of what `fresh` returned, and the state of its functions."""
    setter, own_state, functions = state
    for set_function, function, inner in functions:
        set_function(function, inner)
    setter(thing, own_state)
    _enter(thing, home=True)


def _note_origin(thing: Any, ident: str, digest: bytes, home: bool) -> None:
    """Note that this process built a thing, and from whose definition."""
    _foreign.add(thing)
    if home:
        _from_home[thing] = ident, digest


def _enter(thing: Any, home: bool) -> None:
    """Enter a thing where tasks of this worker look its name up."""
    if home:
        stand_ins.enter(thing)
        script.enter(thing)


@contextlib.contextmanager
def building_lock() -> Iterator[None]:
    """Keep other threads from building and making classes, until the block is left."""
    if not _building.acquire(timeout=BUILD_SECONDS):
        raise TimeoutError(f"another thread has been building a class for more than {BUILD_SECONDS:.0f} s")
    try:
        yield
    finally:
        _building.release()
