"""How nodes that are away are brought back, with machines and a core that are played."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from skyward_lite import _core
from skyward_lite.client import returning
from skyward_lite.client.lifecycle import Lifecycle, Stage
from skyward_lite.client.node_state import Node
from skyward_lite.client.returning import Returning
from skyward_lite.errors import NodeStartError
from skyward_lite.providers import MachineGoneError


class Machine:
    """A machine that fails as often as there are errors in `errors`."""

    name = "host"
    may_linger = True

    def __init__(self, *errors: Exception, returns: bool = True) -> None:
        self.errors = list(errors)
        self.returns = returns
        self.tries = 0
        self.go_on = threading.Event()
        """No attempt comes back before."""
        self.go_on.set()

    def reconnect(self, core: object) -> str:
        assert self.go_on.wait(10)
        self.tries += 1
        if self.errors:
            raise self.errors.pop(0)
        return "a connection"


class Core:
    """The nodes' states, and what is asked of them. Whatever succeeds makes the node ready."""

    def __init__(self) -> None:
        self.moments = itertools.count(1.0)
        self.row: dict[str, Any] = {"state": "connecting", "since": 0.0}
        self.asked: list[object] = []
        self.was_ready = False
        self.last = threading.Event()
        """Set when a node was given up or failed."""

    def become(self, state: str) -> None:
        self.row = {"state": state, "since": next(self.moments)}
        self.was_ready |= state == "ready"

    def nodes(self) -> list[dict[str, Any]]:
        return [self.row]

    def returns(self, number: int) -> bool:
        return self.was_ready and "give up" not in self.asked

    def resume_node(self, number: int, connection: object) -> None:
        self.asked.append(connection)
        self.become("ready")

    def give_up(self, number: int) -> None:
        self.asked.append("give up")
        self.last.set()

    def fail_node(self, number: int, why: str) -> None:
        self.asked.append(why)
        self.become("lost")
        self.last.set()


class Case:
    """One node that is ready, and what attends to it."""

    def __init__(self, machine: Machine, monkeypatch: pytest.MonkeyPatch, *, sleep: bool = False) -> None:
        self.core, self.machine, self.lifecycle = Core(), machine, Lifecycle()
        self.lifecycle.advance(Stage.OPEN)
        self.threads: list[threading.Thread] = []
        self.pauses: list[float | None] = []
        self.opened = 0
        self.all = Returning(self.core, self.start, self.start_thread, self.lifecycle)  # type: ignore[arg-type]
        self.become("ready")
        if not sleep:

            def pause(backoff: object, exactly: float | None = None) -> bool:
                self.pauses.append(exactly)
                return True

            monkeypatch.setattr(returning.Backoff, "pause", pause)

    def start(self, number: int, machine: object) -> None:
        self.opened += 1
        self.machine.reconnect(self.core)
        self.core.become("ready")

    def start_thread(self, name: str, target: Callable[..., None], *args: object) -> None:
        self.threads.append(threading.Thread(target=target, args=args, name=name, daemon=True))
        self.threads[-1].start()

    def look(self) -> None:
        row = self.core.row
        node = Node("host", row["state"], "", 1, None, None, row["since"])
        self.all.attend([node], [self.machine])  # type: ignore[list-item]

    def become(self, state: str) -> None:
        """Let the node be in another state, as the watching thread sees it."""
        self.core.become(state)
        self.look()

    def join(self) -> None:
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()


def refused() -> NodeStartError:
    """Return the error of a host that does not let us in."""
    error = NodeStartError("no key")
    error.__cause__ = _core.AuthenticationError("no key")
    return error


