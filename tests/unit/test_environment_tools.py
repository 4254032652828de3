"""By what an environment is made, and what is told of it meanwhile."""

from __future__ import annotations

import dataclasses
import gc
import gzip
import io
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import skyward_lite as sky
from environments import FACTS
from skyward_lite._version import PYTHON
from skyward_lite.environment import bundle, own_uv, probe, tools
from skyward_lite.environment.progress import MAX_LINE_BYTES, Progress, plain, without
from skyward_lite.environment.tools import Tools
from skyward_lite.providers.host_environment import HostEnvironment

RELEASE = platform.python_version()
PIP, UV, OWN = Tools("/usr/bin/python"), Tools("/usr/bin/python", "/usr/bin/uv"), Tools("/usr/bin/python", own=True)


@pytest.mark.parametrize(
    ("there", "unfit", "chosen"),
    [
        ({}, "", [OWN, PIP]),
        ({}, "none", [PIP]),
        ({"uv": "/usr/bin/uv"}, "", [UV, PIP]),
        ({"uv": "/usr/bin/uv", "pip_settings": "/etc/pip.conf"}, "", [PIP]),
        ({"venv": False, "pip_settings": "/etc/pip.conf"}, "", [OWN]),
        ({"venv": False, "uv": "/usr/bin/uv"}, "none", [UV]),
        ({"venv": False, "python": None}, "", [dataclasses.replace(OWN, python=None)]),
    ],
)
def test_uv_comes_first_unless_pip_has_settings(there, unfit, chosen):
    """The host's own uv, then ours, then pip, as far as each can be used."""
    assert tools.choose(dataclasses.replace(FACTS, **there), sky.Image(), lambda _: unfit) == chosen


def test_a_host_that_can_make_nothing_is_told_what_helps():
    """The version that is lacking, those that are there, and why our uv is not sent."""
    facts = dataclasses.replace(FACTS, python=None, venv=False, others=("/usr/bin/python3 3.9.2",))
    with pytest.raises(sky.NodeStartError) as caught:
        tools.choose(facts, sky.Image(python=f"{PYTHON}.99"), lambda _: "no reason")
    assert f"it has no Python {PYTHON}.99 (it has /usr/bin/python3 3.9.2), and no uv" in str(caught.value)
    assert "(no reason)" in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="only a client on Linux sends its own")
def test_our_uv_goes_where_it_runs(monkeypatch, tmp_path):
    """The same system and architecture, and no older C library; a script called uv is not sent."""
    found = own_uv.find()
    assert found is not None
    assert gzip.decompress(own_uv.packed(found).data) == Path(found.path).read_bytes()
    gc.collect()
    assert own_uv._packed is not None
    assert own_uv._packed() is None
    assert own_uv.unfit(FACTS) == ""
    for change in ({"machine": "other"}, {"libc": (2, 1)}, {"libc": ()}, {"system": "Darwin"}):
        assert bool(own_uv.unfit(dataclasses.replace(FACTS, **change))) == (bool(found.glibc) or "libc" not in change)
    script = tmp_path / "uv"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(script))
    monkeypatch.setitem(sys.modules, "uv", None)
    own_uv._find_once.cache_clear()
    try:
        assert own_uv.EXTRA in own_uv.unfit(FACTS)
    finally:
        own_uv._find_once.cache_clear()


class Link:
    """A connection to a host that has nothing, on which bytes take their time."""

    program = None

    def __init__(self) -> None:
        self.sent: list[int] = []

    def run(self, command: str, stdin: bytes, bound: float, watch: object = None) -> tuple[int, bytes, bytes]:
        self.sent.append(len(stdin))
        return 0 if stdin else 1, b"sent\n", b""


def test_our_uv_is_not_sent_over_a_slow_link_where_pip_will_do():
    """By the speed at which our package was sent: pip alone would be done before uv was there."""
    program = own_uv.find()
    assert program is not None
    packed = own_uv.packed(program)
    for speed, replaceable, goes in ((1e6, True, False), (1e6, False, True), (1e8, True, True), (0.0, True, True)):
        link = Link()
        host = HostEnvironment(link, "lab", FACTS, sky.Image())  # type: ignore[arg-type]
        host.bytes_per_second = speed
        assert bool(host._send_uv(program, replaceable)) == goes
        assert link.sent == ([0, len(packed.data)] if goes else [0])


