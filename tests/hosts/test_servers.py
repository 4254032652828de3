"""SSH servers as they are: noisy, restricted, with other shells, and accounts that may do little."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import skyward_lite as sky
from lab import Lab, Sshd, run
from processes import eventually
from skyward_lite.environment import probe, scripts

root_only = pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("useradd"), reason="making users needs root and useradd"
)
PACKAGE = str(Path(sky.__file__).parent.parent)


def as_it_is(lab: Lab, *options: str, env: dict[str, str] | None = None, **kwargs: object) -> Sshd:
    """Start a host on which this interpreter is used as it is."""
    return lab.host(*options, env={"PYTHONPATH": PACKAGE, **(env or {})}, **kwargs)


def works(lab: Lab, name: str, **options: object) -> None:
    """Open a pool there and run something."""
    provider = sky.SSH(name, **{"config": lab.config, "python": sys.executable, **options})  # type: ignore[arg-type]
    with sky.pool(provider, worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        assert pool.submit(sum, [1, 2]).result(20) == 3


def fails(lab: Lab, name: str, image: sky.Image | None = None, **options: object) -> str:
    """Give the text with which no pool opens there."""
    provider = sky.SSH(name, **{"config": lab.config, "python": sys.executable, **options})  # type: ignore[arg-type]
    with pytest.raises(sky.NodeStartError) as caught:
        sky.pool(provider, image=image or sky.Image(), plugins=[]).__enter__()
    return str(caught.value)


def test_a_banner_and_a_noisy_login_are_skipped(lab, tmp_path):
    """What the server and the login shell print is not ours, before, between and on both streams."""
    banner, noise = tmp_path / "banner", tmp_path / "noise"
    banner.write_text("WELCOME\n" * 50)
    noise.write_text("echo hello from .bashrc; echo complaints >&2; printf 'no line end'\n")
    wrapper = f"/bin/sh -c '. {noise}; eval \"$SSH_ORIGINAL_COMMAND\"'"
    works(lab, as_it_is(lab, f"Banner {banner}", f"ForceCommand {wrapper}").name)


@pytest.mark.skipif(not os.access("/bin/bash", os.X_OK), reason="no bash here")
def test_a_shell_that_prints_whenever_it_starts(lab, tmp_path):
    """BASH_ENV is read by every bash that a script starts."""
    noise = tmp_path / "noise"
    noise.write_text("echo noise\n")
    wrapper = '/bin/bash -c "eval \\"$SSH_ORIGINAL_COMMAND\\""'
    works(lab, as_it_is(lab, f"ForceCommand {wrapper}", env={"BASH_ENV": str(noise)}).name)


def test_one_session_at_a_time_is_enough(lab):
    """We never need two channels at once, and no forwarding of any kind, nor a terminal."""
    host = as_it_is(lab, "MaxSessions 1", "DisableForwarding yes", "PermitTTY no", "PermitUserRC no", "MaxStartups 2")
    works(lab, host.name)


@pytest.mark.parametrize("over", ["straight", "jump"])
def test_a_server_with_too_many_connections_is_asked_again(lab, over):
    """It takes one at a time that has not logged in, and somebody else is that one for a while (MaxStartups)."""
    busy = as_it_is(lab, "MaxStartups 1:100:1")
    behind = as_it_is(lab)
    lab.extra[behind.name] = [f"ProxyJump {busy.name}"]
    lab.write()
    other = socket.create_connection((busy.address, busy.port))
    assert other.recv(1) == b"S"

    def leave() -> None:
        assert eventually(lambda: "past MaxStartups" in busy.log_text(), 20)
        other.close()

    leaver = threading.Thread(target=leave)
    leaver.start()
    works(lab, (busy if over == "straight" else behind).name)
    leaver.join(20)
    assert "past MaxStartups" in busy.log_text()


def test_a_server_that_only_hangs_up_is_given_up(lab, monkeypatch):
    """After some attempts, with what may be the cause."""
    monkeypatch.setattr("skyward_lite.providers.ssh.FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("skyward_lite.providers.ssh.MAX_PAUSES", 2)
    host = as_it_is(lab)
    came = []
    with socket.create_server((host.address, 0)) as door:
        host.port = door.getsockname()[1]
        lab.write()

        def hang_up() -> None:
            for _ in range(3):
                way, peer = door.accept()
                way.close()
                came.append(peer)

        porter = threading.Thread(target=hang_up)
        porter.start()
        error = fails(lab, host.name)
        porter.join(10)
    assert len(came) == 3
    assert "it hung up before it showed its key" in error
    assert "MaxStartups" in error


@pytest.mark.parametrize("command", ["/bin/echo no", "internal-sftp", "/bin/false"])
def test_a_forced_command_is_detected(lab, command):
    """What ran instead is shown."""
    error = fails(lab, as_it_is(lab, f"ForceCommand {command}").name)
    assert "ForceCommand" in error
    if "echo" in command:
        assert "no" in error.rpartition("It printed:")[2]


def test_an_interpreter_is_verified(lab):
    """`SSH(python=)` installs nothing: what is missing is named, all of it."""
    host = as_it_is(lab)
    image = sky.Image(pip=["no-such-package", "cloudpickle==0.0.1"])
    error = fails(lab, host.name, image)
    assert "no-such-package is not installed" in error
    assert "cloudpickle==0.0.1 is wanted" in error
    assert "/nonexistent/python cannot be used: " in fails(lab, host.name, python="/nonexistent/python")
    bare = lab.host()
    assert "skyward_lite is not installed in it" in fails(
        lab, bare.name, python=shutil.which("python3", path="/usr/bin")
    )


def test_an_interpreter_of_another_version_is_refused(lab, tmp_path):
    """Both versions are named, also by one that is so old that it lacks our options."""
    others = [Path(p) for p in sorted(os.environ.get("PATH", "").split(":"))]
    versions = [f"3.{minor}" for minor in range(6, 20) if minor != sys.version_info.minor]
    found = [
        exe
        for version in versions
        for directory in others
        if (exe := directory / f"python{version}").exists()
        and subprocess.run([exe, "-c", ""], capture_output=True).returncode == 0
    ]
    if not found:
        pytest.skip("there is one Python version here")
    assert "the client's is" in fails(lab, as_it_is(lab).name, python=str(found[0]))


def test_an_interpreter_in_the_home_directory(lab, tmp_path):
    """A ~ is the host's, and the name may have spaces and quotes."""
    directory = tmp_path / 'it\'s a "home"'
    directory.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory / "my env"], check=True)
    (cloudpickle,) = {Path(sys.modules["cloudpickle"].__file__ or "").parent}
    host = lab.host(
        env={"PYTHONPATH": f"{PACKAGE}:{cloudpickle.parent}", "LAB_HOME": str(directory)},
    )
    works(lab, host.name, python=str(directory / "my env" / "bin" / "python"))
    wrapper = lab.host(
        "ForceCommand /bin/sh -c 'HOME=$LAB_HOME; export HOME; eval \"$SSH_ORIGINAL_COMMAND\"'",
        env={"PYTHONPATH": f"{PACKAGE}:{cloudpickle.parent}", "LAB_HOME": str(directory).replace('"', '\\"')},
    )
    works(lab, wrapper.name, python="~/my env/bin/python")


