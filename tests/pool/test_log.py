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


def test_the_client_logs_the_life_of_a_node(debug_log):
    """At level debug: connected, greeted, ready and closed, in this order."""
    text = "\n".join(lines_of(debug_log, "client"))
    places = [text.find(event) for event in ("connected, and auth", "hello of the agent", '"ready"', '"closed"')]
    assert -1 not in places, text
    assert places == sorted(places), text


def test_an_agent_logs_its_workers_to_its_standard_error(debug_log):
    """At level debug: greeted, a worker started and ended. An agent of Local() has the client's standard error."""
    text = "\n".join(lines_of(debug_log, "node"))
    places = [text.find(event) for event in ("hello of the client", "worker started", "worker ended")]
    assert -1 not in places, text
    assert places == sorted(places), text


@pytest.mark.parametrize("level", ["", "off", "ERROR"])
def test_nothing_is_logged_unless_asked_for(level):
    """Without a level, or with one that nothing reaches, standard error stays empty."""
    assert log_of(level) == []


@pytest.mark.parametrize("level", ["trace", "verbose"])
def test_a_log_that_nobody_reads_costs_no_task(level):
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


def test_a_value_that_is_no_level_is_named():
    """A line names the variable and the levels, once in each process, and the pool works."""
    lines = log_of("verbose")
    assert lines
    assert all("SKYWARD_LOG" in line and "trace" in line for line in lines)
