"""The sections of the data bench that measure one connection: bulk near and far, and small tasks beside it."""

from __future__ import annotations

import os
from pathlib import Path

from hosts import CIPHER
from rounds import Contest, median, percentile, spread

MB = 10**6
WINDOW_BYTES = 2 << 20
"""What OpenSSH lets be under way on one channel."""


def file_of(contest: Contest, mb: float) -> Path:
    """Return a file of incompressible data, which is in the page cache."""
    path = contest.hosts.lab.directory / "data"
    if not path.exists():
        with path.open("wb") as file:
            left = int(mb * MB)
            while left:
                left -= file.write(os.urandom(min(left, 1 << 24)))
    return path


def rates(contest: Contest, name: str, mb: float, rounds: int, kinds: tuple[str, ...]) -> dict[str, list[float]]:
    """Return the MB/s of each round up and down, by us and by `ssh`, whose time to connect does not count."""
    file = file_of(contest, mb)
    found: dict[str, list[float]] = {}

    def note(what: str, seconds: float, number: int) -> None:
        if number:
            found.setdefault(what, []).append(mb / seconds)

    def by_ssh(command: str, source: Path | None = None) -> float:
        seconds = contest.hosts.ssh(name, command, stdin=source)
        # Little data is sent before the time to connect can be told from the time to send.
        return max(seconds - median(idle), seconds / 10)

    pool = contest.host(name)
    idle = [contest.hosts.ssh(name, "true") for _ in range(min(3, rounds))]
    for number in range(rounds + 1):
        for place, kind in enumerate(kinds):
            # Other data than in any run before: the node has those.
            seed = len(kinds) * number + place
            note(f"up, {kind}", pool.run("up", seed=seed, mb=mb, kind=kind)["all"], number)
        note("ssh up", by_ssh("cat >/dev/null", file), number)
        for kind in kinds:
            pool.run("make", seed=number, mb=mb, kind=kind)
            note(f"down, {kind}", pool.run("down", mb=mb)["all"], number)
        note("ssh down", by_ssh(f"cat {file}"), number)
    return found


def show(found: dict[str, list[float]]) -> None:
    """Print the rates."""
    for way in ("up", "down"):
        ssh = median(found[f"ssh {way}"])
        for name, values in found.items():
            if name.startswith(f"{way},"):
                print(f"  {name:<22}{spread(values, digits=0)} MB/s   {median(values) / ssh:.2f} × ssh")
        print(f"  {f'ssh {way}':<22}{spread(found[f'ssh {way}'], digits=0)} MB/s")


def bulk(contest: Contest) -> None:
    """One large argument and one large result over one `sshd`, against `ssh` and `cat`."""
    sizes = contest.sizes
    rounds = max(1, sizes.rounds // 2)
    print(f"{sizes.bulk:g} MB of incompressible data over one sshd, {CIPHER}; medians of {rounds} interleaved rounds")
    kinds = ("array",) if contest.smoke else ("array", "bytes")
    found = rates(contest, contest.hosts.near(1)[0], sizes.bulk, rounds, kinds)
    show(found)
    for way in ("up", "down"):
        ssh = median(found[f"ssh {way}"])
        for kind in kinds:
            contest.target(f"{way}, {kind}, over ssh", median(found[f"{way}, {kind}"]) / ssh, 0.7, " ×", least=True)


def far(contest: Contest) -> None:
    """The same, far away, where one channel's window bounds the rate."""
    sizes = contest.sizes
    rounds = max(1, sizes.rounds // 3)
    allowed = WINDOW_BYTES / sizes.round_trip / MB
    print(
        f"{sizes.far:g} MB at {sizes.round_trip * 1000:g} ms of round trip; medians of {rounds} interleaved rounds; "
        f"one channel's window allows {allowed:.1f} MB/s"
    )
    found = rates(contest, contest.hosts.far(sizes.round_trip), sizes.far, rounds, ("array",))
    show(found)
    for way in ("up", "down"):
        ratio = median(found[f"{way}, array"]) / allowed
        contest.target(f"{way}, over what one window allows", ratio, 4.0, " ×", least=True)


def small(contest: Contest) -> None:
    """Small tasks, one after the other, while much else is under way on the connection."""
    sizes = contest.sizes
    rounds = max(1, sizes.rounds // 2)
    print(f"Small tasks, one after the other, idle and while {sizes.bulk:g} MB are under way, {rounds} times")
    places = {"sshd": contest.hosts.near(1)[0]}
    if not contest.smoke:
        places[f"{sizes.round_trip * 1000:g} ms"] = contest.hosts.far(sizes.round_trip)
    for place, name in places.items():
        mb = sizes.bulk if place == "sshd" else sizes.far
        pool = contest.host(name)
        pool.run("up", seed=0, mb=mb, kind="array")
        pool.run("make", seed=0, mb=mb, kind="array")
        pool.run("down", mb=mb)
        for number, while_ in enumerate(("nothing", "up", "down")):
            # Other data than in any section before, as all sections of a smoke test share their pools.
            seed = 1000 + number * rounds
            run = pool.run("small", while_=while_, rounds=rounds, seed=seed, mb=mb, idle=sizes.idle)
            times = [value * 1000 for value in run["seconds"]]
            rate = f"; bulk {mb / median(run['bulk']):.0f} MB/s" if run["bulk"] else ""
            print(
                f"  {place:<8}{while_:<9}p50 {percentile(times, 50):.2f} ms, p99 {percentile(times, 99):.2f}, "
                f"worst {max(times):.1f}, of {len(times):,}{rate}",
                flush=True,
            )
            if while_ != "nothing" and place == "sshd":
                contest.target(f"p99 while data go {while_}", percentile(times, 99), 10, " ms")
