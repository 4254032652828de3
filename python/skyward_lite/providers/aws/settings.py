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

TEXTS = {
    "region": '"eu-west-1"',
    "ami": '"ubuntu-24.04"',
    "subnet": '"subnet-0123456789abcdef0"',
    "security_group": '"sg-0123456789abcdef0"',
    "iam_profile": '"my-profile"',
    "ssh_from": '"203.0.113.7/32"',
    "architecture": '"arm64"',
}
"""The parameters that are texts, and an example of each."""


def instance_types(value: object) -> tuple[str, ...]:
    """Return `AWS(instance_type=)` as a tuple, empty for None. Raise `TypeError` or `ValueError`."""
    if value is None:
        return ()
    example = '["c7i.large", "c7a.large"]'
    alone = isinstance(value, str)
    types = (value,) if alone else checks.texts("AWS", "instance_type", value, example)
    for kind in types:
        checks.text("AWS", "instance_type", kind, '"c7i.large"')
    return tuple(map(str, types))


def _checked_tags(value: object) -> dict[str, str]:
    """Return `AWS(tags=)` as a dict. Raise `TypeError` or `ValueError`."""
    example = '{"team": "lab"}'
    tags = checks.pairs("AWS", "tags", value, example)
    checked = {}
    for key, text in tags.items():
        if not isinstance(text, str):
            raise TypeError(
                f"AWS(tags={{{key!r}: {checks.shown(text)}}}): the value of a tag is a text, as in {example}"
            )
        checked[key] = text
    reserved = [key for key in checked if key.startswith((PREFIX, "aws:"))]
    if reserved:
        raise ValueError(f"AWS(tags=...): {', '.join(reserved)}: names that begin so are AWS's or ours: choose others")
    return checked


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
        for name, example in TEXTS.items():
            value = getattr(self, name)
            if value is not None:
                checks.text("AWS", name, value, example)
        object.__setattr__(self, "tags", _checked_tags(self.tags))
        if self.allocation not in get_args(Allocation):
            raise ValueError(
                f"AWS(allocation={checks.shown(self.allocation)}): one of {', '.join(get_args(Allocation))}"
            )
        if self.architecture not in (None, "x86_64", "arm64"):
            raise ValueError(f'AWS(architecture={self.architecture!r}): "x86_64", "arm64" or None')
        ami = self.ami
        if ami is not None and not ami.startswith(("ami-", "/")) and ami not in IMAGES:
            raise ValueError(f'AWS(ami={ami!r}): "ami-…", the path of a parameter, or one of {", ".join(IMAGES)}')
        if self.ssh_from is not None:
            try:
                ipaddress.ip_network(self.ssh_from)
            except ValueError as error:
                # Host bits that are set, say: the error's text says it.
                raise ValueError(
                    f"AWS(ssh_from={checks.shown(self.ssh_from)}): the addresses that may reach SSH, as in "
                    f'ssh_from="203.0.113.7/32" ({error})'
                ) from None
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
