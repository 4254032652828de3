"""What makes an environment on a host: uv, the host's or our own copy, or Python's own venv with pip. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from .._version import PYTHON
from ..errors import NodeStartError
from ..image import Image
from .probe import Facts


@dataclasses.dataclass(frozen=True)
class Tools:
    """What makes an environment and installs packages in it."""

    python: str | None
    """The interpreter on the host of which the environment is made. None: the one that uv finds there, or downloads."""
    uv: str | None = None
    """uv's path on the host. None: Python's own venv and pip, or our own copy before it is sent."""
    own: bool = False
    """Whether uv is our own copy."""


def choose(facts: Facts, image: Image, unfit: Callable[[Facts], str]) -> list[Tools]:
    """Return what can make the environment, in the order in which it is to be tried.

    `unfit` returns why our own copy of uv cannot be sent to the host, empty if it can. It reads a large file, so it is
    called only if that matters.

    uv comes first, because it takes a tenth of pip's time. Where the host's pip has settings of its own, which uv does
    not read, pip alone is used if it can be: uv might ask another index than the one that the host's owner has set.

    Raises `NodeStartError` if the host has no means to make an environment.
    """
    pip = Tools(facts.python) if facts.python and facts.venv else None
    if pip is not None and facts.pip_settings:
        return [pip]
    if facts.uv:
        found = [Tools(facts.python, facts.uv)]
    elif why := unfit(facts):
        if pip is None:
            raise NodeStartError(_lacking(facts, image, why))
        found = []
    else:
        found = [Tools(facts.python, own=True)]
    return found if pip is None else [*found, pip]


def _lacking(facts: Facts, image: Image, unfit: str) -> str:
    """Return the error for a host that cannot make an environment."""
    if facts.python:
        return f"{facts.python} cannot make environments: install python{PYTHON}-venv there, or uv ({unfit})"
    wanted = f"Python {PYTHON}, which is the client's" if image.python in (None, PYTHON) else f"Python {image.python}"
    seen = f" (it has {', '.join(facts.others)})" if facts.others else ""
    return f"it has no {wanted}{seen}, and no uv to provide one ({unfit}): install either"
