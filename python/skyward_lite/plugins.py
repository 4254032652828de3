"""Plugins: frozen records of optional hooks, composed in list order and unwound in reverse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .image import Image, installed

if TYPE_CHECKING:
    from .client.pool import ComputePool


@dataclasses.dataclass(frozen=True)
class WorkerInfo:
    """A worker process: its node's name, its process id and how many tasks it runs at once."""

    node: str
    pid: int
    slots: int


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A named set of hooks; each may be left out. The first plugin of a list is the outermost.

    `preload` are modules that the client and the workers import while the nodes start, so that the first task does
    not wait for them; one that is missing is no error.
    `transform(image)` gives the image with what the plugin needs on the nodes.
    `around_client(pool)` is a context manager that is entered when the pool's nodes are ready and left before they are
    let go.
    `around_worker(info)` is a context manager that each worker process enters on its main thread before its first task
    and leaves, within 2 s, when the pool is left in order; a process that is killed does not. If entering raises, the
    node does not start.
    `decorate(fn)` gives what a worker calls in place of each task's function.

    The last two are pickled to the nodes, at most 32 KiB for all plugins.
    """

    name: str
    preload: Sequence[str] = ()
    transform: Callable[[Image], Image] | None = None
    around_client: Callable[[ComputePool], AbstractContextManager[object]] | None = None
    around_worker: Callable[[WorkerInfo], AbstractContextManager[object]] | None = None
    decorate: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None


def joblib(version: str | None = None) -> Plugin:
    """Make `joblib.Parallel` run on the pool for the length of its block.

    The nodes get joblib in `version`; None means the client's own, which is what pickles need, unless the image asks
    for another. They get threadpoolctl as well if the client has it: `inner_max_num_threads` needs it there.
    """

    def transform(image: Image) -> Image:
        return _with_joblib(image, version)

    return Plugin("joblib", preload=["joblib"], transform=transform, around_client=_joblib_backend)


def sklearn(version: str | None = None) -> Plugin:
    """Do what `joblib()` does, with scikit-learn on the nodes: whatever has an `n_jobs` there runs on the pool.

    The nodes get scikit-learn in `version`; None means the client's own, or the latest where the client has none,
    unless the image asks for another. `joblib(version=...)` may stand beside it to pin joblib too, before or after.
    """

    def transform(image: Image) -> Image:
        return _with_joblib(image, None).with_package("scikit-learn", version)

    # The first loads nearly all that tasks need (1 s), the second ensembles and their trees (0.1 s).
    preload = ["joblib", "sklearn.model_selection", "sklearn.ensemble"]
    return Plugin("sklearn", preload=preload, transform=transform, around_client=_joblib_backend)


def _with_joblib(image: Image, version: str | None) -> Image:
    image = image.with_package("joblib", version)
    return image if installed("threadpoolctl") is None else image.with_package("threadpoolctl", None)


def _joblib_backend(pool: ComputePool) -> AbstractContextManager[object]:
    # Not at the module's head: importing joblib takes 0.1–0.4 s. By now `preload` has done it.
    from .client import joblib_backend as backend

    return backend.around_client(pool)
