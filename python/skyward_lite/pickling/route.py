"""Between which processes a payload travels: what may go by name, and what would be lost, depends on it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Route:
    """One direction between the client and the nodes of a pool.

    `shares_files`: the nodes see the client's files and processes under the same names.
    `to_client`: a result travels, not a task.
    """

    shares_files: bool
    to_client: bool


BY_VALUE = Route(shares_files=False, to_client=True)
"""The route of what is pickled for no pool: nothing goes by name."""
