"""`python -m skyward_lite` is the command `skyward`."""

from __future__ import annotations

from .cli.command import main as main
from .cli.command import run

if __name__ == "__main__":
    run()
