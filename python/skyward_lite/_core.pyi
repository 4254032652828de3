"""The Rust core. Not public: use `skyward_lite`.

`rust/src/python/` has the same: constants in mod.rs, exceptions and text in convert.rs, memory in buffer.rs, the
client's part in client.rs, a node's part in node.rs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias, TypedDict

from .hello import ClientHello, WorkerSettings

# ------------------------------------------------------------------------------------------------ constants

# How a task ended: `code` on a finished task.
RETURNED: Final[int]
"""The function returned: the pickle is its value, or the list of a batch's values."""
RAISED: Final[int]
"""The function raised: the pickle is the exception and its traceback."""
CRASHED: Final[int]
"""The worker process died of the task: the pickle is a description in UTF-8."""
CANCELLED: Final[int]
"""The task was dropped before it started."""
NODE_LOST: Final[int]
"""The node went away and no attempt is left: the pickle is a description in UTF-8."""
TIMED_OUT: Final[int]
"""The task ran for longer than a task may: the pickle is a description in UTF-8."""
PARTIAL: Final[int]
"""The pickle is the list of values of a batch's first calls; the worker has not begun the others."""

QUEUE_SHIFT: Final[int]
"""A task's number has the number of its completion queue in the bits from this one on."""
LEAVE_SECONDS: Final[float]
"""Seconds that leaving a pool takes at most if its machines end with their agents: see `rust/src/timing.rs`."""
LAST_TASK_DONE: Final[str]
"""How the reason of a lost node begins that announced its end and had no task left: nothing is lost with it."""
MAX_PARTS: Final[int]
"""Parts that one message may have: its pickle, and the buffers beside it."""
MAX_NOTE: Final[int]
"""Largest note, in bytes of its pickle and buffers."""
MAX_BODY: Final[int]
"""Largest frame, in bytes. A hello must fit one."""
MAX_RECORDS: Final[int]
"""Records of ended attempts that a core keeps."""
SLOT_BITS: Final[int]
"""Bits of a record's slot that are the slot's number in its worker process; the others are the worker's in its node."""

# ------------------------------------------------------------------------------------------------ exceptions

class CoreError(RuntimeError):
    """Raised when the core cannot do what it was asked; the only argument is a text for people."""

class UnreachableError(CoreError):
    """Raised when nothing answers at the host's address, or its name has no address."""

class ConnectTimeoutError(CoreError):
    """Raised when connection, key exchange and authentication together took too long."""

class HungUpError(CoreError):
    """Raised when a server hung up before it showed its key: it is asked too often, or only starting."""

class HostKeyError(CoreError):
    """Raised when a host shows a key that is not among the known ones."""

class RevokedHostKeyError(HostKeyError):
    """Raised when a host shows a revoked key."""

class AuthenticationError(CoreError):
    """Raised when the server accepts none of the identities. Names what was tried."""

class ClosedError(CoreError):
    """Raised when the core is closed meanwhile."""

# ------------------------------------------------------------------------------------------------ payloads

Message: TypeAlias = tuple[int, int, int, int, bytes | memoryview, list[memoryview] | None]
"""A task, its end, or a note: (task or note number, attempt, code, nanoseconds, pickle, out-of-band buffers).

`code` of a task: its kind (payload.py); of its end: how it ended (above).
`nanoseconds` of a task: how long all of it may run, 0 for as long as it likes; of its end: how long it ran.
A plain tuple, which its receivers unpack at once: each task crosses the border twice.
"""

class Buffer:
    """Memory received from the wire: writable through the buffer protocol, without a copy.

    The memory of large data, which several tasks may share, is a private mapping of it: it takes memory of its own only
    where it is written to, and what is written there stays there.
    """

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def copy(self) -> Buffer:
        """Return a copy. Releases the GIL meanwhile. Of large data it is a new mapping, of what was received."""

class Blob:
    """Large data that several tasks may have, by `Core.blob`. Keeps the data for as long as it lives."""

    def __len__(self) -> int: ...

def address(data: bytes | memoryview, /) -> int:
    """Return where the memory of a bytes-like object begins."""

