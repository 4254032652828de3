"""`joblib.Parallel(n_jobs=-1)` means all workers on all your machines.

from joblib import Parallel, delayed
import skyward_lite as sky

with sky.pool(provider=sky.Local(nodes=2), worker=sky.Worker(concurrency=10)):
    results = Parallel(n_jobs=-1)(delayed(slow_task)(i) for i in range(2000))
"""

from __future__ import annotations

from . import errors, plugins
from ._version import __version__
from .compute_pool import ComputePool, Worker, pool
from .errors import (
    NodeLostError,
    NodeStartError,
    PayloadTooLargeError,
    PoolClosedError,
    RemoteError,
    RemoteTraceback,
    SkywardError,
    TaskTimeoutError,
    WorkerCrashedError,
)
from .image import Image
from .plugins import Plugin, WorkerInfo
from .providers import Provider
from .providers.local import Local

__all__ = [
    "ComputePool",
    "Image",
    "Local",
    "NodeLostError",
    "NodeStartError",
    "PayloadTooLargeError",
    "Plugin",
    "PoolClosedError",
    "Provider",
    "RemoteError",
    "RemoteTraceback",
    "SkywardError",
    "TaskTimeoutError",
    "Worker",
    "WorkerCrashedError",
    "WorkerInfo",
    "__version__",
    "errors",
    "plugins",
    "pool",
]
