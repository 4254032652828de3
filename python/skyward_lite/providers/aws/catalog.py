"""What can be launched: instance types, zones, prices and images.

zones, instance_types → offers     types that fit, in the order in which they are asked for: spot first, cheapest first
image                              the machine image
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import platform
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ...errors import NodeStartError
from .api import Clients, explain, no_default_vpc, translate_errors

log = logging.getLogger("skyward_lite")

Allocation = Literal["spot-if-available", "spot", "on-demand"]

ARCHITECTURE = {"aarch64": "arm64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
"""This machine's architecture, in EC2's spelling."""
MAX_TYPES = 24
"""Instance types whose prices are asked for: the smallest that fit."""
MIN_MEMORY_GB = 2.0
"""Memory without which installing an environment fails; a type that the user names may have less."""
MAX_GB_PER_VCPU = 8
"""Memory that most types have at most for each vCPU, in GiB."""
VCPU_COUNTS = (1, 2, 4, 8, 12, 16, 24, 32, 36, 48, 64, 72, 96, 128, 192, 224, 256, 384, 448, 896)
"""Numbers of vCPUs that instance types have."""
MAX_OFFERS = 60
"""Offers of each market, spot and on-demand, that a launch tries before it fails for lack of capacity."""

UBUNTU = "/aws/service/canonical/ubuntu/server"
IMAGES = {
    "al2023": "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-{arch}",
    "ubuntu-22.04": f"{UBUNTU}/22.04/stable/current/{{debian}}/hvm/ebs-gp2/ami-id",
    "ubuntu-24.04": f"{UBUNTU}/24.04/stable/current/{{debian}}/hvm/ebs-gp3/ami-id",
    "ubuntu-26.04": f"{UBUNTU}/26.04/stable/current/{{debian}}/hvm/ebs-gp3/ami-id",
}
"""Public parameters of AWS's Systems Manager, which always name the newest image."""


@dataclasses.dataclass(frozen=True)
class InstanceType:
    """An instance type of EC2."""

    name: str
    arch: str
    """In EC2's spelling: "x86_64" or "arm64"."""
    vcpus: int
    memory_gb: float


@dataclasses.dataclass(frozen=True)
class Offer:
    """An instance type in a zone, at a price: dollars per hour and instance, None if the price is unknown."""

    instance_type: InstanceType
    zone: str
    subnet: str
    spot: bool
    price: float | None

    def __str__(self) -> str:
        price = "price unknown" if self.price is None else f"${self.price:.4f}/h"
        return f"{self.instance_type.name} in {self.zone}, {'spot' if self.spot else 'on-demand'}, {price}"


@dataclasses.dataclass(frozen=True)
class Zones:
    """Where to launch: the VPC, and one subnet for each zone."""

    vpc: str
    subnets: dict[str, str]


def zones(clients: Clients, subnet: str | None) -> Zones:
    """Return the zone of the subnet that the user named, or the zones of the default subnets."""
    if subnet is not None:
        (found,) = clients.call("describe_subnets", SubnetIds=[subnet])["Subnets"]
        return Zones(found["VpcId"], {found["AvailabilityZone"]: subnet})
    default = clients.pages("describe_subnets", "Subnets", Filters=[{"Name": "default-for-az", "Values": ["true"]}])
    if not default:
        raise NodeStartError(no_default_vpc(clients.region))
    vpc = default[0]["VpcId"]
    return Zones(vpc, {s["AvailabilityZone"]: s["SubnetId"] for s in default if s["VpcId"] == vpc})


def instance_types(
    clients: Clients, named: Sequence[str], arch: str, vcpus: int | None, memory_gb: float | None, *, spot: bool
) -> list[InstanceType]:
    """Return the named instance types, or the smallest ones of an architecture, that have the vCPUs and the memory.

    The smallest come first. Raises `NodeStartError` if none fits.
    """
    if named:
        described = clients.pages("describe_instance_types", "InstanceTypes", InstanceTypes=list(named))
    else:
        described = _describe_small_types(clients, arch, vcpus or 2, memory_gb or 0, spot=spot)
        memory_gb = max(memory_gb or 0, MIN_MEMORY_GB)
    fitting = []
    for item in described:
        archs = [a for a in item["ProcessorInfo"]["SupportedArchitectures"] if a in ("x86_64", "arm64")]
        found = InstanceType(
            item["InstanceType"],
            archs[0] if archs else "none",
            item["VCpuInfo"]["DefaultVCpus"],
            item["MemoryInfo"]["SizeInMiB"] / 1024,
        )
        has_arch = bool(named) or arch in archs
        if found.vcpus >= (vcpus or 0) and found.memory_gb >= (memory_gb or 0) and has_arch:
            fitting.append(found)
    if not fitting:
        wanted = ", ".join(
            f"{n}={v}"
            for n, v in (("instance_type", ", ".join(named)), ("vcpus", vcpus), ("memory_gb", memory_gb))
            if v
        )
        raise NodeStartError(
            f"no instance type in {clients.region} fits: {wanted or 'nothing'}, {'any architecture' if named else arch}"
        )
    fitting.sort(key=lambda found: (found.vcpus, found.memory_gb, found.name))
    return fitting[: None if named else MAX_TYPES]


