"""uv makes environments: the host's, or our own copy, which is sent once; where it cannot be used, pip."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import skyward_lite as sky
import uv
from environments import BARE_TOOLS, make_wheel, open_pool, refusal, without_ensurepip
from lab import UNSET_PIP, Lab, Sshd, check, machine, program
from mirror import Mirror, pack_python
from proxy import before
from skyward_lite._version import PYTHON
from skyward_lite.environment import build, own_uv, scripts

SHIPPED = pytest.mark.skipif(
    any(Path(f"{place}/python{PYTHON}").exists() for place in ("/usr/local/bin", "/opt/python/bin")),
    reason="this machine has a Python in a place that is always looked at",
)
RELEASE = platform.python_version()


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Iterator[Mirror]:
    """An index with one package of 1.5 MB, and a Python."""
    root = tmp_path_factory.mktemp("mirror")
    make_wheel(root, "labpackage", "1.0", {"labpackage.py": b"answer = 42\n", "labdata.bin": os.urandom(1_500_000)})
    pack_python(root / "python.tar.gz")
    mirror = Mirror(root)
    yield mirror
    mirror.close()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def tools(directory: Path, *names: str) -> Path:
    """Make a directory for PATH with these programs."""
    directory.mkdir()
    for name in names:
        (directory / name).symlink_to(shutil.which(name, path="/usr/bin:/bin") or "/nonexistent")
    return directory


def image(mirror: Mirror, **options: str) -> sky.Image:
    return sky.Image(pip=["labpackage==1.0"], index_url=f"{mirror.url}/simple", **options)


def sent(host: Sshd) -> list[Path]:
    """List the copies of uv on a host."""
    return list((host.cache / "skyward_lite").glob("sent-*/uv"))


def logged(caplog) -> list[str]:
    """Return what the log has of a build, without the host's name."""
    return [record.getMessage().partition(": ")[2] for record in caplog.records]


@SHIPPED
def test_a_bare_account_gets_everything_through_our_uv(lab, mirror, tmp_path, caplog):
    """Python, environment and packages; the next pool with another image is sent neither uv nor Python again.

    The Python stays as long as an environment of it does.
    """
    caplog.set_level(logging.INFO, "skyward_lite")
    env = {
        "PATH": str(tools(tmp_path / "bare", *BARE_TOOLS)),
        "UV_PYTHON_DOWNLOADS_JSON_URL": mirror.python_list("python.tar.gz"),
    }
    host = lab.host(env={**UNSET_PIP, **env})
    proxy = before(lab, host)
    with open_pool(lab, host, image(mirror, python=RELEASE)) as pool:
        assert pool.submit(eval, "__import__('labpackage').answer").result(20) == 42
        prefix = Path(pool.submit(eval, "__import__('sys').base_prefix").result(20))
    program = own_uv.find()
    assert program is not None
    assert proxy.up.bytes > program.size
    downloaded = host.cache / f"skyward_lite/pythons/cpython-{RELEASE}-linux-{platform.machine()}-gnu"
    assert prefix.resolve() == downloaded
    lines = logged(caplog)
    assert f"sending our own copy of uv, {program.size / 1e6:.1f} MB" in lines
    assert any(line.startswith(f"downloading Python {RELEASE} (") for line in lines)
    assert "installed labpackage 1.0" in lines

    (copy,) = sent(host)
    before_it, crossed = copy.stat(), proxy.up.bytes
    caplog.clear()
    with open_pool(lab, host) as pool:
        assert pool.submit(sum, [1, 2]).result(20) == 3
    assert (copy.stat().st_ino, copy.stat().st_mtime) == (before_it.st_ino, before_it.st_mtime)
    assert proxy.up.bytes - crossed < 1_000_000
    assert not any("sending" in line or "downloading" in line for line in logged(caplog))

    os.utime(downloaded, (0, 0))
    swept(lab, host)
    assert downloaded.exists()
    for ready in (host.cache / "skyward_lite").glob("env-*/ready"):
        os.utime(ready, (0, 0))
    swept(lab, host)
    assert not downloaded.exists()
    assert sent(host) == [copy]


def swept(lab: Lab, host: Sshd) -> None:
    """Remove from a host what nothing has used for a day."""
    with machine(lab, host.name) as (one, core):
        assert scripts.run(one.connect(core), build.clean_script(86400, dry_run=False), 30.0).status == 0


@SHIPPED
def test_a_python_that_cannot_be_downloaded(lab, tmp_path):
    """The error has uv's own reason, and the remedies."""
    (tmp_path / "pythons.json").write_text("{}")
    env = {
        "PATH": str(tools(tmp_path / "bare", *BARE_TOOLS)),
        "UV_PYTHON_DOWNLOADS_JSON_URL": f"{tmp_path}/pythons.json",
    }
    error = refusal(lab, lab.host(env={**UNSET_PIP, **env}))
    assert f"uv finds no Python {PYTHON} there, and cannot download it" in error
    assert "UV_PYTHON_INSTALL_MIRROR" in error
    assert "No interpreter found" in error
    assert "Using CPython" not in error
    without_ensurepip(tmp_path, tmp_path / "bare" / f"python{PYTHON}")
    error = refusal(lab, lab.host(env={**UNSET_PIP, **env}), sky.Image(python=f"{PYTHON}.999"))
    assert f"uv finds no Python {PYTHON}.999 there" in error


