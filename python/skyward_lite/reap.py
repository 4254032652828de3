"""`python -m skyward_lite reap`: end what EC2 still has of runs that are over.

Everything that `sky.AWS()` makes says in its tags whose it is and until when. What has expired, or belongs to a process
of this machine that has ended, is ended here; what lives is left alone.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
from collections.abc import Iterable
from typing import Any

from .errors import NodeStartError
from .providers import ec2, owner
from .providers.ending import remove_group, terminate
from .providers.run import EXPIRES, OWNER, PROCESS, RUN

SECONDS = 300.0
"""Bound on ending everything in a region."""
LIVING = ["pending", "running", "stopping", "stopped", "shutting-down"]


@dataclasses.dataclass
class Run:
    """What a region has of one run."""

    id: str
    owner: str = "?"
    process: str = ""
    expires: datetime.datetime | None = None
    found: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def verdict(self, now: datetime.datetime) -> str:
        """Say why it is to be ended; empty if it lives."""
        if self.expires is not None and now > self.expires:
            return f"expired at {self.expires.isoformat(timespec='seconds')}"
        if owner.is_gone(self.process):
            return "its client, a process of this machine, has ended"
        if self.expires is None:
            return "it has no expiry"
        return ""


def find(clients: ec2.Clients) -> list[Run]:
    """List what the region has of any run."""
    runs: dict[str, Run] = {}
    ours = {"Name": "tag-key", "Values": [RUN]}

    def note(kind: str, name: str, tags: Iterable[dict[str, str]]) -> None:
        said = {tag["Key"]: tag["Value"] for tag in tags}
        run = runs.setdefault(said[RUN], Run(said[RUN]))
        run.owner, run.process = said.get(OWNER, run.owner), said.get(PROCESS, run.process)
        try:
            expires = datetime.datetime.fromisoformat(said[EXPIRES])
            # The latest counts: one call moves it on for all, and may not have come to its end.
            run.expires = max(filter(None, [run.expires, expires]))
        except (KeyError, ValueError, TypeError):
            pass
        run.found.setdefault(kind, []).append(name)

    states = {"Name": "instance-state-name", "Values": LIVING}
    for reservation in clients.pages("describe_instances", "Reservations", Filters=[ours, states]):
        for instance in reservation["Instances"]:
            note("instance", instance["InstanceId"], instance["Tags"])
    for group in clients.pages("describe_security_groups", "SecurityGroups", Filters=[ours]):
        note("security group", group["GroupId"], group["Tags"])
    # They go with their instances; one that does not is left over.
    idle = {"Name": "status", "Values": ["available"]}
    for volume in clients.pages("describe_volumes", "Volumes", Filters=[ours, idle]):
        note("volume", volume["VolumeId"], volume["Tags"])
    for interface in clients.pages("describe_network_interfaces", "NetworkInterfaces", Filters=[ours, idle]):
        note("network interface", interface["NetworkInterfaceId"], interface["TagSet"])
    waiting = {"Name": "state", "Values": ["open"]}
    for request in clients.pages("describe_spot_instance_requests", "SpotInstanceRequests", Filters=[ours, waiting]):
        note("spot request", request["SpotInstanceRequestId"], request["Tags"])
    return list(runs.values())


def end(clients: ec2.Clients, run: Run, deadline: float) -> None:
    """End everything that was found of a run. Raises `NodeStartError` for what could not be."""
    if run.found.get("spot request"):
        clients.call("cancel_spot_instance_requests", SpotInstanceRequestIds=run.found["spot request"])
    if run.found.get("instance"):
        terminate(clients, run.found["instance"], [], deadline)
    removals: list[tuple[str, str, str]] = [
        ("network interface", "delete_network_interface", "NetworkInterfaceId"),
        ("volume", "delete_volume", "VolumeId"),
    ]
    for kind, operation, parameter in removals:
        for name in run.found.get(kind, []):
            gone: dict[str, Any] = {parameter: name}
            try:
                clients.call(operation, **gone)
            except ec2.AWSError as error:
                if not error.code.endswith(".NotFound"):
                    raise
    for group in run.found.get("security group", []):
        remove_group(clients, group, deadline)


def reap(regions: list[str | None], *, dry_run: bool, only: str | None = None) -> int:
    """List the runs of the regions, and end those that are over: 0 if nothing is left of these, else 1.

    `only` is the beginning of a run's id: that run is ended, also if it lives.
    """
    status = 0
    for region in regions:
        try:
            clients = ec2.Clients(region)
            runs = find(clients)
        except NodeStartError as error:
            print(f"{region or 'the default region'}: {error}", file=sys.stderr)
            status = 1
            continue
        if not runs:
            print(f"{clients.region}: nothing of skyward_lite's")
        for run in sorted(runs, key=lambda run: run.id):
            why = run.verdict(datetime.datetime.now(datetime.UTC))
            if only is not None:
                why = "asked for" if run.id.startswith(only) else ""
            what = ", ".join(f"{len(names)} {kind}{'s' * (len(names) > 1)}" for kind, names in run.found.items())
            print(
                f"{clients.region}: run {run.id} of {run.owner}: {what}: {why or 'lives, and is left alone'}",
                flush=True,
            )
            if dry_run or not why:
                continue
            try:
                end(clients, run, time.monotonic() + SECONDS)
                print(f"{clients.region}: run {run.id}: ended")
            except NodeStartError as error:
                print(f"{clients.region}: run {run.id}: {error}", file=sys.stderr)
                status = 1
    return status