def printable(message: str | bytes, limit: int = 4000, *, lines: bool = True) -> str:
    """Return the text of a node, a host or a cloud as it may be shown in an error, a log line or on a terminal.

    Control, bidirectional and invisible characters and bytes that are not UTF-8 are escaped. Line ends stay, and each
    further line begins with "  | ", so that none can be taken for a line of the log; without `lines` they are escaped,
    too. Of more than `limit` bytes the beginning and the end are shown. Applied to its own result it changes nothing.
    """

# ------------------------------------------------------------------------------------------------ client

Endpoint: TypeAlias = int | tuple[str, int]
"""Where an SSH server is: a socket's descriptor, which is given away, or a host and a port."""
Identity: TypeAlias = str | tuple[str, str | None] | tuple[str, list[str], bool, list[str]]
"""A way to prove who we are: a private key; a private key's file and its certificate's file; an ssh-agent's socket, the
keys that are tried first, whether only these are tried, and files with certificates for its keys."""

class NodeRow(TypedDict):
    """How a node stands: the fields of `Node`."""

    name: str
    state: str
    """The state's name; `Node` lists the names."""
    reason: str
    """Why the node is reconnecting, draining or lost; otherwise empty."""
    slots: int
    rtt: float | None
    """Round-trip time in seconds; None before the first answer."""
    pid: int | None
    """The agent's process; None before it has greeted."""
    since: float
    """When it came into this state, in seconds since 1970."""
    running: int
    """Tasks that run there: those that it holds, at most its slots."""
    queued: int
    """Tasks that it holds beyond these."""
    done: int
    """Calls that have ended there, with a value or without. A task of 10 calls counts 10."""
    failed: int
    """Those of them that ended without a value: with an exception, a crash or by the time limit."""
    rerun: int
    """Calls that ran there when the node was lost, and run again."""
    bytes_sent: int
    """Bytes handed to the SSH connection: after compression, before encryption."""
    bytes_received: int
    """Bytes that came out of it."""
    cached_bytes: int
    """Bytes of large data that the node keeps."""

class Totals(TypedDict):
    """What all nodes have done. The tasks that no node could take are among `done` and `failed`."""

    pending: int
    """Calls that have not ended."""
    done: int
    failed: int
    rerun: int
    payload_sent: int
    """Bytes of all tasks and blobs that were sent, before compression; what is sent again counts again."""
    payload_received: int
    """Bytes of all results, before compression."""
    seconds: float
    """Since the first node was added."""

class Connection:
    """An open connection to a machine, on which commands run."""

    host_key: str
    """The key that the host showed, in OpenSSH's one-line format. `CoreError` for a machine behind a command."""
    fingerprint: str
    """The type and the SHA-256 fingerprint of that key, as `ssh` shows them: "ssh-ed25519 SHA256:..."."""
    program: str | None
    """The command that leads to the machine, as it is shown: "kubectl exec -i a -- sh -c"; None for SSH."""

    def run(
        self, command: str, stdin: bytes, bound: float, watch: Callable[[bytes, bytes], object] | None = None
    ) -> tuple[int | None, bytes, bytes]:
        """Run a command to its end, at most `bound` seconds.

        Return its exit status (None if it has none) and the first MiB of its standard output and standard error.

        `watch` gets what the command has printed since the last call, of what is returned in the end: standard output
        and standard error. It is called on this thread, a few times per second at most, and once more at the end. If it
        raises an exception, the command is given up, and the exception is raised here.
        """

