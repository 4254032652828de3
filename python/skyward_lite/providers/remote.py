"""What a host of any provider needs before its agent starts, once it is connected to: the environment of the image.

open                       on the host's own thread
  connect                    the provider's: verify its key, prove who we are
  probe → build              the environment: found, or made once (host_environment.py); or `python` verified as it is
                           → the commands that start the agent, and reach it again
reconnect                  on a thread of its own, after a cut: connect, and nothing else
"""

from __future__ import annotations

import abc
import logging
import os

from .. import _core, checks
from ..environment import build, bundle, probe, scripts
from ..errors import NodeStartError
from . import Machine, NodeRequest, PreparedMachine
from .host_environment import HostEnvironment

log = logging.getLogger("skyward_lite")


def checked_python(owner: str, path: object) -> str | None:
    """Return an interpreter's path on a host. Raise `ValueError` for a path that a program would take for an option."""
    path = os.fspath(path) if isinstance(path, os.PathLike) else path
    if path is None:
        return None
    if not isinstance(path, str) or not path or path.startswith("-") or not path.isprintable():
        raise (ValueError if isinstance(path, str) else TypeError)(
            f"{owner}(python={checks.shown(path)}): the path of an interpreter on the hosts is needed, as in "
            'python="/opt/python/bin/python3"'
        )
    return path


class RemoteMachine(Machine):
    """A host with a shell, on its way to being a node."""

    prelude = b""
    """The head of a script that takes long."""
    reattaches = True
    """Whether its agent outlives a connection, so that a session that was cut goes on over another one."""
    stripes = True
    """Whether further channels of a connection make it faster."""

    def __init__(self, name: str, wanted: NodeRequest, python: str | None = None) -> None:
        self.key = os.urandom(8).hex()
        """Names this node's agent on the host: see `node/attach.py`."""
        self.name = name
        self.wanted = wanted
        self.python = python
        self.interpreter = ""
        """The interpreter on the host with which its agent was started; "" before."""

    @abc.abstractmethod
    def connect(self, core: _core.Core) -> _core.Connection:
        """Connect to the host, verify its key and authenticate. Raises `NodeStartError`."""

    def install_python(self, connection: _core.Connection, facts: probe.Facts) -> probe.Facts:
        """Install what making an environment needs, on hosts that are ours; return what the host has then."""
        return facts

    def agent_options(self) -> tuple[str, ...]:
        """Return the agent's own arguments. Called when the environment is there, before the agent is started."""
        return ()

    def open(self, core: _core.Core) -> PreparedMachine:
        self.doing = "connecting"
        connection = self.connect(core)
        self.doing = "looking at the host"
        python, command = self.choose_python(connection)
        self.interpreter = python
        options = self.agent_options()
        if not self.reattaches:
            return PreparedMachine(connection, command(python, *build.STDIO, *options))
        new, again = (command(python, *build.ATTACH, self.key, how, *options) for how in ("new", "again"))
        return PreparedMachine(connection, new, again, command(python, *build.STRIPE) if self.stripes else None)

    def choose_python(self, connection: _core.Connection) -> tuple[str, build.Command]:
        """Return the interpreter for the agent, and what makes the command that starts it. Raises `NodeStartError`."""
        if self.python is None:
            return self._environment(connection), build.command
        return self.verify_python(connection, self.python), build.plain_command

    def set_doing(self, doing: str) -> None:
        self.doing = doing

    def reconnect(self, core: _core.Core) -> _core.Connection:
        return self.connect(core)

    def run_script(self, connection: _core.Connection, script: bytes, bound: float) -> scripts.ScriptResult:
        """Run one of our scripts, for `bound` seconds at most; the image's secrets are masked in what it printed."""
        return scripts.run(connection, script, bound, self.wanted.image.secrets())

    def probe_host(self, connection: _core.Connection, env: str) -> probe.Facts:
        """Return what the host has, and whether it has this environment."""
        script = probe.probe_script(env, self.wanted.image.python)
        report, status, printed = self.run_script(connection, script, probe.PROBE_SECONDS)
        if status:
            raise NodeStartError(f"the script that looks at it ended with status {status}: {printed or 'no reason'}")
        return probe.read_facts(report)

    def verify_python(self, connection: _core.Connection, python: str) -> str:
        """Return the path of an interpreter that is used as it is. Raises `NodeStartError` if it lacks anything."""
        script = probe.verify_script(python, self.wanted.image)
        return probe.verified(python, self.run_script(connection, script, probe.VERIFY_SECONDS))

    def _environment(self, connection: _core.Connection) -> str:
        """Return the interpreter of the image's environment, which is made if it is not there."""
        env = bundle.environment_name(self.wanted.image)
        facts = self.probe_host(connection, env)
        if facts.ready:
            python = probe.interpreter(facts, env)
            log.info("%s: the environment is there: %s", self.name, python)
            return python
        if facts.system != "Linux":
            raise NodeStartError(f"it runs {facts.system or 'an unknown system'}: nodes run Linux")
        facts = self.install_python(connection, facts)
        probe.check_room(facts)
        if probe.UNSAFE in facts.why:
            why = f"{facts.why} {probe.remedy(facts)}"
            log.warning("%s: its environment is made in %s, because%s", self.name, facts.root, why)
        HostEnvironment(connection, self.name, facts, self.wanted.image, self.prelude, tell=self.set_doing).make(env)
        return probe.interpreter(facts, env)
