"""What the client serves of the user's modules: which are local, what a unit has, generations, changes, answers."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import threading
import types
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from skyward_lite.client import sources, units
from skyward_lite.client.sources import Sources
from skyward_lite.pickling import installed
from skyward_lite.served import Answer

EXTENSION = f"fast{importlib.machinery.EXTENSION_SUFFIXES[0]}"


def write(root: Path, files: dict[str, str | bytes]) -> None:
    """Write files, and make them old enough for their times of change to be trusted."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A directory of the user's on `sys.path`."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.syspath_prepend(str(root))
    return root


def ask(served: Sources, name: str, there: str = "", generation: int = 0) -> Answer:
    """Return the answer to a worker's request."""
    answer: Answer = pickle.loads(served.answer(f"{generation}\n{name}\n{there}".encode()))
    return answer


def files_of(answer: Answer, name: str) -> dict[str, bytes]:
    """Return the files of a unit, whose content is part of the answer."""
    digest = answer.units[name].digest
    packed = next(content for each, _, content in answer.contents if each == digest)
    return {path: data for path, data, _ in pickle.loads(zlib.decompress(packed))[1]}


def test_a_package_is_sent_whole_with_what_it_imports(project):
    """One answer has the package, its data, and the units that any of its sources imports, at whatever place."""
    write(
        project,
        {
            "sp_main/__init__.py": "from . import part\n",
            "sp_main/part.py": "import os, sp_one as one\nfrom .deep.er import x\nfrom sp_two import (\n a, # c\n b)\n",
            "sp_main/deep/er.py": (
                "def f():\n    from sp_space.tool import g; import sp_three\n    return import_module('sp_four.x')\n"
            ),
            "sp_main/data/table.csv": "1,2\n",
            "sp_main/.hidden/no.py": "",
            "sp_main/__pycache__/no.pyc": "",
            "sp_main/.env": "SECRET=1",
            f"sp_main/{EXTENSION}": "",
            "sp_main/lib.so.1.2": "",
            "sp_one.py": "import sp_five\n",
            "sp_two.py": "",
            "sp_three.py": "",
            "sp_four/__init__.py": "",
            "sp_four/x.py": "import sp_main\n",
            "sp_five.py": (
                '"""As in:\n\nimport sklearn\nNote: import sp_unused\n"""\n# so: import sklearn\nif TYPE_CHECKING:\n'
                "    import sklearn\n    from sp_unused import (\n        x,\n    )\n\nelse:\n    import numpy\n"
                "word = 'it\\'s: import sklearn'; import no_such_module"
            ),
            "sp_space/tool.py": "from .other import h\nfrom ..up import y\n",
            "sp_space/other.py": "",
            "sp_space/unused.py": "",
            "sp_unused.py": "",
            "readme.txt": "no file outside of a package is sent",
        },
    )
    served = Sources()
    answer = ask(served, "sp_main.part")
    assert served.imports == {"numpy"}
    assert sorted(answer.units) == [
        *("sp_five", "sp_four", "sp_main", "sp_one", "sp_space.other", "sp_space.tool", "sp_three", "sp_two")
    ]
    assert sorted(files_of(answer, "sp_main")) == [
        *("sp_main/__init__.py", "sp_main/data/table.csv", "sp_main/deep/er.py", "sp_main/part.py")
    ]
    assert sorted(files_of(answer, "sp_space.tool")) == ["sp_space/tool.py"]
    assert answer.namespaces >= {"sp_space"}
    assert {"sp_main", "sp_unused", "sp_space.tool"} <= answer.names
    assert not answer.names & {"numpy", "os", "sys", "pytest", "skyward_lite", "__main__", "readme"}
    (why,) = answer.units["sp_main"].refused.values()
    assert why.startswith(f"sp_main.fast is compiled (sp_main/{EXTENSION})")
    assert "Image(pip=[...])" in why


