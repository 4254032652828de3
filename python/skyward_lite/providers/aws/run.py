"""What one pool has at EC2: launched, looked after, ended.

begin → launch            what may be launched; the security group; RunInstances, offer by offer
look, _renew              how instances stand; their expiry, moved on while this process lives
end                       TerminateInstances → terminated → the security group
"""

from __future__ import annotations

import datetime
import ipaddress
import itertools
import logging
import math
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ... import _core
from ..._signals import held
from ..._version import __version__
from ...errors import NodeStartError
from .. import Machine, NodeRequest
from . import api as ec2
from . import boot as user_data
from . import tags as owner
from . import termination as ending
from .instance import PORT, Instance
from .termination import batches

if TYPE_CHECKING:
    from .provider import AWS

log = logging.getLogger("skyward_lite")

AGAIN = 30.0
"""Seconds between attempts to terminate an instance."""
CHECK_IP = "https://checkip.amazonaws.com"
"""Says from which address it was asked."""
LEASE_TAGS = "skyward-lite:"
RUN, OWNER, PROCESS, EXPIRES = (f"{LEASE_TAGS}{name}" for name in ("run", "owner", "process", "expires"))


class Run:
    """What one pool has at EC2."""

    def __init__(self, provider: AWS, wanted: NodeRequest) -> None:
        self.provider = provider
        self.wanted = wanted
        self.id = uuid.uuid4().hex
        self.clients = ec2.Clients(provider.region)
        self.user_key, self.authorized_key = _core.generate_key()
        self.group: str | None = None
        self.made_group = False
        self.began = 0.0
        self.expires = self._until()
        self.machines: list[Instance] = []
        self.lock = threading.Lock()
        self.states: dict[str, dict[str, Any]] = {}
        self.looked = -math.inf
        self.pause = 0.0
        self.launching = threading.Lock()
        self.over = threading.Event()
        """Set when the pool is being left."""
        self.entered = threading.Event()
        """Set when one of its instances has let us in."""
        self.ended = False
        """Whether everything is known to be gone."""
        self.unheard: dict[str, tuple[ec2.Offer, int]] = {}
        """The launches whose outcome we never heard, by their client token: what was asked for, and how many."""
        self.offers: Iterator[ec2.Offer] = iter(())
        self.tried: list[ec2.Offer] = []
        self.request: dict[str, Any] = {}

    def _until(self) -> datetime.datetime:
        return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=self.provider.ttl)

    def tags(self) -> list[dict[str, str]]:
        """Give the tags of everything: whose it is, and until when."""
        tags = {
            "Name": f"skyward_lite {self.id[:8]}",
            RUN: self.id,
            OWNER: owner.name(),
            PROCESS: owner.process(),
            EXPIRES: self.expires.isoformat(timespec="seconds"),
            f"{LEASE_TAGS}version": __version__,
            **self.provider.tags,
        }
        return [{"Key": key, "Value": value} for key, value in tags.items()]

    # ------------------------------------------------------------------------------------------------ launch

    def begin(self) -> None:
        """Find out what can be launched where, and make the security group."""
        provider, wanted = self.provider, self.wanted
        arch = provider.architecture or ec2.ARCHITECTURE
        zones = ec2.zones(self.clients, provider.subnet)
        kinds = ec2.kinds(
            self.clients,
            provider.instance_types,
            provider.architecture if provider.instance_types else arch,
            wanted.vcpus,
            wanted.memory_gb,
            spot=provider.allocation != "on-demand",
        )
        ami, device, built_for = ec2.image(self.clients, provider.ami, kinds[0].arch)
        other = sorted({kind.name for kind in kinds if kind.arch != built_for})
        if other:
            raise NodeStartError(f"the image {ami} is for {built_for}, and {', '.join(other)} is not")
        self.offers = self._affordable(ec2.offers(self.clients, kinds, zones, provider.allocation))
        first = next(self.offers, None)
        if first is None:
            names = ", ".join(kind.name for kind in kinds[:5])
            raise NodeStartError(
                f"nothing can be launched in {self.clients.region}: {names} have no spot price there"
                if provider.allocation == "spot"
                else f"nothing can be launched in {self.clients.region}: the price of {names} is unknown, and "
                f"AWS(max_hourly_cost={provider.max_hourly_cost}) is set"
            )
        self.offers = itertools.chain([first], self.offers)
        limit = provider.max_hourly_cost
        if limit is not None and first.price is not None and first.price * wanted.least > limit:
            raise NodeStartError(
                f"{wanted.least} nodes cost at least ${first.price * wanted.least:.2f}/h ({first}), and "
                f"AWS(max_hourly_cost={limit}): nothing was launched"
            )
        total = "unknown" if first.price is None else f"${first.price * wanted.nodes:.4f}/h"
        log.info(
            "EC2 plan: %d × %s: %s; where there is none of it, %s in %s, cheapest first",
            *(wanted.nodes, first, total, ", ".join(kind.name for kind in kinds), ", ".join(sorted(zones.subnets))),
        )
        if provider.security_group is not None:
            self.group = provider.security_group
        else:
            with held(insist=True):
                self._make_group(zones.vpc)
        self.request = self._request(ami, device)

    def _affordable(self, offers: Iterator[ec2.Offer]) -> Iterator[ec2.Offer]:
        """Leave out what has no price, if there is a limit."""
        for offer in offers:
            if self.provider.max_hourly_cost is None or offer.price is not None:
                yield offer
            else:
                log.info("not asked for, as its price is unknown and max_hourly_cost is set: %s", offer)

    def _make_group(self, vpc: str) -> None:
        source = str(ipaddress.ip_network(self.provider.ssh_from or _own_address()))
        self.made_group = True
        self.began = time.monotonic()
        try:
            self.group = self.clients.call(
                "create_security_group",
                GroupName=self._group_name(),
                Description="SSH to the nodes of one run of skyward_lite",
                VpcId=vpc,
                TagSpecifications=[{"ResourceType": "security-group", "Tags": self.tags()}],
            )["GroupId"]
        except ec2.AWSError as error:
            # The answer to our first attempt was lost: it has no client token, but a name.
            if error.code != "InvalidGroup.Duplicate":
                raise
            self.group = self._find_group()
        source_range = (
            {"Ipv6Ranges": [{"CidrIpv6": source, "Description": "the client"}]}
            if ":" in source
            else {"IpRanges": [{"CidrIp": source, "Description": "the client"}]}
        )
        rule = {"IpProtocol": "tcp", "FromPort": PORT, "ToPort": PORT, **source_range}
        request = {"GroupId": self.group, "IpPermissions": [rule]}
        try:
            ec2.settled(lambda: self.clients.call("authorize_security_group_ingress", **request))
        except ec2.AWSError as error:
            if error.code != "InvalidPermission.Duplicate":
                raise

    def _group_name(self) -> str:
        return f"skyward-lite-{self.id}"

    def _find_group(self) -> str | None:
        named = [{"Name": "group-name", "Values": [self._group_name()]}]
        found = self.clients.call("describe_security_groups", Filters=named)["SecurityGroups"]
        return found[0]["GroupId"] if found else None

    def _request(self, ami: str, device: str) -> dict[str, Any]:
        """Give RunInstances' parameters, but for the offer, the number and the token."""
        provider = self.provider
        disk = {
            "Encrypted": True,
            "DeleteOnTermination": True,
            "VolumeType": "gp3",
            "VolumeSize": provider.disk_gb,
        }
        profile = provider.iam_profile
        request: dict[str, Any] = {
            "ImageId": ami,
            "InstanceInitiatedShutdownBehavior": "terminate",
            "BlockDeviceMappings": [{"DeviceName": device, "Ebs": disk}],
            "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1, "HttpEndpoint": "enabled"},
        }
        if profile is not None:
            request["IamInstanceProfile"] = {"Arn" if profile.startswith("arn:") else "Name": profile}
        return request

    def launch(self, count: int, least: int, machines: list[Machine]) -> None:
        """Launch `count` instances, offer by offer. Raises `NodeStartError` if there are fewer than `least`."""
        with self.launching:
            if self.unheard:
                self._end_unheard()
            self._launch_all(count, least, machines)

    def _launch_all(self, count: int, least: int, machines: list[Machine]) -> None:
        private, public = _core.generate_key()
        data = user_data.user_data(
            (private, public), self.authorized_key, self.provider.ttl, self.provider.orphan_timeout
        )
        missing = count
        refused: dict[str, str] = {}
        spot_is_used_up = False
        for offer in self._offers():
            number = min(missing, self._affordable_number(offer))
            if offer.spot and spot_is_used_up:
                continue
            if number < 1:
                refused["cost"] = f"{offer}: more than max_hourly_cost={self.provider.max_hourly_cost} allows"
                continue
            try:
                # What was launched must be known, also to a Ctrl-C.
                with held(insist=True):
                    new = self._launch(offer, number, data, private, public)
                    machines.extend(new)
            except ec2.AWSError as error:
                refused[error.code] = f"{offer}: {error}"
                spot_is_used_up |= offer.spot and error.code in ec2.QUOTA
                if error.code not in ec2.NO_CAPACITY and not (offer.spot and error.code in ec2.QUOTA):
                    if count - missing >= least:
                        break  # enough, whatever is wrong with further ones
                    raise
                log.info("EC2 has none: %s: %s", offer, error.code)
                continue
            missing -= len(new)
            log.info("launched %d × %s: %s", len(new), offer, ", ".join(machine.name for machine in new[:5]))
            if not missing:
                return
        if count - missing < least:
            raise NodeStartError(
                f"EC2 has {count - missing} of the {least} instances that are needed in {self.clients.region}; "
                + "; ".join(list(refused.values())[-3:])
                + ". Name further types with AWS(instance_type=[...]), ask for less, or use another region"
            )
        log.warning("EC2 has %d of %d instances: %s", count - missing, count, "; ".join(list(refused.values())[-2:]))

    def _offers(self) -> Iterator[ec2.Offer]:
        """Give all offers, cheapest first: those that were tried before, too, as capacity comes and goes."""
        yield from list(self.tried)
        for offer in self.offers:
            self.tried.append(offer)
            yield offer

    def _affordable_number(self, offer: ec2.Offer) -> int:
        """Say how many the limit allows beside those that stay."""
        limit = self.provider.max_hourly_cost
        if limit is None or not offer.price:
            return 1_000_000
        staying = [machine for machine in self.machines if machine.ended is None and not machine.leaving]
        spent = sum(machine.offer.price or 0.0 for machine in staying)
        spent += sum(number * (unheard.price or 0.0) for unheard, number in self.unheard.values())
        return int((limit - spent) / offer.price + 1e-9)

    def _launch(self, offer: ec2.Offer, number: int, data: str, private: str, public: str) -> list[Instance]:
        kinds = ["instance", "volume", "network-interface", *(["spot-instances-request"] if offer.spot else [])]
        interface = {"DeviceIndex": 0, "SubnetId": offer.subnet, "Groups": [self.group], "DeleteOnTermination": True}
        if self.provider.subnet is None:
            interface["AssociatePublicIpAddress"] = True
        request = {
            **self.request,
            "InstanceType": offer.kind.name,
            "MinCount": 1,
            "MaxCount": number,
            "NetworkInterfaces": [interface],
            "UserData": data,
            "ClientToken": uuid.uuid4().hex,
            "TagSpecifications": [{"ResourceType": kind, "Tags": self.tags()} for kind in kinds],
        }
        if offer.spot:
            request["InstanceMarketOptions"] = {
                "MarketType": "spot",
                "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
            }
        if self.over.is_set():
            raise NodeStartError("the pool is closed")
        token = request["ClientToken"]
        self.unheard[token] = (offer, number)
        try:
            ids = ec2.run_instances(self.clients, request, self.over.is_set)
        except ec2.AWSError as error:
            # AWS's own word that there is none; without it there may be some.
            if not error.transient:
                del self.unheard[token]
            raise
        del self.unheard[token]
        new = [Instance(name, self, offer, public) for name in ids]
        with self.lock:
            if not self.machines:
                threading.Thread(target=self._renew, name="skyward-renew", daemon=True).start()
            self.machines.extend(new)
            self.pause = ec2.pause(self.wanted.nodes)
        if self.over.is_set():
            # The pool was left meanwhile, and may not have seen these.
            ending.terminate(self.clients, ids, [], time.monotonic() + self.provider.leave)
            raise NodeStartError("the pool is closed")
        return new

    def _renew(self) -> None:
        """Move the expiry on, for as long as this process lives."""
        while not self.over.wait(self.provider.ttl / 4):
            self.expires = self._until()
            with self.lock:
                ids = [machine.name for machine in self.machines if machine.ended is None]
            if self.made_group and self.group is not None:
                ids.append(self.group)
            for some in batches(ids, 500):
                self._move_on(some)

    def _move_on(self, ids: Sequence[str]) -> None:
        tag = [{"Key": EXPIRES, "Value": self.expires.isoformat(timespec="seconds")}]
        try:
            self.clients.call("create_tags", Resources=list(ids), Tags=tag)
        except NodeStartError as error:
            if isinstance(error, ec2.AWSError) and error.code == "InvalidInstanceID.NotFound" and len(ids) > 1:
                # EC2 has forgotten one that ended itself, and then does nothing for the others.
                for one in ids:
                    self._move_on([one])
            else:
                log.warning("the expiry of %s of EC2 run %s could not be moved on: %s", ids[0], self.id, error)

    # ------------------------------------------------------------------------------------------------ instances

    def look(self, ids: Sequence[str], since: float | None = None) -> dict[str, dict[str, Any]]:
        """Say how these stand. One look serves all who ask: within its pause, which grows, or `since` then."""
        with self.lock:
            now = time.monotonic()
            if self.looked < (now - self.pause if since is None else since):
                wanted = [m.name for m in self.machines if m.ended is None]
                for some in batches(wanted, 200):
                    pages = self.clients.pages(
                        "describe_instances", "Reservations", Filters=[{"Name": "instance-id", "Values": list(some)}]
                    )
                    self.states.update({i["InstanceId"]: i for reservation in pages for i in reservation["Instances"]})
                self.looked = time.monotonic()
                self.pause = min(self.pause * 1.5, ec2.LONGEST * ec2.pause(self.wanted.nodes))
            return {name: self.states[name] for name in ids if name in self.states}

    def end_one(self, machine: Instance) -> None:
        """Terminate an instance that is of no use any more; what fails is tried again, until the end if need be."""
        if machine.ended is None and not self._ends(machine):
            threading.Thread(target=self._end_later, args=(machine,), name="skyward-end", daemon=True).start()

    def _ends(self, machine: Instance) -> bool:
        machine.ended = time.monotonic()
        try:
            self.clients.call("terminate_instances", InstanceIds=[machine.name])
        except NodeStartError as error:
            forgotten = isinstance(error, ec2.AWSError) and error.code == "InvalidInstanceID.NotFound"
            if forgotten and time.monotonic() - machine.launched > ec2.CONSISTENCY_SECONDS:
                return True
            machine.ended = None
            log.warning("%s could not be terminated: %s", machine.name, error)
            return False
        return True

    def _end_later(self, machine: Instance) -> None:
        while not self.over.wait(AGAIN) and not self._ends(machine):
            pass

    def end(self, deadline: float) -> None:
        """Terminate everything, wait until it is, and remove the security group. What is left is said, never raised."""
        self.over.set()
        if self.ended:
            return
        try:
            self._end(deadline)
            self.ended = True
        except Exception as error:
            log.error(
                "EC2 run %s in %s may not be over: %s. Its instances end themselves within %.0f s; "
                "`python -m skyward_lite reap --region %s --run %s` ends them now",
                *(self.id, self.clients.region, error, self.provider.orphan_timeout, self.clients.region, self.id),
            )

    def _end(self, deadline: float) -> None:
        with self.lock:
            ids = [machine.name for machine in self.machines]
            living = [machine.name for machine in self.machines if machine.ended is None]
        if living:
            log.info("EC2 run %s: terminating %d instances, and waiting until they are", self.id[:8], len(living))
            ending.ask(self.clients, living)
        now = time.monotonic()
        if self.unheard:
            # A call whose answer never came may be known only later.
            ec2.until(lambda: self._find_unheard().keys() >= self.unheard.keys(), now + ec2.CONSISTENCY_SECONDS)
            living += [name for names in self._find_unheard().values() for name in names]
        if ids or living:
            ending.terminate(self.clients, living, [name for name in ids if name not in living], deadline)
        for machine in self.machines:
            machine.ended = machine.ended or now
        if self.made_group and self.group is None:
            ec2.until(lambda: self._find_group() is not None, now + ec2.CONSISTENCY_SECONDS)
            self.group = self._find_group()
        if self.made_group and self.group is not None:
            ending.remove_group(self.clients, self.group, deadline, young=self.began + ec2.CONSISTENCY_SECONDS)
        if ids:
            log.info("EC2 run %s is over: %d instances are terminated", self.id[:8], len(ids))

    def _find_unheard(self) -> dict[str, list[str]]:
        """List the instances of the launches whose outcome we never heard, by client token."""
        ours = [{"Name": f"tag:{RUN}", "Values": [self.id]}]
        found: dict[str, list[str]] = {}
        for reservation in self.clients.pages("describe_instances", "Reservations", Filters=ours):
            for instance in reservation["Instances"]:
                token = instance.get("ClientToken", "")
                if token in self.unheard:
                    found.setdefault(token, []).append(instance["InstanceId"])
        return found

    def _end_unheard(self) -> None:
        """End what those launches have made after all, as far as that is known by now."""
        try:
            found = self._find_unheard()
        except NodeStartError as error:
            log.warning("what became of a launch could not be found out: %s", error)
            return
        for token, names in found.items():
            offer, _ = self.unheard.pop(token)
            for name in names:
                machine = Instance(name, self, offer, "")
                with self.lock:
                    self.machines.append(machine)
                self.end_one(machine)


def _own_address() -> str:
    """Find the address from which AWS sees us, as CIDR."""
    try:
        with urllib.request.urlopen(CHECK_IP, timeout=10) as answer:
            address = ipaddress.ip_address(answer.read(100).decode().strip())
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        said = _core.printable(str(error), lines=False)
        raise NodeStartError(
            f"this machine's public address could not be found out ({CHECK_IP}: {said}): say from where SSH is "
            'allowed, as in AWS(ssh_from="203.0.113.7/32")'
        ) from None
    return f"{address}/{address.max_prefixlen}"
