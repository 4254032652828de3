"""`Exec("kubectl exec -i {node} -- sh -c", nodes)`: nodes behind any command that ends in a shell.

connect    on the machine's own thread
  command    nothing is started yet: each script, and the agent, is a process of the command of its own
  check      once: all bytes come back as they were sent (environment/byte_check.py)
           → a connection; from then on it is as any other host (remote.py)
"""

from __future__ import annotations

import abc
import os
import shlex
from collections.abc import Iterable

from .. import _core, checks, keywords
from ..environment import byte_check, scripts
from . import Machine, MachineGoneError, NodeRequest, Provider
from .remote import RemoteMachine, checked_python

NODE = "{node}"
"""Stands for a node's name in the words of a command."""
SHELL_SYNTAX = frozenset({"|", "||", "&", "&&", ";", "<", ">", ">>", "2>", "2>&1"})
"""Words that only a shell would understand."""
_LOOK = 'if [ -x "$1" ]; then echo there; else echo gone; fi;'
"""Tells whether a program is there."""


class CommandMachine(RemoteMachine):
    """A machine that is reached by a command, whose standard input and output are those of a shell there."""

    stripes = False
    environment: dict[str, str] | None = None
    """The command's environment variables; None for this process's own."""
    is_checked = False
    """Whether the command is known to pass bytes on unchanged."""

    @abc.abstractmethod
    def argv(self) -> list[str]:
        """Return the words of the command, without the shell's command line that is added as the last one."""

    def connect(self, core: _core.Core) -> _core.Connection:
        connection = core.command(self.argv(), None if self.environment is None else dict(self.environment))
        if not self.is_checked:
            byte_check.check(connection, self.wanted.connect_timeout)
            self.is_checked = True
        return connection


@keywords.explained("Exec")
class Exec(Provider):
    """Machines and containers that a command reaches: `docker exec`, `kubectl exec`, a batch system's way to its nodes.

    A shell's command line is added to the command as its last word, so the command ends with a program that takes one,
    such as `sh -c`. No port is opened, and nothing is installed but what `pool(image=)` asks for. Whatever cuts the
    command's connection costs nothing as long as the command can be run again.

    Parameters
    ----------
    command : str
        The command, in which `{node}` stands for a node's name. It is split into words as a shell does it, and no
        shell reads it: variables, pipes and the like need a `sh -c '...'` of your own around it. It must pass its
        standard input on (`-i`), and ask for no terminal (no `-t`).
    nodes : list of str
        The names of the nodes.
    python : str or path, optional
        An interpreter on the nodes that is used as it is: it is verified, and nothing is installed. None, the default,
        means that each node gets an environment with what `pool(image=)` asks for.

    Raises
    ------
    TypeError, ValueError
        If the command or another value cannot be used; the text names it.

    See Also
    --------
    SSH : hosts that `ssh` reaches, with further connections for large data.

    Examples
    --------
    Containers that run, and the pods of a StatefulSet:

    >>> sky.Exec("docker exec -i {node} sh -c", nodes=["a", "b"], python="/usr/local/bin/python")
    Exec('docker exec -i {node} sh -c', nodes=['a', 'b'])
    >>> sky.Exec("kubectl exec -i {node} -- sh -c", nodes=[f"worker-{n}" for n in range(8)])  # doctest: +ELLIPSIS
    Exec('kubectl exec -i {node} -- sh -c', nodes=['worker-0', 'worker-1', ...])

    The hosts of an LSF job, from within the job, and hosts behind an `ssh` of your own:

    >>> sky.Exec("blaunch -no-shell {node} sh -c", nodes=["host1"])
    Exec('blaunch -no-shell {node} sh -c', nodes=['host1'])
    >>> sky.Exec("ssh -T {node}", nodes=["host1", "host2"])
    Exec('ssh -T {node}', nodes=['host1', 'host2'])
    """

    def __init__(self, command: str, nodes: Iterable[str], *, python: str | os.PathLike[str] | None = None) -> None:
        self.words = _words(command)
        self.command = command
        self.names = _names(nodes)
        if len(self.names) > 1 and not any(NODE in word for word in self.words):
            raise ValueError(
                f"Exec({checks.shown(command)}): with {len(self.names)} nodes, {NODE} says where the name of each of "
                f'them stands, as in "docker exec -i {NODE} sh -c"'
            )
        self.python = checked_python("Exec", python)
        self.nodes = len(self.names)

    def __repr__(self) -> str:
        return f"Exec({checks.shown(self.command)}, nodes={checks.shown(list(self.names))})"

    def start(self, wanted: NodeRequest, machines: list[Machine]) -> None:
        machines.extend(ExecMachine(name, self, wanted) for name in self.names[: wanted.nodes])

    def stop(self, machines: list[Machine], timeout: float) -> None:
        pass  # the processes of the command end with the pool's connections


