"""Environments and files that nothing uses are removed from hosts, by later builds or by the command `clean`."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import skyward_lite as sky
from lab import Lab
from skyward_lite.__main__ import main
from skyward_lite.cli.report import CacheEntry
from skyward_lite.environment import build, bundle, probe, scripts

DAY = 86400
ARCHITECTURE = platform.machine()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def environment(root: Path, name: str, *, unused: float, complete: bool = True) -> Path:
    """Make a directory that looks like an environment which was last used so many seconds ago."""
    path = root / name
    (path / "bin").mkdir(parents=True)
    if complete:
        (path / "ready").touch()
    for one in (*path.iterdir(), path):
        os.utime(one, (time.time() - unused,) * 2)
    return path


def sweep(root: Path, seconds: int, *, dry_run: bool = False, **env: str) -> dict[str, str]:
    """Run the script as a host would. Return what was decided of each name in the cache directory."""
    env = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(root.parent), "HOME": "/dev/null", **env}
    script = build.clean_script(seconds, dry_run=dry_run)
    done = subprocess.run(["sh", "-s"], input=script, env=env, capture_output=True, timeout=30, check=True)
    report = scripts.parse_report(done.stdout)
    assert report is not None
    found = [(kind, CacheEntry.parse(kind, line)) for kind, lines in report.items() if kind != "" for line in lines]
    return {Path(one.path).name: kind for kind, one in found if one is not None and one.path.startswith(f"{root}/")}


@pytest.fixture
def root(tmp_path: Path, monkeypatch) -> Path:
    """Return a cache directory, and let the script find no other."""
    monkeypatch.setattr(probe, "FALLBACK_DIRECTORIES", (str(tmp_path / "none"),))
    root = tmp_path / "cache" / "skyward_lite"
    root.mkdir(parents=True)
    return root


def holder(pid: int) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{platform.node()} {boot} {pid}"


def test_what_was_not_used_for_a_while_is_removed(root):
    """Environments and sent files go after 30 days without use, unfinished ones after an hour, other files never."""
    environment(root, "env-old-x", unused=31 * DAY)
    environment(root, "env-new-x", unused=29 * DAY)
    environment(root, "sent-old", unused=31 * DAY, complete=False)
    environment(root, "sent-new", unused=29 * DAY, complete=False)
    environment(root, "env-new-x.tmp.1", unused=2 * 3600, complete=False)
    environment(root, "env-late-x.tmp.1", unused=1800, complete=False)
    environment(root, "target", unused=99 * DAY)
    (root / "machine-id").touch()
    gone = {"env-old-x", "sent-old", "env-new-x.tmp.1"}
    decided = dict.fromkeys(gone, "gone") | dict.fromkeys(("env-new-x", "sent-new", "env-late-x.tmp.1"), "kept")
    before = set(os.listdir(root))
    assert sweep(root, build.UNUSED_SECONDS, dry_run=True) == decided
    assert set(os.listdir(root)) == before
    assert sweep(root, build.UNUSED_SECONDS) == decided
    assert set(os.listdir(root)) == before - gone
    assert sweep(root, build.RECENT_SECONDS) == {
        "env-new-x": "gone",
        "sent-new": "gone",
        "env-late-x.tmp.1": "kept",
    }


def test_what_a_build_uses_is_kept(root):
    """A build that runs, or that another host may be running, protects what it uses; a dead process protects nothing.

    So does a process from before the host was started anew: its process id may be another's by now.
    """
    environment(root, "env-a-x.tmp.7", unused=31 * DAY, complete=False)
    environment(root, "env-b-x", unused=31 * DAY)
    environment(root, "sent-a", unused=31 * DAY, complete=False)
    lock = root / "env-a-x.lock"
    before = f"{platform.node()} another-boot {os.getpid()}"
    holders = [(holder(os.getpid()), True), ("elsewhere boot 1", True), (holder(2**22 + 1), False), (before, False)]
    for who, kept in holders:
        lock.unlink(missing_ok=True)
        lock.symlink_to(who)
        decided = sweep(root, build.UNUSED_SECONDS, dry_run=True)
        assert decided == {
            "env-a-x.tmp.7": "kept" if kept else "gone",
            "env-b-x": "gone",
            "sent-a": "kept" if kept else "gone",
        }


def test_a_host_that_is_gone_protects_nothing_for_ever(root):
    """The lock of another host protects nothing once it is a day old."""
    environment(root, "env-a-x.tmp.7", unused=31 * DAY, complete=False)
    environment(root, "sent-a", unused=31 * DAY, complete=False)
    lock = root / "env-a-x.lock"
    lock.symlink_to("elsewhere boot 1")
    assert set(sweep(root, build.UNUSED_SECONDS, dry_run=True).values()) == {"kept"}
    os.utime(lock, (time.time() - 2 * DAY,) * 2, follow_symlinks=False)
    assert sweep(root, build.UNUSED_SECONDS) == {"env-a-x.tmp.7": "gone", "sent-a": "gone"}


def test_the_file_servers_clock_counts(root, tmp_path):
    """A host whose clock is a year ahead removes nothing that others use, and names may have blanks."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "date").write_text(f"#!/bin/sh\necho {int(time.time()) + 365 * DAY}\n")
    (tools / "date").chmod(0o755)
    environment(root, "env-new-x", unused=DAY)
    strange = environment(root, "env-a  b'$(x)*-x", unused=40 * DAY)
    (root / "env-link-x").symlink_to(tmp_path)
    assert sweep(root, build.UNUSED_SECONDS, PATH=f"{tools}:{os.environ['PATH']}")["env-new-x"] == "kept"
    assert (strange.exists(), sorted(os.listdir(root))) == (False, ["env-link-x", "env-new-x"])


