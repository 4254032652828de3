"""`Local()`: agents on this machine, each reached over a real SSH session through a socketpair. No port is opened."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import signal
import socket
import subprocess
import threading
import time

from .. import _core, checks, keywords, nesting
from .._signals import held
from ..errors import NodeStartError
from . import Machine, NodeRequest, PreparedMachine, Provider

log = logging.getLogger("skyward_lite")

CACHE_SHARE = 4
"""The nodes together use at most 1/4 of this machine's memory for data that tasks share, unless the user said more."""
LOST_AGENT_SECONDS = 1.0
"""What an agent whose session was lost gets to end by itself, before it is killed and another one is started."""
EXIT_STATUS_SECONDS = 0.5
"""For how long `open` waits for the exit status of an agent that has hung up."""


@keywords.explained("Local")
class Local(Provider):
    """Nodes on this machine, using this interpreter as it is. The default provider.

    Each node has the size of this machine, whatever the pool asks for. Both SSH keys of a node, the host's and the
    user's, are made for this run.

    Parameters
    ----------
    nodes : int, optional
        The number of nodes; None, the default, for `pool(nodes=)`, or one.

    Examples
    --------
    >>> with sky.pool(sky.Local(nodes=2)) as pool:
    ...     sorted(node.name for node in pool.nodes())
    ['local-0', 'local-1']
    """

    shares_files = True

    def __init__(self, nodes: int | None = None) -> None:
        self.nodes = None if nodes is None else checks.whole("Local", "nodes", nodes, 1, checks.MAX_NODES)

    def __repr__(self) -> str:
        return "Local()" if self.nodes is None else f"Local(nodes={self.nodes})"

    def start(self, wanted: NodeRequest, machines: list[Machine]) -> None:
        problems = wanted.image.missing()
        if problems:
            raise NodeStartError(
                f"this interpreter ({nesting.interpreter()}) does not meet Image(pip=...), and Local() installs "
                "nothing: " + "; ".join(problems)
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
        cache_bytes = _memory_bytes() // CACHE_SHARE // wanted.nodes
        for number in range(wanted.nodes):
            with held(insist=True):
                machines.append(LocalMachine(f"local-{number}", wanted.connect_timeout, cache_bytes))

    def stop(self, machines: list[Machine], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for machine in machines:
            assert isinstance(machine, LocalMachine)
            machine.end(deadline)


class LocalMachine(Machine):
    """An agent process of this machine, with the keys made for it; another one each time that it was lost."""

    returns = True
    shares_files = True
    python: str
    """The interpreter of the agent, which is this process's own or the one that it was made from."""
    program: tuple[str, ...] = ("-m", "skyward_lite.node.agent")
    """The arguments with which the interpreter runs the agent."""

    def __init__(self, name: str, timeout: float, cache_bytes: int | None = None) -> None:
        self.name = name
        self.cache_bytes = cache_bytes
        self.timeout = timeout
        self.python = nesting.interpreter()
        self._lock = threading.Lock()
        """Guards the agent and its socket: the machine may be released while it is opened again."""
        self._ending = False
        """Set by `end`: no further agent is started."""
        self._start_agent()

    def _start_agent(self) -> None:
        """Start an agent process, with keys of its own. Raises `NodeStartError`."""
        host_key, self.host_key = _core.generate_key()
        self.user_key, authorized_key = _core.generate_key()
        self.socket, theirs = socket.socketpair()
        try:
            with theirs:
                self.agent = subprocess.Popen(
                    [self.python, "-P", *self.program, "embedded"],
                    env=nesting.agent_environment(),
                    stdin=theirs.fileno(),
                    # A group of its own: Ctrl-C at a terminal is for the client, which then ends the agent in order.
                    process_group=0,
                    stdout=_inherited(1),
                    stderr=_inherited(2),
                )
        except OSError as error:
            self.socket.close()
            raise NodeStartError(f"sys.executable cannot be started as a node: {error}") from error
        keys = {"host_key": host_key, "authorized_key": authorized_key, "timeout": self.timeout}
        with contextlib.suppress(BrokenPipeError):
            # An agent that has already ended is noticed by `open`.
            self.socket.sendall(json.dumps(keys).encode() + b"\n")

    def open(self, core: _core.Core) -> PreparedMachine:
        with self._lock:
            if self.socket.fileno() < 0:
                # The node was lost. Its agent is to be gone before the node has another one.
                if self._ending:
                    raise NodeStartError("the pool is closed")
                self._end_agent(LOST_AGENT_SECONDS)
                self._start_agent()
            endpoint = self.socket.detach()
        try:
            connection = core.connect(
                endpoint=endpoint,
                user="local",
                host_keys=[self.host_key],
                revoked=[],
                accept_new=False,
                identities=[self.user_key],
                timeout=self.timeout,
            )
        except _core.CoreError as error:
            raise NodeStartError(self._explain(str(error))) from error
        return PreparedMachine(connection, "agent")

    def _explain(self, error: str) -> str:
        """Return what became of an agent that did not answer, and what to do."""
        try:
            fate = f"ended with status {self.agent.wait(EXIT_STATUS_SECONDS)}"
        except subprocess.TimeoutExpired:
            fate = "runs, but does not answer"
        return (
            f"{self.python}, which is sys.executable, was started as a node and {fate} ({error}). If it is no Python "
            "interpreter with skyward_lite, set sys.executable to one before the pool"
        )

    def end(self, deadline: float) -> None:
        """Wait until the agent has ended, and end it by force after the deadline."""
        with self._lock:
            self._ending = True
            # If no session took the socket over, the agent still waits at its other end.
            self.socket.close()
            self._end_agent(deadline - time.monotonic())

    def _end_agent(self, patience: float) -> None:
        try:
            self.agent.wait(max(0.0, patience))
        except subprocess.TimeoutExpired:
            # The workers notice that their agent has ended, and end too.
            os.killpg(self.agent.pid, signal.SIGKILL)
            self.agent.wait()


def _size() -> tuple[int, float]:
    """Return this machine's number of cores, and its memory in GB."""
    return os.cpu_count() or 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _memory_bytes(own_groups: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int:
    """Return how much memory the processes of this machine, or of this container, may use."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups: list[list[str]] = []
    # See cgroups(7): for each hierarchy its number, its controllers (none for version 2) and this process's group.
    with contextlib.suppress(OSError), open(own_groups) as lines:
        groups = [line.rstrip("\n").split(":", 2) for line in lines]
    for _, controllers, path in groups:
        limit, directory = "memory.max", root
        if controllers:
            if "memory" not in controllers.split(","):
                continue
            limit, directory = "memory.limit_in_bytes", f"{root}/memory"
        # The limits of the groups around it hold, too. In a container the group's own path may not be visible.
        for group in (pathlib.PurePosixPath(path), *pathlib.PurePosixPath(path).parents):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int(pathlib.Path(f"{directory}{group}", limit).read_text()))
    return min(limits)


def _inherited(fd: int) -> int | None:
    """Return our standard stream for a child; if it is closed, nothing, so that no other file gets its number."""
    try:
        os.fstat(fd)
    except OSError:
        return subprocess.DEVNULL
    return None
