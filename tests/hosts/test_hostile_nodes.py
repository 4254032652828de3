"""Nodes that speak the protocol and do not help: what a pool does with them. `fake_agent.py` is their agent.

The last tests are of honest nodes, which are not lost for what looks alike.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time

import fakes
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from processes import eventually
from skyward_lite import _core
from skyward_lite.client.tasks import Tasks

TIMING = (0.05, 1.5, 1.5)
"""Seconds between heartbeats, for an answer, and for the end of what a draining node runs, here."""


@pytest.mark.parametrize("door", ["embedded", "sshd"])
def test_a_fake_agent_is_a_node_like_others(lab, door, capsys):
    """Behind the embedded server and behind a real one, what it says reaches the client."""
    body = b"a line of a fake node\n"
    args = {"kind": "output", "task": 1, "body": body.hex(), "count": 40}
    with fakes.pool("floods", lab=lab if door == "sshd" else None, times=1, **args) as pool:
        future = Tasks.of(pool).submit(*Tasks.of(pool).encode_call(abs, (-1,), {}), node=1)
        assert eventually(lambda: "a line of a fake node" in "".join(capsys.readouterr()), 10)
        assert any(line.startswith("task ") for line in pool.provider.heard())
        future.cancel()


@pytest.fixture
def impatient(monkeypatch):
    """Pools that send many heartbeats and do not wait long for what a node owes."""
    monkeypatch.setattr(_core, "Core", functools.partial(_core.Core, timing=TIMING))


def reasons(pool):
    """Give why each lost node is lost."""
    return {node.name: node.reason for node in pool.nodes() if node.state == "lost"}


def squares():
    """Make a task that takes so long that every node gets some."""

    def square(i):
        time.sleep(0.05)
        return i * i

    return square


BAD = {
    "it gave a task back": ("hands_back", {}),
    "it dropped a task": ("ends", {"outcome": "cancelled"}),
    "it said of a task that its node is lost": ("ends", {"outcome": "node_lost"}),
    "it answered a heartbeat that it was not sent": ("says", {"kind": "pulse", "task": 7}),
    "it sent what a client sends": ("says", {"kind": "recall", "task": 1}),
    "it became ready twice": ("says", {"kind": "ready", "task": 2}),
    "it said twice that it will soon be gone": ("floods", {"kind": "drain", "count": 2, "times": 1}),
    "it said that it keeps a task": ("floods", {"kind": "recall_refused", "task": 1, "count": 99, "times": 1}),
    "it sent more heartbeats than it has time for": ("floods", {"kind": "heartbeat", "body": "00" * 16, "times": 9}),
    "it said that it will soon be gone, and 1 s later": ("drains", {}),
    "it answered no heartbeat for 3 s, though something came": ("drips", {}),
    " s, and one may run 0.5 s": ("idle", {}),
}
"""Why a node is lost, and the behaviour that it is lost for."""


@pytest.mark.usefixtures("impatient")
def test_nodes_that_do_not_help_are_lost_and_their_work_runs_elsewhere():
    """Each is lost for what it did or did not do, and the call has the result of a serial run."""
    provider = fakes.Fakes(*BAD.values())
    worker = sky.Worker(concurrency=2, retries=100, task_timeout=0.5)
    with sky.pool(provider, worker=worker) as pool:
        values = Parallel(n_jobs=-1, batch_size=1)(delayed(squares())(i) for i in range(60))
        assert values == [i * i for i in range(60)]
        assert [node.state for node in pool.nodes()][:1] == ["ready"]
        for number, why in enumerate(BAD):
            assert why in reasons(pool).get(f"fake-{number}", ""), reasons(pool)


@pytest.mark.usefixtures("impatient")
def test_nodes_that_do_not_let_go_of_a_task_are_lost():
    """What was to be dropped has its end, though its node never answers, and what else it held runs elsewhere."""
    deaf = ("ignores", {"kinds": ["recall", "cancel", "abort"]})
    provider = fakes.Fakes(deaf, deaf, deaf)
    with sky.pool(provider, worker=sky.Worker(concurrency=1)) as pool:
        futures = [pool.submit(squares(), i) for i in range(8)]
        held = [int(heard(pool, 2, "task", number)[0].split()[1]) for number in range(3)]
        dropped = {future.task: future for future in futures if future.task in held[:2]}
        Tasks.of(pool).completions.futures.cancel(held[0])
        Tasks.of(pool).completions.futures.abort(held[1])
        assert all(f.result(20) == i * i for i, f in enumerate(futures) if f not in dropped.values())
        assert all(eventually(future.cancelled, 20) for future in dropped.values())
        why = "it was asked {} and has not answered for 1 s"
        asked = {"fake-0": "to drop a task", "fake-1": "to end a task", "fake-2": "to give a task back"}
        assert eventually(lambda: reasons(pool).keys() == asked.keys(), 20)
        assert reasons(pool)["fake-2"] == why.format(asked["fake-2"])
        # One that holds two tasks may owe either answer longer.
        for name in ("fake-0", "fake-1"):
            assert reasons(pool)[name] in (why.format(asked[name]), why.format(asked["fake-2"]))


def heard(pool, count, kind, number=0):
    """Wait until a fake node has heard so many frames of a kind; their lines in its journal."""

    def lines():
        return [line for line in pool.provider.heard(number) if line.startswith(f"{kind} ")]

    assert eventually(lambda: len(lines()) >= count, 10), pool.provider.heard(number)
    return lines()


def test_what_a_node_keeps_is_its_own(capsys):
    """A node that says of another one's task that it keeps it does not hinder that one from dropping it."""
    with fakes.pool("keeps_anothers", task=2, concurrency=1) as pool:
        call = Tasks.of(pool).encode_call(time.sleep, (0.5,), {})
        running, waiting, fake = (Tasks.of(pool).submit(*call, node=node) for node in (0, 0, 1))
        assert waiting.task == 2
        heard(pool, 1, "task")
        agent = pool.nodes()[0].pid
        os.kill(agent, signal.SIGSTOP)
        try:
            dropped = []
            thread = threading.Thread(target=lambda: dropped.append(waiting.cancel()))
            thread.start()
            Tasks.of(pool).completions.futures.cancel(fake.task)
            assert eventually(lambda: "it is mine" in "".join(capsys.readouterr()), 10)
        finally:
            os.kill(agent, signal.SIGCONT)
        thread.join(20)
        assert dropped == [True]
        assert running.result(20) is None
        assert eventually(fake.done, 20)


