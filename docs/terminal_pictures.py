"""Make the pictures of the terminal: docs/_static/start.svg and progress.svg.

    .venv/bin/python docs/terminal_pictures.py

Real programs run on a real terminal (tmux): one brings up three hosts (`sshd`s of this machine, whose environments are
made anew, which needs PyPI), the other runs tasks. What is on the screen then becomes a picture.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from screens import Screen  # noqa: E402

COLUMNS = 76

START = """
import pathlib, tempfile
from lab import Lab
import skyward_lite as sky

lab = Lab(pathlib.Path(tempfile.mkdtemp()))
try:
    for name in ("lab1", "lab2", "gpu"):
        lab.host(name=name)
    image = sky.Image(pip=["numpy", "scipy"])
    with sky.pool(sky.SSH("lab1", "lab2", "gpu", config=lab.config), image=image):
        pass
finally:
    lab.close()
"""
PROGRESS = """
import time
from concurrent.futures import wait
import skyward_lite as sky

def fit(number):
    time.sleep(0.1)
    if number % 50 == 0:
        print(f"fit {number}: score {0.9 + number % 7 / 100:.2f}")
    if number % 300 == 299:
        raise ValueError(number)

with sky.pool(sky.Local(nodes=3), worker=sky.Worker(concurrency=8)) as pool, sky.progress(total=2000):
    wait([pool.submit(fit, number) for number in range(2000)])
"""


def picture(program: str, prompt: str, seen: Callable[[str], object]) -> str:
    """Return what is on the screen when `seen` is true of it, as a picture below the prompt."""
    screen = Screen(Path(tempfile.mkdtemp()), COLUMNS, 20)
    try:
        screen.run(program)
        screen.wait(seen, 120)
        text = screen.text(colours=True)
    finally:
        screen.close()
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text(prompt, style="bold"))
    console.print(Text.from_ansi(text))
    svg = console.export_svg(title="", unique_id="terminal")
    # The picture loads nothing from elsewhere: the browser's own fixed-width font does.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return re.sub(r"font-family: Fira Code, monospace|font-family: Fira Code", "font-family: monospace", svg)


def main() -> None:
    """Write both pictures."""
    static = ROOT / "docs" / "_static"
    start = picture(START, "$ python train.py", lambda text: text.count("downloading") + text.count("installing") >= 2)
    (static / "start.svg").write_text(start)
    seen = re.compile(r" [6-9]\d\d of 2,000 tasks done")
    (static / "progress.svg").write_text(picture(PROGRESS, "$ python train.py", seen.search))


if __name__ == "__main__":
    main()
