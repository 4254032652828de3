"""The client of a chaos run, a process of its own: it opens a pool and gives it the load that its arguments name.

It prints a line of JSON per step, and waits for a line before the next: "ready" → `go` → … `enough` → the end of all
tasks → `leave` → "left". Each task writes lines into one file, when it begins and when it ends, so that executions are
counted exactly, those of workers that were killed among them.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import subprocess
import sys
import threading
import time
import zlib
from typing import Any

import joblib
import skyward_lite as sky

FAILURES = 20
"""With more failed tasks the load ends early."""
MAX_WINDOW = 12
"""Tasks that are submitted and have not ended, at most."""
BULK_BYTES = 4_000_000
"""Bytes of a bulk task's argument, and of its result."""
IDLE_TASKS = 8
"""Tasks that an idle pool gets after the fault."""
PATIENCE_SECONDS = 300.0


def work(path: str, number: int, nap: float, data: bytes) -> tuple[int, bytes]:
    """Nap for a while, and return the number and the data in reverse; write down the beginning and the end."""

    def note(what: str) -> None:
        host = os.environ.get("SKYWARD_FIELD_HOST", "")
        line = f"{number} {what} {host} {os.getpid()} {os.getppid()} {time.monotonic()}\n"
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(file, line.encode())
        os.close(file)

    note("begin")
    time.sleep(nap)
    result = number, data[::-1]
    note("end")
    return result


def plant() -> int:
    """Start a process that outlives its task, in a session of its own; return its number."""
    return subprocess.Popen(["sleep", "600"], start_new_session=True, stdin=subprocess.DEVNULL).pid


class Steps:
    """What the harness wants, line by line."""

    def __init__(self) -> None:
        self.events = {word: threading.Event() for word in ("go", "enough", "leave")}
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self.events[line.strip()].set()

    def wait(self, word: str) -> None:
        """Wait for a line."""
        self.events[word].wait()

    def came(self, word: str) -> bool:
        """Return whether a line has come."""
        return self.events[word].is_set()


def say(**what: object) -> None:
    """Tell the harness something."""
    print(json.dumps({**what, "time": time.monotonic()}), flush=True)


class Load:
    """Tasks that are submitted as others end, until it is enough."""

    def __init__(self, pool: sky.ComputePool, wanted: dict[str, Any]) -> None:
        self.pool = pool
        self.wanted = wanted
        self.sums: dict[concurrent.futures.Future[tuple[int, bytes]], tuple[int, int]] = {}
        self.failed: list[str] = []
        self.count = 0

    def submit(self, nap: float, size: int) -> None:
        """Submit a task with data of its own."""
        data = os.urandom(size)
        future = self.pool.submit(work, self.wanted["file"], self.count, nap, data)
        self.sums[future] = self.count, zlib.crc32(data[::-1])
        self.count += 1

    def take(self, until: str) -> None:
        """Wait for the first, or for all, of what was submitted, and compare."""
        ended, _ = concurrent.futures.wait(self.sums, PATIENCE_SECONDS, until)
        for future in ended:
            number, expected = self.sums.pop(future)
            error = future.exception()
            if error is not None:
                self.failed.append(f"{number}: {type(error).__name__}: {error}"[:300])
            else:
                got, data = future.result()
                if got != number or zlib.crc32(data) != expected:
                    self.failed.append(f"{number}: wrong data")

    def run(self, steps: Steps) -> None:
        """Give the pool the load, until the harness has enough."""
        wanted = self.wanted
        if wanted["load"] == "idle":
            steps.wait("enough")
            for _ in range(IDLE_TASKS):
                self.submit(0.02, 8)
        while wanted["load"] != "idle" and not steps.came("enough") and len(self.failed) < FAILURES:
            window, nap, size = (6, 0.05, BULK_BYTES) if wanted["load"] == "bulk" else (MAX_WINDOW, 0.02, 8)
            while len(self.sums) < window:
                self.submit(nap, size)
                if wanted["load"] == "trees" and self.count % 20 == 1:
                    self.pool.submit(plant)
            self.take(concurrent.futures.FIRST_COMPLETED)
        self.take(concurrent.futures.ALL_COMPLETED)


def storm(wanted: dict[str, Any]) -> list[str]:
    """Run one call of `Parallel`. Return what is not as it is in a serial run."""
    count, nap = wanted["tasks"], wanted["nap"]
    calls = (joblib.delayed(work)(wanted["file"], number, nap, bytes([number % 256])) for number in range(count))
    values = joblib.Parallel(n_jobs=-1, batch_size=1)(calls)
    serial = [(number, bytes([number % 256])) for number in range(count)]
    return [f"{number}: {value}" for number, value in zip(range(count), values, strict=True) if value != serial[number]]


def main() -> None:
    """Be the client that the arguments describe."""
    wanted = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    steps = Steps()
    provider = sky.SSH(*wanted["hosts"], config=wanted["config"], python=sys.executable)
    worker = sky.Worker(concurrency=wanted["concurrency"])
    with sky.pool(provider, worker=worker, **wanted["options"]) as pool:
        # The first tasks load what each worker needs once, and show by their notes which workers are no spares.
        warm = [pool.submit(work, wanted["file"], -n, 0.05, b"") for n in range(1, 1 + 4 * len(wanted["hosts"]))]
        for future in warm:
            future.result()
        say(step="ready", agents=[node.pid for node in pool.nodes()])
        steps.wait("go")
        say(step="begun")
        if wanted["load"] == "parallel":
            failed, count = storm(wanted), wanted["tasks"]
        else:
            load = Load(pool, wanted)
            load.run(steps)
            failed, count = load.failed, load.count
        nodes = [f"{node.name} {node.state} {node.reason}" for node in pool.nodes()]
        say(step="done", failed=failed, count=count, nodes=nodes)
        steps.wait("leave")
    say(step="left")


if __name__ == "__main__":
    main()
