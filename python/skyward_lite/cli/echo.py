"""How fast the two ends of a command answer each other while it runs, as a client and its agent do."""

from __future__ import annotations

import os
import select
import signal
import statistics
import subprocess
import time

from ..providers.command import CommandMachine
from .measure import milliseconds
from .report import Report

ECHO_BYTES = (64, 4096)
"""Sizes of messages that come back: a call with a small argument, and one that takes several packets of srun's."""
ECHOES = 31
"""Messages whose median time counts: a new connection of TCP acknowledges the first ones at once."""
ECHO_SECONDS = 15.0
"""Bound on the time from the command's start to the last echo."""
DELAY_SECONDS = 0.02
"""A larger message that takes so much longer than a small one waited for an acknowledgement: see `DELAYED`."""
TERM_SECONDS = 3.0
"""For so long the command may go on after SIGTERM."""

DELAYED = (
    "a message of {size:,} bytes takes {took}, a small one {small}: something on the way waits for acknowledgements, "
    "as Slurm's srun does before 24.05. A pool asks for what is late, so its lone tasks take only a few ms longer"
)


def measure_echo(machine: CommandMachine, report: Report) -> None:
    """Measure the time until a message comes back from a program that runs, and add it to the report."""
    process = subprocess.Popen(
        [*machine.argv(), "exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=machine.environment,
        bufsize=0,
        process_group=0,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + ECHO_SECONDS
        writing, reading = process.stdin.fileno(), process.stdout.fileno()
        _skip_banner(writing, reading, deadline)
        times = [_median(writing, reading, size, deadline) for size in ECHO_BYTES]
    except OSError as error:
        report.note("echo", f"not measured: {error}")
        return
    finally:
        _end(process)
    small, large = times
    figures = {f"echo_{size}_ms": took * 1000 for size, took in zip(ECHO_BYTES, times, strict=True)}
    shown = " and ".join(
        f"{size:,} bytes after {took * 1000:.2f} ms" for size, took in zip(ECHO_BYTES, times, strict=True)
    )
    report.ok("echo", f"{shown} are back from a program that runs, medians of {ECHOES}", **figures)
    if large - small > DELAY_SECONDS:
        text = DELAYED.format(size=ECHO_BYTES[1], took=milliseconds(large), small=milliseconds(small))
        report.note("echo", text)


def _skip_banner(writing: int, reading: int, deadline: float) -> None:
    """Read on until what is sent comes back: the command may print something of its own before."""
    mark, seen = os.urandom(16), b""
    os.write(writing, mark)
    while mark not in seen:
        seen = seen[-len(mark) :] + _read(reading, 1 << 12, deadline)


def _median(writing: int, reading: int, size: int, deadline: float) -> float:
    """Return the median seconds until so many bytes come back. Raises `OSError` if they do not until the deadline."""
    times = []
    for _ in range(ECHOES):
        data = os.urandom(size)
        began = time.perf_counter()
        os.write(writing, data)
        missing = size
        while missing:
            missing -= len(_read(reading, missing, deadline))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _read(reading: int, most: int, deadline: float) -> bytes:
    ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
    chunk = os.read(reading, most) if ready else b""
    if not chunk:
        why = "it has ended" if ready else f"it was not done within {ECHO_SECONDS:.0f} s"
        raise ConnectionError(f"`cat` does not send back what it is sent: {why}")
    return chunk


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command and what it has started."""
    with process:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(TERM_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
