"""Speed as ratios against opponents in the same run, interleaved; then efficiency, start and leave times.

The machine is small and noisy: compare ratios, not numbers of different runs.
"""

from __future__ import annotations

import argparse
import operator
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import null_backend  # noqa: F401  (registers the backend)
import skyward_lite as sky
from joblib import Parallel, delayed

SLOTS = 10


def rate(tasks: int, **parallel: object) -> float:
    """Tasks per second of `operator.neg`, one task a batch."""
    begin = time.perf_counter()
    results = Parallel(batch_size=1, **parallel)(delayed(operator.neg)(i) for i in range(tasks))
    took = time.perf_counter() - begin
    assert results == [-i for i in range(tasks)]
    return tasks / took


def throughput(tasks: int, rounds: int) -> None:
    """Compare the small-task rate with the null backend, loky and threads."""
    print(f"Tasks/s of Parallel(batch_size=1) over operator.neg; medians of {rounds} interleaved rounds")
    with sky.pool(provider=sky.Local(nodes=1), worker=sky.Worker(concurrency=SLOTS)):
        # Each runs long enough to be measured, in proportion to its speed.
        runs: dict[str, Callable[[], float]] = {
            "skyward_lite": lambda: rate(tasks, n_jobs=-1, backend="skyward"),
            "null": lambda: rate(tasks, n_jobs=SLOTS, backend="null"),
            "loky, 2 jobs": lambda: rate(tasks // 4, n_jobs=2, backend="loky"),
            "threading": lambda: rate(tasks, n_jobs=SLOTS, backend="threading"),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()  # warm up: imports, processes, caches
        for _ in range(rounds):
            for name, run in runs.items():
                rates[name].append(run())
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours = medians["skyward_lite"]
    for name, values in rates.items():
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        ratio = "" if name == "skyward_lite" else f"   skyward_lite is {ours / medians[name]:.2f} ×"
        print(f"  {name:<14}{medians[name]:>9,.0f}/s  ({spread}){ratio}")
    print(f"  target: at least 2 × loky: {'met' if ours >= 2 * medians['loky, 2 jobs'] else 'MISSED'}")


def efficiency(tasks: int, nap: float) -> None:
    """Ideal time over real time of sleeping tasks on 100 slots."""
    print(f"Efficiency: {tasks:,} tasks of {nap * 1000:.0f} ms on 100 slots (2 nodes); target 97.5 %")
    with sky.pool(provider=sky.Local(nodes=2), worker=sky.Worker(concurrency=50)):
        for batch_size in ("auto", 1):
            begin = time.perf_counter()
            Parallel(n_jobs=-1, batch_size=batch_size)(delayed(time.sleep)(nap) for _ in range(tasks))
            took = time.perf_counter() - begin
            print(f"  batch_size={batch_size!r:<7} {tasks * nap / 100 / took:.1%}")
    begin = time.perf_counter()
    Parallel(n_jobs=100, backend="threading", batch_size=1)(delayed(time.sleep)(nap) for _ in range(tasks))
    print(f"  100 threads in this process: {tasks * nap / 100 / (time.perf_counter() - begin):.1%}")


START = """
import time
import skyward_lite as sky
begin = time.perf_counter()
with sky.pool() as pool:
    ready = time.perf_counter()
    pool.submit(abs, -1).result()
    first = time.perf_counter()
    last = time.perf_counter()
left = time.perf_counter()
print(ready - begin, first - ready, left - last)
"""


def start(rounds: int) -> None:
    """Time from pool() to ready and from the block's end to the next line, each in a fresh interpreter."""
    rows = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True)
        rows.append([float(x) for x in done.stdout.split()])
    ready, first, leave = (statistics.median(column) for column in zip(*rows, strict=True))
    worst = [max(column) for column in zip(*rows, strict=True)]
    print(f"Local(): medians of {rounds} fresh interpreters (worst)")
    print(f"  ready after {ready:.3f} s ({worst[0]:.3f}); target 1 s, joblib's import included")
    print(f"  first result after {first * 1000:.1f} ms ({worst[1] * 1000:.1f})")
    print(f"  left after {leave:.3f} s ({worst[2]:.3f}); target 0.5 s")


def imports(rounds: int) -> None:
    """Time of fresh interpreters that import the package, over bare ones in between."""
    codes = {"bare": "pass", "import": "import skyward_lite", "pool": "from skyward_lite import pool"}
    times: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(rounds):
        for name, code in codes.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times[name].append((time.perf_counter() - begin) * 1000)
    bare, package, pool = (statistics.median(values) for values in times.values())
    print(f"Import: medians of {rounds} fresh interpreters each, interleaved; a bare one takes {bare:.0f} ms")
    print(f"  import skyward_lite takes {package - bare:.1f} ms more; target 50 ms")
    print(f"  from skyward_lite import pool takes {pool - bare:.1f} ms more")


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few tasks: does it run at all?")
    smoke = parser.parse_args().smoke
    throughput(400 if smoke else 20_000, 1 if smoke else 7)
    efficiency(400 if smoke else 10_000, 0.05)
    start(1 if smoke else 7)
    imports(1 if smoke else 31)


if __name__ == "__main__":
    main()
