"""Agents that outlive their connections: how they are started, found again, replaced, and what they leave behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import eventually, has_ended

LISTENER = Path(__file__).parent.parent / "support/fake_listener.py"
PROGRAM = (
    "import sys; from skyward_lite.node import attach; attach.AGENT = ('-P', {listener!r}); {settings}; attach.main()"
)
"""The relay, with an agent for tests."""


class Relay:
    """A relay, as the SSH server starts it: its standard input and output are a socket, and this is the other end."""

    def __init__(self, base: Path, key: str, how: str, settings: str = "pass", *words: str, **env: str) -> None:
        ours, theirs = socket.socketpair()
        command = PROGRAM.format(listener=str(LISTENER), settings=settings)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", command, key, how, *words],
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.PIPE,
                env={**os.environ, "TMPDIR": str(base), **env},
                text=True,
            )
        self.socket = ours
        self.socket.settimeout(20)
        self.lines = ours.makefile("rw")

    def ask(self, words: str) -> str:
        """Send a line, and return the answer; empty if there is none any more."""
        self.lines.write(f"{words}\n")
        self.lines.flush()
        return self.lines.readline()

    def agent(self) -> int:
        """Return the process of the agent that has this connection."""
        return int(self.ask("who").split()[1])

    def cut(self) -> None:
        """End the connection as if it were cut."""
        with contextlib.suppress(OSError):
            self.lines.close()
        self.socket.close()

    def ended(self) -> tuple[int, str]:
        """Wait for the relay's end. Return its status, and what it printed."""
        _, printed = self.process.communicate(timeout=20)
        self.cut()
        return self.process.returncode, printed


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory for agents' directories, whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def key() -> str:
    return secrets.token_hex(8)


def test_an_agent_outlives_its_connection_until_a_new_session_or_its_end(base: Path, key: str) -> None:
    """Every further connection reaches the same agent; a new session gets another one; at its end nothing is left."""
    first = Relay(base, key, "new")
    agent = first.agent()
    (directory,) = base.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert os.getsid(agent) == agent
    assert {int(fd) for fd in os.listdir(f"/proc/{agent}/fd")} >= {0, 1, 2, 3, 4}
    assert os.readlink(f"/proc/{agent}/fd/0") == "/dev/null"
    assert os.readlink(f"/proc/{agent}/fd/2") == f"{directory}/log"
    first.cut()
    assert first.ended() == (0, "")
    again = Relay(base, key, "again")
    both = Relay(base, key, "again")
    assert again.agent() == both.agent() == agent
    # A link that another user may have left does not lead to the agent.
    (base / "skyward-lite-00000000").symlink_to(directory)
    assert Relay(base, "00000000", "again", f"attach.directories.bases = lambda: ['{base}']").ended()[0] == 70
    (base / "skyward-lite-00000000").unlink()
    newer = Relay(base, key, "new")
    assert newer.agent() != agent
    assert has_ended(agent)
    assert again.ended() == both.ended() == (0, "")
    assert newer.ask("quit") == ""
    assert newer.ended() == (0, "")
    assert not [*base.iterdir()]


def test_an_agent_is_found_where_it_was_in_a_login_with_another_directory(base: Path, key: str) -> None:
    """The agent's socket, as the client knows it, counts more than TMPDIR; a new agent is started there, too."""
    for name in ("first", "second"):
        (base / name).mkdir()
    socket = f"{base}/first/skyward-lite-{key}/agent"
    first = Relay(base / "first", key, "new")
    agent = first.agent()
    first.cut()
    first.ended()
    again = Relay(base / "second", key, "again", "pass", socket)
    assert again.agent() == agent
    os.kill(agent, signal.SIGKILL)
    again.ended()
    another = Relay(base / "second", key, "again", "pass", socket)
    assert another.agent() != agent
    assert not [*(base / "second").iterdir()]
    another.ask("quit")
    another.ended()


def test_a_relay_whose_connection_is_gone_hands_nothing_over(base: Path, key: str) -> None:
    """A relay that the host starts late does not end the session that the client has begun meanwhile."""
    first = Relay(base, key, "new")
    agent = first.agent()
    for how in ("new", "again"):
        late = Relay(base, key, how, "import time; time.sleep(1)")
        late.cut()
        assert late.ended() == (0, "")
    assert first.agent() == agent
    first.ask("quit")
    first.ended()


def test_only_the_agent_of_the_directory_is_killed(base: Path, key: str) -> None:
    """A process that has got the number of an agent is left alone, also if it is an agent itself."""
    agents = [Relay(base, name, "new") for name in (key, "0000000000000001")]
    numbers = [relay.agent() for relay in agents]
    os.kill(numbers[0], signal.SIGSTOP)
    (base / f"skyward-lite-{key}/pid").write_text(f"{numbers[1]}\n")
    hurry = "attach.ANSWER_SECONDS = attach.END_SECONDS = 0.2"
    assert Relay(base, key, "new", hurry).ended()[0] == 70
    assert agents[1].agent() == numbers[1]
    os.kill(numbers[0], signal.SIGCONT)
    for relay in agents:
        relay.ask("quit")
        relay.ended()


