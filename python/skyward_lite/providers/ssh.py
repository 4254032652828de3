"""`SSH("me@lab1", "lab2:2222")`: hosts that you can already `ssh` to.

connect                    on the host's own thread
  resolve → known → trust    what OpenSSH's tools say of the host (openssh.py, known_hosts.py)
  endpoint                   its name and port, or the proxy command that leads to it
                           → a connection; from then on all hosts are alike (remote.py)
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from typing import Any

from .. import _core, checks, credentials, keywords
from ..backoff import Backoff
from ..errors import NodeStartError
from . import Machine, NodeRequest, Provider, known_hosts, openssh
from .identities import identities
from .known_hosts import Known
from .openssh import Config
from .remote import RemoteMachine, checked_python

log = logging.getLogger("skyward_lite")

FIRST_PAUSE_SECONDS = 0.25
"""Pause before the second attempt to connect to a server that hung up; each further pause is twice as long."""
MAX_PAUSES = 5
"""The number of further attempts."""


@keywords.explained("Host")
@dataclasses.dataclass(frozen=True)
class Host:
    """A host of `SSH()` that differs from the others.

    Parameters
    ----------
    address : str
        As for `ssh`: "name", "user@name", "name:port" or "[address]:port".
    concurrency : int, optional
        Tasks that run on it at once; None, the default, for `Worker(concurrency=)`.
    python : str or path, optional
        An interpreter there that is used as it is; None, the default, for `SSH(python=)`.

    Examples
    --------
    >>> sky.SSH("me@lab1", sky.Host("gpu:2222", concurrency=2))
    SSH('me@lab1', 'gpu:2222')
    """

    address: str
    concurrency: int | None = None
    python: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.address, str):
            checks.wrong("Host", "address", self.address, "a host is a text", '"me@lab1" or "lab2:2222"')
        user, _, place = self.address.rpartition("@")
        name, colon, _ = user.removeprefix("ssh://").partition(":")
        if colon:
            shown = f"{name}:{credentials.MASKED}@{place}"
            raise ValueError(f"SSH({shown!r}): no password is used, set up a key with `ssh-copy-id {name}@{place}`")
        openssh.parse(self.address)
        if _core.printable(self.address, lines=False) != self.address:
            raise ValueError(f"Host({self.address!r}): its name has characters that cannot be seen")
        object.__setattr__(self, "python", checked_python("Host", self.python))
        if self.concurrency is not None:
            name, otherwise = f"{self.address!r}, concurrency", "None for Worker(concurrency=)"
            slots = checks.whole("Host", name, self.concurrency, 1, checks.MAX_CONCURRENCY, otherwise)
            object.__setattr__(self, "concurrency", slots)


def _flat(hosts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the hosts of `SSH(*hosts)`, which may also be given as one list."""
    if len(hosts) == 1 and isinstance(hosts[0], Iterable) and not isinstance(hosts[0], str | bytes | Mapping):
        return tuple(hosts[0])
    return hosts


