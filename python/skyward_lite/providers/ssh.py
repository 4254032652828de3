"""`SSH("me@lab1", "lab2:2222")`: hosts that you can already `ssh` to.

connect                    on the host's own thread
  resolve → known            what OpenSSH's tools say of the host
  _endpoint                  its name and port, or the proxy command that leads to it
                           → a connection; what comes after it is every host's (remote.py)
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from .. import _core, checks, credentials
from ..errors import NodeStartError
from . import Machine, NodeRequest, Provider, openssh
from .remote import RemoteMachine

log = logging.getLogger("skyward_lite")

WAITS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Seconds before each further attempt, where a server hangs up on us."""


@dataclasses.dataclass(frozen=True)
class Host:
    """One host of `SSH()`, where it differs from the others.

    `address`: as for `ssh`: "name", "user@name", "name:port" or "[address]:port".
    `concurrency`: tasks at once on it; None for what `Worker(concurrency=)` says.
    `python`: an interpreter there that is used as it is; None for what `SSH(python=)` says.
    """

    address: str
    concurrency: int | None = None
    python: str | None = None

    def __post_init__(self) -> None:
        user, _, place = self.address.rpartition("@")
        name, colon, _ = user.removeprefix("ssh://").partition(":")
        if colon:
            shown = f"{name}:{credentials.MASKED}@{place}"
            raise ValueError(f"SSH({shown!r}): no password is used, set up a key with `ssh-copy-id {name}@{place}`")
        openssh.parse(self.address)
        if _core.printable(self.address, lines=False) != self.address:
            raise ValueError(f"Host({self.address!r}): its name has characters that cannot be seen")
        _check_python(self.python)
        if self.concurrency is not None:
            name, otherwise = f"{self.address!r}, concurrency", "None for what Worker(concurrency=) says"
            slots = checks.whole("Host", name, self.concurrency, 1, checks.MAX_CONCURRENCY, otherwise)
            object.__setattr__(self, "concurrency", slots)


def _check_python(path: str | None) -> str | None:
    """Return an interpreter's path on a host. Raise `ValueError` for what a shell would take for something else."""
    if path is not None and (not path or path.startswith("-") or not path.isprintable()):
        raise ValueError(f"SSH(python={path!r}): the path of an interpreter on the hosts")
    return path


