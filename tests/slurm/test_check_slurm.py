"""`skyward check --slurm` asks a real cluster, runs a job of one node, and leaves nothing."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import slurm
from lab import program
from processes import eventually

QUICK = program(
    "from skyward_lite.cli import check_slurm, echo; check_slurm.QUEUE_SECONDS = 3.0; echo.ECHOES = 3; "
    "measure.SAMPLE_BYTES = (1 << 16,)"
)
"""Runs the command, but waits only briefly for a job, and measures with few bytes."""
NODE_STEPS = [
    *("program", "command", "exit status", "end of input", "shell", "system", "python", "versions", "size", "limits"),
    *("round trip", "to it", "from it", "echo"),
]


def start(cluster: slurm.Cluster, *options: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start the command with options of Slurm's."""
    line = [sys.executable, *QUICK, "check", "--json", "--slurm", *options]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=env or cluster.env, **streams)


def check(cluster: slurm.Cluster, *options: str, env: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Run the command with options of Slurm's. Return the reports, and compare the exit status with them."""
    with start(cluster, *options, env=env) as process:
        out, err = process.communicate(timeout=50)
    assert "Traceback" not in err
    reports: list[dict[str, Any]] = json.loads(out)["hosts"]
    assert process.returncode == (0 if all(report["usable"] for report in reports) else 1), out
    return reports


def names(report: Mapping[str, Any]) -> list[str]:
    """Return the names of the steps, without those that are notes."""
    return [step["step"] for step in report["steps"] if step["status"] != "note"]


def test_a_job_that_runs(cluster):
    """The cluster has a report, and so has a node with a real job, which is gone afterwards."""
    front, node = check(cluster, "partition=main", "time=10", "cpus-per-task=2")
    assert front["host"] == "Slurm(partition='main', time='10', cpus_per_task='2')"
    assert names(front) == ["programs", "controller", "options"]
    assert "in partition main" in front["steps"][-1]["text"]
    assert names(node) == ["job", *NODE_STEPS]
    job = node["steps"][0]
    assert job["figures"]["cpus"] == 2
    assert 0 < job["figures"]["time_left_s"] <= 600
    figures = {name: value for step in node["steps"] for name, value in step["figures"].items()}
    assert figures["echo_64_ms"] > 0
    (python,) = [step for step in node["steps"] if step["step"] == "python"]
    assert "this process's own, is there as well" in python["text"]
    assert eventually(cluster.is_empty, 20), cluster.leftovers()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("partition=nope", "invalid partition specified: nope"),
        ("partishun=main", "unrecognized option '--partishun=main'"),
        ("cpus_per_task=64", "Requested node configuration is not available"),
    ],
)
def test_options_that_slurm_refuses(cluster, option, says):
    """Options that no job can have are reported in Slurm's words, and nothing is submitted."""
    (front,) = check(cluster, option)
    last = front["steps"][-1]
    assert (last["step"], last["status"]) == ("options", "fail")
    assert says in last["text"]


def test_without_slurms_programs(cluster):
    """Where Slurm's programs are not on the PATH, they are named."""
    (front,) = check(cluster, "time=1", env={**cluster.env, "PATH": str(Path(sys.executable).parent)})
    (last,) = front["steps"]
    assert (last["step"], last["status"]) == ("programs", "fail")
    assert last["text"].startswith("there is no sbatch, scancel, srun, ")


def test_within_a_job(cluster, tmp_path):
    """Within a job, without options, all nodes of this job are checked, and nothing is submitted."""
    out = tmp_path / "report.json"
    line = shlex.join([sys.executable, *QUICK, "check", "--json", "--slurm"])
    job = cluster.submit(f"{line} >{out} 2>{tmp_path}/errors", "--nodes=2", "--exclusive")
    assert eventually(lambda: job not in cluster.jobs(), 40), cluster.jobs()
    front, *nodes = json.loads(out.read_text())["hosts"]
    assert names(front) == ["programs", "controller", "job"]
    assert f"this process is in job {job}: node1 with 4 CPUs, node2 with 4 CPUs" in front["steps"][-1]["text"]
    assert [node["host"] for node in nodes] == ["node1", "node2"]
    assert [names(node) for node in nodes] == [NODE_STEPS, NODE_STEPS]


def test_a_job_that_waits(cluster):
    """A job that does not start is a note with Slurm's reason, and is gone afterwards; also after Ctrl-C."""
    full = [cluster.fill(name) for name in cluster.names]
    try:
        _, node = check(cluster, "time=1")
        (step,) = node["steps"]
        assert (step["step"], step["status"]) == ("job", "note")
        assert "PENDING (" in step["text"]
        with start(cluster, "time=1") as process:
            assert eventually(lambda: len(cluster.jobs("PENDING")) == 1, 20)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=20)
        assert process.returncode
        assert eventually(lambda: set(cluster.jobs()) == set(full), 20), cluster.jobs()
    finally:
        cluster.cancel_all()
