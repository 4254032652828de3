"""What type checkers see of the public API."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_the_api_has_its_types(tmp_path):
    """mypy, strict, finds in `typing/api.py` every type that is asserted and every mistake that is marked."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "tests/docs/typing/api.py"]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
