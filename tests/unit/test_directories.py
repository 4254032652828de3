"""Which directories an agent may have on a host, and what is said of the others."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from skyward_lite.node import directories

KEY = "0123456789abcdef"
NAME = f"skyward-lite-{KEY}"


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory of this user's own, whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


def problem(base: Path | str) -> str:
    """Return why a directory in `base` cannot be used."""
    with pytest.raises(directories.UnusableError) as raised:
        directories.prepare(str(base), KEY)
    return str(raised.value)


def test_a_directory_is_made_once_and_has_one_lock(base: Path) -> None:
    """The directory is the user's alone, is found again, and is locked by one process at a time."""
    path, fd = directories.prepare(str(base), KEY)
    _, other = directories.prepare(str(base), KEY)
    assert Path(path) == base / NAME
    assert Path(path).stat().st_mode & 0o777 == 0o700
    assert directories.take_lock(fd)
    assert not directories.take_lock(other)
    assert directories.is_there(path, other)
    directories.remove(path)
    assert not directories.is_there(path, fd)
    assert not base.joinpath(NAME).exists()
    os.close(fd)
    os.close(other)


@pytest.mark.parametrize("what", ["link", "dangling link", "file", "mode", "owner"])
def test_what_took_the_directorys_name_is_not_used(base: Path, what: str) -> None:
    """A link, a file, and a directory that other users may enter are refused, with the remedy."""
    path = base / NAME
    if what == "mode":
        path.mkdir()
        path.chmod(0o770)
        assert problem(base) == f"{path}: other users may enter it (mode 0770): remove it"
    elif what == "owner":
        if os.getuid() != 0:
            pytest.skip("only root can give files away")
        path.mkdir(0o700)
        os.chown(path, 65534, -1)
        assert problem(base) == f"{path}: it belongs to user 65534: remove it"
    else:
        path.write_text("") if what == "file" else path.symlink_to("/tmp" if what == "link" else base / "none")
        assert problem(base) == f"{path}: it is no directory: remove it"


def test_no_other_user_could_replace_the_directory(base: Path) -> None:
    """Neither the directory nor those above it may be changed by others, but for those with the sticky bit."""
    inner = base / "inner"
    inner.mkdir()
    base.chmod(0o777)
    assert problem(inner) == f"{inner}: everybody may replace files in {base}: `chmod +t {base}`"
    base.chmod(0o1777)
    os.close(directories.prepare(str(inner), KEY)[1])
    if os.getuid() == 0:
        os.chown(base, 0, 65534)
        base.chmod(0o770)
        assert problem(inner) == f"{inner}: its group may replace files in {base}: `chmod g-w {base}`"
        os.chown(base, 65534, 0)
        base.chmod(0o755)
        assert "belongs to user 65534: set TMPDIR to a directory of your own" in problem(inner)
        os.chown(base, 0, 0)


def test_a_message_names_the_directory_and_the_remedy(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing and long paths, and file systems that are full or cannot be written to, are told apart."""
    assert problem(base / "none") == (
        f"{base}/none: No such file or directory: make this directory, or set TMPDIR to another one"
    )
    assert "too long for a Unix socket: set TMPDIR to a shorter one" in problem(base / ("x" * 80))
    for code, remedy in [(errno.ENOSPC, "free space there"), (errno.EROFS, "set TMPDIR to a directory that can be")]:

        def fail(*_: object, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "mkdir", fail)
        assert re.fullmatch(f"{base}: {os.strerror(code)}: {remedy}.*", problem(base))


def test_where_directories_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """TMPDIR comes first unless it is relative or long; the last is in the home directory, also without HOME."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    last = ["/tmp", "/home/me/.cache/skyward_lite/run"]
    for value, found in {"/scratch": ["/scratch"], "/tmp": [], "scratch": [], "": [], f"/{'x' * 64}": []}.items():
        monkeypatch.setenv("TMPDIR", value)
        assert directories.bases() == [*found, *last]
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert directories.bases() == last
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert directories.bases()[-1] == "/cache/skyward_lite/run"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    (home,) = directories.bases()[1:]
    assert home.endswith("/.cache/skyward_lite/run")
    assert home.startswith("/")
