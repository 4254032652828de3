"""Deaths of workers, interrupted clients, hostile nodes, and host keys as ssh sees them.

`make chaos` runs many, the tests a few.

Each round prints nothing unless it fails; the last line of each part gives the counts.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import ctypes
import functools
import io
import itertools
import json
import logging
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import known_hosts_cases
import skyward_lite as sky

HANG = 10.0
"""Seconds after which a round counts as hanging."""
GONE = 5.0
"""Seconds after which no process of an interrupted client may be left."""

# ------------------------------------------------------------------------------------------------ deaths of workers

DEATHS: dict[str, tuple[Callable[[], object], str]] = {
    "exit 0": (lambda: os._exit(0), "exited with status 0"),
    "exit 3": (lambda: os._exit(3), "exited with status 3"),
    "SIGKILL": (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
    "SIGTERM": (lambda: os.kill(os.getpid(), signal.SIGTERM), "SIGTERM"),
    "abort": (lambda: os.abort(), "SIGABRT"),
    "segfault": (lambda: ctypes.string_at(0), "SIGSEGV"),
}
"""What ends a process, and what the error must say."""


class DieWhenUnpickled:
    """Ends the process that unpickles it."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> object:
        return die, (self.how,)


class DieWhenPickled:
    """Ends the process that pickles it."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> object:
        die(self.how)
        raise AssertionError("it lives")


def die(how: str) -> object:
    """End this process; a signal may take a moment to arrive."""
    DEATHS[how][0]()
    time.sleep(60)
    return None


def make(kind: type, how: str) -> object:
    """Give something that is deadly to pickle, as a result."""
    return kind(how)


def neg(x: int, nap: float) -> int:
    """Live, for a while."""
    time.sleep(nap)
    return -x


PLACES: dict[str, Callable[[sky.ComputePool, str], concurrent.futures.Future[object]]] = {
    "unpickling the call": lambda pool, how: pool.submit(id, DieWhenUnpickled(how)),
    "in the call": lambda pool, how: pool.submit(die, how),
    "pickling the result": lambda pool, how: pool.submit(make, DieWhenPickled, how),
}
IN_FLIGHT = (1, 2, 5, 13)
EXECUTORS = ("thread", "process")


def crash(pool: sky.ComputePool, seed: int, where: str, count: int, how: str) -> str:
    """Run `count` tasks of which one ends its process; what went wrong, or nothing."""
    rng = random.Random(seed)
    deadly = rng.randrange(count)
    naps = [rng.choice([0.0, 0.0, 0.02]) for _ in range(count)]
    began = time.monotonic()
    futures: list[concurrent.futures.Future[object]] = [
        PLACES[where](pool, how) if n == deadly else pool.submit(neg, n, naps[n]) for n in range(count)
    ]
    for n, future in enumerate(futures):
        try:
            value = future.result(max(0.0, began + HANG - time.monotonic()))
        except sky.WorkerCrashedError as error:
            text = str(error)
            if n != deadly:
                return f"task {n} was blamed for task {deadly}: {text}"
            if "node local-0" not in text or DEATHS[how][1] not in text:
                return f"the error does not name what died: {text}"
        except concurrent.futures.TimeoutError:
            return f"task {n} hangs (deadly: {deadly})"
        else:
            if n == deadly or value != -n:
                return f"task {n} gave {value!r} (deadly: {deadly})"
    return ""


def crashes(rounds: int, seed: int) -> list[str]:
    """Go through all combinations in a seeded order, `rounds` of them; what went wrong."""
    rng = random.Random(seed)
    matrix = list(itertools.product(EXECUTORS, PLACES, IN_FLIGHT, DEATHS))
    chosen: list[tuple[str, str, int, str]] = []
    while len(chosen) < rounds:
        chosen += rng.sample(matrix, min(len(matrix), rounds - len(chosen)))
    failures = []
    for executor in EXECUTORS:
        worker = sky.Worker(concurrency=4, executor=executor)
        # What the dying print is in the errors, too.
        with contextlib.redirect_stderr(io.StringIO()), sky.pool(worker=worker, plugins=[]) as pool:
            for number, (which, where, count, how) in enumerate(chosen):
                if which == executor:
                    wrong = crash(pool, seed + number, where, count, how)
                    if wrong:
                        failures.append(f"round {number}, {executor}, {how} while {where}, {count} in flight: {wrong}")
    return failures


# ------------------------------------------------------------------------------------------------ interrupted clients

JOB = """
import time
import joblib, skyward_lite as sky
from joblib import Parallel, delayed

def job():
    with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=2)) as pool:
        late = [pool.submit(time.sleep, 0.05) for _ in range(4)]
        assert Parallel(n_jobs=-1, batch_size=1)(delayed(time.sleep)(0.01) for _ in range(60)) == [None] * 60

jobs = joblib.effective_n_jobs(-1)
end = "finished"
print("go", flush=True)
try:
    job()
    time.sleep(3)
    end = "not interrupted"
