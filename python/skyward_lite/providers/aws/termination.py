"""How what EC2 has of us is ended, for a pool that is left and for `reap`: all of it, and seen to be gone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from ...errors import NodeStartError
from . import api as ec2


def terminate(clients: ec2.Clients, living: Sequence[str], ended: Sequence[str], deadline: float) -> None:
    """Terminate the living ones, and wait until they and the others are gone. Raises `NodeStartError` if not in time.

    What was launched a moment ago may not be known yet: it is neither described nor terminated then, and asked again.
    """
    ask(clients, living)
    young = time.monotonic() + ec2.CONSISTENCY_SECONDS
    left: set[str] = set()

    def over() -> bool:
        left.clear()
        left.update(living if time.monotonic() < young else ())
        again = set(left)
        for some in batches([*living, *ended], 200):
            here = [{"Name": "instance-id", "Values": list(some)}]
            for reservation in clients.pages("describe_instances", "Reservations", Filters=here):
                for instance in reservation["Instances"]:
                    name, state = instance["InstanceId"], instance["State"]["Name"]
                    (left.discard if state == "terminated" else left.add)(name)
                    (again.discard if state in ("terminated", "shutting-down") else again.add)(name)
        ask(clients, list(again))
        return not left

    if not ec2.until(over, deadline, ec2.pause(len(living) + len(ended))):
        raise NodeStartError(f"not terminated yet: {', '.join(sorted(left))}")


def ask(clients: ec2.Clients, ids: Sequence[str]) -> None:
    """Ask for the end of instances. What EC2 does not know is passed over: it is gone, or will be known later.

    One that cannot be terminated, as it is protected, makes the call fail for all: the others are asked for alone.
    Raises `NodeStartError` for those that cannot.
    """
    failed = []
    for some in batches(ids, 500):
        try:
            clients.call("terminate_instances", InstanceIds=list(some))
        except ec2.AWSError as error:
            unknown = error.code == "InvalidInstanceID.NotFound"
            if not unknown and (len(some) == 1 or error.transient or error.code in ec2.DENIED | ec2.BAD_CREDENTIALS):
                raise
            for one in some:
                try:
                    clients.call("terminate_instances", InstanceIds=[one])
                except ec2.AWSError as its_own:
                    if its_own.code != "InvalidInstanceID.NotFound":
                        failed.append(f"{one}: {its_own}")
    if failed:
        raise NodeStartError("; ".join(failed))


def remove_group(clients: ec2.Clients, group: str, deadline: float, young: float = 0.0) -> None:
    """Delete a security group, once nothing is in it any more. Until `young` one that is not known may still be so."""

    def gone() -> bool:
        try:
            clients.call("delete_security_group", GroupId=group)
        except ec2.AWSError as error:
            if error.code == "InvalidGroup.NotFound":
                return time.monotonic() > young
            if error.code != "DependencyViolation":
                raise
            return False  # network interfaces go a little after their instances
        return True

    if not ec2.until(gone, deadline):
        raise NodeStartError(f"the security group {group} is still in use")


def batches(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Cut a list to what one call takes."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
