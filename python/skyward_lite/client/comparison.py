"""Whether the nodes have the packages that pickles and served modules name, in the versions that this process has.

Only what is named counts, not what happens to be installed or imported here. A package is compared when it is named
first, with every node that is there, and with each later node when that is ready. The log gets one message for a node,
with the line that mends it, and a further one if more is named later. With `strict_env` a call is not sent then.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .. import _core, distributions
from ..distributions import Distribution
from ..errors import EnvironmentMismatchError
from ..pickling.modules import Modules
from ..providers import Machine
from .node_state import NodeState

log = logging.getLogger("skyward_lite")

ALWAYS = ("cloudpickle",)
"""Modules that every pickle names: each end makes pickles with them."""
_USED = (NodeState.READY, NodeState.DRAINING, NodeState.RECONNECTING)
"""The states of nodes that may run tasks."""


class Difference(NamedTuple):
    """A distribution that a node has otherwise than this process."""

    here: Distribution
    there: str | None
    """The version there; None if it is not installed there."""


class Comparison:
    """The comparison of one pool's nodes with this process.

    `machines` are the pool's, in the order of the nodes' numbers; the list grows while the pool is open. `strict`: see
    `ComputePool`.
    """

    def __init__(self, core: _core.Core, machines: Sequence[Machine], strict: bool) -> None:
        self._core = core
        self._machines = machines
        self._strict = strict
        self._modules: Modules | None = None
        """Set by `begin` where nodes have packages of their own; otherwise nothing is compared."""
        self._lock = threading.RLock()
        """Held while nodes are compared: each difference is told once, and no call passes before it is known."""
        self._compared = -1
        """How many names calls had named when the nodes were compared last; -1 before."""
        self._seen: set[str] = set()
        """The names whose distributions are in `_here`."""
        self._here: dict[str, Distribution] = {}
        """The distributions that have been named so far, by their names."""
        self._told: dict[int, dict[str, str | None]] = {}
        """For each node's number what the log has of it: the distribution's name → its version there."""
        self._mismatched = False
        """Whether the last comparison of a strict pool has found a difference."""

    def begin(self, modules: Modules) -> None:
        """Compare what these modules' pickles name, from now on. Called once, when the pool starts."""
        if modules.shares_files:
            return
        self._modules = modules
        if self._strict:
            # Before the first node greets: the core loses those that lack what is named by then.
            self.look()
        else:
            # All distributions are read while the nodes start, so that the first call need not wait for it.
            threading.Thread(target=distributions.read, name="skyward-packages", daemon=True).start()

    def look(self) -> None:
        """Compare the nodes if anything new was named. Called when a call was pickled, and before it is sent.

        Raise `EnvironmentMismatchError` if the pool is strict and a node differs in what was named so far.
        """
        if self._modules is None or (self._compared == self._count(self._modules) and not self._mismatched):
            return
        with self._lock:
            count = self._count(self._modules)
            new = self._distributions_of(self._names(self._modules) - self._seen)
            if new or self._mismatched:
                self._here |= new
                if self._strict:
                    self._check()
                else:
                    self._tell_all(new)
            # Only now: until then the calls of other threads come here, too, and wait.
            self._compared = count

    def ready(self, number: int) -> None:
        """Compare one node, which has become ready, in all that was named so far."""
        if self._modules is None or self._strict:
            return
        with self._lock:
            self._here |= self._distributions_of(self._names(self._modules) - self._seen)
            self._tell(number, self._here)

    # ------------------------------------------------------------------------------------------------ what was named

    def _count(self, modules: Modules) -> int:
        return len(modules.named) + len(_served(modules))

    def _names(self, modules: Modules) -> set[str]:
        # Copies, as other threads may add to them meanwhile.
        return {*ALWAYS, *tuple(modules.named), *tuple(_served(modules))}

    def _distributions_of(self, names: Iterable[str]) -> dict[str, Distribution]:
        """Return the distributions, by name, that have these modules and have not been named before."""
        found = {}
        for name in names:
            self._seen.add(name)
            for each in distributions.of_module(name):
                if not each.is_editable and each.name not in self._here:
                    found[each.name] = each
        return found

    # ------------------------------------------------------------------------------------------------ the nodes

    def _differences(self, number: int, named: Iterable[str]) -> list[Difference] | None:
        """Return how a node differs in these distributions; None if that is not known."""
        if number >= len(self._machines) or self._machines[number].shares_files:
            return []
        there = self._core.packages(number)
        if not there:
            return None
        found = []
        for name in sorted(named):
            here, version = self._here[name], there.get(name)
            if version is None or not distributions.same_version(here.version, version):
                found.append(Difference(here, version))
        return found

    def _tell_all(self, named: Iterable[str]) -> None:
        for number, node in enumerate(self._core.nodes()):
            if node["state"] in _USED:
                self._tell(number, named)

    def _tell(self, number: int, named: Iterable[str]) -> None:
        """Write into the log how a node differs, unless it has that already."""
        told = self._told.setdefault(number, {})
        found = self._differences(number, named) or ()
        new = [each for each in found if told.get(each.here.name, "") != each.there]
        if new:
            told.update({each.here.name: each.there for each in new})
            machine = self._machines[number]
            log.warning("node %s: %s", machine.name, sentence(new, machine.python))

    def _check(self) -> None:
        """Raise `EnvironmentMismatchError` if a node of a strict pool differs in anything that was named so far."""
        # First the nodes that greet from now on, which the core compares; then those that have greeted.
        self._core.require({each.name: each.version for each in self._here.values()})
        self._mismatched = True
        problems = []
        for number, node in enumerate(self._core.nodes()):
            has_greeted = node["state"] in _USED or node["state"] == NodeState.CONNECTING
            if not has_greeted or self._core.packages(number) is None:
                continue
            found = self._differences(number, self._here)
            if found is None:
                problems.append(f"node {node['name']}: it does not tell which packages it has")
            elif found:
                problems.append(f"node {node['name']}: {sentence(found, self._machines[number].python)}")
        if problems:
            raise EnvironmentMismatchError(
                f"strict_env=True, and the call was not sent: {'; '.join(problems)}. Open the pool anew then"
            )
        self._mismatched = False


def _served(modules: Modules) -> Any:
    """Return the names of installed modules that the sources of served modules import."""
    return getattr(getattr(modules, "sources", None), "imports", ())


# ------------------------------------------------------------------------------------------------ words


def sentence(found: Sequence[Difference], python: str | None) -> str:
    """Return how a node differs, and what mends it. `python` is the node's interpreter, if it is used as it is."""
    parts = [
        f"{here.name} is not installed there"
        if there is None
        else f"{here.name} is {there} there and {here.version} here"
        for here, there in found
    ]
    them = "it" if len(found) == 1 else "them"
    return (
        f"{', '.join(parts)}: tasks that use {them} may fail or differ. {remedy([each.here for each in found], python)}"
    )


def remedy(wanted: Sequence[Distribution], python: str | None) -> str:
    """Return how a node gets these distributions."""
    sentences = []
    requirements = [json.dumps(each.requirement) for each in wanted if each.requirement]
    if requirements:
        them = "it" if len(requirements) == 1 else "them"
        sentences.append(
            f"Image(pip=[{', '.join(requirements)}]) installs {them}"
            if python is None
            else f"There, `{python} -m pip install {' '.join(requirements)}` installs {them}"
        )
    sentences += [
        f"{each.name} was installed here from {each.directory}: send its modules with Image(includes=[...]), or a "
        "wheel of it with Image(wheelhouse=)"
        for each in wanted
        if not each.requirement
    ]
    return ". ".join(sentences)
