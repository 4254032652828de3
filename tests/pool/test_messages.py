"""Messages of running tasks to the process that opened the pool: `send` in a task, a listener at the client."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import skyward_lite as sky
from lab import Lab
from processes import eventually
from skyward_lite import messages
from skyward_lite.client import inbox
from skyward_lite.node import home


@pytest.fixture
def listen() -> Iterator[Callable[[str, Callable[[Any], object]], None]]:
    """`messages.listen`, whose listeners are removed after the test."""
    addresses = []

    def listen(address: str, listener: Callable[[Any], object]) -> None:
        messages.listen(address, listener)
        addresses.append(address)

    yield listen
    for address in addresses:
        messages.unlisten(address)


@pytest.fixture
def blocked(listen) -> Iterator[tuple[queue.Queue, threading.Event]]:
    """A listener at "blocked" that puts each message into the queue, and returns when the event is set."""
    told: queue.Queue = queue.Queue()
    go_on = threading.Event()

    def wait(message):
        told.put(message)
        go_on.wait(50)

    listen("blocked", wait)
    yield told, go_on
    go_on.set()


def send(*told, address="test"):
    for message in told:
        messages.send(address, message)
    return len(told)


def failure(address="test", message=1):
    """Return the text of the MessageError that sending raises."""
    try:
        messages.send(address, message)
    except sky.MessageError as error:
        return str(error)
    return ""


class Refuses:
    """Cannot be rebuilt anywhere."""

    def __reduce__(self):
        return int, ("no number",)


def test_messages_arrive_once_in_the_senders_order(either_pool, listen):
    """Tasks and their threads may send at once; `send` returns when the listener has taken the message."""
    told: list[tuple[int, int, int]] = []
    listen("test", told.append)

    def task(number):
        def sender(thread):
            for i in range(20):
                messages.send("test", (number, thread, i))

        threads = [threading.Thread(target=sender, args=(n,)) for n in range(1, 4)]
        for thread in threads:
            thread.start()
        sender(0)
        for thread in threads:
            thread.join()

    for future in [either_pool.submit(task, n) for n in range(16)]:
        future.result(30)
    assert sorted(told) == [(n, thread, i) for n in range(16) for thread in range(4) for i in range(20)]
    assert [m for m in told if m[:2] == (3, 2)] == [(3, 2, i) for i in range(20)]


def test_large_messages(either_pool, listen):
    """Messages of several megabytes arrive unchanged, and one of more than 16 MiB is an error in the task only."""
    told: list[Any] = []
    listen("test", told.append)
    array = np.arange(1_000_000.0)
    data = os.urandom(5_000_000)
    assert either_pool.submit(send, array, data, "small").result(30) == 3
    assert np.array_equal(told[0], array)
    assert told[1:] == [data, "small"]
    with pytest.raises(sky.PayloadTooLargeError, match=r"17,000,\d+ bytes for 'test' is over the limit of 16,777,216"):
        either_pool.submit(lambda: messages.send("test", bytes(17_000_000))).result(30)
    assert either_pool.submit(send, "after").result(30) == 1
    assert told[3:] == ["after"]


def test_max_payload_applies_to_messages(listen):
    """A message over the pool's limit is refused in the task, and the node goes on."""
    told: list[Any] = []
    listen("test", told.append)
    with sky.pool(worker=sky.Worker(concurrency=1, max_payload=100_000), plugins=[]) as pool:
        with pytest.raises(sky.PayloadTooLargeError, match="max_payload"):
            pool.submit(lambda: messages.send("test", bytes(2_000_000))).result(30)
        assert pool.submit(send, "small").result(30) == 1
    assert told == ["small"]


def test_listener_that_raises_is_an_error_in_the_task(either_pool, listen):
    """A listener's exception is an error in the task with the listener's traceback as text; the next message is
    taken.
    """
    told = []

    def choosy(message):
        if message == 1:
            raise KeyError("not this one")
        told.append(message)

    listen("test", choosy)
    text = either_pool.submit(failure).result(30)
    assert "node local-" in text
    assert "'test': its listener raised" in text
    assert "in choosy" in text
    assert "KeyError: 'not this one'" in text
    assert either_pool.submit(send, 2).result(30) == 1
    assert told == [2]


