"""EC2's API in words: clients and their errors, and what may be launched where at which price.

connect → types → offers           what fits, cheapest first
launch                             one RunInstances per offer, until there are enough
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import platform
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from ... import _core
from ...errors import NodeStartError

log = logging.getLogger("skyward_lite")

Allocation = Literal["spot-if-available", "spot", "on-demand"]

ARCHITECTURE = {"aarch64": "arm64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
"""This machine's, as EC2 says it."""
TYPES = 24
"""Instance types whose prices are asked for: the smallest that fit."""
LEAST_GB = 2.0
"""Memory without which installing an environment fails, unless the type is named."""
COUNTS = (1, 2, 4, 8, 12, 16, 24, 32, 36, 48, 64, 72, 96, 128, 192, 224, 256, 384, 448, 896)
"""vCPUs that instance types have."""
LONGEST = 5.0
"""How much longer the last pauses are than the first one."""
CONSISTENCY_SECONDS = 15.0
"""Seconds after which what was made is known everywhere."""
OFFERS = 60
"""Offers of each market that are tried before there is said to be no capacity."""
ATTEMPTS = 6
"""Of one launch, with the same client token."""

NO_CAPACITY = {
    "InsufficientInstanceCapacity",
    "InsufficientHostCapacity",
    "InsufficientCapacity",
    "SpotMaxPriceTooLow",
    "Unsupported",
    "InsufficientFreeAddressesInSubnet",
    "InsufficientAddressCapacity",
    "InsufficientVolumeCapacity",
    "UnfulfillableCapacity",
}
QUOTA = {"VcpuLimitExceeded", "MaxSpotInstanceCountExceeded", "InstanceLimitExceeded"}
UNSETTLED = {"InvalidGroup.NotFound", "InvalidSecurityGroupID.NotFound"}
"""A group that was just made is not known everywhere at once."""
STANDARD = ("standard instances: A, C, D, H, I, M, R, T, Z", "L-1216C47A", "L-34B43A08")
UNKNOWN = ("Service Quotas lists its name", "CODE", "CODE")
QUOTAS = {
    **dict.fromkeys(("g", "gr", "vt"), ("G and VT instances", "L-DB2E81BA", "L-3819A6DF")),
    "p": ("P instances", "L-417A185B", "L-7212CCBC"),
    **dict.fromkeys(("dl", "hpc", "inf", "mac", "trn"), UNKNOWN),
}
"""By the letters of a type's family: its name, and its codes for on-demand and for spot."""
BUSY = {
    "RequestLimitExceeded",
    "Throttling",
    "ThrottlingException",
    "InternalError",
    "Unavailable",
    "ServiceUnavailable",
}
DENIED = {"UnauthorizedOperation", "AccessDenied", "AccessDeniedException", "UnauthorizedAccess"}
BAD_CREDENTIALS = {
    *("AuthFailure", "InvalidClientTokenId", "UnrecognizedClientException", "ExpiredToken", "ExpiredTokenException"),
    *("RequestExpired", "SignatureDoesNotMatch", "IncompleteSignature", "MissingAuthenticationToken"),
}

UBUNTU = "/aws/service/canonical/ubuntu/server"
IMAGES = {
    "al2023": "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-{arch}",
    "ubuntu-22.04": f"{UBUNTU}/22.04/stable/current/{{debian}}/hvm/ebs-gp2/ami-id",
    "ubuntu-24.04": f"{UBUNTU}/24.04/stable/current/{{debian}}/hvm/ebs-gp3/ami-id",
    "ubuntu-26.04": f"{UBUNTU}/26.04/stable/current/{{debian}}/hvm/ebs-gp3/ami-id",
}
"""Public parameters of AWS's Systems Manager, which always name the newest image."""


# ---------------------------------------------------------------------------------------------------- clients


