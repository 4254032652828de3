"""A bare host gets the environment of an image: once, whole or not at all."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import packaging
import pytest
import skyward_lite as sky
import uv
from environments import BARE_TOOLS, FACTS, make_wheel, open_pool, own_wheel, refusal, without_ensurepip
from lab import Sshd, opened
from processes import eventually
from skyward_lite._version import PYTHON
from skyward_lite.environment import build, bundle, own_uv, probe
from skyward_lite.environment.tools import Tools

OFFLINE = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_FIND_LINKS": "", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
ARCHITECTURE = platform.machine()
PIP = Tools(sys.executable)


@pytest.fixture(scope="module")
def built(lab) -> Sshd:
    """A host that has the environment of the plain image."""
    host = lab.host()
    with opened(lab, host.name):
        pass
    return host


def environments(host: Sshd) -> list[str]:
    """List what is in the host's cache beside what was sent there."""
    root = host.cache / "skyward_lite"
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("sent-")) if root.exists() else []


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory) -> Path:
    """Wheels of a package that no index has."""
    directory = tmp_path_factory.mktemp("wheels") / "wheel house"
    directory.mkdir()
    make_wheel(directory, "labpackage", "1.0", {"labpackage.py": b"answer = 42\n"})
    return directory


def test_the_environment_is_made_once(lab, caplog):
    """The second pool finds it, and works as the first did; nothing else is left beside it, nor what nothing used."""
    host = lab.host()
    for name in ("env-old-x86_64", "sent-old"):
        old = host.cache / "skyward_lite" / name
        old.mkdir(parents=True)
        os.utime(old, (0, 0))
    for message in ("its environment took", "the environment is there"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "skyward_lite"), open_pool(lab, host) as pool:
            assert pool.submit(sum, [1, 2]).result(20) == 3
            assert str(host.cache) in pool.submit(eval, "__import__('sys').executable").result(20)
        assert message in caplog.text
    assert [path.name for path in (host.cache / "skyward_lite").glob("sent-*/*")] == ["bundle.zip"]
    assert environments(host) == [f"{bundle.environment_name(sky.Image())}-{ARCHITECTURE}"]


def test_a_node_has_what_a_pool_of_its_own_needs(lab, built):
    """A task may open one: it compares requirements, which pip is told nothing of, and runs scripts on other hosts."""

    def look() -> tuple[list[str], bytes, str]:
        import packaging

        missing = sky.Image(pip=["cloudpickle>=99", "packaging"]).missing()
        return missing, probe.probe_script("env-x"), packaging.__version__

    with open_pool(lab, built) as pool:
        missing, script, version = pool.submit(look).result(20)
    assert [text.partition(" ")[0] for text in missing] == ["cloudpickle>=99", "packaging"]
    assert (script, version) == (probe.probe_script("env-x"), packaging.__version__)


def test_two_at_the_same_time_make_one(lab):
    """Both work; the later one waits for the other's and does not make its own."""
    host = lab.host()
    made = []

    def one() -> None:
        with opened(lab, host.name):
            made.extend(path.stat().st_ino for path in (host.cache / "skyward_lite").glob("env-*") if path.is_dir())

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert len(made) == 2
    assert len(set(made)) == 1
    assert len(environments(host)) == 1


