"""Where chaos happens: hosts behind proxies, the client's process, what its tasks wrote down, and what is left."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from lab import Lab, Sshd
from processes import eventually, has_ended
from proxy import Proxy, before

LOAD = Path(__file__).parent / "load.py"
STEP_SECONDS = 60.0
"""The longest wait for any step of a client; with more it hangs."""
LEFT_SECONDS = 5.0
"""How long something of ours may be left after a client has left its pool in order."""
KINDS = {"agent": "skyward_lite.node.agent", "worker": "skyward_lite.node.worker", "relay": "skyward_lite.node.attach"}
"""What the command lines of our processes on a node have."""


KEY = re.compile(r"(?<=skyward_lite\.node\.attach )[\w-]+")
"""In the command line of a relay, the key of its agent."""


OWN_KEY = re.compile(r"(?<=/skyward-lite-)[0-9a-f]+")
"""In a path, and in the command line of an agent, its key."""


class Hang(Exception):
    """The client did not do in time what it has to do."""


@dataclasses.dataclass(frozen=True)
class Note:
    """A line that a task wrote: task `number` begins or ends in process `pid`, whose parent is `agent`."""

    number: int
    what: str
    host: str
    pid: int
    agent: int
    time: float


class Place:
    """One host: its server, the proxy before it, and the directory for its temporary files."""

    def __init__(self, field: Field, number: int, delay: float, env: dict[str, str | None], disk: int):
        self.mark = f"{field.mark}-{number}"
        self.temporary = field.directory / f"t{number}"
        self.temporary.mkdir(0o700)
        if disk:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={disk},mode=0700", "chaos", str(self.temporary)]
            subprocess.run(mount, check=True)
        directories = dict.fromkeys(("TMPDIR", "XDG_RUNTIME_DIR"), str(self.temporary))
        settings = {**directories, "SKYWARD_FIELD_HOST": self.mark, **env}
        self.keys: set[str] = set()
        """The keys of all agents that were seen here: their directories are named by them."""
        self.forsaken: set[str] = set()
        """The keys of agents that were killed: their directories stay until a later session removes them."""
        self.sshd: Sshd = field.lab.host(env=settings)
        self.proxy: Proxy = before(field.lab, self.sshd, delay)

    @property
    def name(self) -> str:
        """The name by which the client reaches it."""
        return self.sshd.name

    def processes(self) -> dict[int, str]:
        """Return all processes of ours on this host, and all that come of them: process id → command line.

        They are known by a variable that they inherit, by this host's directory in their command line, as their working
        directory or among their open files, and by descent from one of them.
        """
        return {pid: command for pid, (command, _) in self._closure().items()}

    def _closure(self) -> dict[int, tuple[str, int]]:
        everything: dict[int, tuple[str, int]] = {}
        found: dict[int, tuple[str, int]] = {}
        for directory in Path("/proc").glob("[0-9]*"):
            pid = int(directory.name)
            with contextlib.suppress(OSError):  # it ended meanwhile
                parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                everything[pid] = command, parent
                if not command or command.startswith("sshd"):
                    continue
                if self.mark.encode() + b"\0" in (directory / "environ").read_bytes() or self._is_used(
                    directory, command
                ):
                    found[pid] = command, parent
        while more := {p: e for p, e in everything.items() if e[1] in found and p not in found}:
            found |= more
        for command, _ in found.values():
            self.keys |= set(KEY.findall(command))
        return {pid: entry for pid, entry in found.items() if not has_ended(pid)}

    def _is_used(self, directory: Path, command: str) -> bool:
        here = f"{self.temporary}/"
        links = [directory / "cwd", *(directory / "fd").iterdir()]
        if here in command:
            return True
        for link in links:
            with contextlib.suppress(OSError):
                if f"{os.readlink(link)}/".startswith(here):
                    return True
        return False

    def find(self, kind: str) -> list[int]:
        """Return the processes of a kind, the oldest first."""
        if kind == "session":
            return sorted(_descendants(self.sshd.process.pid, "sshd"))
        # The programs that our processes run have our command line for a moment.
        found = {pid: parent for pid, (command, parent) in self._closure().items() if KINDS[kind] in command}
        return sorted(pid for pid, parent in found.items() if parent not in found)

    def forsake(self, pid: int) -> None:
        """Note that a process is about to be killed, which may be an agent with a directory."""
        with contextlib.suppress(OSError):
            self.forsaken |= set(OWN_KEY.findall(Path(f"/proc/{pid}/cmdline").read_bytes().decode()))

    def files(self) -> list[str]:
        """Return what is left of ours in the file system: directories, sockets, files in memory that have a name."""
        # Directories that other tests may use at the same time have theirs in them, too.
        places = [
            self.sshd.cache / "skyward_lite/run",
            Path("/tmp"),
            Path("/dev/shm"),
            Path.home() / ".cache/skyward_lite/run",
        ]
        named = [place / f"skyward-lite-{key}" for place in places for key in self.keys]
        found = [str(path) for path in [*self.temporary.glob("skyward-lite-*"), *named] if path.exists()]
        found += [str(path) for path in self.temporary.iterdir() if path.name[:13] != "skyward-lite-"]
        with open("/proc/net/unix") as sockets:
            found += sorted({f"socket {line.split()[-1]}" for line in sockets if f"{self.temporary}/" in line})
        served = {key for command in self.processes().values() for key in OWN_KEY.findall(command)}
        return [one for one in found if not (set(OWN_KEY.findall(one)) & self.forsaken) - served]


def _descendants(pid: int, name: str) -> list[int]:
    """Return the descendants of a process that are called `name`, as far as their parents are, too."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            head, _, tail = (directory / "stat").read_text().rpartition(")")
            if int(tail.split()[1]) == pid and head.endswith(f"({name}"):
                found += [int(directory.name), *_descendants(int(directory.name), name)]
    return found


