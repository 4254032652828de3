"""Faults under loads: what came of each, and the table of all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from faults import EVERYTHING, LOADS, Fault, Network, Run, clock_library
from field import Client, Field, Hang, needless, overlaps
from load import MAX_WINDOW
from processes import eventually

LEASE_SECONDS = 120.0
LONG_LEASE_SECONDS = 3600.0
"""For a client that sleeps for longer than the default."""
FIRST_SECONDS = 1.0
"""How long the load is on at least before the fault."""


@dataclasses.dataclass
class Outcome:
    """What became of one run, or of all runs of a row: numbers, and a text for each thing that went wrong."""

    runs: int = 0
    hangs: int = 0
    lost: int = 0
    twice: int = 0
    processes: int = 0
    files: int = 0
    recovery: float = 0.0
    """Seconds from the end of the fault until a later task had run on the host that was hit; the longest."""
    wrong: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Add another run."""
        for name in ("runs", "hangs", "lost", "twice", "processes", "files", "wrong"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.recovery = max(self.recovery, other.recovery)

    def row(self, name: str, load: str) -> str:
        """Return it as a row of the table."""
        numbers = (self.runs, self.hangs, self.lost, self.twice, self.processes, self.files)
        return f"| {name:26} | {load:5} |" + "".join(f" {n:5} |" for n in numbers) + f" {self.recovery:6.1f} |"


HEAD = (
    f"| {'fault':26} | load  |  runs | hangs |  lost | twice | procs | files |  worst |\n"
    f"|{'-' * 28}|-------|{'------:|' * 6}-------:|"
)
"""`lost`: tasks that ended with an error, wrong data, or not at all; `twice`: those that ran again, or twice at once,
though nothing was killed that had them; `procs`, `files`: what was left of ours; `worst`: recovery in seconds."""


def recover(run: Run, fault: Fault, client: Client) -> float:
    """Wait until a task has ended on the host that was submitted after the fault. Return how long that took."""
    over = time.monotonic()
    # More tasks than those of the window had not been submitted when the highest number began.
    known = max(note.number for note in client.notes()) + (0 if run.load == "idle" else MAX_WINDOW)

    def worked() -> list[float]:
        notes = [note for note in client.notes() if note.host == run.place.mark]
        return [note.time for note in notes if note.what == "end" and note.number > max(known, -1)]

    if run.load == "idle":
        client.tell("enough")
    if not eventually(worked, fault.bound + 10):
        raise Hang(f"nothing ran on the host {fault.bound + 10:.0f} s after the fault: {client.tail()}")
    return min(worked()) - over


def ordeal(field: Field, fault: Fault, load: str, seed: int, env: dict[str, str] | None = None) -> Outcome:
    """Let a fault happen to a client with a load, at a seeded moment."""
    rng = random.Random(f"{fault.name} {load} {seed}")
    outcome = Outcome(runs=1)
    lease = LONG_LEASE_SECONDS if "min" in fault.name else LEASE_SECONDS
    with field.client(load, env=env or {}, options={"lease": lease}) as client:
        run = Run(field, client, rng.choice(field.places), load, rng)
        try:
            client.hear("ready")
            client.tell("go")
            client.hear("begun")
            time.sleep(FIRST_SECONDS + rng.random())
            fault.do(run)
            outcome.recovery = recover(run, fault, client)
            if outcome.recovery > fault.bound:
                outcome.wrong.append(f"work went on only after {outcome.recovery:.1f} s: {client.tail()}")
            if load != "idle":
                time.sleep(rng.random() / 2)
                client.tell("enough")
            told = client.hear("done")
            outcome.lost = len(told["failed"])
            outcome.wrong += [f"lost: {failed}" for failed in told["failed"][:2]]
            client.leave()
        except (Hang, TimeoutError) as error:
            outcome.hangs = 1
            outcome.wrong.append(str(error))
            client.signal(signal.SIGKILL)
            field.leaks(0)  # ends what is there
        else:
            judge(outcome, run)
    for place in field.places:
        place.proxy.up.armed = place.proxy.down.armed = None
        place.proxy.resume()
    outcome.wrong = [f"{fault.name}, {load}, seed {seed}: {wrong}" for wrong in outcome.wrong]
    return outcome


def judge(outcome: Outcome, run: Run) -> None:
    """Count what ran twice, and what is left."""
    notes = run.client.notes()
    again = sorted({*needless(notes, run.killed), *overlaps(notes)})
    outcome.twice = len(again)
    outcome.wrong += [f"{one}: {run.client.tail()}" for one in again[:3]]
    left = run.field.leaks()
    outcome.processes = sum(one.startswith("process") for one in left)
    outcome.files = len(left) - outcome.processes
    outcome.wrong += [f"left: {one}" for one in left]


def table(
    names: Iterable[str],
    seeds: Iterable[int],
    tell: Callable[[str], object],
    loads: Iterable[str] = LOADS,
) -> list[str]:
    """Print the table of these faults under these loads. Return what went wrong."""
    wrong = []
    tell(HEAD)
    with Network.own():
        for fault in (EVERYTHING[name] for name in names):
            if missing := fault.missing():
                tell(f"| {fault.name:26} | not run, as it needs {missing}")
                continue
            for load in loads:
                total = Outcome()
                for seed in seeds:
                    total.add(_in_a_field(fault, load, seed))
                tell(total.row(fault.name, load))
                for one in total.wrong:
                    tell(f"    {one}")
                wrong += total.wrong
    return wrong


def _in_a_field(fault: Fault, load: str, seed: int) -> Outcome:
    """Let a fault happen, with one host at odd seeds and with two at even ones."""
    with contextlib.ExitStack() as stack:
        env: dict[str, str] = {}
        if fault.clock:
            env = clock_library(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        field = stack.enter_context(Field(2 - seed % 2, env=dict(env), disk=fault.disk))
        return ordeal(field, fault, load, seed, env)