def test_message_without_a_listener_is_an_error_in_the_task(either_pool):
    """A message to an address without a listener is an error that names the node and the address."""
    text = either_pool.submit(failure, "nowhere").result(30)
    assert text.startswith("node local-")
    assert "'nowhere': it has no listener for that address" in text


def test_listener_removed_while_a_task_runs(either_pool):
    """Messages sent after their listener was removed are errors in the task."""
    messages.listen("going", lambda _: messages.unlisten("going"))

    def task():
        messages.send("going", 1)
        return failure("going")

    assert "no listener" in either_pool.submit(task).result(30)


def test_message_that_cannot_be_rebuilt_is_an_error_in_the_task(either_pool, listen):
    """A message that the client cannot rebuild is an error in the task with the reason; the next one is taken."""
    told: list[Any] = []
    listen("test", told.append)
    text = either_pool.submit(lambda: failure("test", Refuses())).result(30)
    assert "it cannot be rebuilt there" in text
    assert "no number" in text
    assert either_pool.submit(send, 2).result(30) == 1
    assert told == [2]


def test_message_that_cannot_be_pickled_is_an_error_in_the_task(either_pool, listen):
    """A message that cannot be pickled raises pickle's error in the task, and nothing is sent."""
    listen("test", print)
    with pytest.raises(TypeError, match="pickle"):
        either_pool.submit(lambda: messages.send("test", threading.Lock())).result(30)


def test_send_in_the_listeners_own_process(listen):
    """In the listener's own process `send` calls the listener without a pool, and is an error without a listener."""
    told: list[Any] = []
    listen("test", told.append)
    send(1, 2)
    assert told == [1, 2]
    assert "no worker of a pool" in failure("nowhere")


def test_second_listener_of_an_address_is_refused(listen):
    """An address has one listener: another one is refused, and the same one may be set again."""
    told: list[Any] = []
    listen("test", told.append)
    messages.listen("test", told.append)
    with pytest.raises(ValueError, match="'test' has a listener already"):
        messages.listen("test", print)


def test_send_in_a_forked_child_of_a_task_is_an_error(either_pool, listen):
    """`send` in a process that a task forked is an error at once, as the sending threads are not there."""
    told: list[Any] = []
    listen("test", told.append)

    def task():
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.write(write, failure().encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        return text

    assert "from a process that a task started" in either_pool.submit(task).result(30)
    assert told == []


def test_messages_of_an_earlier_attempt_are_not_repeated(tmp_path, listen):
    """Of a task that runs again after its node was lost, the messages which were taken before are not taken again."""
    told: list[Any] = []
    listen("test", told.append)

    def task(marker):
        import os
        import signal

        send(0, 1)
        if not marker.exists():
            marker.touch()
            os.kill(os.getppid(), signal.SIGKILL)
            signal.pause()
        return send(2)

    with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=1, executor="process"), plugins=[]) as pool:
        assert pool.submit(task, tmp_path / "marker").result(30) == 1
        assert told == [0, 1, 2]
        assert pool.submit(send, 3, 3).result(30) == 2
    assert told == [0, 1, 2, 3, 3]


def test_messages_of_a_task_rerun_after_a_crash_are_not_repeated(tmp_path, listen):
    """Of a task that runs again after another one killed its process, each message is taken once."""
    told: list[Any] = []
    listen("test", told.append)

    def bystander(sent, gate):
        send("heard")
        sent.touch()
        eventually(gate.exists, 40)
        return send("end")

    def killer(sent):
        eventually(sent.exists, 40)
        os._exit(3)

    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        first = pool.submit(bystander, tmp_path / "sent", tmp_path / "gate")
        second = pool.submit(killer, tmp_path / "sent")
        with pytest.raises(sky.WorkerCrashedError):
            second.result(40)
        (tmp_path / "gate").touch()
        assert first.result(40) == 1
    assert told == ["heard", "end"]


def test_message_counts_of_ended_tasks_are_bounded(shared_pool, listen, monkeypatch):
    """More tasks send messages than the client counts messages for at once, and each message is taken once."""
    monkeypatch.setattr(inbox, "MIN_COUNTED_TASKS", 10)
    told: list[Any] = []
    listen("test", told.append)
    with sky.pool(worker=sky.Worker(concurrency=2), plugins=[]) as pool:
        list(pool.map(send, range(100)))
    assert sorted(told) == list(range(100))