class SSH(Provider):
    """Hosts that you can `ssh` to, with the user's OpenSSH configuration, keys, agent and known hosts.

    `hosts`: "name", "user@name", "name:port", "[address]:port", or `Host(...)`.
    `accept_new`: whether a host that no known_hosts file names is trusted with the key that it shows, which is then
    recorded, as `StrictHostKeyChecking accept-new` does. Like an option on ssh's command line it comes before what the
    configuration says. A host whose key has changed is refused always.
    `python`: an interpreter on the hosts that is used as it is: it is verified, and nothing is installed.
    `config`: an ssh configuration file that is used instead of the user's own, as by `ssh -F`.
    """

    def __init__(
        self, *hosts: str | Host, accept_new: bool = False, python: str | None = None, config: str | None = None
    ) -> None:
        if not hosts:
            raise ValueError('SSH() without hosts: name them, as in SSH("me@lab1", "lab2")')
        self.hosts = tuple(host if isinstance(host, Host) else Host(host) for host in hosts)
        twice = {host.address for host in self.hosts if [h.address for h in self.hosts].count(host.address) > 1}
        if twice:
            raise ValueError(f"SSH() names a host twice: {', '.join(sorted(twice))}. Use Host(..., concurrency=)")
        self.accept_new = checks.switch("SSH", "accept_new", accept_new)
        self.python = _check_python(python)
        self.config = config
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

    def __init__(self, host: Host, provider: SSH, wanted: NodeRequest) -> None:
        super().__init__(host.address, wanted, host.python or provider.python)
        self.concurrency = host.concurrency
        self.accept_new = provider.accept_new
        self.config = provider.config
        self.proxy: subprocess.Popen[bytes] | None = None
        self.waits = list(WAITS)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `end`)
        """What the proxy command printed."""

    # ------------------------------------------------------------------------------------------------ connection

    def connect(self, core: _core.Core) -> _core.Connection:
        """Connect to the host, verify its key and authenticate. Raises `NodeStartError`."""
        config = openssh.resolve(openssh.parse(self.name), self.config)
        if config.unheeded:
            log.info("%s: ssh's options %s are set and not heeded", self.name, ", ".join(config.unheeded))
        for sentence in openssh.warnings_of(config, self.name):
            log.warning("%s", sentence)
        return self.connect_to(core, config)

    def connect_to(self, core: _core.Core, config: openssh.Config) -> _core.Connection:
        """Connect as the configuration says. Raises `NodeStartError`."""
        if not config.public_keys:
            raise NodeStartError(
                f"the ssh configuration turns public keys off for {self.name} (PubkeyAuthentication or "
                "PreferredAuthentications), and skyward_lite knows no other way to prove who you are: allow them for it"
            )
        known = openssh.known(config)
        # ssh's own new keys need a file to be recorded in; `accept_new=True` was said here, and does not.
        accept_new = self.accept_new or (config.strict in ("accept-new", "false") and config.new_keys is not None)
        if known.authorities and not (known.keys or known.portless):
            raise NodeStartError(
                f"{config.key_name} is known only by a certificate authority ({', '.join(known.authorities)}), and "
                f"host certificates are not supported: add the host's own key to {config.new_keys or 'a file'}"
            )
        if known.others and not known.keys:
            raise NodeStartError(
                f"{config.key_name} is known only by keys of types that are not supported ({', '.join(known.others)}), "
                f"so it is not trusted: add another key of the host to {config.new_keys or 'a known_hosts file'}"
            )
        if known.unreadable and accept_new and not known.keys:
            raise NodeStartError(
                f"{', '.join(known.unreadable)} cannot be read, so whether the key of {config.key_name} is new is "
                "unknown, and it is not accepted: make the file readable"
            )
        offered = openssh.offer(config, known)
        # Where any new key will do, the host shall show the one that it likes best.
        trusted = known.keys or (() if accept_new else known.portless)
        good = [key for key in trusted if not openssh.too_short(config, key)]
        types = {openssh.HOST_KEY_ALGORITHMS[name] for name in offered}
        shown = [key for key in trusted if key.partition(" ")[0] in types]
        if shown and not set(shown) & set(good):
            raise self._short(config)
        timeout = config.connect_timeout or self.wanted.connect_timeout
        connection = None
        while connection is None:
            try:
                connection = core.connect(
                    endpoint=self._endpoint(config),
                    user=config.user,
                    host_keys=good,
                    revoked=list(known.revoked),
                    accept_new=accept_new and not known.keys,
                    identities=_identities(config),
                    timeout=timeout,
                    algorithms={**config.algorithms, "host_key": offered},
                )
            except _core.CoreError as error:
                why = self._why(error, config, known, accept_new)
                if not self._again(error, config):
                    raise NodeStartError(why) from error
        if openssh.too_short(config, connection.host_key):
            raise self._short(config)
        if not known.keys and connection.host_key not in known.portless:
            try:
                file = openssh.record(config, connection.host_key)
                log.warning("%s: its new key was added to %s: %s", self.name, file, connection.host_key)
            except OSError as error:
                log.warning("%s: its new key %s could not be recorded: %s", self.name, connection.host_key, error)
        return connection

    def _short(self, config: openssh.Config) -> NodeStartError:
        return NodeStartError(
            f"the RSA key of {config.key_name} has fewer bits than the ssh configuration asks for "
            f"(RequiredRSASize {config.rsa_bits}): the host must get a longer key, or one of another type"
        )

    def _again(self, error: _core.CoreError, config: openssh.Config) -> bool:
        """Say whether to try once more, after a while: only if too many were connecting at once (MaxStartups).

        A server then hangs up at once, as one does whose PerSourcePenalties we have met; those end less soon.
        """
        if not isinstance(error, _core.HungUpError) or not self.waits:
            return False
        if config.proxy is not None and "kex_exchange_identification" not in self._printed():
            return False  # not the server's doing
        self._let_go(0.0)
        # Others were turned away in the same moment, and shall not all come back in the same one.
        time.sleep(self.waits.pop(0) * random.uniform(0.5, 1.5))
        return True

    def _printed(self) -> str:
        """Give what the proxy command printed."""
        if self.log.closed:
            return ""  # the pool is being left
        self.log.seek(0)
        return _core.printable(self.log.read(4096).strip())

    def _endpoint(self, config: openssh.Config) -> int | tuple[str, int]:
        """Give what `connect` takes: a socket that leads to the host, or its name and port."""
        return (config.hostname, config.port) if config.proxy is None else self._through(config.proxy)

    def _through(self, command: str) -> int:
        """Start the command that leads to the host; the socket to it."""
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

    def _why(self, error: _core.CoreError, config: openssh.Config, known: openssh.Known, accept_new: bool) -> str:
        """Say what went wrong with a connection, and what to do."""
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
        if isinstance(error, _core.HostKeyError) and not accept_new:
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
        printed = self._printed()
        return f"{text}; the proxy command printed: {credentials.mask(printed)}" if printed else text

    def end(self, deadline: float) -> None:
        """Let go of the proxy command, which ends with its connection."""
        self._let_go(deadline - time.monotonic())
        self.log.close()

    def _let_go(self, patience: float) -> None:
        if self.proxy is not None:
            try:
                self.proxy.wait(max(0.0, patience))
            except subprocess.TimeoutExpired:
                os.killpg(self.proxy.pid, signal.SIGKILL)
                self.proxy.wait()


def _identities(config: openssh.Config) -> list[str | tuple[str, str | None] | tuple[str, list[str], bool, list[str]]]:
    """List what to prove with who we are, in ssh's order: the agent's keys, the wanted ones first; then the files."""
    identities: list[str | tuple[str, str | None] | tuple[str, list[str], bool, list[str]]] = []
    if config.agent is not None:
        wanted = [
            key
            for file in config.identity_files
            if (key := openssh.public(file) or openssh.public(f"{file}.pub") or openssh.public_half(file))
        ]
        certificates = [*config.certificates, *(f"{file}-cert.pub" for file in config.identity_files)]
        there = [file for file in certificates if Path(file).exists()]
        identities.append((config.agent, wanted, config.identities_only, there))
    for file in config.identity_files:
        if openssh.public(file) is not None:
            continue  # a public key names one of the agent's
        key = openssh.public_half(file) or openssh.public(f"{file}.pub")
        if key is not None and openssh.too_short(config, key):
            continue
        certificates = [c for c in config.certificates if openssh.certifies(c, file)]
        beside = f"{file}-cert.pub"
        identities.append((file, next((c for c in [*certificates, beside] if Path(c).exists()), None)))
    return identities