def test_a_task_is_not_ended_for_a_time_that_it_has_not():
    """Without `task_timeout`, a node that says that a task ran for too long is lost, and the task runs elsewhere."""
    with fakes.pool("ends", outcome="timed_out") as pool:
        assert list(pool.map(squares(), range(8), timeout=20)) == [i * i for i in range(8)]
        assert "it ended a task for its time, which has no limit" in reasons(pool)["fake-0"]


def test_what_came_before_a_goodbye_counts():
    """A result in the same block as its node's goodbye is the task's end."""
    with (
        fakes.pool("answers_and_leaves", good=0, concurrency=1) as pool,
        pytest.raises(sky.WorkerCrashedError, match="the fake node says so"),
    ):
        pool.submit(pow, 2, 2).result(20)


def waits_for(gate, started):
    """Make a task that names its process in the directory `started` and waits until `gate` exists."""

    def wait(number):
        (started / f"{os.getpid()}-{number}").touch()
        while not gate.exists():
            time.sleep(0.01)
        return number

    return wait


def test_a_task_that_its_agent_takes_back_can_be_dropped_at_the_same_time(tmp_path):
    """An agent that replaces a worker asks it for what waits there; what the client cancels then is dropped."""
    with sky.pool(sky.Local(1), worker=sky.Worker(concurrency=2)) as pool:
        wait = waits_for(tmp_path / "gate", tmp_path)
        running = [pool.submit(wait, number) for number in range(2)]
        assert eventually(lambda: len(list(tmp_path.iterdir())) == 2, 20)
        waiting = [pool.submit(abs, -number) for number in range(2)]
        worker = int(next(tmp_path.iterdir()).name.partition("-")[0])
        os.kill(worker, signal.SIGSTOP)
        try:
            Tasks.of(pool).completions.futures.abort(running[0].task)
            # Both run in the worker that takes its place: the first one when the stopped worker has been asked for what
            # waits there, the second one when the agent has heard of the cancel.
            assert Tasks.of(pool).submit(*Tasks.of(pool).encode_call(abs, (-1,), {}), node=0).result(20) == 1
            Tasks.of(pool).completions.futures.cancel(waiting[1].task)
            assert Tasks.of(pool).submit(*Tasks.of(pool).encode_call(abs, (-1,), {}), node=0).result(20) == 1
        finally:
            os.kill(worker, signal.SIGCONT)
        assert eventually(waiting[1].cancelled, 20)
        assert waiting[0].result(20) == 0
        assert pool.nodes()[0].state == "ready"
        (tmp_path / "gate").touch()


@pytest.mark.usefixtures("impatient")
def test_a_task_that_runs_again_alone_is_kept(tmp_path):
    """A worker that dies before it answers a cancel: its agent says that the tasks that ran there go on."""
    with sky.pool(sky.Local(1), worker=sky.Worker(concurrency=2, retries=0)) as pool:
        wait = waits_for(tmp_path / "gate", tmp_path)
        running = [pool.submit(wait, number) for number in range(2)]
        assert eventually(lambda: len(list(tmp_path.iterdir())) == 2, 20)
        worker = int(next(tmp_path.iterdir()).name.partition("-")[0])
        os.kill(worker, signal.SIGSTOP)
        Tasks.of(pool).completions.futures.cancel(running[0].task)
        # The agent has heard that when it has dropped a task that waits there, behind those that wait in the worker.
        others = [Tasks.of(pool).submit(*Tasks.of(pool).encode_call(abs, (-1,), {}), node=0) for _ in range(3)]
        Tasks.of(pool).completions.futures.cancel(others[2].task)
        assert eventually(others[2].cancelled, 20)
        os.kill(worker, signal.SIGKILL)
        assert eventually(lambda: len(list(tmp_path.iterdir())) == 4, 20)
        # The bound on an answer passes, with some to spare.
        assert not eventually(lambda: pool.nodes()[0].state != "ready", 1.5 * TIMING[1])
        (tmp_path / "gate").touch()
        assert [future.result(20) for future in running] == [0, 1]
