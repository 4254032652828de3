"""`skyward check --exec` reports how a command leads to its nodes, and what to mend."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lab import QUICK
from skyward_lite.cli.inspection import allowed_cores

SUPPORT = Path(__file__).parent.parent / "support"
LOCAL = "env NODE={node} sh -c"
WITHOUT_STATUS = "sh -c 'sh -c \"$1\"; exit 0' sh"


def check(*arguments: str, command: tuple[str, str] = QUICK) -> tuple[int, str]:
    """Run the command `check` with this interpreter on the nodes. Return its exit status and what it printed."""
    line = [sys.executable, *command, "check", "--python", sys.executable, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=50, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def steps(command: str, status: int = 0) -> list[dict[str, Any]]:
    """Check one node behind the command. Return the report's steps."""
    found, text = check("--json", "--exec", command, "a")
    assert found == status, text
    (report,) = json.loads(text)["hosts"]
    assert report["usable"] is (status == 0)
    return list(report["steps"])


def noted(command: str) -> list[str]:
    """Check one node behind the command, which can be used. Return the names of the steps that have a note."""
    return [step["step"] for step in steps(command) if step["status"] == "note"]


def way(fault: str, directory: Path) -> str:
    """Return a command with a fault: see `tests/support/way.py`."""
    return shlex.join([sys.executable, str(SUPPORT / "way.py"), str(directory), fault, "{node}", "sh", "-c"])


def test_a_command_that_can_be_used():
    """The report of each node has every step with its figures."""
    status, text = check("--json", "--exec", LOCAL, "a", "b")
    assert status == 0, text
    reports = json.loads(text)["hosts"]
    assert [report["host"] for report in reports] == ["a", "b"]
    for report in reports:
        assert {step["status"] for step in report["steps"]} == {"ok"}
        assert [step["step"] for step in report["steps"]] == [
            *("program", "command", "exit status", "end of input", "shell", "system", "python", "versions", "size"),
            *("limits", "round trip", "to it", "from it", "echo", "survival"),
        ]
    figures = {name: value for step in reports[0]["steps"] for name, value in step["figures"].items()}
    assert figures["echo_64_ms"] > 0
    assert figures["echo_4096_ms"] > 0
    assert figures["first_byte_ms"] > 0


def test_the_lines_for_people():
    """The report for people names the command as one would type it."""
    status, text = check("--exec", LOCAL, "a")
    assert status == 0
    assert text.startswith("a: can be used\n  ok    program         /")
    assert "`env NODE=a sh -c` answers in " in text


@pytest.mark.parametrize(
    ("command", "step", "says"),
    [
        ("nodocker exec -i {node} sh -c", "program", "nodocker is no program on the PATH"),
        ("env NODE={node} sh", "command", "did not run the command line that was added to it"),
        ("env NODE={node} false", "command", "such as `sh -c`"),
    ],
)
def test_a_command_that_cannot_be_used(command, step, says):
    """A command that leads nowhere fails the step that shows why, and no later step is taken."""
    *before, last = steps(command, 1)
    assert all(earlier["status"] == "ok" for earlier in before)
    assert (last["step"], last["status"]) == (step, "fail")
    assert says in last["text"]


@pytest.mark.parametrize(
    ("quota", "cores"), [("150000 100000", 1.5), ("max 100000", None), ("-1 100000", None), ("", None), ("1 0", None)]
)
def test_the_cores_of_a_control_group(quota, cores):
    """A container's limit is read as either version of control groups writes it."""
    assert allowed_cores(quota) == cores


def test_a_terminal_is_found_out(tmp_path):
    """A command that gives its program a terminal is reported with the option to leave out."""
    last = steps(way("terminal", tmp_path), 1)[-1]
    assert (last["step"], "has a terminal" in last["text"], "-it" in last["text"]) == ("command", True, True)


def test_what_a_command_keeps_to_itself_is_noted(tmp_path):
    """A status and the end of the input that are not passed on are notes, and the nodes can be used."""
    assert noted(WITHOUT_STATUS) == ["exit status"]
    assert noted(way("noeof", tmp_path)) == ["end of input"]
    assert noted(way("lingers", tmp_path)) == ["exit status"]
    assert noted(way("banner", tmp_path)) == []


def test_a_command_that_ends_what_it_has_started():
    """A command that takes processes along when it is cut is noted: after a cut a new agent is started."""
    assert noted(shlex.join([sys.executable, str(SUPPORT / "logout.py")])) == ["survival"]
