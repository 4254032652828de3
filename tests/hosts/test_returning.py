"""Hosts whose agents survive, die or end with their connections: how they are attached to again, and come back."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import skyward_lite as sky
from lab import Lab, Sshd
from processes import eventually, has_ended

LOGOUT = Path(__file__).parent.parent / "support/logout.py"
"""A forced command that ends what its session has started."""

pytestmark = pytest.mark.usefixtures("functions_by_value")


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory for agents' directories, whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


def pool(lab: Lab, *hosts: Sshd, **options: object) -> sky.ComputePool:
    provider = sky.SSH(*(host.name for host in hosts), config=lab.config, python=sys.executable)
    return sky.pool(provider, worker=sky.Worker(concurrency=2), plugins=[], **options)  # type: ignore[arg-type]


def held(started: str, until: str) -> int:
    """Count this execution in a file, wait for another one, and return this process's parent."""
    with open(started, "a") as file:
        file.write("x")
    while not os.path.exists(until):
        time.sleep(0.005)
    return os.getppid()


def around() -> tuple[object, str, str, int]:
    """Return what a task finds around itself."""
    null = os.readlink(f"/proc/{os.getppid()}/fd/0")
    return signal.getsignal(signal.SIGHUP), os.path.basename(os.getcwd()), null, os.getsid(os.getppid()) - os.getppid()


def test_an_agent_survives_its_server_and_a_hangup(lab: Lab, base: Path) -> None:
    """The server is killed with its sessions and started again, the agent is sent SIGHUP: the task runs on, once."""
    host = lab.host(env={"TMPDIR": str(base)})
    started, until = base / "started", base / "until"
    with pool(lab, host) as nodes:
        node = nodes.nodes()[0]
        assert nodes.submit(around).result(20) == (signal.SIG_DFL, "work", "/dev/null", 0)
        future = nodes.submit(held, str(started), str(until))
        assert eventually(started.exists, 10)
        os.kill(node.pid or 0, signal.SIGHUP)
        host.kill()
        assert eventually(lambda: nodes.nodes()[0].state == "reconnecting", 10)
        away = nodes.status().nodes[0]
        assert node.since < away.since <= time.time()
        assert "ended without a goodbye" in away.reason
        host.start()
        assert eventually(lambda: nodes.nodes()[0].state == "ready", 30)
        assert nodes.nodes()[0].pid == node.pid
        until.touch()
        assert future.result(20) == node.pid
        assert started.read_text() == "x"
    assert eventually(lambda: has_ended(node.pid or 0), 5)
    assert sorted(path.name for path in base.iterdir()) == ["started", "until"]


def test_an_agent_is_found_by_a_login_with_another_temporary_directory(lab: Lab, base: Path) -> None:
    """Where each login has a TMPDIR of its own, the agent of the first one is found again, and its task runs once."""
    host = lab.host(env={"TMPDIR": str(base)})
    started, until, other = base / "started", base / "until", base / "other"
    other.mkdir()
    with pool(lab, host) as nodes:
        node = nodes.nodes()[0]
        future = nodes.submit(held, str(started), str(until))
        assert eventually(started.exists, 10)
        settings = host.directory / "sshd_config"
        settings.write_text(settings.read_text().replace(f"TMPDIR={base}", f"TMPDIR={other}"))
        host.kill()
        host.start()
        assert eventually(lambda: nodes.nodes()[0].since != node.since and nodes.nodes()[0].state == "ready", 30)
        until.touch()
        assert future.result(20) == node.pid
        assert started.read_text() == "x"
    assert not [*other.iterdir()]


def test_a_host_that_ends_what_connections_have_started_starts_anew(
    lab: Lab, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a cut the agent is gone, its task runs again at the next one, and the log says what may have ended it."""
    caplog.set_level(logging.INFO, "skyward_lite")
    host = lab.host(f"ForceCommand {sys.executable} {LOGOUT}", env={"TMPDIR": str(base)})
    started, until = base / "started", base / "until"
    with pool(lab, host) as nodes:
        node = nodes.nodes()[0]
        future = nodes.submit(held, str(started), str(until))
        assert eventually(started.exists, 10)
        host.kill()
        assert eventually(lambda: has_ended(node.pid or 0), 10)
        host.start()
        assert eventually(lambda: started.read_text() == "xx", 30)
        until.touch()
        assert future.result(20) == nodes.nodes()[0].pid != node.pid
    assert "its host ends the processes of a user who logs out" in caplog.text
    assert "`python -m skyward_lite check` tells" in caplog.text
    assert f"node {host.name} is ready again with 2 slots" in caplog.messages


def test_a_host_without_a_directory_has_an_agent_that_ends_with_its_connection(
    lab: Lab, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names the directory and the remedy; a cut connection costs that agent, and the node comes back."""
    host = lab.host()
    host.make_environment(sky.Image())
    (python,) = host.cache.glob("skyward_lite/*/bin/python")
    nowhere = f"directories.bases = lambda: ['{base}/none']"
    relay = f"from skyward_lite.node import attach, directories; {nowhere}; attach.main()"
    first, *rest = python.read_text().splitlines()
    become = f'case "$*" in *node.attach*) shift 3; set -- -P -c "{relay}" "$@";; esac'
    python.write_text("\n".join([first, become, *rest, ""]))
    with sky.pool(sky.SSH(host.name, config=lab.config), worker=sky.Worker(concurrency=2), plugins=[]) as nodes:
        node = nodes.nodes()[0]
        assert nodes.submit(abs, -1).result(20) == 1
        # It has a directory all the same, for its tasks and for the client's modules.
        directory = Path(nodes.submit(os.getcwd).result(20))
        assert (directory.name, list(directory.iterdir())) == ("work", [])
        host.kill()
        assert eventually(lambda: nodes.nodes()[0].state == "lost", 10)
        host.start()
        assert nodes.submit(abs, -2).result(20) == 2
        assert nodes.nodes()[0].pid != node.pid
        assert eventually(lambda: not directory.parent.exists(), 10)
    assert "a cut connection would cost its tasks, as its agent cannot outlive the connection" in caplog.text
    assert f"{base}/none: No such file or directory: make this directory, or set TMPDIR to another one" in caplog.text
