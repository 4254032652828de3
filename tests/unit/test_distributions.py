"""What is known of installed distributions, and what `Image.like_here` makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from skyward_lite import distributions
from skyward_lite.distributions import same_version


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1.2", "1.2", True),
        ("1.2", "1.2.0", True),
        ("1.0", "1", True),
        ("2.3.0", "2.3.0+cpu", True),
        ("2.3.0+cu121", "2.3.0+cpu", True),
        ("1.0rc1", "1.0.RC.1", True),
        ("1.0.0.post1", "1.0-1", True),
        ("1.10", "1.1", False),
        ("1.2", "1.2.1", False),
        ("1.2", "1.2rc1", False),
        ("not a version", "not a version", True),
        ("not a version", "1.2", False),
        ("", "1.2", False),
        ("1!1.0", "1.0", False),
    ],
)
def test_versions_are_compared_by_their_public_part(one, other, same):
    """PEP 440 decides; local labels do not count, and a text that is no version equals itself only."""
    assert same_version(one, other) == same_version(other, one) == same


def installed_in(directory: Path, name: str, version: str, files: dict[str, str], url: str = "") -> None:
    """Install a distribution into a directory, as pip does; `url` is the text of its direct_url.json."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    requires = files.pop("requires", "")
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    if url:
        files[f"{info}/direct_url.json"] = url
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in files)
    for file, text in files.items():
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_text(text)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A directory of packages: a namespace of two distributions, one with a label, and some from elsewhere."""
    directory = tmp_path / "site-packages"
    install = [
        ("lab-cloud", "1.0", {"labspace/cloud/__init__.py": "", "requires": "Requires-Dist: lab-base>=1\n"}, ""),
        ("lab-base", "2.0", {"labspace/base.py": ""}, ""),
        ("lab-labelled", "3.0+cpu", {"lablabelled.py": ""}, ""),
        ("lab-optional", "4.0", {"laboptional.py": ""}, ""),
        ("lab-vcs", "5.0", {"labvcs.py": ""}, vcs("https://host/vcs")),
        ("lab-archive", "6.0", {"labarchive.py": ""}, '{"url": "https://host/a.whl", "archive_info": {}}'),
        ("lab-directory", "7.0", {"labdirectory.py": ""}, '{"url": "file:///srv/lab", "dir_info": {}}'),
        ("lab-editable", "8.0", {}, '{"url": "file:///srv/e", "dir_info": {"editable": true}}'),
        ("lab-broken", "9.0", {"labbroken.py": ""}, "{"),
        ("lab-unused", "10.0", {"labunused.py": ""}, ""),
    ]
    for name, version, files, url in install:
        installed_in(directory, name, version, dict(files), url)
    return directory


def vcs(url: str) -> str:
    return json.dumps({"url": url, "vcs_info": {"vcs": "git", "commit_id": "abc"}})


@pytest.fixture
def fresh(packages, monkeypatch):
    """These packages are installed, and nothing is known of them yet."""
    monkeypatch.syspath_prepend(packages)
    cached = (distributions._read_homes, distributions._files, distributions.described)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize(
    ("module", "requirements"),
    [
        ("labspace.cloud", ["lab-cloud==1.0"]),
        ("labspace.cloud.Thing", ["lab-cloud==1.0"]),
        ("labspace.base", ["lab-base==2.0"]),
        ("labspace.mine", []),
        ("labspace", []),
        ("lablabelled", ["lab-labelled==3.0"]),
        ("labvcs", ["lab-vcs @ git+https://host/vcs@abc"]),
        ("labarchive", ["lab-archive @ https://host/a.whl"]),
        ("labdirectory", [""]),
        ("labbroken", ["lab-broken==9.0"]),
        ("nothing_of_that_name", []),
        ("os.path", []),
        ("skyward_lite.image", []),
    ],
)
@pytest.mark.usefixtures("fresh")
def test_a_module_is_of_the_distributions_that_have_it(module, requirements):
    """Parts of a namespace are told apart by their files; what did not come from an index is installed by its URL."""
    assert [each.requirement for each in distributions.of_module(module)] == requirements


# ------------------------------------------------------------------------------------------------ like_here

FILES = {
    "helpers.py": "from labspace import cloud\nfrom tools import work\n",
    "tools/__init__.py": "",
    "tools/work.py": "from . import further\n",
    "tools/further.py": "def f():\n    import lablabelled\n",
    "tools/unused.py": "import labunused\n",
    "notthere.py": "import labvcs, labarchive, labdirectory, no_such_package\n",
}
SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
import skyward_lite as sky
import helpers
if len(sys.argv) > 1:
    import laboptional

def later():
    import notthere

print(*sky.Image.like_here(pip=["lab-base>=2"], env={"A": "1"}).pip, sep="\\n")
"""


def run(directory: Path, packages: Path, *command: str, stdin: str = "") -> tuple[list[str], str]:
    """Run Python in a directory, with these packages installed. Return the lines that it printed, and its errors."""
    done = subprocess.run(
        [sys.executable, *command],
        input=stdin,
        cwd=directory,
        env={"PYTHONPATH": str(packages), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_a_script_is_pinned_to_what_it_imports(packages, tmp_path):
    """Pinned is what the script and its local modules import, run or not, and what that requires; the log tells the
    rest.
    """
    for name, text in {**FILES, "script.py": SCRIPT, "app/__init__.py": "", "app/__main__.py": SCRIPT}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    expected = ["lab-cloud==1.0", "lab-labelled==3.0", "lab-optional==4.0", "lab-base>=2"]
    printed, log = run(tmp_path, packages, "script.py")
    assert printed == expected
    assert "WARNING" in log
    assert "3.0+cpu is pinned as lab-labelled==3.0" in log
    assert "lab-directory was installed from file:///srv/lab, which nodes do not have" in log
    assert "add pip=['lab-vcs @ git+https://host/vcs@abc']" in log
    assert "add pip=['lab-archive @ https://host/a.whl']" in log
    assert run(tmp_path, packages, "-m", "app")[0] == expected
    # Of a program without a source its functions are known, and its modules, and whose values it has.
    assert run(tmp_path, packages, "-", stdin=SCRIPT)[0] == [line for line in expected if "optional" not in line]
    named = "import skyward_lite as sky; from numpy import pi, array, float64; from helpers import cloud"
    instance = "import skyward_lite as sky; import decimal; a = __import__('numpy').zeros(3); del decimal"
    for session, pinned in ((named, ["lab-base", "lab-cloud", "numpy"]), (instance, ["numpy"])):
        printed, _ = run(tmp_path, packages, "-c", f"{session}; print(*sky.Image.like_here().pip, sep='\\n')")
        assert [line.split("==")[0] for line in printed] == pinned


def test_a_module_may_ask_for_a_program_that_is_installed(packages, tmp_path):
    """Below pytest or another installed program, the program is the module that asks, and not what runs it."""
    (tmp_path / "helpers.py").write_text("from labspace import base\n")
    (tmp_path / "test_it.py").write_text(
        "import skyward_lite as sky, helpers\ndef test():\n    print(*sky.Image.like_here().pip, sep='\\n')\n"
    )
    for command in (["-m", "pytest"], [str(Path(sys.executable).with_name("pytest"))]):
        printed, _ = run(tmp_path, packages, *command, "-q", "-s", "-p", "no:cacheprovider", "test_it.py")
        assert "lab-base==2.0" in printed
        assert not [line for line in printed if line.startswith("pytest==")]
