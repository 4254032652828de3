"""The demo and the benches run; their figures are for `make demo` and `make bench` to print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).parent.parent.parent / "benches"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("demo.py", "equal the serial run's"),
        ("bench.py", "skyward_lite is"),
        ("ssh.py", "× ssh"),
        ("modules.py", "there already"),
        # Without the grid search, which the demo has, too.
        ("data.py shared distinct bulk far small memory", "too little data"),
    ],
)
def test_demo_and_benches_run(line, says):
    """The demo and the benches run with few tasks, and their own checks of the results pass."""
    script, *sections = line.split()
    command = [sys.executable, str(BENCHES / script), "--smoke", *sections]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert done.stderr == ""
