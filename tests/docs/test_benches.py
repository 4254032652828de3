"""The demo and the benches run; their figures are for `make demo` and `make bench` to print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

BENCHES = Path(__file__).parent.parent.parent / "benches"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("demo.py", "equal the serial run's"),
        ("bench.py", "skyward_lite is"),
        ("ssh.py", "× ssh"),
        ("ways.py", "MB/s from a node"),
        ("modules.py", "there already"),
        ("round_trips.py", "of the slots' time"),
        # Without the grid search, which the demo has, too.
        ("data.py start tiny shared distinct bulk far small memory", "too little data"),
    ],
)
def test_demo_and_benches_run(line, says, tmp_path):
    """The demo and the benches run with few tasks, their own checks of the results pass, and the chart is drawn."""
    script, *sections = line.split()
    measured, chart = tmp_path / "measured.json", tmp_path / "chart.svg"
    options = ["--json", str(measured)] if sections else []
    command = [sys.executable, str(BENCHES / script), "--smoke", *options, *sections]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert done.stderr == ""
    if sections:
        page = tmp_path / "page.md"
        page.write_text("# Page\n\n<!-- chart -->\nold\n<!-- end of chart -->\n")
        subprocess.run(
            [sys.executable, str(BENCHES / "chart.py"), str(measured), str(chart), str(page)], timeout=50, check=True
        )
        assert page.read_text().count("\n| ") == 5
        root = ElementTree.fromstring(chart.read_text())
        names = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
        # The two contestants that need no other interpreter, in each of the four panels.
        assert names.count("skyward_lite") == names.count("loky") == 4