def _describe_small_types(clients: Clients, arch: str, vcpus: int, memory_gb: float, *, spot: bool) -> list[Any]:
    """Return EC2's descriptions of the types that have this many vCPUs, or a few more if the memory takes more.

    They are of the current generation. Left out are types with an accelerator, which would be paid for and not used,
    and burstable types, because a pool loads whole cores.
    """
    enough = max(vcpus, math.ceil(memory_gb / MAX_GB_PER_VCPU))
    counts = [n for n in VCPU_COUNTS if vcpus <= n < enough] + [n for n in VCPU_COUNTS if n >= enough][:3]
    filters = {
        "current-generation": ["true"],
        "bare-metal": ["false"],
        "burstable-performance-supported": ["false"],
        "processor-info.supported-architecture": [arch],
        "supported-usage-class": ["spot" if spot else "on-demand"],
        "supported-virtualization-type": ["hvm"],
        "vcpu-info.default-vcpus": [str(n) for n in counts],
    }
    described = clients.pages(
        "describe_instance_types",
        "InstanceTypes",
        Filters=[{"Name": name, "Values": values} for name, values in filters.items()],
        PaginationConfig={"PageSize": 100},
    )
    accelerators = (
        *("GpuInfo", "FpgaInfo", "InferenceAcceleratorInfo"),
        *("NeuronInfo", "MediaAcceleratorInfo"),
    )
    return [
        item
        for item in described
        # EC2's own filter for burstable types misses the newest of them.
        if not any(item.get(key) for key in accelerators) and not re.match(r"t\d", item["InstanceType"])
    ]


def spot_prices(clients: Clients, types: Sequence[InstanceType]) -> dict[tuple[str, str], float]:
    """Return the present spot prices: (type, zone) → dollars per hour."""
    found = clients.pages(
        "describe_spot_price_history",
        "SpotPriceHistory",
        InstanceTypes=[t.name for t in types],
        ProductDescriptions=["Linux/UNIX"],
        StartTime=datetime.datetime.now(datetime.UTC),
    )
    newest: dict[tuple[str, str], tuple[Any, float]] = {}
    for item in found:
        place = (item["InstanceType"], item["AvailabilityZone"])
        if place not in newest or item["Timestamp"] > newest[place][0]:
            newest[place] = (item["Timestamp"], float(item["SpotPrice"]))
    return {place: price for place, (_, price) in newest.items()}


def on_demand_prices(clients: Clients, types: Sequence[InstanceType]) -> dict[str, float]:
    """Return the on-demand prices: type → dollars per hour. If the price list fails, log why."""
    fields = {
        "regionCode": clients.region,
        "operatingSystem": "Linux",
        "tenancy": "Shared",
        "preInstalledSw": "NA",
        "capacitystatus": "Used",
    }
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in fields.items()]
    filters.append({"Type": "ANY_OF", "Field": "instanceType", "Value": ",".join(t.name for t in types)})
    prices: dict[str, float] = {}
    try:
        pages = clients.pricing.get_paginator("get_products").paginate(
            ServiceCode="AmazonEC2", FormatVersion="aws_v1", Filters=filters
        )
        for page in pages:
            for text in page["PriceList"]:
                product = json.loads(text)
                for term in product["terms"]["OnDemand"].values():
                    for dimension in term["priceDimensions"].values():
                        price = float(dimension["pricePerUnit"].get("USD", 0))
                        if price > 0:
                            prices[product["product"]["attributes"]["instanceType"]] = price
    except Exception as error:
        log.info("on-demand prices are not known: %s", explain(error, "pricing:GetProducts", "us-east-1"))
    return prices


def offers(clients: Clients, types: Sequence[InstanceType], zones: Zones, allocation: Allocation) -> Iterator[Offer]:
    """Yield the offers in the order in which a launch tries them: spot, if allowed, then on-demand, the cheapest first.

    The prices of a market are asked for when its first offer is taken.
    """
    if allocation != "on-demand":
        by_place = spot_prices(clients, types)
        spot = [Offer(t, z, s, True, by_place.get((t.name, z))) for t in types for z, s in zones.subnets.items()]
        # A zone without a spot price for the type has no spot market for it.
        yield from sorted((offer for offer in spot if offer.price is not None), key=_order)[:MAX_OFFERS]
    if allocation != "spot":
        by_type = on_demand_prices(clients, types)
        on_demand = [Offer(t, z, s, False, by_type.get(t.name)) for t in types for z, s in zones.subnets.items()]
        yield from sorted(on_demand, key=_order)[:MAX_OFFERS]


def _order(offer: Offer) -> tuple[float, int, float, str, str]:
    price = float("inf") if offer.price is None else offer.price
    return price, offer.instance_type.vcpus, offer.instance_type.memory_gb, offer.instance_type.name, offer.zone


def image(clients: Clients, ami: str | None, arch: str) -> tuple[str, str, str]:
    """Return the machine image's id, its root device and its architecture. `arch` chooses among an image's variants."""
    if ami is None or not ami.startswith("ami-"):
        parameter = IMAGES.get(ami or "al2023", ami or "")
        parameter = parameter.format(arch=arch, debian={"x86_64": "amd64"}.get(arch, arch))
        with translate_errors("ssm:GetParameter", clients.region):
            ami = clients.ssm.get_parameter(Name=parameter)["Parameter"]["Value"]
    found = clients.call("describe_images", ImageIds=[ami])["Images"]
    if not found:
        raise NodeStartError(f"there is no image {ami} in {clients.region}, or it is not shared with this account")
    return ami, found[0].get("RootDeviceName", "/dev/xvda"), found[0].get("Architecture", arch)
