"""What a release is made of agrees with itself, and says on Windows what to do there."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import release
import skyward_lite as sky

ROOT = Path(__file__).parent.parent.parent
METADATA = importlib.metadata.metadata("skyward_lite")


@pytest.fixture
def copy(tmp_path):
    """Return a directory with the files that a release changes."""
    for place in [*release.PLACES, "CHANGELOG.md", "README.md", "pyproject.toml"]:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / place, tmp_path / place)
    return tmp_path


def test_the_version_is_the_same_everywhere():
    """Cargo, the package, its metadata, the citation and the changelog's newest release have one version."""
    (version,) = set(release.versions().values())
    assert version == sky.__version__ == METADATA["Version"]
    assert release.released()[:1] in ([], [version])


def test_a_new_version_is_written_everywhere(copy):
    """`make version` sets all files and the changelog's heading; another tag is refused with each reason."""
    assert release.differences("v9.8.7", copy) != []
    for version in ("9.8.7rc1", "9.8.7"):
        release.set_version(version, copy)
        assert set(release.versions(copy).values()) == {version}
        assert release.differences(f"v{version}", copy) == []
    assert tomllib.loads((copy / "rust/Cargo.toml").read_text())["package"]["version"] == "9.8.7"
    assert release.released(copy)[:2] == ["9.8.7", "9.8.7rc1"]
    problems = release.differences("v9.8.8", copy)
    assert len(problems) == len(release.PLACES) + 1
    assert "CITATION.cff has 9.8.7, and the tag is v9.8.8" in problems


def test_links_of_a_release_lead_to_its_repository(copy):
    """In the README of a release, links and pictures of the checkout are absolute; other links are as they were."""
    (copy / "README.md").write_text(
        '[a](docs/a.md#b) ![c](docs/_static/c.svg) [d](https://example.org/d) [e](#e) <img src="docs/f.png" alt="f">'
    )
    release.add_links("https://example.org", "v1.2.3", copy)
    assert (copy / "README.md").read_text() == (
        "[a](https://example.org/blob/v1.2.3/docs/a.md#b) ![c](https://example.org/raw/v1.2.3/docs/_static/c.svg) "
        '[d](https://example.org/d) [e](#e) <img src="https://example.org/raw/v1.2.3/docs/f.png" alt="f">'
    )
    urls = tomllib.loads((copy / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Changelog"] == "https://example.org/blob/v1.2.3/CHANGELOG.md"


def test_metadata_names_what_is_supported():
    """The package's metadata have the extras, the versions of Python that are tested, and no promise for Windows."""
    assert {"aws", "rich", "uv", "all"} <= set(METADATA.get_all("Provides-Extra"))
    needs = [line.partition(";") for line in METADATA.get_all("Requires-Dist")]
    aws, rich, uv, every = (
        {need.strip() for need, _, extra in needs if f"'{name}'" in extra} for name in ("aws", "rich", "uv", "all")
    )
    assert every == aws | rich | uv
    assert aws
    classifiers = METADATA.get_all("Classifier")
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    tested = [
        line.rpartition(" ")[2] for line in classifiers if line.startswith("Programming Language :: Python :: 3.")
    ]
    listed = ", ".join(f'"{version}"' for version in tested)
    assert f"python: [{listed}]" in workflow
    assert not [line for line in classifiers if "Windows" in line]


def test_windows_is_told_about_wsl():
    """On Windows importing the package, and building it, end at once with a sentence that names WSL."""
    windows = "import sys; sys.platform = 'win32'; "
    for code, directory in (("import skyward_lite", ROOT), ("import build_backend", ROOT / "rust")):
        done = subprocess.run(
            [sys.executable, "-c", windows + code],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 1
        assert "Linux and macOS. On Windows" in done.stderr
        assert "within WSL" in done.stderr


def test_a_missing_core_says_how_to_get_it(tmp_path):
    """Where the compiled part is missing, or cannot be loaded, the error has the command that mends it."""
    sources = tmp_path / "skyward_lite"
    shutil.copytree(ROOT / "python/skyward_lite", sources, ignore=shutil.ignore_patterns("_core.*.so", "__pycache__"))
    for core in (None, b"made for another system"):
        if core is not None:
            (sources / "_core.abi3.so").write_bytes(core)
        command = [sys.executable, "-c", "import skyward_lite; skyward_lite.pool"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 1
        assert "ImportError" in done.stderr
        assert "in a checkout, `make build`" in done.stderr


def test_the_platforms_page_has_what_is_built():
    """The page of platforms has the versions that are tested, the oldest glibc of the wheels, and no platform more."""
    page = (ROOT / "docs/platforms.md").read_text()
    workflow = (ROOT / ".github/workflows/release.yml").read_text()
    built = set(re.findall(r"name: (manylinux|musllinux|macos)-(\w+)", workflow))
    assert built == {(system, cpu) for system in ("manylinux", "musllinux") for cpu in ("x86_64", "aarch64")} | {
        ("macos", "x86_64"),
        ("macos", "arm64"),
    }
    assert set(re.findall(r'manylinux-.*policy: "(\S+)"', workflow)) == {"2_17"}
    assert "--compatibility manylinux_2_17 " in (ROOT / "Makefile").read_text()
    assert set(re.findall(r"glibc (\d\.\d+)", page)) == {"2.17"}
    first, *others = re.findall(r"Python :: (3\.\d+)", " ".join(METADATA.get_all("Classifier")))
    assert f"Python {', '.join([first, *others[:-1]])} and {others[-1]}, on Ubuntu 24.04" in page
