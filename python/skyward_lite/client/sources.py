"""The user's modules, as workers get them that do not see this process's files: generations of them, and answers.

A generation is one state of the modules. It has one content for each unit (units.py) from the moment when a call or a
worker first names the unit, together with the units that this one imports. A file that is edited afterwards makes a new
generation, whose tasks run in fresh workers.

A worker asks in lines of text, so that nothing of a node's is unpickled for it: the generation, the name of the module,
the digests of the units that the node has; or, in place of the last two, a digest and the bytes of that unit which the
node has. The answer is a pickled `Answer`.
"""

from __future__ import annotations

import collections
import importlib
import logging
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Iterable
from typing import Any, Final

from ..pickling.installed import EXTENSIONS, file_of, is_namespace
from ..served import Answer, Served
from . import units
from .locating import Located, Locator, remedy
from .units import Unit, UnitError

log = logging.getLogger("skyward_lite")

GENERATIONS: Final = 16
"""Generations that are kept, for workers that run tasks of earlier calls."""
MAX_CONTENT: Final = 12 << 20
"""Bytes of packed units in one answer; the core takes answers of up to 16 MiB."""
MAX_ABSENT: Final = 1_000
"""Names of a generation that are looked for again, if nothing local had them."""


class _Generation:
    """The modules in one state. Changes only with the lock of its `Sources`, and only by what it lacked so far."""

    def __init__(self, locator: Locator) -> None:
        self.locator = locator
        self.units: dict[str, Unit] = {}
        """By the unit's name."""
        self.refused: dict[str, str] = {}
        """Why a unit cannot be sent, by its name."""
        self.mendable: dict[str, units.Stamp | None] = {}
        """The files and directories because of which units cannot be sent, as they were then."""
        self.absent: set[str] = set()
        """Names that workers asked for, or that units import, and that led to no unit."""
        self.names: frozenset[str] | None = None
        """The names of all local modules that can be listed; None until a worker asks."""
        self.namespaces: set[str] = set()
        """Those of local packages without a file, as far as workers know of them."""
        self.stamps: dict[str, int] = {}
        """The directories in which modules may appear, and their times of change when that was last looked at."""


