"""`python -m skyward_lite reap`: end what EC2 still has of runs that are over.

Everything that `sky.AWS()` makes says in its tags whose it is and until when. What has expired, or belongs to a process
of this machine that has ended, is ended here; what lives is left alone. Where the tags leave it open whether a run is
over, its things are listed, with the command that ends them.

find → judge → end         what there is; what of it is over, which the tags alone decide; its end
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from .. import _core
from ..errors import NodeStartError
from ..providers.aws.api import AWSError, Clients
from ..providers.aws.settings import MAX_TTL_SECONDS
from ..providers.aws.tags import EXPIRES, OWNER, PROCESS, RUN, client_fate
from ..providers.aws.termination import TERMINATION_SECONDS, delete_group, terminate

LIVING = ["pending", "running", "stopping", "stopped", "shutting-down"]
CLOCKS = datetime.timedelta(minutes=10)
"""By how much the clocks of a client and of this machine may differ: AWS refuses calls whose time is 5 minutes off."""
LATEST = datetime.timedelta(seconds=MAX_TTL_SECONDS) + CLOCKS
"""How far off an expiry can be."""
FEW = 5
"""Names that are listed of what a person is to look at."""
LEAST_ID = 6
"""Characters of a run's id that name it."""


@dataclasses.dataclass(frozen=True)
class Thing:
    """Something that a region has, and its tags, which anybody who may tag resources can have written."""

    kind: str
    name: str
    tags: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a thing is over, as far as its tags say it, and why."""

    state: Literal["over", "lives", "unclear"]
    why: str = ""


def find(clients: Clients, failed: list[str]) -> dict[str, list[Thing]]:
    """List what the region has of any run, by the run's id; `failed` gets what could not be listed.

    Raises `NodeStartError` if its instances cannot be listed.
    """
    ours = {"Name": "tag-key", "Values": [RUN]}
    # Volumes and interfaces go with their instances; one that does not is left over.
    listings = [
        ("instance", "describe_instances", "Reservations", "InstanceId", "instance-state-name", LIVING),
        ("security group", "describe_security_groups", "SecurityGroups", "GroupId", "", []),
        ("volume", "describe_volumes", "Volumes", "VolumeId", "status", ["available"]),
        (
            *("network interface", "describe_network_interfaces", "NetworkInterfaces", "NetworkInterfaceId"),
            *("status", ["available"]),
        ),
        (
            *("spot request", "describe_spot_instance_requests", "SpotInstanceRequests", "SpotInstanceRequestId"),
            *("state", ["open"]),
        ),
    ]
    runs: dict[str, list[Thing]] = {}
    for kind, operation, key, name, state, values in listings:
        filters = [ours, *([{"Name": state, "Values": values}] if state else [])]
        try:
            found = clients.pages(operation, key, Filters=filters)
        except NodeStartError as error:
            if kind == "instance":
                raise
            failed.append(str(error))
            continue
        if kind == "instance":
            found = [instance for reservation in found for instance in reservation["Instances"]]
        for item in found:
            tags = read_tags(item.get("TagSet") or item.get("Tags") or ())
            if RUN in tags:
                runs.setdefault(tags[RUN], []).append(Thing(kind, item[name], tags))
    return runs


def read_tags(listed: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return the tags that AWS lists. One that has two values has neither: both together say nothing to us."""
    tags: dict[str, str] = {}
    for tag in listed:
        key, value = tag.get("Key", ""), tag.get("Value", "")
        tags[key] = value if tags.get(key, value) == value else f"{tags[key]}, {value}"
    return tags