def test_a_cut_connection_is_made_anew(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The first attempt is made at once, others after pauses, each reason is logged once, and one thread does it."""
    caplog.set_level(logging.INFO, "skyward_lite")
    case = Case(Machine(*[NodeStartError("no network")] * 3, OSError("odd"), _core.HungUpError("full")), monkeypatch)
    case.machine.go_on.clear()
    case.become("reconnecting")
    case.look()
    case.machine.go_on.set()
    case.join()
    assert case.core.asked == ["a connection"]
    assert (len(case.threads), case.machine.tries, case.pauses) == (1, 6, [None] * 5)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["no network", "odd", "full"]
    # The next cut is another one.
    case.look()
    case.become("reconnecting")
    case.join()
    assert (len(case.threads), case.core.asked) == (2, ["a connection"] * 2)


def test_a_machine_that_announced_its_end_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first pause is a longer one, once; those after it are the usual ones."""
    pauses: list[float] = []
    monkeypatch.setattr(returning, "JITTER", (1.0, 1.0))
    monkeypatch.setattr(Returning, "_sleep", lambda self, number, seconds: pauses.append(seconds))
    case = Case(Machine(*[NodeStartError("still starting")] * 3), monkeypatch, sleep=True)
    case.become("draining")
    assert not case.threads
    case.become("lost")
    case.join()
    assert (case.opened, pauses) == (4, [returning.DRAINED_SECONDS, 1.0, 2.0, 4.0])


def test_without_a_free_thread_the_next_look_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that can start no thread goes on looking at its nodes, and brings them back later."""
    case = Case(Machine(), monkeypatch)
    start, failed = case.start_thread, []

    def start_later(name: str, target: Callable[..., None], *args: object) -> None:
        if not failed:
            failed.append(name)
            raise RuntimeError("can't start new thread")
        start(name, target, *args)

    monkeypatch.setattr(case.all, "_start_thread", start_later)
    case.become("reconnecting")
    assert (failed, case.threads) == (["skyward-back-host"], [])
    case.look()
    case.join()
    assert case.core.asked == ["a connection"]


def test_refusals_are_repeated_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that refuses us is asked again after half a minute at least, as it may ban our address."""
    assert returning.PERMANENT_SECONDS * returning.JITTER[0] >= 30
    case = Case(Machine(refused(), NodeStartError("no network"), refused()), monkeypatch)
    case.become("reconnecting")
    case.join()
    assert case.pauses == [returning.PERMANENT_SECONDS, None, returning.PERMANENT_SECONDS]


def test_a_machine_that_is_gone_is_lost_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody tries to reach an instance that was terminated."""
    case = Case(Machine(MachineGoneError("terminated"), returns=False), monkeypatch)
    case.become("reconnecting")
    assert case.core.last.wait(10)
    case.join()
    assert (case.core.asked, case.machine.tries) == (["terminated"], 1)


def test_a_lost_machine_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each attempt there is a pause, the first one too; only of machines that were ready once and return."""
    case = Case(Machine(*[NodeStartError("no network")] * 4), monkeypatch)
    case.become("lost")
    case.join()
    assert (case.opened, case.pauses, case.core.row["state"]) == (5, [None] * 5, "ready")
    for machine, was_ready in ((Machine(returns=False), True), (Machine(), False)):
        case = Case(machine, monkeypatch)
        case.core.was_ready = was_ready
        case.become("lost")
        assert not case.threads


def test_a_machine_that_refuses_us_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After some refusals the pool does without it, and is not waited for."""
    case = Case(Machine(*[refused() for _ in range(9)]), monkeypatch)
    case.become("lost")
    assert case.core.last.wait(10)
    case.join()
    assert (case.opened, case.core.asked) == (returning.MAX_PERMANENT, ["give up"])
    case.look()
    assert len(case.threads) == 1


@pytest.mark.parametrize("how", ["change", "leave"])
def test_a_pause_ends_when_nothing_is_to_be_waited_for(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A thread that pauses ends at once when the node is connected, and when the pool is left."""
    case = Case(Machine(*[refused() for _ in range(9)]), monkeypatch, sleep=True)
    paused = threading.Event()
    sleep = case.all._sleep

    def noted(number: int, seconds: float) -> bool:
        paused.set()
        return sleep(number, seconds)

    monkeypatch.setattr(case.all, "_sleep", noted)
    case.become("reconnecting")
    assert paused.wait(10)
    if how == "change":
        case.become("ready")
    else:
        case.lifecycle.advance(Stage.RELEASING)
        case.all.leave()
    case.join()
    assert case.machine.tries == 1


def test_a_node_that_is_lost_while_it_is_reconnecting_is_opened_after_one_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same thread opens the machine when its first pause is over, whether or not anybody has seen the change."""
    monkeypatch.setattr(returning, "OPEN_SECONDS", (0.1, 60.0))
    case = Case(Machine(), monkeypatch, sleep=True)
    pauses = []
    sleep = case.all._sleep

    def noted(number: int, seconds: float) -> bool:
        pauses.append(seconds)
        return sleep(number, seconds)

    def lose(number: int, connection: object) -> None:
        case.core.become("lost")

    monkeypatch.setattr(case.all, "_sleep", noted)
    monkeypatch.setattr(case.core, "resume_node", lose)
    case.become("reconnecting")
    case.join()
    assert (case.opened, len(pauses), len(case.threads)) == (1, 1, 1)
    assert pauses[0] < 1
