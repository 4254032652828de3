"""Long runs under many faults: four nodes in a storm, connections cut again and again, clients that are killed."""

from __future__ import annotations

import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
from faults import Run
from field import Client, Field, Hang, needless, overlaps
from processes import eventually

Tell = Callable[[str], object]

STORM_TASKS = 2000
STORM_NAP_SECONDS = 0.05
KILL_SECONDS = 2.0
"""Between two kills of a worker or an agent, on average."""
CUT_SECONDS = 0.5
"""Between two cuts of a connection, on average."""
STORM_SECONDS = 300.0
"""A storm that takes longer hangs."""
SLOW_STORM_SECONDS = 40.0
"""A storm that takes longer is wrong: without faults it takes 6.5 s."""
CUTS_PER_RUN = 10
THOUSAND = 1000
THOUSAND_CUTS = 20
THOUSAND_DELAY_SECONDS = 0.001
"""Of each direction: a round trip of 2 ms."""
RATIO = 2.0
"""How much longer the 1,000 tasks may take with the cuts."""
LEASE_SECONDS = 2.0
"""The lease of clients that are killed."""
GRACE_SECONDS = 15.0
"""How long something of ours may be left after the lease of a killed client."""

GOODBYE_DELAY_SECONDS = 0.02
"""Of each direction while a goodbye is under way, which takes a few round trips."""


def count_again(client: Client, killed: set[int]) -> list[str]:
    """Return the tasks that ran twice though nothing had been lost with a killed process."""
    notes = client.notes()
    return sorted({*needless(notes, killed), *overlaps(notes)})


def told_by(client: Client, wrong: list[str]) -> list[str]:
    """Return what went wrong, and keep what the client logged, if anything did."""
    if wrong:
        file = Path(tempfile.mkstemp(prefix="chaos-", suffix=".log")[1])
        notes = "\n".join(map(str, client.notes()))
        file.write_text("\n".join([*wrong, client.log.read_text(), notes]))
        wrong = [*wrong, f"the client's log is {file}"]
    return wrong


def executions(client: Client) -> int:
    """Return how many executions began."""
    return sum(note.what == "begin" and note.number >= 0 for note in client.notes())


# ------------------------------------------------------------------------------------------------ four nodes


def hit(run: Run) -> str:
    """Kill a worker or an agent of the host. Return which."""
    if run.rng.random() < 0.5 and faults.kill_worker(run, tries=20):
        return "worker"
    agents = run.place.find("agent")
    if not agents:
        return ""
    run.kill(run.rng.choice(agents))
    return "agent"


def weather(client: Client, field: Field, rng: random.Random, killed: set[int], pace: float) -> dict[str, Any]:
    """Cut and kill until the client is done. Return what it says, and the numbers of cuts and kills.

    `pace`: the time from one to the next, in parts of the usual one.
    """
    counts = {"cuts": 0, "worker": 0, "agent": 0, "": 0}
    began = time.monotonic()
    next_cut = began + pace * rng.expovariate(1 / CUT_SECONDS)
    next_kill = began + pace * rng.expovariate(1 / KILL_SECONDS)
    while (told := client.poll("done", min(next_cut, next_kill) - time.monotonic())) is None:
        now = time.monotonic()
        if now > began + STORM_SECONDS:
            raise Hang(f"the call is not done after {STORM_SECONDS:.0f} s: {client.tail()}")
        place = rng.choice(field.places)
        if now >= next_cut:
            counts["cuts"] += place.proxy.cut(rng.choice(["reset", "end"]))
            next_cut = now + pace * rng.expovariate(1 / CUT_SECONDS)
        if now >= next_kill:
            counts[hit(Run(field, client, place, "small", rng, killed))] += 1
            next_kill = now + pace * rng.expovariate(1 / KILL_SECONDS)
    return {**told, **counts, "took": time.monotonic() - began}


