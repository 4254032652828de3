"""A pool under chaos for as long as you like: what the client and the agents take of the system must stay flat.

    python benches/soak.py --minutes 60

The hosts are `sshd`s on loopback behind proxies, without root. Connections are cut every few seconds, and workers are
killed. The client goes through phases: small tasks, large data, a generator read slowly, nothing. The last lines
have the first and the last sample of each process, of descriptors, threads and memory, the largest, and the slope over
the second half of the run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import joblib
import skyward_lite as sky
from field import Field, Place

SAMPLE_SECONDS = 10.0
PHASE_SECONDS = 15.0
CUT_SECONDS = 3.0
"""Between two cuts of a connection, on average."""
KILL_SECONDS = 10.0
"""Between two kills of a worker, on average."""
BULK_BYTES = 4_000_000
LEAVE_SECONDS = 30.0
CONCURRENCY = 4


def turn(number: int, data: bytes, nap: float) -> tuple[int, bytes]:
    """Return the number and the data in reverse, after a nap."""
    time.sleep(nap)
    return number, data[::-1]


# ------------------------------------------------------------------------------------------------ the client


class Client:
    """The load, in a process of its own. What ended how is counted."""

    def __init__(self, pool: sky.ComputePool) -> None:
        self.pool = pool
        self.counts: Counter[str] = Counter()
        self.number = 0

    def small(self, until: float) -> None:
        """Run calls of `Parallel` over small tasks."""
        while time.monotonic() < until:
            calls = (joblib.delayed(turn)(n, b"x", 0.01) for n in range(200))
            self.note([value == (n, b"x") for n, value in enumerate(joblib.Parallel(n_jobs=-1)(calls))])

    def bulk(self, until: float) -> None:
        """Move large data in both directions."""
        while time.monotonic() < until:
            data = [os.urandom(BULK_BYTES) for _ in range(2 * CONCURRENCY)]
            futures = [self.pool.submit(turn, n, one, 0.05) for n, one in enumerate(data)]
            sums = [zlib.crc32(one[::-1]) for one in data]
            del data
            for future, crc in zip(futures, sums, strict=True):
                try:
                    self.note([zlib.crc32(future.result()[1]) == crc])
                except sky.WorkerCrashedError:
                    self.counts["crashed"] += 1

    def slow(self, until: float) -> None:
        """Read a generator slowly, of an input without an end."""
        endless = iter(int, 1)
        calls = (joblib.delayed(turn)(n, bytes(1000), 0.001) for n, _ in enumerate(endless))
        values = joblib.Parallel(n_jobs=-1, return_as="generator")(calls)
        for n, value in enumerate(values):
            self.note([value[0] == n])
            time.sleep(0.02)
            if time.monotonic() > until:
                break
        values.close()

    def idle(self, until: float) -> None:
        """Do nothing, then a little."""
        time.sleep(max(0.0, until - time.monotonic()))
        self.note([self.pool.submit(turn, 1, b"ab", 0.0).result() == (1, b"ba")])

    def note(self, right: list[bool]) -> None:
        """Count ended tasks."""
        self.counts["right"] += sum(right)
        self.counts["wrong"] += len(right) - sum(right)

    def run(self, enough: threading.Event) -> None:
        """Go through the phases until it is enough."""
        phases = [self.small, self.bulk, self.slow, self.idle]
        while not enough.is_set():
            phase = phases[self.number % len(phases)]
            self.number += 1
            try:
                phase(time.monotonic() + PHASE_SECONDS)
            except sky.WorkerCrashedError:
                self.counts["crashed"] += 1
            except sky.SkywardError as error:
                self.counts[type(error).__name__] += 1
                print(f"{phase.__name__}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def be_client(wanted: dict[str, Any]) -> None:
    """Be the client, until a line comes."""
    enough = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), enough.set()), daemon=True).start()
    provider = sky.SSH(*wanted["hosts"], config=wanted["config"], python=sys.executable)
    with sky.pool(provider, worker=sky.Worker(concurrency=CONCURRENCY, retries=50)) as pool:
        client = Client(pool)
        print("ready", flush=True)
        client.run(enough)
    print(json.dumps(client.counts), flush=True)


# ------------------------------------------------------------------------------------------------ samples


class Sample(NamedTuple):
    """What a process takes at a time, in seconds since the begin."""

    at: float
    descriptors: int
    threads: int
    kilobytes: int


def sample(pid: int, at: float) -> Sample | None:
    """Return what a process takes now; None if it has ended."""
    directory = Path(f"/proc/{pid}")
    try:
        fields = dict(line.split(":", 1) for line in (directory / "status").read_text().splitlines())
        descriptors = len(list((directory / "fd").iterdir()))
        return Sample(at, descriptors, int(fields["Threads"]), int(fields["VmRSS"].split()[0]))
    except (OSError, KeyError):
        return None


def slope(samples: list[Sample], what: str) -> float:
    """Return by how much it grows in an hour, over the second half of the run; 0 if there are too few samples."""
    late = [one for one in samples if one.at >= samples[-1].at / 2]
    if len(late) < 3:
        return 0.0
    line = statistics.linear_regression([one.at for one in late], [getattr(one, what) for one in late])
    return line.slope * 3600


class Watch:
    """Samples of all processes that are watched."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.samples: dict[str, list[Sample]] = {}
        self.lock = threading.Lock()

    def look(self, pids: dict[str, int]) -> str:
        """Take a sample of each process, and return it as a line."""
        at, shown = time.monotonic() - self.begin, []
        for name, pid in pids.items():
            now = sample(pid, at)
            if now is not None:
                self.samples.setdefault(f"{name} {pid}", []).append(now)
                shown.append(f"{name} {now.descriptors} fds {now.threads} threads {now.kilobytes / 1024:.0f} MiB")
        return f"{at:6.0f} s: {'; '.join(shown)}"

    def table(self) -> list[str]:
        """Return a line for each process and for each thing that it takes."""
        lines = []
        for name, samples in self.samples.items():
            for what, scale, unit in [("descriptors", 1, ""), ("threads", 1, ""), ("kilobytes", 1024, " MiB")]:
                values = [getattr(one, what) / scale for one in samples]
                # The first minute fills caches.
                after_a_minute = next((getattr(one, what) / scale for one in samples if one.at >= 60), values[0])
                lines.append(
                    f"{name:24} {what.replace('kilobytes', 'memory'):12} first {values[0]:7.1f}, after 1 min "
                    f"{after_a_minute:7.1f}, last {values[-1]:7.1f}, largest {max(values):7.1f}{unit}, "
                    f"slope {slope(samples, what) / scale:+8.2f}{unit} per hour, {len(samples)} samples"
                )
        return lines


