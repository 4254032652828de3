"""boto3's clients for EC2, AWS's errors in plain words, and waiting until EC2 knows what was just made.

Every call is made within `translate_errors`: an error of AWS becomes an `AWSError`, whose text says what to do.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from ... import _core
from ...backoff import Backoff
from ...errors import NodeStartError

CONSISTENCY_SECONDS = 15.0
"""EC2's answers become consistent after a while only: by then every part of EC2 is taken to know a new resource."""
PAUSE_GROWTH = 5.0
"""The longest pause between two descriptions of the same instances, as a multiple of the first one."""
LAUNCH_ATTEMPTS = 6
"""Attempts of one launch, with the same client token."""

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
NOT_YET_KNOWN = {"InvalidGroup.NotFound", "InvalidSecurityGroupID.NotFound"}
"""The codes for a security group that EC2 does not know: a group that was just made is not known everywhere at once."""
STANDARD_QUOTA = ("standard instances: A, C, D, H, I, M, R, T, Z", "L-1216C47A", "L-34B43A08")
UNKNOWN_QUOTA = ("Service Quotas lists its name", "CODE", "CODE")
QUOTAS = {
    **dict.fromkeys(("g", "gr", "vt"), ("G and VT instances", "L-DB2E81BA", "L-3819A6DF")),
    "p": ("P instances", "L-417A185B", "L-7212CCBC"),
    **dict.fromkeys(("dl", "hpc", "inf", "mac", "trn"), UNKNOWN_QUOTA),
}
"""The quota that counts a type, by the letters of the type's family: its name, and its codes for on-demand and spot."""
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
            raise NodeStartError(f"AWS's configuration cannot be used: {_message(error)}") from None

    def _make(self, session: Any, config: Callable[..., Any]) -> None:
        if session.region_name is None:
            raise NodeStartError(
                'no AWS region: say AWS(region="eu-west-1"), set AWS_DEFAULT_REGION, or run `aws configure`'
            )
        self.region: str = session.region_name
        # Asking boto3 for credentials may run a program or a request, and so be the first call that fails.
        try:
            found = session.get_credentials() is not None
        except Exception as error:
            raise NodeStartError(f"AWS's credentials could not be had: {_message(error)}") from None
        if not found:
            raise NodeStartError(
                "no AWS credentials: run `aws configure` or `aws sso login`, set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            )
        patient = config(retries={"mode": "standard", "total_max_attempts": 8}, connect_timeout=10, read_timeout=60)
        # `run_instances` repeats launches itself: botocore would take a lack of capacity for a fault, and wait.
        once = config(retries={"mode": "standard", "total_max_attempts": 1}, connect_timeout=10, read_timeout=60)
        self.ec2 = session.client("ec2", config=patient)
        self.launcher = session.client("ec2", config=once)
        self.ssm = session.client("ssm", config=patient)
        # The price list is served in few regions only, and has the prices of all.
        hurried = config(retries={"mode": "standard", "total_max_attempts": 2}, connect_timeout=5, read_timeout=20)
        self.pricing = session.client("pricing", region_name="us-east-1", config=hurried)

    def call(self, operation: str, /, **parameters: Any) -> Any:
        """Call an operation of EC2. Raises `AWSError`."""
        with translate_errors(operation, self.region):
            return getattr(self.ec2, operation)(**parameters)

    def pages(self, operation: str, key: str, /, **parameters: Any) -> list[Any]:
        """Return the items under `key` of all pages of an operation's answer. Raises `AWSError`."""
        with translate_errors(operation, self.region):
            pages = self.ec2.get_paginator(operation).paginate(**parameters)
            return [item for page in pages for item in page[key]]

    def run_instances(self, request: dict[str, Any], give_up: Callable[[], bool]) -> list[str]:
        """Launch up to `MaxCount` instances, as many as EC2 has, and return their ids.

        A transient failure is tried again, with the request's client token, so that no instance is launched twice.
        Raises `AWSError` if EC2 refuses, and if the outcome is unknown after the last attempt or `give_up()`.
        """
        backoff = Backoff(0.5, factor=2.0, jitter=(0.5, 1.0), most=LAUNCH_ATTEMPTS - 1)
        while True:
            try:
                with translate_errors("run_instances", self.region, request["InstanceType"]):
                    launched = self.launcher.run_instances(**request)["Instances"]
                    return [instance["InstanceId"] for instance in launched]
            except AWSError as error:
                may_pass = error.transient or error.code in NOT_YET_KNOWN
                if not may_pass or give_up() or not backoff.pause():
                    raise


# ---------------------------------------------------------------------------------------------------- errors


class AWSError(NodeStartError):
    """Raised when a call of AWS failed. Its text is `explain`'s; `code` is AWS's own, empty if AWS gave none.

    After a `transient` error the call may have had its effect all the same.
    """

    def __init__(self, text: str, code: str, transient: bool) -> None:
        super().__init__(text)
        self.code = code
        self.transient = transient


@contextlib.contextmanager
def translate_errors(operation: str, region: str, instance_type: str = "") -> Iterator[None]:
    """Raise botocore's errors within the block as `AWSError`.

    An `AWSError` has no cause: a traceback would print AWS's text as it came, which a terminal may take for commands.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("botocore", "boto3"):
            raise
        text = explain(error, operation, region, instance_type)
        raise AWSError(text, error_code(error), _is_transient(error)) from None


def error_code(error: BaseException) -> str:
    """Return the code of an error that AWS sent; empty for any other error."""
    response = getattr(error, "response", None)
    code = str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
    return _core.printable(code, 256, lines=False)


def explain(error: BaseException, operation: str, region: str, instance_type: str = "") -> str:
    """Return what an error of botocore's means, and what to do."""
    code, message = error_code(error), _message(error)
    action = operation if ":" in operation else f"ec2:{operation.title().replace('_', '')}"
    if code in DENIED:
        return f"these credentials may not do {action} in {region}; the docs have the policy. AWS said: {message}"
    if code == "OptInRequired" and ("marketplace" in message.lower() or "subscri" in message.lower()):
        return f"the image's terms must be accepted in AWS Marketplace first. AWS said: {message}"
    if code == "OptInRequired" or (code == "AuthFailure" and "region" in message.lower()):
        return f"the region {region} is not enabled for this account: enable it (AWS account → Regions), or use another"
    if code in BAD_CREDENTIALS:
        return (
            f"AWS does not take these credentials ({code}) in {region}; is the region enabled, the clock right, or "
            f"`aws sso login` due? AWS said: {message}"
        )
    if code in QUOTA:
        return _explain_quota(code, message, region, instance_type)
    if code in NO_CAPACITY:
        return f"EC2 has no capacity for this in {region}: {message}"
    if code in ("VPCIdNotSpecified", "DefaultVpcDoesNotExist", "MissingInput"):
        return no_default_vpc(region)
    if type(error).__name__ in (
        "EndpointConnectionError",
        "ConnectTimeoutError",
        "ReadTimeoutError",
        "ConnectionError",
    ):
        return f"AWS cannot be reached in {region}; is the region's name right, and the network up? {message}"
    return f"{action} failed in {region}: {message}"


def _explain_quota(code: str, message: str, region: str, instance_type: str) -> str:
    spot = code == "MaxSpotInstanceCountExceeded"
    family = re.match("[a-z]*", instance_type)
    otherwise = STANDARD_QUOTA if instance_type[:1] in "acdhimrtz" else UNKNOWN_QUOTA
    name, on_demand_code, spot_code = QUOTAS.get(family[0] if family else "", otherwise)
    return (
        f"the account's quota of vCPUs for {instance_type or 'this'} in {region} is used up ({name}, "
        f"{'spot' if spot else 'on-demand'}). Ask for fewer or smaller nodes, or raise it with `aws service-quotas "
        f"request-service-quota-increase --service-code ec2 --quota-code {spot_code if spot else on_demand_code} "
        f"--desired-value N --region {region}`. AWS said: {message}"
    )


def no_default_vpc(region: str) -> str:
    """Return the error's text for an account without a default VPC."""
    return (
        f"the account has no default VPC in {region}: create one with `aws ec2 create-default-vpc --region {region}`, "
        "or say AWS(subnet=...)"
    )


def _is_transient(error: BaseException) -> bool:
    response = getattr(error, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(response, dict) else 0
    code = error_code(error)
    return not code or code in BUSY or (status >= 500 and code not in NO_CAPACITY)


def _message(error: BaseException) -> str:
    """Return an error's text, harmless to a terminal: AWS wrote it, or a program that fetches credentials."""
    return _core.printable(str(error), lines=False)


# ---------------------------------------------------------------------------------------------------- waiting


def when_consistent(call: Callable[[], object]) -> None:
    """Make a call that names a security group just made, again and again until EC2 knows the group."""

    def is_known() -> bool:
        try:
            call()
        except AWSError as error:
            if error.code not in NOT_YET_KNOWN:
                raise
            return False
        return True

    if not wait_until(is_known, time.monotonic() + CONSISTENCY_SECONDS):
        call()


def first_pause(instances: int) -> float:
    """Return the seconds between the first two descriptions of this many instances; later pauses grow.

    A description costs one call or few, whatever the number of instances: with longer pauses a large pool makes few
    calls for each of its nodes.
    """
    return max(1.0, instances / 15)


def wait_until(done: Callable[[], bool], deadline: float, pause: float = 1.0) -> bool:
    """Wait until `done()`, with pauses that grow from `pause` seconds. Return whether it was done by the deadline."""
    backoff = Backoff(pause, longest=PAUSE_GROWTH * pause, deadline=deadline)
    while not done():
        if not backoff.pause():
            return False
    return True
