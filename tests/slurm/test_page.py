"""The page about Slurm runs on a real cluster, and so does the bench whose figures the comparison has."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import snippets
from snippets import ROOT

CLUSTER = {
    "nodes": 4,
    "cpus": 16,
    "partitions": ("PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP",),
}
PAGE = ROOT / "docs" / "slurm.md"


def test_blocks_run(cluster, tmp_path):
    """The job's own nodes, jobs of its own and a file on a shared disk are used as the page says."""
    table = tmp_path / "table.npy"
    np.save(table, np.arange(1_000_000.0))
    blocks = [block.text for block in snippets.snippets(PAGE, "python", "slurm")]
    assert len(blocks) == 3
    text = "\n".join([*blocks, "print(results == list(range(2000)), float(means[0]), float(means[-1]))"])
    assert "/scratch/me/table.npy" in text
    assert 'mem="32G"' in text
    program = tmp_path / "page.py"
    program.write_text(text.replace("/scratch/me/table.npy", str(table)).replace('mem="32G"', 'mem="200M"'))
    command = ["salloc", "--quiet", "--nodes=2", "--cpus-per-task=16", sys.executable, str(program)]
    done = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True 499.5 999499.5\n"


def test_the_bench_runs(cluster):
    """The bench of batch systems runs with few tasks; its own checks of the results pass."""
    command = [sys.executable, str(ROOT / "benches" / "queues.py"), "skyward_lite", "--tasks", "20"]
    done = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    assert "  20 tasks in " in done.stdout
    assert done.stderr == ""
