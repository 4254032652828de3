"""Short tasks on a host that is far away: what `pre_dispatch` and batches do, beside the time that the slots need."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path

import skyward_lite as sky
from hosts import Hosts
from joblib import Parallel, delayed

SLOTS = 4
NAP = 0.005
"""Seconds of a task."""
WAYS = {
    'batch_size=1, pre_dispatch="2*n_jobs"': {"batch_size": 1},
    'batch_size=1, pre_dispatch="20*n_jobs"': {"batch_size": 1, "pre_dispatch": "20*n_jobs"},
    "batch_size=1, pre_dispatch='all'": {"batch_size": 1, "pre_dispatch": "all"},
    'batch_size="auto"': {},
}


def main() -> None:
    """Print how much of the slots' time each way uses, at two round trips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few tasks: does it run at all?")
    smoke = parser.parse_args().smoke
    tasks = 40 if smoke else 2000
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hosts = stack.enter_context(Hosts(directory, counted=False))
        for round_trip in (0.02,) if smoke else (0.02, 0.08):
            provider = sky.SSH(hosts.far(round_trip), config=hosts.lab.config)
            print(f"{tasks:,} tasks of {NAP * 1000:.0f} ms on {SLOTS} slots, round trip {round_trip * 1000:.0f} ms")
            with sky.pool(provider, worker=sky.Worker(concurrency=SLOTS)):
                for name, options in WAYS.items():
                    begin = time.perf_counter()
                    Parallel(n_jobs=-1, **options)(delayed(time.sleep)(NAP) for _ in range(tasks))
                    used = tasks * NAP / SLOTS / (time.perf_counter() - begin)
                    print(f"  {name:<42}{used:>6.0%} of the slots' time")


if __name__ == "__main__":
    main()