class Core:
    """The nodes of one pool, the queue in front of them and the completion queues behind.

    In a forked child `nodes`, `submit`, `end`, `cancel` and `connect` raise `PoolClosedError`.
    """

    is_forked: bool
    """Whether this process was forked from the one that made the core."""

    def __init__(
        self,
        attempts: int,
        max_payload: int,
        timing: tuple[float, float, float] | None = None,
        *,
        start_timeout: float | None = None,
    ) -> None:
        """`timing`: seconds between heartbeats, for an answer, and for the end of what a draining node runs.

        `start_timeout`: seconds for which tasks wait for a lost node to come back, or to be replaced.
        """
    def check_owner(self) -> None:
        """Raise `PoolClosedError` in a forked child."""
    def add_node(self, name: str, returns: bool = False) -> int:
        """Add a node that is to be connected to; return its index in `nodes`. Waiting tasks then run there, too.

        `returns`: when it is lost, `start_node` will begin anew with it, or `give_up` tells that nothing will. Until
        then tasks wait for it, at most for `start_timeout`.
        """
    def returns(self, node: int) -> bool:
        """Return whether a node is lost and `start_node` may begin anew with it.

        It was ready before, or its connection was cut, and it was not given up.
        """
    def give_up(self, node: int) -> None:
        """Note that a lost node will not come back. Tasks that waited for it alone end as `NODE_LOST`."""
    def resume_node(self, node: int, connection: Connection) -> None:
        """Go on with the session of a node that is reconnecting, over this connection.

        Wait until it does. Return at once if the node is in another state, and when its session has ended: its agent
        may be gone. Raise `CoreError` if the session does not go on over this connection; another one may do.
        """
    def expect(self, count: int) -> None:
        """Set how many further nodes are on their way. While there are any, tasks wait for them if no node is left.

        Lower it after `add_node`, or as soon as a start is given up. At 0, tasks that no node can run end as
        `NODE_LOST`.
        """
    def connect(
        self,
        *,
        endpoint: Endpoint,
        user: str,
        host_keys: list[str],
        revoked: list[str],
        accept_new: bool,
        identities: list[Identity],
        timeout: float,
        algorithms: dict[str, list[str]] | None = None,
        rekey: tuple[int, float] | None = None,
    ) -> Connection:
        """Connect to an SSH server, verify its key and authenticate, within `timeout` seconds. Raise a `CoreError`.

        The host must show one of `host_keys`; any key if there are none and `accept_new` is true; never one of
        `revoked`. `algorithms`: what is offered, by OpenSSH's names, for "kex", "host_key", "cipher" and "mac"; our own
        choice for those that are missing or empty. `rekey`: the keys are renewed after so many bytes in one direction,
        a GiB at most, and after so many seconds; None for a GiB and an hour.
        """
    def command(self, words: Sequence[str], environment: dict[str, str] | None = None) -> Connection:
        """Return a machine behind a command: each command that is run there is a process of this machine.

        `words` are the program and its arguments, but for the last one, which is the shell's command line.
        `environment` has all variables of these processes; None for our own. Nothing is started by this.
        """
    def start_node(
        self,
        node: int,
        connection: Connection,
        command: str,
        hello: ClientHello,
        ready_timeout: float,
        stripe: str | None = None,
        again: str | None = None,
    ) -> None:
        """Begin a session with the agent that `command` starts there. The node is lost if it is not ready in time.

        Also for a lost node that `returns`. `again`: the command that hands another connection to the agent, with which
        the session goes on; None: the session ends with its connection.
        `stripe`: the command that hands a further channel to the agent, without its last word, the path of the agent's
        socket. Further channels carry large data where the round trip is long; None: there are none.
        """
    def notices(self, node: int) -> list[str] | None:
        """Return what the log is to say of a node, by its own words; None before the node has greeted."""
    def packages(self, node: int) -> dict[str, str] | None:
        """Return a node's distributions: normalized name → version; None before the node has greeted.

        Empty if the node does not tell them. Names and versions are harmless where they are shown.
        """
    def require(self, packages: dict[str, str]) -> None:
        """Lose each node, as soon as it greets from now on, that has not these distributions in these versions."""
    def fail_node(self, node: int, why: str) -> None:
        """Mark a node as lost, for this reason, with which no session was begun."""
    def nodes(self) -> list[NodeRow]:
        """Return all nodes that were added, in that order."""
    def wait_for_change(self, seen: list[str], bound_ms: int) -> None:
        """Wait until a node is not in the state that it had in `seen`, in the nodes' order; at most `bound_ms`."""
    def submit(
        self,
        task: int,
        kind: int,
        pickled: bytes,
        buffers: list[Any] | None,
        node: int | None,
        nanos: int,
        generation: int,
        calls: int,
        name: int,
    ) -> bool:
        """Append a task. Never waits. The task comes out of `finished` of its queue exactly once.

        The bits of its number from `QUEUE_SHIFT` on are its completion queue, which is open; queue 0 always is.
        The task goes to the node of that index in `nodes`, or to any if `node` is None.
        Small parts of the payload are copied. Of large ones equal contents are kept once, and `bytes` are read in
        place. A buffer may be a `Blob` of this pool. `nanos`: how long all of it may run; a node that holds it for much
        longer is lost. 0 for as long as it likes. `generation`: of the user's modules, below 2 ** 32. Only workers of
        this generation run the task; a node starts fresh ones where it has others. `calls`: how many calls the task
        has, below 2 ** 32; `name`: the number of its function's name, alike. Both are for those who watch the run.
        Return False if `finished` has already returned None.
        """
    def blob(self, data: bytes | memoryview) -> Blob:
        """Return the data as a buffer for any number of `submit`s, so that its content is looked at once.

        Raise `MemoryError` if there is no memory for a copy, and `ValueError` if the data is not contiguous.
        """
    def end(self, task: int) -> bool:
        """Make a task that was never submitted come out of `finished`; return False as `submit` does."""
    def cancel(self, task: int, bound_ms: int) -> bool:
        """Drop a task that has not started. If true, it has ended and does not come out of `finished`.

        Waits at most `bound_ms` for the answer of the node that has the task. After that it may still come out as
        cancelled.
        """
    def abort(self, task: int) -> None:
        """Drop a task, or end it if it is running. How it ended comes out of `finished`, within seconds."""
    def output(self, bound_ms: int) -> list[tuple[str, int, bytes]] | None:
        """Return what workers wrote since the last call: (node's name, stream, text); None once the core is closed.

        Waits at most `bound_ms` for it.

        The stream is 1 for standard output or 2 for standard error, plus 4 if the worker has paused within a line that
        the text ends with, plus 8 times the worker's number within its node.
        """
    def notes(self, bound_ms: int) -> list[tuple[int, Message]] | None:
        """Return the notes that tasks sent since the last call: (sender, note); None once the core is closed.

        Waits at most `bound_ms` for one. A note's number is in the place of a task's. Each note is to be answered.
        """
    def answer_note(self, sender: int, note: int, error: bytes, /) -> None:
        """Answer a note of `sender`, as `notes` returned it: it was taken if `error` is empty; else `error` says why.

        A lost node hears no answer.
        """
    def requests(self, bound_ms: int) -> list[tuple[int, int, bytes]] | None:
        """Return what tasks asked since the last call: (sender, number, request); None once the core is closed.

        Waits at most `bound_ms` for one. Each request is to be answered, with `answer_request`, or by `answer_note`
        with the reason for which there is no answer.
        """
    def answer_request(self, sender: int, request: int, content: bytes, /) -> None:
        """Send `sender` what it asked for, at most `MAX_NOTE` bytes. Raise `ValueError` if there are more."""
    def open_queue(self) -> int:
        """Open a completion queue and return its number; queue 0 is open from the start.

        The numbers of its tasks are from `(number << QUEUE_SHIFT) + 1` on.
        """
    def close_queue(self, queue: int) -> None:
        """Forget a completion queue whose tasks have all ended."""
    def wake(self, queue: int) -> None:
        """Make the thread that waits in `finished` for this queue return, even with no task."""
    def finished(self, queue: int, bound_ms: int) -> list[Message] | None:
        """Return the queue's tasks that ended since the last call; None once the core is closed.

        Waits at most `bound_ms` for one.
        """
    def counts(self) -> tuple[int, int]:
        """Return (tasks that have not ended, answers that came late or twice)."""
    def totals(self) -> Totals:
        """Return what all nodes have done. Also once the core is closed."""
    def is_running(self, task: int) -> bool:
        """Return whether the task's node has reported that it runs: some tenths of a second after it began."""
    def records(self, after: int) -> tuple[int, bytes]:
        """Return the records of ended attempts from number `after` on, and the number of the first that is returned.

        Records are numbered from 0 on in the order of the ends; the newest `MAX_RECORDS` are kept, also once the core
        is closed. Each is as `struct` packs "<QQQQIIIHBx": when the attempt began, in nanoseconds since the first node
        was added, and how long it ran, alike; bytes of its payload and of its result; calls that have ended in it; the
        number of the function's name; the slot, see `SLOT_BITS`; the node's index in `nodes`; how it ended (`RETURNED`
        and the others).
        """
    def traffic(self) -> list[tuple[int, int]]:
        """Return (bytes sent, bytes received) of each node's session, in the order of the nodes' numbers.

        Counted is what is handed to the SSH connection and what comes out of it: after compression, before encryption.
        """
    def close(self) -> None:
        """Leave all nodes and cancel what has not ended. Takes at most a few seconds; idempotent."""

