"""What can happen to a running pool, each fault with its name: to its connections, its processes and its hosts."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from field import Client, Field, Place
from processes import eventually, has_ended
from proxy import Act, Direction, How

LOADS = ("idle", "small", "bulk")
REACH = {"idle": 300, "small": 20_000, "bulk": 20_000_000}
"""Bytes after which a fault that waits for a byte happens at the latest, under each load: an idle connection has
heartbeats alone."""
HELLO_BYTES = 6000
"""Bytes of each direction until a connection is an agent's again, about: key exchange, authentication, hello."""
FIRED_SECONDS = 15.0
SILENCE_SECONDS = 14.0
"""Longer than the silence after which a peer is taken for lost, which is 10 s."""
DISK_BYTES = 1 << 20
CLONE_NEWNET = 0x40000000


@dataclasses.dataclass
class Run:
    """What a fault happens to: a client with a load, and the host that is hit."""

    field: Field
    client: Client
    place: Place
    load: str
    rng: random.Random
    killed: set[int] = dataclasses.field(default_factory=set)
    """Processes that were killed: what ran in them, or was their workers', may run again."""

    def kill(self, pid: int) -> None:
        """Kill a process."""
        self.killed.add(pid)
        self.place.forsake(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def busy(self, pid: int) -> int:
        """Return the number of tasks that run in a worker, as far as they wrote down that they do."""
        notes = [note for note in self.client.notes() if note.pid == pid]
        return len({n.number for n in notes if n.what == "begin"} - {n.number for n in notes if n.what == "end"})

    def workers(self, spare: bool = False) -> list[int]:
        """Return the workers on the host that have run tasks, or those that have run none."""
        used = {note.pid for note in self.client.notes()}
        return [pid for pid in self.place.find("worker") if (pid not in used) == spare]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, which is over when `do` returns. Work must go on `bound` seconds after it at the latest."""

    name: str
    do: Callable[[Run], None]
    bound: float = 15.0
    missing: Callable[[], str] = lambda: ""
    """Returns what this machine lacks for it."""
    disk: int = 0
    """Bytes of the host's disk for temporary files, if it has one of its own."""
    clock: bool = False
    """Whether the clocks of client and host can be set."""


# ------------------------------------------------------------------------------------------------ connections


def cut(how: How) -> Callable[[Run], None]:
    """Cut all connections to the host."""

    def do(run: Run) -> None:
        run.place.proxy.cut(how)

    return do


def direction(run: Run, name: str) -> Direction:
    """Return a direction of the host's proxy."""
    return run.place.proxy.up if name == "up" else run.place.proxy.down


def at_a_byte(way: str, act: Act, how: How = "reset") -> Callable[[Run], None]:
    """Let something happen at a byte of a direction; a stall lasts for 2 s."""

    def do(run: Run) -> None:
        carrier = direction(run, way)
        armed = carrier.at(run.rng.randrange(REACH[run.load]), act, how, run.rng.randrange(8))
        if not armed.fired.wait(FIRED_SECONDS):
            raise TimeoutError("the byte at which something was to happen did not come")
        if act == "stall":
            time.sleep(2)
            carrier.resume()

    return do


def stall(seconds: float, *ways: str) -> Callable[[Run], None]:
    """Hold back what goes in these directions for a while."""

    def do(run: Run) -> None:
        for way in ways:
            direction(run, way).stall()
        time.sleep(seconds)
        run.place.proxy.resume()

    return do


def cut_twice(run: Run) -> None:
    """Cut, and break the connection that is made instead while it greets."""
    proxy = run.place.proxy
    proxy.cut()
    acts: list[Act] = ["cut", "truncate", "flip"]
    armed = run.rng.choice([proxy.up, proxy.down]).at(run.rng.randrange(HELLO_BYTES), run.rng.choice(acts))
    armed.fired.wait(FIRED_SECONDS)


def before_the_reply(run: Run) -> None:
    """Cut when a task has ended on the host and its result is under way."""
    run.place.proxy.down.stall()
    begin = time.monotonic()

    def ended() -> bool:
        return any(n.what == "end" and n.host == run.place.mark and n.time > begin for n in run.client.notes())

    if run.load != "idle":
        eventually(ended, FIRED_SECONDS)
    run.place.proxy.cut()
    run.place.proxy.resume()


def refused(seconds: float) -> Callable[[Run], None]:
    """Cut, and refuse connections for a while."""

    def do(run: Run) -> None:
        run.place.proxy.refuse()
        run.place.proxy.cut()
        time.sleep(seconds)
        run.place.proxy.listen()

    return do


class Network:
    """A network of one's own, in which rules for packets harm nobody else."""

    missing = "a network namespace of its own"
    """What is missing for it; empty within the block."""

    @classmethod
    @contextlib.contextmanager
    def own(cls) -> Iterator[None]:
        """Let all threads and processes that start within the block be in a network of their own, if possible."""
        libc = ctypes.CDLL(None, use_errno=True)
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        default = cls.missing
        try:
            if not shutil.which("nft") or not shutil.which("ip"):
                cls.missing = "nft and ip (packages nftables and iproute2)"
            elif libc.unshare(CLONE_NEWNET):
                cls.missing = "the right to have a network namespace"
            else:
                subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
                cls.missing = ""
            yield
        finally:
            if not cls.missing:
                libc.setns(before, 0)
            os.close(before)
            cls.missing = default


def no_rules() -> str:
    """Return what is missing for rules of the packet filter."""
    return Network.missing


def rule(verdict: str, seconds: float) -> Callable[[Run], None]:
    """Drop or reject all packets from and to the host for a while."""

    def do(run: Run) -> None:
        address = run.place.sshd.address
        subprocess.run(["nft", "add", "table", "inet", "chaos"], check=True)
        subprocess.run(["nft", "add chain inet chaos in { type filter hook input priority 0; }"], check=True)
        for which in ("saddr", "daddr"):
            subprocess.run(
                ["nft", f"add rule inet chaos in meta l4proto tcp ip {which} {address} {verdict}"], check=True
            )
        time.sleep(seconds)
        subprocess.run(["nft", "delete", "table", "inet", "chaos"], check=True)

    return do


def sockets_killed(run: Run) -> None:
    """Have the kernel reset the host's connections (`ss -K`)."""
    command = ["ss", "-K", "src", run.place.sshd.address, "sport", "=", str(run.place.sshd.port)]
    subprocess.run(command, check=True, capture_output=True)


# ------------------------------------------------------------------------------------------------ processes


def there(run: Run, kind: str) -> list[int]:
    """Return the processes of a kind on the host, of which there must be one."""
    if not eventually(lambda: run.place.find(kind), FIRED_SECONDS):
        raise TimeoutError(f"no {kind} is there")
    return run.place.find(kind)


def kill(kind: str) -> Callable[[Run], None]:
    """Kill all processes of a kind on the host: its sessions, its agent, its relay."""

    def do(run: Run) -> None:
        for pid in there(run, kind):
            run.kill(pid)

    return do


def stop(kind: str, seconds: float) -> Callable[[Run], None]:
    """Stop all processes of a kind on the host for a while."""

    def do(run: Run) -> None:
        stopped = there(run, kind)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(seconds if number == signal.SIGSTOP else 0)

    return do


def kill_worker(run: Run, tries: int = 200) -> bool:
    """Kill a worker in which at least two tasks run, if any do. Return whether one was killed.

    A task that runs alone in a worker which dies is taken for the cause, and fails with an error that says so.
    """
    for _ in range(tries):
        workers = run.workers()
        pid = run.rng.choice(workers) if workers else 0
        with contextlib.suppress(ProcessLookupError):
            if pid:
                # While it is stopped, what it runs does not change.
                os.kill(pid, signal.SIGSTOP)
                if run.busy(pid) >= 2 or run.load == "idle":
                    run.kill(pid)
                    return True
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)
    return False