class Field:
    """Some hosts, which several clients may use one after the other."""

    def __init__(
        self,
        nodes: int,
        delay: float = 0.0,
        env: dict[str, str | None] | None = None,
        disk: int = 0,
    ) -> None:
        """Start the hosts. `delay`: of each direction, in seconds; `disk`: bytes of a disk for temporary files."""
        # A short path: there are sockets in it.
        self.directory = Path(tempfile.mkdtemp(prefix="sky", dir="/tmp"))
        self.mark = f"f{uuid.uuid4().hex[:10]}"
        self.lab = Lab(self.directory)
        self.places = [Place(self, number, delay, env or {}, disk) for number in range(nodes)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for place in self.places:
            place.proxy.close()
            for pid in place.processes():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(Exception):
            self.lab.close()
        for place in self.places:
            if place.temporary.is_mount():
                subprocess.run(["umount", "-l", str(place.temporary)], check=False)
        shutil.rmtree(self.directory, ignore_errors=True)

    def client(self, load: str, places: list[Place] | None = None, **settings: Any) -> Client:
        """Start a client with this load, on all hosts or some."""
        return Client(self, load, self.places if places is None else places, **settings)

    def processes(self) -> dict[int, str]:
        """Return all processes of ours on all hosts."""
        return {pid: command for place in self.places for pid, command in place.processes().items()}

    def left(self) -> list[str]:
        """Return what is left of ours on any host."""
        found = [f"process {pid}: {command[:120]}" for pid, command in self.processes().items()]
        found += [file for place in self.places for file in place.files()]
        return found

    def leaks(self, seconds: float = LEFT_SECONDS) -> list[str]:
        """Wait for at most so long until nothing is left. Return what is; it is ended and removed then."""
        eventually(lambda: not self.left(), seconds)
        found = self.left()
        for pid in self.processes() if found else ():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for place in self.places if found else ():
            for path in place.temporary.iterdir():
                shutil.rmtree(path, ignore_errors=True)
        return found


class Client:
    """A client's process, with its load; see load.py."""

    def __init__(self, field: Field, load: str, places: list[Place], concurrency: int = 4, **settings: Any) -> None:
        self.field = field
        self.file = field.directory / f"ran-{uuid.uuid4().hex[:8]}"
        self.file.touch()
        self.log = self.file.with_suffix(".log")
        options = {"lease": 120.0, "start_timeout": 90.0, **settings.pop("options", {})}
        env = {**os.environ, **settings.pop("env", {})}
        self.clock = env.get("SKYWARD_CLOCK", "")
        """The file by which its clock and those of its hosts are set; empty if they cannot be set."""
        wanted = {
            "load": load,
            "file": str(self.file),
            "hosts": [place.name for place in places],
            "config": field.lab.config,
            "concurrency": concurrency,
            "options": options,
            **settings,
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(LOAD), json.dumps(wanted)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                process_group=0,
                env=env,
            )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def hear(self, step: str, seconds: float = STEP_SECONDS) -> dict[str, Any]:
        """Wait for a step of the client. Raise `Hang` if it does not come in time."""
        told = self.poll(step, seconds)
        if told is None:
            raise Hang(f"the client is not {step} after {seconds:.0f} s: {self.tail()}")
        return told

    def poll(self, step: str, seconds: float) -> dict[str, Any] | None:
        """Wait for a step of the client for so long. Return None if it does not come."""
        try:
            line = self.lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None
        told: dict[str, Any] = json.loads(line) if line else {}
        if told.get("step") != step:
            raise Hang(f"the client ended instead of being {step}: {self.tail()}")
        return told

    def tell(self, word: str) -> None:
        """Let the client go on."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def tail(self) -> str:
        """Return the end of what the client logged."""
        return self.log.read_text()[-1500:]

    def signal(self, number: int) -> None:
        """Send a signal to the client with its whole group."""
        os.killpg(self.process.pid, number)

    def notes(self) -> list[Note]:
        """Return what the tasks wrote down so far."""
        found = []
        for line in self.file.read_text().splitlines():
            number, what, host, pid, agent, moment = line.split()
            found.append(Note(int(number), what, host, int(pid), int(agent), float(moment)))
        return found

    def leave(self) -> None:
        """Let the client leave its pool."""
        self.tell("leave")
        self.hear("left")
        self.process.wait(10)


def needless(notes: list[Note], killed: set[int]) -> list[str]:
    """Return the tasks that ran again though neither the process that ran them before nor its agent was killed."""
    runs = defaultdict(list)
    agents: dict[int, int] = {}
    for note in notes:
        # The parent of a worker whose agent was killed is another process.
        agents.setdefault(note.pid, note.agent)
        if note.what == "begin":
            runs[note.number].append(note)
    return [
        f"task {number} ran in {[run.pid for run in tries]} on {[run.host[-1:] for run in tries]}"
        for number, tries in runs.items()
        if any(not {run.pid, agents[run.pid]} & killed for run in tries[:-1])
    ]


def overlaps(notes: list[Note]) -> list[str]:
    """Return the tasks of which two executions were live at once: one ended, or lives on, when another had begun."""
    live: dict[int, set[int]] = defaultdict(set)
    latest: dict[int, int] = {}
    found = []
    for note in notes:
        if note.what == "begin":
            found += [f"task {note.number} runs in {pid}, too" for pid in live[note.number] if not has_ended(pid)]
            live[note.number].add(note.pid)
            latest[note.number] = note.pid
        else:
            live[note.number].discard(note.pid)
            if latest.get(note.number, note.pid) != note.pid:
                found.append(f"task {note.number} ended in {note.pid} when it had begun in {latest[note.number]}")
    return found


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Keep a process stopped within the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGCONT)
