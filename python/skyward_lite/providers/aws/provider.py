"""`AWS()`: EC2 instances of this run's own, and never a forgotten one.

start     offers → security group → RunInstances          tagged from their first moment, each with timers of its own
open      address → host key → its own host key → environment
          Run._renew moves the expiry on while this process lives
stop      TerminateInstances → terminated → security group
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Mapping, Sequence
from typing import get_args

from ... import checks
from ..._signals import held
from .. import Cost, Machine, NodeRequest, Provider
from . import api as ec2
from .instance import Instance
from .run import LEASE_TAGS, Run

MAX_TTL = 30 * 24 * 3600.0
"""Largest `ttl`, `orphan_timeout` and `boot_timeout`, in seconds."""
TERMINATED = 300.0
"""Seconds for which `terminated` is waited for."""
MAX_DISK_GB = 65_536
"""Largest EBS volume there is: 64 TiB."""
MAX_DOLLARS = 1e9
"""Largest `AWS(max_hourly_cost=)`."""


class AWS(Provider):
    """EC2 instances, launched for the pool and terminated with it. Needs boto3: `pip install 'skyward_lite[aws]'`.

    Credentials, and the region unless `region` says it, are found by boto3's own chain. `pool(vcpus=, memory_gb=)` say
    what each node must have, and the cheapest types that fit are launched (2 vCPUs if nothing is said), in whichever
    zones have them; `instance_type` names one, or several.

    `ami`: the image: "ami-…", the name of a public parameter, "al2023" (the default: Amazon Linux 2023),
    "ubuntu-22.04", "ubuntu-24.04" or "ubuntu-26.04". `architecture`: "x86_64" or "arm64"; None for the types', or this
    machine's.
    `allocation`: "spot-if-available" falls back to on-demand where spot has no capacity; "spot"; "on-demand".
    `subnet`: where to launch, instead of the default VPC's subnets. `security_group`: one that lets SSH through,
    instead of one made for the run. `ssh_from`: the addresses that may reach SSH, as CIDR; None for this machine's
    public one.
    `iam_profile`: an instance profile (name or ARN) for the nodes; none by default. `disk_gb`: size of the root
    volume, which is encrypted.
    `ttl`: seconds after which an instance ends itself in any case; moved on while this process lives.
    `orphan_timeout`: seconds without this process after which an instance ends itself.
    `boot_timeout`: seconds for an instance to let us in; it is ended after them, and replaced if another one did.
    `tags`: on everything that is made. `max_hourly_cost`: dollars per hour for all instances together, by the prices of
    the launch (volumes, addresses and traffic are not in them); what would cost more is not launched.
    """

    outlives_client = True
    leave = TERMINATED

    def __init__(
        self,
        region: str | None = None,
        instance_type: str | Sequence[str] | None = None,
        ami: str | None = None,
        allocation: ec2.Allocation = "spot-if-available",
        subnet: str | None = None,
        security_group: str | None = None,
        iam_profile: str | None = None,
        ssh_from: str | None = None,
        ttl: float = 4 * 3600.0,
        orphan_timeout: float = 600.0,
        tags: Mapping[str, str] | None = None,
        max_hourly_cost: float | None = None,
        *,
        architecture: str | None = None,
        disk_gb: int = 16,
        boot_timeout: float = 300.0,
    ) -> None:
        if allocation not in get_args(ec2.Allocation):
            raise ValueError(f"AWS(allocation={allocation!r}): one of {', '.join(get_args(ec2.Allocation))}")
        if architecture not in (None, "x86_64", "arm64"):
            raise ValueError(f'AWS(architecture={architecture!r}): "x86_64", "arm64" or None')
        if ami is not None and not ami.startswith(("ami-", "/")) and ami not in ec2.IMAGES:
            raise ValueError(f'AWS(ami={ami!r}): "ami-…", the path of a parameter, or one of {", ".join(ec2.IMAGES)}')
        if ssh_from is not None:
            ipaddress.ip_network(ssh_from)  # ValueError names it
        reserved = [key for key in tags or {} if key.startswith((LEASE_TAGS, "aws:"))]
        if reserved:
            raise ValueError(f"AWS(tags=...): {', '.join(reserved)}: these names are not yours to set")
        self.region = region
        self.instance_types = [instance_type] if isinstance(instance_type, str) else list(instance_type or ())
        self.ami = ami
        self.allocation: ec2.Allocation = allocation
        self.subnet = subnet
        self.security_group = security_group
        self.iam_profile = iam_profile
        self.ssh_from = ssh_from
        self.ttl = checks.seconds("AWS", "ttl", ttl, least=1, most=MAX_TTL)
        self.orphan_timeout = checks.seconds("AWS", "orphan_timeout", orphan_timeout, least=1, most=MAX_TTL)
        self.tags = dict(tags or {})
        if max_hourly_cost is not None:
            max_hourly_cost = checks.number("AWS", "max_hourly_cost", max_hourly_cost, MAX_DOLLARS, "dollars per hour")
        self.max_hourly_cost = max_hourly_cost
        self.architecture = architecture
        self.disk_gb = checks.whole("AWS", "disk_gb", disk_gb, 1, MAX_DISK_GB)
        self.boot_timeout = checks.seconds("AWS", "boot_timeout", boot_timeout, least=1, most=MAX_TTL)

    def __repr__(self) -> str:
        return f"AWS(region={self.region!r})"

    def start(self, wanted: NodeRequest, machines: list[Machine]) -> None:
        run = Run(self, wanted)
        try:
            run.begin()
            run.launch(wanted.nodes, wanted.least, machines)
        except BaseException:
            # A Ctrl-C more would leave what the first one has begun to end.
            with held():
                run.end(time.monotonic() + self.leave)
            raise

    def replace(self, machine: Machine, machines: list[Machine]) -> None:
        assert isinstance(machine, Instance)
        machine.leaving = True
        machine.run.launch(1, 1, machines)

    def retire(self, machine: Machine) -> None:
        assert isinstance(machine, Instance)
        machine.run.end_one(machine)

    def stop(self, machines: list[Machine], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        ours = [machine for machine in machines if isinstance(machine, Instance)]
        for run in {id(machine.run): machine.run for machine in ours}.values():
            run.end(deadline)

    def cost(self, machines: list[Machine]) -> Cost | None:
        ours = [machine for machine in machines if isinstance(machine, Instance)]
        if any(machine.offer.price is None for machine in ours):
            return None
        return Cost(
            sum(machine.offer.price or 0.0 for machine in ours if machine.ended is None),
            sum((machine.offer.price or 0.0) * machine.hours() for machine in ours),
        )
