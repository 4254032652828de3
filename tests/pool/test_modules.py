"""Modules that only the client can find, or that open pools or call Parallel when they are imported.

Modules that change are in test_edits.py.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import sysconfig
import textwrap
import types
import zipfile
from pathlib import Path

import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from lab import Lab
from skyward_lite import nesting
from skyward_lite.client.tasks import Tasks
from skyward_lite.pickling import modules, stand_ins
from skyward_lite.pickling.installed import editable_projects

SOURCE = """
    import threading

    K = 7

    class Cut:
        made = 0

        def __init__(self, x):
            self.x = x

        def doubled(self):
            return Cut(helper(self.x))

    class Finer(Cut):
        pass

    def helper(x):
        return 2 * x

    def f(x):
        return helper(x) + K

    def cut(x):
        return Finer(x).doubled()

    def where():
        return __name__

    def locked(x):
        with lock:
            return x

    lock = threading.Lock()
"""


@pytest.fixture(params=["thread", "process"])
def pool(request):
    """A pool for one test, as a pool remembers modules."""
    with sky.pool(worker=sky.Worker(concurrency=2, executor=request.param)) as opened:
        yield opened


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a module into a directory; modules that the test imports are forgotten afterwards."""
    before = set(sys.modules)

    def write(name: str, source: str = SOURCE, directory: Path = tmp_path) -> Path:
        path = directory / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return path

    yield write
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or str(tmp_path)).startswith(str(tmp_path)):
            del sys.modules[name]


def load(name: str, path: Path) -> types.ModuleType:
    """Load a module from its file, as programs with plugins do."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def check(module: types.ModuleType) -> None:
    """Check that functions, classes, instances and methods of a module work in tasks as they do here."""
    assert Parallel(n_jobs=-1)(delayed(module.f)(i) for i in range(20)) == [2 * i + 7 for i in range(20)]
    assert Parallel(n_jobs=-1)(delayed(module.where)() for _ in range(2)) == [module.__name__] * 2
    for cut in Parallel(n_jobs=-1)(delayed(module.cut)(i) for i in range(2)):
        assert type(cut) is module.Cut
    (finer,) = Parallel(n_jobs=-1)(delayed(lambda cut: cut)(cut) for cut in [module.Finer(5)])
    assert type(finer) is module.Finer
    assert [cut.x for cut in Parallel(n_jobs=-1)(delayed(module.Cut(i).doubled)() for i in range(3))] == [0, 2, 4]


def sends_code(pool: sky.ComputePool, thing: object) -> bool:
    """Return whether an object's pickle has code and not only names."""
    pickled, _ = Tasks.of(pool).encode(0, id, (thing,), {})
    return any(word in pickled for word in (b"CodeType", b"_make_", b"_fill", b"rebuild"))


# ------------------------------------------------------------------------------------------------ Local()


def test_module_loaded_from_a_file_is_sent_by_value(pool, write):
    """A module that no import by its name finds is sent as code, and results are of this process's classes."""
    check(load("loaded_from_file", write("some/where")))


def test_module_made_by_the_program_is_sent_by_value(pool, write, monkeypatch):
    """A module without a file is sent as code."""
    module = types.ModuleType("made_by_exec")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(textwrap.dedent(SOURCE), vars(module))
    check(module)


def test_large_function_of_a_module_is_sent_with_each_task(pool, monkeypatch):
    """A function too large to be cached for the length of a call is sent by value with each of its tasks."""
    made = types.ModuleType("made_large")
    monkeypatch.setitem(sys.modules, "made_large", made)
    exec("TEXT = 'x' * 100_000\ndef f(i):\n    return len(TEXT) + i", vars(made))
    got = Parallel(n_jobs=2, batch_size=1)(delayed(made.f)(i) for i in range(3))
    assert got == [100_000, 100_001, 100_002]


def test_module_of_a_custom_importer_is_sent_by_value(pool, monkeypatch, write):
    """A module of an importer that the workers do not have is sent as code."""

    class Importer(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
        def find_spec(self, name, path, target=None):
            return importlib.util.spec_from_loader(name, self) if name == "from_importer" else None

        def get_source(self, name):
            return textwrap.dedent(SOURCE)

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Importer()])
    check(importlib.import_module("from_importer"))


