"""The way to a host of `SSH()`, step by step: resolve → reach → host key → authentication.

Nothing is changed there; with `--accept-new` a line of known_hosts is added here.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from .. import _core, credentials
from ..errors import NodeStartError
from ..providers.identities import identities
from ..providers.known_hosts import known
from ..providers.openssh import Config, parse, resolve, warnings_of
from ..providers.ssh import SSH
from . import survival
from .hosts import InspectedHost, default_request
from .inspection import Inspection
from .measure import measure_speed, milliseconds


class HostCheck(Inspection[InspectedHost]):
    """The steps for one host."""

    connection_remedy = "see the server's log; try again"

    @property
    def shell_remedy(self) -> str:
        return f"look at what `ssh {self.machine.name} 'exec sh -s'` does"

    def way_in(self) -> _core.Connection | None:
        config = self._resolve()
        if config is None or not self._reach(config):
            return None
        self.config = config
        return self._connect(config)

    def measure(self, connection: _core.Connection) -> None:
        measure_speed(connection, self.report, "the login shell's start")

    def leave(self, connection: _core.Connection) -> survival.Left | None:
        return survival.leave(self.machine, connection)

    def find(self, left: survival.Left) -> None:
        survival.find(
            self.machine,
            lambda: self.machine.connect_to(self.core, self.config),
            left,
            self.report,
            (survival.cause(left), survival.remedy(left, self.config.user)),
        )

    def end(self) -> None:
        self.machine.end(time.monotonic() + 1.0)

    def _resolve(self) -> Config | None:
        name = self.machine.name
        try:
            config = resolve(parse(name), self.machine.config)
        except NodeStartError as error:
            self.report.fail("resolve", str(error), f"`ssh -G {name}` must print a configuration")
            return None
        proxy = None if config.proxy is None else credentials.mask(config.proxy)
        way = f", through `{proxy.removeprefix('exec ')}`" if proxy else ""
        self.report.ok(
            "resolve",
            f"{config.user}@{config.hostname}, port {config.port}{way}",
            hostname=config.hostname,
            port=config.port,
            user=config.user,
            proxy=proxy,
        )
        if config.unsupported:
            self.report.note("resolve", f"ssh's options {', '.join(config.unsupported)} are set and not applied")
        for sentence in warnings_of(config, name):
            self.report.note("resolve", sentence)
        return config

    def _reach(self, config: Config) -> bool:
        try:
            took = self.machine.reach(config)
        except (socket.gaierror, UnicodeError) as error:
            self.report.fail("reach", f"{config.hostname} has no address: {error}", "correct the name, or its HostName")
        except OSError as error:
            self.report.fail(
                "reach",
                f"nothing can be reached at port {config.port} of {error}",
                "is the host up, is its SSH server running at that port, does a firewall let you through?",
            )
        else:
            if took is not None:
                text = f"the port answers in {milliseconds(took)} (TCP's handshake)"
                self.report.ok("reach", text, tcp_ms=took * 1000)
            return True
        return False

    def _connect(self, config: Config) -> _core.Connection | None:
        before = known(config)
        began = time.perf_counter()
        try:
            connection = self.machine.connect_to(self.core, config)
        except NodeStartError as error:
            self._explain_refusal(error, config, bool(before.keys))
            return None
        took = time.perf_counter() - began
        how = "known" if {*before.keys, *before.portless} else "new, and not recorded"
        if how != "known" and connection.host_key in known(config).keys:
            how = f"new, and now in {config.new_keys}"
        kind, _, digest = connection.fingerprint.partition(" ")
        self.report.ok("host key", f"{how}: {kind} {digest}", key_type=kind, fingerprint=digest)
        text = f"as {config.user}, with {_shown_identities(config)}; {milliseconds(took)} with the key exchange"
        self.report.ok("authentication", text, connect_ms=took * 1000)
        return connection

    def _explain_refusal(self, error: NodeStartError, config: Config, is_known: bool) -> None:
        name, cause = self.machine.name, error.__cause__
        if not config.public_keys:
            self.report.fail("authentication", str(error), "PubkeyAuthentication yes, and publickey among the methods")
        elif isinstance(cause, _core.RevokedHostKeyError):
            self.report.fail("host key", str(error), "this key is marked as revoked: give the host a new one")
        elif isinstance(cause, _core.HostKeyError) and is_known:
            self.report.fail("host key", str(error), f"find out why; then `ssh-keygen -R '{config.key_name}'`")
        elif isinstance(cause, _core.HostKeyError):
            self.report.fail("host key", str(error), f"compare and accept it with `ssh {name}`, or use --accept-new")
        elif isinstance(cause, _core.AuthenticationError):
            self.report.ok("host key", "as expected")
            self.report.fail(
                "authentication", str(error), f"`ssh-copy-id {name}`, `ssh-add` for a key with a passphrase, or User"
            )
        elif cause is None:
            self.report.fail("host key", str(error), f"`ssh-keyscan {config.hostname}` shows the host's own keys")
        else:
            self.report.fail("connection", str(error), f"`ssh -v {name}` says how far it comes")


def _shown_identities(config: Config) -> str:
    offered = [str(one[0] if isinstance(one, tuple) else one) for one in identities(config)]
    if config.ssh_agent is not None:
        offered[0] = f"the ssh-agent at {offered[0]}"
    there = [one for one in offered if one.startswith("the ssh-agent") or os.path.exists(one)]
    return there[0] if len(there) == 1 else f"one of {', '.join(there)}"


def inspections(provider: SSH, core: _core.Core, measuring: threading.Lock) -> list[HostCheck]:
    """Return the inspections of the provider's hosts."""
    request = default_request(provider)
    return [HostCheck(InspectedHost(host, provider, request), core, measuring) for host in provider.hosts]
