"""What it takes a worker to import a user's modules that its node does not have, against modules that are there.

A task imports the first of 20 modules, each of which imports the next one, in a fresh pool each time: once as the
client serves them, and once from a directory of the node. Rounds are interleaved. The hosts are `sshd`s on this
machine, behind a relay that delays each byte.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
from pathlib import Path

import skyward_lite as sky
from hosts import Hosts
from skyward_lite.client import sources

MODULES = 20
MAX_ADDED_MS = 100
"""Target for the time that serving adds, at 2 ms of round trip."""
MAX_TRIPS = 3
"""Target for the round trips, one after the other, at 80 ms."""

requests: list[bytes] = []
"""The requests that the workers of the last pool have sent."""


class CountedSources(sources.Sources):
    """What the client serves; notes each request."""

    def answer(self, request: bytes) -> bytes:
        """Return the answer to a worker's request."""
        requests.append(request)
        return super().answer(request)


def write_modules(directory: Path) -> None:
    """Write modules of some 100 lines, each of which imports the next one."""
    directory.mkdir()
    for number in range(MODULES):
        following = f"import chain_{number + 1:02d}\n" if number + 1 < MODULES else ""
        functions = "".join(
            f"def f{n}(x):\n    '''Return a sum.'''\n    return x + {n} + {number}\n\n\n" for n in range(20)
        )
        (directory / f"chain_{number:02d}.py").write_text(following + functions)


def first_import() -> float:
    """Return the seconds that the import takes, on a worker."""
    import importlib
    import time

    begin = time.perf_counter()
    importlib.import_module("chain_00")
    return time.perf_counter() - begin


def one(hosts: Hosts, name: str, there: Path | None) -> float:
    """Return the seconds of the import in a fresh pool. `there`: a directory of the node that has the modules."""
    requests.clear()
    image = sky.Image() if there is None else sky.Image(env={"PYTHONPATH": str(there)})
    provider = sky.SSH(name, config=hosts.lab.config)
    worker = sky.Worker(concurrency=1)
    with sky.pool(provider, worker=worker, image=image, ship_modules=there is None) as pool:
        seconds: float = pool.submit(first_import).result()
    return seconds


def compare(hosts: Hosts, round_trip: float, rounds: int, there: Path) -> None:
    """Print the two times at this round trip, in seconds, and the requests."""
    name = hosts.far(round_trip)
    served, installed, counts = [], [], []
    one(hosts, name, there)  # the modules that are there get their bytecode, as those that pip installs have it
    for _ in range(rounds):
        served.append(one(hosts, name, None) * 1000)
        counts.append(len(requests))
        installed.append(one(hosts, name, there) * 1000)
    added = statistics.median(served) - statistics.median(installed)
    verdict = ""
    if round_trip == 0.002:
        verdict = f"; target {MAX_ADDED_MS} ms: {'met' if added <= MAX_ADDED_MS else 'MISSED'}"
    if round_trip == 0.08:
        verdict = f"; target {MAX_TRIPS} round trips: {'met' if max(counts) <= MAX_TRIPS else 'MISSED'}"
    print(
        f"  {round_trip * 1000:3.0f} ms: served {shown(served)}, there already {shown(installed)}: {added:+.1f} ms, "
        f"{max(counts)} request{'s' if max(counts) > 1 else ''}{verdict}",
        flush=True,
    )


def shown(values: list[float]) -> str:
    """Return median and extremes."""
    return f"{statistics.median(values):.1f} ms ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one round at 2 ms: does it run at all?")
    smoke = parser.parse_args().smoke
    logging.getLogger("skyward_lite").setLevel(logging.ERROR)
    sources.Sources = CountedSources  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_modules(root / "client")
        write_modules(root / "node")
        sys.path.append(str(root / "client"))
        (root / "lab").mkdir()
        with Hosts(root / "lab", counted=False) as hosts:
            rounds = 1 if smoke else 9
            print(f"Import of {MODULES} modules in a fresh pool, by round trip; medians of {rounds} interleaved rounds")
            for round_trip in (0.002,) if smoke else (0.0, 0.002, 0.08):
                compare(hosts, round_trip, rounds, root / "node")


if __name__ == "__main__":
    main()
