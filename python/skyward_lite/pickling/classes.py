"""Classes and cached functions that travel by value, as a script's own do, and keep their identity.

This holds for those that lead to nothing that a task may change (see alone.py). The others belong to the call with
which they are sent, share with it what they share at the client, and are made anew for each call. What comes back of
either kind is the client's.

Each has an id, given by the process that made it, and a digest of its definition: of its pickle and of those of the
classes that it refers to. An end that has built this definition before takes what it built then. So a class keeps, in a
worker, what its tasks have set on it, no running task sees its class change, and a class that has changed at the client
is a new class at the worker. What comes back to the process that made a class is the id alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pickle
import sys
import threading
import types
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from . import modules, script

MAX_KEPT: Final = 1024
"""Definitions that a process keeps built, and things of its own that it keeps for what comes back; the latest used."""
BUILD_SECONDS: Final = 60.0
"""Bound on waiting for another thread that builds a definition."""

Row = tuple[str, bytes, bytes]
"""A definition: id, digest and pickle."""
Parts = Callable[[Any, Any], Any]
"""Takes a class apart: see pickler.py."""
References = dict[str, tuple[Any, Parts]]
"""The classes that a definition refers to, by id."""


class Definition(NamedTuple):
    """What names a class, and the rows from which the far end builds it and the classes that it refers to."""

    id: str
    digest: bytes
    rows: tuple[Row, ...]


class _Latest:
    """At most `MAX_KEPT` values by key; those that were not asked for the longest are forgotten."""

    def __init__(self) -> None:
        self._values: dict[Any, Any] = {}
        self._moving = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def find(self, key: Any) -> Any:
        """Return the value, or None."""
        value = self._values.get(key)
        if value is not None and len(self._values) <= MAX_KEPT // 2:
            return value
        with self._moving:
            # Another thread may have been moving it.
            value = self._values.pop(key, None)
            if value is not None:
                self._values[key] = value
        return value

    def forget(self, key: Any) -> None:
        with self._moving:
            self._values.pop(key, None)

    def keep(self, key: Any, value: Any) -> None:
        with self._moving:
            self._values.pop(key, None)
            self._values[key] = value
            while len(self._values) > MAX_KEPT:
                del self._values[next(iter(self._values))]


_ids: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""The ids of what this process made and sent."""
_own = _Latest()
"""What this process made and sent, by id: kept for what comes back."""
_alive: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""The same, for as long as anything else keeps it."""
_built = _Latest()
"""What this process built from another one's definition, by (id, digest)."""
_versions = _Latest()
"""The digests of the last two definitions of an id that were built, by id."""
_foreign: weakref.WeakSet[Any] = weakref.WeakSet()
"""All that this process has built."""
_fresh: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""The class that was made last of each id, of those that are made for one call alone."""
_from_home: weakref.WeakKeyDictionary[Any, tuple[str, bytes]] = weakref.WeakKeyDictionary()
"""(id, digest) of each class that came from the process whose tasks this one runs. The digest of a class that was made
for a call alone is empty."""


class _Calls(threading.local):
    """What the calling thread has done since it was last asked."""

    made_fresh = False
    """It made classes for one call alone. Afterwards they are garbage in cycles, with all that they refer to."""


calls = _Calls()
_building = threading.RLock()


class _Group:
    """Classes that refer to one another, while the thread that holds the lock builds them."""

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self.rows = {row[0]: row for row in rows}
        self.begun: dict[str, Any] = {}
        """The classes that there are, by id, with or without their attributes: a definition may refer to itself."""

    def find(self, name: str) -> Any:
        """Return a class of the group, built as far as it can be now."""
        return own(name) or _built.find((name, self.rows[name][1])) or self.begun.get(name) or self.build(name)

    def build(self, name: str) -> Any:
        """Build a class; those that it refers to ask for themselves."""
        return pickle.loads(self.rows[name][2])


_group: _Group | None = None
"""The group that is being built."""


def from_home(thing: Any) -> tuple[str, bytes] | None:
    """Return (id, digest) of a class or a cached function that came from the process whose tasks this one runs."""
    return _from_home.get(thing)


def identify(thing: Any) -> str:
    """Return the id of a class or of a cached function that this process made."""
    known = _ids.get(thing)
    if known is None:
        known = _ids.setdefault(thing, uuid.uuid4().hex)
    if _own.find(known) is None:
        _own.keep(known, thing)
        _alive[known] = thing
    return known


def own(name: str) -> Any:
    """Return what this process made and sent by that id, or None."""
    return _own.find(name) or _alive.get(name)


class Definitions:
    """The definitions that are sent in one pickle, or in one call of `Parallel`, each made once.

    It keeps what it defines alive, so that what comes back finds it.
    """

    def __init__(self) -> None:
        self._pickles: dict[str, bytes] = {}
        self._references: dict[str, References] = {}
        self._rows: dict[str, Row] = {}
        self._kept: dict[str, tuple[Any, Definition]] = {}

    def define(self, thing: Any, parts: Parts, pickled: Callable[[Any, Parts], tuple[bytes, References]]) -> Definition:
        """Return the definition of a class, which `parts` takes apart.

        `pickled` returns the pickle of one class, in which those that it refers to stand by their ids alone, and these.
        """
        name = identify(thing)
        kept = self._kept.get(name)
        if kept is not None:
            return kept[1]
        group: References = {name: (thing, parts)}
        waiting = [name]
        while waiting:
            each = waiting.pop()
            if each not in self._pickles:
                self._pickles[each], self._references[each] = pickled(*group[each])
            for other, reference in self._references[each].items():
                if other not in group:
                    group[other] = reference
                    waiting.append(other)
        rows = tuple(self._row(each) for each in sorted(group))
        definition = Definition(name, self._rows[name][1], rows)
        self._kept[name] = thing, definition
        return definition

    def _row(self, name: str) -> Row:
        """Return the row of a class. Its digest covers all that it refers to, in however many steps."""
        row = self._rows.get(name)
        if row is None:
            reached = {name}
            waiting = [name]
            while waiting:
                new = self._references[waiting.pop()].keys() - reached
                reached |= new
                waiting += new
            digest = hashlib.blake2b(digest_size=16)
            for each in sorted(reached):
                digest.update(each.encode())
                digest.update(hashlib.blake2b(self._pickles[each], digest_size=16).digest())
            row = self._rows[name] = name, digest.digest(), self._pickles[name]
        return row


# ------------------------------------------------------------------------------------------------ at the far end


def rebuild(name: str, digest: bytes, rows: tuple[Row, ...] | None, home: bool) -> Any:
    """Return the class of that id: this process's own, the one that it built before, or one that it builds now.

    `home` says that the sender is the process whose tasks this one runs. `rows` is None where the sender knows that the
    class is known here. Raises `pickle.UnpicklingError` if it is not.
    """
    global _group
    known = own(name)
    if known is not None:
        return known
    known = _built.find((name, digest))
    if known is not None:
        # Another version may have been entered since.
        _enter(known, home)
        return known
    if rows is None:
        # In a worker, which looks whether what it sends home can be rebuilt.
        known = _fresh.get(name)
        if known is not None:
            return known
        raise pickle.UnpicklingError(
            "a class or a cached function that this process defined and sent is gone: keep a reference to it until its "
            "results are there"
        )
    with _lock():
        # Another thread may have built it meanwhile; and a definition may lead here while its group is being built.
        known = _built.find((name, digest))
        if known is not None:
            return known
        outer, _group = _group, _Group(rows)
        try:
            built = _group.build(name)
            # Only now: what is half built must be seen by no other thread.
            for each, thing in _group.begun.items():
                digest = _group.rows[each][1]
                _built.keep((each, digest), thing)
                *older, last = [old for old in _versions.find(each) or () if old != digest] or [digest]
                for old in older:
                    # A class that changes from task to task must not fill the memory.
                    _built.forget((each, old))
                _versions.keep(each, [last, digest])
                _came(thing, each, digest, home)
                _enter(thing, home)
            return built
        finally:
            _group = outer


def _came(thing: Any, name: str, digest: bytes, home: bool) -> None:
    """Note where a thing came from that was built here."""
    _foreign.add(thing)
    if home:
        _from_home[thing] = name, digest


def _enter(thing: Any, home: bool) -> None:
    """Enter the thing where tasks of this worker look its name up."""
    if home:
        modules.enter(thing)
        script.enter(thing)


def fresh(name: str, functions: list[Any], make: Callable[..., Any], *args: Any) -> Any:
    """Return what `make(*args)` makes, for no other call than the one that is being rebuilt.

    `functions` are the methods of a class, whose state is yet to come: name, function and the globals that it can have
    at once. Only the process whose tasks this one runs sends such a class.
    """
    made = make(*args)
    for key, function, known in functions:
        function.__globals__.update(known)
        type.__setattr__(made, key, function)
    _came(made, name, b"", home=True)
    _fresh[name] = made
    calls.made_fresh = True
    return made


def set_fresh(thing: Any, state: tuple[Callable[[Any, Any], None], Any, list[Any]]) -> None:
    """Set the attributes of what `fresh` returned, and the state of its functions."""
    setter, own_state, functions = state
    for set_function, function, inner in functions:
        set_function(function, inner)
    setter(thing, own_state)
    _enter(thing, home=True)


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    if not _building.acquire(timeout=BUILD_SECONDS):
        raise TimeoutError(f"another thread has been building a class for more than {BUILD_SECONDS:.0f} s")
    try:
        yield
    finally:
        _building.release()


def member(name: str) -> Any:
    """Return the class of that id, while the group to which it belongs is built."""
    assert _group is not None
    return _group.find(name)


def skeleton(name: str, make: Callable[..., Any], *args: Any) -> Any:
    """Return what `make(*args)` makes, to which its attributes are yet to be given; or what was begun before."""
    assert _group is not None
    begun = _group.begun.get(name)
    if begun is None:
        begun = make(*args)
        # Making it may have led here as well, by way of what its bases refer to.
        begun = _group.begun.setdefault(name, begun)
        _foreign.add(begun)
    return begun


def make_class(
    metaclass: Any, name: str, bases: tuple[Any, ...], namespace: dict[str, Any], abstract: frozenset[str] | None
) -> type:
    """Return a class without its functions, of which `abstract` are abstract.

    What `__init_subclass__` and metaclasses that travel by value did to the class, and to themselves, is in what was
    sent: they do not run again. Nor does an `__init_subclass__` that wants arguments, which are not known any more.
    """
    family = [each for base in bases for each in getattr(base, "__mro__", ())]
    hooked = next((each for each in family if "__init_subclass__" in vars(each) and each is not object), None)
    kind = next(each for each in metaclass.__mro__ if not _travels(each))

    def new() -> Any:
        if kind is metaclass:
            return types.new_class(name, bases, {"metaclass": metaclass}, lambda space: space.update(namespace))
        return kind.__new__(metaclass, name, types.resolve_bases(bases), dict(namespace))

    def bare() -> Any:
        return type.__new__(metaclass, name, bases, dict(namespace))

    ways: list[tuple[Callable[[], Any], bool]] = [
        (new, hooked is not None and _travels(hooked)),
        (new, True),
        (bare, True),
    ]
    for number, (way, silent) in enumerate(ways):
        try:
            with _silenced(hooked if silent else None):
                made = way()
            break
        except Exception:
            # A hook or a metaclass that misses what the class will have, or arguments.
            if number == len(ways) - 1:
                raise
    if abstract is not None:
        type.__setattr__(made, "__abstractmethods__", abstract)
    return made  # type: ignore[no-any-return]


def _travels(cls: type) -> bool:
    """Return whether a class travels by value: this process has built it, or sent it so."""
    return cls in _foreign or cls in _ids


@contextlib.contextmanager
def _silenced(hooked: type | None) -> Iterator[None]:
    """Replace a class's `__init_subclass__` by one that does nothing, until the block is left."""
    if hooked is None:
        yield
        return
    with _lock():
        hook = vars(hooked)["__init_subclass__"]
        type.__setattr__(hooked, "__init_subclass__", classmethod(lambda cls, **_: None))
        try:
            yield
        finally:
            type.__setattr__(hooked, "__init_subclass__", hook)


