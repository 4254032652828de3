"""How a worker's process imports modules that the client serves: what is found, asked for, kept, and refused."""

from __future__ import annotations

import errno
import hashlib
import importlib.machinery
import os
import pickle
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from served_worker import Worker
from skyward_lite.client import sources, units
from skyward_lite.client.sources import Sources
from skyward_lite.node.module_store import Store, UnkeptError
from skyward_lite.served import Answer

EXTENSION = f"fast{importlib.machinery.EXTENSION_SUFFIXES[0]}"

FILES = {
    "im_pack/__init__.py": "from .part import twice\nfrom . import sub\n",
    "im_pack/part.py": (
        "import im_base\ndef twice(x):\n    return im_base.double(x)\ndef fail():\n    raise KeyError(1)\n"
    ),
    "im_pack/sub/__init__.py": "",
    "im_pack/sub/data.txt": "text\n",
    "im_pack/big.bin": "b" * 2000,
    f"im_pack/{EXTENSION}": "",
    "im_base.py": "try:\n    import im_optional\nexcept ImportError:\n    pass\ndef double(x):\n    return 2 * x\n",
    "im_space/tool.py": "from im_space.other import y\nx = y + 1\n",
    "im_space/other.py": "y = 1\n",
    "im_space/third.py": "z = 3\n",
    "yaml.py": "who = 'client'\n",
    "im_fails.py": "raise RuntimeError('its own')\n",
    "im_late.py": "x = 1\n",
}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A directory of the user's, on the path of the test's process only."""
    root = tmp_path / "project"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (root / "im_pack/sub/data.txt").chmod(0o755)
    monkeypatch.syspath_prepend(str(root))
    return root


@pytest.fixture
def node(tmp_path) -> Path:
    """The pool's directory on the node."""
    directory = tmp_path / "node"
    directory.mkdir()
    return directory


@pytest.fixture
def start(node) -> Iterator[Callable[..., Worker]]:
    """Starts workers of this node."""
    started: list[Worker] = []

    def one(served: Sources, generation: int = 0) -> Worker:
        started.append(Worker(served, node, generation))
        return started[-1]

    yield one
    for worker in started:
        worker.close()


def test_what_is_imported_is_as_at_the_client(project, node, start, monkeypatch):
    """One request brings a package and what it imports; its files are real ones, for whatever looks at them."""
    monkeypatch.setattr(units, "MAX_DATA_FILE", 1000)
    worker = start(Sources())
    assert worker.run("__import__('im_pack').twice(4)") == 8
    assert worker.run("requests") == ["im_pack"]
    lines = {
        "__import__('inspect').getsource(im_pack.part.twice)": "def twice(x):\n    return im_base.double(x)\n",
        "__import__('importlib.resources').resources.files('im_pack.sub').joinpath('data.txt').read_text()": "text\n",
        "__import__('pkgutil').get_data('im_pack.sub', 'data.txt')": b"text\n",
        "sorted(m.name for m in __import__('pkgutil').iter_modules(im_pack.__path__))": ["part", "sub"],
        "__import__('pickle').loads(__import__('pickle').dumps(im_pack.twice)) is im_pack.twice": True,
        "im_pack.__file__ == im_pack.__spec__.origin and im_pack.part.__name__": "im_pack.part",
        "__import__('os').path.dirname(im_pack.__file__).startswith(importer.Importer and importer.__name__)": False,
        "open(__import__('os').path.dirname(im_pack.sub.__file__) + '/data.txt').read()": "text\n",
    }
    worker.run("import im_pack")
    for line, value in lines.items():
        assert worker.run(line) == value, line
    assert worker.run("__import__('os').access(im_pack.sub.__path__[0] + '/data.txt', 1)")
    worker.run("import traceback")
    worker.run("def trace():\t try: im_pack.part.fail()\t except KeyError: return traceback.format_exc()")
    assert "    raise KeyError(1)" in worker.run("trace()")
    # What was not sent is named, with the remedy.
    assert "No module named 'im_pack.nothing'" in worker.run("import im_pack.nothing")
    refused = worker.run("import im_pack.fast")
    assert refused.startswith(
        "ImportError: node n1 cannot import the client's module im_pack.fast: im_pack.fast is comp"
    )
    assert "Image(pip=[...])" in refused
    worker.run(
        "def look():\t try: open(im_pack.__path__[0] + '/big.bin')"
        "\t except OSError as error: importer.explain(error); raise"
    )
    assert "was not sent with package im_pack: it has 2,000 bytes" in worker.run("look()")
    assert len(worker.run("requests")) == 1
    assert not [name for name in os.listdir(node / "modules") if name.startswith("new-")]


