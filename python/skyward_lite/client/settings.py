"""What `pool()` and `Worker()` take, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NoReturn

from .. import checks, keywords
from ..hooks import Plugin
from ..image import Image
from ..providers import Provider
from ..providers.local import Local

MAX_PAYLOAD = 1 << 40
"""Largest `Worker(max_payload=)`, in bytes: more than a machine's memory."""
MAX_SIZE = 1_000_000
"""Largest `pool(vcpus=)`, in cores, and largest `pool(memory_gb=)` and `Worker(cache_gb=)`, in GB."""


@keywords.explained("Worker")
@dataclasses.dataclass(frozen=True)
class Worker:
    """How each node runs tasks.

    Parameters
    ----------
    concurrency : int, optional
        Tasks that a node runs at once, at most 4,096. None, the default, means one per core of the node.
    executor : {"thread", "process"}, default "thread"
        "thread": one process on each node, in which `concurrency` threads run tasks. "process": so many processes, each
        of which runs its tasks on its main thread. A process of several threads runs no task on its main thread, so
        signal handlers cannot be set there. The documentation has a page on what tasks of one process share.
    retries : int, default 3
        How often a task may run again after its node was lost, from 0 to 1,000.
    max_payload : int, default 4 GiB
        Bytes of the largest pickled task or result, at most 1 TiB.
    task_timeout : float, optional
        Seconds that one call may run before its node ends it, with its process, and it fails with `TaskTimeoutError`.
        None, the default, means no limit. The node looks at it five times a second. Other tasks of that process run on
        for up to 3 s, and those that do not end in that time run again.
    cache_gb : float, optional
        GB of a node's memory for data that tasks share. Arrays and other large data are sent to a node once, and kept
        there for later tasks. When they are more than this, those that were used least recently are dropped, and sent
        again with the next task that has them. None, the default, means a quarter of the node's memory; nodes of
        `sky.Local()`, which share one machine's memory, have equal parts of a quarter of it.

    Raises
    ------
    TypeError, ValueError
        If a value is of a wrong type or out of range; the text names the parameter.

    Examples
    --------
    Pure-Python work, which would hold the GIL, on four processes of each node:

    >>> sky.Worker(concurrency=4, executor="process").executor
    'process'
    """

    concurrency: int | None = None
    executor: Literal["thread", "process"] = "thread"
    retries: int = 3
    max_payload: int = 4 << 30
    task_timeout: float | None = None
    cache_gb: float | None = None

    def __post_init__(self) -> None:
        if self.concurrency is not None:
            most = checks.MAX_CONCURRENCY
            slots = checks.whole("Worker", "concurrency", self.concurrency, 1, most, "None for one per core")
            object.__setattr__(self, "concurrency", slots)
        if self.executor not in ("thread", "process"):
            given = str(self.executor).lower()
            meant = "thread" if "thread" in given else "process" if "proc" in given or given == "loky" else ""
            write = meant and f', so write executor="{meant}"'
            raise ValueError(f'Worker(executor={checks.shown(self.executor)}): "thread" or "process"{write}')
        object.__setattr__(self, "retries", checks.whole("Worker", "retries", self.retries, 0, 1000))
        most = checks.whole("Worker", "max_payload", self.max_payload, 1, MAX_PAYLOAD)
        object.__setattr__(self, "max_payload", most)
        if self.task_timeout is not None:
            object.__setattr__(self, "task_timeout", checks.seconds("Worker", "task_timeout", self.task_timeout))
        if self.cache_gb is not None:
            object.__setattr__(self, "cache_gb", checks.number("Worker", "cache_gb", self.cache_gb, MAX_SIZE, "GB"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """The parameters of one pool as the user meant them: checked, and with the defaults in place. Never changed."""

    provider: Provider
    min_nodes: int
    """Nodes that must be ready before the block begins."""
    wanted_nodes: int
    vcpus: int | None
    memory_gb: float | None
    worker: Worker
    image: Image
    """The user's own, without what the plugins add."""
    plugins: tuple[Plugin, ...]
    lease: float
    """Seconds, as the two timeouts that follow."""
    connect_timeout: float
    start_timeout: float
    strict_env: bool
    progress: bool | None
    """Whether tasks are shown as well as the start; None for the start alone, and false for neither."""
    ship_modules: bool
    """Whether workers on nodes without this machine's files import the user's modules from what this process serves."""


def checked(
    provider: Provider | None,
    nodes: int | tuple[int, int] | list[int] | None,
    *,
    vcpus: int | None,
    memory_gb: float | None,
    worker: Worker | None,
    image: Image | None,
    plugins: Sequence[Plugin],
    lease: float,
    connect_timeout: float,
    start_timeout: float,
    strict_env: bool,
    ship_modules: bool,
    progress: bool | None = None,
) -> Settings:
    """Return the settings of a pool with these parameters, which are described at `ComputePool`.

    Raise `TypeError` or `ValueError` that names the parameter and what it takes.
    """
    _check_types(provider, worker, image, plugins)
    provider = Local() if provider is None else provider
    min_nodes, wanted_nodes = _node_counts(nodes, provider)
    return Settings(
        provider=provider,
        min_nodes=min_nodes,
        wanted_nodes=wanted_nodes,
        vcpus=None if vcpus is None else checks.whole("pool", "vcpus", vcpus, 1, MAX_SIZE),
        memory_gb=None if memory_gb is None else checks.number("pool", "memory_gb", memory_gb, MAX_SIZE, "GB"),
        worker=Worker() if worker is None else worker,
        image=Image() if image is None else image,
        plugins=tuple(plugins),
        lease=checks.seconds("pool", "lease", lease),
        connect_timeout=checks.seconds("pool", "connect_timeout", connect_timeout),
        start_timeout=checks.seconds("pool", "start_timeout", start_timeout),
        strict_env=checks.switch("pool", "strict_env", strict_env),
        ship_modules=checks.switch("pool", "ship_modules", ship_modules),
        progress=None if progress is None else checks.switch("pool", "progress", progress),
    )


def _check_types(provider: object, worker: object, image: object, plugins: object) -> None:
    """Raise `TypeError` for a value of the wrong type, with an example of a right one."""
    if provider is not None and not isinstance(provider, Provider):
        _refuse_provider(provider)
    if worker is not None and not isinstance(worker, Worker):
        slots = worker if type(worker) is int else 4
        checks.wrong("pool", "worker", worker, "a sky.Worker", f"sky.Worker(concurrency={slots})")
    if image is not None and not isinstance(image, Image):
        checks.wrong("pool", "image", image, "a sky.Image", "sky.Image(pip=['numpy'])")
    several = isinstance(plugins, Sequence) and not isinstance(plugins, str)
    for plugin in plugins if isinstance(plugins, Sequence) and several else [plugins]:
        if not several or not isinstance(plugin, Plugin):
            names = str(getattr(plugin, "__name__", getattr(plugin, "name", plugin)))
            name = "sklearn" if names in ("sklearn", "scikit-learn") else "joblib"
            value = checks.shown(plugins)
            raise TypeError(f"pool(plugins={value}): a list of plugins, such as [sky.plugins.{name}()]")


def _refuse_provider(provider: object) -> NoReturn:
    """Raise `TypeError` for what is no provider, with what was probably meant."""
    example = "sky.Local(nodes=2) or sky.SSH('me@lab1')"
    if isinstance(provider, Worker | Image):
        name = type(provider).__name__
        raise TypeError(
            f"pool(provider=sky.{name}(...)): a {name} goes to another parameter: "
            f"write pool({name.lower()}=sky.{name}(...))"
        )
    if isinstance(provider, type) and issubclass(provider, Provider):
        example = {"SSH": "sky.SSH('me@lab1')", "Local": "sky.Local(nodes=2)"}.get(
            provider.__name__, f"sky.{provider.__name__}()"
        )
    elif isinstance(provider, str):
        named = {"aws": "sky.AWS()", "ec2": "sky.AWS()", "local": "sky.Local(nodes=2)"}
        example = named.get(provider.lower(), example)
    elif isinstance(provider, int) and not isinstance(provider, bool):
        example = f"sky.Local(nodes={provider}), or pool(nodes={provider}) for the number of nodes"
    checks.wrong("pool", "provider", provider, "a provider", example)


def _node_counts(nodes: int | tuple[int, int] | list[int] | None, provider: Provider) -> tuple[int, int]:
    """Return the numbers of nodes that a pool needs at least and that it asks for."""
    if nodes is None:
        nodes = provider.nodes or 1
    counts = nodes if isinstance(nodes, tuple | list) and len(nodes) == 2 else (nodes, nodes)
    either = "two: (least, wanted)"
    least, wanted = (checks.whole("pool", "nodes", count, 1, checks.MAX_NODES, either) for count in counts)
    if provider.nodes is not None and wanted != provider.nodes:
        raise ValueError(
            f"pool(nodes={nodes}) and {provider!r} disagree: say the number of nodes once, "
            f"or write nodes=(least, {provider.nodes})"
        )
    if least > wanted:
        raise ValueError(
            f"pool(nodes={nodes}): the smaller number comes first, as (least, wanted): write nodes=({wanted}, {least})"
        )
    return least, wanted
