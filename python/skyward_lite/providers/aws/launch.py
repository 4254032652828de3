"""Launches the instances of one run: what EC2 offers, the security group, and one RunInstances after another.

plan              offers, cheapest first; the security group; the request but for the offer
launch            offer by offer, until there are as many instances as the pool asks for
"""

from __future__ import annotations

import ipaddress
import itertools
import logging
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any

from ... import _core
from ..._signals import held
from ...errors import NodeStartError
from .. import Machine, NodeRequest
from . import api, boot, catalog
from .catalog import InstanceType, Offer
from .instance import Instance
from .run import Launched, Run
from .settings import Settings
from .termination import TERMINATION_SECONDS, terminate

log = logging.getLogger("skyward_lite")

CHECK_IP = "https://checkip.amazonaws.com"
"""Answers with the address that the request came from."""
CHECK_IP_SECONDS = 10.0
ROUNDING = 1e-9
"""Added before a number of affordable instances is rounded down: 0.3 dollars pay for 3 instances at 0.1 dollars."""


class Launcher:
    """Launches the instances of one run. `plan` comes first and once; `launch` is also called for each replacement."""

    def __init__(self, settings: Settings, wanted: NodeRequest) -> None:
        self.settings = settings
        self.wanted = wanted
        self.run = Run(settings, wanted.nodes)
        self.launching = threading.Lock()
        """Held during a launch: replacements are asked for on threads of their own. Protects the two fields below."""
        self.untried: Iterator[Offer] = iter(())
        """The offers that no launch has come to yet, cheapest first."""
        self.tried: list[Offer] = []
        """The offers that a launch has come to. The next launch begins with them: capacity comes and goes."""
        self.request: dict[str, Any] = {}
        """The parameters of RunInstances that every launch has in common. Set by `plan`."""

    # ------------------------------------------------------------------------------------------------ plan

    def plan(self) -> None:
        """Find out what can be launched where, and make the security group. Raises `NodeStartError`."""
        settings, wanted, clients = self.settings, self.wanted, self.run.clients
        zones = catalog.zones(clients, settings.subnet)
        types = catalog.instance_types(
            clients,
            settings.instance_types,
            settings.architecture or catalog.ARCHITECTURE,
            wanted.vcpus,
            wanted.memory_gb,
            spot=settings.allocation != "on-demand",
        )
        ami, device, built_for = catalog.image(clients, settings.ami, types[0].arch)
        others = sorted({t.name for t in types if t.arch != built_for})
        if others:
            raise NodeStartError(f"the image {ami} is for {built_for}, and {', '.join(others)} is not")
        offers = self._with_known_price(catalog.offers(clients, types, zones, settings.allocation))
        first = self._first(offers, types)
        self.untried = itertools.chain([first], offers)
        total = "unknown" if first.price is None else f"${first.price * wanted.nodes:.4f}/h"
        log.info(
            "EC2 plan: %d × %s: %s; where there is none of it, %s in %s, cheapest first",
            *(wanted.nodes, first, total, ", ".join(t.name for t in types), ", ".join(sorted(zones.subnets))),
        )
        if settings.security_group is not None:
            self.run.group = settings.security_group
        else:
            with held(insist=True):
                self._make_group(zones.vpc)
        self.request = self._common_request(ami, device)

    def _with_known_price(self, offers: Iterator[Offer]) -> Iterator[Offer]:
        """Leave out the offers of unknown price if there is a limit of cost."""
        for offer in offers:
            if self.settings.max_hourly_cost is None or offer.price is not None:
                yield offer
            else:
                log.info("not asked for, as its price is unknown and max_hourly_cost is set: %s", offer)

    def _first(self, offers: Iterator[Offer], types: list[InstanceType]) -> Offer:
        """Take the first offer. Raise `NodeStartError` if there is none, or if the pool would cost too much."""
        region, limit = self.run.clients.region, self.settings.max_hourly_cost
        first = next(offers, None)
        if first is None:
            names = ", ".join(t.name for t in types[:5])
            raise NodeStartError(
                f"nothing can be launched in {region}: {names} have no spot price there"
                if self.settings.allocation == "spot"
                else f"nothing can be launched in {region}: the price of {names} is unknown, and "
                f"AWS(max_hourly_cost={limit}) is set"
            )
        least = self.wanted.least
        if limit is not None and first.price is not None and first.price * least > limit:
            raise NodeStartError(
                f"{least} nodes cost at least ${first.price * least:.2f}/h ({first}), and "
                f"AWS(max_hourly_cost={limit}): nothing was launched"
            )
        return first

    def _common_request(self, ami: str, device: str) -> dict[str, Any]:
        disk = {
            "Encrypted": True,
            "DeleteOnTermination": True,
            "VolumeType": "gp3",
            "VolumeSize": self.settings.disk_gb,
        }
        request: dict[str, Any] = {
            "ImageId": ami,
            "InstanceInitiatedShutdownBehavior": "terminate",
            "BlockDeviceMappings": [{"DeviceName": device, "Ebs": disk}],
            "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1, "HttpEndpoint": "enabled"},
        }
        profile = self.settings.iam_profile
        if profile is not None:
            request["IamInstanceProfile"] = {"Arn" if profile.startswith("arn:") else "Name": profile}
        return request

    # ------------------------------------------------------------------------------------------------ security group

    def _make_group(self, vpc: str) -> None:
        """Make the run's security group, which lets SSH in from `ssh_from` or from this machine's public address."""
        run = self.run
        source = str(ipaddress.ip_network(self.settings.ssh_from or own_address()))
        run.group_requested_at = time.monotonic()
        try:
            run.group = run.clients.call(
                "create_security_group",
                GroupName=run.group_name(),
                Description="SSH to the nodes of one run of skyward_lite",
                VpcId=vpc,
                TagSpecifications=[{"ResourceType": "security-group", "Tags": run.tags()}],
            )["GroupId"]
        except api.AWSError as error:
            # boto3 has repeated a call whose answer was lost: the group was made by the first one.
            if error.code != "InvalidGroup.Duplicate":
                raise
            run.group = run.find_group()
        source_range = (
            {"Ipv6Ranges": [{"CidrIpv6": source, "Description": "the client"}]}
            if ":" in source
            else {"IpRanges": [{"CidrIp": source, "Description": "the client"}]}
        )
        rule = {"IpProtocol": "tcp", "FromPort": boot.SSH_PORT, "ToPort": boot.SSH_PORT, **source_range}
        request = {"GroupId": run.group, "IpPermissions": [rule]}
        try:
            api.when_consistent(lambda: run.clients.call("authorize_security_group_ingress", **request))
        except api.AWSError as error:
            if error.code != "InvalidPermission.Duplicate":
                raise

    # ------------------------------------------------------------------------------------------------ launch

    def launch(self, count: int, least: int, machines: list[Machine]) -> None:
        """Launch `count` instances, offer by offer, and append each to `machines` as soon as EC2 has launched it.

        Raises `NodeStartError` if there are fewer than `least` in the end; `machines` keeps those that are there.
        """
        with self.launching:
            if self.run.unconfirmed:
                self.run.end_unconfirmed()
            self._launch_by_offers(count, least, machines)

    def launch_another(self, machines: list[Machine]) -> None:
        """Launch one instance, and append it to `machines`. Raises `NodeStartError`."""
        self.launch(1, 1, machines)

    def _launch_by_offers(self, count: int, least: int, machines: list[Machine]) -> None:
        host_key, public_host_key = _core.generate_key()
        settings = self.settings
        user_data = boot.user_data(
            (host_key, public_host_key), self.run.authorized_key, settings.ttl, settings.orphan_timeout
        )
        missing = count
        refused: dict[str, str] = {}
        spot_is_used_up = False
        for offer in self._offers():
            number = min(missing, self._affordable_number(offer))
            if offer.spot and spot_is_used_up:
                continue
            if number < 1:
                refused["cost"] = f"{offer}: more than max_hourly_cost={settings.max_hourly_cost} allows"
                continue
            try:
                # A Ctrl-C waits until the launched instances are in `machines`.
                with held(insist=True):
                    new = self._launch(offer, number, user_data, public_host_key)
                    machines.extend(new)
            except api.AWSError as error:
                refused[error.code] = f"{offer}: {error}"
                no_quota = offer.spot and error.code in api.QUOTA
                spot_is_used_up |= no_quota
                if error.code not in api.NO_CAPACITY and not no_quota:
                    if count - missing >= least:
                        break  # the pool can begin: the error concerns only nodes that it can do without
                    raise
                log.info("EC2 has none: %s: %s", offer, error.code)
                continue
            missing -= len(new)
            log.info("launched %d × %s: %s", len(new), offer, ", ".join(machine.name for machine in new[:5]))
            if not missing:
                return
        if count - missing < least:
            raise NodeStartError(
                f"EC2 has {count - missing} of the {least} instances that are needed in {self.run.clients.region}; "
                + "; ".join(list(refused.values())[-3:])
                + ". Name further types with AWS(instance_type=[...]), ask for less, or use another region"
            )
        log.warning("EC2 has %d of %d instances: %s", count - missing, count, "; ".join(list(refused.values())[-2:]))

    def _offers(self) -> Iterator[Offer]:
        """Yield all offers in order, beginning with those that earlier launches have tried."""
        yield from list(self.tried)
        for offer in self.untried:
            self.tried.append(offer)
            yield offer

    def _affordable_number(self, offer: Offer) -> int:
        """Return how many instances of the offer `max_hourly_cost` allows beside the instances that stay."""
        limit = self.settings.max_hourly_cost
        if limit is None or not offer.price:
            return self.wanted.nodes
        staying = [launched for launched in self.run.launched if launched.ended is None and not launched.leaving]
        spent = sum(launched.offer.price or 0.0 for launched in staying)
        spent += sum(number * (unconfirmed.price or 0.0) for unconfirmed, number in self.run.unconfirmed.values())
        return int((limit - spent) / offer.price + ROUNDING)

    def _launch(self, offer: Offer, number: int, user_data: str, host_key: str) -> list[Instance]:
        """Launch up to `number` instances of an offer, as many as EC2 has. `host_key` is the user-data's public one."""
        run = self.run
        if run.closing.is_set():
            raise NodeStartError("the pool is closed")
        request = self._request(offer, number, user_data)
        token = request["ClientToken"]
        run.unconfirmed[token] = (offer, number)
        try:
            names = run.clients.run_instances(request, run.closing.is_set)
        except api.AWSError as error:
            # After a transient error EC2 may have launched instances all the same.
            if not error.transient:
                del run.unconfirmed[token]
            raise
        del run.unconfirmed[token]
        new = [Launched(name, offer) for name in names]
        run.add(new)
        if run.closing.is_set():
            # `Run.end` may have read the list of instances before these were in it.
            terminate(run.clients, names, [], time.monotonic() + TERMINATION_SECONDS)
            raise NodeStartError("the pool is closed")
        return [Instance(launched, run, self.wanted, host_key, self.launch_another) for launched in new]

    def _request(self, offer: Offer, number: int, user_data: str) -> dict[str, Any]:
        tagged = ["instance", "volume", "network-interface", *(["spot-instances-request"] if offer.spot else [])]
        interface = {
            "DeviceIndex": 0,
            "SubnetId": offer.subnet,
            "Groups": [self.run.group],
            "DeleteOnTermination": True,
        }
        if self.settings.subnet is None:
            interface["AssociatePublicIpAddress"] = True
        request = {
            **self.request,
            "InstanceType": offer.instance_type.name,
            "MinCount": 1,
            "MaxCount": number,
            "NetworkInterfaces": [interface],
            "UserData": user_data,
            "ClientToken": uuid.uuid4().hex,
            "TagSpecifications": [{"ResourceType": kind, "Tags": self.run.tags()} for kind in tagged],
        }
        if offer.spot:
            request["InstanceMarketOptions"] = {
                "MarketType": "spot",
                "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
            }
        return request


def own_address() -> str:
    """Return the address from which AWS sees this machine, as CIDR. Raises `NodeStartError`."""
    try:
        with urllib.request.urlopen(CHECK_IP, timeout=CHECK_IP_SECONDS) as answer:
            address = ipaddress.ip_address(answer.read(100).decode().strip())
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        message = _core.printable(str(error), lines=False)
        raise NodeStartError(
            f"this machine's public address could not be found out ({CHECK_IP}: {message}): say from where SSH is "
            'allowed, as in AWS(ssh_from="203.0.113.7/32")'
        ) from None
    return f"{address}/{address.max_prefixlen}"
