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

from .. import _core, credentials
from ..environment import build as bootstrap
from ..errors import NodeStartError
from . import Machine, NodeRequest, PreparedMachine

log = logging.getLogger("skyward_lite")

UPLOAD_SECONDS = 600.0
"""Bound on sending one file to a host."""


class RemoteMachine(Machine):
    """A host behind an SSH server, on its way to being a node."""

    prelude = ""
    """At the head of scripts that take long."""
    agent = "stdio"
    """How the agent is started there: its arguments."""

    def __init__(self, name: str, wanted: NodeRequest, python: str | None = None) -> None:
        self.name = name
        self.wanted = wanted
        self.python = python

    @abc.abstractmethod
    def connect(self, core: _core.Core) -> _core.Connection:
        """Connect to the host, verify its key and authenticate. Raises `NodeStartError`."""

    def furnish(self, connection: _core.Connection, facts: bootstrap.Facts) -> bootstrap.Facts:
        """Get what making an environment needs, where that is ours to do; what the host has then."""
        return facts

    def open(self, core: _core.Core) -> PreparedMachine:
        connection = self.connect(core)
        if self.python is None:
            return PreparedMachine(connection, bootstrap.agent(self._environment(connection), self.agent))
        python = self._verified(connection, self.python)
        return PreparedMachine(connection, f"exec {shlex.quote(python)} -P -m skyward_lite.node.agent {self.agent}")

    def _run(self, connection: _core.Connection, script: bytes, bound: float) -> tuple[dict[str, list[str]], int, str]:
        """Run one of our scripts: what it said, its exit status and its standard error."""
        status, stdout, stderr = connection.run(bootstrap.COMMAND, script, bound)
        said = bootstrap.said(stdout)
        printed = self._shown(stderr)
        if said is None:
            seen = self._shown(b"\n".join((stdout, stderr)), 1000)
            raise NodeStartError(
                f"`{bootstrap.COMMAND}` does not run there (status {status}): the server may force a command of its "
                f"own (ForceCommand), or the account has no shell. It printed: {seen or 'nothing'}"
            )
        return said, 255 if status is None else status, printed

    def _shown(self, printed: bytes, limit: int = 4000) -> str:
        """Return what a host printed as it may be shown: without credentials, and harmless to a terminal or a log."""
        # Masked before anything is cut off: half a URL would not be known for one.
        text = credentials.mask(printed.decode(errors="backslashreplace").strip(), self.wanted.image.secrets())
        return _core.printable(text, limit)

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
        if facts.ready:
            python = bootstrap.interpreter(facts, env)
            log.info("%s: the environment is there: %s", self.name, python)
            return python
        if facts.system != "Linux":
            raise NodeStartError(f"it runs {facts.system or 'an unknown system'}: nodes run Linux")
        facts = self.furnish(connection, facts)
        bootstrap.check_room(facts)
        if bootstrap.UNSAFE_TEXT in facts.why:
            why = f"{facts.why} {bootstrap.remedy(facts)}"
            log.warning("%s: its environment is made in %s, because%s", self.name, facts.root, why)
        began = time.monotonic()
        listed = ", ".join(image.masked_pip()) or "nothing beside skyward_lite"
        log.info("%s: making its environment in %s: %s", self.name, facts.root, listed)
        uploads = {}
        for kind, name, data in bootstrap.files(facts, image):
            uploads[kind] = self._upload(connection, facts.root, name, data)
        # Not in a variable: the script has the credentials, and what reports errors may show variables.
        said, status, printed = self._run(
            connection, self.prelude.encode() + bootstrap.build(facts, image, env, uploads), bootstrap.BUILD_SECONDS
        )
        if status:
            failed = credentials.mask(said.get("failed", [""])[0].partition(" ")[2])
            # Which requirements they were is in a file that is gone.
            asked = f" for {', '.join(image.masked_pip())}" if failed.endswith("/requirements") else ""
            raise NodeStartError(
                f"its environment could not be made: {f'`{failed}`' if failed else 'the script'}{asked} ended with "
                f"status {status}:\n  | {printed}"
            )
        for line in said.get("gone", []):
            log.info("%s: removed what nothing had used for a long time: %s", self.name, line.split(" ", 2)[-1])
        log.info("%s: its environment took %.1f s", self.name, time.monotonic() - began)
        return bootstrap.interpreter(facts, env)

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
            f'whole() {{ [ -f "$1" ] && [ $(wc -c <"$1") -eq {len(data)} ]; }}; '
            # The time of the directory tells when it was last used.
            'if whole "$to"; then touch . 2>/dev/null; exit 0; fi; '
            'cat >"$new" && whole "$new" && mv "$new" "$to" && exit 0; rm -f "$new"; exit 1'
        )
        status, _, stderr = connection.run(f"sh -c {shlex.quote(script)}", data, UPLOAD_SECONDS)
        if status:
            raise NodeStartError(f"{path} could not be written there: {self._shown(stderr)}")
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
