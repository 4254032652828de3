"""One EC2 instance, from its launch to the command that starts the agent.

_wait_for_address → _enter      EC2 runs it, and its SSH server, known by the user-data's host key, lets us in
boot.rotate → _enter            it makes a host key of its own, and lets us in again with that
install_python                  Python, if the image lacks the client's
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

from ... import _core
from ..._version import PYTHON
from ...backoff import Backoff
from ...environment import probe
from ...errors import NodeStartError
from .. import Machine, MachineGoneError, NodeRequest, PreparedMachine
from ..remote import RemoteMachine
from . import boot
from .run import Launched, Run

log = logging.getLogger("skyward_lite")

ROTATE_SECONDS = 30.0
"""Bound on making the instance's own host key."""
INSTALL_SECONDS = 600.0
"""Bound on installing Python."""
ADDRESS_POLL_SECONDS = 0.25
"""Pause between two checks for the address; most are answered from the run's last description."""
LOGIN_PAUSES = (3.0, 5.0, 8.0, 13.0)
"""Seconds between attempts to log in. The server refuses every login until the boot has come far enough, and may ban an
address for a while after a few refusals in short time."""
CONNECT_PAUSES = (0.25, 5.0)
"""First and longest pause between attempts to reach the SSH server, in seconds."""


class Instance(RemoteMachine):
    """An instance, on its way to being a node."""

    replaceable = True

    def __init__(
        self,
        launched: Launched,
        run: Run,
        wanted: NodeRequest,
        host_key: str,
        launch_another: Callable[[list[Machine]], None],
    ) -> None:
        super().__init__(launched.name, wanted)
        self.launched = launched
        self.run = run
        self.host_key = host_key
        """The public host key that its SSH server must show: the user-data's, then the one that the instance made."""
        self.launch_another = launch_another
        """Launches one more instance of the run, and appends it to the given list."""
        self.prelude = boot.sign_of_life()
        self.address = ""
        """Where its SSH server is; set when it has let us in."""
        self.boot_timed_out = False
        """Set when the instance did not let us in within `boot_timeout`."""

    def agent_options(self) -> tuple[str, ...]:
        return boot.agent_options(self.launched.offer.spot)

    def open(self, core: _core.Core) -> PreparedMachine:
        try:
            return super().open(core)
        except BaseException as error:
            # Nobody uses the instance: stop paying for it. A pool that is being left ends all its instances at once.
            if not self.run.closing.is_set():
                why = self._why_ended()
                self.run.end_one(self.launched)
                if why:
                    raise NodeStartError(f"EC2 ended it while it started: {why}") from error
            raise

    def failed_transiently(self) -> bool:
        # A reason that begins with "Server." (no capacity, a fault, spot taken back) is EC2's, and concerns this one
        # instance. Any other reason lies in the account. So does a boot that timed out, if no instance has let us in.
        return self._why_ended().startswith("Server.") or (self.boot_timed_out and self.run.entered.is_set())

    # ------------------------------------------------------------------------------------------------ EC2's view

    def _why_ended(self) -> str:
        """Return why EC2 has ended the instance; empty if EC2 has not, or cannot be asked."""
        if self.launched.ended is None:
            with contextlib.suppress(NodeStartError):
                return _end_reason(self.run.describe([self.name], since=time.monotonic()).get(self.name, {}))
        return _end_reason(self.run.described.get(self.name, {}))

    def _describe(self) -> dict[str, Any]:
        """Return EC2's description, empty before EC2 knows the instance. Raise `NodeStartError` if EC2 ended it."""
        description = self.run.describe([self.name]).get(self.name, {})
        why = _end_reason(description)
        if why:
            raise NodeStartError(f"EC2 ended it while it started: {why}")
        return description

    def _wait_for_address(self, deadline: float) -> str:
        """Wait until EC2 runs the instance, and return its public address, or its private one if it has no other."""
        while True:
            description = self._describe()
            # The private address is there before the instance runs, the public one only when it does.
            if description.get("State", {}).get("Name") == "running":
                address = description.get("PublicIpAddress") or description.get("PrivateIpAddress")
                if address:
                    return str(address)
            if time.monotonic() > deadline:
                raise self._time_out(
                    f"it was not running within {self.run.settings.boot_timeout:.0f} s: {self.launched.offer}"
                )
            self._wait(ADDRESS_POLL_SECONDS)

    def _time_out(self, why: str) -> NodeStartError:
        self.boot_timed_out = True
        return NodeStartError(why)

    def _wait(self, seconds: float) -> None:
        """Wait. Raises `NodeStartError` when the pool is being left."""
        if self.run.closing.wait(seconds):
            raise NodeStartError("the pool is closed")

    # ------------------------------------------------------------------------------------------------ connecting

    def connect(self, core: _core.Core) -> _core.Connection:
        deadline = time.monotonic() + self.run.settings.boot_timeout
        self.doing = "booting"
        address = self._wait_for_address(deadline)
        self.doing = f"waiting until {address} lets us in"
        first = self._enter(core, address, self.host_key, deadline)
        self.doing = "making its own host key"
        self.run.entered.set()
        report, status, printed = self.run_script(first, boot.rotate(), ROTATE_SECONDS)
        keys = report.get("key", [""])
        if status or not keys[0]:
            raise NodeStartError(f"it could not make its own host key: status {status}: {printed}")
        self.host_key = keys[0]
        del first
        self.address = address
        # As after the boot, the server's listener may not be there yet: it has been restarted.
        return self._enter(core, address, self.host_key, deadline)

    def reconnect(self, core: _core.Core) -> _core.Connection:
        # EC2 is asked only afterwards: without a network its answer may take minutes, and the lease runs.
        try:
            return self._try_to_enter(core, self.address, self.host_key, self.wanted.connect_timeout)
        except _core.CoreError as error:
            why = self._why_ended()
            if why or self.launched.ended is not None:
                raise MachineGoneError(f"EC2 has ended it: {why or 'no reason'}") from error
            raise NodeStartError(str(error)) from error

    def _enter(self, core: _core.Core, address: str, host_key: str, deadline: float) -> _core.Connection:
        """Connect as soon as the instance's SSH server lets us in. A wrong host key is never tried again."""
        login_pauses = list(LOGIN_PAUSES)
        first, longest = CONNECT_PAUSES
        backoff = Backoff(first, longest=longest, deadline=deadline, sleep=self._wait)
        while True:
            try:
                bound = max(1.0, min(self.wanted.connect_timeout, deadline - time.monotonic()))
                return self._try_to_enter(core, address, host_key, bound)
            except _core.HostKeyError as error:
                raise NodeStartError(
                    f"{error}: somebody may be between here and {address}; the instance is ended"
                ) from error
            except _core.CoreError as error:
                pause: float | None
                if isinstance(error, _core.AuthenticationError) and login_pauses:
                    pause = login_pauses.pop(0)
                elif isinstance(error, _core.UnreachableError | _core.HungUpError | _core.ConnectTimeoutError):
                    pause = None
                else:
                    raise NodeStartError(str(error)) from error
                self._describe()
                if not backoff.pause(pause):
                    raise self._time_out(
                        f"it did not let us in within {self.run.settings.boot_timeout:.0f} s of its launch: "
                        f"{error}. Does its security group allow SSH from here, and has its subnet a way out?"
                    ) from error

    def _try_to_enter(self, core: _core.Core, address: str, host_key: str, bound: float) -> _core.Connection:
        return core.connect(
            endpoint=(address, boot.SSH_PORT),
            user=boot.USER,
            host_keys=[host_key],
            revoked=[],
            accept_new=False,
            identities=[self.run.user_key],
            timeout=bound,
        )

    # ------------------------------------------------------------------------------------------------ environment

    def install_python(self, connection: _core.Connection, facts: probe.Facts) -> probe.Facts:
        if (facts.python and facts.venv) or facts.uv:
            return facts
        release = self.wanted.image.python or PYTHON
        log.info("%s: installing Python %s", self.name, release)
        self.doing = f"installing Python {release}"
        _, status, printed = self.run_script(connection, boot.install_python(PYTHON, release), INSTALL_SECONDS)
        found = self.probe_host(connection, "none")
        if status or not ((found.python and found.venv) or found.uv):
            raise NodeStartError(f"Python {release} could not be installed there (status {status}): {printed}")
        return dataclasses.replace(found, root=facts.root)


def _end_reason(description: dict[str, Any]) -> str:
    """Return why an instance is ending or has ended, by EC2's description of it; empty for any other instance."""
    if description.get("State", {}).get("Name") not in ("shutting-down", "terminated", "stopping", "stopped"):
        return ""
    why = description.get("StateReason", {}).get("Message") or description.get("StateTransitionReason") or "no reason"
    return _core.printable(str(why), lines=False)
