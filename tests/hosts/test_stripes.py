"""Large data to hosts that are far away, which crosses over several channels of one SSH connection."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import skyward_lite as sky
from far_link import FarLink
from lab import Lab, Sshd
from processes import eventually

SECONDS = 0.02
"""The delay of each way: at a round trip of 40 ms one channel carries 52 MB/s at most."""
SIZE = 20 * 1000 * 1000

pytestmark = pytest.mark.usefixtures("functions_by_value")


def far(lab: Lab, host: Sshd) -> FarLink:
    """Move a host far away."""
    link = FarLink((host.address, host.port), SECONDS)
    where = [f"HostName {link.address}", f"Port {link.port}", f"HostKeyAlias [{host.address}]:{host.port}"]
    lab.extra[host.name] = where
    lab.write()
    return link


@pytest.fixture
def runtime(lab: Lab) -> Iterator[tuple[Sshd, Path]]:
    """A host that is far away, and the directory for its sockets, whose path is short enough for one."""
    with tempfile.TemporaryDirectory() as directory:
        host = lab.host(env={"TMPDIR": directory})
        link = far(lab, host)
        yield host, Path(directory)
        link.close()


def handed_over(directory: Path) -> list[int]:
    """Return the processes that keep a channel for an agent whose socket is in this directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        socket = words[-2:-1]
        if socket and socket[0].startswith(f"{directory}/skyward-lite-".encode()) and socket[0].endswith(b"/agent"):
            found.append(int(entry.name))
    return found


def pool(lab: Lab, *hosts: Sshd) -> sky.ComputePool:
    names = [host.name for host in hosts]
    return sky.pool(sky.SSH(*names, config=lab.config, python=sys.executable), worker=sky.Worker(concurrency=1))


def digest(data: bytes) -> int:
    return zlib.crc32(data)


def test_far_hosts_get_large_data_over_further_channels_that_leave_nothing(
    lab: Lab, runtime: tuple[Sshd, Path]
) -> None:
    """Data arrives unchanged, and nothing is left on the host afterwards, not even of an agent that was killed."""
    host, directory = runtime
    data = os.urandom(SIZE)
    killed = directory / "skyward-lite-0123456789abcdef"
    killed.mkdir(0o700)
    (killed / "agent").touch()
    os.utime(killed, (0, 0))
    with pool(lab, host) as nodes:
        assert eventually(lambda: not killed.exists(), 5), "what a killed agent left behind"
        (listening,) = directory.glob("skyward-lite-*")
        assert listening.stat().st_mode & 0o777 == 0o700
        assert not handed_over(directory)
        assert nodes.submit(digest, data).result() == digest(data)
        assert 2 <= len(handed_over(directory)) <= 8
        assert nodes.submit(bytes, SIZE).result() == bytes(SIZE)
    assert eventually(lambda: not handed_over(directory), 5)
    assert eventually(lambda: not list(directory.iterdir()), 5)


def test_a_host_that_allows_one_channel_gets_large_data_over_that(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with `MaxSessions 1` is slower, and nothing else."""
    host = lab.host("MaxSessions 1", env={"TMPDIR": str(tmp_path)})
    link = far(lab, host)
    data = os.urandom(SIZE)
    with pool(lab, host) as nodes:
        assert nodes.submit(digest, data).result() == digest(data)
        assert not handed_over(tmp_path)
        assert [node.state for node in nodes.nodes()] == ["ready"]
    link.close()
    assert eventually(lambda: "no more sessions" in host.log_text(), 5)


def test_a_further_channel_that_ends_costs_nothing(lab: Lab, runtime: tuple[Sshd, Path]) -> None:
    """What was lost with a channel is sent again: the same agent goes on with the node's tasks."""
    host, directory = runtime
    with pool(lab, host) as nodes:
        agent = nodes.nodes()[0].pid
        for _ in range(2):
            assert nodes.submit(digest, os.urandom(SIZE)).result(30)
            (killed, *_) = handed_over(directory)
            other = os.urandom(SIZE)
            future = nodes.submit(digest, other)
            os.kill(killed, signal.SIGKILL)
            assert future.result(30) == digest(other)
        assert nodes.nodes()[0].pid == agent
    assert eventually(lambda: not handed_over(directory), 5)