except KeyboardInterrupt:
    end = "interrupted"
print(end, flush=True)
input()
assert joblib.effective_n_jobs(-1) == jobs, "joblib's default is not what it was"
with sky.pool():
    assert Parallel(n_jobs=2)(delayed(abs)(-i) for i in range(5)) == [0, 1, 2, 3, 4]
assert joblib.effective_n_jobs(-1) == jobs
print("usable", flush=True)
"""
LENGTH = 1.5
"""Seconds that the job takes about, from its first line to its last."""


def processes(mark: str) -> dict[int, str]:
    """Processes with this mark in their environment: process id → command line."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (directory / "environ").read_bytes():
                found[int(directory.name)] = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it ended meanwhile
    return found


def interrupt(number: int, delay: float) -> str:
    """Send a signal to a client `delay` seconds after its begin; what went wrong, or nothing."""
    mark = f"SKYWARD_CHAOS={os.getpid()}-{time.monotonic_ns()}"
    client = subprocess.Popen(
        [sys.executable, "-c", JOB],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        env={**os.environ, **dict([mark.split("=", 1)])},
    )

    def left() -> dict[int, str]:
        deadline = time.monotonic() + GONE
        while (found := {p: c for p, c in processes(mark).items() if p != client.pid}) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    with client:
        assert client.stdout is not None
        try:
            assert client.stdout.readline() == "go\n"
            time.sleep(delay)
            client.send_signal(number)
            if number == signal.SIGINT:
                end = client.stdout.readline().strip()
                if end != "interrupted":
                    _, err = client.communicate("", timeout=HANG)
                    return f"the client says {end!r} after {delay:.3f} s; {err[-2000:]}"
            else:
                client.wait(HANG)
            if found := left():
                return f"left {GONE} s after a signal at {delay:.3f} s: {found}"
            if number == signal.SIGINT:
                out, err = client.communicate("\n", timeout=2 * HANG)
                if out != "usable\n":
                    return f"after a signal at {delay:.3f} s the interpreter is not usable: {err[-2000:]}"
        except subprocess.TimeoutExpired:
            return f"the client hangs after a signal at {delay:.3f} s"
        finally:
            for process in processes(mark):
                os.kill(process, signal.SIGKILL)
    return ""


def interruptions(rounds: int, seed: int, number: int = signal.SIGINT) -> list[str]:
    """Interrupt at `rounds` moments; what went wrong."""
    rng = random.Random(seed)
    moments = [rng.uniform(0, LENGTH) for _ in range(rounds)]
    return [wrong for delay in moments if (wrong := interrupt(number, delay))]


# ------------------------------------------------------------------------------------------------ hostile nodes

MEMORY = 64 << 20
"""Bytes beyond its start that a client may use at most, whatever a node sends."""
LEAVE = 5.0
"""Seconds after which the block of a client must be left."""
ADDRESSES = 6 << 30
"""Bytes of address space that a client gets, so that one which grows without bound fails and nothing else."""

CLIENT = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import fakes
import skyward_lite as sky
from joblib import Parallel, delayed

behaviour, args, seconds = json.loads(sys.argv[2])

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

def double(x):
    time.sleep(0.05)
    return 2 * x

with fakes.pool(behaviour, **args, options={"worker": sky.Worker(concurrency=2, retries=9)}) as pool:
    before = memory("VmRSS")
    count = int(seconds * 40)
    began = time.monotonic()
    values = Parallel(n_jobs=-1, batch_size=1)(delayed(double)(i) for i in range(count))
    took = time.monotonic() - began
    wrong = values != [2 * i for i in range(count)]
    node = pool.nodes()[-1]
    began = time.monotonic()
