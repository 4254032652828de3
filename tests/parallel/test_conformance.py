"""A part of `make conformance`: joblib's own tests with skyward in the place of loky."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "conformance" / "run.py"
CASES = (
    "as_context_manager or kwargs or dispatch or timeout_success or byteorder or pickling or nesting_level or error_in"
)


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_joblib_conformance(executor, tmp_path):
    """A part of joblib's own tests passes with the installed joblib; the whole takes minutes."""
    options = ["--cache", str(tmp_path), "--joblib", "installed", "--executor", executor]
    command = [sys.executable, str(RUN), *options, "--", "-q", "-k", CASES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, passed, _, _, failed = done.stdout.split("\n")[-2].split()
    assert int(passed) > 30
    assert int(failed) == 0
