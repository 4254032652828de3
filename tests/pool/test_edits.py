"""The user's modules that are edited while a pool is open: always the new code, and never a mixture."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from lab import Lab
from skyward_lite.client.tasks import Tasks

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Lab]:
    """Two hosts with the environment of an image, and without this machine's modules."""
    lab = Lab(tmp_path_factory.mktemp("edits"))
    for _ in range(2):
        lab.host().make_environment(sky.Image())
    yield lab
    lab.close()


@pytest.fixture(scope="module", params=["Local-thread", "Local-process", "SSH-thread", "SSH-process"])
def pool(request) -> Iterator[sky.ComputePool]:
    """A pool of two nodes, each with two slots."""
    provider, executor = request.param.split("-")
    nodes = sky.Local(2)
    if provider == "SSH":
        lab = request.getfixturevalue("hosts")
        nodes = sky.SSH(*(host.name for host in lab.hosts), config=lab.config)
    with sky.pool(nodes, worker=sky.Worker(concurrency=2, executor=executor)) as opened:
        yield opened


@pytest.fixture
def write(tmp_path, monkeypatch) -> Iterator[Write]:
    """Write a module into a directory of `sys.path`; what the test imports is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(name: str, source: str) -> Path:
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return path

    yield write
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or str(tmp_path)).startswith(str(tmp_path)):
            del sys.modules[name]


def everywhere(function: Callable[..., object], calls: int = 8) -> set[object]:
    """Return what calls of a function return, on all slots."""
    return set(Parallel(n_jobs=-1, batch_size=1)(delayed(function)() for _ in range(calls)))


EDITED = """
    import threading
    K = 'v1'
    class Cut:
        def f(self): return f()
    def f(): return K
    lock = threading.Lock()
    def locked():
        with lock:
            return K
"""


def test_edits_with_and_without_reload(pool, write):
    """Calls after an edit run the new code, whether or not this process reloads the module, and so does the code that
    uses the module in any way, however many steps away.
    """
    write("edited", EDITED)
    uses = {
        "as_module": "import edited\ndef f(): return edited.f()",
        "as_function": "from edited import f as g\ndef f(): return g()",
        "as_constant": "from edited import K\ndef f(): return K",
        "as_object": "from edited import Cut\ncut = Cut()\ndel Cut\ndef f(): return cut.f()",
        "in_function": "def f():\n    import edited\n    return edited.locked()",
        "far_away": "import as_module\ndef f(): return as_module.f()",
    }
    for name, source in uses.items():
        write(name, source)
    module = importlib.import_module("edited")
    users = [importlib.import_module(name).f for name in uses]
    for version in ("v1", "v2", "v3", "v4"):
        if version != "v1":
            # All versions have one size, and are written within a clock tick or two.
            write("edited", EDITED.replace("v1", version))
        if version == "v3":
            importlib.reload(module)
        got = Parallel(n_jobs=-1, batch_size=1)(delayed(f)() for f in [module.f, module.locked, *users] * 2)
        assert got == [version] * 16
        assert pool.submit(module.f).result(20) == version
        assert list(pool.map(lambda _: module.f(), range(4))) == [version] * 4


def test_unchanged_modules_keep_their_workers(pool, write):
    """A file that is written again without a change, a reload and a touch leave the workers and what they remember."""
    path = write("kept", "made = []\ndef f(x):\n    made.append(x)\n    return len(made)")
    module = importlib.import_module("kept")
    assert pool.submit(module.f, 0).result(20) == 1
    generations = Tasks.of(pool)._modules.generations
    before = generations.newest
    os.utime(path, (1, 1))
    path.write_bytes(path.read_bytes())
    importlib.reload(module)
    assert max(Parallel(n_jobs=-1)(delayed(module.f)(i) for i in range(16))) > 4
    assert generations.newest == before


def test_call_that_runs_while_a_module_is_edited(pool, write):
    """A call runs to its end with the code of its beginning, also where a module is first imported after the edit; the
    next call runs the new code; and two calls of two threads have their own code each, at once.
    """
    write("first", "K = 'v1'\ndef f(i):\n    import second\n    return (K, second.K) if i > 3 else (K, 'v1')")
    write("second", "K = 'v1'")
    module = importlib.import_module("first")
    importlib.import_module("second")
    old = Parallel(n_jobs=2, batch_size=1, pre_dispatch=2, return_as="generator")(
        delayed(module.f)(i) for i in range(40)
    )
    assert next(old) == ("v1", "v1")
    for name in ("first", "second"):
        path = Path(sys.modules[name].__file__)
        path.write_text(path.read_text().replace("K = 'v1'", "K = 'v2'"))
    got = []
    thread = threading.Thread(target=lambda: got.extend(old))
    thread.start()
    new = Parallel(n_jobs=2, batch_size=1)(delayed(module.f)(i) for i in range(4, 24))
    thread.join()
    assert got == [("v1", "v1")] * 39
    assert new == [("v2", "v2")] * 20


def test_edit_with_a_mistake_and_its_correction(pool, write):
    """A module with a syntax error is an error of the tasks that import it, and its correction mends them."""
    write("mistaken", "def f(): return 'v1'")
    module = importlib.import_module("mistaken")
    assert everywhere(module.f) == {"v1"}
    write("mistaken", "def f(: return 'v2'")
    for _ in range(2):
        with pytest.raises(SyntaxError, match="mistaken"):
            Parallel(n_jobs=-1)(delayed(module.f)() for _ in range(8))
    write("mistaken", "def f(): return 'v3'")
    assert everywhere(module.f) == {"v3"}


def test_results_of_a_class_whose_module_is_edited(pool, write):
    """A result of a class of this process's is an instance of it, whether the task ran before or after an edit."""
    source = "class Cut:\n    def __init__(self): self.made = 'v1'\ndef f(): return Cut()"
    write("has_class", source)
    module = importlib.import_module("has_class")
    early = pool.submit(module.f)
    cuts = [early.result(20)]
    write("has_class", source.replace("v1", "v2"))
    cuts.append(pool.submit(module.f).result(20))
    cuts += Parallel(n_jobs=-1)(delayed(lambda cut: cut)(cut) for cut in cuts)
    assert [(type(cut), cut.made) for cut in cuts] == [(module.Cut, "v1"), (module.Cut, "v2")] * 2