def test_what_is_there_is_not_sent_again(project):
    """Digests that the node has are left out, whatever generation they came with."""
    write(project, {"sp_a.py": "import sp_b\n", "sp_b.py": "x = 1\n"})
    served = Sources()
    first = ask(served, "sp_a")
    assert len(first.contents) == 2
    have = " ".join(unit.digest for unit in first.units.values())
    served.new_generation(1)
    again = ask(served, "sp_a", have, generation=1)
    assert (again.units, again.contents) == (first.units, [])


@pytest.mark.parametrize(
    "name", ["os.path", "json", "numpy", "pytest", "skyward_lite", "no_such_module", "a b", "__main__"]
)
def test_what_is_not_local_is_absent(name, project):
    """Workers look for installed and for unknown modules on their node."""
    answer = ask(Sources(), name)
    assert name in answer.absent
    assert not answer.contents
    assert not answer.units


def test_a_module_that_the_image_brings_is_not_sent(project):
    """Neither what `Image(includes=)` sends nor a distribution of `Image(pip=)` is local."""
    write(project, {"sp_a.py": "import sp_b, sp_c", "sp_b.py": "", "sp_c.py": ""})
    answer = ask(Sources([str(project / "sp_b.py")], ["sp-c"]), "sp_a")
    assert sorted(answer.units) == ["sp_a"]


def test_a_project_that_the_image_installs_is_not_sent(project, monkeypatch):
    """A project that is used where it is goes by the name of its distribution, also in the error for compiled code."""
    info = project / "site" / "sp_dist-2.5.dist-info"
    write(info, {"METADATA": "Metadata-Version: 2.1\nName: sp_dist\nVersion: 2.5\n", "top_level.txt": "sp_module"})
    write(info, {"direct_url.json": json.dumps({"url": project.as_uri(), "dir_info": {"editable": True}})})
    write(project, {"sp_module/__init__.py": "", f"sp_module/{EXTENSION}": "", "sp_user.py": "import sp_module"})
    monkeypatch.syspath_prepend(str(project / "site"))
    monkeypatch.syspath_prepend(str(project))
    installed.editable_projects.cache_clear()
    served = Sources()
    (why,) = ask(served, "sp_user").units["sp_module"].refused.values()
    assert "Image(pip=['sp-dist==2.5'])" in why
    module = importlib.import_module("sp_module")
    assert served.reason("sp_module", module) == ""
    assert "sp_module" in Sources().answer(b"0\nsp_module\n").decode(errors="replace")
    served = Sources(packages=["sp-dist"])
    assert sorted(ask(served, "sp_user").units) == ["sp_user"]
    assert served.reason("sp_module", module) == ""
    installed.editable_projects.cache_clear()


def test_a_zip_file_on_the_path_is_served(project, monkeypatch):
    """Its modules and packages are units as those of a directory are."""
    archive = project / "code.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("sp_zip/__init__.py", "import sp_single\n")
        opened.writestr("sp_zip/data.txt", "d")
        opened.writestr("sp_single.py", "x = 1\n")
    monkeypatch.syspath_prepend(str(archive))
    served = Sources()
    answer = ask(served, "sp_zip")
    assert files_of(answer, "sp_zip") == {"sp_zip/__init__.py": b"import sp_single\n", "sp_zip/data.txt": b"d"}
    assert files_of(answer, "sp_single") == {"sp_single.py": b"x = 1\n"}
    module = importlib.import_module("sp_zip")
    assert served.reason("sp_zip", module) == ""
    assert not served.changed()
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("sp_zip/more.py", "")
    assert served.changed()


