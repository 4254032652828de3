"""The steps that are the same for every machine which `skyward check` inspects, whichever way leads to it.

the way in (of each kind) → shell → system → python → cache → package → environment → versions → size → limits → speed
→ survival (of a process, when what has started it ends)

The steps are a pool's own, with its code and messages, and they stop where a pool would stop.
"""

from __future__ import annotations

import abc
import dataclasses
import platform
import sys
import threading
import time
from typing import Generic, TypeVar

from .. import _core
from .._version import PYTHON, __version__
from ..distributions import installed, same_version
from ..environment import bundle, own_uv, probe, scripts, tools
from ..errors import NodeStartError
from ..providers.remote import RemoteMachine
from . import survival
from .measure import milliseconds
from .report import Report

COMMAND_SECONDS = 30.0
"""Bound on each command of the check, but for measuring; a pool could not work with a machine that is slower."""
PACKAGES = ("skyward_lite", "cloudpickle", "joblib")
"""Packages whose versions should be the same here and on the machine, because both ends pickle with them."""
MIN_OPEN_FILES = 1024
"""A machine that allows a session fewer open files than this is noted."""

M = TypeVar("M", bound=RemoteMachine)


class Inspection(abc.ABC, Generic[M]):
    """The steps for one machine, taken on a thread of its own."""

    def __init__(self, machine: M, core: _core.Core, measuring: threading.Lock) -> None:
        self.machine = machine
        self.core = core
        self.measuring = measuring
        """Held while speed is measured, because all machines share this one's connection to the network."""
        self.report = Report(machine.name)

    @abc.abstractmethod
    def way_in(self) -> _core.Connection | None:
        """Report the steps that lead to a shell there, and return the connection; None after a step that failed."""

    @property
    @abc.abstractmethod
    def shell_remedy(self) -> str:
        """What the user can do if our scripts do not run there."""

    @property
    @abc.abstractmethod
    def connection_remedy(self) -> str:
        """What the user can do if the connection breaks off between two steps."""

    @abc.abstractmethod
    def measure(self, connection: _core.Connection) -> None:
        """Report how fast the connection is."""

    def python_there(self, connection: _core.Connection, facts: probe.Facts) -> str | None:
        """Report the interpreter that agents would use, and return its path; None if there is none yet."""
        if self.machine.python is not None:
            return self._given_python(connection, self.machine.python)
        return self._environment(facts)

    def leave(self, connection: _core.Connection) -> survival.Left | None:
        """Start a process there that is to outlive the connection, and return it; None if agents end with theirs."""
        return None

    def find(self, left: survival.Left) -> None:
        """Report whether the process outlived the connection, of which no reference is left."""

    def end(self) -> None:
        """End what the inspection started on this machine."""

    def run(self) -> Report:
        """Take the steps until one fails that the later ones need, and return the report."""
        try:
            self._take_steps()
        except _core.CoreError as error:
            self.report.fail("connection", str(error.args[0]), self.connection_remedy)
        except NodeStartError as error:
            self.report.fail("shell", str(error), self.shell_remedy)
        except Exception as error:
            # A machine may answer anything. Whatever its answer breaks here, the others must be reported.
            what = f"its answers could not be made sense of: {type(error).__name__}: {error}"
            self.report.fail("check", what, "look at what its login shell prints; this is a fault of `check`, too")
        finally:
            self.end()
        return self.report

    def _take_steps(self) -> None:
        connection = self.way_in()
        if connection is None:
            return
        details = self._details(connection)
        facts = self._system(connection)
        python = self.python_there(connection, facts)
        if python is not None:
            self._versions(connection, python)
        self._size(details)
        self._limits(details)
        with self.measuring:
            self.measure(connection)
        left = self.leave(connection) if self.report.usable else None
        del connection  # which closes it
        if left is not None:
            self.find(left)

    # ------------------------------------------------------------------------------------------------ the environment

    def _details(self, connection: _core.Connection) -> dict[str, str]:
        """Return the first value of each key that details.sh reports. Raises `NodeStartError` if it does not run."""
        script = scripts.compose(scripts.read("details.sh", __file__))
        began = time.perf_counter()
        result = self.machine.run_script(connection, script, COMMAND_SECONDS)
        took = time.perf_counter() - began
        details = {key: values[0] for key, values in result.report.items()}
        shell = details.get("shell", "an unknown shell")
        text = f"{shell} runs our scripts, the first in {milliseconds(took)}"
        self.report.ok("shell", text, script_ms=took * 1000)
        return details

    def _system(self, connection: _core.Connection) -> probe.Facts:
        image = self.machine.wanted.image
        facts = self.machine.probe_host(connection, bundle.environment_name(image))
        if facts.ready:
            # The probe stops at an environment that it finds. Another name finds none, and so lets it tell the rest.
            facts = dataclasses.replace(self.machine.probe_host(connection, "none"), ready=True, root=facts.root)
        libc = f"glibc {'.'.join(map(str, facts.libc))}" if facts.libc else "no glibc"
        text = f"{facts.system or 'unknown'}, {facts.machine or 'unknown architecture'}, {libc}"
        if facts.system == "Linux":
            self.report.ok("system", text, system=facts.system, machine=facts.machine)
        else:
            self.report.fail("system", text, "nodes run Linux")
        return facts

    def _given_python(self, connection: _core.Connection, python: str) -> str | None:
        """Check the interpreter that the user names, and return its path; None if it cannot be used."""
        try:
            path = self.machine.verify_python(connection, python)
        except NodeStartError as error:
            runs = probe.UNMET in str(error)
            install = f"install what is missing with `{python} -m pip install`"
            self.report.fail("python", str(error), install if runs else "name an interpreter that is there")
            return None
        self.report.ok("python", f"{python} is used as it is, and has what is needed")
        return path

    def _environment(self, facts: probe.Facts) -> str | None:
        """Report the environment, or how it would be made. Return its interpreter; None if there is none yet."""
        image = self.machine.wanted.image
        env = bundle.environment_name(image)
        python = probe.interpreter(facts, env)
        self._find_python(facts)
        self._cache(facts)
        if bundle.runs_there(facts):
            self.report.ok("package", "the client's own runs there, and is sent")
        else:
            needed = ".".join(map(str, bundle.needed_glibc()))
            library = f"glibc {needed} or newer" if needed else "another C library than glibc"
            self.report.note(
                "package",
                f"the client's own does not run there: it is for {sys.platform}, {platform.machine()}, "
                f"{library}; pip will look for skyward_lite=={__version__}",
                "give a wheel for it with Image(wheel=)",
            )
        if facts.ready:
            self.report.ok("environment", f"is there: {python} (of the default image)", environment=python)
            return python
        self.report.ok(
            "environment",
            f"to be made by the first pool; of the default image, pip or uv fetches {', '.join(image.pip)}",
        )
        return None

    def _find_python(self, facts: probe.Facts) -> None:
        try:
            ways = tools.choose(facts, self.machine.wanted.image, own_uv.unfit)
        except NodeStartError as error:
            fix = f"install python{PYTHON} with its venv module, or uv (https://docs.astral.sh/uv)"
            if facts.ready:
                self.report.note("python", f"{error}; the environment that is there does not need it")
            else:
                self.report.fail("python", str(error), fix)
            return
        if ways[0].own:
            uv = ", and the client's uv, which is sent unless it is there"
        elif facts.uv:
            uv = f", uv at {facts.uv}"
        else:
            uv = ""
        if ways[0].uv is None and not ways[0].own and facts.pip_settings:
            uv += f"; pip installs, because it is configured there ({facts.pip_settings})"
        self.report.ok("python", f"{facts.python or f'{PYTHON}, which uv provides'}{uv}", python=facts.python)

    def _cache(self, facts: probe.Facts) -> None:
        fix = probe.remedy(facts)
        if not facts.root:
            self.report.fail("cache", f"there is no directory for the environment:{facts.why}", fix)
        elif facts.free is not None and facts.free < probe.MIN_FREE_MB and not facts.ready:
            self.report.fail("cache", f"{facts.root} has {facts.free} MB left of {probe.MIN_FREE_MB} MB needed", fix)
        else:
            free = "" if facts.free is None else f", {facts.free / 1024:,.1f} GB free"
            self.report.ok("cache", f"{facts.root}{free}", root=facts.root, free_mb=facts.free)
        if facts.root and facts.why:
            self.report.note("cache", f"not the first choice:{facts.why}".rstrip(";"))

    def _versions(self, connection: _core.Connection, python: str) -> None:
        # The same option as on the command line of the agent, so that the same packages are found.
        isolation = "-I" if self.machine.python is None else "-P"
        versions = scripts.read("versions.sh", __file__)
        script = scripts.compose(versions, PYTHON=python, ISOLATION=isolation, PACKAGES=" ".join(PACKAGES))
        result = self.machine.run_script(connection, script, COMMAND_SECONDS)
        theirs = {name: result.report.get(name, [""])[0] for name in PACKAGES}
        ours = {name: __version__ if name == "skyward_lite" else installed(name) for name in PACKAGES}
        different = [name for name in PACKAGES if not same_version(theirs[name], ours[name] or "")]
        text = ", ".join(f"{name} {theirs[name] or 'missing'}" for name in PACKAGES)
        if not any(theirs.values()):
            self.report.fail(
                "versions", f"{python}: {result.printed[-500:] or text}", f"remove {python} and what is around it"
            )
        elif different:
            here = ", ".join(f"{name} {ours[name]}" for name in different)
            self.report.note("versions", f"{text}; here {here}", "equal versions are what pickles need")
        else:
            self.report.ok("versions", f"{text}, as here", **theirs)

    # ------------------------------------------------------------------------------------------------ the machine

    def _size(self, details: dict[str, str]) -> None:
        cores, memory = _number(details, "cores"), _number(details, "memory")
        available, group = _number(details, "available"), _number(details, "group_memory")
        parts = [details.get("release") or "an unknown system", f"{cores or 'unknown'} cores"]
        if memory:
            parts.append(f"{memory / 1e6:.1f} GB memory" + (f", {available / 1e6:.1f} available" if available else ""))
        if details.get("load"):
            parts.append(f"load {details['load']}")
        memory_gb = memory / 1e6 if memory else None
        self.report.ok("size", ", ".join(parts), cores=cores, memory_gb=memory_gb)
        if group and memory and group < memory * 1024:
            self.report.note("limits", f"the session's control group allows {group / 1e9:.1f} GB memory")

    def _limits(self, details: dict[str, str]) -> None:
        files = _number(details, "files")
        self.report.ok(
            "limits",
            f"open files {details.get('files', 'unknown')}, processes {details.get('processes', 'unknown')}",
            open_files=files,
        )
        if files is not None and files < MIN_OPEN_FILES:
            self.report.note("limits", f"only {files} open files", "raise `ulimit -n` for sessions there")
        cores, allowed = _number(details, "cores"), allowed_cores(details.get("group_cores", ""))
        if cores and allowed is not None and allowed < cores:
            slots = max(1, int(allowed))
            tasks = f"{slots} task{'s' if slots > 1 else ''} at once"
            self.report.note(
                "limits",
                f"the control group allows {allowed:g} of {cores} cores: {tasks}",
                "raise the container's limit, or set Worker(concurrency=)",
            )


def allowed_cores(quota: str) -> float | None:
    """Return the cores that a control group allows, by its quota and its period; None if there is no limit."""
    words = quota.split()
    if len(words) != 2:
        return None
    time, period = (scripts.parse_number(word) for word in words)
    return time / period if time and period else None


def _number(details: dict[str, str], key: str) -> int | None:
    return scripts.parse_number(details.get(key, ""))