def storm(seed: int, tell: Tell, tasks: int = STORM_TASKS, nodes: int = 4, pace: float = 1.0) -> list[str]:
    """Run many tasks on some nodes while workers and agents are killed and connections cut; what went wrong."""
    rng = random.Random(f"storm {seed}")
    killed: set[int] = set()
    with Field(nodes) as field, field.client("parallel", tasks=tasks, nap=STORM_NAP_SECONDS) as client:
        try:
            client.hear("ready")
            client.tell("go")
            client.hear("begun")
            told = weather(client, field, rng, killed, pace)
            client.leave()
            wrong = [f"not as in a serial run: {one}" for one in told["failed"]]
        except Hang as error:
            return told_by(client, [f"storm, seed {seed}: {error}"])
        again = count_again(client, killed)
        left = field.leaks()
        wrong += again + [f"left: {one}" for one in left]
        if told["took"] > SLOW_STORM_SECONDS:
            wrong.append(f"it took {told['took']:.1f} s")
        tell(
            f"storm, seed {seed:3}: {tasks} tasks on {nodes} nodes in {told['took']:5.1f} s, "
            f"{told['cuts']:3} connections cut, {told['worker']:2} workers and {told['agent']:2} agents killed, "
            f"{executions(client) - tasks:3} ran again, {len(again)} needlessly, {len(left)} left"
        )
        return told_by(client, [f"storm, seed {seed}: {one}" for one in wrong])


# ------------------------------------------------------------------------------------------------ cuts alone


def cut_kinds() -> list[tuple[str, Callable[[Run], None]]]:
    """Return the ways in which a connection is cut, each with its name."""
    return [
        ("reset", faults.cut("reset")),
        ("end", faults.cut("end")),
        ("at a byte up", faults.at_a_byte("up", "cut")),
        ("at a byte down", faults.at_a_byte("down", "cut", "end")),
        ("in the hello", faults.cut_twice),
        ("before the reply", faults.before_the_reply),
    ]