# ------------------------------------------------------------------------------------------------ accounts


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that every user may enter, unlike pytest's."""
    path = Path(tempfile.mkdtemp(prefix="sky lite's "))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def account(directory) -> Iterator[object]:
    """Make users: `account(shell)` gives the name and the home of one."""
    made = []

    def make(shell: str, *options: str) -> tuple[str, Path]:
        name = f"sky{os.getpid()}{len(made)}"
        home = directory / f"home of {name}"
        add = ["useradd", "-M", "-s", shell, "-p", "*", "-d", str(home), *options, name]
        subprocess.run(add, check=True, capture_output=True)
        made.append(name)
        home.mkdir()
        entry = pwd.getpwnam(name)
        os.chown(home, entry.pw_uid, entry.pw_gid)
        return name, home

    yield make
    for name in made:
        subprocess.run(["userdel", "-f", name], check=False, capture_output=True)


def open_to(lab: Lab, directory: Path, *options: str, **kwargs: object) -> Sshd:
    """Start a host whose accounts can all be entered with the lab's key, and that sets no cache directory."""
    keys = directory / "authorized_keys"
    shutil.copy(f"{lab.user_key}.pub", keys)
    keys.chmod(0o644)
    env = {"XDG_CACHE_HOME": None, "HOME": None, **kwargs.pop("env", {})}  # type: ignore[dict-item]
    return lab.host(f'AuthorizedKeysFile "{keys}"', *options, env=env, **kwargs)


