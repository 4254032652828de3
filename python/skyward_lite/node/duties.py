"""What an agent does beside its work, on threads of its own: its options, from its command line.

--alive FILE           touch FILE each second: a guard of the machine removes it again and again, and ends the machine
                       when the file does not come back
--spot                 look for EC2's notice that it takes the instance back (ec2_watch.py)
--cpus N               use no more than N of the cores
--drain-after SECONDS  announce after so long that the node will be gone: its job has a time limit
--announce             announce the same at SIGTERM, by which schedulers and init systems say so
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Sequence

from .. import _core

TOUCH_SECONDS = 1.0
"""Between two touches of the file that shows that this agent lives."""


class Options(argparse.Namespace):
    """An agent's options, with their defaults."""

    alive: str | None = None
    spot: bool = False
    cpus: int | None = None
    drain_after: float | None = None
    announce: bool = False


def parse(arguments: Sequence[str]) -> Options:
    """Return the options of a command line. End the process if it has others."""
    parser = argparse.ArgumentParser(prog="python -m skyward_lite.node.agent", add_help=False, allow_abbrev=False)
    parser.add_argument("--alive")
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--cpus", type=int)
    parser.add_argument("--drain-after", type=float)
    parser.add_argument("--announce", action="store_true")
    return parser.parse_args(arguments, Options())


def begin(options: Options) -> None:
    """Begin what the options ask for, and return. Called on the main thread, before any other thread is started."""
    if options.announce:
        # Blocked for all threads, those of the core included, so that the thread that waits for it gets it. Workers and
        # what they start are freed of this (worker.py).
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        _start("signals", _announce_at_sigterm)
    if options.alive is not None:
        _start("signs", _touch, pathlib.Path(options.alive))
    if options.drain_after is not None:
        _start("limit", _announce_after, options.drain_after)
    if options.spot:
        # Not at the module's head: its HTTP client would make up a good part of every other agent's start.
        from . import ec2_watch

        ec2_watch.begin()


def _start(name: str, target: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=target, args=arguments, name=name, daemon=True).start()


def _touch(alive: pathlib.Path) -> None:
    while True:
        # The file's directory may be missing until the guard has begun. Then a later touch counts.
        with contextlib.suppress(OSError):
            alive.touch()
        time.sleep(TOUCH_SECONDS)


def _announce_at_sigterm() -> None:
    """Announce that the node will be gone at the first SIGTERM; before a client is served, end the agent."""
    signal.sigwait({signal.SIGTERM})
    if not _core.drain("it was told to end (SIGTERM): its machine or its job is being ended"):
        os._exit(128 + signal.SIGTERM)
    while True:
        # What runs is to end in the time that is left. SIGKILL ends that time.
        signal.sigwait({signal.SIGTERM})


def _announce_after(seconds: float) -> None:
    time.sleep(max(0.0, seconds))
    while not _core.drain("its job will soon be at its time limit"):
        time.sleep(TOUCH_SECONDS)
