"""Types of the public API as type checkers see them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_typing_of_the_public_api(tmp_path):
    """mypy in strict mode finds in `typing/api.py` every type that is asserted and every mistake that is marked."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "tests/docs/typing/api.py"]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
