"""Other users of a host, and files of the user's own, do not get into an environment."""

from __future__ import annotations

import grp
import os
import platform
import pwd
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import skyward_lite as sky
from lab import Lab
from processes import eventually
from skyward_lite._version import PYTHON
from skyward_lite.environment import build, probe, scripts
from skyward_lite.environment.tools import Tools

ENV = "env-x"
ARCHITECTURE = platform.machine()
OTHER = "nobody"
SHELLS = ("sh", "dash", "bash", "zsh", "fish", "tcsh")

as_root = pytest.mark.skipif(os.getuid() != 0 or shutil.which("su") is None, reason="only root can be two users")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody can reach, as /tmp is one; nobody else may write there yet."""
    directory = Path(tempfile.mkdtemp(dir="/tmp")).resolve()
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def sticky(place, monkeypatch) -> Path:
    """A directory for environments of last resort: everybody may write there."""
    directory = place / "temporary"
    directory.mkdir()
    directory.chmod(0o1777)
    monkeypatch.setattr(probe, "FALLBACK_DIRECTORIES", (str(directory),))
    return directory


def as_other(command: str) -> None:
    """Run a shell command as another user."""
    subprocess.run(["su", "-s", "/bin/sh", OTHER, "-c", command], check=True, capture_output=True, timeout=20)


def run(script: bytes, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run a script as a host would, in an empty home directory unless one is named."""
    env = {"PATH": os.environ["PATH"], "HOME": "/dev/null", **env}
    return subprocess.run(["sh", "-s"], input=script, env=env, capture_output=True, timeout=60, check=False)


def probed(**env: str) -> probe.Facts:
    report = scripts.parse_report(run(probe.probe_script(ENV), **env).stdout)
    assert report is not None
    return probe.read_facts(report)


def environment(root: Path, ran: Path) -> Path:
    """Make an environment whose Python leaves a file when it runs."""
    python = root / f"{ENV}-{ARCHITECTURE}" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho \"$@\" >'{ran}'\n")
    python.chmod(0o755)
    (python.parent.parent / "ready").touch()
    return python


def test_a_last_resort_is_the_users_alone(sticky):
    """It is made so, under its real path, and found again."""
    root = sticky / f"skyward_lite-{os.getuid()}"
    assert [probed().root, probed().root] == [str(root), str(root)]
    assert root.stat().st_mode & 0o777 == 0o700


@as_root
def test_another_users_link_is_refused(place, sticky):
    """Wherever it leads: it could lead elsewhere a moment later, to a Python of that user's."""
    target, root = place / "mine", sticky / "skyward_lite-0"
    target.mkdir(mode=0o700)
    as_other(f"ln -s {target} {root}")
    facts = probed()
    assert (facts.root, f"{root} is not safe from other users: it is a symbolic link" in facts.why) == ("", True)
    with pytest.raises(sky.NodeStartError, match="it is a symbolic link; make one this user.s alone"):
        probe.check_room(facts)


@as_root
def test_another_users_directory_is_refused(sticky):
    """Also if everybody may write to it, and if its user leaves in it what looks like an environment."""
    root = sticky / "skyward_lite-0"
    as_other(f"mkdir -p {root}/{ENV}-{ARCHITECTURE}/bin && chmod -R 777 {root}")
    facts = probed()
    uid = pwd.getpwnam(OTHER).pw_uid
    assert (facts.root, f"{root} belongs to user {uid}" in facts.why) == ("", True)