def test_a_pythons_release_is_a_part_of_the_image():
    """The minor version must be the client's; it names the environment as None does, and a release of it another."""
    plain_name = bundle.environment_name(sky.Image())
    assert bundle.environment_name(sky.Image(python=PYTHON)) == plain_name
    assert bundle.environment_name(sky.Image(python=f"{PYTHON}.99")) != plain_name
    assert sky.Image(python=f"{PYTHON}.999").missing() == [f"Python {PYTHON}.999 is wanted, {RELEASE} is installed"]
    script = probe.verify_script(sys.executable, sky.Image(python=f"{PYTHON}.999"))
    done = subprocess.run(["sh", "-s"], input=script, capture_output=True, timeout=30, check=True)
    assert f"problem=Python {PYTHON}.999 is wanted, {RELEASE} is installed\n" in done.stdout.decode()
    assert sky.Image(python=RELEASE).missing() == sky.Image(python=PYTHON).missing() == []
    for wrong in (
        "2.7",
        "3",
        "",
        f"{PYTHON}.",
        f"{PYTHON}.x",
        f"{PYTHON}.1.2",
        f">={PYTHON}",
        f"{PYTHON}\n",
        3.11,
        b"3",
    ):
        with pytest.raises(ValueError, match=r"Image\(python=") as caught:
            sky.Image(python=wrong)
        assert f'"{PYTHON}"' in str(caught.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("Collecting numpy>=1 (from scipy)", "looking for numpy>=1"),
        (
            "Downloading numpy-2.1.0-cp311-cp311-manylinux_2_17.whl (16.0 MB)",
            "downloading numpy 2.1.0 (16.0 MB)",
        ),
        ("Downloading http://h/a/scikit_learn-1.5.tar.gz (2 kB)", "downloading scikit-learn 1.5 (2 kB)"),
        ("Using cached joblib-1.4.2-py3-none-any.whl (301 kB)", "downloading joblib 1.4.2 (301 kB)"),
        ("Building wheel for lab (pyproject.toml): started", "building lab"),
        ("Installing collected packages: a, b", "installing 2 packages"),
        ("Installing collected packages: a", "installing a"),
        ("Downloading numpy (16.1MiB)", "downloading numpy (16.1MiB)"),
        ("Downloading cpython-3.11.9-linux-x86_64-gnu (download) (28.1MiB)", "downloading Python 3.11.9 (28.1MiB)"),
        ("Building lab==1.0", "building lab 1.0"),
        ("# making it", "making it"),
        ("Resolved 3 packages in 1ms", None),
        ("error: no such package", None),
        ("", None),
    ],
)
def test_lines_of_pip_and_uv_in_plain_words(line, told):
    """What begins is told; anything else is not."""
    assert plain(line) == told


def test_one_line_for_each_call():
    """The last thing that began, and all packages that were installed, however the bytes are cut."""
    told: list[str] = []
    progress = Progress(told.append, ["s3cretword"])
    output = b"== skyward_lite ==\nroot=/a\nCollecting no\nprogress=Collecting a\nprogress=Collecting b\n"
    for at in range(len(output)):
        progress(output[at : at + 1], b"")
    progress(b"progress=Collecting c\nprogress=Collecting d\n", b"error: x\n")
    progress(b"", b" + a==1.0\n + b==2.0\nInstalled 2 packages\n" + b" + c==1\n" * 8)
    progress(b"progress=Successfully installed numpy-2.1.0 a-b-1\n", b"")
    progress(b"", b"Building s3cretword\n")
    progress(b"progress=Collecting a @ git+https://user:word@host/a\n", b"")
    progress(b"", b"Building x\x1b[2J\nerror\n")
    progress(b"", b"Building " + b"a" * MAX_LINE_BYTES)
    progress(b"", b"b" * 100 + b"\nBuilding c\n")
    assert told == [
        *("looking for a", "looking for b", "looking for d"),
        "installed a 1.0, b 2.0, c 1, c 1, c 1, c 1, c 1, c 1 and 2 more",
        "installed numpy 2.1.0, a-b 1",
        *("building ***", "looking for a @ git+https://***@host/a", r"building x\x1b[2J"),
        "building c",
    ]


def test_errors_have_no_lines_of_progress():
    """Only the reason of a failure is left."""
    printed = "Using CPython 3.11.7\n  | Downloading a (16MiB)\n  |  + a==1\n  | error: no network\n  |   cause: dns"
    assert without(printed) == "error: no network\n  |   cause: dns"


@pytest.mark.parametrize(
    ("needed", "there", "flags", "runs"),
    [
        ((2, 17), {"libc": (2, 17)}, "", True),
        ((2, 17), {"libc": (2, 12)}, "", False),
        ((2, 17), {"libc": ()}, "", False),
        ((2, 17), {"libc": (2, 17), "machine": "riscv64"}, "", False),
        ((), {"libc": (2, 36)}, "", False),
        ((), {"libc": ()}, "", False),
        ((2, 17), {"libc": (2, 17)}, "t", False),
    ],
    ids=["equal", "older", "musl there", "another machine", "musl here", "musl on both", "free-threaded here"],
)
def test_our_package_is_sent_only_where_its_binary_runs(monkeypatch, needed, there, flags, runs):
    """A host is sent our package if its glibc is new enough for it, and never a binary that may not load there."""
    monkeypatch.setattr(bundle, "needed_glibc", lambda: needed)
    monkeypatch.setattr(sys, "abiflags", flags)
    facts = dataclasses.replace(FACTS, **{"system": "Linux", "machine": platform.machine(), **there})
    assert bundle.runs_there(facts) is runs


def test_hosts_are_sent_all_of_our_package():
    """A host gets each file of the package, because a task may open a pool of its own there."""
    root = Path(sky.__file__).parent
    ours = {f"skyward_lite/{path.relative_to(root)}" for path in root.rglob("*") if path.is_file()}
    with zipfile.ZipFile(io.BytesIO(bundle.bundle())) as archive:
        assert {name for name in ours if "__pycache__" not in name} <= set(archive.namelist())
