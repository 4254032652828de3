"""What a client tells an agent when it greets it, and the agent its workers.

`wire/hello.rs` has the same two records with the same fields; the core converts one into the other, by their names.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """How an agent runs its workers. Made at the client; each worker has it as `WorkerRuntime.settings`."""

    concurrency: int | None
    """Tasks at once on the node; None for one per core."""
    processes: bool
    """Whether each of these tasks has a process, rather than a thread of one process."""
    env: dict[str, str]
    """Set in the workers' environment before they start."""
    sys_path: list[str]
    """The client's import path, where the node shares its files; otherwise empty."""
    shares_files: bool
    """Whether the node sees the client's files and processes under the same names."""
    serves_modules: bool
    """Whether workers ask the client for its local modules."""
    preload: list[str]
    """Modules that a worker imports before it takes tasks."""
    max_payload: int
    """Largest pickled task or result, in bytes."""
    cache_bytes: int | None
    """Bytes of shared data that the node keeps between tasks; None for a share of its memory."""
    task_timeout_ms: int | None
    """How long one call may run, in milliseconds; None for as long as it likes."""
    context: str
    """What the client's program has set for all of its calculations, as JSON: see `client/context.py`."""
    setup: str
    """The plugins' hooks, pickled, in base64; empty for none."""
    unwind: bool
    """Whether workers are asked to end, so that hooks can be undone, before they are killed."""


@dataclasses.dataclass(frozen=True)
class ClientHello:
    """The client's greeting."""

    version: str
    """The client's version of this package; the node's must be the same."""
    run: str
    """Names the pool."""
    node: str
    """What the client calls this node."""
    python: str
    """The client's Python, as "3.11"; the node's must be the same."""
    lease_ms: int
    """How long the node works on without hearing from the client, in milliseconds."""
    generation: int
    """The generation of the user's modules: that of the node's first workers."""
    worker: WorkerSettings
