"""The relay: it hands the input and output of a connection to the node's agent, which it starts if there is none.

`python -P -m skyward_lite.node.attach KEY new|again [OPTIONS] [SOCKET]` is started by sshd. The agent
that it finds by the key, or starts, is a process of a session of its own, so it outlives the connection. SOCKET is
where the client knows the agent to listen: `TMPDIR` may be another one in each login.

    _reach        connect to the agent's socket; if nobody listens, listen, and start the agent with that descriptor
    _hand_over    send it descriptors 0 and 1, and how they are meant; it answers with one byte when it takes them
    _stay         wait until the agent closes the connection: sshd ends the channel when this process has ended, too

No byte of the session passes through this process. `new`: the client begins a session. An agent that has one already
ends, and is waited for, and another one is started. `again`: the client resumes its session. If no agent is there any
more, a new one is started, which tells the client so by its epoch.

Only modules of the standard library are imported, and few of them: every connection waits for them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import time

from . import directories
from .directories import LOG, PID, SOCKET, UnusableError

# What typing.TYPE_CHECKING is for type checkers, without the time that importing typing takes.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

AGENT = ("-P", "-m", "skyward_lite.node.agent")
"""The arguments with which an interpreter is the agent, but for the agent's own."""
LISTENING_FD, LOCK_FD = 3, 4
"""The descriptors that an agent inherits: the socket at which it listens, and its directory, which is locked."""
BACKLOG = 32
"""Connections that may wait for the agent: those of stripes come all at once."""
ANSWER_SECONDS = 15.0
"""For how long an agent that was there before may take to answer; it may be just starting."""
END_SECONDS = 15.0
"""For how long an agent that ends may take. One that a new session replaces is killed afterwards."""
POLL_SECONDS = 0.01
"""Pause between two looks whether an agent has ended."""
FATE_SECONDS = 0.5
"""For how long the exit status of an agent is waited for that has closed the connection."""
LOG_TAIL_BYTES = 4000
"""Bytes of the agent's log that are shown."""
FAILED = 70
"""Exit status if no agent has taken the connection, or it was lost (EX_SOFTWARE of sysexits.h)."""

_TAKEN = b"k"
_MEANINGS = {"new": b"n", "again": b"a"}


class FailedError(Exception):
    """Raised when no agent takes the connection. The argument says why."""


def _connect(path: str) -> socket.socket | None:
    """Connect to the agent with this directory. Return `None` if nobody listens there, or somebody else does."""
    connection = socket.socket(socket.AF_UNIX)
    # The agent may be stopped, with many connections that wait for it.
    connection.settimeout(ANSWER_SECONDS)
    try:
        # In /tmp another user may have taken the name, for a link to the directory of another agent of this user.
        if not directories.is_own(path):
            raise NotADirectoryError(path)
        connection.connect(f"{path}/{SOCKET}")
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", peer)[1] == os.geteuid():
            return connection
    except OSError:
        pass
    connection.close()
    return None


