"""Checks of an image's fields, and of answers of hosts, which must not become part of commands."""

from __future__ import annotations

import dataclasses
import netrc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import skyward_lite as sky
from environments import FACTS
from skyward_lite.distributions import installed
from skyward_lite.environment import build, installer, probe, scripts
from skyward_lite.environment.tools import Tools

WRONG = ["", "  ", "-r file", "--pre", "-e .", " -x", "\t--x", "a\nb", "a\r", "a\0b", "a\x1b[2J", "a\u2028b", "a\x0bb"]


@pytest.mark.parametrize("text", WRONG)
def test_image_refuses_options_and_lines(text):
    """A name that a program would take for an option, or for several names, is an error where it is written."""
    for field in ("pip", "apt", "index_url"):
        with pytest.raises(ValueError, match=rf"Image\({field}="):
            sky.Image(**{field: text if field == "index_url" else ["numpy", text]})


@pytest.mark.parametrize(
    ("field", "text"),
    [
        *(("pip", text) for text in ("# a", "a # b", "a\\")),
        *(("apt", text) for text in ("a b", "a-", "a- ", "a\tb")),
        *(("index_url", text) for text in ("http://a b", "https://u:p/@h")),
    ],
)
def test_image_refuses_comments_and_removals(field, text):
    """A comment, which installs nothing, and a name for apt that ends with "-", which removes, are refused."""
    with pytest.raises(ValueError, match=rf"Image\({field}="):
        sky.Image(**{field: text if field == "index_url" else [text]})


def test_requirements_that_pip_takes_are_taken():
    """Markers, extras, paths, URLs with fragments and surrounding blanks are taken."""
    texts = [
        'a>=1,<2; python_version >= "3.8" and sys_platform == "linux"',
        "a[b,c] ~= 1.0",
        "a @ https://host/a-1.whl#sha256=00",
        "git+https://host/a.git@v1#egg=a&subdirectory=b",
        "./wheels/a.whl",
    ]
    assert sky.Image(pip=[f" {text}\t" for text in texts]).pip == tuple(texts)
    assert sky.Image(apt=["libc6:arm64=2.1-1", "g++", "a/b"]).apt == ("libc6:arm64=2.1-1", "g++", "a/b")


def test_image_names_the_place_for_options_of_pip():
    """The error names the configuration file in which a further index can be set."""
    with pytest.raises(ValueError, match=r"--extra-index-url.*configuration file in the node's home directory"):
        sky.Image(pip=["--extra-index-url=http://host", "a"])


@pytest.mark.parametrize(
    ("text", "relative"),
    [
        *(
            (text, True)
            for text in ("./a", "../a-1.whl", ".", "wheels/a-1.whl", "a-1.0-py3-none-any.whl", "a-1.tar.gz")
        ),
        *((text, True) for text in ("src/a[b,c]", "a-1.ZIP[b]", "a b/c.whl"[2:], "a-1.whl; python_version > '3'")),
        *((text, False) for text in ("/a/b.whl", "~/a.whl", "${HOME}/a", "a", "a.b>=1", "a @ https://host/b/c.whl")),
        *(
            (text, False)
            for text in ("a@https://host/c.whl", "https://host/c.whl", "file:///a/b.whl", "git+ssh://g@h/a")
        ),
        *((text, False) for text in ("a @ file:///b/c.whl", "a[b,c]", "zip", "a; extra == 'x/y'", "a-zip==1.0")),
    ],
)
def test_relative_paths_are_of_the_home_directory(text, relative):
    """Relative paths of requirements mean the host's home directory, for every text that pip takes for a path."""
    assert installer._requirement(text) == (f"${{HOME}}/{text}" if relative else text)


@pytest.mark.parametrize("env", [{"": "a"}, {"a=b": "c"}, {"a\0": "b"}, {"a": "b\0"}])
def test_image_refuses_variables_that_no_process_can_have(env):
    """A variable that no process can have is refused, and its value is not shown."""
    with pytest.raises(ValueError, match=r"Image\(env="):
        sky.Image(env=env)


@pytest.mark.parametrize("path", ["", "-c", "--version", "python\n", "a\0b"])
def test_interpreters_that_are_options_are_refused(path):
    """An interpreter that looks like an option is refused, for all hosts and for one."""
    for make in (lambda: sky.SSH("host", python=path), lambda: sky.SSH(sky.Host("host", python=path))):
        with pytest.raises(ValueError, match=r"(SSH|Host)\(python="):
            make()


@pytest.mark.parametrize(
    "host", ["-oProxyCommand=x", "-x@host", "me@-x", "[-x]:22", "ssh://-x", "me@ho st", "a;b", "a\n", ""]
)
def test_hosts_that_are_options_are_refused(host):
    """A host that looks like an option is refused, so that neither ssh nor a proxy command's shell gets it."""
    with pytest.raises(ValueError, match=r"SSH\("):
        sky.SSH(host)