def test_package_edited_before_the_pool_was_opened(pool, write, monkeypatch):
    """A module of a package that was edited before any call, with cached bytecode of the same size and second, runs as
    its file is now.
    """
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    write("before.__init__", "from .inner import f")
    path = write("before.inner", "K = 'v1'\ndef f(): return K")
    stamp = path.stat().st_mtime_ns
    module = importlib.import_module("before")
    path.write_text("K = 'v2'\ndef f(): return K")
    os.utime(path, ns=(stamp, stamp))
    assert everywhere(module.f) == {"v2"}


def test_module_of_another_file_under_the_same_name(pool, write, monkeypatch, tmp_path):
    """A module that this process has imported from another file since is imported from there by the workers, too."""
    write("twofold", "def f(): return 'v1'")
    module = importlib.import_module("twofold")
    assert everywhere(module.f) == {"v1"}
    write("other.twofold", "def f(): return 'v2'")
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    del sys.modules["twofold"]
    assert everywhere(importlib.import_module("twofold").f) == {"v2"}


HOOKS = """
    import builtins, contextlib
    K = 'v1'
    @contextlib.contextmanager
    def around(info):
        builtins.hooked = K
        yield
    def look():
        return builtins.hooked, K
"""


@pytest.mark.parametrize("where", ["Local", "SSH"])
def test_plugin_hooks_of_an_edited_module(write, request, where):
    """Hooks of a plugin that a module of the user's defines are imported by the workers, fresh ones after an edit."""
    write("has_hooks", HOOKS)
    module = importlib.import_module("has_hooks")
    plugins = [sky.Plugin("hooked", around_worker=module.around)]
    nodes = eval(nodes_of(where, request))
    with sky.pool(nodes, worker=sky.Worker(concurrency=1), plugins=plugins) as opened:
        assert opened.submit(module.look).result(20) == ("v1", "v1")
        write("has_hooks", HOOKS.replace("v1", "v2"))
        assert opened.submit(module.look).result(20) == ("v2", "v2")