def test_tasks_pickle_sent_modules_by_name(pool, write):
    """Tasks may pickle by name, as `joblib.Memory` does: names of a sent module are found, also in a package without a
    file.
    """
    for name in ("pickled_in_tasks", "made_package.inner"):
        module = load(name, write(f"there/{name}"))

        def again(cut):
            copy = pickle.loads(pickle.dumps(cut))
            return type(copy) is type(cut), copy

        same, cut = pool.submit(again, module.Cut(3)).result(20)
        assert same
        assert type(cut) is module.Cut
        with pytest.raises(
            AttributeError, match=f"module '{name}' has no attribute 'nothing' in this worker"
        ) as caught:
            pool.submit(lambda cut: sys.modules[type(cut).__module__].nothing, module.Cut(3)).result(20)
        assert f"This node has no module {name}. Image(pip=[...])" in "".join(caught.value.__notes__)


def test_module_that_workers_can_import_later_replaces_its_stand_in(pool, write, monkeypatch, tmp_path):
    """The stand-in of a sent module gives way once the worker can import the module itself."""
    path = write("later/stood_in")
    module = load("stood_in", path)
    check(module)
    monkeypatch.syspath_prepend(str(tmp_path / "later"))
    del sys.modules["stood_in"]
    module = importlib.import_module("stood_in")
    with sky.pool(worker=sky.Worker(concurrency=1)):
        check(module)
    check(module)

    def imports():
        import stood_in

        return stood_in.__file__

    assert pool.submit(imports).result(20) == str(path)


def test_module_of_a_path_hook_is_sent_by_value(pool, monkeypatch, write):
    """A module found by an entry of `sys.path` that only this process's path hook knows is sent as code."""

    class Loader(importlib.abc.InspectLoader):
        def get_source(self, name):
            return textwrap.dedent(SOURCE)

    class Finder:
        def __init__(self, entry):
            if entry != "store://code":
                raise ImportError(entry)

        def find_spec(self, name, target=None):
            return importlib.util.spec_from_loader(name, Loader(), origin="x") if name == "from_store" else None

    monkeypatch.setattr(sys, "path_hooks", [Finder, *sys.path_hooks])
    monkeypatch.syspath_prepend("store://code")
    check(importlib.import_module("from_store"))
    monkeypatch.delitem(sys.modules, "from_store")
    sys.path_importer_cache.pop("store://code", None)


def test_module_object_in_a_task(pool, write):
    """A module that workers do not know can be a function's global, also one that refers to itself."""
    module = load(
        "module_as_a_global", write("elsewhere", "import sys\nme = sys.modules[__name__]\ndef f(x): return x + 1")
    )

    def use(x):
        return module.f(x), module.me is module, module.__name__

    assert pool.submit(use, 1).result(20) == (2, True, "module_as_a_global")


def test_sys_path_entry_added_after_the_pool_was_opened(pool, write, monkeypatch, tmp_path):
    """Workers search a directory added to `sys.path` later, so its modules go by name and have their own state
    there.
    """
    write("came_later")
    write("came_later_too", "import came_later\ndef f(x): return came_later.f(x)")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("came_later")
    check(module)
    # The function goes by name, so that its lock is the worker's.
    assert pool.submit(module.locked, 3).result(20) == 3

    def imports(x):
        import came_later_too

        return came_later_too.f(x)

    assert pool.submit(imports, 1).result(20) == 9


@pytest.mark.parametrize("entry", ["", ".", "here"])
def test_relative_sys_path_entries_after_a_change_of_directory(write, monkeypatch, tmp_path, entry):
    """A relative entry of `sys.path` means the working directory at the time of the import."""
    directory = tmp_path / entry
    write("relative", directory=directory)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(entry)
    module = importlib.import_module("relative")
    monkeypatch.chdir(tmp_path / "other")
    with sky.pool(worker=sky.Worker(concurrency=2)):
        check(module)