class Sources:
    """What the client of one pool sends of the user's modules. Any thread may call it.

    `includes` are the files and directories that `Image(includes=)` sends, `packages` the names of distributions that
    `Image(pip=)` installs on the nodes: neither is sent from here.
    """

    def __init__(self, includes: Iterable[str] = (), packages: Iterable[str] = ()) -> None:
        names = {os.path.basename(os.path.normpath(path)).partition(".")[0] for path in includes}
        self._image = frozenset(names), frozenset(packages)
        self._lock = threading.RLock()
        """Held for everything, so that each unit is read once, and for all that ask for it at the same time."""
        self._kept: collections.OrderedDict[int, _Generation] = collections.OrderedDict()
        self._logged: set[str] = set()
        """The units of which it was logged what is left out."""
        self.imports: set[str] = set()
        """The names of installed modules that the sources sent so far import, with what they import from them. Only
        grows."""
        self.change = ""
        """The file or the directory because of which `changed` last returned True."""
        self.new_generation(0)

    def new_generation(self, generation: int) -> None:
        """Begin a generation. Units that have not changed are not read again."""
        with self._lock:
            importlib.invalidate_caches()
            self._kept[generation] = _Generation(Locator(*self._image))
            while len(self._kept) > GENERATIONS:
                self._kept.popitem(last=False)

    def reason(self, name: str, module: Any) -> str:
        """Return why workers cannot import this module from what is sent, as this process has it; "" if they can.

        The module must not be an installed distribution's. Its unit is taken into the newest generation.
        """
        with self._lock:
            newest = self._newest()
            found = newest.locator.locate(name)
            if found.is_on_nodes:
                return ""
            if name.partition(".")[0] in sys.stdlib_module_names:
                return "workers would import the standard library's module of this name: rename the module"
            if found.directories:
                return "" if is_namespace(module) else _unlike(module)
            if found.place is None:
                return found.reason or _unlike(module)
            unit = self._take(newest, found)
            if unit is None:
                return newest.refused[found.place.name]
            return _difference(name, module, unit)

    def snapshot(self, generation: int, name: str) -> None:
        """Take the unit of this module, and those that it imports, into a generation, unless they are there.

        A generation that is not kept any more is left alone, as are names that are not local.
        """
        with self._lock:
            kept = self._kept.get(generation)
            if kept is not None:
                self._take_all(kept, name)

    def changed(self) -> bool:
        """Return whether the newest generation is not what a new one would be, as far as it was asked for."""
        with self._lock:
            newest = self._newest()
            self.change = next(filter(None, (unit.change() for unit in newest.units.values())), "")
            mended = (path for path, before in newest.mendable.items() if units.stamp(path) != before)
            self.change = self.change or next(mended, "") or self._moved(newest)
            return bool(self.change)

    def _moved(self, newest: _Generation) -> str:
        """Return the name of a module that an import finds elsewhere now, or only now; empty if there is none."""
        roots = {os.path.dirname(unit.place.archive or unit.place.path) for unit in newest.units.values()}
        stamps = {path: _time_of_change(path) for path in {*filter(_is_text, sys.path), *roots}}
        if stamps == newest.stamps or not (newest.units or newest.absent or newest.refused):
            return ""
        known = {**{name: unit.place for name, unit in newest.units.items()}, **dict.fromkeys(newest.absent)}
        importlib.invalidate_caches()
        locator = Locator(*self._image)
        for name, place in known.items():
            if locator.locate(name).place != place:
                return name
        # A change within one step of the clock leaves the time as it was: the next look does not trust such a time.
        newest.stamps = stamps if max(stamps.values()) < units.now() - units.FRESH_NANOS else {}
        return ""

    # ------------------------------------------------------------------------------------------------ answers

    def answer(self, request: bytes) -> bytes:
        """Return the answer to a worker's request. It raises nothing: an error is part of the answer."""
        try:
            answer = self._answer(request.decode().split("\n"))
        except Exception as error:
            answer = Answer(error=f"{type(error).__name__}: {error}")
            log.warning("a worker's request for a module failed: %s", traceback.format_exc())
        return pickle.dumps(answer, protocol=5)

    def _answer(self, lines: list[str]) -> Answer:
        generation, name, digests = lines
        with self._lock:
            kept = self._kept.get(int(generation))
            if kept is None:
                return Answer(
                    error=f"generation {int(generation)} of the client's modules is not kept any more: source files "
                    f"were edited in {GENERATIONS} later calls while this task ran. Run the task again"
                )
            digest, _, offset = name.partition(":")
            if offset:
                unit = next((unit for unit in kept.units.values() if unit.digest == digest), None)
                if unit is None:
                    return Answer(error=f"the client has no module of the digest {digest[:32]}")
                return Answer(contents=[_piece(unit, int(offset), MAX_CONTENT)])
            return self._describe(kept, name, frozenset(digests.split()))

    def _describe(self, kept: _Generation, name: str, there: frozenset[str]) -> Answer:
        """Return what is local, with the units that the asker needs now and the node lacks."""
        if kept.names is None:
            kept.names = frozenset(kept.locator.names())
            kept.namespaces.update(_parents(kept, kept.names))
        found = kept.locator.locate(name)
        self._take_all(kept, name)
        kept.namespaces.update(_parents(kept, [name, *kept.units]))
        is_absent = self._note_absent(kept, name)
        answer = Answer(
            names=kept.names | kept.units.keys() | kept.refused.keys(),
            namespaces=frozenset(kept.namespaces),
            units={each: _served(unit) for each, unit in kept.units.items()},
            refused={**kept.refused, **({name: found.reason} if found.reason else {})},
            absent=frozenset(kept.absent | ({name} if is_absent else set())),
        )
        room = MAX_CONTENT
        own = found.place.name if found.place is not None else ""
        for unit in sorted(kept.units.values(), key=lambda unit: unit.place.name != own):
            # Units that other calls named are sent along: they are likely to be asked for next.
            if unit.digest not in there and room > 0:
                answer.contents.append(_piece(unit, 0, room))
                room -= len(unit.packed)
        return answer

    # ------------------------------------------------------------------------------------------------ units

    def _newest(self) -> _Generation:
        return self._kept[next(reversed(self._kept))]

    def _take_all(self, kept: _Generation, name: str) -> None:
        """Take the unit of a module, and the units that it imports, into a generation."""
        seen: set[str] = set()
        left = [name]
        while left:
            found = kept.locator.locate(left.pop())
            if found.place is None or found.place.name in seen:
                continue
            seen.add(found.place.name)
            unit = self._take(kept, found)
            if unit is not None:
                left += sorted(unit.imports)
                self.imports.update(each for each in unit.imports if kept.locator.is_installed(each))
                for top in sorted({each.partition(".")[0] for each in unit.imports} - sys.stdlib_module_names):
                    # A worker that is told of it need not ask when it imports the unit.
                    self._note_absent(kept, top)

    @staticmethod
    def _note_absent(kept: _Generation, name: str) -> bool:
        """Note that no local module has a name; return False if one has it."""
        found = kept.locator.locate(name)
        if found.is_local or found.reason:
            return False
        if len(kept.absent) < MAX_ABSENT:
            kept.absent.add(name)
        return True

    def _take(self, kept: _Generation, found: Located) -> Unit | None:
        """Return the unit of a generation; None if it cannot be sent, for the reason in `refused`."""
        place = found.place
        assert place is not None
        if place.name in kept.units or place.name in kept.refused:
            return kept.units.get(place.name)
        earlier = (older.units.get(place.name) for older in reversed(self._kept.values()))
        unit = next((unit for unit in earlier if unit is not None and unit.place == place), None)
        try:
            if unit is None or unit.change():
                unit = Unit(place)
        except UnitError as error:
            kept.mendable[error.path] = units.stamp(error.path)
            kept.refused[place.name] = f"{place.name} cannot be sent: {error}"
            return None
        self._log(unit)
        kept.units[place.name] = unit
        return unit

    def _log(self, unit: Unit) -> None:
        """Log once what is left out of a unit, and what can be done about it."""
        if not unit.left_out or unit.place.name in self._logged:
            return
        self._logged.add(unit.place.name)
        shown = [f"{path} ({size:,} bytes)" for path, size in [*unit.left_out.items()][:5]]
        more = len(unit.left_out) - len(shown)
        log.warning(
            "package %s is sent to the nodes without %s%s: data files of up to %d MiB are sent, and %d MiB of one "
            "package. Send the whole package with Image(includes=[%r])",
            unit.place.name,
            ", ".join(shown),
            f" and {more} more" if more > 0 else "",
            units.MAX_DATA_FILE >> 20,
            units.MAX_DATA >> 20,
            units.included_path(unit.place),
        )