class Relay:
    """One attempt to hand the connection over."""

    def __init__(self, key: str, how: str, options: list[str]) -> None:
        self.key = key
        self.how = how
        end = f"/{directories.PREFIX}{key}/{SOCKET}"
        self.known = options.pop().removesuffix(end) if options and options[-1].endswith(end) else None
        """The directory that has the agent's directory, if the client knows it."""
        self.options = options
        self.umask = os.umask(0o077)
        """The session's own, which the agent gets back."""
        self.path = ""
        """The directory of the agent that was reached."""
        self.child: int | None = None
        """The agent's process, if this process has started it."""

    def run(self) -> None:
        """Hand the connection over, and stay until the agent has let go of it.

        Raise `FailedError` or `UnusableError`.
        """
        deadline = time.monotonic() + ANSWER_SECONDS + END_SECONDS
        while not _is_cut():
            with self._reach() as connection:
                if self._hand_over(connection):
                    self._stay(connection)
                    return
            if self.child is not None:
                raise FailedError(f"the agent {self._fate() or 'has closed the connection'}")
            # The agent that was there has ended, or it ends because this session is to have one of its own.
            if time.monotonic() > deadline:
                raise FailedError(f"the agent there, {self._described()}, does not take the connection")
            time.sleep(POLL_SECONDS)

    def _reach(self) -> socket.socket:
        """Connect to the agent, which is started if there is none. Raise `FailedError` or `UnusableError`."""
        bases = [*([self.known] if self.known else ()), *directories.bases()]
        for base in bases:
            self.path = directories.at(base, self.key)
            connection = _connect(self.path)
            if connection is not None:
                return connection
        problems = []
        for base in bases:
            try:
                return self._reach_in(base)
            except UnusableError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(directories.explain(base, error))
        raise UnusableError("; ".join(problems))

    def _reach_in(self, base: str) -> socket.socket:
        """Start the agent in a directory of `base` as soon as no earlier one is there, or connect to one that is."""
        deadline = time.monotonic() + END_SECONDS
        killed = False
        while True:
            self.path, fd = directories.prepare(base, self.key)
            try:
                while not directories.take_lock(fd):
                    # An agent is just starting, or just ending.
                    connection = _connect(self.path)
                    if connection is not None:
                        return connection
                    if time.monotonic() > deadline:
                        if killed or not self._kill():
                            raise FailedError(f"the earlier agent, {self._described()}, does not end")
                        killed, deadline = True, time.monotonic() + END_SECONDS
                    time.sleep(POLL_SECONDS)
                if directories.is_there(self.path, fd):
                    self._start(fd)
                    connection = _connect(self.path)
                    if connection is None:
                        raise FailedError(f"the agent {self._fate() or 'does not listen'}")
                    return connection
            finally:
                # The agent has the lock now, by a descriptor of its own.
                os.close(fd)

    # ------------------------------------------------------------------------------------------------ the agent

    def _start(self, lock: int) -> None:
        """Start the agent in the directory, whose lock this process has. Raise `OSError` if there is no room for it."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.path}/{SOCKET}")
        with socket.socket(socket.AF_UNIX) as listening:
            try:
                listening.bind(f"{self.path}/{SOCKET}")
                listening.listen(BACKLOG)
                log = self._create(LOG)
                pid = self._create(PID)
            except OSError:
                directories.remove(self.path)
                raise
            try:
                self.child = os.fork()
            except OSError as error:
                directories.remove(self.path)
                raise FailedError(f"the agent cannot be started: {error.strerror}") from error
            if self.child == 0:
                self._become_agent(listening.fileno(), lock, log)
        with contextlib.suppress(OSError):
            os.write(pid, b"%d\n" % self.child)
        os.close(log)
        os.close(pid)

    def _create(self, name: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW
        return os.open(f"{self.path}/{name}", flags, 0o600)

    def _become_agent(self, listening: int, lock: int, log: int) -> NoReturn:
        """Be the agent, in the child: with no descriptor, signal handler or session of this connection."""
        try:
            os.setsid()
            # Above the numbers that they get, which may be in use by each other.
            listening, lock, log = (_above(fd, LOCK_FD) for fd in (listening, lock, log))
            null = _above(os.open(os.devnull, os.O_RDONLY), LOCK_FD)
            for number, fd in enumerate((null, log, log, listening, lock)):
                os.dup2(fd, number)
            for name in os.listdir("/proc/self/fd"):
                if int(name) > LOCK_FD:
                    with contextlib.suppress(OSError):
                        os.close(int(name))
            for number in signal.valid_signals():
                if signal.getsignal(number) is not signal.SIG_DFL:
                    with contextlib.suppress(OSError, ValueError):
                        signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.umask(self.umask)
            arguments = [*AGENT, "listen", str(LISTENING_FD), str(LOCK_FD), self.path, *self.options]
            os.execv(sys.executable, [sys.executable, *arguments])
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.write(2, f"{sys.executable} cannot be started: {error}\n".encode())
        os._exit(FAILED)

    def _described(self) -> str:
        """Return the agent's process and directory, for a message."""
        pid = directories.read(f"{self.path}/{PID}", 20).decode(errors="replace").strip()
        return f"process {pid or 'unknown'} with {self.path}"

    def _kill(self) -> bool:
        """Kill the earlier agent, for a new session only. Return whether that was possible."""
        if self.how != "new":
            return False
        with contextlib.suppress(OSError, ValueError):
            pid = int(directories.read(f"{self.path}/{PID}", 20))
            process = os.pidfd_open(pid)
            try:
                # The process of that number may be another one, if the agent has just ended.
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    command = file.read()
                if os.stat(f"/proc/{pid}").st_uid == os.geteuid() and self.path.encode() in command.split(b"\0"):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    return True
            finally:
                os.close(process)
        return False

    def _fate(self) -> str:
        """Return how the agent that this process has started has ended, with what it printed; empty if it goes on."""
        deadline = time.monotonic() + FATE_SECONDS
        while self.child is not None and time.monotonic() < deadline:
            pid, status = os.waitpid(self.child, os.WNOHANG)
            if pid:
                self.child = None
                code = os.waitstatus_to_exitcode(status)
                how = f"was ended by signal {-code}" if code < 0 else f"has ended with status {code}"
                printed = directories.read(f"{self.path}/{LOG}", LOG_TAIL_BYTES).decode(errors="backslashreplace")
                directories.remove_left(self.path, 0.0)
                return f"{how}: {printed.strip() or 'it printed nothing'}" if code else ""
            time.sleep(POLL_SECONDS)
        return ""

    # ------------------------------------------------------------------------------------------------ the connection

    def _hand_over(self, connection: socket.socket) -> bool:
        """Hand this connection's input and output to the agent. Return whether it has taken them."""
        try:
            socket.send_fds(connection, [_MEANINGS[self.how]], [0, 1])
        except (BrokenPipeError, ConnectionResetError):
            return False
        # An agent that this process has started is waited for as long as the client waits.
        seconds = ANSWER_SECONDS if self.child is None else None
        if not _wait(connection, seconds):
            if self._kill():
                return False
            raise FailedError(f"the agent there, {self._described()}, does not answer")
        try:
            return connection.recv(1) == _TAKEN
        except ConnectionResetError:
            return False

    def _stay(self, connection: socket.socket) -> None:
        """Wait until the agent lets go of the connection, with none of it held here. Raise `FailedError` if it died."""
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        directories.sweep()
        _wait(connection, None)
        fate = self._fate()
        if fate:
            raise FailedError(f"the agent {fate}")


