"""What tasks print reaches the client's streams, bounded, and whatever they do to their own."""

from __future__ import annotations

import ctypes
import logging
import operator
import os
import signal
import subprocess
import sys
import time

import pytest
import skyward_lite as sky
from conftest import eventually


def chat(text):
    print(text)
    print(text.upper(), file=sys.stderr)
    logging.getLogger("chat").warning("logged %s", text)


def test_lines_come_with_the_nodes_name(capsys):
    """print to both streams, and logging; all of it is there when the block is left."""
    with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        list(pool.map(chat, [f"line {n}" for n in range(20)]))
        shell = "echo from a child; printf 'no newline'"
        pool.submit(subprocess.run, shell, shell=True, check=True).result(20)
    out, err = capsys.readouterr()
    for n in range(20):
        assert any(f"[local-{node}] line {n}\n" in out for node in (0, 1))
        assert any(f"[local-{node}] LINE {n}\n" in err for node in (0, 1))
        assert f"logged line {n}\n" in err
    assert "] from a child\n" in out
    assert "] no newline\n" in out
    assert all(line.startswith("[local-") for line in (out + err).splitlines())


def test_what_c_libraries_print_comes_too(capsys, monkeypatch):
    """Their stream has a buffer of its own."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)

    def put():
        ctypes.CDLL(None).puts(b"said in C")

    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pool.submit(put).result(20)
    assert "[local-0] said in C\n" in capsys.readouterr().out


def test_lines_stay_whole(capsys):
    """However many are written at once."""
    lines = [f"{n} {'ä' * (n % 50)}" for n in range(3_000)]
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pool.submit(os.write, 2, "".join(f"{line}\n" for line in lines).encode()).result(20)
    assert capsys.readouterr().err.splitlines() == [f"[local-0] {line}" for line in lines]


def test_output_without_the_end_of_a_line_comes_too(capsys, monkeypatch):
    """With each task's end, though streams are buffered."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)

    def mumble():
        print("mumbled", end=" ")
        sys.stderr.write("murmured")
        sys.stdout.buffer.write(b"muttered")

    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pool.submit(mumble).result(20)
    out, err = capsys.readouterr()
    assert "mumbled" in out
    assert "muttered" in out
    assert "murmured" in err


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_what_tasks_start_can_be_interrupted(executor):
    """Workers leave Ctrl-C to the client; programs that they start do not."""

    def interrupted() -> int:
        with subprocess.Popen(["sleep", "30"]) as process:
            os.kill(os.getpid(), signal.SIGINT)
            process.send_signal(signal.SIGINT)
            return process.wait(20)

    with sky.pool(worker=sky.Worker(concurrency=1, executor=executor), plugins=[]) as pool:
        assert pool.submit(interrupted).result(25) == -signal.SIGINT


def test_output_comes_while_a_task_runs(capsys, tmp_path):
    """Not only at its end."""
    gate = tmp_path / "gate"

    def say_and_wait():
        print("early")
        while not gate.exists():
            time.sleep(0.01)

    seen = ""

    def came():
        nonlocal seen
        seen += capsys.readouterr().out
        return "early" in seen

    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        future = pool.submit(say_and_wait)
        assert eventually(came, 10)
        assert not future.done()
        gate.touch()


def flood(stream, size):
    os.write(stream, b"begin\n")
    block = b"x" * 1023 + b"\n"
    for _ in range(size // 1024):
        os.write(stream, block)
    return "done"


@pytest.mark.parametrize("stream", [1, 2])
def test_a_flood_is_bounded(capsys, stream):
    """64 MiB: the task ends, the node lives, and what is left out is counted."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        assert pool.submit(flood, stream, 64 << 20).result(50) == "done"
        assert pool.submit(operator.neg, 1).result(20) == -1
    both = capsys.readouterr()
    text = both.out if stream == 1 else both.err
    assert text.startswith("[local-0] begin\n")
    # A reader that keeps up gets everything; nobody gets more.
    assert len(text) < (64 << 20) * 1.1
    assert len(text) > (60 << 20) or "bytes of output are left out here" in both.err


def close_all():
    for fd in (0, 1, 2):
        os.close(fd)
    # These take the freed numbers.
    files = [open(os.devnull, "rb") for _ in range(3)]  # noqa: SIM115
    return [file.fileno() for file in files]


def test_a_task_may_close_its_streams():
    """Descriptors 0, 1 and 2 are not what the worker talks through."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        assert pool.submit(close_all).result(20) == [0, 1, 2]
        assert pool.submit(operator.neg, 1).result(20) == -1


def garbage():
    os.write(1, os.urandom(1 << 16))
    os.write(2, b"\0SKYWARD-LITE\r\n\0" + os.urandom(1 << 16))
    return 1


def test_garbage_on_the_streams_does_no_harm(capsys):
    """Bytes that are no text, and our own magic."""
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        assert pool.submit(garbage).result(20) == 1
    assert "SKYWARD-LITE" in capsys.readouterr().err


def fork_and_return():
    return os.fork() == 0


def test_a_task_that_forks_gives_one_result():
    """The child runs into the worker's own code and must go no further."""
    with sky.pool(worker=sky.Worker(concurrency=1, executor="process"), plugins=[]) as pool:
        assert [pool.submit(fork_and_return).result(20) for _ in range(5)] == [False] * 5
        assert pool.submit(operator.neg, 1).result(20) == -1
        assert pool._core.counts() == (0, 0)


def test_a_closed_stream_of_the_client_is_no_error(monkeypatch):
    """Whoever closes sys.stdout does not want to read."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with sky.pool(worker=sky.Worker(concurrency=1), plugins=[]) as pool:
        pool.submit(chat, "unheard").result(20)
        assert pool.submit(operator.neg, 1).result(20) == -1
