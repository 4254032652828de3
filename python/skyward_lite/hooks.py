"""What a plugin is: a frozen record of optional hooks.

Both ends read this module, so it imports nothing of the client. The plugins that come with the package are made in
`client/joblib_plugin.py`, and `plugins.py` is the public face of all of this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from . import checks, keywords
from .image import Image


@dataclasses.dataclass(frozen=True)
class WorkerInfo:
    """A worker process, as plugins' `around_worker` get it.

    Parameters
    ----------
    node : str
        The name of its node.
    pid : int
        Its process id.
    slots : int
        How many tasks it runs at once.
    """

    node: str
    pid: int
    slots: int


@keywords.explained("Plugin")
@dataclasses.dataclass(frozen=True)
class Plugin:
    """A named set of hooks; each may be left out. The first plugin of a list is the outermost.

    `around_worker` and `decorate` are pickled to the nodes, at most 32 KiB for all plugins.

    Parameters
    ----------
    name : str
        The name, for messages.
    preload : sequence of str, optional
        Modules that the client and the workers import while the nodes start, so that the first task does not wait for
        them. A module that is missing is no error.
    transform : function of an Image, optional
        `transform(image)` returns the image with what the plugin needs on the nodes.
    around_client : function of a ComputePool, optional
        `around_client(pool)` returns a context manager. The pool enters it when its nodes are ready and leaves it
        before they are released.
    around_worker : function of a WorkerInfo, optional
        `around_worker(info)` returns a context manager. Each worker process enters it on its main thread before the
        first task and leaves it, within 2 s, when the pool is left in order; a process that is killed does not leave
        it. If entering raises, the node does not start.
    decorate : function of a function, optional
        `decorate(fn)` returns what a worker calls in place of each task's function.

    Examples
    --------
    >>> import functools
    >>> def twice(fn):
    ...     return functools.wraps(fn)(lambda *args: 2 * fn(*args))
    >>> with sky.pool(plugins=[sky.Plugin("twice", decorate=twice)]) as pool:
    ...     pool.submit(abs, -21).result()
    42
    """

    name: str
    preload: Sequence[str] = ()
    transform: Callable[[Image], Image] | None = None
    around_client: Callable[[Any], AbstractContextManager[object]] | None = None
    around_worker: Callable[[WorkerInfo], AbstractContextManager[object]] | None = None
    decorate: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None

    def __post_init__(self) -> None:
        checks.text("Plugin", "name", self.name, '"mine"')
        object.__setattr__(self, "preload", checks.texts("Plugin", "preload", self.preload, '["numpy"]'))
        examples = {
            "transform": "lambda image: image.with_pip('numpy')",
            "around_client": "a function of the pool under @contextlib.contextmanager",
            "around_worker": "a function of a sky.WorkerInfo under @contextlib.contextmanager",
            "decorate": "lambda fn: fn",
        }
        for name, example in examples.items():
            if getattr(self, name) is not None:
                checks.function("Plugin", name, getattr(self, name), example)
