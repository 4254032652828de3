"""Make the pictures of docs/looking-inside.md: `PYTHONPATH=tests/support python docs/pictures.py`.

Chromium must be installed and, for the notebook's picture, nbconvert.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

import skyward_lite as sky
from browser import Browser
from joblib import Parallel, delayed

DOCS = Path(__file__).parent


def load(seconds: float) -> None:
    time.sleep(seconds)


def fit(seconds: float) -> None:
    time.sleep(seconds)


def score(seconds: float, depth: int) -> None:
    time.sleep(seconds)
    if depth == 7:
        raise ValueError("no model of depth 7")


def run(directory: Path) -> Path:
    """Return the report of a run of about 15 seconds on three nodes, in which some tasks fail."""
    sys.modules["__main__"].__file__ = "train.py"
    for function in (load, fit, score):
        function.__module__ = "train"
    chance = random.Random(4)
    with sky.pool(sky.Local(nodes=3), worker=sky.Worker(concurrency=6)) as pool:
        Parallel(n_jobs=-1, batch_size=1)(delayed(load)(chance.uniform(0.1, 0.3)) for _ in range(60))
        Parallel(n_jobs=-1, batch_size=1)(delayed(fit)(chance.lognormvariate(-0.6, 0.5)) for _ in range(220))
        futures = [pool.submit(score, chance.uniform(0.1, 0.5), number % 40) for number in range(160)]
        failed = sum(future.exception() is not None for future in futures)
    print(f"{failed} tasks failed")
    return pool.report(directory / "train.html")


IMPORTS = "import skyward_lite as sky\nfrom joblib import Parallel, delayed\nfrom time import sleep\n\n"
NOTEBOOK = (
    IMPORTS + "pool = sky.pool(sky.Local(nodes=3), worker=sky.Worker(concurrency=6)).start()",
    "results = Parallel(n_jobs=-1)(delayed(sleep)(0.1) for _ in range(500))\npool.status()",
)


def notebook(directory: Path) -> Path:
    """Return a notebook of two cells, executed, as Jupyter shows it."""
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import ExecutePreprocessor

    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (*NOTEBOOK, "pool.close()")])
    ExecutePreprocessor(timeout=60).preprocess(made)
    made.cells.pop()
    path = directory / "notebook.html"
    path.write_text(HTMLExporter().from_notebook_node(made)[0])
    return path


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        report = run(Path(directory))
        for name, dark in (("report.png", False), ("report-dark.png", True)):
            with Browser(1180, 1135, dark=dark) as browser:
                browser.open(report)
                browser.picture(DOCS / "_static" / name)
        page = notebook(Path(directory))
        with Browser(1060, 420) as browser:
            browser.open(page)
            height = browser.run("Math.ceil(document.querySelector('main').getBoundingClientRect().height)")
            browser.picture(DOCS / "_static" / "status.png", width=1060, height=height)


if __name__ == "__main__":
    main()