class ExecMachine(CommandMachine):
    """A node of `Exec`, on its way to being one."""

    returns = True

    def __init__(self, name: str, provider: Exec, wanted: NodeRequest) -> None:
        super().__init__(name, wanted, provider.python)
        self.words = [word.replace(NODE, name) for word in provider.words]

    def argv(self) -> list[str]:
        return self.words

    def reconnect(self, core: _core.Core) -> _core.Connection:
        connection = super().reconnect(core)
        # A container or pod of the same name that was made anew has neither the environment nor the agent.
        look = scripts.run_command(
            connection, _LOOK, self.interpreter, bound=self.wanted.connect_timeout, secrets=self.wanted.image.secrets()
        )
        if look.stdout.strip() == b"gone":
            raise MachineGoneError(f"{self.interpreter} is not there any more: it was made anew, or cleaned")
        return connection

    def agent_options(self) -> tuple[str, ...]:
        # What ends a container or a job sends its processes SIGTERM, and some time later SIGKILL.
        return ("--announce",)


def _words(command: object) -> list[str]:
    """Return the words of a command. Raise `TypeError` or `ValueError` if it is none."""
    example = f'"docker exec -i {NODE} sh -c"'
    if isinstance(command, list | tuple) and command and all(isinstance(word, str) for word in command):
        raise TypeError(
            f"Exec(command={checks.shown(command)}): the command is one text: write {checks.shown(shlex.join(command))}"
        )
    text = checks.text("Exec", "command", command, example)
    shown = f"Exec(command={checks.shown(text)})"
    if "\0" in text:
        raise ValueError(f"{shown}: no command can have a null character")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{shown}: {error}: a quotation mark or a backslash has no counterpart") from None
    syntax = SHELL_SYNTAX.intersection(words)
    if syntax or not words or not words[0]:
        found = f"no shell reads it, so {' '.join(sorted(syntax))} has no meaning in it" if syntax else "it is empty"
        raise ValueError(f"{shown}: {found}; write a program and its arguments, as in {example}")
    return words


def _names(nodes: object) -> tuple[str, ...]:
    """Return the names of the nodes. Raise `TypeError` or `ValueError` if they are none."""
    example = '["worker-0", "worker-1"]'
    names = checks.texts("Exec", "nodes", nodes, example)
    if not names:
        raise ValueError(f"Exec(nodes=[]): name the nodes, as in nodes={example}")
    for name in names:
        if not name.strip() or name.startswith("-") or _core.printable(name, lines=False) != name:
            why = (
                "a program would take it for an option"
                if name.startswith("-")
                else "it has characters that cannot be seen"
                if name.strip()
                else "it is empty"
            )
            raise ValueError(f"Exec(nodes=[{checks.shown(name)}]): this cannot be a node's name: {why}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Exec(nodes=...) names a node twice: {', '.join(twice)}. For more tasks at once on a node there is "
            "pool(worker=sky.Worker(concurrency=...))"
        )
    return names
