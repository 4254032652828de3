"""Credentials of an image reach pip, uv and git on a node, and can be read nowhere else."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.server
import logging
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import traceback
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
import skyward_lite as sky
import uv
from environments import make_wheel, open_pool, refusal, without_ensurepip
from lab import machine
from skyward_lite import credentials
from skyward_lite._version import PYTHON
from skyward_lite.environment import bundle, probe
from skyward_lite.image import Image

USER, PASSWORD = "lab user@example", 'p@ss:w"o\\rd%/#?'
ENCODED = f"{urllib.parse.quote(USER, safe='')}:{urllib.parse.quote(PASSWORD, safe='')}"
TOKEN, OTHER = "t0kenOfALab", "0therTokenOfALab"

BACKEND = b"""
import os, zipfile
def build_wheel(directory, settings=None, metadata=None):
    package = open("NAME").read()
    with zipfile.ZipFile(os.path.join(directory, package + "-1.0-py3-none-any.whl"), "w") as wheel:
        wheel.writestr(package + ".py", "answer = 46")
        info = package + "-1.0.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: " + package + "\\nVersion: 1.0\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return package + "-1.0-py3-none-any.whl"
"""
PROJECT = '[build-system]\nrequires = ["labbackend"]\nbuild-backend = "labbackend"\n'


def source(directory: Path, name: str) -> Path:
    """Write a project for which pip must ask the index for what builds it."""
    directory.mkdir(parents=True)
    (directory / "pyproject.toml").write_text(PROJECT)
    (directory / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (directory / "NAME").write_text(name)
    return directory


class Site(http.server.ThreadingHTTPServer):
    """An index and a git server that want a password. At each request it looks at all command lines of the machine."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.logins = {"/simple/": f"{USER}:{PASSWORD}", "/team/": f"{TOKEN}:", "/other/": f"{OTHER}:"}
        self.seen: set[str] = set()
        """Command lines with a secret in them."""
        self.paths: list[str] = []
        self.place = f"127.0.0.1:{self.server_address[1]}"

    def look(self) -> None:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if any(secret in line for secret in secrets()):
                    self.seen.add(line)


def secrets() -> list[str]:
    return [PASSWORD, urllib.parse.quote(PASSWORD, safe=""), TOKEN, OTHER]


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    server: Site

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.look()
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        login = base64.b64decode(given).decode() if kind == "Basic" else ""
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        wanted = [user for start, user in self.server.logins.items() if path.startswith(start)]
        if [login] != (wanted or [self.server.logins["/simple/"]]):
            self.answer(401, WWW_Authenticate='Basic realm="lab"')
            return
        self.server.paths.append(path)
        if ".git/" in path:
            self.git(path)
            return
        file = self.server.root / path.strip("/")
        if path.startswith("/simple/") and path.count("/") >= 2:
            name = path.strip("/").partition("/")[2]
            files = [one.name for one in self.server.root.iterdir() if one.name.startswith(f"{name}-")]
            page = "".join(f'<a href="/{one}">{one}</a>' for one in files)
            self.answer(200 if files else 404, f"<!DOCTYPE html><html>{page}</html>".encode(), Content_Type="text/html")
        elif file.is_file():
            self.answer(200, file.read_bytes())
        else:
            self.answer(404)

    def do_POST(self) -> None:
        self.do_GET()

    def do_HEAD(self) -> None:
        self.do_GET()

    def git(self, path: str) -> None:
        env = {
            "GIT_PROJECT_ROOT": str(self.server.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": path,
            "QUERY_STRING": urllib.parse.urlsplit(self.path).query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
            "PATH": os.environ["PATH"],
        }
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        done = subprocess.run(["git", "http-backend"], input=body, env=env, capture_output=True, check=False)
        head, _, rest = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.answer(int(headers.pop("Status", "200").split()[0]), rest, **headers)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    make_wheel(root, "labpackage", "1.0", {"labpackage.py": b"answer = 42\n"})
    make_wheel(root, "labbackend", "1.0", {"labbackend.py": BACKEND})
    work = tmp_path_factory.mktemp("work")
    with tarfile.open(root / "labindexed-1.0.tar.gz", "w:gz") as archive:
        archive.add(source(work / "labindexed", "labindexed"), "labindexed-1.0")
    for place in ("team", "other"):
        git = ["git", "-C", str(source(work / place, f"lab{place}")), "-c", "user.name=lab", "-c", "user.email=lab"]
        for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "one"]):
            subprocess.run([*git, *command], check=True)
        subprocess.run(
            ["git", "clone", "-q", "--bare", str(work / place), str(root / place / "source.git")], check=True
        )
    with Site(root) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def leaks(directory: Path) -> list[str]:
    """List the files below a directory in which a secret stands."""
    found = []
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            text = path.read_bytes().decode(errors="replace")
            if any(secret in text for secret in secrets()):
                found.append(str(path))
    return found


