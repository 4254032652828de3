"""`skyward reap`: end what EC2 still has of runs that are over.

Everything that `sky.AWS()` makes has tags: whose it is, and until when. `reap` ends what has expired, and what belongs
to a process of this machine that has ended; what lives is left alone. Where the tags leave open whether a run is over,
its resources are listed, with the command that ends them.

find → judge → end         the resources of each run; which of them are over, by their tags alone; their end
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

LIVING_STATES = ["pending", "running", "stopping", "stopped", "shutting-down"]
"""States of instances that are not terminated."""
MAX_CLOCK_DIFFERENCE = datetime.timedelta(minutes=10)
"""Between a client's clock and this machine's: AWS refuses calls of a clock that is wrong by more than 5 minutes."""
MAX_TIME_TO_EXPIRY = datetime.timedelta(seconds=MAX_TTL_SECONDS) + MAX_CLOCK_DIFFERENCE
"""No run writes an expiry that is later than this, counted from now."""
MAX_LISTED_NAMES = 5
"""Names that one line lists; a person looks up the rest."""
LEAST_ID = 6
"""Characters of a run's id that name the run, at least."""


@dataclasses.dataclass(frozen=True)
class Resource:
    """A resource of a region, and its tags. Anybody who may tag resources can have written any text into them."""

    kind: str
    name: str
    tags: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a resource is over, and why: "over" and "lives" are certain, and "unclear" is left to the user."""

    state: Literal["over", "lives", "unclear"]
    why: str = ""


def find(clients: Clients, failed: list[str]) -> dict[str, list[Resource]]:
    """Return the region's resources by their run's id. Append to `failed` why a kind of resource could not be listed.

    Raises `NodeStartError` if the instances cannot be listed.
    """
    with_run = {"Name": "tag-key", "Values": [RUN]}
    # Volumes and network interfaces end with their instance. One that is "available" has outlived it.
    listings = [
        ("instance", "describe_instances", "Reservations", "InstanceId", "instance-state-name", LIVING_STATES),
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
    runs: dict[str, list[Resource]] = {}
    for kind, operation, key, name, state, values in listings:
        filters = [with_run, *([{"Name": state, "Values": values}] if state else [])]
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
                runs.setdefault(tags[RUN], []).append(Resource(kind, item[name], tags))
    return runs


def read_tags(listed: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return the tags that AWS lists. If a tag is listed with two values, its value is both, which no check accepts."""
    tags: dict[str, str] = {}
    for tag in listed:
        key, value = tag.get("Key", ""), tag.get("Value", "")
        tags[key] = value if tags.get(key, value) == value else f"{tags[key]}, {value}"
    return tags


def judge(
    resources: Sequence[Resource], now: datetime.datetime, fate: Callable[[str], str] = client_fate
) -> list[Verdict]:
    """Return a verdict on each of a run's resources, by their tags. `fate` tells what became of a tag's process.

    The latest expiry of the run counts for all its resources: a client moves all of them on at once, and may be
    interrupted in between.
    """
    expiries = [_expiry(resource.tags, now) for resource in resources]
    latest = max((expires for expires in expiries if isinstance(expires, datetime.datetime)), default=now)
    expired = f"expired at {latest.isoformat(timespec='seconds')}"
    clients = {resource.tags[PROCESS] for resource in resources if resource.tags.get(PROCESS)}
    fates = {fate(client) for client in clients}
    # A run has one client. Where the tags name several, none of them is trusted to have been the client.
    gone = clients if len(clients) == 1 and fates == {"gone"} else set()
    verdicts = []
    for resource, expires in zip(resources, expiries, strict=True):
        if resource.tags.get(PROCESS) in gone:
            verdicts.append(Verdict("over", "its client, a process of this machine, has ended"))
        elif isinstance(expires, str):
            verdicts.append(Verdict("unclear", expires))
        elif now > latest + MAX_CLOCK_DIFFERENCE and "lives" in fates:
            # The client has not moved the expiry on in time, for example because this machine was asleep.
            verdicts.append(Verdict("unclear", f"{expired}, but its client, a process of this machine, has not ended"))
        elif now > latest + MAX_CLOCK_DIFFERENCE:
            verdicts.append(Verdict("over", expired))
        else:
            verdicts.append(Verdict("lives"))
    return _spare_used_groups(resources, verdicts)


