"""The Rust core. Not public: use `skyward_lite`."""

from typing import Any, TypeAlias

LEAVE_SECONDS: float
"""Seconds that leaving a pool takes at most if its machines end with their agents: see `rust/src/timing.rs`."""
PROTOCOL: int
"""Version of the wire protocol."""
QUEUE_SHIFT: int
"""A task's number has in the bits from this one on the number of the completion queue that its end comes out of."""

_NodeRow: TypeAlias = tuple[str, str, str, int, float | None, int | None]
"""(name, state, reason, slots, round-trip time in seconds, the agent's process id); for the states see `Node`"""
_Message: TypeAlias = tuple[int, int, int, int, bytes | memoryview, list[memoryview] | None]
"""(task, attempt, tag, nanoseconds, pickle, out-of-band buffers)"""

_Identity: TypeAlias = str | tuple[str, str | None] | tuple[str, list[str], bool, list[str]]
"""A private key; a file with one and one with its certificate; an agent's socket, the keys wanted first, whether only
these, and files with certificates for its keys."""

class CoreError(RuntimeError):
    """Raised when the core cannot do what it was asked; the message is for people."""

class Buffer:
    """Memory received from the wire: writable through the buffer protocol, without a copy."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def copy(self) -> Buffer:
        """Return a copy. Releases the GIL meanwhile."""

class Connection:
    """An open SSH connection, on which commands run."""

    host_key: str
    """The key that the host showed, in OpenSSH's one-line format."""

    def run(self, command: str, stdin: bytes, bound: float) -> tuple[int | None, bytes, bytes]:
        """Run a command to its end: its status (None for none), standard output and standard error, 1 MiB of each."""

class Pool:
    """The nodes of one pool, the queue in front of them and the finished tasks behind."""

    def __init__(self, attempts: int, max_payload: int, timing: tuple[float, float, float] | None = None) -> None:
        """`timing`: seconds between heartbeats, for an answer, and for the end of what a draining node runs."""
    def add_node(self, name: str) -> int:
        """Count a node in that is to be connected to; its number in `nodes`. What waits then runs there, too."""
    def expect(self, count: int) -> None:
        """Say how many nodes are asked for and not yet added: while there are any, tasks wait for them if none is left.

        Who adds one says so after `add_node`, who gives one up says so at once: with 0 the tasks that no node will ever
        take end as lost.
        """
    def connect(
        self,
        *,
        endpoint: int | tuple[str, int],
        user: str,
        host_keys: list[str],
        revoked: list[str],
        accept_new: bool,
        identities: list[_Identity],
        timeout: float,
        algorithms: dict[str, list[str]] | None = None,
    ) -> Connection:
        """Connect to the SSH server at a socket, which is given away, or at a host and port. Waits, `timeout` seconds.

        `algorithms`: what is offered, by OpenSSH's names, for "kex", "host_key", "cipher" and "mac"; our own choice for
        those that are missing or empty.

        Raises `CoreError`, whose second argument says what it is about: "host key", "authentication", "closed" or "".
        """
    def start_node(self, node: int, connection: Connection, command: str, hello: str, ready_timeout: float) -> None:
        """Begin a session with the agent that `command` starts there. Time in seconds."""
    def differences(self, node: int) -> list[str] | None:
        """Say what a node's environment has otherwise than ours, a sentence each; None before it has greeted."""
    def fail_node(self, node: int, why: str) -> None:
        """Give a node up that no session was begun with."""
    def nodes(self) -> list[_NodeRow]: ...
    def wait_for_change(self, seen: list[str], bound_ms: int) -> None:
        """Wait until a node is not in the state that it had in `seen`, in the nodes' order; at most `bound_ms`."""
    def submit(
        self, task: int, kind: int, pickled: bytes, buffers: list[Any] | None, node: int | None, nanos: int
    ) -> bool:
        """Append a task. Copies the payload; never waits. It comes out of `finished` of its lane exactly once.

        The bits of its number from the 40th on are its lane, which is open; lane 0 always is.
        It goes to the node of that index in `nodes`, or to any if that is None.
        `nanos`: how long all of it may run; its node is lost that holds it for much longer. 0 for as long as it likes.
        False if `finished` has already said that no more will come.
        """
    def end(self, task: int) -> bool:
        """Let a task that was never sent come out of `finished`; False as for `submit`."""
    def cancel(self, task: int, bound_ms: int) -> bool:
        """Drop a task that has not started. True if that is its end; then it does not come out of `finished`.

        Waits at most `bound_ms` for the word of the node that has it. After that it may still come out as cancelled.
        """
    def abort(self, task: int) -> None:
        """Drop a task, or end it if it is running. How it ended comes out of `finished`, within seconds."""
    def output(self, bound_ms: int) -> list[tuple[str, int, bytes]] | None:
        """Take what workers wrote: (node's name, stream, text); None once the pool is closed.

        The stream is 1 for standard output or 2 for standard error, plus 4 if the worker has paused within a line that
        the text ends with, plus 8 times the worker's number within its node.
        """
    def notes(self, bound_ms: int) -> list[tuple[int, _Message]] | None:
        """Take what tasks told this process, waiting at most `bound_ms`: (node, note); None once the pool is closed.

        Each note, whose number is where a task's is, is to be answered.
        """
    def answer_note(self, node: int, note: int, error: bytes) -> None:
        """Tell a note's sender that the note was taken, or in `error` why not. Nobody hears it if the node is lost."""
    def open_queue(self) -> int:
        """Open a completion queue and return its number; queue 0 is open from the start.

        The numbers of its tasks are from `(number << QUEUE_SHIFT) + 1` on.
        """
    def close_queue(self, lane: int) -> None:
        """Let go of a lane all of whose tasks have ended."""
    def wake(self, lane: int) -> None:
        """Let whoever waits for tasks of this lane return, with none if there is none."""
    def finished(self, lane: int, bound_ms: int) -> list[_Message] | None:
        """Take the tasks of a lane that ended, waiting at most `bound_ms` for one; None once the pool is closed."""
    def counts(self) -> tuple[int, int]:
        """Give (tasks that have not ended, answers that came late or twice)."""
    def close(self) -> None:
        """Leave all nodes and cancel what has not ended. Takes at most a few seconds; idempotent."""