@pytest.fixture
def unmasked(site, caplog) -> Iterator[None]:
    """See that no secret was on a command line or in the log."""
    site.seen.clear()
    site.paths.clear()
    caplog.set_level(logging.DEBUG)
    yield
    assert site.seen == set()
    assert not any(secret in caplog.text for secret in secrets())


def with_uv(directory: Path) -> str:
    """Make a directory for PATH with a uv, and a Python that needs it."""
    tools = directory / "tools"
    tools.mkdir()
    (tools / "uv").symlink_to(uv.find_uv_bin())
    without_ensurepip(directory, tools / f"python{PYTHON}")
    return f"{tools}:{os.environ['PATH']}"


@pytest.mark.usefixtures("unmasked")
@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_credentials_are_on_no_command_line(lab, site, tmp_path, installer):
    """Neither pip, uv and git nor their children show them, nothing on the host keeps them, and each is for its place.

    What the user has there for the same hosts is not asked.
    """
    path = with_uv(tmp_path) if installer == "uv" else os.environ["PATH"]
    host = lab.host(env={"PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "PATH": path})
    home = host.directory / "home"
    (home / ".netrc").write_text("machine elsewhere login a password b\nmachine 127.0.0.1 login c password d\n")
    (home / ".gitconfig").write_text("[credential]\n  helper = store\n")
    (home / ".git-credentials").write_text(f"http://stale:stale@{site.place}\n")
    image = sky.Image(
        pip=[
            "labindexed",
            f"labpackage @ http://{ENCODED}@{site.place}/labpackage-1.0-py3-none-any.whl",
            f"labteam @ git+http://{TOKEN}@{site.place}/team/source.git@main",
            f"git+http://{OTHER}:@{site.place}/other/source.git#egg=labother",
        ],
        index_url=f"http://{ENCODED}@{site.place}/simple",
    )
    names = ("labpackage", "labindexed", "labteam", "labother")
    with open_pool(lab, host, image) as pool:
        assert [pool.submit(eval, f"__import__({name!r}).answer").result(20) for name in names] == [42, 46, 46, 46]
    assert "/simple/labbackend/" in site.paths
    assert leaks(host.directory) == []


def test_no_variable_of_a_failed_build_has_credentials(lab, tmp_path):
    """Programs that report errors often show the variables of each frame."""
    image = sky.Image(index_url=f"http://{ENCODED}@127.0.0.1:9/simple", pip=[f"git+http://{TOKEN}@127.0.0.1:9/a"])
    python = tmp_path / f"python{PYTHON}"
    python.write_text(f"#!/bin/sh\n[ \"$2 $3\" = '-m venv' ] && exit 1\nexec '{sys.executable}' \"$@\"\n")
    python.chmod(0o755)
    with machine(lab, lab.host(env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}).name) as (one, core):
        one.wanted = dataclasses.replace(one.wanted, image=image)
        with pytest.raises(sky.NodeStartError) as caught:
            one.open(core)
    told = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    frames = "".join(line for line in told.format() if "/skyward_lite/" in line)
    assert "_environment" in frames
    assert not any(secret in frames for secret in secrets())


@pytest.mark.usefixtures("unmasked")
def test_what_fails_is_said_without_credentials(lab, site, tmp_path):
    """Of an index, of a file and of a repository; whether the host quotes them or we do."""
    host = lab.host(env={"PATH": with_uv(tmp_path)})
    wrong = f"http://{ENCODED}@{site.place}"
    for image, expected in (
        (sky.Image(pip=["labmissing"], index_url=f"{wrong}/simple"), "labmissing was not found"),
        (sky.Image(pip=[f"a @ {wrong}/a.whl"]), "a @ http://***@"),
        (sky.Image(pip=[f"git+{wrong}/team/none.git"]), "git+http://***@"),
    ):
        text = refusal(lab, host, image)
        assert expected in text
        assert not any(secret in text for secret in secrets()), text
    assert leaks(host.directory) == []


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:secret@host/simple", "https://***@host/simple"),
        ("https://secret@host", "https://***@host"),
        ("https://secret:@host", "https://***@host"),
        ("https://:secret@host", "https://***@host"),
        ("https://us%40er:s%2Fecret@host:8080/a@b", "https://***@host:8080/a@b"),
        ("https://user:s@cret@host/a@v1", "https://***@host/a@v1"),
        ("https://user:sec/ret@host/a", "https://***@host/a"),
        ("https://user:sec?r#t@host/a", "https://***@host/a"),
        ("https://user:sec ret@host/a", "https://***@host/a"),
        ("https://host: me@home, http://host:80 me@home", "https://host: me@home, http://host:80 me@home"),
        ("GIT+HTTPS://user:secret@host/a.git@v1#egg=a", "GIT+HTTPS://***@host/a.git@v1#egg=a"),
        ("http://a:b@h 'https://c:d@i', (ftp://e@j)", "http://***@h 'https://***@i', (ftp://***@j)"),
        ("--extra-index-url=https://user:secret@[::1]:80/", "--extra-index-url=https://***@[::1]:80/"),
        ("socks5h://user:secret@proxy:1080", "socks5h://***@proxy:1080"),
        ("git+ssh://git:secret@host/a", "git+ssh://***@host/a"),
        ("git+ssh://git@host/a", "git+ssh://git@host/a"),
        ("https://host/a.whl?token=secret&b=1#c", "https://host/a.whl?token=***&b=1#c"),
        ("https://h/a?X-Amz-Signature=secret", "https://h/a?X-Amz-Signature=***"),
        ("https://host:8443/r.git@v1 and user@host", "https://host:8443/r.git@v1 and user@host"),
        ("a @ file:///x/y@z; python_version > '3'", "a @ file:///x/y@z; python_version > '3'"),
        ("https://[::1]:80/a@b", "https://[::1]:80/a@b"),
    ],
)
def test_masked_text(text, shown):
    """What may be a user name or a password of any URL is not shown; the rest is."""
    assert credentials.mask(text) == shown
    assert credentials.mask(shown) == shown


