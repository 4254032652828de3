"""Connections whose keys OpenSSH and we renew, by RekeyLimit at either end: none is lost, and every byte arrives."""

from __future__ import annotations

import os
import sys
import time
import zlib

import skyward_lite as sky
from lab import Lab, Sshd
from processes import eventually
from skyward_lite.providers import openssh

SIZE = 32 << 20
LIMIT = "RekeyLimit 1M 1s"


@sky.compute
def swap(data: bytes, size: int) -> tuple[int, bytes, int]:
    """Return the hash of what came, and as many other bytes with their hash."""
    back = os.urandom(size)
    return zlib.crc32(data), back, zlib.crc32(back)


@sky.compute
def nap() -> str:
    time.sleep(1.5)
    return "slept"


def rekeys(host: Sshd) -> int:
    """Return how often both ends of the host's connections agreed on new keys."""
    log = host.log_text()
    return log.count("SSH2_MSG_NEWKEYS received") - log.count("Accepted publickey")


def test_connections_survive_rekeys_by_volume_and_by_time_from_either_end_and_from_both(lab: Lab) -> None:
    """Bytes flow in both directions, then none flow while a task runs: no node is lost, and no task runs again."""
    quiet = lab.host("LogLevel DEBUG1", ssh_options=(LIMIT,))
    server = lab.host(LIMIT, "LogLevel DEBUG1")
    both = lab.host(LIMIT, "LogLevel DEBUG1", ssh_options=(LIMIT,))
    hosts = [quiet, server, both]
    provider = sky.SSH(*[host.name for host in hosts], config=lab.config, python=sys.executable)
    with sky.pool(provider, worker=sky.Worker(concurrency=1, retries=0)) as pool:
        pids = [node.pid for node in pool.nodes()]
        data = os.urandom(SIZE)
        for there, back, crc in swap(data, SIZE) @ pool:
            assert (there, crc, len(back)) == (zlib.crc32(data), zlib.crc32(back), SIZE)
        busy = [rekeys(host) for host in hosts]
        assert min(busy) >= 10, busy
        assert nap() @ pool == ["slept"] * len(hosts)
        assert eventually(lambda: all(rekeys(host) > before for host, before in zip(hosts, busy, strict=True)), 5)
        assert [(node.state, node.pid) for node in pool.nodes()] == [("ready", pid) for pid in pids]


def test_the_limits_are_those_of_ssh(lab: Lab) -> None:
    """RekeyLimit is read as `ssh -G` has it; what it leaves open is our own choice."""
    default = (openssh.REKEY_BYTES, openssh.REKEY_SECONDS)
    for option, limits in [
        (LIMIT, (1 << 20, 1.0)),
        ("RekeyLimit 64K", (64 << 10, default[1])),
        ("RekeyLimit default 1h", (default[0], 3600.0)),
        ("RekeyLimit default", default),
    ]:
        config = lab.directory / "limited"
        config.write_text(f"Host *\n  {option}\n")
        found = openssh.resolve(openssh.parse("limited"), str(config))
        assert (found.rekey, found.unsupported) == (limits, ())