def test_password_of_a_host_is_not_shown():
    """A password in a host's name is refused, and the error does not show it."""
    for host in ("me:geheim@host", "ssh://me:geheim@host:22", "me:ge$heim@host"):
        with pytest.raises(ValueError, match="no password is used") as caught:
            sky.SSH(host)
        assert "heim" not in str(caught.value)


@pytest.mark.parametrize("machine", ["", "a b", "$(touch x)", "a'b", "../../etc", "-m", ".", "a/b", "x" * 99, "a;b"])
def test_architecture_of_a_host_is_checked(machine):
    """A host's architecture that is no plain word is refused, as it becomes part of paths and of a script."""
    facts = dataclasses.replace(FACTS, machine=machine)
    for use in (
        lambda: probe.interpreter(facts, "env-x"),
        lambda: build.build_script(facts, sky.Image(), "env-x", {}, Tools("/usr/bin/python")),
    ):
        with pytest.raises(sky.NodeStartError, match="`uname -m` printed"):
            use()


@pytest.mark.parametrize("field", ["root", "python", "uv"])
@pytest.mark.parametrize("path", ["relative", "-x", "/a\nb", "/a\x1b[2J", "/" + 5000 * "a"])
def test_paths_of_a_host_are_checked(field, path):
    """A path that a host reports and that is none is refused."""
    facts = dataclasses.replace(FACTS, **{field: path})
    with pytest.raises(sky.NodeStartError, match="where the path of a file was expected"):
        probe.interpreter(facts, "env-x")


def test_uname_of_a_host_is_text_to_the_probe(tmp_path, monkeypatch):
    """The probe script takes a strange answer of `uname` for text, and runs nothing of it."""
    monkeypatch.setattr(probe, "FALLBACK_DIRECTORIES", (str(tmp_path),))
    (tmp_path / "uname").write_text(f"#!/bin/sh\necho '\"; touch {tmp_path}/ran; $(touch {tmp_path}/ran)'\n")
    (tmp_path / "uname").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(["sh", "-s"], input=probe.probe_script("env-x"), env=env, capture_output=True, timeout=30)
    report = scripts.parse_report(done.stdout)
    assert report is not None
    with pytest.raises(sky.NodeStartError):
        probe.interpreter(probe.read_facts(report), "env-x")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Username for 'https://host/team/a': ", "one"),
        ("Password for 'https://one@host/team/a.git': ", "se'c:r@t 1"),
        ("Password for 'https://two@host/team/b.git': ", "secret2"),
        ("Password for 'https://two@host:8443/c': ", "secret3"),
        # Git before 2.31 asks without a path, and gets the first answer for this host.
        ("Username for 'https://host': ", "one"),
        ("Password for 'https://one@host': ", "se'c:r@t 1"),
        ("Password for 'https://two@host:8443': ", "secret3"),
        # A submodule on the same host.
        ("Password for 'https://one@host/team/other.git': ", "se'c:r@t 1"),
        # Text that a shell would expand.
        ("Username for 'https://third': ", "$HOME"),
        ("Password for 'https://$HOME@third/d': ", "$(id)`"),
        # A host to which a server may redirect git.
        ("Password for 'https://two@other/team/a.git': ", ""),
        ("Password for 'http://one@host/team/a.git': ", ""),
        ("Password for 'https://one@evil/x@host/team/a.git': ", ""),
        ("Password for 'https://one@evil/https://one@host/team/a': ", ""),
        ("Password for 'https://one@host@evil/team/a': ", ""),
        ("Password for 'https://evil/'https://one@host/team/a': ", ""),
        ("Password for 'https://two@another-host/team/a.git': ", ""),
        ("Password for 'http://one@host.evil/': ", ""),
        ("Enter passphrase for key '/x': ", ""),
    ],
)
def test_git_credentials_per_repository(prompt, answer, tmp_path):
    """Each repository has its own credentials, whichever way a version of git asks."""
    image = sky.Image(
        pip=[
            "git+https://one:se%27c%3Ar%40t%201@host/team/a.git@v1#egg=a",
            "b @ git+https://two:secret2@host/team/b; python_version > '3'",
            "git+https://two:secret3@host:8443/c.git",
            "git+https://$HOME:%24(id)%60@third/d",
        ]
    )
    lines, _ = installer.steps(image, "pip", uv=False)
    script = "\n".join([f"tmp='{tmp_path}'", scripts.read("installer.sh"), *lines, '"$GIT_ASKPASS" "$1"'])
    done = subprocess.run(["sh", "-c", script, "sh", prompt], capture_output=True, text=True, timeout=10, check=False)
    assert done.stdout == (f"{answer}\n" if answer else "")
    assert "secret" not in Path(tmp_path / "private" / "requirements").read_text()