@pytest.mark.parametrize(
    ("mode", "group", "reason"),
    [
        (0o757, None, "may be written to by everybody"),
        (0o775, "nogroup", "may be written to by its group"),
        (0o775, "own", ""),
        (0o1777, None, ""),
        (0o755, None, ""),
    ],
)
def test_what_is_above_the_cache_directory(place, sticky, mode, group, reason):
    """Where others may write there without the sticky bit they could put another directory in its place.

    A group of the user's own name is the user.
    """
    if group == "nogroup" and os.getuid() != 0:
        pytest.skip("only root can give a directory to another group")
    if group == "own" and grp.getgrgid(os.getgid()).gr_name != pwd.getpwuid(os.getuid()).pw_name:
        pytest.skip("this user has no group of the same name")
    above = place / "above"
    (above / "cache").mkdir(parents=True)
    above.chmod(mode)
    if group == "nogroup":
        shutil.chown(above, group=group)
    facts = probed(XDG_CACHE_HOME=str(above / "cache"))
    if reason:
        assert f"{above} {reason}" in facts.why
        assert facts.root == str(sticky / f"skyward_lite-{os.getuid()}")
    else:
        assert (facts.root, facts.why) == (str(above / "cache/skyward_lite"), "")


def test_a_cache_directory_that_others_may_write_to(place, sticky):
    """It is refused, and the sticky bit does not help: others could add to it."""
    root = place / "skyward_lite"
    root.mkdir()
    root.chmod(0o1777)
    facts = probed(XDG_CACHE_HOME=str(place))
    assert f"{root} may be written to by everybody" in facts.why


@as_root
def test_what_others_left_is_not_run(place, sticky):
    """Also when its directory has been made this user's alone since: what is in it tells who could write there."""
    root, ran = place / "cache" / "skyward_lite", place / "ran"
    root.mkdir(parents=True)
    root.chmod(0o777)
    python = environment(root, ran)
    shutil.chown(python.parent.parent, OTHER)
    root.chmod(0o755)
    reason = f"something in {root} belongs to user {pwd.getpwnam(OTHER).pw_uid}"
    facts = probed(XDG_CACHE_HOME=str(root.parent))
    assert (facts.root, reason in facts.why) == (str(sticky / "skyward_lite-0"), True)
    done = subprocess.run(
        ["sh", "-c", build.command(str(python), *build.ATTACH, "0123456789abcdef", "new")],
        capture_output=True,
        timeout=20,
    )
    assert (done.returncode, reason in done.stderr.decode(), ran.exists()) == (77, True, False)


def test_an_access_list_is_no_group_of_ones_own(place, sticky):
    """With one, the bits of the group are those of everybody whom it names."""
    above = place / "above"
    (above / "cache").mkdir(parents=True)
    # Of acl(5): version 2, then tag, permissions and id of the owner, a user, the group, the mask and all others.
    entries = [(1, 7, -1), (2, 7, pwd.getpwnam(OTHER).pw_uid), (4, 5, -1), (16, 7, -1), (32, 5, -1)]
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(above, "system.posix_acl_access", packed)
    except OSError as error:
        pytest.skip(f"no access lists here: {error}")
    assert f"{above} may be written to by those in its access list" in probed(XDG_CACHE_HOME=str(above / "cache")).why


def test_a_link_of_ones_own_is_followed(place, sticky):
    """Once: from then on the real path counts. A cache directory is often on another disk."""
    (place / "disk").mkdir()
    (place / "cache").symlink_to("disk")
    assert probed(XDG_CACHE_HOME=str(place / "cache")).root == str(place / "disk/skyward_lite")
    assert probed(XDG_CACHE_HOME="cache", HOME=str(place)).root == str(place / ".cache/skyward_lite")