def judge(things: Sequence[Thing], now: datetime.datetime, fate: Callable[[str], str] = client_fate) -> list[Verdict]:
    """Return what the tags of a run's things say of each.

    The latest expiry counts for all: one call moves it on, and may not have come to its end.
    """
    expiries = [_expiry(thing.tags, now) for thing in things]
    latest = max((expires for expires in expiries if isinstance(expires, datetime.datetime)), default=now)
    expired = f"expired at {latest.isoformat(timespec='seconds')}"
    clients = {thing.tags[PROCESS] for thing in things if thing.tags.get(PROCESS)}
    fates = {fate(client) for client in clients}
    # Tags that contradict one another do not say that a client is gone.
    gone = clients if len(clients) == 1 and fates == {"gone"} else set()
    verdicts = []
    for thing, expires in zip(things, expiries, strict=True):
        if thing.tags.get(PROCESS) in gone:
            verdicts.append(Verdict("over", "its client, a process of this machine, has ended"))
        elif isinstance(expires, str):
            verdicts.append(Verdict("unclear", expires))
        elif now > latest + CLOCKS and "lives" in fates:
            # After a sleep of this machine, say, before the client has moved the expiry on.
            verdicts.append(Verdict("unclear", f"{expired}, but its client, a process of this machine, has not ended"))
        elif now > latest + CLOCKS:
            verdicts.append(Verdict("over", expired))
        else:
            verdicts.append(Verdict("lives"))
    stay = [t.name for t, v in zip(things, verdicts, strict=True) if t.kind == "instance" and v.state != "over"]
    return [
        # A group cannot be removed before its instances, and would be waited for.
        Verdict("unclear", f"{', '.join(stay[:FEW])} may use it")
        if stay and thing.kind == "security group" and verdict.state == "over"
        else verdict
        for thing, verdict in zip(things, verdicts, strict=True)
    ]


def _expiry(tags: Mapping[str, str], now: datetime.datetime) -> datetime.datetime | str:
    """Read when a thing expires; a sentence that says why that is unknown."""
    if EXPIRES not in tags:
        return "it has no expiry"
    shown = repr(_core.printable(tags[EXPIRES], 256, lines=False))
    try:
        expires = datetime.datetime.fromisoformat(tags[EXPIRES])
    except ValueError:
        expires = None
    # Python reads more than what a run writes.
    if expires is None or not (tags[EXPIRES].isascii() and tags[EXPIRES].isprintable()):
        return f"its expiry, {shown}, cannot be read"
    if expires.tzinfo is None:
        return f"its expiry, {shown}, has no time zone"
    if expires - now > LATEST:
        return f"its expiry, {shown}, is later than that of any run can be"
    return expires


def end(clients: Clients, things: Sequence[Thing], deadline: float) -> None:
    """End these things of a run. Raises `NodeStartError` for what could not be."""

    def names(kind: str) -> list[str]:
        return [thing.name for thing in things if thing.kind == kind]

    try:
        # Before the instances, of which a request could launch another one.
        if names("spot request"):
            clients.call("cancel_spot_instance_requests", SpotInstanceRequestIds=names("spot request"))
    finally:
        # Also if requests cannot be cancelled: instances cost most.
        if names("instance"):
            terminate(clients, names("instance"), [], deadline)
    removals: list[tuple[str, str, str]] = [
        ("network interface", "delete_network_interface", "NetworkInterfaceId"),
        ("volume", "delete_volume", "VolumeId"),
    ]
    for kind, operation, parameter in removals:
        for name in names(kind):
            gone: dict[str, Any] = {parameter: name}
            try:
                clients.call(operation, **gone)
            except AWSError as error:
                if not error.code.endswith(".NotFound"):
                    raise
    for group in names("security group"):
        delete_group(clients, group, deadline)


