"""Terminates instances and deletes security groups, and waits until AWS confirms both.

Used by pools that close, and by `reap`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from ...errors import NodeStartError
from .api import BAD_CREDENTIALS, CONSISTENCY_SECONDS, DENIED, AWSError, Clients, first_pause, wait_until

TERMINATION_SECONDS = 300.0
"""Bound on terminating everything that one run has: what a pool waits for when it closes, and `reap` for each run."""
MAX_DESCRIBED_IDS = 200
"""Instances that one DescribeInstances is asked for."""
MAX_CHANGED_IDS = 500
"""Resources that one TerminateInstances or CreateTags changes."""


def terminate(clients: Clients, living: Sequence[str], ended: Sequence[str], deadline: float) -> None:
    """Terminate the `living` instances, and wait until they and the `ended` ones, asked for earlier, are terminated.

    EC2 may not know an instance yet that was launched a moment ago, and then neither describes nor terminates it: such
    an instance is asked for again. Raises `NodeStartError` if an instance is not terminated by the deadline.
    """
    request_termination(clients, living)
    maybe_invisible_until = time.monotonic() + CONSISTENCY_SECONDS
    left: set[str] = set()

    def all_terminated() -> bool:
        left.clear()
        left.update(living if time.monotonic() < maybe_invisible_until else ())
        not_ending = set(left)
        for ids in batches([*living, *ended], MAX_DESCRIBED_IDS):
            by_id = [{"Name": "instance-id", "Values": list(ids)}]
            for reservation in clients.pages("describe_instances", "Reservations", Filters=by_id):
                for instance in reservation["Instances"]:
                    name, state = instance["InstanceId"], instance["State"]["Name"]
                    (left.discard if state == "terminated" else left.add)(name)
                    (not_ending.discard if state in ("terminated", "shutting-down") else not_ending.add)(name)
        request_termination(clients, list(not_ending))
        return not left

    if not wait_until(all_terminated, deadline, first_pause(len(living) + len(ended))):
        raise NodeStartError(f"not terminated yet: {', '.join(sorted(left))}")


def request_termination(clients: Clients, ids: Sequence[str]) -> None:
    """Ask EC2 to terminate instances. An instance that EC2 does not know is skipped: it is gone, or not known yet.

    A protected instance, which cannot be terminated, makes a call fail for all others in it, too. The instances of such
    a call are therefore asked for one by one. Raises `NodeStartError` that names those that cannot be terminated.
    """
    failed = []
    for batch in batches(ids, MAX_CHANGED_IDS):
        try:
            clients.call("terminate_instances", InstanceIds=list(batch))
        except AWSError as error:
            unknown = error.code == "InvalidInstanceID.NotFound"
            if not unknown and (len(batch) == 1 or error.transient or error.code in DENIED | BAD_CREDENTIALS):
                raise
            for name in batch:
                try:
                    clients.call("terminate_instances", InstanceIds=[name])
                except AWSError as alone:
                    if alone.code != "InvalidInstanceID.NotFound":
                        failed.append(f"{name}: {alone}")
    if failed:
        raise NodeStartError("; ".join(failed))


def delete_group(clients: Clients, group: str, deadline: float, maybe_invisible_until: float = 0.0) -> None:
    """Delete a security group as soon as no network interface uses it, and wait for that.

    Until `maybe_invisible_until`, of `time.monotonic`, EC2 may not know the new group yet: that EC2 does not find it
    counts as its end only later. Raises `NodeStartError` if the group is still used at the deadline.
    """

    def is_deleted() -> bool:
        try:
            clients.call("delete_security_group", GroupId=group)
        except AWSError as error:
            if error.code == "InvalidGroup.NotFound":
                return time.monotonic() > maybe_invisible_until
            if error.code != "DependencyViolation":
                raise
            return False  # network interfaces go a little later than their instances
        return True

    if not wait_until(is_deleted, deadline):
        raise NodeStartError(f"the security group {group} is still in use")


def batches(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Cut a list into pieces of at most `size`, as one call takes."""
    for begin in range(0, len(ids), size):
        yield ids[begin : begin + size]