def test_modules_that_workers_find_go_by_name(write, monkeypatch, tmp_path):
    """Modules, packages without a file and modules in zip archives that workers find go by name."""
    write("plain")
    write("spacious/inner")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("zipped/__init__.py", "")
        archive.writestr("zipped/inner.py", textwrap.dedent(SOURCE))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path / "archive.zip"))
    found = [importlib.import_module(name) for name in ("plain", "spacious.inner", "zipped.inner")]
    with sky.pool(worker=sky.Worker(concurrency=2)) as pool:
        for module in found:
            assert not sends_code(pool, (module.f, module.Cut, module))
            check(module)
            assert pool.submit(module.locked, 3).result(20) == 3


def test_standard_library_and_installed_packages_go_by_name(shared_pool):
    """Objects of the standard library and of installed packages go by name, and no file is looked at for them."""
    import textwrap as library

    import numpy.linalg

    things = (
        library.dedent,
        numpy.linalg.norm,
        numpy.ndarray,
        os.path.join,
        numpy,
        pickle.Pickler,
        os.path,
        sky.compute,
    )
    assert not sends_code(shared_pool, things)


def test_module_state_that_cannot_be_pickled(pool, write):
    """A module whose state cannot be pickled is an error at the call, with module, reason and remedy; other
    calls work.
    """
    module = load("with_a_lock", write("there"))
    with pytest.raises(TypeError, match=r"'lock' of locked.*module with_a_lock.*do not find .*there.py.*sys.path"):
        pool.submit(module.locked, 1)
    with pytest.raises(pickle.PicklingError, match=r"lock.*module with_a_lock.*sys.path"):
        Parallel(n_jobs=-1)(delayed(module.locked)(i) for i in range(3))
    with pytest.raises(TypeError, match="module with_a_lock"):
        pool.submit(id, module)
    assert pool.submit(module.f, 1).result(20) == 9


def test_unrelated_errors_do_not_mention_modules(pool, write):
    """An unrelated error mentions no module, also after a call that sent a part of one by value."""
    module = load("harmless", write("harmless"))
    assert pool.submit(module.f, 1).result(20) == 9
    with pytest.raises(TypeError) as caught:
        pool.submit(id, module.lock)
    assert "harmless" not in str(caught.value)


def test_extension_module_that_workers_cannot_import(pool, tmp_path, monkeypatch):
    """An extension module that workers cannot import is an error at the call, for its functions and for itself."""
    directory = Path(sysconfig.get_config_var("DESTSHARED"))
    source = next(iter(directory.glob("_heapq.*.so")), None)
    if source is None:
        pytest.skip("this Python has no file of an extension module in its library")
    copy = tmp_path / source.name
    copy.write_bytes(source.read_bytes())
    module = load("lonely._heapq", copy)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for thing in (module.heappush, module):
        with pytest.raises(pickle.PicklingError, match=r"lonely._heapq is an extension module.*sys.path"):
            pool.submit(id, thing)


def test_compute_functions_of_modules_sent_by_value(pool, write):
    """A lazy call's function of a module sent by value, and the object under its name, go by value."""
    module = load(
        "computes",
        write("computes", "import skyward_lite as sky\n@sky.compute\ndef f(x): return x and f.local(x - 1) + 1"),
    )
    assert module.f(3) >> pool == 3
    assert pool.submit(lambda: module.f.local(2)).result(20) == 2