def test_a_killed_builders_lock_is_broken(lab):
    """What it left is removed, and the environment is made."""
    host = lab.host()
    root = host.cache / "skyward_lite"
    root.mkdir()
    report = {"root": [str(root)], "system": ["Linux"], "machine": [ARCHITECTURE]}
    image, env = sky.Image(), bundle.environment_name(sky.Image())
    script = build.build_script(probe.read_facts(report), image, env, {"bundle": "/nonexistent"}, PIP)
    builder = subprocess.Popen(["sh", "-s"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0)
    assert builder.stdin is not None
    builder.stdin.write(script)
    builder.stdin.flush()
    lock = root / f"{env}-{ARCHITECTURE}.lock"
    assert eventually(lambda: lock.is_symlink() and list(root.glob("*.tmp.*")), 10)
    os.killpg(builder.pid, signal.SIGKILL)
    builder.wait(10)
    builder.stdin.close()
    assert lock.is_symlink()
    with opened(lab, host.name):
        assert environments(host) == [f"{env}-{ARCHITECTURE}"]


def test_an_environment_whose_python_is_gone_is_made_anew(lab):
    """As after an update of the system."""
    host = lab.host()
    host.make_environment(sky.Image())
    (env,) = environments(host)
    python = host.cache / "skyward_lite" / env / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python")
    with open_pool(lab, host) as pool:
        assert pool.submit(sum, [1, 2]).result(20) == 3


def test_an_agent_that_does_not_start_says_why(lab):
    """In its own words, with its exit status."""
    host = lab.host()
    host.make_environment(sky.Image())
    (python,) = (host.cache / "skyward_lite").glob("env-*/bin/python")
    python.write_text("#!/bin/sh\necho 'No module named skyward_lite.node.attach' >&2\nexit 1\n")
    error = refusal(lab, host)
    assert "Its agent does not start: `/" in error
    assert "ended with status 1: " in error
    assert "No module named skyward_lite.node.attach" in error


def test_a_build_ends_with_its_client(lab):
    """Nothing is left of it, also if it was waiting for an index that does not answer."""
    host = lab.host()
    with socket.create_server(("127.0.0.1", 0)) as index:
        image = f"sky.Image(pip=['labpackage'], index_url='http://127.0.0.1:{index.getsockname()[1]}/simple')"
        provider = f"sky.SSH({host.name!r}, config={lab.config!r})"
        program = f"import skyward_lite as sky; sky.pool({provider}, image={image}, plugins=[]).__enter__()"
        client = subprocess.Popen([sys.executable, "-c", program])
        try:
            index.settimeout(50)
            asked, _ = index.accept()
        finally:
            client.kill()
            client.wait(10)
        with asked:
            asked.settimeout(20)
            while asked.recv(4096):
                pass  # what pip asked for; then its end
        assert eventually(lambda: environments(host) == [], 10)


def test_a_lock_of_another_machine_is_waited_for(lab, monkeypatch):
    """In a home that machines share its holder cannot be looked at: it is named in the end, and so is the lock."""
    monkeypatch.setattr(build, "LOCK_WAIT_SECONDS", 1)
    host = lab.host()
    root = host.cache / "skyward_lite"
    root.mkdir()
    lock = root / f"{bundle.environment_name(sky.Image())}-{ARCHITECTURE}.lock"
    lock.symlink_to("elsewhere 17")
    error = refusal(lab, host)
    assert "another client (elsewhere 17)" in error
    assert f"remove {lock}" in error
    assert environments(host) == [lock.name]


def test_a_lock_that_was_free_for_a_moment_is_waited_for(lab, tmp_path, monkeypatch):
    """It was found taken, then nobody had it, then somebody had it again."""
    monkeypatch.setattr(build, "LOCK_WAIT_SECONDS", 4)
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "readlink").write_text("#!/bin/sh\n")
    (busy / "readlink").chmod(0o755)
    host = lab.host(env={"PATH": f"{busy}:{Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin"})
    root = host.cache / "skyward_lite"
    root.mkdir()
    (root / f"{bundle.environment_name(sky.Image())}-{ARCHITECTURE}.lock").symlink_to("elsewhere 17")
    assert "has been building" in refusal(lab, host)


def test_a_failing_requirement_is_said(lab, wheelhouse):
    """The command, its exit status and its standard error; nothing half-installed is left."""
    host = lab.host()
    error = refusal(lab, host, sky.Image(pip=["labpackage==9"], wheelhouse=str(wheelhouse)))
    assert "pip install" in error
    assert "private/requirements` for labpackage==9 ended with status 1" in error
    assert "No matching distribution found for labpackage==9" in error
    assert environments(host) == []


def test_all_that_an_image_can_have(lab, wheelhouse, tmp_path):
    """Wheels without a network, modules and packages of the user's, and variables of the workers' environment."""
    module, package = tmp_path / "labmodule.py", tmp_path / "labtree"
    module.write_text("answer = 43\n")
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "sub" / "__init__.py").write_text("answer = 44\n")
    (package / "data file.txt").write_text("45")
    host = lab.host(env=OFFLINE)
    image = sky.Image(
        pip=["labpackage==1.0"],
        wheelhouse=str(wheelhouse),
        includes=[str(module), str(package) + "/"],
        env={"LAB_VARIABLE": "a 'b' $c\n\"d\""},
    )

    def look() -> tuple[object, ...]:
        found = [importlib.import_module(name) for name in ("labpackage", "labmodule", "labtree.sub")]
        beside = Path(found[2].__file__ or "").parent.parent / "data file.txt"
        return (*(m.answer for m in found), beside.read_text(), os.environ["LAB_VARIABLE"])

    with open_pool(lab, host, image) as pool:
        assert pool.submit(look).result(20) == (42, 43, 44, "45", "a 'b' $c\n\"d\"")
    (env,) = environments(host)
    assert not (host.cache / "skyward_lite" / env / "wheels").exists()
    other = sky.Image(
        env={"LAB_VARIABLE": "other"}, pip=image.pip, wheelhouse=image.wheelhouse, includes=image.includes
    )
    assert bundle.environment_name(other) == bundle.environment_name(image)


