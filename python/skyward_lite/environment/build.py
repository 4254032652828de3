"""The scripts that make an environment on a host, start the agent in it, and remove environments that nothing uses.

An environment is made once: in a temporary directory, under a lock, renamed when it is complete.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from .._version import PYTHON, __version__
from ..image import Image
from . import installer, probe, scripts
from .tools import Tools

LOCK_WAIT_SECONDS = 1800
"""For how long a build waits for another client's build of the same environment."""
BUILD_SECONDS = 3600.0
"""Bound on building an environment."""
CLEAN_SECONDS = 300.0
"""Bound on cleaning a host."""
UNUSED_SECONDS = 30 * 24 * 3600
"""Environments and files that nothing used for longer are removed from a host by the next build there."""
LOCK_LIFETIME_SECONDS = 24 * 3600
"""Age from which on a lock no longer protects what a build uses: no client lets a build run for so long."""
RECENT_SECONDS = 3600
"""An environment that was used within this time counts as in use: a running agent marks its own more often."""

ATTACH = ("-P", "-m", "skyward_lite.node.attach")
"""The arguments with which an interpreter hands its standard input and output to a node's agent, which it starts if
there is none; but for the node's key, "new" or "again", and the agent's own arguments."""
STDIO = ("-P", "-m", "skyward_lite.node.agent", "stdio")
"""The arguments with which an interpreter is itself the agent of a session, which ends with its connection; but for the
agent's own arguments."""
_HAND_OVER = (
    "import socket, sys; agent = socket.socket(socket.AF_UNIX); agent.connect(sys.argv[1]); "
    'socket.send_fds(agent, [b"+"], [0, 1]); list(iter(lambda: agent.recv(1), b""))'
)
STRIPE = ("-I", "-S", "-c", _HAND_OVER)
"""The arguments with which an interpreter hands its standard input and output to the agent, but for the path of the
agent's socket; it ends when the agent closes the connection (see `rust/src/node/stripes.rs`)."""

_SITE = 'site=$("$tmp/bin/python" -I -c "import sysconfig; print(sysconfig.get_path(\'purelib\'))") || exit 1'
"""Sets the directory where packages go in the new environment."""


def build_script(facts: probe.Facts, image: Image, env: str, uploads: dict[str, str], tools: Tools) -> bytes:
    """Return the script that makes the environment. `uploads` has the path on the host of each file that was sent.

    Raises `NodeStartError` if the host has no room for it.
    """
    probe.check_room(facts)
    steps = "\n".join(_steps(image, uploads, tools))
    return scripts.compose(
        f"steps() {{\n{steps}\n}}\n",
        scripts.read("build.sh"),
        ROOT=facts.root,
        ENV=f"{env}-{facts.machine}",
        LOCK_WAIT=LOCK_WAIT_SECONDS,
        UNUSED=UNUSED_SECONDS,
        **_limits(),
    )


def _limits() -> dict[str, int]:
    """Return what sweep.sh is given."""
    return {"LOCKED": LOCK_LIFETIME_SECONDS, "RECENT": RECENT_SECONDS}


def _steps(image: Image, uploads: dict[str, str], tools: Tools) -> list[str]:
    """Return the lines of shell that make the environment in "$tmp"."""
    steps = []
    if image.apt:
        told = f"progress=# installing packages of the system: {', '.join(image.apt)}"
        steps.append(f"echo {shlex.quote(told)}")
        apt = "apt-get -o DPkg::Lock::Timeout=300"  # a machine that has just booted may be updating itself
        steps.append(f"step as_root {apt} update -qq")
        steps.append(f"step as_root env DEBIAN_FRONTEND=noninteractive {apt} install -y -qq -- {_words(image.apt)}")
    if tools.own:
        steps.append("own_uv")
    if tools.uv is None:  # uv takes no time for it
        steps.append(f"echo {shlex.quote(f'progress=# making an environment of {tools.python}')}")
    steps.append(_make_environment(image, tools))
    if tools.uv is None:
        pip = '"$tmp/bin/python" -I -m pip install --no-color --progress-bar off --no-input --disable-pip-version-check'
    else:
        pip = f'{shlex.quote(tools.uv)} pip install --color never --python "$tmp/bin/python"'
    lines, pip = installer.steps(image, pip, uv=tools.uv is not None)
    steps += lines
    if "wheelhouse" in uploads and image.wheelhouse is not None:
        steps.append(_unpack(uploads["wheelhouse"], '"$tmp/wheels"'))
        pip += f' --no-index --find-links "$tmp/wheels"/{shlex.quote(Path(image.wheelhouse).name)}'
    if "wheel" in uploads:
        steps.append(f"watched {pip} {shlex.quote(uploads['wheel'])}")
    elif "bundle" in uploads:
        steps += [_SITE, _unpack(uploads["bundle"], '"$site"')]
    else:
        steps.append(f"watched {pip} skyward_lite=={__version__}")
    if image.pip:
        steps.append(f"watched {pip} -r {installer.PRIVATE}/requirements")
    if "includes" in uploads:
        steps += [_SITE, _unpack(uploads["includes"], '"$site"')]
    steps.append('step "$tmp/bin/python" -I -c "import skyward_lite._core, cloudpickle"')
    steps.append(f'step rm -rf "$tmp/wheels" {installer.PRIVATE}')
    return steps


def _make_environment(image: Image, tools: Tools) -> str:
    """Return the line that makes an empty environment."""
    if tools.uv is None:
        return f'step {shlex.quote(tools.python or "python")} -I -m venv "$tmp"'
    python = shlex.quote(tools.python or image.python or PYTHON)
    return f'watched {shlex.quote(tools.uv)} venv --color never --python {python} "$tmp"'


def _unpack(archive: str, directory: str) -> str:
    return f'step "$tmp/bin/python" -I -m zipfile -e {shlex.quote(archive)} {directory}'


def _words(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


def clean_script(seconds: int, *, dry_run: bool) -> bytes:
    """Return the script that removes whatever nothing has used for so many seconds, or only lists it."""
    what = "list" if dry_run else "both"
    return scripts.compose(scripts.read("clean.sh"), SECONDS=seconds, WHAT=what, **_limits(), **probe.places())


class Command(Protocol):
    """A function that returns the command which runs an interpreter with these arguments, for any login shell."""

    def __call__(self, python: str, *arguments: str) -> str: ...


def command(python: str, *arguments: str) -> str:
    """Return the command that runs an environment's interpreter with these arguments, for any login shell.

    In an error only the part after " -- " is shown of it.
    """
    return f"exec {scripts.command(scripts.read('agent.sh'), python, *arguments)}"


def plain_command(python: str, *arguments: str) -> str:
    """Return the command that runs an interpreter that is used as it is with these arguments."""
    return f"exec {shlex.join([python, *arguments])}"
