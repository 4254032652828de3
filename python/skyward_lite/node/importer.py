"""How a worker imports the user's modules, on a node that does not have them: it asks the client for them.

Two finders look for modules. One is first in line, for the names that the client has told are local there: so that no
package of the node's that has the same name is taken for them. The other one is last in line, and asks for names that
nothing on the node has: the client may have made the module since. It asks only if user code imports them, because
installed packages look for many modules that are optional.

What the client sends is written to the node (module_store.py), whose worker processes share it, and found there by
Python's own finder for directories. So `__file__`, tracebacks, `inspect` and `importlib.resources` have real files.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import pickle
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType, ModuleType
from typing import Any, Final

from .. import _core
from ..served import Answer, Served
from . import first_imports
from .home import MIN_WAIT_MS
from .module_store import Store, UnkeptError

Path = Sequence[str] | None

_OF_EVERY_NODE: Final = frozenset((*sys.stdlib_module_names, *sys.builtin_module_names, "skyward_lite", "cloudpickle"))
"""Top-level names for which no client is asked."""
_PACKAGE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_STDLIB: Final = os.path.dirname(os.__file__) + os.sep
_INSTALLED: Final = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_LOADERS: Final = (f"{_STDLIB}importlib{os.sep}", f"{_STDLIB}pickle.py", f"{os.sep}cloudpickle{os.sep}", "numpy_pickle")
"""Parts of the paths of code that imports for its caller."""


def install(core: _core.WorkerRuntime) -> None:
    """Install the finders by which this worker process imports the client's modules."""
    if not core.directory:
        sys.meta_path.append(Homeless(core.node))
        return
    importer = Importer(core, Store(f"{core.directory}/modules", core.generation))
    _Installed.importer = importer
    sys.meta_path.insert(0, First(importer))
    sys.meta_path.append(Last(importer))


def explain(error: BaseException) -> None:
    """Add a note to an exception that a task raised because a data file was not sent with its package."""
    importer = _Installed.importer
    if importer is not None and isinstance(error, FileNotFoundError) and isinstance(error.filename, str):
        note = importer.why_missing(error.filename)
        if note:
            error.add_note(note)


class _Installed:
    """The importer of this worker process, if it has one. Set once, by `install`."""

    importer: Importer | None = None


class First:
    """The finder that is first in line, for names that the client has told are local."""

    def __init__(self, importer: Importer) -> None:
        self._importer = importer

    def find_spec(self, name: str, path: Path = None, target: ModuleType | None = None) -> Any:
        """Return the spec of a module that the client has; None for other modules."""
        top = name.partition(".")[0]
        return None if top in _OF_EVERY_NODE else self._importer.find_local(name)


class Last:
    """The finder that is last in line, for names that nothing on the node has."""

    def __init__(self, importer: Importer) -> None:
        self._importer = importer

    def find_spec(self, name: str, path: Path = None, target: ModuleType | None = None) -> Any:
        """Return the spec of a module that the client has, if it turns out to have it."""
        top, _, rest = name.partition(".")
        if top in _OF_EVERY_NODE or (rest and _has_file(name.rpartition(".")[0])):
            return None
        return self._importer.find_new(name, path)


class Homeless:
    """The finder that is last in line on a node that has no directory for the client's modules."""

    def __init__(self, node: str) -> None:
        self._node = node

    def find_spec(self, name: str, path: Path = None, target: ModuleType | None = None) -> None:
        """Raise `ModuleNotFoundError` for what user code imports."""
        top, _, rest = name.partition(".")
        if not rest and top not in _OF_EVERY_NODE and _is_for_user_code(sys._getframe(1)):
            raise ModuleNotFoundError(
                f"No module named {name!r} on node {self._node}, which has no directory to keep the client's modules "
                "in: set TMPDIR there to a directory of this user's own",
                name=name,
            )