def test_environments_are_named_by_what_they_are_made_of(tmp_path, wheelhouse):
    """Whatever changes what is installed gives another name."""
    module = tmp_path / "labmodule.py"
    module.write_text("a = 1\n")
    images = [
        sky.Image(),
        sky.Image(pip=["a"]),
        sky.Image(pip=["a", "b"]),
        sky.Image(pip=["a"], index_url="http://127.0.0.1/"),
        sky.Image(pip=["a"], wheelhouse=str(wheelhouse)),
        sky.Image(apt=["a"]),
        sky.Image(includes=[str(module)]),
    ]
    names = [bundle.environment_name(image) for image in images]
    module.write_text("a = 2\n")
    names.append(bundle.environment_name(images[-1]))
    assert len(set(names)) == len(names)
    assert bundle.environment_name(sky.Image(pip=["b", "a"])) == names[2]


def test_a_wheel_of_ones_own_is_installed(lab, tmp_path):
    """`Image(wheel=)` is for nodes on which the client's own package does not run."""
    wheel = own_wheel(tmp_path)
    host = lab.host(env=OFFLINE)
    with open_pool(lab, host, sky.Image(wheel=str(wheel))) as pool:
        assert pool.submit(sum, [1, 2]).result(20) == 3


def test_a_file_is_sent_once(lab, built):
    """The next environment there needs only what is new."""
    sent = {path: path.stat().st_ino for path in (built.cache / "skyward_lite").glob("sent-*/*")}
    assert [path.name for path in sent] == ["bundle.zip"]
    assert "no-such" in refusal(lab, built, sky.Image(pip=["./no-such.whl"]))
    assert {path: path.stat().st_ino for path in (built.cache / "skyward_lite").glob("sent-*/*")} == sent


def test_a_file_that_was_cut_off_is_sent_again(lab):
    """A client that died in the middle left part of it."""
    host = lab.host()
    sent = host.cache / "skyward_lite" / f"sent-{bundle.digest(bundle.bundle())[:16]}"
    sent.mkdir(parents=True)
    (sent / "bundle.zip").write_bytes(bundle.bundle()[:1000])
    with opened(lab, host.name):
        assert (sent / "bundle.zip").read_bytes() == bundle.bundle()


@pytest.fixture
def few(tmp_path) -> Path:
    """A directory with the programs that a host has, and no Python."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for tool in BARE_TOOLS:
        (directory / tool).symlink_to(shutil.which(tool, path="/usr/bin:/bin") or "/nonexistent")
    return directory


@pytest.fixture
def no_uv(monkeypatch) -> None:
    """This client has no uv to send."""
    monkeypatch.setattr(own_uv, "find", lambda: None)


@pytest.mark.usefixtures("no_uv")
def test_a_host_without_python_is_refused(lab, few):
    """The version that it needs is named, and what would help."""
    if any(Path(f"{place}/python{PYTHON}").exists() for place in ("/usr/local/bin", "/opt/python/bin")):
        pytest.skip("this machine has a Python in a place that is always looked at")
    host = lab.host(env={"PATH": str(few)})
    error = refusal(lab, host)
    assert f"no Python {PYTHON}, which is the client's, and no uv" in error
    assert own_uv.EXTRA in error
    assert environments(host) == []


@pytest.mark.usefixtures("no_uv")
def test_a_python_that_makes_no_environments_is_refused(lab, few, tmp_path):
    """Debian's without its python3-venv: the package is named."""
    python = few / f"python{PYTHON}"
    without_ensurepip(tmp_path, python)
    host = lab.host(env={"PATH": str(few)})
    assert f"{python} cannot make environments: install python{PYTHON}-venv" in refusal(lab, host)