def test_pytest_importlib_mode(tmp_path):
    """Under pytest's importlib mode, functions of a test's module and of its helper are sent by value."""
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
            import skyward_lite as sky
            from joblib import Parallel, delayed

            class Result:
                def __init__(self, x):
                    self.x = x

            def f(x):
                return Result(x + 1)

            def test_it():
                with sky.pool(worker=sky.Worker(concurrency=2)):
                    results = Parallel(n_jobs=-1)(delayed(f)(i) for i in range(4))
                assert [type(result) for result in results] == [Result] * 4
                assert [result.x for result in results] == [1, 2, 3, 4]
            """)
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_unchecked_bytecode_means_an_unchanged_module(tmp_path, write, executor):
    """Old bytecode for which Python compiled the source instead does not make a module count as edited; its lock is the
    worker's.
    """
    path = write("old_bytecode", SOURCE.replace("K = 7", "K = 6"))
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([sys.executable, "-c", "import old_bytecode"], check=True, cwd=tmp_path, env=env, timeout=20)
    assert list(tmp_path.glob("__pycache__/old_bytecode*"))
    write("old_bytecode", SOURCE + "\n")
    os.utime(path, (1, 1))
    script = f"""
        import old_bytecode
        import skyward_lite as sky
        if __name__ == "__main__":
            with sky.pool(worker=sky.Worker(concurrency=1, executor={executor!r}), plugins=[]) as pool:
                print(pool.submit(old_bytecode.locked, 3).result(20), pool.submit(old_bytecode.f, 1).result(20))
        """
    done = run(tmp_path, script, PYTHONDONTWRITEBYTECODE="1")
    assert done.stdout == "3 9\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    "last",
    [
        "class Holder:\n    bump, Cut = staticmethod(bump), Cut\n    __name__ = __name__\nm = Holder()",
        "class M(types.ModuleType): pass\nm = M(__name__)\nm.__dict__.update(Cut=Cut, bump=bump)",
        "m = types.ModuleType(__name__)\nm.Cut, m.bump = Cut, bump",
    ],
)
def test_modules_that_replace_themselves_in_sys_modules(pool, write, monkeypatch, tmp_path, last):
    """A module that replaces itself in `sys.modules` goes by name, but an object that only has its file's name does
    not.
    """
    source = "import sys, threading, types\nlock = threading.Lock()\nclass Cut: pass\n"
    source += "def bump(x):\n    with lock: return x * 2, Cut()\n"
    write("puts_another", f"{source}{last}\nsys.modules[__name__] = m")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("puts_another")
    result, cut = pool.submit(module.bump, 2).result(20)
    assert result == 4
    assert type(cut) is module.bump(1)[1].__class__
    # On other machines the module counts as installed if its file is.
    assert modules.Modules(False).by_value("puts_another", module.bump)
    assert not modules.Modules(False, [str(tmp_path / "puts_another.py")]).by_value("puts_another", module.bump)
    write("file_of_another")
    made = types.ModuleType("file_of_another")
    monkeypatch.setitem(sys.modules, "file_of_another", made)
    exec(textwrap.dedent(SOURCE).replace("7", "8"), vars(made))
    assert pool.submit(made.f, 1).result(20) == 10


# ------------------------------------------------------------------------------------------------ other machines


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A host with the environment of an image, and without this machine's modules."""
    lab = Lab(tmp_path_factory.mktemp("modules"))
    host = lab.host()
    host.make_environment(sky.Image())
    yield host, lab.config
    lab.close()


@pytest.fixture(params=["thread", "process"])
def remote(request, host, write, monkeypatch, tmp_path):
    """A pool on that host; modules in `tmp_path` can be imported here."""
    monkeypatch.syspath_prepend(str(tmp_path))
    provider = sky.SSH(host[0].name, config=host[1])
    with sky.pool(provider, worker=sky.Worker(concurrency=2, executor=request.param), plugins=[]) as pool:
        yield pool


def write_beside(write) -> tuple[types.ModuleType, types.ModuleType]:
    """Write and import a module, and a package that uses it."""
    write("beside")
    write("package/__init__", "from .inner import f")
    write("package/inner", "import beside\nfrom beside import Cut\ndef f(x): return beside.helper(x), Cut(x)")
    return importlib.import_module("beside"), importlib.import_module("package")


def test_local_modules_are_imported_on_other_machines(remote, write):
    """Modules beside the script, and those which they use, go to other machines by name, and have their state there."""
    beside, package = write_beside(write)
    assert not sends_code(remote, (beside.f, package.f, beside))
    assert remote.submit(beside.f, 1).result(20) == 9
    assert remote.submit(beside.locked, 3).result(20) == 3
    number, cut = remote.submit(package.f, 2).result(20)
    assert number == 4
    assert type(cut) is beside.Cut


