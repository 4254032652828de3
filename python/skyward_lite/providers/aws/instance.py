"""One EC2 instance, from its launch to the command that starts the agent.

_address → _enter         running, and its SSH server lets us in, with the host key of the user-data
rotate → _enter           a host key of its own, and in again with that
furnish                   Python, if the image lacks the client's
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Any

from ... import _core
from ..._version import PYTHON
from ...environment import build as bootstrap
from ...errors import NodeStartError
from .. import PreparedMachine
from ..remote import RemoteMachine
from . import api as ec2
from . import boot as user_data

if TYPE_CHECKING:
    from .run import Run

log = logging.getLogger("skyward_lite")

PORT = 22
ROTATE_SECONDS = 30.0
FURNISH_SECONDS = 600.0
PASSING_ERRORS = (_core.UnreachableError, _core.HungUpError, _core.ConnectTimeoutError)
"""What connecting to an instance raises while its SSH server is not there yet."""
LOGIN_WAITS = (3.0, 5.0, 8.0, 13.0)
"""Seconds between attempts to log in: nobody may until the boot has come far enough, and servers ban who hurries."""


class Instance(RemoteMachine):
    """An instance, on its way to being a node."""

    replaceable = True
    prelude = user_data.ALIVE

    def __init__(self, name: str, run: Run, offer: ec2.Offer, host_key: str) -> None:
        super().__init__(name, run.wanted)
        self.run = run
        self.offer = offer
        self.host_key = host_key
        self.agent = user_data.agent_arguments(offer.spot)
        self.launched = time.monotonic()
        self.ended: float | None = None
        self.late = False
        """It took longer than `boot_timeout`."""
        self.leaving = False
        """Another one was asked for in its place."""

    def hours(self) -> float:
        """Give the hours that it ran; EC2 charges a minute at least."""
        return max(60.0, (self.ended or time.monotonic()) - self.launched) / 3600

    def open(self, core: _core.Core) -> PreparedMachine:
        try:
            return super().open(core)
        except BaseException as error:
            # Of no use: it is not paid for any longer. A pool that is left ends all of them at once.
            if not self.run.over.is_set():
                why = self._end()
                self.run.end_one(self)
                if why:
                    raise NodeStartError(f"EC2 ended it while it started: {why}") from error
            raise

    def unlucky(self) -> bool:
        # What is EC2's doing (no capacity, a fault, spot taken back) happens to one; the rest is the account's.
        return self._end().startswith("Server.") or (self.late and self.run.entered.is_set())

    def _end(self) -> str:
        """Say why EC2 has ended it; empty if it has not, or does not say."""
        if self.ended is None:
            with contextlib.suppress(NodeStartError):
                return self._over(self.run.look([self.name], since=time.monotonic()))
        return self._over(self.run.states)

    def _over(self, states: dict[str, dict[str, Any]]) -> str:
        state = states.get(self.name, {})
        if state.get("State", {}).get("Name") not in ("shutting-down", "terminated", "stopping", "stopped"):
            return ""
        why = state.get("StateReason", {}).get("Message") or state.get("StateTransitionReason") or "no reason"
        return _core.printable(str(why), lines=False)

    def connect(self, core: _core.Core) -> _core.Connection:
        deadline = time.monotonic() + self.run.provider.boot_timeout
        address = self._address(deadline)
        first = self._enter(core, address, self.host_key, deadline)
        self.run.entered.set()
        said, status, printed = self._run(first, bootstrap._fill(user_data.ROTATE).encode(), ROTATE_SECONDS)
        keys = said.get("key", [""])
        if status or not keys[0]:
            raise NodeStartError(f"it could not make its own host key: status {status}: {printed}")
        self.host_key = keys[0]
        del first
        # The server's new listener may not be there yet.
        return self._enter(core, address, self.host_key, deadline)

    def _address(self, deadline: float) -> str:
        """Wait until it has an address."""
        while True:
            state = self._look()
            # A private address is there at once; the public one comes with the start.
            if state.get("State", {}).get("Name") == "running":
                address = state.get("PublicIpAddress") or state.get("PrivateIpAddress")
                if address:
                    return str(address)
            if time.monotonic() > deadline:
                raise self._late(f"it was not running within {self.run.provider.boot_timeout:.0f} s: {self.offer}")
            if self.run.over.wait(0.25):
                raise NodeStartError("the pool is closed")

    def _look(self) -> dict[str, Any]:
        """Say how it stands. Raises `NodeStartError` if it is over."""
        states = self.run.look([self.name])
        why = self._over(states)
        if why:
            raise NodeStartError(f"EC2 ended it while it started: {why}")
        return states.get(self.name, {})

    def _late(self, why: str) -> NodeStartError:
        self.late = True
        return NodeStartError(why)

    def _enter(self, core: _core.Core, address: str, host_key: str, deadline: float) -> _core.Connection:
        """Connect as soon as its SSH server does, and lets us in. A wrong host key is final."""
        logins = list(LOGIN_WAITS)
        pause = 0.25
        while True:
            try:
                return core.connect(
                    endpoint=(address, PORT),
                    user=user_data.USER,
                    host_keys=[host_key],
                    revoked=[],
                    accept_new=False,
                    identities=[self.run.user_key],
                    timeout=max(1.0, min(self.wanted.connect_timeout, deadline - time.monotonic())),
                )
            except _core.HostKeyError as error:
                raise NodeStartError(
                    f"{error}: somebody may be between here and {address}; the instance is ended"
                ) from error
            except _core.CoreError as error:
                if isinstance(error, _core.AuthenticationError) and logins:
                    pause = logins.pop(0)
                elif not isinstance(error, PASSING_ERRORS):
                    raise NodeStartError(str(error)) from error
                if time.monotonic() + pause > deadline:
                    raise self._late(
                        f"it did not let us in within {self.run.provider.boot_timeout:.0f} s of its launch: "
                        f"{error}. Does its security group allow SSH from here, and has its subnet a way out?"
                    ) from error
                self._look()
                if self.run.over.wait(pause):
                    raise NodeStartError("the pool is closed") from error
                pause = min(pause * 1.5, 5.0)

    def furnish(self, connection: _core.Connection, facts: bootstrap.Facts) -> bootstrap.Facts:
        if (facts.python and facts.venv) or facts.uv:
            return facts
        log.info("%s: installing Python %s", self.name, PYTHON)
        script = bootstrap._fill(self.prelude + user_data.FURNISH, PYTHON=PYTHON).encode()
        _, status, printed = self._run(connection, script, FURNISH_SECONDS)
        found = self._probe(connection, "none")
        if status or not ((found.python and found.venv) or found.uv):
            raise NodeStartError(f"Python {PYTHON} could not be installed there (status {status}): {printed}")
        return dataclasses.replace(found, root=facts.root)