def test_what_is_asked_for_once(project, start):
    """Absent modules cost one request of each node and none for installed packages; a local name goes first."""
    served = Sources()
    worker, other = start(served), start(served)
    assert worker.run("__import__('yaml').who") == "client"
    for line in ("import im_none", "import im_none", "__import__('importlib').import_module('im_none')"):
        assert worker.run(line).startswith("ModuleNotFoundError: No module named 'im_none'")
    assert worker.run("requests") == ["yaml", "im_none"]
    # What is installed is not asked for, and installed packages ask for nothing.
    assert worker.run("__import__('joblib').__name__") == "joblib"
    assert worker.run("requests") == ["yaml", "im_none"]
    # Nor by another process of the node, unless it needs something new.
    assert other.run("__import__('yaml').who") == "client"
    assert other.run("import im_none").startswith("ModuleNotFoundError")
    assert other.run("__import__('importlib').util.find_spec('im_none')") is None
    assert other.run("requests") == []
    assert other.run("__import__('im_late').x") == 1
    assert other.run("import im_fails").startswith("RuntimeError: its own")
    (project / "im_new.py").write_text("x = 5\n")
    assert other.run("__import__('im_new').x") == 5
    assert other.run("requests") == ["im_late", "im_fails", "im_new"]


def test_processes_that_import_at_once_ask_once(project, start):
    """One asks and the others wait for its answer; the time of none counts against its task."""
    served = Sources()
    workers = [start(served) for _ in range(3)]
    timed = "events = []\tfirst_imports = __import__('skyward_lite.node.first_imports').node.first_imports\t"
    timed += "first_imports.time_by((lambda: events.append('pause'), lambda: events.append('restart')))"
    for worker in workers:
        worker.run(timed)
    threads = [
        threading.Thread(target=worker.run, args=("import im_pack; events.append(im_pack.twice(2))",))
        for worker in workers
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(name for worker in workers for name in worker.run("requests")) == ["im_pack"]
    for worker in workers:
        events = worker.run("events")
        assert events[-1] == 4
        assert events[:-1] in ([], ["pause", "restart"], ["pause", "restart"] * 2)
    assert any(worker.run("events")[:-1] for worker in workers)


def test_packages_without_a_file_have_parts_from_both_sides(project, node, start):
    """Parts that are served and parts that are installed on the node work together, whichever comes first."""
    (node / "im_space").mkdir()
    (node / "im_space/installed.py").write_text("w = 4\n")
    for first, second in (("tool", "installed"), ("installed", "tool")):
        worker = start(Sources())
        worker.run(f"import sys; sys.path.insert(0, {str(node)!r})")
        worker.run(f"import im_space.{first}, im_space.{second}")
        assert worker.run("(__import__('im_space.tool').tool.x, im_space.installed.w)") == (2, 4)
        assert worker.run("__import__('im_space.third').third.z") == 3
        assert worker.run("import im_space.none").startswith("ModuleNotFoundError")


def test_generations_share_what_is_equal(project, node, start):
    """Workers of two generations have each their own contents of what was edited, and one of what was not."""
    served = Sources()
    old = start(served)
    assert old.run("__import__('im_pack').twice(1)") == 2
    before = {name for name in os.listdir(node / "modules") if len(name) == 32}
    (project / "im_base.py").write_text("def double(x):\n    return 20 * x\n")
    assert served.changed()
    served.new_generation(1)
    new = start(served, 1)
    assert new.run("__import__('im_pack').twice(1)") == 20
    assert old.run("im_pack.twice(1) if 'im_pack' in globals() else __import__('im_pack').twice(1)") == 2
    after = {name for name in os.listdir(node / "modules") if len(name) == 32}
    assert len(after - before) == 1


def test_a_large_module_comes_in_pieces(project, node, start, monkeypatch):
    """Each answer is bounded; the worker asks on, and another process finds it whole."""
    monkeypatch.setattr(sources, "MAX_CONTENT", 1000)
    (project / "im_large.py").write_text(f"x = {os.urandom(4000).hex()!r}\n")
    served = Sources()
    worker, other = start(served), start(served)
    assert len(worker.run("__import__('im_large').x")) == 8000
    assert len(worker.run("requests")) > 3
    assert len(other.run("__import__('im_large').x")) == 8000
    assert other.run("requests") == []


def test_failures_are_import_errors_that_say_why(project, node, start):
    """No answer, a refusal, a damaged content and a forked child each raise an error that names node and module."""
    served = Sources()
    worker = start(served)
    answer, worker.answer = worker.answer, lambda request: None
    assert worker.run("import im_base") == (
        "ImportError: node n1 cannot ask the client for module im_base: no answer came within 600 s "
    )
    worker.answer = lambda request: answer(request.replace(b"0", b"7", 1))
    assert "generation 7" in worker.run("import im_base")
    worker.answer = lambda request: answer(request).replace(b"\x78\x01", b"\x78\x02")
    assert "node n1 cannot keep the client's module im_base" in worker.run("import im_base")
    worker.answer = answer
    # An exception of the task's own, as a handler raises it, is no failure of the import.
    worker.run("def late(*_): raise TimeoutError('its own')")
    worker.run("core = importer._Installed.importer._core; real = core.request")
    worker.run("core.request = lambda *_: late()")
    assert worker.run("import im_base").startswith("TimeoutError: its own")
    worker.run("core.request = real")
    child = (
        "import os\tdef child(name):\t r, w = os.pipe()\t if not os.fork():\t  try: __import__(name); text = 'fine'"
        "\t  except BaseException as e: text = type(e).__name__ + str(e)"
        "\t  os.write(w, text.encode()); os._exit(0)"
        "\t os.close(w); os.wait()\t return os.read(r, 1000).decode()"
    )
    worker.run(child)
    worker.run("import im_pack")
    assert worker.run("child('im_pack.sub')") == "fine"
    assert worker.run("child('yaml')").startswith("ImportErrornode n1: a process that a task forked cannot ask")
    worker.run("import subprocess, sys")
    line = "subprocess.run([sys.executable, '-c', f'import sys; sys.path[:] = {sys.path}; import im_pack']).returncode"
    assert worker.run(line) == 0


def test_a_process_that_is_killed_leaves_nothing_half(project, node, start):
    """Another one that waits for its lock takes over, and finds no broken unit."""
    served = Sources()
    worker = start(served)
    worker.run("import os, signal")
    worker.run("def die(*_):\t os.kill(os.getpid(), signal.SIGKILL)\timporter.os.rename = die")
    with pytest.raises(AssertionError, match="ended"):
        worker.run("import im_base")
    other = start(served)
    assert other.run("__import__('im_base').double(2)") == 4


def test_a_node_without_a_directory_says_so(project):
    """What user code imports there raises an error that names the remedy; optional imports of packages go on."""
    worker = Worker(Sources(), None)
    assert worker.run("__import__('joblib').__name__") == "joblib"
    error = worker.run("import im_base")
    assert error.startswith("ModuleNotFoundError: No module named 'im_base' on node n1, which has no directory")
    assert "set TMPDIR" in error
    worker.close()


def test_a_full_disk_has_no_consequences_once_there_is_room(node, monkeypatch):
    """What could not be written is no obstacle to what is written next, and neither is what a killed process left."""
    kept = Store(str(node / "modules"), 0)
    raw = pickle.dumps(("m", [("m.py", b"x = 1\n", False)]), protocol=5)
    digest, full = hashlib.sha256(raw).hexdigest()[:32], OSError(errno.ENOSPC, "No space left on device")

    def dump(told, file, protocol):
        file.write(b"half")
        raise full

    with kept.locked(9), monkeypatch.context() as patch:
        patch.setattr(pickle, "dump", dump)
        with pytest.raises(UnkeptError, match="No space left"):
            kept.write(Answer())
    assert kept.read() is None
    assert os.listdir(kept.directory) == ["lock"]
    kept.install(digest, zlib.compress(raw))
    assert sorted(os.listdir(kept.directory)) == sorted([digest, "lock"])
    assert os.listdir(kept.root(digest)) == ["m.py"]


def test_a_directory_that_is_removed_by_hand_is_made_again(project, node, start):
    """What was imported stays, and what is imported next is fetched again."""
    worker = start(Sources())
    assert worker.run("__import__('im_base').double(2)") == 4
    shutil.rmtree(node / "modules")
    assert worker.run("__import__('im_late').x") == 1
    assert worker.run("__import__('im_pack').twice(3)") == 6
