"""`SSH("me@lab1", "lab2:2222")`: hosts that you can already `ssh` to.

open                       on the host's own thread:
  resolve → known            what OpenSSH's tools say of the host
  connect                    verify its key, prove who we are
  probe → build              the environment: found, or made once
                           → the command that starts the agent
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import random
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from .. import _core, bootstrap
from ..errors import NodeStartError
from . import Machine, Opened, Provider, Wanted, openssh

log = logging.getLogger("skyward_lite")

UPLOAD_SECONDS = 600.0
"""Bound on sending one file to a host."""

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
        openssh.parse(self.address)
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(f"Host({self.address!r}, concurrency={self.concurrency}): at least 1, or None")


class SSH(Provider):
    """Hosts that you can `ssh` to, with the user's OpenSSH configuration, keys, agent and known hosts.

    `hosts`: "name", "user@name", "name:port", "[address]:port", or `Host(...)`.
    `accept_new`: whether a host that no known_hosts file names is trusted with the key that it shows, which is then
    recorded, as `StrictHostKeyChecking accept-new` does. A host whose key has changed is refused always.
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
        self.accept_new = accept_new
        self.python = python
        self.config = config
        self.nodes = len(self.hosts)

    def __repr__(self) -> str:
        return f"SSH({', '.join(repr(host.address) for host in self.hosts)})"

    def start(self, wanted: Wanted, machines: list[Machine]) -> None:
        machines.extend(SSHMachine(host, self, wanted) for host in self.hosts[: wanted.nodes])

    def stop(self, machines: list[Machine], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for machine in machines:
            assert isinstance(machine, SSHMachine)
            machine.end(deadline)


class SSHMachine(Machine):
    """A host, on its way to being a node."""

    def __init__(self, host: Host, provider: SSH, wanted: Wanted) -> None:
        self.name = host.address
        self.concurrency = host.concurrency
        self.python = host.python or provider.python
        self.accept_new = provider.accept_new
        self.config = provider.config
        self.wanted = wanted
        self.proxy: subprocess.Popen[bytes] | None = None
        self.waits = list(WAITS)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `end`)
        """What the proxy command printed."""

    def open(self, core: _core.Pool) -> Opened:
        connection = self.connect(core)
        python = self._environment(connection) if self.python is None else self._verified(connection, self.python)
        return Opened(connection, f"exec {shlex.quote(python)} -P -m skyward_lite.agent stdio")

    # ------------------------------------------------------------------------------------------------ connection

    def connect(self, core: _core.Pool) -> _core.Connection:
        """Connect to the host, verify its key and authenticate. Raises `NodeStartError`."""
        config = openssh.resolve(openssh.parse(self.name), self.config)
        if config.unheeded:
            log.info("%s: ssh's options %s are set and not heeded", self.name, ", ".join(config.unheeded))
        return self.connect_to(core, config)

    def connect_to(self, core: _core.Pool, config: openssh.Config) -> _core.Connection:
        """Connect as the configuration says. Raises `NodeStartError`."""
        known = openssh.known(config)
        accept_new = self.accept_new or config.strict in ("accept-new", "false")
        if known.authorities and not (known.keys or known.portless):
            raise NodeStartError(
                f"{config.key_name} is known only by a certificate authority ({', '.join(known.authorities)}), and "
                f"host certificates are not supported: add the host's own key to {config.new_keys or 'a file'}"
            )
        if known.unreadable and accept_new and not known.keys:
            raise NodeStartError(
                f"{', '.join(known.unreadable)} cannot be read, so whether the key of {config.key_name} is new is "
                "unknown, and it is not accepted: make the file readable"
            )
        timeout = config.connect_timeout or self.wanted.connect_timeout
        connection = None
        while connection is None:
            try:
                connection = core.connect(
                    endpoint=self._endpoint(config),
                    user=config.user,
                    # Where any new key will do, the host shall show the one that it likes best.
                    host_keys=list(known.keys or (() if accept_new else known.portless)),
                    revoked=list(known.revoked),
                    accept_new=accept_new,
                    identities=_identities(config),
                    timeout=timeout,
                )
            except _core.CoreError as error:
                why = self._why(error, config, known, accept_new)
                if not self._again(error, config):
                    raise NodeStartError(why) from error
        if not known.keys and connection.host_key not in known.portless:
            try:
                file = openssh.record(config, connection.host_key)
                log.warning("%s: its new key was added to %s: %s", self.name, file, connection.host_key)
            except OSError as error:
                log.warning("%s: its new key %s could not be recorded: %s", self.name, connection.host_key, error)
        return connection

    def _again(self, error: _core.CoreError, config: openssh.Config) -> bool:
        """Say whether to try once more, after a while: only if too many were connecting at once (MaxStartups).

        A server then hangs up at once, as one does whose PerSourcePenalties we have met; those end less soon.
        """
        if error.args[-1] != "hung up" or not self.waits:
            return False
        if config.proxy is not None and "kex_exchange_identification" not in self._printed():
            return False  # not the server's doing
        self._let_go(0.0)
        # Others were turned away in the same moment, and shall not all come back in the same one.
        time.sleep(self.waits.pop(0) * random.uniform(0.5, 1.5))
        return True

    def _printed(self) -> str:
        """Give what the proxy command printed."""
        self.log.seek(0)
        return self.log.read(4096).decode(errors="replace").strip()

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
        text, about = str(error.args[0]), error.args[1] if len(error.args) > 1 else ""
        files = " or ".join(config.known_hosts) or "any known_hosts file"
        if about == "host key" and "is revoked" in text:
            return f"{text} in {files}: the host must get another key, and nothing here is to be done"
        if about == "host key" and known.keys:
            return (
                f"{text}. Either somebody is between here and {config.key_name}, or its key has changed: if you know "
                f"that it has, `ssh-keygen -R '{config.key_name}'` forgets the old one"
            )
        if about == "host key" and not accept_new:
            unreadable = f" (not readable: {', '.join(known.unreadable)})" if known.unreadable else ""
            return (
                f"{config.key_name} is not in {files}{unreadable}, so it is not trusted; {text}. "
                f"Compare and accept its key with `ssh {self.name}`, or use SSH(..., accept_new=True)"
            )
        if about == "authentication":
            return f"{text}. If `ssh {self.name}` asks for a password: set up a key with `ssh-copy-id`"
        if about == "hung up" and config.proxy is None:
            return (
                f"{text}. It may have too many connections (MaxStartups), refuse this address for a while after "
                "failed logins (PerSourcePenalties), or be no SSH server"
            )
        printed = self._printed()
        return f"{text}; the proxy command printed: {printed}" if printed else text

    # ------------------------------------------------------------------------------------------------ environment

    def _run(self, connection: _core.Connection, script: bytes, bound: float) -> tuple[dict[str, list[str]], int, str]:
        """Run one of our scripts: what it said, its exit status and its standard error."""
        status, stdout, stderr = connection.run(bootstrap.COMMAND, script, bound)
        said = bootstrap.said(stdout)
        printed = stderr.decode(errors="replace").strip()
        if said is None:
            seen = (stdout.decode(errors="replace") + printed).strip()[:1000]
            raise NodeStartError(
                f"`{bootstrap.COMMAND}` does not run there (status {status}): the server may force a command of its "
                f"own (ForceCommand), or the account has no shell. It printed: {seen or 'nothing'}"
            )
        return said, 255 if status is None else status, printed

    def _environment(self, connection: _core.Connection) -> str:
        """Find or make the image's environment; its interpreter."""
        image = self.wanted.image
        env = bootstrap.name(image)
        said, _, _ = self._run(connection, bootstrap.probe(env), bootstrap.PROBE_SECONDS)
        facts = bootstrap.facts(said)
        python = bootstrap.interpreter(facts, env)
        if facts.ready:
            log.info("%s: the environment is there: %s", self.name, python)
            return python
        if facts.system != "Linux":
            raise NodeStartError(f"it runs {facts.system or 'an unknown system'}: nodes run Linux")
        began = time.monotonic()
        log.info("%s: making its environment: %s", self.name, ", ".join(image.pip) or "nothing beside skyward_lite")
        uploads = {}
        for kind, name, data in bootstrap.files(facts, image):
            uploads[kind] = self._upload(connection, facts.root, name, data)
        script = bootstrap.build(facts, image, env, uploads)
        said, status, printed = self._run(connection, script, bootstrap.BUILD_SECONDS)
        if status:
            failed = said.get("failed", [""])[0].partition(" ")[2]
            raise NodeStartError(
                f"its environment could not be made: {f'`{failed}`' if failed else 'the script'} ended with status "
                f"{status}:\n{printed[-2000:]}"
            )
        log.info("%s: its environment took %.1f s", self.name, time.monotonic() - began)
        return python

    def _upload(self, connection: _core.Connection, root: str, name: str, data: bytes) -> str:
        """Send a file, unless the host has it; where it is there."""
        # The name stays what it is: pip reads a wheel's.
        directory = f"{root}/sent-{hashlib.sha256(data).hexdigest()[:16]}"
        path = f"{directory}/{name}"
        script = (
            f"umask 077; mkdir -p {shlex.quote(directory)} && cd {shlex.quote(directory)} || exit; "
            f'to={shlex.quote(name)}; test -f "$to" && exit 0; '
            'cat >"$to.$$" && mv "$to.$$" "$to" && exit 0; rm -f "$to.$$"; exit 1'
        )
        status, _, stderr = connection.run(f"sh -c {shlex.quote(script)}", data, UPLOAD_SECONDS)
        if status:
            raise NodeStartError(f"{path} could not be written there: {stderr.decode(errors='replace').strip()}")
        return path

    def _verified(self, connection: _core.Connection, python: str) -> str:
        """Check that an interpreter can be used as it is."""
        said, status, printed = self._run(connection, bootstrap.verify(python, self.wanted.image), 60.0)
        if status:
            raise NodeStartError(f"{python} cannot be used: {printed[-1000:] or f'status {status}'}")
        problems = said.get("problem", [])
        if problems:
            raise NodeStartError(
                f"{python} does not meet the image, and SSH(python=) installs nothing: {'; '.join(problems)}"
            )
        return said["python"][0]

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


def _identities(config: openssh.Config) -> list[str | tuple[str, str | None] | tuple[str, list[str], bool]]:
    """List what to prove with who we are, in ssh's order: the agent's keys, the wanted ones first; then the files."""
    identities: list[str | tuple[str, str | None] | tuple[str, list[str], bool]] = []
    if config.agent is not None:
        wanted = [
            key for file in config.identity_files if (key := openssh.public(file) or openssh.public(f"{file}.pub"))
        ]
        identities.append((config.agent, wanted, config.identities_only))
    for file in config.identity_files:
        if openssh.public(file) is not None:
            continue  # a public key names one of the agent's
        certificates = [c for c in config.certificates if openssh.certifies(c, file)]
        beside = f"{file}-cert.pub"
        identities.append((file, next((c for c in [*certificates, beside] if Path(c).exists()), None)))
    return identities