def test_large_data_files_are_left_out_and_logged_once(project, monkeypatch, caplog):
    """Those over the bound of one file, and the largest while a package's data are over theirs; never sources."""
    monkeypatch.setattr(units, "MAX_DATA_FILE", 1000)
    monkeypatch.setattr(units, "MAX_DATA", 1500)
    write(project, {"sp_d/__init__.py": "#" * 3000, "sp_d/a": "a" * 800, "sp_d/b": "b" * 900, "sp_d/c": "c" * 1001})
    served = Sources()
    answer = ask(served, "sp_d")
    assert sorted(files_of(answer, "sp_d")) == ["sp_d/__init__.py", "sp_d/a"]
    assert answer.units["sp_d"].left_out == {"sp_d/b": 900, "sp_d/c": 1001}
    served.new_generation(1)
    ask(served, "sp_d", generation=1)
    (record,) = caplog.records
    assert "sp_d is sent to the nodes without sp_d/c (1,001 bytes), sp_d/b (900 bytes)" in record.getMessage()
    assert f"Send the whole package with Image(includes=['{project}/sp_d'])" in record.getMessage()


def test_a_unit_that_cannot_be_sent_says_why(project, monkeypatch):
    """Too many files, a file that cannot be read and a compiled module are named, with the remedy."""
    write(project, {"sp_many/__init__.py": "", "sp_many/a": "", "sp_many/b": "", f"sp_{EXTENSION}": ""})
    monkeypatch.setattr(units, "MAX_FILES", 2)
    served = Sources()
    refused = ask(served, "sp_many").refused["sp_many"]
    assert f"{project}/sp_many has more than 2 files" in refused
    assert "Image(includes=[" in refused
    assert served.reason("sp_many", importlib.import_module("sp_many")) == refused
    assert "sp_fast is compiled" in ask(served, "sp_fast").refused["sp_fast"]
    (project / "sp_broken").mkdir()
    (project / "sp_broken/__init__.py").write_text("")
    (project / "sp_broken/gone.py").symlink_to(project / "sp_broken/x.py")
    (project / "sp_broken/x.py").symlink_to(project / "nowhere")
    (project / "sp_broken/loop").symlink_to(project / "sp_broken")
    (project / "sp_broken/linked").symlink_to(project / "sp_many")
    monkeypatch.setattr(units, "MAX_FILES", 20)
    answer = ask(served, "sp_broken")
    assert sorted(files_of(answer, "sp_broken")) == [
        f"sp_broken/{path}" for path in ("__init__.py", "linked/__init__.py", "linked/a", "linked/b")
    ]


def test_a_reason_tells_which_modules_go_by_value(project, tmp_path):
    """A module that an import would not find the same way has one, all others have none."""
    write(project, {"sp_r/__init__.py": "", "sp_r/ns/inner.py": "", "sp_r/m.py": "", "calendar.py": "", "sp_o.py": ""})
    write(tmp_path, {"elsewhere/sp_o.py": "", "elsewhere/sp_q.py": ""})
    served = Sources()
    for name in ("sp_r", "sp_r.m", "sp_r.ns", "sp_r.ns.inner", "sp_o"):
        assert served.reason(name, importlib.import_module(name)) == ""
    for name in ("sp_o", "sp_q", "sp_r.q"):
        spec = importlib.util.spec_from_file_location(name, tmp_path / "elsewhere" / f"sp_{name[-1]}.py")
        assert spec is not None
        assert "elsewhere" in served.reason(name, importlib.util.module_from_spec(spec))
    assert "not loaded from a file" in served.reason("sp_made", types.ModuleType("sp_made"))
    assert "rename the module" in served.reason("calendar", types.ModuleType("calendar"))


