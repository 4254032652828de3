"""States of a worker's task loop, with a scripted core: asynchronous exceptions at each step, and how the tasks end."""

from __future__ import annotations

import os
import pickle
import types

import pytest
from skyward_lite import _core
from skyward_lite.node import task_loop
from skyward_lite.node.context import Context
from skyward_lite.pickling import exceptions, payload


class Stray(Exception):
    """An exception that no task raises itself."""


class ScriptedCore:
    """Hands out tasks, records their outcomes, and raises `Stray` at the steps of `raise_at`."""

    node = "scripted"
    slots = 1
    settings = types.SimpleNamespace(shares_files=True, max_payload=1 << 20, task_timeout_ms=None)

    def __init__(self, calls, raise_at=()):
        self.calls = list(enumerate(calls, 1))
        self.raise_at = list(raise_at)
        self.ends = {}
        self.over = False

    def take(self, slot, bound_ms, into):
        if not self.calls:
            self.over = True
            return
        self.reach("before take")
        number, (kind, call) = self.calls.pop(0)
        into.append((number, 0, kind, 0, pickle.dumps(call), None))
        self.reach("after take")

    def finish(self, slot, task, attempt, code, calls, nanos, pickled, buffers):
        self.reach("before finish")
        self.ends.setdefault(task, (code, payload.loads(pickled, buffers)))
        self.reach("after finish")

    def reach(self, step):
        if step in self.raise_at:
            self.raise_at.remove(step)
            raise Stray


ran = []


def note(x):
    ran.append(x)
    return x


def stray():
    raise Stray


def single(*call):
    return payload.CALL, (*call, {})


def run(core):
    ran.clear()
    task_loop.take_tasks(core, 0, [], Context(""))
    return core.ends


@pytest.mark.parametrize("step", ["before take", "after take", "before finish", "after finish"])
def test_asynchronous_exception_between_tasks_is_dropped(step):
    """After an exception between two tasks each task has run once, and its outcome is handed in."""
    core = ScriptedCore([single(note, (1,)), (payload.BATCH, [(note, (2,), {}), (note, (3,), {})])], [step, step])
    assert run(core) == {1: (_core.RETURNED, 1), 2: (_core.RETURNED, [2, 3])}
    assert ran == [1, 2, 3]


def test_asynchronous_exception_during_a_task_is_its_outcome():
    """An exception while a task runs is its outcome, with the position of the call in a batch."""
    core = ScriptedCore([single(stray, ()), (payload.BATCH, [(note, (2,), {}), (stray, (), {})])])
    ends = run(core)
    assert [code for code, _ in ends.values()] == [_core.RAISED, _core.RAISED]
    assert [type(error) for _, (error, _, _) in ends.values()] == [Stray, Stray]
    assert ends[2][1][2][1] == 1


def test_asynchronous_exception_while_an_error_is_pickled(monkeypatch):
    """An exception while the task's own one is pickled becomes the outcome, and the task does not run again."""
    dump = exceptions.dump
    times = iter(range(10))

    def interrupted(*args):
        if next(times) == 0:
            raise Stray
        return dump(*args)

    def fail(x):
        ran.append(x)
        raise ValueError(x)

    monkeypatch.setattr(exceptions, "dump", interrupted)
    core = ScriptedCore([])
    core.calls = [(1, (payload.CALL, None)), (2, single(note, (2,)))]
    monkeypatch.setattr(
        task_loop.first_imports, "loads", lambda pickled, buffers: pickle.loads(pickled) or (fail, (1,), {})
    )
    ends = run(core)
    assert (ends[1][0], type(ends[1][1][0])) == (_core.RAISED, Stray)
    assert ends[2] == (_core.RETURNED, 2)
    assert ran == [1, 2]


def test_task_loop_without_progress_ends_its_process(monkeypatch):
    """A loop that is interrupted again and again ends its process, and the agent starts another one."""

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    core = ScriptedCore([single(note, (1,))], ["before take"] * (task_loop.MAX_STRAYS + 1))
    with pytest.raises(SystemExit, match="1"):
        run(core)
    assert len(core.raise_at) == 1