def test_blocked_listener_does_not_delay_results(either_pool, blocked):
    """Other tasks' results arrive while a listener does not return."""
    told, go_on = blocked
    waiting = either_pool.submit(send, 1, address="blocked")
    assert told.get(timeout=20) == 1
    assert list(either_pool.map(abs, range(-20, 0))) == list(range(20, 0, -1))
    assert not waiting.done()
    go_on.set()
    assert waiting.result(20) == 1


@pytest.mark.slow
def test_send_times_out_if_the_listener_does_not_return(blocked):
    """A listener that does not return is an error in the task, which names the node and the address."""
    told, go_on = blocked

    def task():
        home.MIN_WAIT_MS = 100
        return failure("blocked")

    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[], lease=2) as pool:
        text = pool.submit(task).result(30)
        go_on.set()
        assert text.startswith("node local-0: the client did not answer a message for 'blocked' within 2 s")
        assert pool.submit(failure, "nowhere").result(30)


def test_send_is_interrupted_by_a_signal_handler(shared_processes, blocked):
    """An exception that a signal's handler raises ends the wait of `send`."""
    told, go_on = blocked

    def task():
        import signal

        def ring(*_):
            raise InterruptedError("the alarm rings")

        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        messages.send("blocked", 1)

    with pytest.raises(InterruptedError, match="the alarm rings"):
        shared_processes.submit(task).result(30)
    go_on.set()
    assert "no listener" in shared_processes.submit(failure, "nowhere").result(30)


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_pool_closes_while_a_task_waits_in_send(executor, blocked):
    """When an exception leaves the block while a listener does not return, the pool closes and the task is
    cancelled.
    """
    told, _ = blocked
    with pytest.raises(KeyError), sky.pool(worker=sky.Worker(concurrency=2, executor=executor), plugins=[]) as pool:
        future = pool.submit(send, 1, address="blocked")
        assert told.get(timeout=20) == 1
        raise KeyError
    assert future.cancelled()


@pytest.mark.slow
def test_task_timeout_includes_waiting_in_send(blocked):
    """The time limit ends a task whose listener does not return."""
    told, go_on = blocked

    # A local function goes by value, so that no import of this file counts against the limit.
    def say(message):
        from skyward_lite import messages

        messages.send("blocked", message)
        return message

    with sky.pool(worker=sky.Worker(concurrency=1, task_timeout=2), plugins=[]) as pool:
        with pytest.raises(sky.TaskTimeoutError):
            pool.submit(say, 1).result(30)
        go_on.set()
        # The answer to a message of a process that has ended is dropped.
        assert pool.submit(say, 2).result(30) == 2
    assert [told.get(timeout=20), told.get(timeout=20)] == [1, 2]


def test_messages_over_ssh(tmp_path, listen):
    """Messages and their answers pass whole through an SSH server."""
    told: list[Any] = []
    listen("test", told.append)
    lab = Lab(tmp_path)
    try:
        host = lab.host()
        host.make_environment(sky.Image())

        def task(number):
            from skyward_lite import messages

            for i in range(10):
                messages.send("test", (number, i, b"x" * 100_000))
            try:
                messages.send("nowhere", number)
            except Exception as error:
                return str(error)

        with sky.pool(sky.SSH(host.name, config=lab.config), worker=sky.Worker(concurrency=4), plugins=[]) as pool:
            texts = [future.result(30) for future in [pool.submit(task, n) for n in range(8)]]
        assert sorted(m[:2] for m in told) == [(n, i) for n in range(8) for i in range(10)]
        assert {m[2] for m in told} == {b"x" * 100_000}
        assert all(text.startswith(f"node {host.name}: ") and "no listener" in text for text in texts)
    finally:
        lab.close()


def test_threads_that_take_from_the_core_end_with_the_pool():
    """Before the block is left: one that comes back from the core when the interpreter ends may crash it."""
    names = {"skyward-messages", "skyward-watch"}

    def taking():
        return {thread for thread in threading.enumerate() if thread.name in names}

    before = taking()
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]):
        threads = taking() - before
    assert {thread.name for thread in threads} == names
    assert not [thread.name for thread in threads if thread.is_alive()]
