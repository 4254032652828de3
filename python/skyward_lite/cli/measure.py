"""How fast the connection to a host is: the round trip of a command, and megabytes per second each way."""

from __future__ import annotations

import os
import statistics
import time

from .. import _core
from ..environment.scripts import shown
from .report import Report

ROUND_TRIPS = 5
"""Empty commands whose median time is the round trip."""
SAMPLE_BYTES = (1 << 20, 4 << 20, 16 << 20)
"""Sizes that are sent each way, until one takes `ENOUGH_SECONDS`."""
ENOUGH_SECONDS = 0.5
"""A transfer that took longer, without the command's own time, is long enough to be measured."""
MEASURE_SECONDS = 15.0
"""Bound on measuring the round trip, and on measuring each way: other hosts wait until this one has been measured."""


def measure_speed(connection: _core.Connection, report: Report, included: str) -> None:
    """Measure the round trip and the bandwidth each way, and add them to the report.

    `included`: what takes time in a round trip beside the network, in words.
    """
    round_trip = _measure_round_trip(connection, report, included)
    if round_trip is None:
        return
    # Random bytes, which neither SSH nor a proxy can compress.
    data = os.urandom(SAMPLE_BYTES[-1])
    # Not `cat`: a command may keep the end of its standard input to itself.
    uploads = [(f"head -c {size} | wc -c", size, data[:size]) for size in SAMPLE_BYTES]
    downloads = [(f"exec head -c {size} /dev/urandom", size, b"") for size in SAMPLE_BYTES]
    _measure_bandwidth(connection, report, "to it", uploads, round_trip)
    _measure_bandwidth(connection, report, "from it", downloads, round_trip)


def _measure_round_trip(connection: _core.Connection, report: Report, included: str) -> float | None:
    times: list[float] = []
    while len(times) < ROUND_TRIPS and sum(times) < MEASURE_SECONDS:
        began = time.perf_counter()
        status, _, _ = connection.run("true", b"", MEASURE_SECONDS)
        times.append(time.perf_counter() - began)
        if status != 0:
            report.note("round trip", f"not measured: `true` ended with status {status}")
            return None
    median = statistics.median(times)
    text = f"{milliseconds(median)}, median of {len(times)} times `true`, {included} included"
    report.ok("round trip", text, command_ms=median * 1000)
    return median


def _measure_bandwidth(
    connection: _core.Connection,
    report: Report,
    step: str,
    transfers: list[tuple[str, int, bytes]],
    round_trip: float,
) -> None:
    """Run the transfers, smallest first, until one takes long enough: (command, bytes to transfer, standard input)."""
    size, took = 0, 0.0
    deadline = time.monotonic() + MEASURE_SECONDS
    for line, size, stdin in transfers:
        began = time.perf_counter()
        bound = max(1.0, deadline - time.monotonic())
        try:
            status, stdout, _ = connection.run(line, stdin, bound)
        except _core.CoreError as error:
            rate = size / 1e6 / bound
            report.note(step, f"less than {rate:.3f} MB/s: {error}", "is the line that slow?")
            return
        took = time.perf_counter() - began
        if status != 0:
            report.note(step, f"not measured: `{line}` ended with status {status}")
            return
        if stdin and stdout.split()[-1:] != [str(size).encode()]:  # after a banner
            report.note(
                step, f"not measured: {size:,} bytes were sent, and `{line}` printed {shown(stdout, limit=100)!r}"
            )
            return
        if not stdin and len(stdout) < SAMPLE_BYTES[0]:
            report.note(step, f"not measured: of {size:,} bytes that `{line}` should print {len(stdout):,} came")
            return
        if took - round_trip > ENOUGH_SECONDS:
            break
    net = took - round_trip
    # A transfer that hardly took longer than an empty command only shows how fast the line is at least.
    is_certain = net > round_trip / 2
    rate = size / 1e6 / (net if is_certain else took)
    less = f", less {milliseconds(round_trip)} for a command" if is_certain else ""
    how = f"{size >> 20} MiB in {took:.2f} s{less}"
    report.ok(step, f"{'' if is_certain else 'at least '}{rate:,.1f} MB/s ({how})", mb_per_s=rate)


def milliseconds(seconds: float) -> str:
    """Return a time for people."""
    return f"{seconds * 1000:,.1f} ms"
