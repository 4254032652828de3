"""Chaos, seeded: whatever can die, be cut, stall or lie, at moments that a seed chooses.

`make chaos` runs many rounds, the tests a few:

    make chaos CHAOS="--only storm --seeds 20"                 # four nodes, 2,000 tasks, kills and cuts, 20 times
    make chaos CHAOS="--only table --faults reset,agent"       # the rows of these faults: fault × load
    make chaos CHAOS="--only long"                             # faults of a minute and more; not run otherwise
    make chaos CHAOS="--rounds 500 --seed 1 --only hostile --seconds 20"

What can happen is in faults.py, where it happens in field.py and proxy.py, what must come of it in ordeals.py,
storms.py, deaths.py, sieges.py and known_hosts_cases.py. Each round prints nothing, or a line with its figures, unless
it fails; the last line of each part gives the counts.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import deaths
import faults
import known_hosts_cases
import ordeals
import sieges
import storms

say = functools.partial(print, flush=True)


def host_keys(rounds: int, seed: int) -> list[str]:
    """Compare `rounds` known_hosts files and configurations with ssh, and all that have a name.

    Return what went wrong.
    """

    def chosen(bench: known_hosts_cases.Bench) -> list[known_hosts_cases.Case]:
        return [*known_hosts_cases.named(bench), *known_hosts_cases.generated(rounds, seed)(bench)]

    logging.getLogger("skyward_lite").setLevel(logging.ERROR)  # each new key that is recorded is logged
    with tempfile.TemporaryDirectory() as directory:
        threads = os.cpu_count() or 1
        failures, stricter, accepted = known_hosts_cases.compare(Path(directory), chosen, threads)
    print(f"host keys: {accepted} accepted by ssh and by us; accepted by ssh alone: {dict(stricter)}")
    return failures


def each(run: Callable[[int, Callable[[str], object]], list[str]]) -> Callable[[int, int], list[str]]:
    """Return a part that runs once for each seed."""
    return lambda rounds, seed: [wrong for one in range(seed, seed + rounds) for wrong in run(one, say)]


def rows(chosen: str, among: list[faults.Fault]) -> list[str]:
    """Return the names of these faults that contain one of the words."""
    return [fault.name for fault in among if any(word in fault.name for word in chosen.split(","))]


def main() -> None:
    """Run everything and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=500, help="deaths of workers; more of the cheap rounds, fewer of the others"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=0, help="rounds of storms, cuts, leaving clients, and of each row")
    parser.add_argument("--seconds", type=float, default=20, help="of each hostile node")
    parser.add_argument("--faults", default="", help="rows of the table whose names contain one of these words")
    parser.add_argument("--only", default="", help="the parts whose name contains this")
    options = parser.parse_args()
    few = max(1, options.rounds // 10)
    seeds = options.seeds or max(1, options.rounds // 25)
    each_row = options.seeds or max(1, options.rounds // 250)
    names = rows(options.faults, [*faults.CONNECTIONS, *faults.PROCESSES])
    long = rows(options.faults, faults.LONG)
    parts: list[tuple[str, int, Callable[[int, int], list[str]]]] = [
        ("deaths of workers", options.rounds, deaths.crashes),
        ("Ctrl-C at a client", few, deaths.interruptions),
        ("known_hosts and configurations against ssh", 6 * options.rounds, host_keys),
        ("SIGTERM at a client", few, lambda n, seed: deaths.interruptions(n, seed, signal.SIGTERM)),
        ("hostile node", len(sieges.ROWS), lambda n, seed: sieges.hostile(options.seconds, tell=say)),
        ("storm", seeds, each(storms.storm)),
        ("cuts", seeds, each(storms.cuts)),
        ("thousand tasks", max(1, seeds // 10), each(storms.thousand)),
        ("client killed", seeds, each(storms.client_killed)),
        ("goodbye cut", seeds, each(storms.goodbye_cut)),
        ("table", each_row, lambda n, seed: ordeals.table(names, range(seed, seed + n), say)),
        ("long", 1, lambda n, seed: ordeals.table(long, range(seed, seed + n), say, ["small"])),
    ]
    bad = 0
    for name, rounds, run in parts:
        if options.only not in name or (name == "long" and not options.only):
            continue
        began = time.monotonic()
        failures = run(rounds, options.seed)
        print("\n".join(failures), end="\n" if failures else "")
        say(f"{name}: {rounds} rounds, {len(failures)} failed, {time.monotonic() - began:.0f} s")
        bad += len(failures)
    sys.exit(bad != 0)


if __name__ == "__main__":
    main()