def test_what_has_changed_since_is_seen(place, sticky):
    """The build and the agent's command look again, and run nothing there if others may write by then."""
    ran, root = place / "ran", place / "cache" / "skyward_lite"
    python = environment(root, ran)
    facts = probed(XDG_CACHE_HOME=str(root.parent))
    assert (facts.ready, probe.interpreter(facts, ENV)) == (True, str(python))
    command = build.command(str(python), *build.ATTACH, "0123456789abcdef", "new")
    shells = [shell for shell in map(shutil.which, SHELLS) if shell]
    for shell in shells:
        subprocess.run([shell, "-c", command], check=True, timeout=20)
        assert ran.read_text() == "-P -m skyward_lite.node.attach 0123456789abcdef new\n"
        ran.unlink()
    built = build.build_script(facts, sky.Image(), ENV, {"bundle": "/none"}, Tools(sys.executable))
    moved = place / "moved"
    root.parent.rename(moved)
    for change in ("a link", "everybody"):
        if change == "a link":
            root.parent.symlink_to(moved)
        else:
            root.parent.unlink()
            moved.rename(root.parent)
            root.parent.chmod(0o777)
        for shell in shells:
            done = subprocess.run([shell, "-c", command], capture_output=True, timeout=20, check=False)
            assert (done.returncode, b"is not safe from other users" in done.stderr) == (77, True), done
        done = run(built)
        assert (done.returncode, b"is not safe from other users" in done.stderr) == (77, True)
    assert not ran.exists()


# ------------------------------------------------------------------------------------------------ the user's own files


def test_files_in_the_home_directory_are_not_imported(tmp_path):
    """Whatever they are called, and whatever the shell's configuration sets for Python: the pool works all the same."""
    lab = Lab(tmp_path)
    poison = tmp_path / "poison"
    poison.mkdir()
    host = lab.host()
    home = host.directory / "home"
    variables = {"PYTHONPATH": f":{poison}", "PYTHONSTARTUP": poison / "json.py", "PYTHONHOME": poison}
    lines = [f"export {name}='{value}'" for name, value in {**variables, "PYTHONUSERBASE": poison}.items()]
    # Which bash reads when an SSH server runs it; the session begins in the home directory of the user's account.
    (home / ".bashrc").write_text("\n".join([*lines, "cd", ""]))
    names = ("zipfile", "venv", "json", "sitecustomize", "usercustomize", "ensurepip", "sysconfig", "pip", "socket")
    for name in names:
        for directory in (home, poison):
            (directory / f"{name}.py").write_text(f"raise SystemExit('{name} of {directory.name}')\n")
    (home / "pyproject.toml").write_text("not TOML")
    (home / "uv.toml").write_text("not TOML")
    try:
        for _ in range(2):  # the environment is made; it is found
            with sky.pool(sky.SSH(host.name, config=lab.config), plugins=[]) as pool:
                assert pool.submit(eval, "__import__('json').dumps([1])").result(20) == "[1]"
                if pwd.getpwuid(os.getuid()).pw_shell.endswith("bash"):
                    # Workers run elsewhere; their agent is where the session began.
                    assert Path(f"/proc/{pool.nodes()[0].pid}/cwd").readlink() == home
    finally:
        lab.close()


def test_a_python_in_a_directory_of_the_path_is_asked_from_elsewhere(tmp_path):
    """A relative directory of PATH means nothing to the scripts, which do not run in the home directory."""
    home = tmp_path / "home"
    home.mkdir()
    (home / f"python{PYTHON}").write_text(f"#!/bin/sh\ntouch {shlex.quote(str(tmp_path / 'ran'))}\n")
    (home / f"python{PYTHON}").chmod(0o755)
    script = b"cd " + shlex.quote(str(home)).encode() + b"\n" + probe.probe_script(ENV)
    run(script, HOME=str(home), PATH=f".:{os.environ['PATH']}")
    assert not (tmp_path / "ran").exists()


@as_root
def test_signs_of_life_below_a_parent_of_another_user(sticky):
    """A script that root's process has started, as slurmstepd starts a user's, gives signs of life while it runs."""
    script = scripts.compose(scripts.read("sign_of_life.sh"), DIRECTORY=str(sticky))
    command = ["sh", "-s"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, user=OTHER, process_group=0) as process:
        assert process.stdin is not None
        process.stdin.write(script + b"exec sleep 60\n")
        process.stdin.flush()
        alive = sticky / "alive"
        try:
            for _ in range(2):
                assert eventually(alive.exists, 10)
                alive.unlink()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