@pytest.mark.parametrize("has_python", [True, False])
def test_a_uv_that_does_not_start_there(lab, mirror, tmp_path, monkeypatch, caplog, has_python):
    """pip takes its place where Python can make environments; elsewhere the host is refused, with the reason."""
    caplog.set_level(logging.INFO, "skyward_lite")
    other = Path(shutil.which("false") or "/bin/false").resolve()
    monkeypatch.setattr(own_uv, "find", lambda: own_uv.Program(str(other), other.stat().st_size, "ab" * 32, ()))
    monkeypatch.setattr(own_uv, "_packed", None)
    python = tmp_path / f"python{PYTHON}"
    if has_python:
        python.symlink_to(Path(sys.base_prefix, "bin", python.name))
    else:
        without_ensurepip(tmp_path, python)
    host = lab.host(env={**UNSET_PIP, "PATH": f"{tmp_path}:/usr/bin:/bin"})
    if not has_python:
        assert "our own copy of uv does not start there: " in refusal(lab, host)
        return
    with open_pool(lab, host, image(mirror)) as pool:
        assert pool.submit(eval, "__import__('labpackage').answer").result(20) == 42
    assert "; pip takes its place" in caplog.text
    assert "installed labpackage 1.0" in logged(caplog)


def test_pip_takes_the_place_of_a_uv_that_fails(lab, mirror, tmp_path, caplog):
    """As where uv does not trust the index's certificate, and pip does: the log has uv's reason."""
    python = tmp_path / f"python{PYTHON}"
    python.symlink_to(Path(sys.base_prefix, "bin", python.name))
    (tmp_path / "uv").write_text(
        f'#!/bin/sh\ncase $1 in pip) echo invalid certificate >&2; exit 2 ;; esac\nexec {uv.find_uv_bin()} "$@"\n'
    )
    (tmp_path / "uv").chmod(0o755)
    host = lab.host(env={**UNSET_PIP, "PATH": f"{tmp_path}:/usr/bin:/bin"})
    with open_pool(lab, host, image(mirror)) as pool:
        assert pool.submit(eval, "__import__('labpackage').answer").result(20) == 42
    (warning,) = [record.getMessage() for record in caplog.records if "takes the place" in record.getMessage()]
    assert warning.endswith("\n  | invalid certificate")
    assert sent(host) == []


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_progress_is_told_while_the_build_runs(lab, mirror, tmp_path, caplog, installer):
    """The index holds the package back until the log has told of its download."""
    held = mirror.held["labpackage-1.0-py3-none-any.whl"] = threading.Event()

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "downloading labpackage" in record.getMessage():
                held.set()

    python = tmp_path / f"python{PYTHON}"
    python.symlink_to(Path(sys.base_prefix, "bin", python.name))
    env = UNSET_PIP if installer == "uv" else {**UNSET_PIP, "PIP_TRUSTED_HOST": "127.0.0.1"}
    host = lab.host(env={**env, "PATH": f"{tmp_path}:/usr/bin:/bin", "UV_HTTP_RETRIES": "0"})
    log, told = logging.getLogger("skyward_lite"), Told()
    log.addHandler(told)
    caplog.set_level(logging.INFO, "skyward_lite")
    try:
        with open_pool(lab, host, image(mirror, python=RELEASE)) as pool:
            assert pool.submit(eval, "__import__('labpackage').answer").result(20) == 42
            assert pool.submit(eval, "__import__('sys').base_prefix").result(20) == sys.base_prefix
    finally:
        log.removeHandler(told)
        mirror.held.clear()
    assert "installed labpackage 1.0" in logged(caplog)
    assert bool(sent(host)) == (installer == "uv")
    assert "takes the place" not in caplog.text


def test_a_command_is_watched(lab, tmp_path):
    """What it prints is seen while it runs; an exception from there ends the wait, and reaches the caller."""
    go = tmp_path / "go"
    seen: list[tuple[bytes, bytes]] = []

    def watch(stdout: bytes, stderr: bytes) -> None:
        seen.append((stdout, stderr))
        go.touch()

    def refuse(stdout: bytes, stderr: bytes) -> None:
        raise LookupError(stdout)

    with machine(lab, lab.host().name) as (one, core):
        connection = one.connect(core)
        command = f"echo one; echo two >&2; while [ ! -e {go} ]; do sleep 0.1; done; echo three; exit 7"
        assert connection.run(command, b"", 20.0, watch) == (7, b"one\nthree\n", b"two\n")
        assert [b"".join(stream) for stream in zip(*seen, strict=True)] == [b"one\nthree\n", b"two\n"]
        go.unlink()
        with pytest.raises(LookupError, match="one"):
            connection.run(command, b"", 20.0, refuse)
        go.touch()
        assert connection.run("echo one", b"", 20.0)[1] == b"one\n"


@SHIPPED
def test_check_tells_that_uv_is_sent(lab, tmp_path):
    """To a host without Python, if this client has a uv; else the remedy here is named."""
    bare = tools(tmp_path / "bare", *BARE_TOOLS, "cut", "sed", "grep", "tr", "nproc")
    host = lab.host(env={**UNSET_PIP, "PATH": str(bare)})
    text = check(lab, host.name)[1]
    assert f"{PYTHON}, which uv provides, and the client's uv, which is sent unless it is there" in text
    without = program("from skyward_lite.environment import own_uv; own_uv.find = lambda: None")
    status, text = check(lab, host.name, command=without)
    assert (status, own_uv.EXTRA in text) == (1, True)
