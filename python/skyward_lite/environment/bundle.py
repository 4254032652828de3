"""What a host is sent for its environment, and the digest that names the environment by whatever it is made of."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import platform
import re
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from .. import _core, credentials
from .._version import PYTHON, __version__
from ..image import Image
from .probe import Facts

_PACKED_SUFFIXES = (".py", ".sh", ".so", ".pyi", ".typed", ".js", ".css")
"""Files of a package that nodes get: all, because a task may open a pool of its own there."""

_packing = threading.Lock()
"""Held while our package is read: the hosts of a pool ask for it at once, and one of them reads it for all."""


def environment_name(image: Image) -> str:
    """Return the environment's name: a digest of everything that it is made of, except for the host's platform."""
    # Without credentials: other users can read the name, and a new token makes no other environment.
    pip, index = sorted(map(credentials.bare, image.pip)), image.index_url and credentials.bare(image.index_url)
    parts: list[object] = [image.python or PYTHON, __version__, pip, sorted(image.apt), index]
    parts.append(_package_digest() if image.wheel is None else digest(Path(image.wheel).read_bytes()))
    parts += [digest(_pack([path])) for path in image.includes]
    if image.wheelhouse is not None:
        wheels = sorted(path for path in Path(image.wheelhouse).rglob("*") if path.is_file())
        parts.append([(path.name, digest(path.read_bytes())) for path in wheels])
    return f"env-{digest(json.dumps(parts).encode())[:20]}"


def digest(data: bytes) -> str:
    """Return the SHA-256 of the data, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def files(facts: Facts, image: Image) -> Iterator[tuple[str, str, bytes]]:
    """Yield each file that the host is sent: kind, file name, content."""
    if image.wheel is not None:
        yield "wheel", Path(image.wheel).name, Path(image.wheel).read_bytes()
    elif runs_there(facts):
        yield "bundle", "bundle.zip", bundle()
    if image.wheelhouse is not None:
        yield "wheelhouse", "wheelhouse.zip", _pack([image.wheelhouse])
    if image.includes:
        yield "includes", "includes.zip", _pack(image.includes)


def runs_there(facts: Facts) -> bool:
    """Return whether this client's own package runs on the host: same system and architecture, and no older glibc."""
    needed = needed_glibc()
    return (
        sys.platform == "linux"
        and facts.system == "Linux"
        and facts.machine == platform.machine()
        # A binary that names no glibc is linked with another library, which the probe does not look for on the host.
        and bool(needed)
        # Free-threaded Python and the other load different binaries, and hosts mostly have the other.
        and "t" not in sys.abiflags
        and facts.libc >= needed
    )


@functools.cache
def needed_glibc() -> tuple[int, ...]:
    """Return the newest glibc version that our binary names."""
    assert _core.__file__ is not None
    versions = re.findall(rb"GLIBC_(\d+)\.(\d+)", Path(_core.__file__).read_bytes())
    return max(((int(a), int(b)) for a, b in versions), default=())


def bundle() -> bytes:
    """Return our package and what it needs as a zip file, to be unpacked where packages go."""
    with _packing:
        return _bundle_once()


@functools.cache
def _bundle_once() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path, data in _package():
            _add(archive, path, data)
    return packed.getvalue()


def _package() -> Iterator[tuple[str, bytes]]:
    """Yield the files of our package and of those that it needs, as they are here: path where packages go, content."""
    import cloudpickle
    import packaging

    others = [Path(str(package.__file__)).parent for package in (cloudpickle, packaging)]
    for root in (Path(__file__).parent.parent, *others):
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix in _PACKED_SUFFIXES:
                yield f"{root.name}/{path.relative_to(root)}", path.read_bytes()
    # packaging stays unknown to pip: many packages require it, and pip is to install the version that these need.
    for package, version in (("skyward_lite", __version__), ("cloudpickle", metadata.version("cloudpickle"))):
        text = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        yield f"{package}-{version}.dist-info/METADATA", text.encode()


def _package_digest() -> str:
    # Of the files: a host that has its environment needs no archive, and packing one takes ten times as long.
    with _packing:
        return _digest_once()


@functools.cache
def _digest_once() -> str:
    return digest(json.dumps([(path, digest(data)) for path, data in _package()]).encode())


def _pack(paths: Sequence[str]) -> bytes:
    """Return a zip file of the user's modules and packages or directories, each under its own name."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for root in map(Path, paths):
            if root.is_file():
                _add(archive, root.name, root.read_bytes())
            for file in sorted(root.rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    _add(archive, f"{root.name}/{file.relative_to(root)}", file.read_bytes())
    return packed.getvalue()


def _add(archive: zipfile.ZipFile, path: str, data: bytes) -> None:
    # A fixed time: the same files make the same bytes, and the same digest.
    archive.writestr(zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED, 1)