def test_what_cannot_be_removed_is_reported(root, tmp_path):
    """An environment that cannot be removed is reported, and stays as it is."""
    old = environment(root, "env-old-x", unused=31 * DAY)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "mv").write_text("#!/bin/sh\nexit 1\n")
    (tools / "mv").chmod(0o755)
    assert sweep(root, build.UNUSED_SECONDS, PATH=f"{tools}:{os.environ['PATH']}") == {"env-old-x": "stuck"}
    assert (old / "ready").exists()


def test_a_start_marks_its_environment(lab):
    """The probe that finds an environment marks its use, and so does the agent that runs in it."""
    host = lab.host()
    host.make_environment(sky.Image())
    root = host.cache / "skyward_lite"
    (python,) = root.glob("env-*/bin/python")
    mark = python.parent.parent / "ready"
    os.utime(mark, (0, 0))
    command = build.command(str(python), "-P", "-m", "skyward_lite.node.agent", "stdio")
    subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
    assert time.time() - mark.stat().st_mtime < 3600
    os.utime(mark, (0, 0))
    env = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(host.cache)}
    script = probe.probe_script(bundle.environment_name(sky.Image()))
    assert b"ready=yes" in subprocess.run(["sh", "-s"], input=script, env=env, capture_output=True, check=True).stdout
    assert time.time() - mark.stat().st_mtime < 3600


def test_the_command(lab, monkeypatch, capsys):
    """Each host is cleaned and reported; a host that cannot be reached makes the exit status 1."""
    monkeypatch.setattr(probe, "FALLBACK_DIRECTORIES", (str(lab.directory),))
    host, empty = lab.host(), lab.host()
    root = host.cache / "skyward_lite"
    old = environment(root, "env-old-x", unused=31 * DAY)
    new = environment(root, "env-new-x", unused=3 * DAY)
    host.make_environment(sky.Image())
    start = ["clean", "--config", lab.config]
    assert main([*start, "--dry-run", host.name, empty.name]) == 0
    text = capsys.readouterr().out
    assert f"{host.name}: {old}: 0.0 MB, used 31 days ago: would be removed\n" in text
    assert f"{host.name}: {new}: 0.0 MB, used 3 days ago: kept\n" in text
    assert text.endswith(f"{empty.name}: nothing of skyward_lite's\n")
    bad = lab.host("AuthorizedKeysFile none")
    assert main([*start, "--all", host.name, bad.name]) == 1
    text, error = capsys.readouterr()
    assert (text.count(": removed\n"), error.startswith(f"{bad.name}: ")) == (2, True)
    assert [path.name for path in root.iterdir()] == [f"{bundle.environment_name(sky.Image())}-{ARCHITECTURE}"]


@pytest.mark.parametrize("arguments", [[], ["-x"], ["--all"], ["host", "host"], ["a b"]])
def test_wrong_usage(arguments):
    """Wrong usage prints the usage, and the exit status is 2."""
    line = [sys.executable, "-m", "skyward_lite", "clean", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, "usage: " in done.stderr) == (2, True)