def test_an_agent_that_died_is_replaced_and_said_so(base: Path, key: str) -> None:
    """The connection says how the agent ended, and the next one reaches another agent."""
    first = Relay(base, key, "new")
    agent = first.agent()
    os.kill(agent, signal.SIGKILL)
    status, printed = first.ended()
    assert (status, "ended by signal 9" in printed) == (70, True), printed
    second = Relay(base, key, "again")
    assert second.agent() != agent
    assert second.ask("fail") == ""
    status, printed = second.ended()
    assert (status, "ended with status 3: something broke" in printed) == (70, True), printed
    (base / "broken").touch()
    status, printed = Relay(base, key, "new").ended()
    assert (status, "ended with status 3: cannot start" in printed) == (70, True), printed


def test_only_what_killed_agents_left_long_ago_is_removed(base: Path, key: str) -> None:
    """A connection removes directories without a lock that are older than a minute, and no others."""
    killed = Relay(base, key, "new")
    agent = killed.agent()
    killed.cut()
    killed.ended()
    os.kill(agent, signal.SIGKILL)
    recent = base / "skyward-lite-0000000000000001"
    stranger = base / "skyward-lite-files"
    left = base / f"skyward-lite-{key}"
    for directory in (recent, stranger):
        directory.mkdir()
    living = Relay(base, "0000000000000002", "new")
    living.agent()
    for directory in (left, stranger, base / "skyward-lite-0000000000000002"):
        os.utime(directory, (0, 0))
    other = Relay(base, "0000000000000003", "new")
    other.agent()
    assert eventually(lambda: not left.exists(), 5)
    assert {path.name[-4:] for path in base.iterdir()} == {"0001", "iles", "0002", "0003"}
    for relay in (living, other):
        relay.ask("quit")
        relay.ended()


def test_a_stopped_agent_is_replaced_by_a_new_session_only(base: Path, key: str) -> None:
    """An agent that does not answer keeps its session, unless the client begins another one."""
    first = Relay(base, key, "new")
    agent = first.agent()
    os.kill(agent, signal.SIGSTOP)
    hurry = "attach.ANSWER_SECONDS = attach.END_SECONDS = 0.2"
    status, printed = Relay(base, key, "again", hurry).ended()
    assert (status, f"process {agent} with {base}/skyward-lite-{key}, does not answer" in printed) == (70, True), (
        printed
    )
    second = Relay(base, key, "new", hurry)
    assert second.agent() != agent
    assert has_ended(agent)
    first.ended()
    second.ask("quit")
    second.ended()


def test_what_a_session_has_set_does_not_reach_its_agent(base: Path, key: str) -> None:
    """The agent has the session's umask, and neither its ignored and blocked signals nor its other descriptors."""
    settings = (
        "import os, signal; os.umask(0o027); signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); os.set_inheritable(os.open('/', 0), True)"
    )
    relay = Relay(base, key, "new", settings)
    agent = relay.agent()
    state = dict(line.split(":\t", 1) for line in Path(f"/proc/{agent}/status").read_text().splitlines())
    assert state["Umask"].strip() == "0027"
    assert int(state["SigBlk"], 16) == 0
    ignored = {number for number in signal.valid_signals() if int(state["SigIgn"], 16) & 1 << number - 1}
    assert ignored <= {signal.SIGPIPE, signal.SIGXFSZ}, "Python itself ignores these two"
    assert "/" not in [os.readlink(f"/proc/{agent}/fd/{fd}") for fd in os.listdir(f"/proc/{agent}/fd") if int(fd) < 50]
    relay.ask("quit")
    relay.ended()
    assert not [*base.iterdir()]


def test_where_no_directory_can_be_used_an_agent_ends_with_its_connection(base: Path, key: str) -> None:
    """A new session gets an agent of the connection's own; the reasons are told for each directory."""
    nowhere = f"attach.directories.bases = lambda: ['{base}/none', '{base}/link']"
    (base / "link").symlink_to(base / "none")
    again = Relay(base, key, "again", nowhere)
    status, printed = again.ended()
    assert status == 70
    new = Relay(base, key, "new", nowhere)
    assert new.ask("who").split() == ["who", "stdio"]
    assert new.ended() == (0, printed)
    assert printed.startswith(f"skyward_lite: no directory can have the socket of an agent: {base}/none: No such file")
    assert f"; {base}/link: No such file" in printed


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a file system")
def test_a_full_file_system_is_passed_over(base: Path, key: str) -> None:
    """Where there is no room for the agent's files the next directory is used, and nothing is left in the first."""
    full = base / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=4", "none", full], check=False).returncode:
        pytest.skip("this system does not let root mount")
    try:
        relay = Relay(base, key, "new", f"attach.directories.bases = lambda: ['{full}', '{base}']")
        agent = relay.agent()
        assert not [*full.iterdir()]
        assert os.readlink(f"/proc/{agent}/fd/2") == f"{base}/skyward-lite-{key}/log"
        relay.ask("quit")
        relay.ended()
    finally:
        subprocess.run(["umount", full], check=True)