@pytest.mark.parametrize("part", ["a", "a+", "http://", "a://b:", "://:", "?", "&token", "?token=", "@", ":", "a://b@"])
def test_no_text_takes_long_to_mask(part):
    """Hosts print any: plenty of whatever has a use in a URL is masked before the test's time is over."""
    text = credentials.mask(part * (200_000 // len(part)))
    assert credentials.mask(text) == text


def test_an_image_shows_no_secret():
    """Neither do its errors, nor what is made of it; it keeps them, also when it is pickled."""
    url = f"https://user:{TOKEN}@host/simple"
    image = sky.Image(pip=[f"git+{url}"], index_url=url, env={"API_KEY": TOKEN})
    for text in (
        repr(image),
        str(image),
        f"{[image]}",
        str(image.missing()),
        repr(sky.plugins.joblib().transform(image)),
    ):
        assert TOKEN not in text
    assert "API_KEY" in repr(image)
    assert (pickle.loads(pickle.dumps(image)), image.with_pip("a").index_url) == (image, url)
    assert TOKEN.encode() not in probe.verify_script("/python", image)
    for wrong in (
        {"pip": url},
        {"pip": [f"--extra-index-url={url}"]},
        {"pip": [f"{url}\n"]},
        {"pip": [f"hg+{url}"]},
        {"pip": [f"a @ https://user:a {TOKEN}@host/a.whl"]},
        {"pip": [f"git+ssh://git:{TOKEN}@host/a"]},
        {"pip": [f"{url} {url}"]},
        {"pip": [f"{url} # a"]},
        {"index_url": f"{url} "[:-1] + "\0"},
        {"index_url": f"https://user:{TOKEN}/a@host"},
        {"index_url": f"ftp://user:{TOKEN}@host"},
        {"wheelhouse": url},
        {"includes": [url]},
        {"apt": [f"{url} a"]},
        {"python": url},
    ):
        with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
            Image(**wrong)
        assert TOKEN not in "".join(map(str, [caught.value, caught.value.__cause__]))
    for mistaken in ({"image": url}, {"image": [url]}, {"provider": url}):
        with pytest.raises(TypeError) as caught:
            sky.pool(**mistaken)
        assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("login", "hidden"),
    [
        ("user:s%2fcret", {"s/cret", "s%2Fcret"}),
        (f"{TOKEN}{OTHER}:x-oauth-basic", {f"{TOKEN}{OTHER}", "x-oauth-basic"}),
        (f"{TOKEN}:", {TOKEN}),
        ("user:abc", set()),
    ],
)
def test_what_a_host_prints_of_credentials_is_masked(login, hidden):
    """As they are sent and as they are written, also outside of a URL; a short one would be part of many words."""
    assert credentials.secrets(f"https://{login}@host") == hidden


def test_a_new_token_makes_no_other_environment():
    """The name of the environment can be read by others: nothing in it comes from credentials."""
    one, other = (
        sky.Image(pip=[f"git+https://{login}@host/a"], index_url=f"https://{login}@host") for login in ("a:b", "token")
    )
    assert bundle.environment_name(one) == bundle.environment_name(other)
    assert bundle.environment_name(one) == bundle.environment_name(
        sky.Image(pip=["git+https://host/a"], index_url="https://host")
    )