class Importer:
    """What this process knows of the client's modules, in the generation of the process."""

    def __init__(self, core: _core.WorkerRuntime, store: Store) -> None:
        self._core = core
        self._store = store
        self._process = os.getpid()
        self._lock = threading.RLock()
        """Held by the thread that asks the client."""
        self._told = Answer()
        """What the client has told so far. Replaced as a whole, by a thread that holds the lock."""
        self._is_told = False
        """Whether the client has told anything."""

    def find_local(self, name: str) -> Any:
        """Return the spec of a module that the client has told is local; None for others. Raise `ImportError`."""
        with self._explaining(name):
            return self._find_local(name)

    def _find_local(self, name: str) -> Any:
        if not self._is_told:
            self._read()
            if not self._is_told:
                self._ask(name, is_first=True)
        spec = self._find(name)
        told = self._told
        if spec is None and name in told.names and not self._is_known(name):
            self._ask(name)
            spec = self._find(name)
        return spec

    def find_new(self, name: str, path: Path) -> Any:
        """Return the spec of a module that the client has not told of, if it has it; else None. Raise `ImportError`."""
        if self._is_known(name) or not _is_for_user_code(sys._getframe(2)):
            return None
        with self._explaining(name):
            self._ask(name)
            spec = self._find(name)
        # A package without a file is found in the directory that was just made for it.
        return spec or importlib.machinery.PathFinder.find_spec(name, path)

    def why_missing(self, path: str) -> str:
        """Return why a data file is not here; "" if it is no file of the user's packages."""
        path = os.path.abspath(path)
        for name, unit in self._told.units.items():
            root = self._store.root(unit.digest) + os.sep
            size = unit.left_out.get(path.removeprefix(root)) if path.startswith(root) else None
            if size is not None:
                return (
                    f"this file was not sent with package {name}: it has {size:,} bytes, and large data files are left "
                    f"out. Send the whole package with Image(includes=[{unit.path!r}])"
                )
        return ""

    # ------------------------------------------------------------------------------------------------ what is known

    def _find(self, name: str) -> Any:
        """Find a module among what the client has told. Raise `ImportError` for one that cannot be sent."""
        told = self._told
        unit = told.units.get(name)
        if unit is not None:
            root = self._root(name, unit)
            return importlib.machinery.PathFinder.find_spec(name, ["/".join((root, *name.split(".")[:-1]))])
        if name in told.namespaces:
            _search(self._store.make_namespace(name))
            return None
        owner = self._owner(name)
        why = told.refused.get(name, "") or (owner.refused.get(name, "") if owner is not None else "")
        if why:
            raise ImportError(f"node {self._core.node} cannot import the client's module {name}: {why}", name=name)
        return None

    def _is_known(self, name: str) -> bool:
        """Return whether the client has told what becomes of this name."""
        told = self._told
        known = name in told.units or name in told.namespaces or name in told.refused or name in told.absent
        return known or self._owner(name) is not None

    def _owner(self, name: str) -> Served | None:
        """Return the unit that has all modules below a package, if this name is of one."""
        parent = name.rpartition(".")[0]
        while parent:
            unit = self._told.units.get(parent)
            if unit is not None:
                return unit
            parent = parent.rpartition(".")[0]
        return None

    def _root(self, name: str, unit: Served) -> str:
        """Return the directory of import that has a unit, which is fetched if it is not here."""
        if not self._store.has(unit.digest):
            with self._alone(name):
                packed = b""
                while not self._store.has(unit.digest):
                    piece = self._request(name, f"{unit.digest}:{len(packed)}").contents[0][2]
                    packed += piece
                    if len(packed) >= unit.size or not piece:
                        self._store.install(unit.digest, packed)
        root = self._store.root(unit.digest)
        _search(root)
        return root

    # ------------------------------------------------------------------------------------------------ asking

    def _ask(self, name: str, is_first: bool = False) -> None:
        """Ask the client for a module, unless another thread or process has done so. Raise `ImportError`.

        `is_first`: any answer will do, because any answer tells which names are local.
        """
        if os.getpid() != self._process:
            self._read()
            if not (is_first or self._is_known(name)):
                raise ImportError(self._no_child(name), name=name)
            return
        with self._alone(name):
            self._read()
            if self._is_told and (is_first or self._is_known(name)):
                return
            answer = self._request(name, name, " ".join(self._store.digests()))
            for digest, offset, content in answer.contents:
                served = next((unit for unit in answer.units.values() if unit.digest == digest), None)
                if served is not None and offset == 0 and len(content) == served.size:
                    self._store.install(digest, content)
            answer.contents = []
            answer.refused = {**self._told.refused, **answer.refused}
            answer.absent |= self._told.absent
            self._learn(answer)
            self._store.write(answer)

    def _read(self) -> None:
        """Take over what other processes of this node were told."""
        told = self._store.read()
        if told is not None:
            self._learn(told)

    def _learn(self, told: Answer) -> None:
        self._told = told
        self._is_told = True
        for unit in told.units.values():
            if self._store.has(unit.digest):
                _search(self._store.root(unit.digest))

    def _request(self, name: str, *lines: str) -> Answer:
        """Send the client a request, and return its answer. Raise `ImportError` if there is none."""
        core = self._core
        wait_ms = self._wait_ms()
        text = "\n".join((str(core.generation), *lines, *[""] * (2 - len(lines))))
        try:
            pickled = core.request(text.encode(), wait_ms)
        except _core.CoreError as error:
            why = str(error)
        else:
            why = f"no answer came within {wait_ms / 1000:.0f} s"
            if pickled is not None:
                answer: Answer = pickle.loads(pickled)
                if not answer.error:
                    return answer
                why = answer.error
        raise ImportError(f"node {core.node} cannot ask the client for module {name}: {why}", name=name)

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Keep other threads, and other processes of this node, from asking. Raise `ImportError` in a forked child.

        The time does not count against the task's limit.
        """
        if os.getpid() != self._process:
            # The thread that held the lock when the process was forked is not there.
            raise ImportError(self._no_child(name), name=name)
        with first_imports.untimed(), self._lock, self._store.locked(self._wait_ms() / 1000):
            yield

    @contextlib.contextmanager
    def _explaining(self, name: str) -> Iterator[None]:
        """Raise `ImportError` if a file of the node's directory cannot be written or read."""
        try:
            yield
        except UnkeptError as error:
            where = f"node {self._core.node} cannot keep the client's module {name}"
            raise ImportError(f"{where} in {error}", name=name) from error

    def _no_child(self, name: str) -> str:
        return (
            f"node {self._core.node}: a process that a task forked cannot ask the client for module {name}: import it "
            "in the task before the process is forked"
        )

    def _wait_ms(self) -> int:
        return max(MIN_WAIT_MS, self._core.lease_ms)


def _search(root: str) -> None:
    """Append a directory to those that imports search, also in processes that tasks start, which inherit `sys.path`."""
    if root not in sys.path:
        sys.path.append(root)


def _has_file(name: str) -> bool:
    """Return whether a package was loaded from a file: other places than its own have no modules of it."""
    return getattr(sys.modules.get(name), "__file__", None) is not None


def _is_for_user_code(frame: FrameType | None) -> bool:
    """Return whether an import is for the user's code, or for a call that is being rebuilt."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE) and file != __file__:
            return True
        if not (file.startswith("<frozen ") or file == __file__ or any(part in file for part in _LOADERS)):
            return not (file.startswith(_STDLIB) or any(part in file for part in _INSTALLED))
        frame = frame.f_back
    return True