def set_class(cls: type, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Set the attributes of a class, and enter the names that its annotations use into the script."""
    attributes, names = state
    registered = attributes.pop("_abc_impl", ())
    for name, value in attributes.items():
        type.__setattr__(cls, name, value)
    if "__firstlineno__" in attributes:
        # Setting other attributes removes it (Python 3.13).
        type.__setattr__(cls, "__firstlineno__", attributes["__firstlineno__"])
    for subclass in registered:
        cls.register(subclass)  # type: ignore[attr-defined]
    script.enter_all(names)


def make_enum(
    metaclass: Any,
    name: str,
    bases: tuple[Any, ...],
    namespace: dict[str, Any],
    options: dict[str, Any],
    members: list[tuple[str, Any, tuple[Any, ...]]],
) -> Any:
    """Return an enumeration with its members, aliases and named composites.

    `members` has for each its name, its value and the arguments of its data type. The enumeration's own `__new__` and
    `__init__` do not run: with which arguments they ran is not known any more. What they set comes with the state.
    """
    values = {index: (value, data) for index, (_, value, data) in enumerate(members)}

    def new(cls: Any, index: Any, *_: Any) -> Any:
        # A data type that is a tuple gets one.
        value, data = values[index[0] if isinstance(index, tuple) else index]
        kind = cls._member_type_
        made = object.__new__(cls) if kind.__new__ is object.__new__ else kind.__new__(cls, *data)
        made._value_ = value
        return made

    space = metaclass.__prepare__(name, bases)
    for key, value in namespace.items():
        space[key] = value
    space["__new__"] = new
    space["__init__"] = lambda self, *_: None
    for index, (member_name, _, _) in enumerate(members):
        space[member_name] = index
    made = metaclass(name, bases, space, **options)
    for key in ("__new_member__", "__init__"):
        with contextlib.suppress(AttributeError):
            type.__delattr__(made, key)
    return made


def set_enum(cls: Any, state: tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]) -> None:
    """Set the attributes of an enumeration and of its members."""
    attributes, names, members = state
    set_class(cls, (attributes, names))
    for name, values in members.items():
        vars(cls._member_map_[name]).update(values)


def make_dispatcher(function: Any) -> Any:
    """Return a function as `functools.singledispatch` makes it, with nothing registered."""
    return functools.singledispatch(function)


def set_dispatcher(dispatcher: Any, state: tuple[dict[Any, Any], dict[str, Any]]) -> None:
    """Register what was registered, and give the function its attributes."""
    registered, attributes = state
    for kind, function in registered.items():
        dispatcher.register(kind, function)
    vars(dispatcher).update(attributes)
    script.enter(dispatcher)


def make_cached(function: Any, maxsize: int | None, typed: bool) -> Any:
    """Return a function with an empty cache, as `functools.lru_cache` makes it."""
    return functools.lru_cache(maxsize, typed)(function)


def set_cached(cached: Any, state: dict[str, Any]) -> None:
    """Set the attributes of a function with a cache."""
    vars(cached).update(state)


def named(module: str, name: str, make: Callable[..., Any], *args: Any) -> Any:
    """Return what the module has under that name, if it is of the kind that `make` makes; else make it.

    For what pickles by its name alone, as `typing.NewType` does.
    """
    known = getattr(sys.modules.get(module), name, None)
    if isinstance(make, type) and type(known) is make:
        return known
    made = make(*args)
    made.__module__ = module
    script.enter(made)
    return made
