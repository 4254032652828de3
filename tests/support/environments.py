"""Environments on the hosts of a lab: pools that make them, wheels to install in them, and a host's facts."""

from __future__ import annotations

import io
import platform
import sys
import zipfile
from pathlib import Path

import pytest
import skyward_lite as sky
from lab import Lab, Sshd
from skyward_lite._version import PYTHON
from skyward_lite.environment import bundle, probe

FACTS = probe.read_facts(
    {
        "root": ["/a 'b' $c/x"],
        "system": ["Linux"],
        "machine": [platform.machine()],
        "libc": ["glibc 99.9"],
        "python": ["/usr/bin/python"],
        "venv": ["yes"],
        "free": ["999999999"],
    }
)
"""What the probe script reports of a host that can have an environment."""
BARE_TOOLS = (
    *("sh", "mkdir", "rm", "mv", "cat", "head", "wc", "chmod", "ln", "readlink", "rmdir"),
    *("id", "uname", "getconf", "df", "awk", "sleep", "date", "ls", "stat", "touch"),
)
"""Programs of a host that has neither Python nor uv, nor gzip."""


def open_pool(lab: Lab, host: Sshd, image: sky.Image | None = None) -> sky.ComputePool:
    """Return a pool of one host, not yet entered."""
    provider = sky.SSH(host.name, config=lab.config)
    return sky.pool(provider, image=image or sky.Image(), worker=sky.Worker(concurrency=1), plugins=[])


def refusal(lab: Lab, host: Sshd, image: sky.Image | None = None) -> str:
    """Return the error with which a pool of one host does not start."""
    with pytest.raises(sky.NodeStartError) as caught:
        open_pool(lab, host, image).__enter__()
    return str(caught.value)


def make_wheel(directory: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    """Make a wheel that pip installs."""
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: lab\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = directory / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in files.items():
            archive.writestr(file, data)
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"]))
    return path


def own_wheel(directory: Path) -> Path:
    """Make a wheel of this very package, and of what it needs."""
    with zipfile.ZipFile(io.BytesIO(bundle.bundle())) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if ".dist-info" not in name}
    return make_wheel(directory, "skyward_lite", sky.__version__, files)


def without_ensurepip(directory: Path, python: Path) -> None:
    """Make `python` an interpreter that lacks what Debian's lacks without its python3-venv."""
    place = directory / "broken"
    packages = place / f"lib/python{PYTHON}/site-packages"
    packages.mkdir(parents=True)
    (packages / "broken.pth").write_text("import sys; sys.modules['ensurepip'] = None\n")
    base = Path(sys._base_executable)  # type: ignore[attr-defined]
    (place / "pyvenv.cfg").write_text(f"home = {base.parent}\n")
    (place / "bin").mkdir()
    (place / "bin/python").symlink_to(base)
    python.write_text(f"#!/bin/sh\nexec '{place}/bin/python' \"$@\"\n")
    python.chmod(0o755)
