"""What runs on a node: the agent, and the worker processes that it starts. Nothing here imports `client`."""

from __future__ import annotations

import os


def take_socket() -> int:
    """Return a descriptor of the socket at standard input, which is empty from then on.

    That is how a process of a node gets its socket: the agent from sshd or from the client, a worker from the agent.
    """
    fd = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return fd