def _spare_used_groups(resources: Sequence[Resource], verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts; "unclear" for a group that an instance may use, because deleting it would wait for that."""
    pairs = list(zip(resources, verdicts, strict=True))
    staying = [resource.name for resource, verdict in pairs if resource.kind == "instance" and verdict.state != "over"]
    return [
        Verdict("unclear", f"{', '.join(staying[:MAX_LISTED_NAMES])} may use it")
        if staying and resource.kind == "security group" and verdict.state == "over"
        else verdict
        for resource, verdict in pairs
    ]


def _expiry(tags: Mapping[str, str], now: datetime.datetime) -> datetime.datetime | str:
    """Return when a resource expires, or a sentence that says why its expiry is unknown."""
    if EXPIRES not in tags:
        return "it has no expiry"
    shown = repr(_core.printable(tags[EXPIRES], 256, lines=False))
    try:
        expires = datetime.datetime.fromisoformat(tags[EXPIRES])
    except ValueError:
        expires = None
    # `fromisoformat` also accepts texts that no run writes.
    if expires is None or not (tags[EXPIRES].isascii() and tags[EXPIRES].isprintable()):
        return f"its expiry, {shown}, cannot be read"
    if expires.tzinfo is None:
        return f"its expiry, {shown}, has no time zone"
    if expires - now > MAX_TIME_TO_EXPIRY:
        return f"its expiry, {shown}, is later than that of any run can be"
    return expires


def end(clients: Clients, resources: Sequence[Resource], deadline: float) -> None:
    """End these resources of one run. Raises `NodeStartError` if one cannot be ended."""

    def names(kind: str) -> list[str]:
        return [resource.name for resource in resources if resource.kind == kind]

    try:
        # Before the instances: an open request could launch another one.
        if names("spot request"):
            clients.call("cancel_spot_instance_requests", SpotInstanceRequestIds=names("spot request"))
    finally:
        # Also if the requests cannot be cancelled, because instances cost most.
        if names("instance"):
            terminate(clients, names("instance"), [], deadline)
    removals: list[tuple[str, str, str]] = [
        ("network interface", "delete_network_interface", "NetworkInterfaceId"),
        ("volume", "delete_volume", "VolumeId"),
    ]
    for kind, operation, parameter in removals:
        for name in names(kind):
            parameters: dict[str, Any] = {parameter: name}
            try:
                clients.call(operation, **parameters)
            except AWSError as error:
                if not error.code.endswith(".NotFound"):
                    raise
    for group in names("security group"):
        delete_group(clients, group, deadline)


def reap(regions: list[str | None], *, dry_run: bool, only: str | None = None) -> int:
    """List the runs of the regions, and end those that are over. Return 0 if only living runs are left, else 1.

    `only` is a run's id or its beginning: that run alone is ended, whatever its tags say.
    """
    status, is_found = 0, False
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
                several = ", ".join(_shown(run) for run in sorted(matching)[:MAX_LISTED_NAMES])
                print(f"{clients.region}: --run {only} may mean {several}: give more of the id", file=sys.stderr)
            is_found |= bool(matching)
            status |= len(matching) > 1
            runs = {run: runs[run] for run in matching} if len(matching) == 1 else {}
        for run, resources in sorted(runs.items()):
            status |= _reap_run(clients, run, resources, dry_run=dry_run, is_named=only is not None)
    if only is not None and not is_found:
        print(f"there is no run whose id begins with {only}", file=sys.stderr)
        status = 1
    return status


def _reap_run(clients: Clients, run: str, resources: Sequence[Resource], *, dry_run: bool, is_named: bool) -> int:
    """List one run, and end what is over of it: 0 if only living resources are left, else 1."""
    verdicts = (
        [Verdict("over", "asked for")] * len(resources)
        if is_named
        else judge(resources, datetime.datetime.now(datetime.UTC))
    )
    status = 0
    over: list[Resource] = []
    for verdict, group in _by_verdict(resources, verdicts):
        owners = sorted({resource.tags[OWNER] for resource in group if resource.tags.get(OWNER)}) or ["?"]
        about = f"{clients.region}: run {_shown(run)} of {_shown(', '.join(owners))}: {_count(group)}"
        if verdict.state == "over":
            over += group
            print(f"{about}: {verdict.why}", flush=True)
        elif verdict.state == "lives":
            print(f"{about}: lives, and is left alone", flush=True)
        else:
            names = ", ".join(resource.name for resource in group[:MAX_LISTED_NAMES])
            more = ", …" if len(group) > MAX_LISTED_NAMES else ""
            command = _command(clients.region, run, group)
            print(f"{about}: {verdict.why}: it may live, and is left alone ({names}{more}); {command}", flush=True)
            status = 1
    if over and not dry_run:
        try:
            end(clients, over, time.monotonic() + TERMINATION_SECONDS)
            print(f"{clients.region}: run {_shown(run)}: ended")
        except NodeStartError as error:
            print(f"{clients.region}: run {_shown(run)}: {error}", file=sys.stderr)
            status = 1
    return status


def _by_verdict(resources: Sequence[Resource], verdicts: Sequence[Verdict]) -> Iterator[tuple[Verdict, list[Resource]]]:
    pairs = sorted(zip(verdicts, resources, strict=True), key=lambda pair: (pair[0].state, pair[0].why))
    for verdict, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        yield verdict, [resource for _, resource in group]


def _count(resources: Sequence[Resource]) -> str:
    kinds = [resource.kind for resource in resources]
    numbers = {kind: kinds.count(kind) for kind in kinds}
    return ", ".join(f"{number} {kind}{'s' * (number > 1)}" for kind, number in numbers.items())


def _command(region: str, run: str, resources: Sequence[Resource]) -> str:
    """Return a sentence with the command that ends resources which may live."""
    if len(run) >= LEAST_ID and re.fullmatch(r"\w[\w.-]*", run, re.ASCII):
        return f"`python -m skyward_lite reap --region {region} --run {run}` ends all of this run"
    instances = [resource.name for resource in resources if resource.kind == "instance"]
    if instances:
        ends = "ends it" if len(instances) == 1 else "ends them"
        return f"`aws ec2 terminate-instances --region {region} --instance-ids {' '.join(instances)}` {ends}"
    return "its run's id cannot be typed: remove it with AWS's own tools"


def _shown(tag: str) -> str:
    return _core.printable(tag, 256, lines=False)
