"""Where nodes come from. A provider names machines, connects to each of them, and lets go of them."""

from __future__ import annotations

import abc
import dataclasses

from .. import _core
from ..image import Image


@dataclasses.dataclass(frozen=True)
class NodeRequest:
    """What a pool asks its provider for.

    `vcpus` and `memory_gb` are what each node must have at least. A provider that cannot choose its machines uses them
    as they are and says at INFO which have less. `connect_timeout` is in seconds, for one node.
    """

    nodes: int
    least: int
    """Below it there is no pool."""
    image: Image
    vcpus: int | None
    memory_gb: float | None
    connect_timeout: float


@dataclasses.dataclass(frozen=True)
class PreparedMachine:
    """A machine that is connected to and has its environment: the command that starts the agent there."""

    connection: _core.Connection
    command: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """Dollars: per hour for what runs now, and what has been spent so far."""

    hourly: float
    total: float


class Machine(abc.ABC):
    """What can become a node."""

    name: str
    concurrency: int | None = None
    """Tasks at once on it; None for what `Worker(concurrency=)` says."""
    replaceable = False
    """Whether its provider can bring another one in its place."""
    shares_files = False
    """Whether it sees this machine's files, so that the client's import path means something there."""

    @abc.abstractmethod
    def open(self, core: _core.Core) -> PreparedMachine:
        """Connect, and prepare what the agent needs. Each machine has a thread for this, and may wait.

        Raises `NodeStartError` or `CoreError`: the machine is then left out, for that reason.
        """

    def unlucky(self) -> bool:
        """Say whether it did not come up for a reason that another one would not have: it is replaced then.

        Only for replaceable ones. Called on a thread of its own.
        """
        return False


class Provider(abc.ABC):
    """Base of all providers."""

    nodes: int | None = None
    """How many nodes the provider itself names; None if that is the pool's to say."""

    shares_files = False
    """Whether all its machines do: see `Machine`."""
    leave = 5.0
    """Seconds that `stop` gets."""
    outlives_client = False
    """Whether what it starts would go on without this process: then SIGTERM, too, leaves the pool in order."""

    @abc.abstractmethod
    def start(self, wanted: NodeRequest, machines: list[Machine]) -> None:
        """Name the machines, and begin to start them. Raises `NodeStartError` for what none could ever satisfy.

        Each is appended to `machines` as soon as there is something to end, so that the caller can end what was started
        also if this raises. A provider may serve several pools at once: what it starts is known by these.
        """

    @abc.abstractmethod
    def stop(self, machines: list[Machine], timeout: float) -> None:
        """Let go of these, within `timeout` seconds; by force if need be. Idempotent."""

    def replace(self, machine: Machine, machines: list[Machine]) -> None:
        """Append one that takes the place of `machine`, which is lost or soon will be. Only for replaceable ones.

        Raises `NodeStartError` if there is none. Called on a thread of its own.
        """
        raise NotImplementedError

    def retire(self, machine: Machine) -> None:  # noqa: B027 (most have nothing to do)
        """Let go of one that is lost, before the others. Only for replaceable ones; idempotent."""

    def cost(self, machines: list[Machine]) -> Cost | None:
        """Say what these cost; None if they cost nothing, or the price is unknown."""
        return None
