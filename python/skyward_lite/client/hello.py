"""What a node is told when its session begins: how it runs tasks."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from typing import Any

from .. import _core, nesting
from .._version import PYTHON, __version__
from ..hello import ClientHello, WorkerSettings
from ..hooks import Plugin
from ..image import Image
from ..pickling import payload
from ..pickling.modules import Modules
from ..providers import Machine
from . import context
from .settings import Settings

MAX_SETUP = _core.MAX_BODY // 2
"""Largest pickle of the plugins' hooks, in bytes: the whole hello must fit one frame."""


class Greeting:
    """The hellos of one pool: the same for all its nodes but for a few fields. Made once, when the pool starts.

    `image` has what the plugins add.
    """

    def __init__(self, settings: Settings, run: str, image: Image, modules: Modules, setup: str) -> None:
        self._settings = settings
        self._run = run
        self._modules = modules
        self._setup = setup
        # Found out once: the program may change its environment before the last node has come.
        self._env = {"PYTHONHASHSEED": hash_seed(run), **context.variables(), **image.env}
        self._context = context.record()

    def for_machine(self, machine: Machine) -> ClientHello:
        """Return what the agent on this machine must know."""
        settings, worker = self._settings, self._settings.worker
        timeout = worker.task_timeout
        return ClientHello(
            version=__version__,
            run=self._run,
            node=machine.name,
            python=PYTHON,
            lease_ms=int(settings.lease * 1000),
            generation=self._modules.generations.newest,
            worker=WorkerSettings(
                concurrency=machine.concurrency or worker.concurrency,
                processes=worker.executor == "process",
                env={**self._env, **nesting.worker_environment()},
                shares_files=machine.shares_files,
                serves_modules=self._modules.sources is not None and not machine.shares_files,
                sys_path=list(self._modules.path) if machine.shares_files else [],
                preload=[module for plugin in settings.plugins for module in plugin.preload],
                max_payload=worker.max_payload,
                cache_bytes=machine.cache_bytes if worker.cache_gb is None else max(1, int(worker.cache_gb * 1e9)),
                task_timeout_ms=None if timeout is None else max(1, int(timeout * 1000)),
                context=self._context,
                setup=self._setup,
                unwind=any(plugin.around_worker is not None for plugin in settings.plugins),
            ),
        )


def pickled_hooks(plugins: Sequence[Plugin], pickled: Callable[[Any], payload.Encoded]) -> str:
    """Return the hooks that the plugins have for workers, pickled and in base64; "" if they have none.

    Raise `ValueError` if the pickle is too large for a hello, and what `pickled`, which pickles them, raises.
    """
    with_hooks = [plugin for plugin in plugins if plugin.around_worker or plugin.decorate]
    if not with_hooks:
        return ""
    pickle, buffers = pickled([(plugin.around_worker, plugin.decorate) for plugin in with_hooks])
    if buffers or len(pickle) > MAX_SETUP:
        names = ", ".join(plugin.name for plugin in with_hooks)
        raise ValueError(
            f"the hooks of {names} pickle to more than {MAX_SETUP:,} bytes: let them load large data on the node"
        )
    return base64.b64encode(pickle).decode()


def hash_seed(run: str) -> str:
    """Return the PYTHONHASHSEED of all workers of a pool, so that sets have the same order in all of them.

    It is this process's own seed, if this process was started with one.
    """
    own = os.environ.get("PYTHONHASHSEED", "")
    # 0 would mean no randomization at all; the interpreter takes numbers below 2 ** 32.
    return own if own.isdecimal() else str(int(run[:8], 16) or 1)
