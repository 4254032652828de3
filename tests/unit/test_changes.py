"""When a new generation of the user's modules begins, and what each generation has in a file."""

from __future__ import annotations

import importlib
import importlib.util
import json
import linecache
import os
import pickle
import sys
import sysconfig
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from skyward_lite.node import own_files
from skyward_lite.pickling import changes, installed, modules
from skyward_lite.pickling.changes import AS_READ, OTHER, Files
from skyward_lite.pickling.generations import Generations


@pytest.fixture
def own(tmp_path, monkeypatch) -> Iterator[Path]:
    """A directory of the user's on `sys.path`. What the test imports from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def write(path: Path, source: str, age: float = 0.0) -> Path:
    """Write a file, so many seconds ago."""
    path.write_text(source)
    if age:
        os.utime(path, (time.time() - age,) * 2)
    importlib.invalidate_caches()
    return path


def ask(files: Files, generation: int, path: Path) -> str:
    """Return what a worker of a generation has in a file, which it has just read."""
    content = path.read_bytes()
    answer = files.answer(changes.request(generation, path.stem, str(path), content))
    assert answer == AS_READ or answer.startswith(OTHER)
    return (content if answer == AS_READ else answer[len(OTHER) :]).decode()


def test_each_edit_is_one_generation(own, caplog):
    """Edits of equal size in quick succession, of which none changes the times that a clock could tell, are seen; each
    begins one generation, which the log tells.
    """
    path = write(own / "quick", "").with_suffix(".py")
    write(path, "K = 0")
    importlib.import_module("quick")
    generations = Generations(Files(), lambda: None)
    assert generations.begin() == 0
    stamp = path.stat().st_mtime_ns
    with caplog.at_level("INFO", logger="skyward_lite"):
        for number in range(1, 6):
            write(path, f"K = {number}")
            os.utime(path, ns=(stamp, stamp))
            assert [generations.begin(), generations.begin()] == [number] * 2
    told = [f"module quick ({path}) has changed: fresh workers import it as it is now, for calls from here on"] * 5
    assert caplog.messages == told


def test_what_counts_as_a_change(own, monkeypatch):
    """A file that is touched, or written again with the same content, has not changed. One that is gone, comes back,
    or is another file's under the same name, has.
    """
    path = write(own / "counted.py", "K = 1")
    module = importlib.import_module("counted")
    files = Files()
    generations = Generations(files, lambda: None)
    for touch in (
        lambda: os.utime(path, (1, 1)),
        lambda: write(path, "K = 1"),
        lambda: path.chmod(0o600),
        lambda: importlib.reload(module),
        lambda: sys.modules.update(counted=module),
    ):
        touch()
        assert generations.begin() == 0
    path.unlink()
    assert [generations.begin(), generations.begin()] == [1, 1]
    write(path, "K = 1")
    assert [generations.begin(), generations.begin()] == [2, 2]
    (own / "other").mkdir()
    write(own / "other/counted.py", "K = 1")
    monkeypatch.syspath_prepend(str(own / "other"))
    del sys.modules["counted"]
    assert generations.begin() == 2
    importlib.import_module("counted")
    assert [generations.begin(), generations.begin()] == [3, 3]
    # A module that was not there when the pool was opened is known from the next look on.
    later = write(own / "later.py", "K = 1")
    importlib.import_module("later")
    assert generations.begin() == 3
    write(later, "K = 2")
    assert generations.begin() == 4


def test_a_trusted_file_is_not_read_again(own, monkeypatch):
    """A file that is older than the clocks of file systems are coarse is looked at, and not read."""
    path = write(own / "old.py", "K = 1")
    importlib.import_module("old")
    monkeypatch.setattr(changes.time, "time_ns", lambda: path.stat().st_mtime_ns + 10 * changes.FRESH_NANOS)
    files = Files()
    assert not files.changed()
    monkeypatch.setattr(changes, "_read", lambda path: pytest.fail(f"{path} was read"))
    assert not files.changed()


class Slow:
    """Files to look at which takes as many seconds as a test says, by a clock that the test sets."""

    change = ""

    def __init__(self, monkeypatch) -> None:
        self.looks, self.now, self.seconds = 0, 0.0, 1.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def changed(self) -> bool:
        self.looks += 1
        self.now += self.seconds
        return False


def test_looks_of_single_tasks_take_a_small_share_of_the_time(monkeypatch):
    """After a look that took 1 s as the one before, single tasks have none for 18 s; a call of many tasks has one."""
    slow = Slow(monkeypatch)
    generations = Generations(slow, lambda: None)
    for seconds, looks in ((0.0, 1), (1.0, 2), (17.0, 2), (2.1, 3), (0.0, 3)):
        slow.now += seconds
        generations.begin(sparing=True)
        assert slow.looks == looks
    generations.begin()
    assert slow.looks == 4


@pytest.mark.parametrize("held_up", range(4))
def test_a_look_that_is_held_up_by_a_busy_machine_puts_off_no_other(monkeypatch, held_up):
    """Looks that take a short time go on when one of them, also the first, had to wait for a processor."""
    slow = Slow(monkeypatch)
    generations = Generations(slow, lambda: None)
    for number in range(6):
        slow.seconds = 1.0 if number == held_up else 0.0001
        slow.now += 0.001
        generations.begin(sparing=True)
        assert slow.looks == number + 1


def test_content_of_a_generation(own):
    """A worker gets a file's content of its generation, whenever it asks; also one that this process has not imported,
    from the moment when the first worker asked for it.
    """
    known, other = write(own / "known.py", "K = 0"), write(own / "unknown.py", "K = 0")
    importlib.import_module("known")
    files = Files()
    generations = Generations(files, lambda: None)
    write(known, "K = 1")
    assert ask(files, 0, known) == "K = 0"
    assert generations.begin() == 1
    assert (ask(files, 0, known), ask(files, 1, known)) == ("K = 0", "K = 1")
    assert ask(files, 1, other) == "K = 0"
    write(other, "K = 1")
    assert ask(files, 1, other) == "K = 0"
    assert generations.begin() == 2
    assert (ask(files, 0, other), ask(files, 1, other), ask(files, 2, other)) == ("K = 0", "K = 0", "K = 1")
    for number in range(2, 2 + 2 * changes.KEPT_GENERATIONS):
        write(known, f"K = {number}")
        generations.begin()
    assert ask(files, 0, known) == f"K = {generations.newest - changes.KEPT_GENERATIONS - 1}"
    known.unlink()
    assert files.answer(changes.request(0, "known", str(known), b"")).startswith(OTHER)


def test_decisions_follow_the_files(own):
    """A module whose file is gone goes by value from the next call on, and by name again when it is back."""
    path = write(own / "here.py", "def f(): pass")
    module = importlib.import_module("here")
    found = modules.Modules(True)
    assert not found.by_value("here", module.f)
    path.unlink()
    importlib.invalidate_caches()
    found.generations.begin()
    assert found.by_value("here", module.f)
    write(path, "def f(): pass")
    found.generations.begin()
    assert not found.by_value("here", module.f)


class Served:
    """What a client serves: any module but those that have a reason."""

    def __init__(self) -> None:
        self.change = ""
        self.taken: list[tuple[int, str]] = []

    def reason(self, name: str, module: object) -> str:
        return "too many files" if name == "vast" else ""

    def snapshot(self, generation: int, name: str) -> None:
        self.taken.append((generation, name))


def test_modules_that_are_served(own, monkeypatch):
    """For nodes without this machine's files, modules that are served go by name, each taken once into the generation
    of the call; others by value, with the reason.
    """
    for name in ("mine", "vast", "loaded"):
        write(own / f"{name}.py", "def f(): pass")
    mine, vast = importlib.import_module("mine"), importlib.import_module("vast")
    spec = importlib.util.spec_from_file_location("odd_name", own / "loaded.py")
    odd = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "odd_name", odd)
    spec.loader.exec_module(odd)
    served = Served()
    found = modules.Modules(False, sources=served)
    for generation in (0, 0, 2, 1):
        before = found.begin(generation)
        try:
            assert not any(modules.by_value(thing) for thing in (mine.f, mine.f, pytest.raises, os.path.join))
            assert modules.by_value(vast.f)
            assert modules.by_value(odd.f)
        finally:
            modules.end(before)
    assert served.taken == [(0, "mine"), (2, "mine"), (1, "mine")]
    assert found.reason("vast") == "too many files"
    assert "workers do not find" in found.reason("odd_name")
    # `ship_modules=False`
    kept = modules.Modules(False)
    assert kept.by_value("mine", mine.f)
    assert "Image(includes=[...])" in kept.reason("mine")
    included = modules.Modules(False, [str(own / "mine.py")], sources=served)
    assert not included.by_value("mine", mine.f)
    assert len(served.taken) == 3


def load(path: Path, content: str | None = None) -> types.ModuleType:
    """Load a module as a worker does whose generation has this content in the file; None for what the file has."""
    loader = own_files.OwnFileLoader(
        path.stem, str(path), lambda name, path, source: source if content is None else content.encode()
    )
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(path.stem, loader))
    loader.exec_module(module)
    return module


def test_worker_does_not_take_stale_bytecode(own, monkeypatch):
    """After an edit of the same size in the same second, Python's own loader runs the old bytecode; a worker's loader
    runs the file.
    """
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = write(own / "stale.py", "K = 1")
    stamp = path.stat().st_mtime_ns
    importlib.import_module("stale")
    write(path, "K = 2")
    os.utime(path, ns=(stamp, stamp))
    del sys.modules["stale"]
    assert importlib.import_module("stale").K == 1
    assert load(path).K == 2


def test_worker_writes_and_takes_bytecode(own, monkeypatch):
    """Bytecode is written for a file that is not fresh, and then taken; it is not written where the user says so, nor
    for another content than the file's.
    """
    path = write(own / "cached.py", "K = 1", age=100)
    monkeypatch.setattr(own_files, "is_fresh", lambda status: False)
    cached = Path(importlib.util.cache_from_source(str(path)))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert load(path).K == 1
    assert not cached.exists()
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert load(path, "K = 7").K == 7
    assert linecache.getline(str(path), 1) == "K = 7\n"
    assert not cached.exists()
    assert load(path).K == 1
    assert cached.exists()
    monkeypatch.setattr(own_files.OwnFileLoader, "source_to_code", lambda *_: pytest.fail("it was compiled again"))
    assert load(path).K == 1


def test_worker_asks_for_the_users_files_only(own):
    """A worker's finder asks the client for the user's modules, not for the library's and installed ones; in a forked
    child, or if the client does not answer, the file is taken as it is.
    """
    write(own / "asked.py", "K = 1")
    asked = []
    finder = own_files._Finder(lambda request, _: asked.append(request.decode()) or OTHER + b"K = 2", 5)
    for name, kind in (("asked", True), ("json", False), ("pytest", False), ("sys", False)):
        assert (type(finder.find_spec(name).loader) is own_files.OwnFileLoader) is kind
    spec = finder.find_spec("asked")
    assert finder.find_spec("nowhere_at_all") is None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.K == 2
    assert [request.split("\n")[:2] for request in asked] == [["5", "asked"]]
    finder._process = 0
    assert finder.content("asked", "x", b"as it is") == b"as it is"
    silent = own_files._Finder(lambda *_: None, 5)
    assert silent.content("asked", "x", b"as it is") == b"as it is"


def test_edit_of_a_file_that_no_worker_has(own):
    """While no task runs, an edit of a file that no worker has asked for begins no generation: workers that import it
    later have what it is then.
    """
    path = write(own / "unused.py", "K = 0")
    importlib.import_module("unused")
    idle = [True]
    files = Files(lambda: idle[0])
    generations = Generations(files, lambda: None)
    write(path, "K = 1")
    assert generations.begin() == 0
    idle[0] = False
    write(path, "K = 2")
    assert generations.begin() == 1
    idle[0] = True
    assert (ask(files, 0, path), ask(files, 1, path)) == ("K = 1", "K = 2")
    write(path, "K = 3")
    assert generations.begin() == 2


def test_extension_module_of_a_project_names_what_installs_it(own, monkeypatch):
    """An extension module of a project that is installed in place is an error with the requirement that installs it;
    with that requirement in the image it goes by name.
    """
    source = next(iter(Path(sysconfig.get_config_var("DESTSHARED")).glob("_heapq.*.so")), None)
    if source is None:
        pytest.skip("this Python has no file of an extension module in its library")
    project = own / "project"
    (project / "lonely").mkdir(parents=True)
    copy = project / "lonely" / source.name
    copy.write_bytes(source.read_bytes())
    info = own / "odd_name-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-name\nVersion: 1.5\n")
    (info / "direct_url.json").write_text(json.dumps({"url": project.as_uri(), "dir_info": {"editable": True}}))
    (info / "top_level.txt").write_text("lonely\n")
    installed.editable_projects.cache_clear()
    try:
        spec = importlib.util.spec_from_file_location("lonely._heapq", copy)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "lonely._heapq", module)
        spec.loader.exec_module(module)
        found = modules.Modules(False, sources=Served())
        message = r'lonely._heapq is an extension module.*name Image\(pip=\["odd-name==1.5"\]\)'
        with pytest.raises(pickle.PicklingError, match=message):
            found.by_value("lonely._heapq", module.heappush)
        assert not modules.Modules(False, packages=["odd-name"]).by_value("lonely._heapq", module.heappush)
    finally:
        installed.editable_projects.cache_clear()
    assert "Image(wheelhouse=)" in installed.requirement("nowhere", module)
