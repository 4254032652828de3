"""The agent process of one node.

`python -m skyward_lite.node.agent listen FD LOCK DIRECTORY` serves the client whose connections `attach.py` hands over
at the Unix socket FD. It outlives them, in DIRECTORY, which is locked by the descriptor LOCK (`directories.py`).
`python -m skyward_lite.node.agent stdio` serves the client at its standard input and output, and is started where no
directory can be used, or where an agent cannot outlive its connection. What both do beside this their options say
(`duties.py`).
`python -m skyward_lite.node.agent embedded` has an SSH server of its own, behind the socket at its standard input.

This module starts the agent. What an agent does is written in Rust (`rust/src/node/agent.rs`).
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence

from .. import _core
from .._version import PYTHON, __version__
from ..nesting import AGENT
from . import directories, take_socket

USE_MARK_SECONDS = 300.0
"""Between two marks of use: a small part of the days for which an unused environment stays on a host."""

MAX_PACKAGES_BYTES = 48 * 1024
"""Bytes of the distributions that the client is told of, in JSON: the whole hello must fit one frame of 64 KiB."""

_DISTRIBUTION = re.compile(r"(.+?)-([^-]+)(?:-.*)?\.(?:dist-info|egg-info)")


def packages() -> dict[str, str]:
    """Return the distributions that this interpreter finds: normalized name → version.

    They are read off the names of their directories: reading each one's metadata takes longer than all the rest of the
    agent's start.
    """
    found: dict[str, str] = {}
    for directory in sys.path:
        try:
            names = os.listdir(directory or ".")
        except OSError:
            continue
        for name in names:
            match = _DISTRIBUTION.fullmatch(name)
            if match is not None:
                # As `image.canonical`, a module that an agent starts sooner without.
                found.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), match[2])
    return found


def told(found: dict[str, str], notices: list[str]) -> dict[str, str]:
    """Return the distributions as the client is told of them: none, with a notice, if they are too many for a hello."""
    if sum(len(name) + len(version) for name, version in found.items()) + 8 * len(found) <= MAX_PACKAGES_BYTES:
        return found
    notices.append(f"its {len(found):,} packages are too many to be compared with the client's")
    return {}


def spec(*notices: str, directory: str | None = None, cpus: int | None = None) -> _core.AgentSpec:
    """Return what the agent must be told because it cannot find it out by itself.

    The client logs the `notices`. `directory`: the agent's own, in which its workers run and keep files. `cpus`: cores
    that it may use, if it sees more than it may.
    """
    options = ["-P"]
    if hasattr(sys.flags, "context_aware_warnings"):
        # From Python 3.14 on: what task_warnings.py does for earlier versions.
        options += ["-X", "context_aware_warnings=1", "-X", "thread_inherit_context=1"]
    all_notices = [*notices]
    return {
        "worker": [sys.executable, *options, "-m", "skyward_lite.node.worker"],
        "version": __version__,
        "python": PYTHON,
        "epoch": os.urandom(16).hex(),
        "packages": told(packages(), all_notices),
        "notices": all_notices,
        "directory": directory,
        "cores": cpus,
    }


def embedded() -> None:
    """Serve one client over standard input, which is a socket. The keys come first, as one line of JSON."""
    fd = take_socket()
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte:
            sys.exit("the client left before it sent its keys")
        line += byte
    keys = json.loads(line)
    _core.serve_embedded(
        spec(),
        fd=fd,
        host_key=keys["host_key"],
        authorized_key=keys["authorized_key"],
        timeout=keys["timeout"],
    )


def stdio(options: Sequence[str] = ()) -> None:
    """Serve one client over standard input and output."""
    cpus = _begin_duties(options)
    writing = os.dup(1)
    # Whatever prints in this process must not get between the frames.
    os.dup2(2, 1)
    why = os.environ.pop(directories.PROBLEM, "")
    notices = (
        [f"a cut connection would cost its tasks, as its agent cannot outlive the connection: {why}"] if why else []
    )
    directory = directories.make_spare()
    try:
        _core.serve(spec(*notices, directory=directory, cpus=cpus), reading=take_socket(), writing=writing)
    finally:
        if directory is not None:
            directories.remove(directory)


def listen(fd: int, lock: int, directory: str, options: Sequence[str] = ()) -> None:
    """Serve one client over the connections that are handed over at a listening socket; then remove the directory."""
    # Workers are not to have them: the lock shows that this process lives.
    os.set_inheritable(fd, False)
    os.set_inheritable(lock, False)
    # Not ignored, as workers would inherit that. Some systems send it to all processes of a user who logs out.
    signal.signal(signal.SIGHUP, lambda number, frame: None)
    cpus = _begin_duties(options)
    try:
        directories.prepare_work(directory)
        _core.listen(spec(directory=directory, cpus=cpus), fd=fd, directory=directory)
    finally:
        if directories.is_there(directory, lock):
            directories.remove(directory)


def _begin_duties(options: Sequence[str]) -> int | None:
    """Begin what the agent does beside its work, on threads of its own. Return the cores that it may use, if given."""
    cpus = None
    if options:
        # Not at the module's head: most agents have none, and start sooner without.
        from . import duties

        parsed = duties.parse(options)
        duties.begin(parsed)
        cpus = parsed.cpus
    mark = pathlib.Path(sys.prefix, "ready")
    if mark.is_file():
        threading.Thread(target=_mark_use, args=(mark,), name="mark", daemon=True).start()
    return cpus


def _mark_use(mark: pathlib.Path) -> None:
    """Show by the time of a file, for as long as this process lives, that its environment is in use."""
    while True:
        with contextlib.suppress(OSError):
            os.utime(mark)
        time.sleep(USE_MARK_SECONDS)


def main() -> None:
    """Be the agent that the command line asks for."""
    os.environ.pop(AGENT, None)
    # The client handles Ctrl-C and the like. The agent ends when the client tells it to, or is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        serve(sys.argv[1:])
    except _core.CoreError as error:
        sys.exit(f"skyward_lite agent: {error}")


def serve(arguments: Sequence[str]) -> None:
    """Be the agent that a command line asks for."""
    match arguments:
        case ["embedded"]:
            embedded()
        case ["stdio", *options]:
            stdio(options)
        case ["listen", fd, lock, directory, *options]:
            listen(int(fd), int(lock), directory, options)
        case wrong:
            sys.exit(
                "usage: python -m skyward_lite.node.agent embedded | stdio [OPTIONS] | listen FD LOCK DIRECTORY "
                f"[OPTIONS], with the options of node/duties.py (got {wrong})"
            )


if __name__ == "__main__":
    main()