class Worker:
    """A worker process's runtime: its reader, its writer and its watchdog need no GIL."""

    node: str
    slots: int
    processes: bool
    sys_path: list[str]
    shares_files: bool
    """Whether this node sees the client's files and processes under the same names."""
    preload: list[str]
    setup: str
    """Pickled hooks, in base64; empty for none."""
    max_payload: int
    timed: bool
    """Whether each call's time is limited."""
    over: bool
    """Whether the process is to undo its setup and end."""

    def __init__(self, fd: int) -> None:
        """Greet the agent at the socket `fd`, which is given away."""
    @staticmethod
    def end_escaped() -> None:
        """Kill what this process's tasks have started and what has moved to a process group of its own."""
    def ready(self) -> None:
        """Tell the agent that tasks may come."""
    def take(self, slot: int, bound_ms: int, into: list[_Message]) -> None:
        """Append the next task for this slot's thread to the list, waiting at most `bound_ms`. Its tag is its kind.

        It is not returned, so that it is not lost if something is raised in the thread just then.
        """
    lease_ms: int

    @staticmethod
    def current() -> int:
        """Return the number of the task that the calling thread took last; 0 for a thread that takes none."""
    def note(self, pickled: bytes, buffers: list[Any] | None, bound_ms: int) -> bytes | None:
        """Tell the client something and wait for its answer: b"" if it was taken, else why not; None after `bound_ms`.

        Signals are handled meanwhile: what a handler raises is raised here.
        """
    def restart(self, slot: int) -> None:
        """Begin the time of what this slot runs anew."""
    def pause(self, slot: int) -> None:
        """Let the time of what this slot runs not count until it begins anew."""
    def finish(
        self,
        task: int,
        attempt: int,
        tag: int,
        nanos: int,
        pickled: bytes | memoryview,
        buffers: list[Any] | None = None,
    ) -> None:
        """Hand in a result, if that has not been done. Copies the payload; waits while more than 64 MiB are unsent."""

def address(data: bytes | memoryview, /) -> int:
    """Return where the memory of a bytes-like object begins."""

def generate_key() -> tuple[str, str]:
    """Make an Ed25519 key: (private, public), in OpenSSH's formats."""

def serve_embedded(spec: dict[str, object], *, fd: int, host_key: str, authorized_key: str, timeout: float) -> None:
    """Be an agent for the client at the socket `fd`, which is given away, until it is done. Raises `CoreError`.

    `spec` has what `AgentSpec` in agent.rs lists.
    """

def serve(spec: dict[str, object], *, reading: int, writing: int) -> None:
    """Be an agent for the client behind two sockets or pipes, which are given away, until it is done.

    Raises `CoreError`.
    """

def printable(said: str | bytes, limit: int = 4000, *, lines: bool = True) -> str:
    """Return what a node, a host or a cloud says as it may be shown in an error, a log line or on a terminal.

    Control, bidirectional and invisible characters and bytes that are not UTF-8 are escaped. Line ends stay, and each
    further line begins with "  | ", so that none can be taken for a line of the log; without `lines` they are escaped,
    too. Of more than `limit` bytes the beginning and the end are kept. Applied to its own result it changes nothing.
    """

def drain(reason: str) -> bool:
    """Tell the client that this process serves that the node will soon be gone, and why, in at most 1 KiB.

    What has not started here runs elsewhere at once, and so does what runs if it has not ended when the node is lost.
    From any thread; only the first call counts. False if no client is being served (yet).
    """