@root_only
@pytest.mark.parametrize("shell", ["dash", "bash", "zsh", "fish", "tcsh"])
def test_any_login_shell_will_do(lab, directory, account, shell):
    """The environment is in a home whose name has spaces and quotes."""
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"no {shell} here")
    name, home = account(path, "-o", "-u", "0")
    python = home / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", python], check=True)
    cloudpickle = Path(sys.modules["cloudpickle"].__file__ or "").parent.parent
    host = open_to(lab, directory, env={"PYTHONPATH": f"{PACKAGE}:{cloudpickle}"})
    lab.extra[host.name] = [f"User {name}"]
    lab.write()
    works(lab, host.name, python=str(python / "bin" / "python"))


@root_only
@pytest.mark.parametrize("shell", ["/usr/sbin/nologin", "/bin/false"])
def test_an_account_without_a_shell_is_detected(lab, directory, account, shell):
    """What its shell says is shown."""
    name, _ = account(shell)
    host = open_to(lab, directory)
    lab.extra[host.name] = [f"User {name}"]
    lab.write()
    error = fails(lab, host.name, python=None)
    assert "the account has no shell" in error
    assert "nologin" not in shell or "not available" in error


@root_only
def test_a_user_like_any_other(lab, directory, account):
    """It builds in a home whose name has spaces and quotes, or elsewhere without one; it may not install with apt."""
    name, home = account(shutil.which("bash") or "/bin/sh")
    host = open_to(lab, directory)
    lab.extra[host.name] = [f"User {name}"]
    lab.write()
    error = fails(lab, host.name, sky.Image(apt=["no-such-package"]), python=None)
    assert "apt-get" in error
    assert "sudo" in error
    assert "status" in error
    works(lab, host.name, python=None)
    cache = home / ".cache" / "skyward_lite"
    assert not [path.name for path in cache.iterdir() if "tmp" in path.name or "lock" in path.name]
    # A home that it may not write to, and one that is not there.
    uid = home.stat().st_uid
    elsewhere = Path(f"/var/tmp/skyward_lite-{uid}")
    try:
        shutil.rmtree(home / ".cache")
        os.chown(home, 0, 0)
        works(lab, host.name, python=None)
        assert [path for path in elsewhere.iterdir() if path.name.startswith("env-")]
        shutil.rmtree(home)
        works(lab, host.name, python=None)
    finally:
        shutil.rmtree(elsewhere, ignore_errors=True)


def mounted(where: Path, options: str) -> None:
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", where], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")


@root_only
@pytest.mark.parametrize(
    ("options", "why"), [("noexec", "allows no programs"), ("size=4k", "cannot be written to"), ("ro", "cannot be")]
)
def test_a_cache_that_cannot_serve_is_left_for_another(lab, directory, options, why):
    """Where programs may not run or nothing can be written no environment is made; why not is kept for the text."""
    cache = directory / "cache"
    mounted(cache, options)
    try:
        if options.startswith("size"):
            (cache / "skyward_lite").mkdir()
            (cache / "full").write_bytes(b"x" * 4096)
        host = open_to(lab, directory, env={"XDG_CACHE_HOME": str(cache)})
        status, stdout, _ = run(lab, host.name, scripts.SHELL, probe.probe_script("env-none"))
        report = scripts.parse_report(stdout)
        assert status == 0
        assert report is not None
        facts = probe.read_facts(report)
        assert f"{cache}/skyward_lite {why}" in facts.why
        assert facts.root == f"/var/tmp/skyward_lite-{os.getuid()}"
    finally:
        subprocess.run(["umount", cache], check=True)


@root_only
def test_a_disk_with_little_room_is_said_before_the_build(lab, directory):
    """How much there is, and how much is needed."""
    cache = directory / "cache"
    mounted(cache, "size=20m")
    try:
        host = open_to(lab, directory, env={"XDG_CACHE_HOME": str(cache)})
        error = fails(lab, host.name, python=None)
        assert f"{cache}/skyward_lite has " in error
        assert "200 MB are needed" in error
    finally:
        subprocess.run(["umount", cache], check=True)
