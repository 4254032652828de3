"""What `AWS()` takes, checked before anything is asked of AWS."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping
from typing import get_args

from ... import checks
from .catalog import IMAGES, Allocation
from .tags import PREFIX

MAX_TTL_SECONDS = 30 * 24 * 3600.0
"""Largest `ttl`, `orphan_timeout` and `boot_timeout`."""
MAX_DISK_GB = 65_536
"""Size of the largest EBS volume: 64 TiB."""
MAX_HOURLY_DOLLARS = 1e9
"""Largest `max_hourly_cost`."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The parameters of `AWS()`, whose docstring explains them. A provider's settings never change.

    Raises `ValueError` or `TypeError` that names the parameter.
    """

    region: str | None
    """None for the region that boto3 finds."""
    instance_types: tuple[str, ...]
    """Empty if the user named no type."""
    ami: str | None
    allocation: Allocation
    subnet: str | None
    security_group: str | None
    iam_profile: str | None
    ssh_from: str | None
    ttl: float
    orphan_timeout: float
    tags: Mapping[str, str]
    max_hourly_cost: float | None
    architecture: str | None
    disk_gb: int
    boot_timeout: float

    def __post_init__(self) -> None:
        if self.allocation not in get_args(Allocation):
            raise ValueError(f"AWS(allocation={self.allocation!r}): one of {', '.join(get_args(Allocation))}")
        if self.architecture not in (None, "x86_64", "arm64"):
            raise ValueError(f'AWS(architecture={self.architecture!r}): "x86_64", "arm64" or None')
        ami = self.ami
        if ami is not None and not ami.startswith(("ami-", "/")) and ami not in IMAGES:
            raise ValueError(f'AWS(ami={ami!r}): "ami-…", the path of a parameter, or one of {", ".join(IMAGES)}')
        if self.ssh_from is not None:
            ipaddress.ip_network(self.ssh_from)  # its ValueError names the text
        reserved = [key for key in self.tags if key.startswith((PREFIX, "aws:"))]
        if reserved:
            raise ValueError(f"AWS(tags=...): {', '.join(reserved)}: these names are not yours to set")
        limit = self.max_hourly_cost
        checked = {
            "ttl": self._seconds("ttl"),
            "orphan_timeout": self._seconds("orphan_timeout"),
            "max_hourly_cost": None
            if limit is None
            else checks.number("AWS", "max_hourly_cost", limit, MAX_HOURLY_DOLLARS, "dollars per hour"),
            "disk_gb": checks.whole("AWS", "disk_gb", self.disk_gb, 1, MAX_DISK_GB),
            "boot_timeout": self._seconds("boot_timeout"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _seconds(self, name: str) -> float:
        return checks.seconds("AWS", name, getattr(self, name), least=1, most=MAX_TTL_SECONDS)
