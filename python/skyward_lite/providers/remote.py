"""What a host of any provider needs before its agent starts, once it is connected to: the environment of the image.

open                       on the host's own thread
  connect                    the provider's: verify its key, prove who we are
  probe → build              the environment: found, or made once; or `python` verified as it is
                           → the command that starts the agent
"""

from __future__ import annotations

import abc
import hashlib
import logging
import shlex
import time

from .. import _core, bootstrap
from ..errors import NodeStartError
from . import Machine, Opened, Wanted

log = logging.getLogger("skyward_lite")

UPLOAD_SECONDS = 600.0
"""Bound on sending one file to a host."""


class RemoteMachine(Machine):
    """A host behind an SSH server, on its way to being a node."""

    prelude = ""
    """At the head of scripts that take long."""
    agent = "stdio"
    """How the agent is started there: its arguments."""

    def __init__(self, name: str, wanted: Wanted, python: str | None = None) -> None:
        self.name = name
        self.wanted = wanted
        self.python = python

    @abc.abstractmethod
    def connect(self, core: _core.Pool) -> _core.Connection:
        """Connect to the host, verify its key and authenticate. Raises `NodeStartError`."""

    def furnish(self, connection: _core.Connection, facts: bootstrap.Facts) -> bootstrap.Facts:
        """Get what making an environment needs, where that is ours to do; what the host has then."""
        return facts

    def open(self, core: _core.Pool) -> Opened:
        connection = self.connect(core)
        python = self._environment(connection) if self.python is None else self._verified(connection, self.python)
        return Opened(connection, f"exec {shlex.quote(python)} -P -m skyward_lite.agent {self.agent}")

    def _run(self, connection: _core.Connection, script: bytes, bound: float) -> tuple[dict[str, list[str]], int, str]:
        """Run one of our scripts: what it said, its exit status and its standard error."""
        status, stdout, stderr = connection.run(bootstrap.COMMAND, script, bound)
        said = bootstrap.said(stdout)
        printed = _core.printable(stderr.strip())
        if said is None:
            seen = _core.printable(b"\n".join((stdout, stderr)).strip(), 1000)
            raise NodeStartError(
                f"`{bootstrap.COMMAND}` does not run there (status {status}): the server may force a command of its "
                f"own (ForceCommand), or the account has no shell. It printed: {seen or 'nothing'}"
            )
        return said, 255 if status is None else status, printed

    def _probe(self, connection: _core.Connection, env: str) -> bootstrap.Facts:
        """Find out what the host has, and whether it has this environment."""
        said, status, printed = self._run(connection, bootstrap.probe(env), bootstrap.PROBE_SECONDS)
        if status:
            raise NodeStartError(f"the script that looks at it ended with status {status}: {printed or 'no reason'}")
        return bootstrap.facts(said)

    def _environment(self, connection: _core.Connection) -> str:
        """Find or make the image's environment; its interpreter."""
        image = self.wanted.image
        env = bootstrap.name(image)
        facts = self._probe(connection, env)
        python = bootstrap.interpreter(facts, env)
        if facts.ready:
            log.info("%s: the environment is there: %s", self.name, python)
            return python
        if facts.system != "Linux":
            raise NodeStartError(f"it runs {facts.system or 'an unknown system'}: nodes run Linux")
        facts = self.furnish(connection, facts)
        began = time.monotonic()
        log.info("%s: making its environment: %s", self.name, ", ".join(image.pip) or "nothing beside skyward_lite")
        uploads = {}
        for kind, name, data in bootstrap.files(facts, image):
            uploads[kind] = self._upload(connection, facts.root, name, data)
        script = self.prelude.encode() + bootstrap.build(facts, image, env, uploads)
        said, status, printed = self._run(connection, script, bootstrap.BUILD_SECONDS)
        if status:
            failed = said.get("failed", [""])[0].partition(" ")[2]
            raise NodeStartError(
                f"its environment could not be made: {f'`{failed}`' if failed else 'the script'} ended with status "
                f"{status}:\n  | {printed}"
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
            # Hosts may share the directory, and have the same process ids.
            f"to={shlex.quote(name)} new=$to.$(uname -n).$$; "
            # What was cut off ends like what is complete: the size tells.
            f'whole() {{ [ -f "$1" ] && [ $(wc -c <"$1") -eq {len(data)} ]; }}; whole "$to" && exit 0; '
            'cat >"$new" && whole "$new" && mv "$new" "$to" && exit 0; rm -f "$new"; exit 1'
        )
        status, _, stderr = connection.run(f"sh -c {shlex.quote(script)}", data, UPLOAD_SECONDS)
        if status:
            raise NodeStartError(f"{path} could not be written there: {_core.printable(stderr.strip())}")
        return path

    def _verified(self, connection: _core.Connection, python: str) -> str:
        """Check that an interpreter can be used as it is."""
        said, status, printed = self._run(connection, bootstrap.verify(python, self.wanted.image), 60.0)
        if status:
            raise NodeStartError(f"{python} cannot be used: {printed or f'status {status}'}")
        problems = said.get("problem", [])
        if problems:
            raise NodeStartError(
                f"{python} does not meet the image, and SSH(python=) installs nothing: {'; '.join(problems)}"
            )
        if not said.get("python"):
            raise NodeStartError(
                f"{python} cannot be used: it did not say where it is. It printed: {printed or 'nothing'}"
            )
        return said["python"][0]