def cuts(seed: int, tell: Tell, count: int = CUTS_PER_RUN) -> list[str]:
    """Cut connections at seeded moments in seeded ways, and nothing else; what went wrong.

    Odd seeds have one node and even ones two; loads alternate. Each task must have run exactly once.
    """
    rng = random.Random(f"cuts {seed}")
    nodes, load = 2 - seed % 2, ("small", "bulk")[seed // 2 % 2]
    done: list[str] = []
    with Field(nodes) as field, field.client(load) as client:
        try:
            client.hear("ready")
            client.tell("go")
            client.hear("begun")
            for _ in range(count):
                time.sleep(rng.uniform(0.05, 1.5))
                name, do = rng.choice(cut_kinds())
                done.append(name)
                do(Run(field, client, rng.choice(field.places), load, rng))
            client.tell("enough")
            told = client.hear("done")
            client.leave()
        except (Hang, TimeoutError) as error:
            return told_by(client, [f"cuts, seed {seed}, {nodes} nodes, {load}, after {done}: {error}"])
        lost = [f"lost: {one}" for one in told["failed"]]
        again = once(client, told["count"])
        left = [f"left: {one}" for one in field.leaks()]
        tell(
            f"cuts, seed {seed:3}: {nodes} nodes, {load:5}, {told['count']:4} tasks, {count} cuts: {len(lost)} lost, "
            f"{len(again)} not exactly once, {len(left)} left"
        )
        return told_by(client, [f"cuts, seed {seed}: {one}; cut {done}" for one in [*lost, *again, *left]])


def once(client: Client, count: int) -> list[str]:
    """Return which of the tasks did not run exactly once."""
    ran: dict[int, int] = {}
    for note in client.notes():
        ran[note.number] = ran.get(note.number, 0) + (note.what == "begin")
    return [f"task {number} ran {ran.get(number, 0)} times" for number in range(count) if ran.get(number, 0) != 1]


def thousand(seed: int, tell: Tell, tasks: int = THOUSAND, count: int = THOUSAND_CUTS) -> list[str]:
    """Run 1,000 tasks on one node, 2 ms away, without cuts and with 20; what went wrong."""
    rng = random.Random(f"thousand {seed}")
    took: list[float] = []
    wrong: list[str] = []
    with Field(1, THOUSAND_DELAY_SECONDS) as field:
        for cut in (False, True):
            with field.client("parallel", tasks=tasks, nap=STORM_NAP_SECONDS) as client:
                try:
                    client.hear("ready")
                    client.tell("go")
                    began = client.hear("begun")["time"]
                    for moment in sorted(rng.uniform(0, took[0]) for _ in range(count)) if cut else ():
                        time.sleep(max(0.0, began + moment - time.monotonic()))
                        # While it is cut already, there is nothing to cut.
                        eventually(lambda: field.places[0].proxy.cut(rng.choice(["reset", "end"])), GRACE_SECONDS)
                    told = client.hear("done")
                    client.leave()
                except Hang as error:
                    return [f"thousand, seed {seed}: {error}"]
                took.append(told["time"] - began)
                wrong += [*told["failed"], *once(client, tasks)]
        connections = field.places[0].proxy.connections
    ratio = took[1] / took[0]
    tell(
        f"thousand, seed {seed}: {tasks} tasks of {STORM_NAP_SECONDS * 1000:.0f} ms, one node, round trip 2 ms: uncut "
        f"{took[0]:.1f} s, with {count} cuts {took[1]:.1f} s, {ratio:.2f} times as long, {connections} connections"
    )
    if ratio > RATIO:
        wrong.append(f"with cuts it took {ratio:.2f} times as long")
    return [f"thousand, seed {seed}: {one}" for one in wrong]


# ------------------------------------------------------------------------------------------------ clients that go


def client_killed(seed: int, tell: Tell) -> list[str]:
    """Kill a client at a seeded moment, from its start on; what is left on any node after lease + 15 s.

    Its tasks have started processes that outlive them.
    """
    rng = random.Random(f"killed {seed}")
    load = rng.choice(["trees", "trees", "bulk"])
    with Field(2) as field, field.client(load, options={"lease": LEASE_SECONDS}) as client:
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0.3, 1.5))  # while it starts and greets
        else:
            client.hear("ready")
            client.tell("go")
            client.hear("begun")
            time.sleep(rng.uniform(0, 3))
        cut = rng.random() < 0.3
        if cut:
            field.places[0].proxy.cut("silence")
        there = len(field.processes())
        client.signal(signal.SIGKILL)
        began = time.monotonic()
        gone = eventually(lambda: not field.left(), LEASE_SECONDS + GRACE_SECONDS)
        took = time.monotonic() - began
        left = [] if gone else field.leaks(0)
        how = f"{load}{', a connection cut before' if cut else ''}"
        tell(f"client killed, seed {seed:3}: {how}: {there} processes, gone after {took:.1f} s, {len(left)} left")
        return [f"client killed, seed {seed}, {how}: left: {one}" for one in left]


def goodbye_cut(seed: int, tell: Tell) -> list[str]:
    """Cut the connections of a client that leaves its pool; it must leave, and nothing may be left after its lease."""
    rng = random.Random(f"goodbye {seed}")
    with Field(2, GOODBYE_DELAY_SECONDS) as field, field.client("small", options={"lease": LEASE_SECONDS}) as client:
        try:
            client.hear("ready")
            client.tell("go")
            client.hear("begun")
            client.tell("enough")
            told = client.hear("done")
            client.tell("leave")
            began = time.monotonic()
            time.sleep(rng.uniform(0, 4 * GOODBYE_DELAY_SECONDS))
            count = sum(place.proxy.cut(rng.choice(["reset", "end", "silence"])) for place in field.places)
            client.hear("left")
            took = time.monotonic() - began
            client.process.wait(10)
        except Hang as error:
            return [f"goodbye cut, seed {seed}: {error}"]
        left = [f"left: {one}" for one in field.leaks(LEASE_SECONDS + GRACE_SECONDS)]
        gone = time.monotonic() - began
        wrong = [*told["failed"], *once(client, told["count"]), *left]
        tell(f"goodbye cut, seed {seed:3}: {count} connections cut, left in {took:.1f} s, gone {gone:.1f} s after")
        return [f"goodbye cut, seed {seed}: {one}" for one in wrong]