left = time.monotonic() - began
grown = memory("VmHWM") - before
print(json.dumps([wrong, took, left, grown, node.state, node.reason]))
"""

MESSAGE = (b"\0" * 12).hex()
"""The head of a message without parts."""
FULL = struct.pack("<BBHQQ16000x", 0, 0, 1, 0, 16000).hex()
"""A message with one part."""
FLOODS: dict[str, dict[str, object]] = {
    "hello": {"body": b"{}".hex()},
    "ready": {"task": 2},
    "heartbeat": {"body": (b"\0" * 8).hex()},
    "pulse": {"task": 1},
    "goodbye": {"body": b"bye".hex()},
    "acknowledge": {"body": (b"\0" * 1000).hex()},
    "cancel": {"task": 1},
    "recall": {"task": 1},
    "given_back": {"task": 1},
    "recall_refused": {"task": 1},
    "task": {"body": MESSAGE, "flags": 3},
    "result": {"body": MESSAGE, "flags": 3},
    "abort": {"task": 1},
    "output": {"task": 1},
    "drain": {"body": b"notice".hex()},
    "note": {"body": MESSAGE, "flags": 3},
    "note_answer": {"body": b"no".hex()},
}
"""A frame of each kind, which a node repeats."""
ROWS: dict[str, tuple[str, dict[str, object]]] = {
    **{f"floods of {kind}": ("floods", {"kind": kind, **one}) for kind, one in FLOODS.items()},
    **{f"floods of kind {kind}": ("floods", {"kind": kind}) for kind in (0, 18, 99, 255)},
    "floods of output, full": ("floods", {"kind": "output", "task": 1, "body": (b"x" * 16383 + b"\n").hex()}),
    "floods of results, full": ("floods", {"kind": "result", "flags": 3, "body": FULL}),
    "floods of notes, full": ("floods", {"kind": "note", "flags": 3, "body": FULL}),
    **{
        f"nonsense: {how}": ("babbles", {"how": how})
        for how in ("bytes", "blocks", "lz4", "frames", "opened", "unasked", "notes")
    },
    "silence": ("silent", {}),
    "one byte after the other": ("drips", {}),
}


def besiege(row: str, seconds: float) -> tuple[str, str]:
    """Let a client work beside one hostile node for so long: what happened, and what went wrong."""
    behaviour, args = ROWS[row]
    args = args if behaviour == "drips" else {**args, "seconds": seconds}
    wanted = json.dumps([behaviour, args, seconds])
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(Path(__file__).parent), wanted],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES)),
    )
    try:
        out, err = client.communicate(timeout=3 * seconds + 90)
    except subprocess.TimeoutExpired:
        os.killpg(client.pid, signal.SIGKILL)
        client.communicate()
        return "", "the client hangs"
    if client.returncode:
        return "", f"the client ended with {client.returncode}: {err[-300:]}"
    wrong, took, left, grown, state, reason = json.loads(out.splitlines()[-1])
    told = f"{grown / 2**20:7.1f} MiB, call {took:5.1f} s, left in {left:.1f} s, {state}: {reason[:60]}"
    faults = [
        *(["a wrong result"] if wrong else []),
        *([f"memory grew by {grown / 2**20:.0f} MiB"] if grown > MEMORY else []),
        *([f"the block was left in {left:.1f} s"] if left > LEAVE else []),
    ]
    return told, "; ".join(faults)


def hostile(seconds: float, rows: Iterable[str] = ROWS, tell: Callable[[str], object] = lambda line: None) -> list[str]:
    """Let clients work beside each hostile node, two at a time; what went wrong."""
    failures = []
    with concurrent.futures.ThreadPoolExecutor(2) as both:
        for row, (told, wrong) in zip(rows, both.map(lambda row: besiege(row, seconds), rows), strict=True):
            tell(f"{row:28} {told}{'  ' if told and wrong else ''}{wrong}")
            if wrong:
                failures.append(f"{row}: {wrong}")
    return failures


# ------------------------------------------------------------------------------------------------ host keys


def host_keys(rounds: int, seed: int) -> list[str]:
    """Compare `rounds` known_hosts files and configurations with ssh, and all that have a name; what went wrong."""

    def chosen(bench: known_hosts_cases.Bench) -> list[known_hosts_cases.Case]:
        return [*known_hosts_cases.named(bench), *known_hosts_cases.generated(rounds, seed)(bench)]

    logging.getLogger("skyward_lite").setLevel(logging.ERROR)  # each new key that is recorded is logged
    with tempfile.TemporaryDirectory() as directory:
        threads = os.cpu_count() or 1
        failures, stricter, accepted = known_hosts_cases.compare(Path(directory), chosen, threads)
    print(f"host keys: {accepted} accepted by ssh and by us; accepted by ssh alone: {dict(stricter)}")
    return failures


def main() -> None:
    """Run everything and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=500, help="deaths of workers; more of the cheap rounds, fewer of the others"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20, help="of each hostile node")
    parser.add_argument("--only", default="", help="the parts whose name contains this")
    options = parser.parse_args()
    few = max(1, options.rounds // 10)
    parts: list[tuple[str, int, Callable[[int, int], list[str]]]] = [
        ("deaths of workers", options.rounds, crashes),
        ("Ctrl-C at a client", few, interruptions),
        ("known_hosts and configurations against ssh", 6 * options.rounds, host_keys),
        ("SIGTERM at a client", few, lambda n, seed: interruptions(n, seed, signal.SIGTERM)),
        (
            "hostile node",
            len(ROWS),
            lambda n, seed: hostile(options.seconds, tell=functools.partial(print, flush=True)),
        ),
    ]
    bad = 0
    for name, rounds, run in parts:
        if options.only not in name:
            continue
        began = time.monotonic()
        failures = run(rounds, options.seed)
        print("\n".join(failures), end="\n" if failures else "")
        print(f"{name}: {rounds} rounds, {len(failures)} failed, {time.monotonic() - began:.0f} s", flush=True)
        bad += len(failures)
    sys.exit(bad != 0)


if __name__ == "__main__":
    main()
