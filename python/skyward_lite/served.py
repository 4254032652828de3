"""What a client tells a worker of the user's modules, in answer to a request: see `client/sources.py`."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


class Served(NamedTuple):
    """One unit: a module's file, or a package's directory, with all that is sent of it."""

    digest: str
    """Names its content."""
    size: int
    """Bytes of the packed content."""
    refused: dict[str, str]
    """Its modules that are not sent, and why: by name."""
    path: str
    """What `Image(includes=)` has to name for all of it to be sent; for errors."""
    left_out: dict[str, int]
    """Its data files that are not sent, and their bytes: by path relative to the directory that has the unit."""


@dataclasses.dataclass
class Answer:
    """What is local at the client in one generation, as far as it is known there."""

    names: frozenset[str] = frozenset()
    """Names for which a worker is to ask before it looks among what is installed on its node."""
    namespaces: frozenset[str] = frozenset()
    """Local packages without a file, of which other parts may be installed on the node."""
    units: dict[str, Served] = dataclasses.field(default_factory=dict)
    """By the name of the module or package."""
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    """Why a local module cannot be sent: by name."""
    contents: list[tuple[str, int, bytes]] = dataclasses.field(default_factory=list)
    """Packed contents: digest, offset, and so many bytes from there on. More of them is asked for by digest."""
    absent: frozenset[str] = frozenset()
    """Names that were asked for, and that no local module has."""
    error: str = ""
    """Why there is no answer; empty if there is one."""
