"""`Local()`: agents on this machine, each reached over a real SSH session through a socketpair. No port is opened."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

from .. import _core
from ..errors import NodeStartError
from ..image import Image
from . import Host, Provider


class Local(Provider):
    """Nodes on this machine, using this interpreter as it is. The default provider.

    `nodes` is their number, unless `pool(nodes=)` says it. Both SSH keys of each node are made for this run.
    """

    def __init__(self, nodes: int | None = None) -> None:
        if nodes is not None and nodes < 1:
            raise ValueError(f"Local(nodes={nodes}): at least 1 node is needed")
        self.nodes = nodes
        self._agents: list[subprocess.Popen[bytes]] = []

    def __repr__(self) -> str:
        return f"Local(nodes={self.nodes})"

    def start(self, image: Image, nodes: int, connect_timeout: float) -> list[Host]:
        problems = image.missing()
        if problems:
            raise NodeStartError(
                f"this interpreter ({sys.executable}) does not meet Image(pip=...), and Local() installs nothing: "
                + "; ".join(problems)
            )
        return [self._start_one(number, connect_timeout) for number in range(nodes)]

    def _start_one(self, number: int, connect_timeout: float) -> Host:
        host_key, host_public = _core.generate_key()
        user_key, user_public = _core.generate_key()
        ours, theirs = socket.socketpair()
        with theirs:
            agent = subprocess.Popen(
                [sys.executable, "-P", "-m", "skyward_lite.agent", "embedded"],
                stdin=theirs.fileno(),
                # A group of its own: Ctrl-C at a terminal is for the client, which then ends the agent in order.
                process_group=0,
            )
        self._agents.append(agent)
        keys = {"host_key": host_key, "authorized_key": user_public, "timeout": connect_timeout}
        ours.sendall(json.dumps(keys).encode() + b"\n")
        return Host(
            name=f"local-{number}",
            socket=ours,
            user="local",
            key=user_key,
            host_keys=[host_public],
            command="agent",
            shares_files=True,
        )

    def stop(self, timeout: float) -> None:
        agents, self._agents = self._agents, []
        deadline = time.monotonic() + timeout
        for agent in agents:
            try:
                agent.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                # Its workers see their agent's end and follow it.
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()
