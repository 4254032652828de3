"""Where nodes come from. A provider hands out connected sockets to SSH servers, and lets go of them."""

from __future__ import annotations

import abc
import dataclasses
import socket

from ..image import Image


@dataclasses.dataclass
class Host:
    """A node that can be connected to: a socket to its SSH server, and how to get in.

    `host_keys` are the keys that the server may show, in OpenSSH's one-line format; `key` is our private key.
    """

    name: str
    socket: socket.socket
    user: str
    key: str
    host_keys: list[str]
    command: str
    shares_files: bool = False
    """Whether it sees this machine's files, so that the client's import path means something there."""


class Provider(abc.ABC):
    """Base of all providers."""

    nodes: int | None = None
    """How many nodes the provider itself names; None if that is the pool's to say."""

    @abc.abstractmethod
    def start(self, image: Image, nodes: int, connect_timeout: float) -> list[Host]:
        """Begin to start `nodes` nodes. Raises `NodeStartError` for what no node could ever satisfy."""

    @abc.abstractmethod
    def stop(self, timeout: float) -> None:
        """End everything that was started, within `timeout` seconds; by force if need be. Idempotent."""