def generate_key() -> tuple[str, str]:
    """Make an Ed25519 key: (private, public), in OpenSSH's formats."""

def public_half(private: bytes) -> str | None:
    """Return the public key, in one line, of a private key's file in OpenSSH's format; None if it is not readable.

    No passphrase is needed: it does not hide this half.
    """

# ------------------------------------------------------------------------------------------------ node

class WorkerRuntime:
    """A worker process's runtime: its reader, its writer and its watchdog need no GIL."""

    node: str
    """What the client calls this node."""
    slots: int
    """Threads of this process that take tasks."""
    lease_ms: int
    """How long the node works on without hearing from the client, in milliseconds."""
    generation: int
    """The generation of the user's modules whose tasks this process runs."""
    directory: str
    """A private directory of the pool's on this node; "" where nodes share the client's files, or there is none."""
    settings: WorkerSettings
    over: bool
    """Whether the process is to undo its setup and end."""

    def __init__(self, fd: int) -> None:
        """Greet the agent at the socket `fd`, which is given away."""
    def ready(self) -> None:
        """Report to the agent that tasks may come."""
    def take(self, slot: int, bound_ms: int, into: list[Message]) -> None:
        """Append the next task for this slot's thread to the list, waiting at most `bound_ms`.

        The task is not returned, because an exception that is raised in the thread just then would lose it.
        """
    @staticmethod
    def current() -> int:
        """Return the number of the task that the calling thread took last; 0 for a thread that takes none."""
    def note(self, pickled: bytes, buffers: list[Any] | None, bound_ms: int) -> bytes | None:
        """Send the client a note and return the answer: b"" if the note was taken, else why not.

        Return None if no answer comes within `bound_ms`. Signals are handled meanwhile: an exception of a handler is
        raised here.
        """
    def request(self, request: bytes, bound_ms: int) -> bytes | None:
        """Ask the client for something and return it.

        Return None if no answer comes within `bound_ms`. Signals are handled meanwhile, as by `note`. Raise `CoreError`
        with the reason if the client has no answer.
        """
    def restart(self, slot: int) -> None:
        """Begin the time of what this slot runs anew."""
    def pause(self, slot: int) -> None:
        """Stop the time of what this slot runs until `restart`."""
    def finish(
        self,
        slot: int,
        task: int,
        attempt: int,
        code: int,
        calls: int,
        nanos: int,
        pickled: bytes | memoryview,
        buffers: list[Any] | None = None,
    ) -> None:
        """Hand in a result, unless the task has one. `slot` is this thread's, `calls` how many calls have ended.

        Copies the payload; waits while the agent has not taken 64 MiB.
        """