def test_local_modules_by_value_on_other_machines(host, write, monkeypatch, tmp_path):
    """With `ship_modules=False` modules beside the script, and those which they use, travel by value."""
    monkeypatch.syspath_prepend(str(tmp_path))
    beside, package = write_beside(write)
    provider = sky.SSH(host[0].name, config=host[1])
    with sky.pool(provider, worker=sky.Worker(concurrency=1), plugins=[], ship_modules=False) as pool:
        assert pool.submit(beside.f, 1).result(20) == 9
        with pytest.raises(TypeError, match=r"module beside.*Image\(includes=\[...\]\)"):
            # The function refers to the whole module, which has a lock.
            pool.submit(package.f, 2)
        beside.lock = None
        number, cut = pool.submit(package.f, 2).result(20)
        assert number == 4
        assert type(cut) is beside.Cut
        with pytest.raises(ModuleNotFoundError, match="beside"):
            pool.submit(lambda: importlib.import_module("beside.inner")).result(20)


def test_package_missing_on_a_node_is_named(remote, write, tmp_path):
    """An installed package goes by name, and if the node lacks it the error has the module and the remedy."""
    directory = tmp_path / "target"
    write("installed_here", directory=directory)
    (directory / "installed_here-1.0.dist-info").mkdir()
    sys.path.append(str(directory))
    try:
        module = importlib.import_module("installed_here")
    finally:
        sys.path.remove(str(directory))
    assert not sends_code(remote, module.f)
    for call in (module.f, lambda x: importlib.import_module("installed_here").f(x)):
        with pytest.raises(ModuleNotFoundError, match="installed_here") as caught:
            remote.submit(call, 1).result(20)
        assert "This node has no module installed_here. Image(pip=[...])" in "".join(caught.value.__notes__)


def test_image_includes_go_by_name(write, monkeypatch, tmp_path):
    """Modules and packages of `Image(includes=)` go by name however their paths are written; others beside them
    do not.
    """
    paths = [str(write("included")), str(write("included_too/__init__", "").parent) + "/"]
    write("included_too/inner")
    write("left_out")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = modules.Modules(False, paths)
    for name, by_value in (("included", False), ("included_too.inner", False), ("left_out", True)):
        assert found.by_value(name, importlib.import_module(name).f) is by_value


