"""Contestants in processes of their own, their interleaved rounds, and how the figures are shown."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hosts import Hosts

RUN_SECONDS = 300.0
"""The longest that one run of a contestant may take."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything; of data, in MB."""

    rounds: int = 7
    tiny: float = 1
    """Seconds of tasks that take no time."""
    shared: float = 50
    search: float = 200
    distinct: float = 10
    bulk: float = 1000
    far: float = 200
    memory: float = 1000
    candidates: int = 10
    """Points of the grid of `search`; it has five times as many fits."""
    round_trip: float = 0.08
    """Seconds, of the host that is far away."""
    idle: float = 2
    """Seconds of small tasks with nothing beside them."""


SMOKE = Sizes(
    rounds=1,
    tiny=0.05,
    shared=1,
    search=1,
    distinct=0.2,
    bulk=4,
    far=2,
    memory=4,
    candidates=2,
    round_trip=0.01,
    idle=0.2,
)

Answer = dict[str, Any]
Columns = dict[str, dict[str, list[Any]]]
"""What was measured: by contestant, then by the name of the figure, a value for each round."""


class Contestant:
    """The process of one contestant, for as long as the block."""

    def __init__(self, stack: contextlib.ExitStack, kind: str, python: str = sys.executable, **options: Any) -> None:
        self.hosts: list[str] = options.get("hosts", [])
        self._errors = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 (it is closed with the stack)
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("contest.py")), kind, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        stack.callback(self._end)
        self.pid = self._process.pid
        hello = self._answer()
        self.version: str = hello["version"]
        self.ready: float = hello["ready"]
        """Seconds until it had the first results."""

    def _end(self) -> None:
        try:
            self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def run(self, run: str, **parameters: object) -> Answer:
        """Let it run something of `contest.py`; return what it measured."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"run": run, **parameters}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        bound = threading.Timer(RUN_SECONDS, self._process.kill)
        bound.start()
        try:
            line = self._process.stdout.readline()
        finally:
            bound.cancel()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"a contestant has failed:\n{self._errors.read()[-4000:]}")
        answer: Answer = json.loads(line)
        return answer


class Contest:
    """The contestants, each started when it is first asked for, and the hosts that they use."""

    def __init__(
        self, stack: contextlib.ExitStack, hosts: Hosts, opponents: str | None, sizes: Sizes, *, smoke: bool
    ) -> None:
        """`opponents`: the interpreter that has those of the opponents that are not among the tests' packages."""
        self.hosts, self.sizes, self.smoke, self._opponents = hosts, sizes, smoke, opponents
        self.cores = max(2, os.cpu_count() or 2)
        self._stack = stack
        self._running: dict[str, Contestant] = {}
        self.columns: dict[str, Columns] = {}
        """What was measured of each run, for `chart.py`."""

    def skyward(self, nodes: int = 1, *, over_ssh: bool = False) -> Contestant:
        """Return a pool of so many nodes, with one slot per core in all."""
        options: dict[str, Any] = {"slots": self.cores // nodes}
        if over_ssh:
            options |= {"hosts": self.hosts.near(nodes), "config": self.hosts.lab.config}
        else:
            options |= {"nodes": nodes}
        return self._get(f"skyward {options}", lambda: Contestant(self._stack, "skyward", **options))

    def host(self, name: str) -> Contestant:
        """Return a pool of this host, with one process that has two slots."""
        options: dict[str, Any] = {"slots": 2, "hosts": [name], "config": self.hosts.lab.config}
        return self._get(f"skyward {options}", lambda: Contestant(self._stack, "skyward", **options))

    def others(self, *kinds: str) -> dict[str, Contestant]:
        """Return the opponents that can run here, by name."""
        there: dict[str, Contestant] = {}
        for kind in kinds:
            if kind == "loky":
                python = sys.executable
            elif self._opponents is not None:
                python = self._opponents
            else:
                print(f"  {kind}: left out, without --opponents")
                continue
            make = functools.partial(Contestant, self._stack, kind, python, slots=self.cores)
            there[kind] = self._get(kind, make)
        return there

    def _get(self, name: str, make: Callable[[], Contestant]) -> Contestant:
        if name not in self._running:
            self._running[name] = make()
        return self._running[name]

    def play(self, contestants: dict[str, Contestant], run: str, rounds: int, **parameters: object) -> Columns:
        """Let each contestant warm up by one round that does not count, then take turns."""
        columns: Columns = {name: collections.defaultdict(list) for name in contestants}
        for number in range(rounds + 1):
            for name, contestant in contestants.items():
                before = self.hosts.counters(contestant.hosts)
                answer = contestant.run(run, seed=number, **parameters)
                after = self.hosts.counters(contestant.hosts)
                if before and after:
                    answer["interface up"] = after[0] - before[0]
                    answer["interface down"] = after[1] - before[1]
                for what, value in answer.items() if number else ():
                    columns[name][what].append(value)
        self.columns[run] = columns
        return columns

    def starts(self, rounds: int) -> Columns:
        """Let a pool on this machine and each opponent start anew, in turns; return the seconds until first results."""
        columns: Columns = {}
        for _ in range(rounds):
            for name, kind in (("Local(), 1 node", "skyward"), ("loky", "loky"), ("dask", "dask"), ("ray", "ray")):
                python = sys.executable if kind in ("skyward", "loky") else self._opponents
                if python is not None:
                    with contextlib.ExitStack() as stack:
                        ready = Contestant(stack, kind, python, slots=self.cores).ready
                    columns.setdefault(name, collections.defaultdict(list))["ready"].append(ready)
        self.columns["start"] = columns
        return columns

    def target(self, what: str, value: float, bound: float, unit: str = "", *, least: bool = False) -> None:
        """Print whether a figure is at most, or at least, what it is meant to be; with little data it is not judged."""
        met = value >= bound if least else value <= bound
        side = "at least" if least else "at most"
        end = "too little data" if self.smoke else "met" if met else "MISSED"
        print(f"  target: {what}: {value:.3g}{unit}, {side} {bound:.3g}{unit}: {end}", flush=True)


# ------------------------------------------------------------------------------------------------ figures


def median(values: Iterable[float]) -> float:
    """Return the median; nan without values."""
    there = list(values)
    return statistics.median(there) if there else float("nan")


def spread(values: Iterable[float], scale: float = 1.0, digits: int = 3) -> str:
    """Return the median and the extremes, as text."""
    there = [value * scale for value in values]
    return f"{median(there):.{digits}f} ({min(there):.{digits}f} to {max(there):.{digits}f})"


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the value that so many percent of the values do not exceed."""
    there = sorted(values)
    return there[min(len(there) - 1, int(len(there) * percent / 100))]
