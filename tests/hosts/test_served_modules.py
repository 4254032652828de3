"""A user's modules work on SSH hosts that never saw them: own file system, own interpreter, two nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import skyward_lite as sky

DATA_BYTES = 300_000

FILES = {
    "sv_pack/__init__.py": """
        from .model import Model, Point
        from .deep.tools import scaled
    """,
    "sv_pack/model.py": """
        import dataclasses
        import sv_base
        from . import deep

        @dataclasses.dataclass
        class Point:
            x: int
            y: int = 0

        class Model(sv_base.Base):
            def answer(self):
                return super().answer() + 1
    """,
    "sv_pack/deep/__init__.py": "",
    "sv_pack/deep/tools.py": """
        import importlib.resources
        import inspect
        import os
        from pathlib import Path
        from ..model import Point

        def scaled(point, factor):
            import sv_function_level
            return Point(point.x * factor, sv_function_level.VALUE)

        def looks():
            data = importlib.resources.files("sv_pack").joinpath("data/table.bin").read_bytes()
            beside = (Path(__file__).parent.parent / "data/table.bin").read_bytes()
            return len(data), data == beside, inspect.getsource(scaled), __file__, os.listdir(os.getcwd())

        def fails():
            raise LookupError("on the node")
    """,
    "sv_base.py": """
        class Base:
            def answer(self):
                return 41
    """,
    "sv_function_level.py": "VALUE = 7",
    "sv_entry.py": """
        def entry(path, count):
            import os, time, pathlib
            pathlib.Path(path, f"{os.getpid()}-{time.monotonic_ns()}").touch()
            until = time.monotonic() + 20
            while len(os.listdir(path)) < count and time.monotonic() < until:
                time.sleep(0.01)
            from sv_space import part
            import sv_editable, sv_pack.deep.tools
            return part.NAME, sv_editable.NAME, sv_pack.deep.tools.looks(), os.getppid()
    """,
    "space/sv_space/part.py": "NAME = 'a part'",
    "editable/src/sv_editable.py": "NAME = 'editable'",
    "site/sv_editable-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: sv-editable\nVersion: 1.0\n",
    "site/sv_editable-1.0.dist-info/top_level.txt": "sv_editable",
    "site/sv_space_other/__init__.py": "",
    "script.py": """
        import json, sys, traceback
        import skyward_lite as sky
        import sv_base, sv_entry, sv_pack

        class Own(sv_pack.Model):
            def answer(self):
                return super().answer() * 2

        names, config, executor, shared = sys.argv[1].split(), *sys.argv[2:]
        worker = sky.Worker(concurrency=2, executor=executor)
        with sky.pool(sky.SSH(*names, config=config), nodes=len(names), worker=worker, plugins=[]) as pool:
            before = pool._core.traffic()
            slots = 2 * len(names)
            seen = [pool.submit(sv_entry.entry, shared, slots) for _ in range(slots)]
            seen = [future.result(40) for future in seen]
            sent = [after[0] - first[0] for first, after in zip(before, pool._core.traffic())]
            point = pool.submit(sv_pack.scaled, sv_pack.Point(3), 5).result(20)
            own = pool.submit(lambda model: (model, model.answer()), Own()).result(20)
            try:
                pool.submit(sv_pack.deep.tools.fails).result(20)
            except LookupError as error:
                trace = "".join(traceback.format_exception(error))
        print(json.dumps({
            "seen": seen, "sent": sent, "answer": own[1], "trace": trace,
            "same": [type(point) is sv_pack.Point, point == sv_pack.Point(15, 7), type(own[0]) is Own,
                     isinstance(own[0], sv_base.Base)],
        }))
    """,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The user's files."""
    root = tmp_path_factory.mktemp("served") / "project"
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.splitlines()
        indent = len(lines[1]) - len(lines[1].lstrip()) if text.startswith("\n") else 0
        path.write_text("\n".join(line[indent:] for line in lines) + "\n")
    (root / "sv_pack/data").mkdir()
    (root / "sv_pack/data/table.bin").write_bytes(os.urandom(DATA_BYTES))
    origin = {"url": (root / "editable").as_uri(), "dir_info": {"editable": True}}
    (root / "site/sv_editable-1.0.dist-info/direct_url.json").write_text(json.dumps(origin))
    return root


@pytest.fixture(scope="module")
def hosts(lab, project) -> list[str]:
    """Two hosts with an interpreter of their own, on which the user's files are not there."""
    found = []
    for _ in range(2):
        host = lab.host(hidden=project if os.getuid() == 0 else None)
        host.make_environment(sky.Image())
        found.append(host.name)
    return found


def run(lab: Any, project: Path, names: list[str], executor: str, shared: Path) -> Any:
    """Run the user's script, and return what it prints."""
    path = [str(project / directory) for directory in ("space", "editable/src", "site")]
    command = [sys.executable, str(project / "script.py"), " ".join(names), lab.config, executor, str(shared)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_a_project_works_on_nodes_that_never_saw_it(lab, project, hosts, tmp_path, executor):
    """Relative imports, data, dataclasses, subclasses, function-level imports, a namespace part, an editable install.

    Each node gets the files once, whatever the number of its processes; what comes back has the client's classes.
    """
    found = run(lab, project, hosts, executor, tmp_path)
    for name, editable, (size, is_same, source, file, working), _ in found["seen"]:
        assert (name, editable, size, is_same, working) == ("a part", "editable", DATA_BYTES, True, [])
        assert source.startswith("def scaled(point, factor):\n")
        assert not file.startswith(str(project))
    assert len({agent for _, _, _, agent in found["seen"]}) == 2
    for sent in found["sent"]:
        assert DATA_BYTES < sent < 1.3 * DATA_BYTES
    assert found["same"] == [True] * 4
    assert found["answer"] == 84
    assert '--> raise LookupError("on the node")' in found["trace"]
    assert str(project / "sv_pack") not in found["trace"].split("The above exception")[0]