def test_editable_installs_go_by_name(monkeypatch, write, tmp_path):
    """Modules of an editable install go by name, as its importer comes with Python's start in the workers too."""
    path = write("project/editable")

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return importlib.util.spec_from_file_location(name, file) if name == "editable" else None

    file = path
    Finder.__module__ = "__editable___project_1_0_finder"
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    module = importlib.import_module("editable")
    assert not modules.Modules(True).by_value("editable", module.f)
    # The importer now finds another file than this process has loaded.
    file = write("project/moved")
    assert modules.Modules(True).by_value("editable", module.f)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Record a project as installed in place, as `pip install --editable` does."""

    def install(name: str, project: Path, **texts: str) -> None:
        info = tmp_path / "site" / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "direct_url.json").write_text(json.dumps({"url": project.as_uri(), "dir_info": {"editable": True}}))
        for file, text in texts.items():
            (info / f"{file}.txt").write_text(text)
        editable_projects.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield install
    editable_projects.cache_clear()


def test_projects_installed_in_place_go_by_name(installed, write, monkeypatch, tmp_path):
    """Projects installed in place, or named by `Image(pip=)`, go by name on other machines; files beside them
    do not.
    """
    project = tmp_path / "my project"
    installed("My-Project", project)
    installed("other-name", project, top_level="imported_so\n")
    for name in ("my_project/inner", "imported_so", "checked_out", "only_beside"):
        write(f"src/{name}", directory=project)
    write("src/my_project/__init__", "", directory=project)
    monkeypatch.syspath_prepend(str(project / "src"))
    found = modules.Modules(False, packages=sky.Image(pip=["checked-out>=1"]).packages())
    for name in ("my_project", "my_project.inner", "imported_so", "checked_out", "only_beside"):
        module = importlib.import_module(name)
        assert found.by_value(name, getattr(module, "f", module)) is (name == "only_beside")


def test_namespace_packages(remote, write, monkeypatch, tmp_path):
    """Installed namespace packages go by name; of others the user's own modules are sent, and a worker imports the
    rest.
    """
    target = tmp_path / "target"
    write("shared_name/there", directory=target)
    (target / "shared_name_there-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(target))
    space = importlib.import_module("shared_name")
    there = importlib.import_module("shared_name.there")
    assert not modules.Modules(False).by_value("shared_name", space)
    del sys.modules["shared_name"], sys.modules["shared_name.there"]
    write("shared_name/own", "def f(x): return x + 1")
    importlib.invalidate_caches()
    space = importlib.import_module("shared_name")
    own = importlib.import_module("shared_name.own")
    there = importlib.import_module("shared_name.there")
    assert space.own is own
    assert space.there is there

    def use(x):
        return space.own.f(x)

    def lacks():
        return space.there.f(1)

    assert remote.submit(use, 1).result(20) == 2
    with pytest.raises(ModuleNotFoundError, match="shared_name") as caught:
        remote.submit(lacks).result(20)
    assert "Image(pip=[...])" in "".join(caught.value.__notes__)


def test_modules_under_another_name_go_by_name():
    """Modules that libraries or extension modules make under other names go by name."""
    import distutils.core

    import sklearn.ensemble

    assert distutils.core
    assert sklearn.ensemble
    known = modules.Modules(False)
    odd = [name for name in sys.modules if name.startswith(("_frozen_importlib", "_cy", "cython_", "distutils"))]
    assert len(odd) > 4
    assert [name for name in odd if known.by_value(name, sys.modules[name])] == []


def test_import_error_hints():
    """Import errors get a hint with module and remedy if a package, a submodule or a name is missing, and others get
    none.
    """
    hint = stand_ins.missing_module_hint
    assert "no module lab" in (hint(ModuleNotFoundError("No module named 'lab.x'", name="lab.x")) or "")
    assert "Image(includes=[...])" in (hint(ModuleNotFoundError("No module named 'lab'", name="lab")) or "")
    assert "this node's joblib has no module joblib.nope" in (hint(missing("joblib.nope")) or "")
    hinted = hint(AttributeError("Can't get attribute 'f' on <module 'lab.x' from '/x'>"))
    assert "module lab.x lacks" in (hinted or "")
    for other in (ValueError("x"), AttributeError("'A' object has no attribute 'b'"), missing("json.nope")):
        assert hint(other) is None


def missing(name: str) -> ModuleNotFoundError:
    """Return the error that the import of a missing module raises."""
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module(name)
    return caught.value


def test_sys_argv_on_other_machines(remote):
    """A task on another machine sees the client's command line, as under loky."""
    assert remote.submit(lambda: sys.argv).result(20) == sys.argv


# ------------------------------------------------------------------------------------------------ imports that call


