"""The ways to a node in one run: this machine, sshd, a command (`sh -c`), and Slurm's `srun`, in interleaved rounds.

Each way leads to two nodes of four slots on this machine, whose cores they share, with this interpreter. So the figures
differ only by what carries the bytes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import logging
import operator
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import numpy as np
import skyward_lite as sky
import slurm
from busy import PARTS, adopt, busy
from joblib import Parallel, delayed
from lab import Lab
from skyward_lite.providers import Provider

NODES, SLOTS = 2, 4
NAP_SECONDS = 0.05
FEW = 200, 1 << 20
"""Tasks, and bytes, that only show whether it works."""
LONE_TASKS = 20
"""Tasks, one at a time on an idle pool, whose median time is the latency."""
PAUSE_SECONDS = 0.05
"""Pause before each of them: connections treat what follows at once otherwise."""
SMALL, LARGER = 64, 4096
"""Bytes of the argument, and of the result, of a lone task."""

WIDTH = 30
"""Characters of a column."""
BATCHED = 20
"""For each task that is a batch of its own, so many are sent in batches, which takes about as long."""

Rows = dict[str, dict[str, list[float]]]
"""For each figure, for each way, the value of each round."""

FIGURES = {
    "ready": ("s until the pool is entered", 3),
    "one": ("tasks/s, Parallel(batch_size=1)", 0),
    "auto": ("tasks/s, batch_size='auto'", 0),
    "naps": ("s for the tasks of 50 ms", 3),
    "up": ("MB/s to a node", 0),
    "down": ("MB/s from a node", 0),
    "lone": (f"ms for a lone task of {SMALL} bytes", 2),
    "larger": (f"ms for a lone task of {LARGER:,} bytes", 2),
    "left": ("s until the pool is left", 3),
}


def random_array(size: int) -> tuple[np.ndarray, float]:
    """Return so many random bytes, and the seconds that it took to make them."""
    begin = time.perf_counter()
    array = np.frombuffer(os.urandom(size), np.uint8)
    return array, time.perf_counter() - begin


def rate(tasks: int, batch_size: int | str) -> float:
    """Return tasks of `operator.neg` per second."""
    begin = time.perf_counter()
    results = Parallel(n_jobs=-1, batch_size=batch_size)(delayed(operator.neg)(i) for i in range(tasks))
    took = time.perf_counter() - begin
    assert results == [-i for i in range(tasks)]
    return tasks / took


def lone(pool: sky.ComputePool, size: int, tasks: int) -> float:
    """Return the median milliseconds of tasks that have the pool to themselves."""
    times = []
    for _ in range(tasks):
        time.sleep(PAUSE_SECONDS)
        data = os.urandom(size)
        begin = time.perf_counter()
        assert pool.submit(bytes, data).result() == data
        times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times)


def measure(provider: Provider, tasks: int, size: int) -> dict[str, float]:
    """Open a pool, take all its figures, and leave it."""
    found = {}
    begin = time.perf_counter()
    nodes = {} if provider.nodes else {"nodes": NODES}
    with sky.pool(provider, worker=sky.Worker(concurrency=SLOTS), **nodes) as pool:
        found["ready"] = time.perf_counter() - begin
        rate(50, 1)  # warm up: imports, processes
        with busy(found, "one"):
            found["one"] = rate(tasks, 1)
        found["auto"] = rate(BATCHED * tasks, "auto")
        begin = time.perf_counter()
        Parallel(n_jobs=-1)(delayed(time.sleep)(NAP_SECONDS) for _ in range(tasks // 10))
        found["naps"] = time.perf_counter() - begin
        # New data each time: a node keeps what it was sent.
        data, _ = random_array(size)
        with busy(found, "up"):
            begin = time.perf_counter()
            assert pool.submit(np.size, data).result() == size
            found["up"] = size / 1e6 / (time.perf_counter() - begin)
        with busy(found, "down"):
            begin = time.perf_counter()
            data, making = pool.submit(random_array, size).result()
            found["down"] = size / 1e6 / (time.perf_counter() - begin - making)
        assert data.size == size
        lonely = min(LONE_TASKS, tasks // 50)
        found["lone"], found["larger"] = lone(pool, SMALL, lonely), lone(pool, LARGER, lonely)
        begin = time.perf_counter()
    found["left"] = time.perf_counter() - begin
    return found


@contextlib.contextmanager
def ways(directory: Path) -> Iterator[dict[str, Callable[[], Provider]]]:
    """Start what the ways lead through; the result makes the provider of each."""
    with contextlib.ExitStack() as stack:
        lab = Lab(directory)
        stack.callback(lab.close)
        hosts = [lab.host().name for _ in range(NODES)]
        found: dict[str, Callable[[], Provider]] = {
            "Local()": lambda: sky.Local(nodes=NODES),
            "SSH": lambda: sky.SSH(*hosts, config=lab.config, python=sys.executable),
            "Exec": lambda: sky.Exec("env NODE={node} sh -c", nodes=["a", "b"], python=sys.executable),
        }
        if lacking := slurm.missing():
            print(f"Without Slurm: no {lacking} here (`make system`)")
        else:
            cluster = stack.enter_context(slurm.Cluster(directory / "slurm", nodes=NODES, cpus=SLOTS))
            stack.enter_context(slurm.submission_environment(cluster))
            found["Slurm"] = lambda: sky.Slurm(cpus_per_task=SLOTS, time="30", python=sys.executable)
        yield found


def show(rows: Rows, names: list[str], rounds: int, tasks: int, size: int) -> None:
    """Print the table of medians, with the extremes below each."""
    ideal = tasks / 10 * NAP_SECONDS / NODES / SLOTS
    print(
        f"{NODES} nodes of {SLOTS} slots on {os.cpu_count()} cores, {tasks:,} tasks one by one, {BATCHED * tasks:,} in "
        f"batches, {tasks // 10} naps of {NAP_SECONDS * 1000:.0f} ms (ideal {ideal:.2f} s), "
        f"arrays of {size / 1e6:g} MB; medians of {rounds} interleaved rounds (extremes)"
    )
    print(f"  {'':<34}" + "".join(f"{name:>{WIDTH}}" for name in names))
    for figure, (what, digits) in FIGURES.items():
        cells = []
        for name in names:
            values = rows[figure][name]
            low, high = (f"{value:,.{digits}f}" for value in (min(values), max(values)))
            cells.append(f"{f'{statistics.median(values):,.{digits}f} ({low} to {high})':>{WIDTH}}")
        print(f"  {what:<34}" + "".join(cells))
    print(f"  Processors kept busy of {os.cpu_count()}, by {', '.join(PARTS)}: what comes near one is the limit")
    for figure in ("one", "up", "down"):
        cells = [
            " + ".join(f"{statistics.median(rows[f'{figure}, {part}'][name]):.2f}" for part in PARTS) for name in names
        ]
        print(f"  {FIGURES[figure][0]:<34}" + "".join(f"{cell:>{WIDTH}}" for cell in cells))


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few tasks and one round: does it run at all?")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rounds, tasks, size = (1, *FEW) if args.smoke else (args.rounds, 4000, 100_000_000)
    logging.getLogger("skyward_lite").setLevel(logging.ERROR)
    adopt()
    rows: Rows = collections.defaultdict(lambda: collections.defaultdict(list))
    with tempfile.TemporaryDirectory() as directory, ways(Path(directory)) as found:
        if not args.smoke:
            measure(found["Local()"](), *FEW)  # imports what all ways need
        for _ in range(rounds):
            for name, provider in found.items():
                for figure, value in measure(provider(), tasks, size).items():
                    rows[figure][name].append(value)
        show(rows, list(found), rounds, tasks, size)


if __name__ == "__main__":
    main()
