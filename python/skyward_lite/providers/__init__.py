"""Where nodes come from. A provider names machines, connects to each of them, and releases them."""

from __future__ import annotations

import abc
import dataclasses

from .. import _core
from ..errors import NodeStartError
from ..image import Image


class MachineGoneError(NodeStartError):
    """Raised when a machine is gone for good, so that nobody need try to connect to it again."""


@dataclasses.dataclass(frozen=True)
class NodeRequest:
    """What a pool asks its provider for.

    `vcpus` and `memory_gb` are what each node must have at least. A provider that cannot choose its machines uses them
    as they are and logs at INFO which of them have less. `connect_timeout` is in seconds, for one node;
    `start_timeout` for all.
    """

    nodes: int
    least: int
    """With fewer nodes than this the pool does not start."""
    image: Image
    vcpus: int | None
    memory_gb: float | None
    connect_timeout: float
    start_timeout: float = 600.0


@dataclasses.dataclass(frozen=True)
class PreparedMachine:
    """A machine that the client is connected to and that has its environment."""

    connection: _core.Connection
    command: str
    """Starts the agent there, for a new session."""
    again: str | None = None
    """Resumes a session that was cut, on a further connection to the machine, with the path of the agent's socket as
    one more word; None if its agent ends with the connection."""
    stripe: str | None = None
    """Hands a further channel to the agent there, with the path of the agent's socket as one more word.

    None if further channels are of no use.
    """


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a pool's machines cost, in dollars.

    Parameters
    ----------
    hourly : float
        Per hour, for the machines that run now.
    total : float
        For the pool so far.
    """

    hourly: float
    total: float


class Machine(abc.ABC):
    """A machine that can become a node."""

    name: str
    concurrency: int | None = None
    """The number of tasks that run on it at once; None for `Worker(concurrency=)`."""
    python: str | None = None
    """An interpreter there that is used as it is, and into which nothing is installed; None if there is none."""
    cache_bytes: int | None = None
    """Bytes of its memory for data that tasks share; None for a share that the core knows. `Worker(cache_gb=)` goes
    before."""
    replaceable = False
    """Whether its provider can start another machine in its place."""
    returns = False
    """Whether it may be opened again after it was lost, and is the same node then."""
    may_linger = True
    """Whether it may still take sessions for a while after it announced that it will be gone."""
    shares_files = False
    """Whether it sees this machine's files, so that the client's import path is valid there."""
    doing = ""
    """What it does on its way to being a node, fit to be shown: "downloading numpy 2.4.1 (16 MB)"; "" if that is not
    known. Set by the thread that opens it. While the node is connecting it is also its `reason`."""

    @abc.abstractmethod
    def open(self, core: _core.Core) -> PreparedMachine:
        """Connect, and prepare what the agent needs. Each machine has a thread for this, and may wait.

        Raises `NodeStartError` or `CoreError`: then the pool does without this machine, and reports the reason. A
        machine that `returns` is opened once more each time that it was lost.
        """

    def reconnect(self, core: _core.Core) -> _core.Connection:
        """Connect once more to a machine whose connection was cut, and prepare nothing: its agent lives on.

        Called if `PreparedMachine.again` is given. Raises `NodeStartError`; `MachineGoneError` if the machine is gone.
        """
        raise NotImplementedError

    def failed_transiently(self) -> bool:
        """Return whether it failed to start for a transient reason: then the pool replaces it.

        Called for replaceable machines only, on a thread of its own.
        """
        return False

    def ended_as_planned(self) -> bool:
        """Return whether it is gone, or soon will be, for a reason that was to be expected, as a time limit is.

        Called for replaceable machines only, on a thread of its own. To replace it does not count then: a pool replaces
        machines that fail only so often.
        """
        return False


class Provider(abc.ABC):
    """The base of all providers, for those who write one of their own. It is no public contract yet."""

    nodes: int | None = None
    """The number of nodes, if the provider itself determines it; None if the pool does."""

    shares_files = False
    """Whether all its machines see this machine's files: see `Machine`."""
    leave = _core.LEAVE_SECONDS
    """Seconds within which a pool's nodes and machines are gone when the pool is left.

    `stop` gets the time that the nodes' goodbye leaves of them, at least half a second. The default has room for both:
    see `rust/src/timing.rs`.
    """
    outlives_client = False
    """Whether its machines would go on without this process: then SIGTERM, too, leaves the pool in order."""

    @abc.abstractmethod
    def start(self, wanted: NodeRequest, machines: list[Machine]) -> None:
        """Append the machines, and begin to start them.

        Each machine is appended as soon as there is something to release, so that the pool can release it even if this
        raises. A provider may serve several pools at once, which it tells apart by their lists of machines.

        Parameters
        ----------
        wanted : NodeRequest
            What the pool asks for.
        machines : list of Machine
            The pool's list of machines, empty so far.

        Raises
        ------
        NodeStartError
            If the request can never be met.
        """

    @abc.abstractmethod
    def stop(self, machines: list[Machine], timeout: float) -> None:
        """Release the machines of a pool, by force if need be. Idempotent.

        Parameters
        ----------
        machines : list of Machine
            The pool's machines.
        timeout : float
            Seconds within which they are to be released.
        """

    def replace(self, machine: Machine, machines: list[Machine]) -> None:
        """Append a machine that takes the place of another.

        Called for replaceable machines only, on a thread of its own.

        Parameters
        ----------
        machine : Machine
            The one that is lost or soon will be.
        machines : list of Machine
            The pool's list of machines.

        Raises
        ------
        NodeStartError
            If there is none.
        """
        raise NotImplementedError

    def retire(self, machine: Machine) -> None:  # noqa: B027 (most have nothing to do)
        """Release a machine that is lost, before the others. Called for replaceable machines only. Idempotent.

        Parameters
        ----------
        machine : Machine
            The machine.
        """

    def cost(self, machines: list[Machine]) -> Cost | None:
        """Return what the machines cost.

        Parameters
        ----------
        machines : list of Machine
            The pool's machines, also those that were released.

        Returns
        -------
        Cost or None
            None if they cost nothing, or the price is unknown.
        """
        return None