class Clients:
    """boto3's clients for one region. Raises `NodeStartError` without boto3, credentials or a region."""

    def __init__(self, region: str | None) -> None:
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ImportError as error:
            raise NodeStartError(
                f"sky.AWS() needs boto3, which is not installed here ({error}): pip install 'skyward_lite[aws]'"
            ) from error
        try:
            self._make(boto3.Session(region_name=region), Config)
        except BotoCoreError as error:
            raise NodeStartError(f"AWS's configuration cannot be used: {_said(error)}") from None

    def _make(self, session: Any, config: Callable[..., Any]) -> None:
        if session.region_name is None:
            raise NodeStartError(
                'no AWS region: say AWS(region="eu-west-1"), set AWS_DEFAULT_REGION, or run `aws configure`'
            )
        self.region: str = session.region_name
        # Where credentials come from is boto3's to say; asking for them may be the first thing that fails.
        try:
            found = session.get_credentials() is not None
        except Exception as error:
            raise NodeStartError(f"AWS's credentials could not be had: {_said(error)}") from None
        if not found:
            raise NodeStartError(
                "no AWS credentials: run `aws configure` or `aws sso login`, set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            )
        patient = config(retries={"mode": "standard", "total_max_attempts": 8}, connect_timeout=10, read_timeout=60)
        # Its attempts are ours: want of capacity looks to botocore like a fault that is worth waiting for.
        once = config(retries={"mode": "standard", "total_max_attempts": 1}, connect_timeout=10, read_timeout=60)
        self.ec2 = session.client("ec2", config=patient)
        self.launcher = session.client("ec2", config=once)
        self.ssm = session.client("ssm", config=patient)
        # Prices of all regions are at a few of them.
        hurried = config(retries={"mode": "standard", "total_max_attempts": 2}, connect_timeout=5, read_timeout=20)
        self.pricing = session.client("pricing", region_name="us-east-1", config=hurried)

    def call(self, operation: str, /, **parameters: Any) -> Any:
        """Call an operation of EC2. Raises `NodeStartError` with what went wrong in words."""
        with words(operation, self.region):
            return getattr(self.ec2, operation)(**parameters)

    def pages(self, operation: str, key: str, /, **parameters: Any) -> list[Any]:
        """Call an operation until it has given everything."""
        with words(operation, self.region):
            pages = self.ec2.get_paginator(operation).paginate(**parameters)
            return [item for page in pages for item in page[key]]


def code(error: BaseException) -> str:
    """Give the code of an error of AWS's; empty for another."""
    response = getattr(error, "response", None)
    said = str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
    return _core.printable(said, 256, lines=False)


class words:  # noqa: N801 (used as a function)
    """Turn botocore's errors within the block into `NodeStartError`s that say what to do.

    These have no cause: a traceback would show AWS's words as they are.
    """

    def __init__(self, operation: str, region: str, kind: str = "") -> None:
        self.operation = operation
        self.region = region
        self.kind = kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and type(error).__module__.partition(".")[0] in ("botocore", "boto3"):
            text = in_words(error, self.operation, self.region, self.kind)
            raise AWSError(text, code(error), _transient(error)) from None


class AWSError(NodeStartError):
    """What AWS refused, in words; `code` is AWS's own. What is `transient` may have been done all the same."""

    def __init__(self, text: str, code: str, transient: bool) -> None:
        super().__init__(text)
        self.code = code
        self.transient = transient


def _transient(error: BaseException) -> bool:
    response = getattr(error, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(response, dict) else 0
    return not code(error) or code(error) in BUSY or (status >= 500 and code(error) not in NO_CAPACITY)


def _said(error: BaseException) -> str:
    """Return an error's text as it may be shown: AWS has written it, or a program that fetches credentials."""
    return _core.printable(str(error), lines=False)


def in_words(error: BaseException, operation: str, region: str, kind: str = "") -> str:
    """Say what an error of botocore's means, and what to do."""
    what, said = code(error), _said(error)
    action = operation if ":" in operation else f"ec2:{operation.title().replace('_', '')}"
    if what in DENIED:
        return f"these credentials may not do {action} in {region}; the README has the policy. AWS said: {said}"
    if what == "OptInRequired" and ("marketplace" in said.lower() or "subscri" in said.lower()):
        return f"the image's terms must be accepted in AWS Marketplace first. AWS said: {said}"
    if what == "OptInRequired" or (what == "AuthFailure" and "region" in said.lower()):
        return f"the region {region} is not enabled for this account: enable it (AWS account → Regions), or use another"
    if what in BAD_CREDENTIALS:
        return (
            f"AWS does not take these credentials ({what}) in {region}; is the region enabled, the clock right, or "
            f"`aws sso login` due? AWS said: {said}"
        )
    if what in QUOTA:
        spot = what == "MaxSpotInstanceCountExceeded"
        family = re.match("[a-z]*", kind)
        name, *quotas = QUOTAS.get(family[0] if family else "", STANDARD if kind[:1] in "acdhimrtz" else UNKNOWN)
        return (
            f"the account's quota of vCPUs for {kind or 'this'} in {region} is used up ({name}, "
            f"{'spot' if spot else 'on-demand'}). Ask for fewer or smaller nodes, or raise it with `aws service-quotas "
            f"request-service-quota-increase --service-code ec2 --quota-code {quotas[spot]} --desired-value N "
            f"--region {region}`. AWS said: {said}"
        )
    if what in NO_CAPACITY:
        return f"EC2 has no capacity for this in {region}: {said}"
    if what in ("VPCIdNotSpecified", "DefaultVpcDoesNotExist", "MissingInput"):
        return no_default_vpc(region)
    if type(error).__name__ in (
        "EndpointConnectionError",
        "ConnectTimeoutError",
        "ReadTimeoutError",
        "ConnectionError",
    ):
        return f"AWS cannot be reached in {region}; is the region's name right, and the network up? {said}"
    return f"{action} failed in {region}: {said}"


def no_default_vpc(region: str) -> str:
    """Say that there is no default VPC."""
    return (
        f"the account has no default VPC in {region}: create one with `aws ec2 create-default-vpc --region {region}`, "
        "or say AWS(subnet=...)"
    )


# ---------------------------------------------------------------------------------------------------- what there is


@dataclasses.dataclass(frozen=True)
class Kind:
    """An instance type."""

    name: str
    arch: str
    """As EC2 says it: "x86_64" or "arm64"."""
    vcpus: int
    memory_gb: float


@dataclasses.dataclass(frozen=True)
class Offer:
    """A type in a zone, at a price: dollars per hour and instance, None if that could not be found out."""

    kind: Kind
    zone: str
    subnet: str
    spot: bool
    price: float | None

    def __str__(self) -> str:
        price = "price unknown" if self.price is None else f"${self.price:.4f}/h"
        return f"{self.kind.name} in {self.zone}, {'spot' if self.spot else 'on-demand'}, {price}"


@dataclasses.dataclass(frozen=True)
class Zones:
    """Where to launch: the VPC, and one subnet for each zone."""

    vpc: str
    subnets: dict[str, str]


def zones(clients: Clients, subnet: str | None) -> Zones:
    """Find the subnets: the one that was named, or the default ones."""
    if subnet is not None:
        (found,) = clients.call("describe_subnets", SubnetIds=[subnet])["Subnets"]
        return Zones(found["VpcId"], {found["AvailabilityZone"]: subnet})
    default = clients.pages("describe_subnets", "Subnets", Filters=[{"Name": "default-for-az", "Values": ["true"]}])
    if not default:
        raise NodeStartError(no_default_vpc(clients.region))
    vpc = default[0]["VpcId"]
    return Zones(vpc, {s["AvailabilityZone"]: s["SubnetId"] for s in default if s["VpcId"] == vpc})


def kinds(
    clients: Clients, named: Sequence[str], arch: str | None, vcpus: int | None, memory_gb: float | None, *, spot: bool
) -> list[Kind]:
    """List the instance types: those that were named, or the smallest that fit.

    Without a name these are of the current generation, with no accelerator (which would be paid for and not used) and
    not burstable: whole cores are what a pool loads.
    """
    if named:
        found = clients.pages("describe_instance_types", "InstanceTypes", InstanceTypes=list(named))
        arch = None
    else:
        least = vcpus or 2
        # Few have more than 8 GiB for each of theirs.
        enough = max(least, math.ceil((memory_gb or 0) / 8))
        memory_gb = max(memory_gb or 0, LEAST_GB)
        counts = [n for n in COUNTS if least <= n < enough] + [n for n in COUNTS if n >= enough][:3]
        filters = {
            "current-generation": ["true"],
            "bare-metal": ["false"],
            "burstable-performance-supported": ["false"],
            "processor-info.supported-architecture": [arch or "x86_64"],
            "supported-usage-class": ["spot" if spot else "on-demand"],
            "supported-virtualization-type": ["hvm"],
            "vcpu-info.default-vcpus": [str(n) for n in counts],
        }
        found = clients.pages(
            "describe_instance_types",
            "InstanceTypes",
            Filters=[{"Name": name, "Values": values} for name, values in filters.items()],
            PaginationConfig={"PageSize": 100},
        )
        found = [f for f in found if not any(f.get(k) for k in ("GpuInfo", "FpgaInfo", "InferenceAcceleratorInfo"))]
        found = [f for f in found if not f.get("NeuronInfo") and not f.get("MediaAcceleratorInfo")]
        # The filter for burstable ones does not know the newest of them.
        found = [f for f in found if not re.match(r"t\d", f["InstanceType"])]
    listed = []
    for f in found:
        archs = [a for a in f["ProcessorInfo"]["SupportedArchitectures"] if a in ("x86_64", "arm64")]
        kind = Kind(
            f["InstanceType"],
            archs[0] if archs else "none",
            f["VCpuInfo"]["DefaultVCpus"],
            f["MemoryInfo"]["SizeInMiB"] / 1024,
        )
        if kind.vcpus >= (vcpus or 0) and kind.memory_gb >= (memory_gb or 0) and arch in (None, *archs):
            listed.append(kind)
    if not listed:
        wanted = ", ".join(
            f"{n}={v}"
            for n, v in (("instance_type", ", ".join(named)), ("vcpus", vcpus), ("memory_gb", memory_gb))
            if v
        )
        raise NodeStartError(
            f"no instance type in {clients.region} fits: {wanted or 'nothing'}, {arch or 'any architecture'}"
        )
    listed.sort(key=lambda kind: (kind.vcpus, kind.memory_gb, kind.name))
    return listed[: None if named else TYPES]


def spot_prices(clients: Clients, kinds: Sequence[Kind]) -> dict[tuple[str, str], float]:
    """Give the spot prices of now: (type, zone) → dollars per hour."""
    found = clients.pages(
        "describe_spot_price_history",
        "SpotPriceHistory",
        InstanceTypes=[kind.name for kind in kinds],
        ProductDescriptions=["Linux/UNIX"],
        StartTime=datetime.datetime.now(datetime.UTC),
    )
    newest: dict[tuple[str, str], tuple[Any, float]] = {}
    for f in found:
        place = (f["InstanceType"], f["AvailabilityZone"])
        if place not in newest or f["Timestamp"] > newest[place][0]:
            newest[place] = (f["Timestamp"], float(f["SpotPrice"]))
    return {place: price for place, (_, price) in newest.items()}


def on_demand_prices(clients: Clients, kinds: Sequence[Kind]) -> dict[str, float]:
    """Give the on-demand prices: type → dollars per hour. Empty, said so, where the price list does not answer."""
    wanted = {
        "regionCode": clients.region,
        "operatingSystem": "Linux",
        "tenancy": "Shared",
        "preInstalledSw": "NA",
        "capacitystatus": "Used",
    }
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
    filters.append({"Type": "ANY_OF", "Field": "instanceType", "Value": ",".join(kind.name for kind in kinds)})
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
        log.info("on-demand prices are not known: %s", in_words(error, "pricing:GetProducts", "us-east-1"))
    return prices


def offers(clients: Clients, kinds: Sequence[Kind], zones: Zones, allocation: Allocation) -> Iterator[Offer]:
    """Give what can be asked for: spot first, if it is wanted, and cheapest first. Prices are asked for when needed."""
    if allocation != "on-demand":
        prices = spot_prices(clients, kinds)
        spot = [Offer(k, z, s, True, prices.get((k.name, z))) for k in kinds for z, s in zones.subnets.items()]
        # No price is no spot market there.
        yield from sorted((o for o in spot if o.price is not None), key=_order)[:OFFERS]
    if allocation != "spot":
        per_type = on_demand_prices(clients, kinds)
        rest = [Offer(k, z, s, False, per_type.get(k.name)) for k in kinds for z, s in zones.subnets.items()]
        yield from sorted(rest, key=_order)[:OFFERS]


def _order(offer: Offer) -> tuple[float, int, float, str, str]:
    price = float("inf") if offer.price is None else offer.price
    return price, offer.kind.vcpus, offer.kind.memory_gb, offer.kind.name, offer.zone


def image(clients: Clients, ami: str | None, arch: str) -> tuple[str, str, str]:
    """Give the machine image: its id, its root device and its architecture."""
    if ami is None or not ami.startswith("ami-"):
        parameter = IMAGES.get(ami or "al2023", ami or "")
        parameter = parameter.format(arch=arch, debian={"x86_64": "amd64"}.get(arch, arch))
        with words("ssm:GetParameter", clients.region):
            ami = clients.ssm.get_parameter(Name=parameter)["Parameter"]["Value"]
    found = clients.call("describe_images", ImageIds=[ami])["Images"]
    if not found:
        raise NodeStartError(f"there is no image {ami} in {clients.region}, or it is not shared with this account")
    return ami, found[0].get("RootDeviceName", "/dev/xvda"), found[0].get("Architecture", arch)


# ---------------------------------------------------------------------------------------------------- launching


def run_instances(clients: Clients, request: dict[str, Any], give_up: Callable[[], bool]) -> list[str]:
    """Launch as many as `MaxCount` says and EC2 has; their ids. Idempotent by the request's client token.

    Raises `AWSError` for what is refused, and for what is still unknown after some attempts.
    """
    for attempt in range(ATTEMPTS):
        try:
            with words("run_instances", clients.region, request["InstanceType"]):
                launched = clients.launcher.run_instances(**request)["Instances"]
                return [instance["InstanceId"] for instance in launched]
        except AWSError as error:
            again = error.transient or error.code in UNSETTLED
            if not again or attempt == ATTEMPTS - 1 or give_up():
                raise
            time.sleep(random.uniform(0.5, 1.0) * 0.5 * 2**attempt)
    raise AssertionError("unreachable")


def settled(call: Callable[[], object]) -> None:
    """Do what needs something that was just made, until that is known."""

    def known() -> bool:
        try:
            call()
        except AWSError as error:
            if error.code not in UNSETTLED:
                raise
            return False
        return True

    if not until(known, time.monotonic() + CONSISTENCY_SECONDS):
        call()


def pause(instances: int) -> float:
    """Give the first pause between two looks at so many instances: a look costs the same whatever their number is.

    From it pauses grow to `LONGEST` times as much, so that large pools need few calls for each of their nodes.
    """
    return max(1.0, instances / 15)


def until(done: Callable[[], bool], deadline: float, pause: float = 1.0) -> bool:
    """Wait until `done()`, with pauses that grow; whether it was before the deadline."""
    longest = LONGEST * pause
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        pause = min(pause * 1.5, longest)
    return True