def run(
    directory: Path, script: str, *args: str, seconds: float = 40, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in a directory, and return the completed process."""
    (directory / "script.py").write_text(textwrap.dedent(script))
    command = [sys.executable, "script.py", *args]
    env = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, cwd=directory, env=env)


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_module_that_opens_a_pool_at_import(tmp_path, write, executor):
    """A worker refuses each import of a module that opens a pool, and the task's error names the module."""
    write(
        "opens",
        f"""
        import operator
        import skyward_lite as sky
        pool = sky.pool(worker=sky.Worker(concurrency=2, executor={executor!r}))
        pool.__enter__()
        def f(x): return x
        """,
    )
    script = """
        import opens
        for i in range(3):
            error = opens.pool.submit(opens.f, i).exception(30)
            print(type(error).__name__, error)
        """
    done = run(tmp_path, script)
    message = "NodeStartError module opens opens a pool when it is imported"
    assert done.stdout.count(message) == 3, done.stdout + done.stderr
    assert 'under `if __name__ == "__main__":`' in done.stdout


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_program_started_by_a_task_may_open_pools_at_import(tmp_path, write, executor):
    """Modules of a program that a task starts may open pools when they are imported, as no worker imports them."""
    write(
        "application",
        """
        import skyward_lite as sky
        with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
            print(pool.submit(abs, -3).result(20))
        """,
    )
    script = f"""
        import subprocess, sys
        import skyward_lite as sky
        def start():
            return subprocess.run([sys.executable, "-c", "import application"], capture_output=True, text=True)
        if __name__ == "__main__":
            with sky.pool(worker=sky.Worker(concurrency=1, executor={executor!r}), plugins=[]) as pool:
                done = pool.submit(start).result(30)
                print(done.stdout, done.stderr)
        """
    done = run(tmp_path, script)
    assert done.stdout.split() == ["3"], done.stdout + done.stderr


@pytest.mark.parametrize(
    "call", ["Parallel(n_jobs=-1)(delayed(f)(i) for i in range(4))", "pool.submit(id, Cut(1)).result(20)"]
)
def test_call_during_the_import_of_its_module_is_an_error(tmp_path, write, call):
    """A call that would wait for results which wait for the import is an error at once, with the module and the
    remedy.
    """
    write(
        "calls_at_top",
        f"""
        import skyward_lite as sky
        from joblib import Parallel, delayed
        class Cut:
            def __init__(self, x): self.x = x
        def f(x): return Cut(x)
        def main():
            return {call}
        with sky.pool(worker=sky.Worker(concurrency=2)) as pool:
            main()
        """,
    )
    done = run(tmp_path, "import calls_at_top")
    assert "PicklingError: module calls_at_top calls Parallel or a pool while it is being imported" in done.stderr
    assert 'under `if __name__ == "__main__":`' in done.stderr


def test_calls_that_are_allowed_during_an_import(tmp_path, write):
    """Functions of whole modules, functions without a name, threads that nobody waits for and later calls are
    allowed.
    """
    write("whole", "class Cut: pass\ndef f(x): return Cut()")
    write(
        "calls",
        """
        import threading
        import whole
        from joblib import Parallel, delayed
        got = Parallel(n_jobs=-1)(delayed(whole.f)(i) for i in range(4))
        assert [type(cut) for cut in got] == [whole.Cut] * 4
        assert Parallel(n_jobs=-1)(delayed(lambda x: x + 1)(i) for i in range(4)) == [1, 2, 3, 4]
        def g(x): return x
        def start(pool):
            futures = []
            thread = threading.Thread(target=lambda: futures.append(pool.submit(g, 3)))
            thread.start()
            return thread, futures
        """,
    )
    script = """
        import skyward_lite as sky
        if __name__ == "__main__":
            with sky.pool(worker=sky.Worker(concurrency=2)) as pool:
                import calls
                thread, futures = calls.start(pool)
                thread.join()
                print(futures[0].result(20), pool.submit(calls.g, 4).result(20))
        """
    done = run(tmp_path, script)
    assert done.stdout == "3 4\n", done.stdout + done.stderr


def test_nested_pools_have_a_depth_limit(tmp_path, write):
    """A task may open a pool, but not a task of that pool: a function that does so by mistake ends with an error."""
    write(
        "nested",
        """
        import skyward_lite as sky
        def nest(levels):
            if not levels:
                return 1
            with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
                return 1 + pool.submit(nest, levels - 1).result(30)
        """,
    )
    script = """
        import nested
        if __name__ == "__main__":
            print(nested.nest(2))
            try:
                nested.nest(3)
            except Exception as error:
                print(type(error).__name__, error)
        """
    done = run(tmp_path, script)
    assert done.stdout.startswith("3\nNodeStartError there are 2 pools around this process"), done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------ sys.executable


def refusal(monkeypatch: pytest.MonkeyPatch, executable: object) -> str:
    """Return the error with which no pool starts with this `sys.executable`."""
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(sky.NodeStartError) as caught:
        sky.pool(plugins=[]).__enter__()
    return str(caught.value)


def script_at(path: Path, text: str) -> str:
    """Write a shell script as a program."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("executable", ["", None])
def test_sys_executable_is_empty(monkeypatch, executable):
    """An empty `sys.executable`, as in programs that embed Python, is an error with the remedy."""
    assert "sys.executable is empty" in refusal(monkeypatch, executable)


def test_sys_executable_is_missing(monkeypatch, tmp_path):
    """A `sys.executable` that is missing or no program is named at once."""
    (tmp_path / "text").touch()
    for path in (tmp_path / "nothing", tmp_path / "text"):
        message = refusal(monkeypatch, str(path))
        assert "sys.executable cannot be started" in message
        assert str(path) in message


def test_sys_executable_is_no_python(monkeypatch, tmp_path):
    """A `sys.executable` that ends at once is named in the error, with its exit status and the remedy."""
    path = script_at(tmp_path / "editor", "exit 3")
    message = refusal(monkeypatch, path)
    assert f"{path}, which is sys.executable, was started as a node and ended with status 3" in message
    assert "set sys.executable" in message


@pytest.mark.slow
def test_sys_executable_does_not_answer(monkeypatch, tmp_path):
    """A `sys.executable` that runs on without an answer is an error after `connect_timeout`, and is ended."""
    path = script_at(tmp_path / "editor", "exec sleep 60")
    monkeypatch.setattr(sys, "executable", path)
    with pytest.raises(sky.NodeStartError, match="editor, which is sys.executable, .* runs, but does not answer"):
        sky.pool(plugins=[], connect_timeout=1).__enter__()


def test_frozen_application(monkeypatch, tmp_path):
    """A frozen application is not started as an interpreter; a Python that it names is."""
    started = tmp_path / "started"
    path = script_at(tmp_path / "application", f"touch {started}")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    python = sys.executable
    assert f"{path!r}, an application that brings its own Python" in refusal(monkeypatch, path)
    assert not started.exists()
    monkeypatch.setattr(sys, "executable", python)
    with sky.pool(plugins=[]) as pool:
        assert pool.submit(abs, -1).result(20) == 1


def test_sys_executable_starts_the_program_again(tmp_path):
    """A program that was started as a node finds this out and opens no pool."""
    starts = tmp_path / "starts"
    program = script_at(tmp_path / "program", f"echo again >> {starts}\nexec {sys.executable} {tmp_path}/script.py")
    script = f"""
        import sys
        import skyward_lite as sky
        sys.executable = {program!r}
        with sky.pool(plugins=[]):
            pass
        """
    done = run(tmp_path, script)
    assert starts.read_text() == "again\n"
    assert "was started as a node's agent, but runs a program that opens a pool" in done.stderr
    assert f"{program}, which is sys.executable, was started as a node and ended with status 1" in done.stderr


# ------------------------------------------------------------------------------------------------ sys.argv


def test_sys_argv_in_tasks(tmp_path):
    """A task sees the client's command line, whatever bytes it has, and not the variables in which it travelled."""
    script = f"""
        import os, sys
        import skyward_lite as sky
        if __name__ == "__main__":
            for executor in ("thread", "process"):
                with sky.pool(worker=sky.Worker(concurrency=1, executor=executor), plugins=[]) as pool:
                    look = lambda: (sys.argv, {nesting.ARGUMENTS!r} in os.environ, {nesting.AGENT!r} in os.environ)
                    print(pool.submit(look).result(20) == (sys.argv, False, False), len(sys.argv))
        """
    done = run(tmp_path, script, "--n=1", "", "é \udce9", "b c")
    assert done.stdout == "True 5\nTrue 5\n", done.stdout + done.stderr


def test_sys_argv_too_long(tmp_path):
    """A command line that does not fit is cut to the script's name, and the pool starts."""
    script = """
        import sys
        import skyward_lite as sky
        if __name__ == "__main__":
            with sky.pool(plugins=[]) as pool:
                print(pool.submit(lambda: sys.argv).result(20))
        """
    done = run(tmp_path, script, *["x" * 1000] * 100)
    assert done.stdout == "['script.py']\n", done.stdout + done.stderr