def _served(unit: Unit) -> Served:
    refused = {}
    if unit.extensions:
        end = remedy(unit.place.name, unit.place.path)
        for name, file in unit.extensions.items():
            if any(path in unit.files for path in units.suffixes(name)):
                continue  # the same module in Python
            refused[name] = f"{name} is compiled ({file}), and compiled modules are not sent{end}"
    return Served(unit.digest, len(unit.packed), refused, units.included_path(unit.place), unit.left_out)


def _piece(unit: Unit, offset: int, room: int) -> tuple[str, int, bytes]:
    return unit.digest, offset, unit.packed[offset : offset + room]


def _parents(kept: _Generation, names: Iterable[str]) -> Iterable[str]:
    """Return the namespace packages among these names and those above them."""
    for name in names:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            each = ".".join(parts[:count])
            if kept.locator.locate(each).directories:
                yield each


def _unlike(module: Any) -> str:
    """Return why a module is not found by its name."""
    where = file_of(module)
    if where is None:
        return (
            "workers cannot import it, as it was not loaded from a file that an import finds. Put the code into a file "
            "in a directory of sys.path"
        )
    return (
        f"an import does not find {where} by that name on sys.path. Put the directory that has it on sys.path and "
        "import it from there, or install it"
    )


def _difference(name: str, module: Any, unit: Unit) -> str:
    """Return why a module is not what workers import by its name from this unit; "" if it is."""
    file = file_of(module)
    if file is None:
        inside = f"{name.replace('.', '/')}/"
        is_part = is_namespace(module) and any(path.startswith(inside) for path in unit.files)
        return "" if is_part else _unlike(module)
    if file.endswith(EXTENSIONS):
        return f"compiled modules are not sent{remedy(name, file)}"
    for relative in units.suffixes(name):
        sent = unit.files.get(relative)
        if sent is not None:
            return "" if sent == file or _is_same_file(sent, file) else _unlike(module)
    return (
        f"{file} is not sent with {unit.place.name}: workers import only what is in the directory of a package, and "
        "hidden files are left out"
    )


def _is_same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _time_of_change(path: str) -> int:
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0