# ------------------------------------------------------------------------------------------------ chaos


def kill_worker(place: Place) -> bool:
    """Kill a worker of the host. Return whether there was one."""
    workers = place.find("worker")
    for pid in workers[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(workers)


def chaos(field: Field, rng: random.Random, enough: threading.Event, counts: Counter[str]) -> None:
    """Cut connections and kill workers until it is enough."""
    next_cut = next_kill = time.monotonic() + CUT_SECONDS
    while not enough.wait(0.1):
        place, now = rng.choice(field.places), time.monotonic()
        if now >= next_cut:
            counts["cuts"] += place.proxy.cut(rng.choice(["reset", "end"]))
            next_cut = now + rng.expovariate(1 / CUT_SECONDS)
        if now >= next_kill:
            counts["kills"] += kill_worker(place)
            next_kill = now + rng.expovariate(1 / KILL_SECONDS)


def soak(minutes: float, seed: int, nodes: int) -> bool:
    """Run it, and print the samples and the table. Return whether all tasks ended as they should."""
    rng, enough, done = random.Random(seed), threading.Event(), Counter[str]()
    with Field(nodes) as field, tempfile.TemporaryFile("w+") as log:
        wanted = {"hosts": [place.name for place in field.places], "config": field.lab.config}
        with subprocess.Popen(
            [sys.executable, __file__, "--client", json.dumps(wanted)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            try:
                if client.stdout.readline() != "ready\n":
                    raise RuntimeError("the client does not start")
                watch = Watch()
                storm = threading.Thread(target=chaos, args=(field, rng, enough, done))
                storm.start()
                while time.monotonic() < watch.begin + 60 * minutes and client.poll() is None:
                    agents = {place.name: pid for place in field.places for pid in place.find("agent")}
                    print(watch.look({"client": client.pid, **agents}), flush=True)
                    time.sleep(SAMPLE_SECONDS)
                enough.set()
                storm.join()
                # The phase comes to its end first.
                ended, _ = client.communicate("enough\n", PHASE_SECONDS + LEAVE_SECONDS + 60)
                counts = json.loads(ended.splitlines()[-1])
            finally:
                enough.set()
                client.kill()
                log.seek(0)
                print(log.read()[-3000:], file=sys.stderr, end="")
        print("\n".join(watch.table()))
        left = field.leaks(LEAVE_SECONDS)
        print(f"{minutes:g} min, seed {seed}, {nodes} nodes: {dict(done)}; tasks: {counts}; left: {left or 'nothing'}")
        return not left and not set(counts) - {"right", "wrong", "crashed"} and not counts["wrong"]


def main() -> None:
    """Be the harness, or the client."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        be_client(json.loads(options.client))
    else:
        sys.exit(not soak(options.minutes, options.seed, options.nodes))


if __name__ == "__main__":
    main()
