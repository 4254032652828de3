"""Beside other backends: starts, small tasks, shared arrays, large arguments and results; bulk over SSH, and memory.

Each section takes a while, and can run alone: `data.py shared memory`. Opponents run in the same rounds. Hosts are
`sshd`s on this machine; if root runs it, each has an interface of its own, whose counters are compared with what the
pool's connections say. The machine is small and noisy: compare ratios, not numbers of different runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import bulk
from hosts import Hosts
from rounds import SMOKE, Columns, Contest, Contestant, Sizes, median, spread

MB = 10**6


def seconds_table(columns: Columns, what: str, reference: str = "loky") -> None:
    """Print the seconds of each contestant, and their ratio to the reference's."""
    base = median(columns[reference][what])
    for name, column in columns.items():
        ratio = "" if name == reference else f"   {median(column[what]) / base:.2f} × {reference}"
        print(f"  {name:<22}{spread(column[what])} s{ratio}")


def start(contest: Contest) -> None:
    """From nothing to the first results, in a fresh process that has imported NumPy and joblib."""
    rounds = 1 if contest.smoke else 3
    print(f"Seconds to the first results; medians of {rounds} interleaved rounds, each in a fresh process")
    seconds_table(contest.starts(rounds), "ready")


def tiny(contest: Contest) -> None:
    """Tasks that take no time, one a batch."""
    sizes = contest.sizes
    print(f"Tasks/s of Parallel(batch_size=1) over operator.neg; medians of {sizes.rounds} interleaved rounds")
    contestants = {"Local(), 1 node": contest.skyward(1), **contest.others("loky", "dask", "ray")}
    columns = contest.play(contestants, "tiny", sizes.rounds, seconds=sizes.tiny)
    for name, column in columns.items():
        print(f"  {name:<22}{spread(column['rate'], digits=0)} tasks/s")
    ratio = median(columns["Local(), 1 node"]["rate"]) / median(columns["loky"]["rate"])
    contest.target("tasks/s over loky's", ratio, 1.0, " ×", least=True)


def shared(contest: Contest) -> None:
    """100 tasks share an array, which crosses to each node once, and not again in a second call."""
    sizes = contest.sizes
    tasks = 100
    print(f"{tasks} tasks share {sizes.shared:g} MB of random floats; medians of {sizes.rounds} interleaved rounds")
    ours = {"Local(), 1 node": contest.skyward(1)}
    if not contest.smoke:
        ours |= {
            "Local(), 2 nodes": contest.skyward(2),
            "sshd, 1 node": contest.skyward(1, over_ssh=True),
            "sshd, 2 nodes": contest.skyward(2, over_ssh=True),
        }
    others = contest.others("loky", "dask", "ray")
    columns = contest.play({**ours, **others}, "shared", sizes.rounds, mb=sizes.shared, tasks=tasks)
    for what in ("first", "second"):
        print(f" {what} call")
        seconds_table(columns, what)
    for name, contestant in ours.items():
        wire(contest, name, columns[name], sizes.shared * MB * (2 if "2" in name else 1), bool(contestant.hosts))
    for name in ours:
        mine, loky = columns[name], columns["loky"]
        contest.target(f"{name}, first call over loky's", median(mine["first"]) / median(loky["first"]), 2.5, " ×")
        for other in others.keys() - {"loky"}:
            ratio = median(mine["first"]) / median(columns[other]["first"])
            contest.target(f"{name}, first call over {other}'s", ratio, 1.0, " ×")
        contest.target(f"{name}, second call over loky's", median(mine["second"]) / median(loky["second"]), 1.5, " ×")


def wire(contest: Contest, name: str, column: dict[str, list[float]], data: float, over_ssh: bool) -> None:
    """Print what crossed the wire, next to the size of the data on all nodes."""
    up, again = median(column["first up"]), median(column["second up"])
    print(f"  {name}: {up / MB:.2f} MB sent in the first call, {again / MB:.3f} MB in the second")
    if over_ssh and column["interface up"]:
        counted = median(column["interface up"])
        print(f"    the interfaces count {counted / MB:.2f} MB in both calls: {counted / (up + again):.4f} ×")
    contest.target(f"{name}, bytes of the first call over the data's", up / data, 1.05, " ×")
    contest.target(f"{name}, bytes of the second call over the data's", again / data, 0.01, " ×")