@keywords.explained("SSH")
class SSH(Provider):
    """Hosts that you can `ssh` to, with your OpenSSH configuration, keys, ssh-agent and known hosts.

    Parameters
    ----------
    *hosts : str or Host
        "name", "user@name", "name:port", "[address]:port", or `Host(...)`; or one list of these.
    accept_new : bool, default False
        Whether a host that no known_hosts file names is trusted with the key that it shows, which is then recorded, as
        by `StrictHostKeyChecking accept-new`. True takes precedence over the configuration, like an option on ssh's
        command line. A host whose key has changed is always refused.
    python : str or path, optional
        An interpreter on the hosts that is used as it is: it is verified, and nothing is installed. None, the default,
        means that each host gets an environment with what `pool(image=)` asks for.
    config : str or path, optional
        An ssh configuration file that is used instead of your own, as by `ssh -F`.

    Raises
    ------
    TypeError, ValueError
        If a host or another value cannot be used; the text names it.

    See Also
    --------
    Host : a host with a concurrency or an interpreter of its own.

    Examples
    --------
    >>> with sky.pool(sky.SSH("me@lab1", "lab2:2222")):  # doctest: +SKIP
    ...     results = Parallel(n_jobs=-1)(delayed(abs)(i) for i in range(100))
    """

    def __init__(
        self,
        *hosts: str | Host | Iterable[str | Host],
        accept_new: bool = False,
        python: str | os.PathLike[str] | None = None,
        config: str | os.PathLike[str] | None = None,
    ) -> None:
        given = _flat(hosts)
        if not given:
            raise ValueError('SSH() without hosts: name them, as in SSH("me@lab1", "lab2")')
        for host in given:
            if not isinstance(host, str | Host):
                raise TypeError(
                    f"SSH({checks.shown(host)}): each host is a text or a sky.Host, and all may be in one list, as in "
                    'SSH("me@lab1", "lab2") or SSH(["me@lab1", "lab2"])'
                )
        self.hosts = tuple(host if isinstance(host, Host) else Host(host) for host in given)
        twice = {host.address for host in self.hosts if [h.address for h in self.hosts].count(host.address) > 1}
        if twice:
            raise ValueError(f"SSH() names a host twice: {', '.join(sorted(twice))}. Use Host(..., concurrency=)")
        self.accept_new = checks.switch("SSH", "accept_new", accept_new)
        self.python = checked_python("SSH", python)
        self.config = None if config is None else checks.path("SSH", "config", config, '"~/.ssh/lab_config"')
        self.nodes = len(self.hosts)

    def __repr__(self) -> str:
        return f"SSH({', '.join(repr(host.address) for host in self.hosts)})"

    def start(self, wanted: NodeRequest, machines: list[Machine]) -> None:
        machines.extend(SSHMachine(host, self, wanted) for host in self.hosts[: wanted.nodes])

    def stop(self, machines: list[Machine], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for machine in machines:
            assert isinstance(machine, SSHMachine)
            machine.end(deadline)


class SSHMachine(RemoteMachine):
    """A host, on its way to being a node."""

    returns = True

    def __init__(self, host: Host, provider: SSH, wanted: NodeRequest) -> None:
        super().__init__(host.address, wanted, host.python or provider.python)
        self.concurrency = host.concurrency
        self.accept_new = provider.accept_new
        self.config = provider.config
        self.proxy: subprocess.Popen[bytes] | None = None
        self._configuration_logged = False
        """Whether the log has what is to be said of the host's configuration: not for each connection anew."""
        self._recorded_key = ""
        """The new key that was recorded last. A file that keeps nothing, as /dev/null, gets it once."""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `end`)
        """Receives what the proxy command prints."""

    # ------------------------------------------------------------------------------------------------ connection

    def connect(self, core: _core.Core) -> _core.Connection:
        config = openssh.resolve(openssh.parse(self.name), self.config)
        if not self._configuration_logged:
            self._configuration_logged = True
            if config.unsupported:
                log.info("%s: ssh's options %s are set and not applied", self.name, ", ".join(config.unsupported))
            for sentence in openssh.warnings_of(config, self.name):
                log.warning("%s", sentence)
        return self.connect_to(core, config)

    def connect_to(self, core: _core.Core, config: Config) -> _core.Connection:
        """Connect as the configuration says. Raises `NodeStartError`."""
        if not config.public_keys:
            raise NodeStartError(
                f"the ssh configuration turns public keys off for {self.name} (PubkeyAuthentication or "
                "PreferredAuthentications), and skyward_lite knows no other way to prove who you are: allow them for it"
            )
        known = known_hosts.known(config)
        trust = known_hosts.trust(config, known, self.accept_new)
        connection = self._connect(core, config, known, trust)
        if openssh.too_short(config, connection.host_key):
            raise known_hosts.short_key(config)
        if not known.keys and connection.host_key not in (*known.portless, self._recorded_key):
            self._recorded_key = connection.host_key
            try:
                file = known_hosts.record(config, connection.host_key)
                log.warning("%s: its new key was added to %s: %s", self.name, file, connection.host_key)
            except OSError as error:
                log.warning("%s: its new key %s could not be recorded: %s", self.name, connection.host_key, error)
        return connection

    def _connect(self, core: _core.Core, config: Config, known: Known, trust: known_hosts.Trust) -> _core.Connection:
        """Connect, as often as the server hangs up because too many are connecting. Raises `NodeStartError`."""
        # With jitter: a server may have hung up on many connections at once, which are not to come back at once.
        backoff = Backoff(FIRST_PAUSE_SECONDS, factor=2.0, jitter=(0.5, 1.5), most=MAX_PAUSES)
        while True:
            try:
                return core.connect(
                    endpoint=self.endpoint(config),
                    user=config.user,
                    host_keys=list(trust.host_keys),
                    revoked=list(known.revoked),
                    accept_new=trust.accept_new,
                    identities=identities(config),
                    timeout=config.connect_timeout or self.wanted.connect_timeout,
                    algorithms={**config.algorithms, "host_key": list(trust.algorithms)},
                    rekey=config.rekey,
                )
            except _core.CoreError as error:
                why = self._explain(error, config, known, trust)
                if not self._is_overloaded(error, config) or not backoff.pause():
                    raise NodeStartError(why) from error

    def _is_overloaded(self, error: _core.CoreError, config: Config) -> bool:
        """Return whether the server may have hung up because too many were connecting at once (MaxStartups).

        It hangs up in the same way on an address that it penalizes (PerSourcePenalties), but for longer.
        """
        if not isinstance(error, _core.HungUpError):
            return False
        # A proxy command may have ended for a reason of its own.
        return config.proxy is None or "kex_exchange_identification" in self._printed()

    def _printed(self) -> str:
        """Return what the proxy command printed, fit to be shown."""
        if self.log.closed:
            return ""  # the pool is being closed
        self.log.seek(0)
        return _core.printable(self.log.read(4096).strip())

    def endpoint(self, config: Config) -> int | tuple[str, int]:
        """Return what `connect` takes: a socket that leads to the host, or its name and port."""
        return (config.hostname, config.port) if config.proxy is None else self.open_proxy(config.proxy)

    def open_proxy(self, command: str) -> int:
        """Start the command that leads to the host, in the place of an earlier one. Return the socket to it."""
        self._end_proxy(0.0)
        # What an earlier one has printed says nothing about this connection.
        self.log.truncate(0)
        self.log.seek(0)
        ours, theirs = socket.socketpair()
        with theirs:
            self.proxy = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=self.log.fileno(),
                process_group=0,
            )
        return ours.detach()

    def _explain(self, error: _core.CoreError, config: Config, known: Known, trust: known_hosts.Trust) -> str:
        """Return why a connection failed, and what to do."""
        text = str(error)
        files = " or ".join(config.known_hosts) or "any known_hosts file"
        if isinstance(error, _core.RevokedHostKeyError):
            return f"{text} in {files}: the host must get another key, and nothing here is to be done"
        if isinstance(error, _core.HostKeyError) and known.keys:
            chosen = "" if config.known_first else ". HostKeyAlgorithms decides which of its keys the host shows"
            return (
                f"{text}. Either somebody is between here and {config.key_name}, or its key has changed: if you know "
                f"that it has, `ssh-keygen -R '{config.key_name}'` forgets the old one{chosen}"
            )
        if isinstance(error, _core.HostKeyError) and not trust.accept_new:
            unreadable = f" (not readable: {', '.join(known.unreadable)})" if known.unreadable else ""
            return (
                f"{config.key_name} is not in {files}{unreadable}, so it is not trusted; {text}. "
                f"Compare and accept its key with `ssh {self.name}`, or use SSH(..., accept_new=True)"
            )
        if isinstance(error, _core.AuthenticationError):
            return f"{text}. If `ssh {self.name}` asks for a password: set up a key with `ssh-copy-id`"
        if isinstance(error, _core.HungUpError) and config.proxy is None:
            return (
                f"{text}. It may have too many connections (MaxStartups), refuse this address for a while after "
                "failed logins (PerSourcePenalties), or be no SSH server"
            )
        if isinstance(error, _core.UnreachableError) and config.proxy is None:
            return f"{text}. Does `ssh {self.name}` reach it? `python -m skyward_lite check {self.name}` finds out more"
        printed = self._printed()
        return f"{text}; the proxy command printed: {credentials.mask(printed)}" if printed else text

    def end(self, deadline: float) -> None:
        """End the proxy command, which ends by itself with its connection, by force after the deadline."""
        self._end_proxy(deadline - time.monotonic())
        self.log.close()

    def _end_proxy(self, patience: float) -> None:
        if self.proxy is not None:
            try:
                self.proxy.wait(max(0.0, patience))
            except subprocess.TimeoutExpired:
                os.killpg(self.proxy.pid, signal.SIGKILL)
                self.proxy.wait()
