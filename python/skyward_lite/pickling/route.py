"""Between which processes a payload travels. What may go by name, and what would be lost, depends on it.

A room of its own, because all who pickle need it.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Route:
    """One direction between the client and the nodes of a pool.

    `shares_files`: the nodes see the client's files and processes under the names that these have at the client.
    `to_client`: results travel, and not tasks.
    """

    shares_files: bool
    to_client: bool


BY_VALUE = Route(shares_files=False, to_client=True)
"""The route of values that are pickled for no pool: no file and no process goes by its name."""
