"""What one pool has at EC2: its instances and its security group, until AWS has confirmed that all of it is gone.

add, describe             instances once they are launched; the state that EC2 reports of each
_renew                    the tag with their expiry, moved on while this process lives
end_one, end              TerminateInstances → terminated → DeleteSecurityGroup
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import math
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

from ... import _core
from ...errors import NodeStartError
from . import tags
from .api import CONSISTENCY_SECONDS, PAUSE_GROWTH, AWSError, Clients, first_pause, wait_until
from .catalog import Offer
from .settings import Settings
from .termination import MAX_CHANGED_IDS, MAX_DESCRIBED_IDS, batches, delete_group, request_termination, terminate

log = logging.getLogger("skyward_lite")

TERMINATION_RETRY_SECONDS = 30.0
"""Pause between attempts to terminate one instance while its pool lives."""
RENEWALS_PER_TTL = 4
"""How often within `ttl` the expiry of everything is moved on."""
MIN_CHARGED_SECONDS = 60.0
"""EC2 charges a minute for an instance that ran for less."""


@dataclasses.dataclass(eq=False)
class Launched:
    """An instance that EC2 has launched for a run."""

    name: str
    """Its instance id."""
    offer: Offer
    at: float = dataclasses.field(default_factory=time.monotonic)
    """When EC2 confirmed the launch, by `time.monotonic`."""
    ended: float | None = None
    """When its termination was asked for, by `time.monotonic`; None before, and again after a refusal."""
    leaving: bool = False
    """Set by the provider once another instance is asked for in its place: its price no longer counts."""

    def hours(self) -> float:
        """Return the hours that EC2 charges."""
        return max(MIN_CHARGED_SECONDS, (self.ended or time.monotonic()) - self.at) / 3600


class Run:
    """What one pool has at EC2. Used by the thread of each instance, by the pool's own threads and by `_renew`'s."""

    def __init__(self, settings: Settings, nodes: int) -> None:
        self.settings = settings
        self.nodes = nodes
        """Nodes that the pool asks for: the more, the longer the pauses between descriptions."""
        self.id = uuid.uuid4().hex
        self.clients = Clients(settings.region)
        self.user_key, self.authorized_key = _core.generate_key()
        """The key pair that lets this client in to every instance of the run."""
        self.group: str | None = None
        """The security group's id. None before there is one, and while the outcome of its creation is unknown."""
        self.group_requested_at: float | None = None
        """When the run asked EC2 to create its group, by `time.monotonic`. None before, and if the user named one."""
        self.expires = self._next_expiry()
        """The value of the tags `EXPIRES`. `_renew` moves it on."""
        self.lock = threading.Lock()
        """Held for `launched`, `described`, `described_at` and `pause`, and while EC2 describes instances: a thread
        that waited for the lock then finds the answer."""
        self.launched: list[Launched] = []
        """Every instance of the run, in the order of their launches. It only grows."""
        self.described: dict[str, dict[str, Any]] = {}
        """EC2's last description of each instance, by instance id."""
        self.described_at = -math.inf
        self.pause = 0.0
        """Seconds for which a description is taken to be true."""
        self.unconfirmed: dict[str, tuple[Offer, int]] = {}
        """Launches whose outcome is unknown, by their client token: the offer, and the number of instances asked for.
        The launching thread adds and removes them."""
        self.closing = threading.Event()
        """Set when the pool is being left: every thread that waits for an instance gives up."""
        self.entered = threading.Event()
        """Set when the SSH server of one of the instances has let us in."""
        self.is_over = False
        """Whether AWS has confirmed that everything is gone."""

    def tags(self) -> list[dict[str, str]]:
        """Return the tags of everything that is made now, as EC2's API takes them."""
        return tags.of_run(self.id, self.expires, self.settings.tags)

    def add(self, launched: Sequence[Launched]) -> None:
        """Take over instances that were just launched: from now on they are renewed, described and, at last, ended."""
        with self.lock:
            if not self.launched:
                threading.Thread(target=self._renew, name="skyward-renew", daemon=True).start()
            self.launched.extend(launched)
            self.pause = first_pause(self.nodes)

    # ------------------------------------------------------------------------------------------------ expiry

    def _next_expiry(self) -> datetime.datetime:
        return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=self.settings.ttl)

    def _renew(self) -> None:
        """Move the expiry on, for as long as this process lives."""
        while not self.closing.wait(self.settings.ttl / RENEWALS_PER_TTL):
            self.expires = self._next_expiry()
            with self.lock:
                ids = [launched.name for launched in self.launched if launched.ended is None]
            if self.group_requested_at is not None and self.group is not None:
                ids.append(self.group)
            for batch in batches(ids, MAX_CHANGED_IDS):
                self._tag_expiry(batch)

    def _tag_expiry(self, ids: Sequence[str]) -> None:
        tag = [{"Key": tags.EXPIRES, "Value": tags.shown_time(self.expires)}]
        try:
            self.clients.call("create_tags", Resources=list(ids), Tags=tag)
        except NodeStartError as error:
            if isinstance(error, AWSError) and error.code == "InvalidInstanceID.NotFound" and len(ids) > 1:
                # EC2 has forgotten an instance that ended itself, and then tags none of the others either.
                for name in ids:
                    self._tag_expiry([name])
            else:
                log.warning("the expiry of %s of EC2 run %s could not be moved on: %s", ids[0], self.id, error)

    # ------------------------------------------------------------------------------------------------ states

    def describe(self, ids: Sequence[str], since: float | None = None) -> dict[str, dict[str, Any]]:
        """Return EC2's descriptions of these instances, by instance id, without instances that EC2 does not know yet.

        One call describes all instances of the run. Its answer serves every thread that asks within `pause` seconds,
        which grow, or, with `since`, every thread that accepts an answer no older than that time of `time.monotonic`.
        """
        with self.lock:
            oldest = time.monotonic() - self.pause if since is None else since
            if self.described_at < oldest:
                living = [launched.name for launched in self.launched if launched.ended is None]
                for batch in batches(living, MAX_DESCRIBED_IDS):
                    by_id = [{"Name": "instance-id", "Values": list(batch)}]
                    pages = self.clients.pages("describe_instances", "Reservations", Filters=by_id)
                    self.described.update(
                        {item["InstanceId"]: item for reservation in pages for item in reservation["Instances"]}
                    )
                self.described_at = time.monotonic()
                self.pause = min(self.pause * 1.5, PAUSE_GROWTH * first_pause(self.nodes))
            return {name: self.described[name] for name in ids if name in self.described}

    # ------------------------------------------------------------------------------------------------ the end

    def end_one(self, launched: Launched) -> None:
        """Terminate an instance that is of no use any more. After a failure go on trying until the pool is left."""
        if launched.ended is None and not self._terminate_one(launched):
            threading.Thread(target=self._end_later, args=(launched,), name="skyward-end", daemon=True).start()

    def _terminate_one(self, launched: Launched) -> bool:
        launched.ended = time.monotonic()
        try:
            self.clients.call("terminate_instances", InstanceIds=[launched.name])
        except NodeStartError as error:
            not_found = isinstance(error, AWSError) and error.code == "InvalidInstanceID.NotFound"
            if not_found and time.monotonic() - launched.at > CONSISTENCY_SECONDS:
                return True
            launched.ended = None
            log.warning("%s could not be terminated: %s", launched.name, error)
            return False
        return True

    def _end_later(self, launched: Launched) -> None:
        while not self.closing.wait(TERMINATION_RETRY_SECONDS) and not self._terminate_one(launched):
            pass

    def end(self, deadline: float) -> None:
        """Terminate all instances, wait until they are terminated, and delete the security group.

        Idempotent. A failure is logged, with the command that ends the rest, and never raised.
        """
        self.closing.set()
        if self.is_over:
            return
        try:
            self._end_all(deadline)
            self.is_over = True
        except Exception as error:
            region = self.clients.region
            log.error(
                "EC2 run %s in %s may not be over: %s. Its instances end themselves within %.0f s; "
                "`python -m skyward_lite reap --region %s --run %s` ends them now",
                *(self.id, region, error, self.settings.orphan_timeout, region, self.id),
            )

    def _end_all(self, deadline: float) -> None:
        with self.lock:
            ids = [launched.name for launched in self.launched]
            living = [launched.name for launched in self.launched if launched.ended is None]
        if living:
            log.info("EC2 run %s: terminating %d instances, and waiting until they are", self.id[:8], len(living))
            request_termination(self.clients, living)
        now = time.monotonic()
        if self.unconfirmed:
            # EC2 may show the instances of an unanswered launch only later.
            until = now + CONSISTENCY_SECONDS
            wait_until(lambda: self.find_unconfirmed().keys() >= self.unconfirmed.keys(), until)
            living += [name for names in self.find_unconfirmed().values() for name in names]
        if ids or living:
            terminate(self.clients, living, [name for name in ids if name not in living], deadline)
        for launched in self.launched:
            launched.ended = launched.ended or now
        if self.group_requested_at is not None:
            if self.group is None:
                wait_until(lambda: self.find_group() is not None, now + CONSISTENCY_SECONDS)
                self.group = self.find_group()
            if self.group is not None:
                delete_group(self.clients, self.group, deadline, self.group_requested_at + CONSISTENCY_SECONDS)
        if ids:
            log.info("EC2 run %s is over: %d instances are terminated", self.id[:8], len(ids))

    # ------------------------------------------------------------------------------------------------ unknown outcomes

    def group_name(self) -> str:
        """Return the name of the run's own security group. It is unique, so that a lost answer can be looked up."""
        return f"skyward-lite-{self.id}"

    def find_group(self) -> str | None:
        """Return the id of the run's own security group; None if EC2 does not know it."""
        by_name = [{"Name": "group-name", "Values": [self.group_name()]}]
        found = self.clients.call("describe_security_groups", Filters=by_name)["SecurityGroups"]
        return found[0]["GroupId"] if found else None

    def find_unconfirmed(self) -> dict[str, list[str]]:
        """Return the ids of the instances that the launches of unknown outcome have made, by client token."""
        of_run = [{"Name": f"tag:{tags.RUN}", "Values": [self.id]}]
        found: dict[str, list[str]] = {}
        for reservation in self.clients.pages("describe_instances", "Reservations", Filters=of_run):
            for instance in reservation["Instances"]:
                token = instance.get("ClientToken", "")
                if token in self.unconfirmed:
                    found.setdefault(token, []).append(instance["InstanceId"])
        return found

    def end_unconfirmed(self) -> None:
        """Terminate the instances that the launches of unknown outcome have made, as far as EC2 knows them by now."""
        try:
            found = self.find_unconfirmed()
        except NodeStartError as error:
            log.warning("whether a launch has made instances could not be found out: %s", error)
            return
        for token, names in found.items():
            offer, _ = self.unconfirmed.pop(token)
            for name in names:
                launched = Launched(name, offer)
                with self.lock:
                    self.launched.append(launched)
                self.end_one(launched)
