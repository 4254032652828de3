"""The core's log, which `SKYWARD_LOG` turns on at the client and in the agents."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import operator, os, signal
import skyward_lite as sky
with sky.pool(sky.Local(nodes=1), worker=sky.Worker(concurrency=1)) as pool:
    pool.submit(operator.neg, 1).result()
print("done")
"""


def log_of(level):
    environment = {**os.environ, "SKYWARD_LOG": level}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout == "done\n"
    return ran.stderr.splitlines()


@pytest.fixture(scope="module")
def debug_log():
    return log_of("debug")


def lines_of(log, room):
    return [line for line in log if f"skyward_lite::{room}" in line]


def test_log_of_the_client_has_a_nodes_life(debug_log):
    """At level debug the client logs that a node is connected, greeted, ready and closed, in this order."""
    text = "\n".join(lines_of(debug_log, "client"))
    places = [text.find(event) for event in ("connected, and auth", "hello of the agent", '"ready"', '"closed"')]
    assert -1 not in places, text
    assert places == sorted(places), text


def test_log_of_an_agent_has_its_workers(debug_log):
    """At level debug an agent logs the start and end of workers to standard error, for `Local()` the client's."""
    text = "\n".join(lines_of(debug_log, "node"))
    places = [text.find(event) for event in ("hello of the client", "worker started", "worker ended")]
    assert -1 not in places, text
    assert places == sorted(places), text


@pytest.mark.parametrize("level", ["", "off", "ERROR"])
def test_log_is_off_by_default(level):
    """Without a level, or with one that no event reaches, standard error stays empty."""
    assert log_of(level) == []


@pytest.mark.parametrize("level", ["trace", "verbose"])
def test_log_without_a_reader_costs_no_task(level):
    """Standard error is a pipe whose reader is gone: the pool works, and nothing is logged."""
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "SKYWARD_LOG": level}
    command = [sys.executable, "-c", PROGRAM]
    try:
        ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=write, text=True, timeout=60)
    finally:
        os.close(write)
    assert (ran.returncode, ran.stdout) == (0, "done\n")


def test_log_level_that_does_not_exist():
    """A wrong level prints one line per process with the variable and the levels, and the pool works."""
    lines = log_of("verbose")
    assert lines
    assert all("SKYWARD_LOG" in line and "trace" in line for line in lines)