# ------------------------------------------------------------------------------------------------ programs

SCRIPT = """
import sys, time
from pathlib import Path
import skyward_lite as sky
from joblib import Parallel, delayed
import helpers

def use(i):
    return helpers.value(i)

if __name__ == "__main__":
    with sky.pool({nodes}, worker=sky.Worker(concurrency=2, executor={executor!r})) as pool:
        for version in range(4):
            Path("helpers.py").write_text(f"def value(i): return {{version}}")
            print(set(Parallel(n_jobs=-1)(delayed(use)(i) for i in range(8))),
                  set(Parallel(n_jobs=-1)(delayed(helpers.value)(i) for i in range(8))),
                  pool.submit(use, 0).result(20))
"""


def nodes_of(where: str, request: pytest.FixtureRequest) -> str:
    """Return the expression of the nodes, for a program."""
    if where == "Local":
        return "sky.Local(2)"
    lab = request.getfixturevalue("hosts")
    return f"sky.SSH(*{[host.name for host in lab.hosts]!r}, config={lab.config!r})"


@pytest.mark.parametrize("where", ["Local", "SSH"])
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_edits_by_a_script(tmp_path, request, where, executor):
    """Edit, call, edit, call in a script: each call runs the code of the last edit."""
    (tmp_path / "helpers.py").write_text("def value(i): return None")
    script = SCRIPT.format(nodes=nodes_of(where, request), executor=executor)
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False, cwd=tmp_path)
    assert done.stdout == "".join(f"{{{v}}} {{{v}}} {v}\n" for v in range(4)), done.stdout + done.stderr


NOTEBOOK = """
import json, sys
from jupyter_client.manager import start_new_kernel

cells = json.load(sys.stdin)
manager, client = start_new_kernel(kernel_name="python3")
for code in cells:
    cell = client.execute(code)
    while True:
        message = client.get_iopub_msg(timeout=30)
        if message["parent_header"].get("msg_id") != cell:
            continue
        content = message["content"]
        if message["msg_type"] in ("stream", "error"):
            print(content.get("text") or content, end="")
        if content.get("execution_state") == "idle":
            break
client.stop_channels()
manager.shutdown_kernel(now=True)
"""
CELLS = """
import importlib, sys
from pathlib import Path
import skyward_lite as sky
from joblib import Parallel, delayed
sys.path.insert(0, {directory!r})
import helpers
from helpers import value
pool = sky.pool({nodes}, worker=sky.Worker(concurrency=2)).__enter__()
def show():
    print(set(Parallel(n_jobs=-1)(delayed(helpers.value)(i) for i in range(8))),
          set(Parallel(n_jobs=-1)(delayed(lambda i: value(i))(i) for i in range(8))))
def edit(version):
    Path(helpers.__file__).write_text(f"def value(i): return {{version}}")
#%%
show()
#%%
edit(1)
#%%
show()
#%%
edit(2); importlib.reload(helpers); from helpers import value
#%%
show()
#%%
%load_ext autoreload
%autoreload 2
edit(30)
#%%
show()
#%%
edit(400)
#%%
show()
#%%
pool.__exit__(None, None, None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["Local", "SSH"])
def test_edits_in_a_notebook(tmp_path, request, where):
    """Edit, call, edit, call in a notebook: the new code each time, without a reload, with one, and with autoreload."""
    pytest.importorskip("ipykernel")
    (tmp_path / "helpers.py").write_text("def value(i): return 0")
    cells = CELLS.format(directory=str(tmp_path), nodes=nodes_of(where, request)).split("#%%\n")
    command = [sys.executable, "-c", NOTEBOOK]
    done = subprocess.run(
        command, input=json.dumps(cells), capture_output=True, text=True, timeout=50, check=False, cwd=tmp_path
    )
    shown = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert shown == [f"{{{v}}} {{{v}}}" for v in (0, 1, 2, 30, 400)], done.stdout + done.stderr