def reap(regions: list[str | None], *, dry_run: bool, only: str | None = None) -> int:
    """List the runs of the regions, and end those that are over: 0 if nothing is left but what lives, else 1.

    `only` is a run's id or its beginning: all of that run is ended, whatever its tags say, and nothing else.
    """
    status, named = 0, False
    for region in regions:
        failed: list[str] = []
        try:
            clients = Clients(region)
            runs = find(clients, failed)
        except NodeStartError as error:
            print(f"{region or 'the default region'}: {error}", file=sys.stderr)
            status = 1
            continue
        for why in failed:
            print(f"{clients.region}: {why}", file=sys.stderr)
            status = 1
        if not runs:
            print(f"{clients.region}: nothing of skyward_lite's")
        if only is not None:
            matching = [run for run in runs if run == only] or [run for run in runs if run.startswith(only)]
            if len(matching) > 1:
                several = ", ".join(_shown(run) for run in sorted(matching)[:FEW])
                print(f"{clients.region}: --run {only} may mean {several}: give more of the id", file=sys.stderr)
            named |= bool(matching)
            status |= len(matching) > 1
            runs = {run: runs[run] for run in matching} if len(matching) == 1 else {}
        for run, things in sorted(runs.items()):
            status |= _reap_run(clients, run, things, dry_run=dry_run, asked_for=only is not None)
    if only is not None and not named:
        print(f"there is no run whose id begins with {only}", file=sys.stderr)
        status = 1
    return status


def _reap_run(clients: Clients, run: str, things: Sequence[Thing], *, dry_run: bool, asked_for: bool) -> int:
    """List one run, and end what is over of it: 0 if nothing is left but what lives, else 1."""
    verdicts = (
        [Verdict("over", "asked for")] * len(things)
        if asked_for
        else judge(things, datetime.datetime.now(datetime.UTC))
    )
    status = 0
    over: list[Thing] = []
    for verdict, some in _by_verdict(things, verdicts):
        owners = sorted({thing.tags[OWNER] for thing in some if thing.tags.get(OWNER)}) or ["?"]
        about = f"{clients.region}: run {_shown(run)} of {_shown(', '.join(owners))}: {_count(some)}"
        if verdict.state == "over":
            over += some
            print(f"{about}: {verdict.why}", flush=True)
        elif verdict.state == "lives":
            print(f"{about}: lives, and is left alone", flush=True)
        else:
            names = ", ".join(thing.name for thing in some[:FEW]) + (", …" if len(some) > FEW else "")
            command = _command(clients.region, run, some)
            print(f"{about}: {verdict.why}: it may live, and is left alone ({names}); {command}", flush=True)
            status = 1
    if over and not dry_run:
        try:
            end(clients, over, time.monotonic() + TERMINATION_SECONDS)
            print(f"{clients.region}: run {_shown(run)}: ended")
        except NodeStartError as error:
            print(f"{clients.region}: run {_shown(run)}: {error}", file=sys.stderr)
            status = 1
    return status


def _by_verdict(things: Sequence[Thing], verdicts: Sequence[Verdict]) -> Iterator[tuple[Verdict, list[Thing]]]:
    pairs = sorted(zip(verdicts, things, strict=True), key=lambda pair: (pair[0].state, pair[0].why))
    for verdict, some in itertools.groupby(pairs, key=lambda pair: pair[0]):
        yield verdict, [thing for _, thing in some]


def _count(things: Sequence[Thing]) -> str:
    kinds = [thing.kind for thing in things]
    numbers = {kind: kinds.count(kind) for kind in kinds}
    return ", ".join(f"{number} {kind}{'s' * (number > 1)}" for kind, number in numbers.items())


def _command(region: str, run: str, things: Sequence[Thing]) -> str:
    """Return what ends things of which it is unknown whether they live."""
    if len(run) >= LEAST_ID and re.fullmatch(r"\w[\w.-]*", run, re.ASCII):
        return f"`python -m skyward_lite reap --region {region} --run {run}` ends all of this run"
    instances = [thing.name for thing in things if thing.kind == "instance"]
    if instances:
        ends = "ends it" if len(instances) == 1 else "ends them"
        return f"`aws ec2 terminate-instances --region {region} --instance-ids {' '.join(instances)}` {ends}"
    return "its run's id cannot be typed: remove it with AWS's own tools"


def _shown(tag: str) -> str:
    return _core.printable(tag, 256, lines=False)
