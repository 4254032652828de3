"""What the display of progress costs: the rate of small tasks with it and without it, in turn, on a real terminal.

    .venv/bin/python benches/progress.py [rounds]

Each round runs the same calls with the display and without it, in changing order. What counts is the median of the
rounds' ratios: the machine is small and noisy. The target is less than 1 %.
"""

from __future__ import annotations

import contextlib
import operator
import os
import pty
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import skyward_lite as sky
from joblib import Parallel, delayed
from skyward_lite.client.display import TASKS_SECONDS, Display

TASKS = {1: 40_000, "auto": 400_000}
"""Size of batches → tasks of one call, which takes about 2 s."""
ROUNDS = 25


def run(shown: bool, batch_size: Any) -> tuple[float, float]:
    """Return the time that the calls take, and the processor time of this process, with the display or without it."""
    tasks = TASKS[batch_size]
    with sky.progress(total=tasks) if shown else contextlib.nullcontext():
        begin = time.perf_counter(), time.process_time()
        Parallel(n_jobs=-1, batch_size=batch_size)(delayed(operator.neg)(i) for i in range(tasks))
        return time.perf_counter() - begin[0], time.process_time() - begin[1]


def counted(draw: Callable[[Display], None], drawings: list[float]) -> Callable[[Display], None]:
    """Return what draws, and appends the seconds of processor time that this took."""

    def drawn(display: Display) -> None:
        begin = time.thread_time()
        draw(display)
        drawings.append(time.thread_time() - begin)

    return drawn


def measure(rounds: int, batch_size: Any) -> str:
    """Return lines on both: the calls per second, and the processor time of this process."""
    runs: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(-1, rounds):
        for shown in (True, False) if number % 2 else (False, True):
            took = run(shown, batch_size)
            if number >= 0:
                runs[shown].append(took)
    lines = []
    for place, what in enumerate(("time", "processor time")):
        ratios = sorted(a[place] / b[place] - 1 for a, b in zip(runs[True], runs[False], strict=True))
        spread = f"quartiles {ratios[len(ratios) // 4]:+.1%} and {ratios[-1 - len(ratios) // 4]:+.1%}"
        with_it, without = (statistics.median(took[place] for took in runs[shown]) for shown in (True, False))
        rates = f"{TASKS[batch_size] / with_it:,.0f}/s with, {TASKS[batch_size] / without:,.0f}/s without"
        lines.append(f"batch_size={batch_size!r}, {what}: {statistics.median(ratios):+.2%} ({spread}; {rates})")
    return "\n".join(lines)


def main() -> None:
    """Measure in a child on a terminal of its own, and print the lines here."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    read, write = os.pipe()
    child, terminal = pty.fork()
    if not child:
        os.environ["TERM"] = "xterm-256color"
        lines: list[str] = []
        drawings: list[float] = []
        Display._draw = counted(Display._draw, drawings)  # type: ignore[method-assign]
        with sky.pool(worker=sky.Worker(concurrency=10)):
            for batch_size in TASKS:
                lines.append(measure(rounds, batch_size))
        share = statistics.mean(drawings) / TASKS_SECONDS
        lines.append(f"a drawing takes {statistics.mean(drawings) * 1e3:.2f} ms: {share:.2%} of a processor")
        os.write(write, "\n".join(lines).encode())
        os._exit(0)
    os.close(write)
    with contextlib.suppress(OSError):
        while os.read(terminal, 1 << 16):
            pass
    os.waitpid(child, 0)
    print(os.read(read, 1 << 16).decode())


if __name__ == "__main__":
    main()
