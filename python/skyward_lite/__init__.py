"""`joblib.Parallel(n_jobs=-1)` means all workers on all your machines.

from joblib import Parallel, delayed
import skyward_lite as sky

with sky.pool(provider=sky.Local(nodes=2), worker=sky.Worker(concurrency=10)):
    results = Parallel(n_jobs=-1)(delayed(slow_task)(i) for i in range(2000))
"""

from __future__ import annotations

import importlib
import sys

from ._version import __version__

# What typing.TYPE_CHECKING is for type checkers, without the 10 ms that importing typing takes.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from . import errors, messages, plugins
    from .client.lazy import ComputeFunction, LazyCall, LazyGroup, compute, gather
    from .client.pool import ComputePool, Node, Status, Worker, pool
    from .errors import (
        MessageError,
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
    from .providers import Cost, Provider
    from .providers.aws.provider import AWS
    from .providers.local import Local
    from .providers.ssh import SSH, Host
else:
    # The names above are imported when the first of them is asked for. The agent and the worker, whose modules are in
    # this package too, start sooner without the client's part.
    _HOMES = (
        *("client.lazy", "client.pool", "errors", "image", "plugins"),
        *("providers", "providers.local", "providers.ssh", "providers.aws"),
    )

    def __getattr__(name):
        if name in ("errors", "messages", "plugins"):
            return importlib.import_module(f".{name}", __name__)
        if name in __all__:
            for home in _HOMES:
                names = vars(importlib.import_module(f".{home}", __name__))
                if name in names:
                    globals()[name] = names[name]
                    return names[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return __all__


__all__ = [
    "AWS",
    "ComputeFunction",
    "ComputePool",
    "Cost",
    "Host",
    "Image",
    "LazyCall",
    "LazyGroup",
    "Local",
    "MessageError",
    "Node",
    "NodeLostError",
    "NodeStartError",
    "PayloadTooLargeError",
    "Plugin",
    "PoolClosedError",
    "Provider",
    "RemoteError",
    "RemoteTraceback",
    "SSH",
    "SkywardError",
    "Status",
    "TaskTimeoutError",
    "Worker",
    "WorkerCrashedError",
    "WorkerInfo",
    "__version__",
    "compute",
    "errors",
    "gather",
    "messages",
    "plugins",
    "pool",
]


def _backend(**parameters):  # type: ignore[no-untyped-def]
    from .client.joblib_backend import SkywardBackend

    return SkywardBackend(**parameters)


# So that the name is explained also before the first pool. Where joblib comes later, the first pool registers it.
if hasattr(sys.modules.get("joblib"), "register_parallel_backend"):
    sys.modules["joblib"].register_parallel_backend("skyward", _backend)