EDITS: dict[str, Any] = {
    "edited": lambda root: write(root, {"sp_e/m.py": "x = 22\n"}),
    "edited to the same size at once": lambda root: write(root, {"sp_e/m.py": "x = 2\n"}),
    "data edited": lambda root: write(root, {"sp_e/d.txt": "e"}),
    "made a program": lambda root: (root / "sp_e/d.txt").chmod(0o700),
    "file added": lambda root: write(root, {"sp_e/new.py": ""}),
    "file removed": lambda root: (root / "sp_e/m.py").unlink(),
    "file renamed": lambda root: (root / "sp_e/m.py").rename(root / "sp_e/n.py"),
    "time set back": lambda root: (write(root, {"sp_e/m.py": "x = 2\n"}), os.utime(root / "sp_e/m.py", (1, 1))),
    "package for a module": lambda root: write(root, {"sp_f/__init__.py": ""}),
    "absent one made": lambda root: write(root, {"sp_absent.py": ""}),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("edit", EDITS)
def test_every_change_is_seen(project, monkeypatch, edit, old):
    """An edit makes `changed` true, until a generation begins with it; what is written again as it was does not."""
    write(project, {"sp_e/__init__.py": "", "sp_e/m.py": "x = 1\n", "sp_e/d.txt": "d", "sp_f.py": ""})
    if old:
        for path in (*project.rglob("*"), project):
            os.utime(path, (1, 1))
        monkeypatch.setattr(units, "FRESH_NANOS", -(10**15))  # the times of change are all trusted
    served = Sources()
    before = files_of(ask(served, "sp_e"), "sp_e")
    ask(served, "sp_f")
    assert "sp_absent" in ask(served, "sp_absent").absent
    assert not served.changed()
    assert not served.changed()
    if not old:
        write(project, {"sp_e/m.py": "x = 1\n", "unrelated.txt": "", "sp_e/__pycache__/m.pyc": ""})
        assert not served.changed()
    if old and edit == "edited to the same size at once":
        return
    EDITS[edit](project)
    assert served.changed()
    assert served.change
    assert files_of(ask(served, "sp_e"), "sp_e") == before
    served.new_generation(1)
    answer = ask(served, "sp_e", generation=1)
    ask(served, "sp_f", generation=1)
    ask(served, "sp_absent", generation=1)
    assert not served.changed()
    now = {f"sp_e/{path.relative_to(project / 'sp_e')}": path.read_bytes() for path in project.glob("sp_e/*.*")}
    assert files_of(answer, "sp_e") == now


def test_a_generation_has_one_content_and_old_ones_are_kept(project):
    """What a generation has is sent from it after edits, by digest too; a generation that is gone is an error."""
    write(project, {"sp_g.py": "x = 0\n"})
    served = Sources()
    served.snapshot(0, "sp_g")
    for generation in range(1, sources.GENERATIONS):
        write(project, {"sp_g.py": f"x = {generation}\n"})
        served.new_generation(generation)
        served.snapshot(generation, "sp_g")
    for generation in range(sources.GENERATIONS):
        answer = ask(served, "sp_g", generation=generation)
        assert files_of(answer, "sp_g") == {"sp_g.py": f"x = {generation}\n".encode()}
    served.new_generation(sources.GENERATIONS)
    assert "not kept any more" in ask(served, "sp_g").error
    for request in (b"", b"\xff", b"1", b"x\ny\nz", b"1\nabc:0\n", b"1\nabc:x\n", b"1\n../..\n"):
        assert isinstance(pickle.loads(served.answer(request)), Answer)


def test_a_large_unit_comes_in_pieces(project, monkeypatch):
    """An answer has at most so many bytes of content; the rest is asked for by digest and place."""
    monkeypatch.setattr(sources, "MAX_CONTENT", 1000)
    write(project, {"sp_l.py": os.urandom(3000).hex(), "sp_k.py": "import sp_l"})
    served = Sources()
    answer = ask(served, "sp_k")
    unit = answer.units["sp_l"]
    packed = dict.fromkeys([each for each, _, _ in answer.contents], b"")
    for digest, offset, content in answer.contents:
        assert offset == len(packed[digest])
        packed[digest] += content
    assert sum(map(len, packed.values())) <= 1000 < unit.size
    have = packed.get(unit.digest, b"")
    while len(have) < unit.size:
        ((_, _, piece),) = ask(served, f"{unit.digest}:{len(have)}").contents
        assert 0 < len(piece) <= 1000
        have += piece
    assert zlib.decompress(have)


def test_threads_that_ask_at_once_read_a_unit_once(project, monkeypatch):
    """Each gets the same content, which was read once."""
    write(project, {"sp_t.py": "x = 1\n"})
    served, made, answers = Sources(), [], []
    real = units.Unit
    monkeypatch.setattr(sources, "Unit", lambda place: made.append(place) or real(place))
    barrier = threading.Barrier(4)

    def one() -> None:
        barrier.wait(10)
        answers.append(ask(served, "sp_t").units["sp_t"].digest)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(made) == 1
    assert len(answers) == 4
    assert len(set(answers)) == 1


def test_a_directory_that_comes_later_is_searched(project, tmp_path, monkeypatch):
    """A module is found in a directory that the program puts on `sys.path` after the pool has begun."""
    served = Sources()
    assert "sp_late" in ask(served, "sp_late").absent
    write(tmp_path, {"later/sp_late.py": "x = 1\n"})
    monkeypatch.syspath_prepend(str(tmp_path / "later"))
    assert served.reason("sp_late", importlib.import_module("sp_late")) == ""
    assert "sp_late" in ask(served, "sp_late").units
    sys.modules.pop("sp_late")


def test_a_package_that_changes_while_it_is_read(project, monkeypatch):
    """No unit has files of two states, and files that come and go are no reason to send nothing."""
    write(project, dict.fromkeys(("pkg/__init__.py", "pkg/draft", "pkg/sub/c.py"), ""))
    write(project, dict.fromkeys(("pkg/a.py", "pkg/b.py"), "X = 1"))
    (project / "pkg/loop").symlink_to("loop")
    edits = {
        "__init__.py": [(project / "pkg/draft").unlink],
        "a.py": [lambda: (project / "pkg/a.py").rename(project / "pkg/moved.py")],
        "b.py": [lambda: write(project, {"pkg/moved.py": "X = 2", "pkg/b.py": "X = 2"})],
    }
    read = units._read

    def read_and_edit(path):
        found = read(path)
        for edit in edits.pop(os.path.basename(path), ()):
            edit()
        return found

    monkeypatch.setattr(units, "_read", read_and_edit)
    monkeypatch.setattr(units, "MAX_READS", 9)
    answer = ask(Sources(), "pkg")
    assert (edits, answer.refused) == ({}, {})
    files = files_of(answer, "pkg")
    assert files == {"pkg/__init__.py": b"", "pkg/moved.py": b"X = 2", "pkg/b.py": b"X = 2", "pkg/sub/c.py": b""}


def test_a_unit_is_sent_once_its_file_can_be_read(project, monkeypatch):
    """A call after the mending begins a generation, in which the unit is read again."""
    write(project, {"pkg/__init__.py": "", "pkg/data": "here"})
    data, read, served = str(project / "pkg/data"), units._read, Sources()

    def refuse(path):
        if path == data:
            raise PermissionError(13, "Permission denied", path)
        return read(path)

    monkeypatch.setattr(units, "_read", refuse)
    assert data in ask(served, "pkg").refused["pkg"]
    assert not served.changed()
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(project))
    os.chmod(data, 0o640)
    assert served.changed()
    assert served.change == data
    served.new_generation(1)
    assert files_of(ask(served, "pkg", generation=1), "pkg")["pkg/data"] == b"here"


def test_a_damaged_archive_is_named(project, monkeypatch):
    """Nothing is raised for it at the client, and it is read again once it is another one."""
    archive = project / "sp_damaged.zip"
    data = "".join(f"{number * number}\n" for number in range(500)).encode()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("sp_zipped/data", data)
        made.writestr("sp_zipped/__init__.py", "")
    whole = archive.read_bytes()
    archive.write_bytes(whole[:60] + b"\xff" * 200 + whole[260:])
    monkeypatch.syspath_prepend(str(archive))
    served = Sources()
    assert f"{archive} cannot be read" in ask(served, "sp_zipped").refused["sp_zipped"]
    archive.write_bytes(whole)
    assert served.changed()
    served.new_generation(1)
    assert files_of(ask(served, "sp_zipped", generation=1), "sp_zipped")["sp_zipped/data"] == data
