"""Workers that die and clients that are interrupted, at seeded moments."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import io
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

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
