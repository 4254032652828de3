"""`Local()`: agents on this machine, each reached over a real SSH session through a socketpair. No port is opened."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time

from .. import _core
from .._signals import held
from ..errors import NodeStartError
from . import Machine, Opened, Provider, Wanted

log = logging.getLogger("skyward_lite")


class Local(Provider):
    """Nodes on this machine, using this interpreter as it is. The default provider.

    `nodes` is their number, unless `pool(nodes=)` says it. Their size is this machine's, whatever the pool asks for.
    Both SSH keys of each node are made for this run.
    """

    def __init__(self, nodes: int | None = None) -> None:
        if nodes is not None and nodes < 1:
            raise ValueError(f"Local(nodes={nodes}): at least 1 node is needed")
        self.nodes = nodes

    def __repr__(self) -> str:
        return f"Local(nodes={self.nodes})"

    def start(self, wanted: Wanted, machines: list[Machine]) -> None:
        problems = wanted.image.missing()
        if problems:
            raise NodeStartError(
                f"this interpreter ({sys.executable}) does not meet Image(pip=...), and Local() installs nothing: "
                + "; ".join(problems)
            )
        cores, memory = _size()
        if cores < (wanted.vcpus or 0) or memory < (wanted.memory_gb or 0):
            log.info(
                "vcpus=%s, memory_gb=%s was asked for; Local() uses this machine as it is, with %d cores and %.1f GB",
                wanted.vcpus,
                wanted.memory_gb,
                cores,
                memory,
            )
        for number in range(wanted.nodes):
            with held(insist=True):
                machines.append(LocalMachine(f"local-{number}", wanted.connect_timeout))

    def stop(self, machines: list[Machine], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for machine in machines:
            assert isinstance(machine, LocalMachine)
            machine.end(deadline)


class LocalMachine(Machine):
    """An agent process of this machine, with the keys made for it."""

    shares_files = True
    program: tuple[str, ...] = ("-m", "skyward_lite.agent")
    """What the interpreter is told to run as the agent."""

    def __init__(self, name: str, timeout: float) -> None:
        self.name = name
        self.timeout = timeout
        host_key, self.host_key = _core.generate_key()
        self.user_key, authorized_key = _core.generate_key()
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.agent = subprocess.Popen(
                [sys.executable, "-P", *self.program, "embedded"],
                stdin=theirs.fileno(),
                # A group of its own: Ctrl-C at a terminal is for the client, which then ends the agent in order.
                process_group=0,
                stdout=_inherited(1),
                stderr=_inherited(2),
            )
        keys = {"host_key": host_key, "authorized_key": authorized_key, "timeout": timeout}
        self.socket.sendall(json.dumps(keys).encode() + b"\n")

    def open(self, core: _core.Pool) -> Opened:
        connection = core.connect(
            endpoint=self.socket.detach(),
            user="local",
            host_keys=[self.host_key],
            revoked=[],
            accept_new=False,
            identities=[self.user_key],
            timeout=self.timeout,
        )
        return Opened(connection, "agent")

    def end(self, deadline: float) -> None:
        """Wait until the agent has ended, and end it by force after the deadline."""
        # If no session took it over, the socket is all that keeps the agent waiting.
        self.socket.close()
        try:
            self.agent.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            # Its workers see their agent's end and follow it.
            os.killpg(self.agent.pid, signal.SIGKILL)
            self.agent.wait()


def _size() -> tuple[int, float]:
    """Give this machine's cores and its memory in GB."""
    return os.cpu_count() or 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _inherited(fd: int) -> int | None:
    """Give a process our descriptor; one that is closed would otherwise become some socket's number there."""
    try:
        os.fstat(fd)
    except OSError:
        return subprocess.DEVNULL
    return None