@pytest.mark.parametrize("lacks", ["Python", "ensurepip"])
def test_uv_provides_what_is_missing(lab, few, tmp_path, wheelhouse, lacks):
    """A Python of the right version, or the means to make an environment with the one there is."""
    env = {"PATH": str(few), "UV_PYTHON_INSTALL_DIR": str(tmp_path / "pythons")}
    (few / "uv").symlink_to(uv.find_uv_bin())
    if lacks == "Python":
        # As uv would unpack it.
        place = tmp_path / "pythons" / f"cpython-{platform.python_version()}-linux-{ARCHITECTURE}-gnu"
        place.mkdir(parents=True)
        for part in ("bin", "lib", "include"):
            (place / part).symlink_to(Path(sys.base_prefix, part))
    else:
        place = Path(sys.base_prefix)
        without_ensurepip(tmp_path, few / f"python{PYTHON}")
    host = lab.host(env=env)
    with open_pool(lab, host, sky.Image(pip=["labpackage==1.0"], wheelhouse=str(wheelhouse))) as pool:
        assert pool.submit(eval, "__import__('labpackage').answer").result(20) == 42
        made_with = pool.submit(eval, "__import__('sys').base_prefix").result(20)
    assert Path(made_with).resolve() == place.resolve()


def test_a_file_that_cannot_be_written_leaves_nothing(lab, tmp_path):
    """The host's own text says why."""
    if os.getuid() != 0:
        pytest.skip("a small disk needs root")
    host = lab.host()
    root = host.cache / "skyward_lite"
    root.mkdir()
    # The room is looked at before: here it is gone after that, for the directory of what is sent.
    digest = bundle.digest(bundle.bundle())[:16]
    sent = root / f"sent-{digest}"
    sent.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", sent], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        error = refusal(lab, host)
        assert "could not be written there: " in error
        assert "No space left" in error
        assert list(sent.iterdir()) == []
    finally:
        subprocess.run(["umount", sent], check=True)


# ------------------------------------------------------------------------------------------------ scripts


@pytest.fixture
def scripts(wheelhouse) -> list[bytes]:
    """The scripts that hosts run, with all that an image can ask of them."""
    image = sky.Image(pip=["a>=1"], apt=["b"], wheelhouse=str(wheelhouse), index_url="http://127.0.0.1/?a&b")
    uploads = {"bundle": "/x y", "wheelhouse": "/w", "includes": "/i"}
    return [
        probe.probe_script("env-x"),
        build.build_script(FACTS, image, "env-x", uploads, PIP),
        build.build_script(FACTS, image, "env-x", uploads, Tools(None, "/a b/uv", own=True)),
        probe.verify_script("~/a b/python", image),
    ]


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_scripts_are_plain_sh(shell, scripts):
    """Every shell that may be a system's sh can read them."""
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"no {shell} here")
    for script in scripts:
        check = [path, *(["sh"] if shell == "busybox" else []), "-n"]
        assert subprocess.run(check, input=script, capture_output=True, timeout=10).stderr == b""


def test_shellcheck_has_nothing_against_the_scripts(scripts):
    """Neither as plain sh, nor with the values of an image in them."""
    for script in scripts:
        # It mistakes the values of this test: the name "env-x" for a subtraction, the quote in the directory's name for
        # one that is to quote, and the "~", which the script itself expands, for one that the shell should.
        lint = [SHELLCHECK, "-s", "sh", "-S", "warning", "-e", "SC2100,SC2089,SC2090,SC2088", "-"]
        assert subprocess.run(lint, input=script, capture_output=True, timeout=30).stdout == b""


def test_a_host_of_another_kind_gets_the_package_from_the_index():
    """What this client has runs only where the system, the architecture and the C library fit."""
    plain = sky.Image()
    assert [kind for kind, _, _ in bundle.files(FACTS, plain)] == (["bundle"] if sys.platform == "linux" else [])
    for change in ({"machine": "other"}, {"libc": (2, 1)}, {"libc": ()}, {"system": "Darwin"}):
        facts = dataclasses.replace(FACTS, **change)
        assert list(bundle.files(facts, plain)) == []
        assert f"skyward_lite=={sky.__version__}".encode() in build.build_script(facts, plain, "env-x", {}, PIP)