@pytest.mark.parametrize(("user", "answer"), [("name", "kept:one"), ("a-token", ""), ("name:", ""), ("name:x", "x")])
def test_git_user_without_a_password(user, answer, tmp_path):
    """A URL with a user only gets the password that git's configuration or a netrc file has on the node."""
    (tmp_path / ".gitconfig").write_text("[credential]\n  helper = store\n")
    (tmp_path / ".git-credentials").write_text("https://other:two@host\nhttps://name:kept%3Aone@host\n")
    (tmp_path / ".netrc").write_text("machine host login name password kept:one\n")
    image = sky.Image(pip=[f"git+https://{user}@host/team/a.git"], index_url=f"https://{user}@host/simple")
    lines, _ = installer.steps(image, "pip", uv=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    script = "\n".join([f"tmp='{tmp_path}'", scripts.read("installer.sh"), *lines, '"$GIT_ASKPASS" "$1"'])
    prompt = f"Password for 'https://{user.partition(':')[0]}@host/team/a.git': "
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = ["sh", "-c", script, "sh", prompt]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.strip() == answer
    login = netrc.netrc(tmp_path / "private/netrc").authenticators("host")
    assert login is not None
    if ":" in user:
        assert (login[0], login[2]) == (user.partition(":")[0], answer)
    else:
        assert (login[0], login[2]) == ("name", "kept:one")


def test_netrc_host_is_in_small_letters():
    """Hosts in a netrc file are in small letters, as some pips compare them so with their URL."""
    image = sky.Image(index_url="https://user:secret@Host.Example:8443/Simple")
    lines, pip = installer.steps(image, "pip", uv=False)
    assert pip == "pip --index-url https://host.example:8443/Simple"
    assert 'machine host.example login "user" password "secret"\n' in "\n".join(lines)


WANTED = "is wanted, {version} is installed"
UNKNOWN = "is a URL or a path, which does not tell the package: write it as `name @ URL`"


@pytest.mark.parametrize(
    ("requirement", "problem"),
    [
        ("pytest", None),
        ("PyTest", None),
        ("pytest>=1,<99", None),
        ("pytest>=99", WANTED),
        ("pytest<1", WANTED),
        ("pytest!=99.*", None),
        ("pytest~=1.0", WANTED),
        ("pytest=={version}", None),
        ("pytest=={version}.0", None),
        ("pytest == {version}", None),
        ("pytest==0.1", WANTED),
        ("pytest==99.*", WANTED),
        ("pytest[dev]>=1", None),
        ("pytest[dev]>=99", WANTED),
        ("pytest>=99; python_version < '3'", None),
        ("pytest>=99; python_version > '3'", WANTED),
        ("nothing-like-it; sys_platform == 'win32'", None),
        ("pytest; extra == 'dev'", None),
        ("pytest; sys_platform ~= 'linux'", None),
        ("pytest>=99; sys_platform ~= 'linux'", WANTED),
        ("nothing-like-it; 'a' < 'b'", "is not installed"),
        ("pytest=={version} --hash=sha256:ab", None),
        ("pytest==0.1 --hash=sha256:ab --hash=sha256:cd", "is wanted, {version} is installed"),
        ("pytest>=99; python_version > '3' --config-settings a=b", WANTED),
        ("nothing-like-it", "is not installed"),
        ("nothing-like-it>=1", "is not installed"),
        ("pytest @ https://host/pytest-99.whl", None),
        ("nothing-like-it @ https://host/a.whl", "is not installed"),
        ("git+https://host/pytest.git#egg=pytest", UNKNOWN),
        ("./wheels/pytest", UNKNOWN),
    ],
)
def test_requirements_are_compared_with_what_is_installed(requirement, problem):
    """Names, versions and markers are compared as pip would for this interpreter."""
    version = installed("pytest")
    problems = sky.Image(pip=[requirement.format(version=version)]).missing()
    assert len(problems) == (problem is not None)
    assert all(text.endswith(problem.format(version=version)) for text in problems)


@pytest.mark.parametrize(
    ("version", "requirement", "met"),
    [
        ("2.0rc1", ">=1", True),
        ("2.0rc1", ">=2.0", False),
        ("2.0rc1", "==2.0rc1", True),
        ("2.0+cpu", "==2.0", True),
        ("2.0.post1", ">=2.0", True),
        ("2004d", ">=1", False),
        ("2004d", "", True),
    ],
)
def test_odd_versions_are_compared_as_by_pip(version, requirement, met, monkeypatch):
    """Installed pre-releases count, and a version from before PEP 440 meets only a name."""
    monkeypatch.setattr("skyward_lite.image.installed", lambda name: version)
    assert sky.Image(pip=[f"a{requirement}"]).missing() == (
        [] if met else [f"a{requirement} is wanted, {version} is installed"]
    )


def test_packages_are_known_by_the_names_of_requirements():
    """A requirement's package is known however its name is spelled; a path names none."""
    named = ["Scikit_Learn>=1; python_version > '3'", "a==1", "b.c @ https://host/b", "g==1 --hash=h"]
    image = sky.Image(pip=[*named, "./d", "git+https://e/f"])
    assert image.packages() == {"scikit-learn", "a", "b-c", "g"}
    assert image.with_package("scikit-learn", "2").pip[-1] == "scikit-learn==2"
    assert image.with_package("A", None) is image
