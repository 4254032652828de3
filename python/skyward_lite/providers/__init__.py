"""Where nodes come from. A provider hands out connected sockets to SSH servers, and lets go of them."""

from __future__ import annotations

import abc
import dataclasses
import socket

from ..image import Image


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a pool asks its provider for.

    `vcpus` and `memory_gb` are what each node must have at least. A provider that cannot choose its machines uses them
    as they are and says at INFO which have less. `connect_timeout` is in seconds, for one node.
    """

    nodes: int
    image: Image
    vcpus: int | None
    memory_gb: float | None
    connect_timeout: float


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
    handle: object = None
    """What the provider needs to end it."""


class Provider(abc.ABC):
    """Base of all providers."""

    nodes: int | None = None
    """How many nodes the provider itself names; None if that is the pool's to say."""

    @abc.abstractmethod
    def start(self, wanted: Wanted, hosts: list[Host]) -> None:
        """Begin to start nodes. Raises `NodeStartError` for what no node could ever satisfy.

        Each is appended to `hosts` as soon as there is something to end, so that the caller can end what was started
        also if this raises. A provider may serve several pools at once: what it starts is known by these hosts.
        """

    @abc.abstractmethod
    def stop(self, hosts: list[Host], timeout: float) -> None:
        """End these hosts, within `timeout` seconds; by force if need be. Idempotent."""
