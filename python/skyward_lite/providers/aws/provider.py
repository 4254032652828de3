"""`AWS()`: EC2 instances of this run's own, and never a forgotten one.

The rooms, each using those below it:

provider.py       what a pool calls: start, replace, retire, stop, cost
launch.py         offers → security group → RunInstances           everything is tagged from its first moment
instance.py       address → host key → a host key of its own → environment
run.py            the expiry, moved on while this process lives; TerminateInstances → terminated → security group
catalog.py, settings.py, termination.py, tags.py, boot.py, api.py
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from ... import keywords
from ..._signals import held
from .. import Cost, Machine, NodeRequest, Provider
from .catalog import Allocation
from .instance import Instance
from .launch import Launcher
from .settings import Settings, instance_types
from .termination import TERMINATION_SECONDS


@keywords.explained("AWS")
class AWS(Provider):
    """EC2 instances, launched for the pool and terminated with it. Needs boto3: `pip install 'skyward_lite[aws]'`.

    Credentials are found by boto3's own chain. `pool(vcpus=, memory_gb=)` say what each node must have (2 vCPUs by
    default): the cheapest types that fit are launched, in whichever zones have them.

    Parameters
    ----------
    region : str, optional
        The region; None, the default, for the one that boto3 finds.
    instance_type : str or sequence of str, optional
        One type or several, instead of the cheapest that fit.
    ami : str, optional
        The image: "ami-…", the name of a public parameter, "al2023" (the default: Amazon Linux 2023), "ubuntu-22.04",
        "ubuntu-24.04" or "ubuntu-26.04".
    allocation : {"spot-if-available", "spot", "on-demand"}, default "spot-if-available"
        The default falls back to on-demand where spot has no capacity.
    subnet : str, optional
        Where to launch, instead of the default VPC's subnets.
    security_group : str, optional
        One that lets SSH through, instead of one made for the run.
    iam_profile : str, optional
        An instance profile, by name or ARN, for the nodes; none by default.
    ssh_from : str, optional
        The addresses that may reach SSH, as CIDR; None, the default, for this machine's public address.
    ttl : float, default 14400
        Seconds after which an instance ends itself in any case. While this process lives, they begin anew.
    orphan_timeout : float, default 600
        Seconds after which an instance ends itself that has no agent any more. Without a sign of life from this process
        an agent ends after `pool(lease=)`.
    tags : mapping of str to str, optional
        Tags on everything that is made.
    max_hourly_cost : float, optional
        Dollars per hour for all instances together, at the prices of the launch (without volumes, addresses and
        traffic). An instance that would cost more is not launched.
    architecture : {"x86_64", "arm64"}, optional
        None, the default, for that of the named types, or of this machine.
    disk_gb : int, default 16
        GB of the root volume, which is encrypted.
    boot_timeout : float, default 300
        Seconds for an instance to let us in. After them the instance is ended, and replaced if another instance of the
        pool did let us in.

    Raises
    ------
    TypeError, ValueError
        If a value is of a wrong type or out of range; the text names the parameter. Nothing is asked of AWS before the
        pool is entered.

    Examples
    --------
    >>> provider = sky.AWS("eu-west-1", max_hourly_cost=2.5)
    >>> with sky.pool(provider, nodes=(2, 10), vcpus=4):  # doctest: +SKIP
    ...     results = Parallel(n_jobs=-1)(delayed(abs)(i) for i in range(100))
    """

    outlives_client = True
    leave = TERMINATION_SECONDS

    def __init__(
        self,
        region: str | None = None,
        instance_type: str | Sequence[str] | None = None,
        ami: str | None = None,
        allocation: Allocation = "spot-if-available",
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
        self.settings = Settings(
            region=region,
            instance_types=instance_types(instance_type),
            ami=ami,
            allocation=allocation,
            subnet=subnet,
            security_group=security_group,
            iam_profile=iam_profile,
            ssh_from=ssh_from,
            ttl=ttl,
            orphan_timeout=orphan_timeout,
            tags={} if tags is None else tags,
            max_hourly_cost=max_hourly_cost,
            architecture=architecture,
            disk_gb=disk_gb,
            boot_timeout=boot_timeout,
        )

    def __repr__(self) -> str:
        return f"AWS(region={self.settings.region!r})"

    def start(self, wanted: NodeRequest, machines: list[Machine]) -> None:
        launcher = Launcher(self.settings, wanted)
        try:
            launcher.plan()
            launcher.launch(wanted.nodes, wanted.least, machines)
        except BaseException:
            # A Ctrl-C may have ended the launch. A second one must not interrupt the cleaning up.
            with held():
                launcher.run.end(time.monotonic() + self.leave)
            raise

    def replace(self, machine: Machine, machines: list[Machine]) -> None:
        assert isinstance(machine, Instance)
        machine.launched.leaving = True
        machine.launch_another(machines)

    def retire(self, machine: Machine) -> None:
        assert isinstance(machine, Instance)
        machine.run.end_one(machine.launched)

    def stop(self, machines: list[Machine], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        runs = {machine.run.id: machine.run for machine in machines if isinstance(machine, Instance)}
        for run in runs.values():
            run.end(deadline)

    def cost(self, machines: list[Machine]) -> Cost | None:
        instances = [machine.launched for machine in machines if isinstance(machine, Instance)]
        if any(launched.offer.price is None for launched in instances):
            return None
        return Cost(
            sum(launched.offer.price or 0.0 for launched in instances if launched.ended is None),
            sum((launched.offer.price or 0.0) * launched.hours() for launched in instances),
        )
