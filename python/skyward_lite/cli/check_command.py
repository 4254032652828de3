"""The way to a node of `Exec()`, step by step: program → command → exit status → end of input.

The command is then measured as a pool uses it: one that runs for long, whose two ends answer each other.
"""

from __future__ import annotations

import shlex
import shutil
import threading
import time

from .. import _core
from ..errors import NodeStartError
from ..providers import Machine
from ..providers.command import CommandMachine, Exec
from . import echo, survival
from .hosts import default_request
from .inspection import Inspection
from .measure import measure_speed, milliseconds

STATUS = 7
"""The exit status that the command is to pass on; no program of its own should end with it."""
END_SECONDS = 10.0
"""Within this time the command must have noticed that what it runs has ended, and the latter that its input has."""


class CommandCheck(Inspection[CommandMachine]):
    """The steps for one node behind a command."""

    connection_remedy = "run the command in a terminal; try again"
    included = "the command's own start"
    """What takes time in a round trip beside the network."""
    ends = True
    """Whether the command ends when what it runs has ended."""

    @property
    def program(self) -> str:
        """The command as one would type it."""
        return _core.printable(shlex.join(self.machine.argv()))

    @property
    def shell_remedy(self) -> str:
        return f"look at what `{self.program} 'exec sh -s'` does"

    def way_in(self) -> _core.Connection | None:
        if not self._find_program():
            return None
        connection = self._connect()
        if connection is not None:
            self.ends = self._exit_status(connection)
            if self.ends:
                self._end_of_input(connection)
        return connection

    def measure(self, connection: _core.Connection) -> None:
        if self.ends:
            measure_speed(connection, self.report, self.included)
        echo.measure_echo(self.machine, self.report)

    def leave(self, connection: _core.Connection) -> survival.Left | None:
        return survival.leave_and_cut(connection)

    def find(self, left: survival.Left) -> None:
        blame = ("the command", "find out what ends them: the container's runtime, or the batch system")
        survival.find(self.machine, lambda: self.machine.connect(self.core), left, self.report, blame)

    def _find_program(self) -> bool:
        name = self.machine.argv()[0]
        variables = self.machine.environment
        path = shutil.which(name, path=None if variables is None else variables.get("PATH"))
        if path is None:
            self.report.fail("program", f"{name} is no program on the PATH", "correct its name, or install it here")
            return False
        self.report.ok("program", path, path=path)
        return True

    def _connect(self) -> _core.Connection | None:
        began = time.perf_counter()
        try:
            connection = self.machine.connect(self.core)
        except (NodeStartError, _core.CoreError) as error:
            self.report.fail("command", str(error), "")  # the error has the remedy
            return None
        took = time.perf_counter() - began
        text = f"`{self.program}` answers in {milliseconds(took)}, and passes all bytes on as they are"
        self.report.ok("command", text, first_byte_ms=took * 1000)
        return connection

    def _exit_status(self, connection: _core.Connection) -> bool:
        """Report whether the exit status is passed on. Return whether the command ends when what it runs has ended."""
        try:
            status, _, _ = connection.run(f"exit {STATUS}", b"", END_SECONDS)
        except _core.CoreError:
            self.report.note(
                "exit status",
                f"is not passed on within {END_SECONDS:.0f} s: the command does not end when what it runs has ended. "
                "Scripts say themselves that they have; what measures the command is left out here",
            )
            return False
        if status == STATUS:
            self.report.ok("exit status", "is passed on")
        else:
            self.report.note(
                "exit status",
                f"is not passed on: {STATUS} there is {status} here. Scripts print their own, "
                "so only of an agent that dies it is not known",
            )
        return True

    def _end_of_input(self, connection: _core.Connection) -> None:
        try:
            connection.run("exec cat", b"some input\n", END_SECONDS)
        except _core.CoreError:
            self.report.note(
                "end of input",
                f"is not passed on within {END_SECONDS:.0f} s: an agent notices by silence that a connection "
                "has ended, and not at once",
            )
        else:
            self.report.ok("end of input", "is passed on")


def inspections(provider: Exec, core: _core.Core, measuring: threading.Lock) -> list[CommandCheck]:
    """Return the inspections of the provider's nodes."""
    machines: list[Machine] = []
    provider.start(default_request(provider), machines)
    return [CommandCheck(machine, core, measuring) for machine in machines if isinstance(machine, CommandMachine)]