def worker_killed(run: Run) -> None:
    """Kill a worker."""
    if not kill_worker(run):
        raise TimeoutError("no worker runs two tasks at once")


def spare(deed: Callable[[Run, int], None]) -> Callable[[Run], None]:
    """Do something to the spare worker."""

    def do(run: Run) -> None:
        if not eventually(lambda: run.workers(spare=True), FIRED_SECONDS):
            raise TimeoutError("no spare worker came")
        deed(run, run.workers(spare=True)[0])

    return do


def pause(seconds: float) -> Callable[[Run, int], None]:
    """Stop a process for a while."""

    def do(run: Run, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        if not has_ended(pid):
            os.kill(pid, signal.SIGCONT)

    return do


def worker_stopped(run: Run) -> None:
    """Stop a worker for 3 s."""
    pause(3)(run, run.rng.choice(run.workers()))


def sshd_restarted(run: Run) -> None:
    """End the server with its sessions, and start it again after a second."""
    sessions = run.place.find("session")
    run.place.sshd.process.kill()
    for pid in sessions:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.place.sshd.process.wait(10)
    time.sleep(1)
    run.place.sshd.start()


def listener_stopped(run: Run) -> None:
    """Cut, and let the server that is to take the new connection sleep for 5 s."""
    server = run.place.sshd.process
    server.send_signal(signal.SIGSTOP)
    run.place.proxy.cut()
    time.sleep(5)
    server.send_signal(signal.SIGCONT)


def client_stopped(seconds: float) -> Callable[[Run], None]:
    """Stop the client with its whole group for a while."""

    def do(run: Run) -> None:
        run.client.signal(signal.SIGSTOP)
        time.sleep(seconds)
        run.client.signal(signal.SIGCONT)

    return do


# ------------------------------------------------------------------------------------------------ hosts


def full_disk(then: Callable[[Run], None]) -> Callable[[Run], None]:
    """Fill the host's disk for 4 s, and let something else happen meanwhile."""

    def do(run: Run) -> None:
        filling = run.place.temporary / "filling"
        with contextlib.suppress(OSError), filling.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        then(run)
        time.sleep(4)
        filling.unlink()

    return do


def no_disk() -> str:
    """Return what is missing for a disk that is full."""
    return "" if os.getuid() == 0 else "the right to mount a disk"


def clock_library(directory: Path) -> dict[str, str]:
    """Build the clock that jumps. Return the environment in which programs have it."""
    library, file = directory / "clock.so", directory / "clock"
    source = Path(__file__).parent / "clock.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    file.write_bytes(struct.pack("q", 0))
    return {"LD_PRELOAD": str(library), "SKYWARD_CLOCK": str(file)}


def clock_jumps(seconds: int) -> Callable[[Run], None]:
    """Set the clocks of client and host: forward or back."""

    def do(run: Run) -> None:
        with Path(run.client.clock).open("r+b") as file:
            file.write(struct.pack("q", seconds))
        time.sleep(3)

    return do


def no_compiler() -> str:
    """Return what is missing for clocks that jump."""
    return "" if shutil.which("cc") else "a C compiler"


def nothing(run: Run) -> None:
    """Do nothing."""


# ------------------------------------------------------------------------------------------------ all

CONNECTIONS = [
    Fault("nothing", nothing),
    Fault("reset", cut("reset")),
    Fault("end of stream", cut("end")),
    Fault("cut in silence", cut("silence"), 30),
    Fault("reset at a byte up", at_a_byte("up", "cut")),
    Fault("reset at a byte down", at_a_byte("down", "cut")),
    Fault("truncated up", at_a_byte("up", "truncate"), 30),
    Fault("truncated down", at_a_byte("down", "truncate"), 30),
    Fault("bit flipped up", at_a_byte("up", "flip"), 30),
    Fault("bit flipped down", at_a_byte("down", "flip"), 30),
    Fault("reset before the reply", before_the_reply),
    Fault("reset, and in the hello", cut_twice, 30),
    Fault("stall up, 3 s", stall(3, "up")),
    Fault("stall down, 3 s", stall(3, "down")),
    Fault("stall up, 14 s", stall(SILENCE_SECONDS, "up"), 30),
    Fault("stall down, 14 s", stall(SILENCE_SECONDS, "down"), 30),
    Fault("stall, 14 s", stall(SILENCE_SECONDS, "up", "down"), 30),
    Fault("refused for 5 s", refused(5)),
    Fault("DROP for 14 s", rule("drop", SILENCE_SECONDS), 30, no_rules),
    Fault("RST for 2 s", rule("reject with tcp reset", 2), 15, no_rules),
    Fault("ss -K", sockets_killed, 15, no_rules),
    Fault("sshd restarted", sshd_restarted),
    Fault("sshd session killed", kill("session")),
    Fault("sshd session stopped, 14 s", stop("session", SILENCE_SECONDS), 30),
    Fault("sshd listener stopped, 5 s", listener_stopped, 30),
    Fault("relay killed", kill("relay")),
    Fault("relay stopped, 3 s", stop("relay", 3)),
    Fault("client stopped, 14 s", client_stopped(SILENCE_SECONDS), 30),
    Fault("clock +1 h", clock_jumps(3600), missing=no_compiler, clock=True),
    Fault("clock -1 h", clock_jumps(-3600), missing=no_compiler, clock=True),
    Fault("disk full", full_disk(nothing), missing=no_disk, disk=DISK_BYTES),
    Fault("disk full, reset", full_disk(cut("reset")), missing=no_disk, disk=DISK_BYTES),
]
"""Faults that leave the agent and its workers alone: nothing may run twice."""
PROCESSES = [
    Fault("agent killed", kill("agent"), 30),
    Fault("agent stopped, 14 s", stop("agent", SILENCE_SECONDS), 30),
    Fault("disk full, agent killed", full_disk(kill("agent")), 40, no_disk, disk=DISK_BYTES),
    Fault("worker killed", worker_killed),
    Fault("worker stopped, 3 s", worker_stopped),
    Fault("spare killed", spare(lambda run, pid: run.kill(pid))),
    Fault("spare stopped, 3 s", spare(pause(3))),
]
"""Faults of processes that run tasks or hold them: only what they had may run twice."""
LONG = [
    Fault("stall, 60 s", stall(60, "up", "down"), 30),
    Fault("refused for 30 s", refused(30), 30),
    Fault("client stopped, 10 min", client_stopped(600), 60),
]
EVERYTHING = {fault.name: fault for fault in [*CONNECTIONS, *PROCESSES, *LONG]}