def search(contest: Contest) -> None:
    """A grid search on a large matrix."""
    sizes = contest.sizes
    print(f"GridSearchCV of {5 * sizes.candidates} fits on a float matrix of {sizes.search:g} MB, 2 nodes")
    contestants = {"Local(), 2 nodes": contest.skyward(1 if contest.smoke else 2)}
    if not contest.smoke:
        contestants["sshd, 2 nodes"] = contest.skyward(2, over_ssh=True)
    contestants |= contest.others("loky", "dask")
    rounds = max(1, sizes.rounds // 2)
    columns = contest.play(contestants, "search", rounds, mb=sizes.search, candidates=sizes.candidates)
    seconds_table(columns, "fit")
    assert all(column["scores"] == columns["loky"]["scores"] for column in columns.values()), "the scores differ"
    print("  all scores are equal")


def distinct(contest: Contest) -> None:
    """Each task has its own array and returns another one."""
    sizes = contest.sizes
    tasks = 20
    print(f"{tasks} tasks with {sizes.distinct:g} MB in and out; medians of {sizes.rounds} interleaved rounds")
    ours = {"Local(), 1 node": contest.skyward(1)}
    if not contest.smoke:
        ours["sshd, 1 node"] = contest.skyward(1, over_ssh=True)
    others = contest.others("loky", "dask", "ray")
    columns = contest.play({**ours, **others}, "distinct", sizes.rounds, mb=sizes.distinct, tasks=tasks)
    both_ways = 2 * tasks * sizes.distinct
    rates = {name: both_ways / median(column["all"]) for name, column in columns.items()}
    for name, column in columns.items():
        print(f"  {name:<22}{spread((both_ways / seconds for seconds in column['all']), digits=0)} MB/s")
    for name in ours:
        for other in others.keys() - {"ray"}:
            contest.target(f"{name}, MB/s over {other}'s", rates[name] / rates[other], 1.0, " ×", least=True)


def memory(contest: Contest) -> None:
    """Peak memory while tasks read an array that they share."""
    sizes = contest.sizes
    print(f"Peak memory: 32 tasks share {sizes.memory:g} MB, 10 at a time, one node")
    for executor in ("thread",) if contest.smoke else ("thread", "process"):
        with contextlib.ExitStack() as stack:
            pool = Contestant(stack, "skyward", slots=10, executor=executor)
            (agent,) = pool.run("agents")["pids"]
            command = [sys.executable, str(Path(__file__).with_name("memory.py")), str(agent)]
            sampler = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            try:
                client = pool.run("memory", mb=sizes.memory, tasks=32)["client"]
            finally:
                most = json.loads(sampler.communicate()[0])
        print(
            f"  executor={executor!r}: node {most['node'] / MB:,.0f} MB (of it {most.get('shared', 0) / MB:,.0f} MB of "
            f"shared memory), client {client / MB:,.0f} MB"
        )
        if executor == "thread":
            # The processes' own memory counts too, which is small beside 1 GB.
            contest.target("the node's memory over the array's", most["node"] / MB / sizes.memory, 1.2, " ×")
            contest.target("the client's memory over the array's", client / MB / sizes.memory, 2.2, " ×")


SECTIONS: dict[str, Callable[[Contest], None]] = {
    "start": start,
    "tiny": tiny,
    "shared": shared,
    "search": search,
    "distinct": distinct,
    "bulk": bulk.bulk,
    "far": bulk.far,
    "small": bulk.small,
    "memory": memory,
}


def machine(opponents: str | None) -> None:
    """Print what the figures depend on."""
    with contextlib.suppress(OSError):
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        print(f"{os.cpu_count()} cores of {models[0].split(':')[1].strip()}, ", end="")
    print(f"{platform.system()} {platform.release()}, Python {platform.python_version()}", end="")
    ask = "import importlib.metadata as m; print(*[f', {n} {m.version(n)}' for n in %r], sep='')"
    for python, names in ((sys.executable, ["skyward_lite", "joblib", "numpy"]), (opponents, ["distributed", "ray"])):
        if python is not None:
            done = subprocess.run([python, "-c", ask % names], capture_output=True, text=True, check=True)
            print(done.stdout.strip(), end="")
    version = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False).stderr
    print(f", {version.split(',')[0].strip()}; load {os.getloadavg()[0]:.1f}", flush=True)


def main() -> None:
    """Run all of it, or the sections that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all if none is named")
    parser.add_argument("--smoke", action="store_true", help="little data: does it run at all?")
    parser.add_argument("--opponents", metavar="PYTHON", help="an interpreter that has dask, distributed and ray")
    parser.add_argument("--rounds", type=int, help="interleaved rounds of each section")
    parser.add_argument("--json", metavar="FILE", help="also write what was measured there, for chart.py")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all sizes of data")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.sections if name not in SECTIONS]:
        parser.error(f"no section {', '.join(unknown)}")
    sizes = SMOKE if arguments.smoke else Sizes()
    if arguments.rounds:
        sizes = dataclasses.replace(sizes, rounds=arguments.rounds)
    scaled = ("shared", "search", "distinct", "bulk", "far", "memory")
    sizes = dataclasses.replace(sizes, **{name: getattr(sizes, name) * arguments.scale for name in scaled})
    machine(arguments.opponents)
    names = arguments.sections or list(SECTIONS)
    measured: dict[str, Columns] = {}
    # Each section has contestants of its own, so that none is slowed by what another one keeps.
    for group in [names] if arguments.smoke else [[name] for name in names]:
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            hosts = stack.enter_context(Hosts(directory, counted=not arguments.smoke))
            contest = Contest(stack, hosts, arguments.opponents, sizes, smoke=arguments.smoke)
            for name in group:
                SECTIONS[name](contest)
            measured |= contest.columns
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"sizes": dataclasses.asdict(sizes), "columns": measured}))


if __name__ == "__main__":
    main()
