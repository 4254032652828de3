"""Every example runs, with little to do, prints what its page shows, and is a page of the docs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = ROOT / "docs" / "examples"

EXAMPLES = {
    "grid_search.py": ("1", "best of 4 settings: C="),
    "million_tasks.py": ("20_000", "starts at 17,673 and has 278 steps"),
    "api_calls.py": ("60", "6 of them took a second attempt"),
    "sweep.py": ("2", "the last 2 were no better than 0.9"),
    "asyncio_app.py": ("50_000", "5,133 primes below 50,000"),
    "plugin.py": ("20", "of 20 pictures are recognised"),
}
"""Each example, its argument for a short run, and what it then prints."""
HELPERS = {"digits_model.py"}
"""Modules that an example imports."""


@pytest.mark.parametrize("script", EXAMPLES)
def test_example_runs(script):
    """The example, with little to do, prints its result, and nothing on standard error."""
    argument, says = EXAMPLES[script]
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / script, argument],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert done.stderr == ""


def test_every_example_is_a_page():
    """Each file in examples/ is run here, is included by the page of its name, and is listed beside the files."""
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert scripts == EXAMPLES.keys() | HELPERS
    pages = {path.name: path.read_text() for path in PAGES.glob("*.md")}
    assert {name.replace("_", "-").replace(".py", ".md") for name in EXAMPLES} == set(pages)
    listed = (ROOT / "examples" / "README.md").read_text()
    for script in scripts:
        assert f"[{script}]({script})" in listed
        assert any(f"```{{literalinclude}} ../../examples/{script}\n" in page for page in pages.values()), script