class AgentSpec(TypedDict):
    """What an agent cannot find out by itself."""

    worker: list[str]
    """The command that starts a worker."""
    version: str
    python: str
    epoch: str
    """Names this life of the agent."""
    packages: dict[str, str]
    """The distributions of this environment: normalized name → version."""
    notices: list[str]
    """What the client's log is to say of this node, a sentence each."""
    directory: str | None
    """The agent's own directory, in which its workers run and keep files; None where they share the client's."""
    cores: int | None
    """Cores that it may use, if it sees more than it may."""

def serve_embedded(spec: AgentSpec, *, fd: int, host_key: str, authorized_key: str, timeout: float) -> None:
    """Be an agent for the client at the socket `fd`, which is given away, until it is done. Raise `CoreError`.

    `timeout`: seconds until the client must have asked for the agent.
    """

def serve(spec: AgentSpec, *, reading: int, writing: int) -> None:
    """Be an agent for the client behind two sockets or pipes, which are given away, until it is done.

    Raise `CoreError`.
    """

def listen(spec: AgentSpec, *, fd: int, directory: str) -> None:
    """Be an agent for the client whose connections come to the socket `agent` in this directory, until it is done.

    `fd`: this socket, which listens; it is given away. A connection that is cut does not end the agent: the client
    comes back with another one, or the lease ends. Raise `CoreError`.
    """

def drain(reason: str) -> bool:
    """Announce to the client of this process's agent that the node will soon be gone; why, in at most 1 KiB.

    Tasks that have not started here run elsewhere at once; tasks that run here do so if they have not ended when the
    node is lost. May be called on any thread; only the first call counts. Return False if no client is being served
    (yet).
    """