def _above(fd: int, least: int) -> int:
    """Return a duplicate of a descriptor with a number above `least`."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD, least + 1)


def _is_cut() -> bool:
    """Return whether the SSH server has closed its ends of this process's output, because the connection is gone.

    On a host that starts processes late the client may have gone on over another connection since.
    """
    poll = select.poll()
    for fd in (1, 2):
        poll.register(fd, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _wait(connection: socket.socket, seconds: float | None) -> bool:
    """Wait until the agent sends a byte or closes the connection. Return false after so many seconds.

    End this process when the server has gone, which reads its standard error: nobody is there for the agent any more.
    """
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    poll.register(2, 0)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        events = dict(poll.poll(left))
        if connection.fileno() in events:
            return True
        if not events:
            return False
        if events.get(2, 0) & (select.POLLERR | select.POLLHUP):
            sys.exit(0)
        poll.unregister(2)  # closed, or a file


def main() -> None:
    """Do what the command line asks for."""
    match sys.argv[1:]:
        case [key, ("new" | "again") as how, *options] if directories.is_key(key):
            pass
        case wrong:
            usage = "python -m skyward_lite.node.attach KEY new|again [OPTIONS] [SOCKET]"
            sys.exit(f"usage: {usage} (got {wrong})")
    relay = Relay(key, how, options)
    try:
        relay.run()
        return
    except UnusableError as error:
        print(f"skyward_lite: no directory can have the socket of an agent: {error}", file=sys.stderr, flush=True)
        if how == "new":
            # The agent ends with its connection then.
            os.environ[directories.PROBLEM] = str(error)
            os.umask(relay.umask)
            os.execv(sys.executable, [sys.executable, *AGENT, "stdio", *options])
    except (FailedError, OSError) as error:
        print(f"skyward_lite: {error}", file=sys.stderr, flush=True)
    sys.exit(FAILED)


if __name__ == "__main__":
    main()
